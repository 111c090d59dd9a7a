"""Prompts: a file, standard input or a text, how much of it is given to a model, and what is kept of that."""

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shortcut_cli import files
from shortcut_cli.errors import CheckFailed, Rejected, UsageError
from shortcut_cli.tokenizers.base import Tokenizer

MOST_BYTES = 1 << 20  # of a text that is no file: the .json of every sample keeps it
MOST_SHOWN = 200  # characters of what was given, in a message
THROUGH_A_PIPE = "a text that looks like a path goes through a pipe: printf %s TEXT | shortcut sample --prompt - ..."
Limit = dict[str, float]  # how much of a prompt is given: {"tokens": 100} or {"seconds": 2.5}; empty: all


@dataclass(frozen=True)
class Given:
    """What a command says about its prompt. Raises UsageError if its options don't go together."""

    prompt: str | None = None  # a path, a text, or "-"
    read: Callable[[], bytes] = field(default=bytes, compare=False)  # standard input, up to MOST_BYTES + 1
    tokens: int | None = None
    seconds: float | None = None
    only_new: bool = False

    def __post_init__(self) -> None:
        said = {"--prompt-tokens": self.tokens, "--prompt-seconds": self.seconds, "--only-new": self.only_new or None}
        flags = [flag for flag, value in said.items() if value is not None]
        if self.prompt is None and flags:
            raise UsageError(
                f"{flags[0]} is given without --prompt", "add --prompt with a file, a text, or - for standard input"
            )
        if len(self.limit) > 1:
            raise UsageError("--prompt-tokens and --prompt-seconds both say how much is given", "leave out one of them")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise UsageError(f"--prompt-seconds {self.seconds} is not above 0, or not finite")

    @property
    def limit(self) -> Limit:
        """How much of the prompt is given."""
        said = {"tokens": self.tokens, "seconds": self.seconds}
        return {unit: amount for unit, amount in said.items() if amount is not None}


@dataclass(frozen=True)
class Prompt:
    """A prompt: a file or a text, how much of it is given, and how samples contain it."""

    path: Path | None
    text: str | None = None
    limit: Limit = field(default_factory=dict)
    only_new: bool = False  # samples are what follows it
    seam: dict[str, Any] | None = None  # samples contain the file itself, joined like this; None: what its ids give

    @property
    def name(self) -> str:
        """What messages call it."""
        return "the prompt" if self.path is None else f"prompt {self.path}"

    @property
    def sha256(self) -> str:
        """Of the file's bytes, or of the text's in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest() if self.text is not None else files.sha256(self._file)

    @property
    def _file(self) -> Path:
        assert self.path is not None, self
        return self.path

    def ids(self, tokenizer: Tokenizer) -> np.ndarray:
        """The ids that are given, int64 (T,). Raises UsageError with the reason if there are none such."""
        try:
            ids = self._all(tokenizer)
            return ids[: self._count(tokenizer, ids)]
        except Rejected as reason:
            own = self.path is None or self.path.name.lower().endswith(tokenizer.suffixes)
            hint = "" if own else f"this run reads {', '.join(tokenizer.suffixes)}"
            raise UsageError(f"{self.name} can't be used: {reason}", hint) from reason

    def _all(self, tokenizer: Tokenizer) -> np.ndarray:
        if self.text is None:
            return tokenizer.prompt(self._file, self.limit)
        with files.temporary_folder() as folder:
            path = folder / f"prompt{tokenizer.extension}"
            path.write_bytes(self.text.encode())
            return tokenizer.prompt(path)

    def _count(self, tokenizer: Tokenizer, ids: np.ndarray) -> int:
        """How many of the ids are given."""
        if not self.limit:
            return len(ids)
        if "seconds" in self.limit:
            count = tokenizer.first(ids, self.limit["seconds"])
            if not count:
                raise Rejected(f"has no whole token in its first {self.limit['seconds']} s")
            return count
        count = int(self.limit["tokens"])
        if count > len(ids):
            raise UsageError(f"{self.name} has only {len(ids):,} tokens", f"--prompt-tokens {len(ids)}, or fewer")
        if tokenizer.whole(count) != count:
            nearest = tokenizer.whole(count) or next(
                more for more in range(count, len(ids) + 1) if tokenizer.whole(more)
            )
            raise UsageError(f"{count} tokens of {self.name} end within a frame", f"--prompt-tokens {nearest}")
        return count

    @property
    def made_from(self) -> dict[str, Any]:
        """All of it that a sample depends on, as the sample's .json keeps it."""
        return {
            "prompt_text": self.text,
            "prompt_sha256": self.sha256,
            "prompt_limit": self.limit or None,
            "only_new": self.only_new,
            "seam": self.seam,
        }


NO_PROMPT = {"prompt_text": None, "prompt_sha256": None, "prompt_limit": None, "only_new": False, "seam": None}


def found(given: Given, kind: type[Tokenizer]) -> Prompt | None:
    """The prompt that a command means, for a domain; None if it names none.

    If there is a file of that name, it is that file. Otherwise it is a text, if the domain is text, unless it looks
    like a path: something else has that name, or it is a word that has a "/", or ends like a file of the domain.

    Raises UsageError if it is neither, or could be meant as both.
    """
    said = given.prompt
    if said is None:
        return None
    if given.seconds is not None and kind.is_text:
        raise UsageError(
            "--prompt-seconds is for sound and MIDI: a text has no seconds, only tokens", "--prompt-tokens N"
        )
    if said == "-" and not kind.is_text:
        raise UsageError(
            "standard input can't be the prompt: only text is read from it", f"--prompt FILE{kind.extension}"
        )
    if said == "-":
        return Prompt(None, _text(given.read(), "standard input"), given.limit, given.only_new)
    if os.path.isfile(said):
        return Prompt(
            Path(said), None, given.limit, given.only_new, None if given.only_new else dict(kind.seam) or None
        )
    there = bool(said) and os.path.lexists(said)
    name = said if len(said) <= MOST_SHOWN else f"{said[:MOST_SHOWN]} ..."
    wrong = f"prompt {name} {'is not a file' if there else 'does not exist'}"
    word = not any(map(str.isspace, said))
    like_a_path = there or (word and "/" in said) or said.lower().endswith(kind.suffixes)
    if like_a_path or not kind.is_text:
        files.check_known(said)
    if not kind.is_text:
        raise UsageError(wrong, f"the path of a {kind.extension} file; only a text can be given itself")
    if like_a_path:
        raise UsageError(f"{wrong}, and looks too much like a path to be a text", f"check the path; {THROUGH_A_PIPE}")
    return Prompt(None, _text(os.fsencode(said), "--prompt"), given.limit, given.only_new)


def _text(content: bytes, source: str) -> str:
    """A text that can be a prompt."""
    if not content:
        raise UsageError(f"{source} is empty", "leave out --prompt to continue nothing")
    if len(content) > MOST_BYTES:
        raise UsageError(f"{source} has over {MOST_BYTES:,} bytes", "write it to a file, and give --prompt FILE")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UsageError(
            f"{source} is not UTF-8: byte 0x{byte:02x} at offset {error.start} ({error.reason})"
        ) from error


def kept(content: dict[str, Any], sidecar: Path, moved: Path | None) -> Prompt | None:
    """The prompt of a sample, from the content of its .json; None if it has none. moved: where its file is now.

    Raises ValueError, KeyError, TypeError or AttributeError if that can't be read, UsageError if the file is missing,
    CheckFailed if it, or the text, has changed.
    """
    name, expected, text = content["prompt"], content["prompt_sha256"], content.get("prompt_text")
    # Earlier versions kept none of these, and rendered the prompt of a sound.
    limit, only_new, seam = content.get("prompt_limit") or {}, content.get("only_new", False), content.get("seam")
    if type(only_new) is not bool or not isinstance(seam, dict | None):
        raise ValueError(f"only_new {only_new!r}, seam {seam!r}")
    if limit.keys() - {"tokens", "seconds"} or not all(
        type(amount) in (int, float) and 0 < amount < math.inf for amount in limit.values()
    ):
        raise ValueError(f"prompt_limit {limit!r}")
    path = moved or (None if name is None else sidecar.parent / name)
    if path is not None:
        check_file(path, expected, sidecar, "--prompt")
        return Prompt(path, None, limit, only_new, seam)
    if text is None:
        return None
    prompt = Prompt(None, text, limit, only_new)
    if prompt.sha256 != expected:
        raise CheckFailed(f"{sidecar} is damaged: its prompt_text does not have its prompt_sha256")
    return prompt


def check_file(path: Path, sha256: str, sidecar: Path, flag: str) -> None:
    """Raises UsageError if a file that a sample's .json names is missing, CheckFailed if it is another one now."""
    if not path.is_file():
        raise UsageError(f"{path}, which {sidecar} names, does not exist", f"give its new path with {flag}")
    if files.sha256(path) != sha256:
        raise CheckFailed(f"{path} is not the file that {sidecar} was made with", f"give that file with {flag}")
