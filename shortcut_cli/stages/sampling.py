"""Sample: run.pt -> files of its domain that open in other programs, each with a .json that says how it was made."""

import glob
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shortcut_cli import SCHEMA_VERSION, cleanup, files
from shortcut_cli.config.schema import MOST_THREADS, SampleConfig
from shortcut_cli.errors import CheckFailed, UsageError, in_short
from shortcut_cli.events import Note, Progress, Report, Sampled
from shortcut_cli.formatting import to_json
from shortcut_cli.inference.decoding import prepared
from shortcut_cli.inference.generate import generate
from shortcut_cli.inference.prompts import NO_PROMPT, Prompt, check_file, kept
from shortcut_cli.inference.runs import Run
from shortcut_cli.kept.inputs import read
from shortcut_cli.models.transformer import Decoder
from shortcut_cli.tokenizers.base import Constraint, Tokenizer, shared
from shortcut_cli.training import conditions

MOST_ROWS = 256  # samples that are drawn at once
MOST_BYTES = 768 << 20  # that their caches and logits take


def stem(seed: int, number: int) -> str:
    """The file name of a sample, without its extension."""
    return f"sample-{seed}-{number:03d}"


def sidecar_path(made: Path) -> Path:
    """The .json that belongs to a sample."""
    return made.with_suffix(made.suffix + ".json")


def sample_path(sidecar: Path) -> Path:
    """The sample that a .json belongs to."""
    return sidecar.with_suffix("")


def is_sidecar(path: Path) -> bool:
    """Whether a .json is one that we wrote for a sample, which may be gone."""
    try:
        return (read(path) or {}).keys() >= {"checkpoint_sha256", "sampler", "number"}
    except CheckFailed:
        return False


def sample(
    run: Run,
    folder: Path,
    config: SampleConfig,
    *,
    prompt: Prompt | None,
    device: str,
    report: Report,
    only: int | None = None,
    have: Collection[Path] = (),
    stream: bool = False,
) -> list[Path]:
    """Write `config.n` samples, each with a .json beside it; returns the paths of the samples.

    The .json is written last, and has a temporary name before its sample is there: so a sample without it that a killed
    process left is known, and takes nobody's place.

    prompt: what every sample continues, and contains unless it says otherwise. only: the number of the one sample to
    write; all are drawn even so, since the last bits of what a model computes for a row can depend on the other rows.
    have: samples that are there, made from the same, and are not written again. stream: report the text of the one
    sample that is written as it is drawn, in events Sampled.

    Raises UsageError if a file would be overwritten, the prompt can't be read, or `config.tokens` is too small.
    """
    tokenizer = run.tokenizer()
    start = [tokenizer.eos]
    if prompt is not None:
        start += prompt.ids(tokenizer).tolist()
    have, numbers = {*have}, range(config.n) if only is None else range(only, only + 1)

    def place(number: int) -> Path:
        return folder / f"{stem(config.seed, number)}{tokenizer.extension}"

    there = {*os.listdir(folder)} if folder.is_dir() else set()
    for number in numbers if there else ():
        path = place(number)
        sidecar_there = sidecar_path(path).name in there and not is_sidecar(sidecar_path(path))
        if path not in have and ((path.name in there and not files.unfinished(sidecar_path(path))) or sidecar_there):
            taken = sidecar_path(path) if path.name not in there else path
            raise UsageError(f"{taken} exists already", "choose another --seed or --out")
    needed = _followed(tokenizer, start, 1)[0].needed
    if config.tokens < needed:
        raise UsageError(
            f"{config.tokens} tokens are too few for a file that is not empty",
            f"--tokens {needed}, or more",
        )
    files.make_folder(folder)
    same = {
        "schema_version": SCHEMA_VERSION,
        "checkpoint": os.path.relpath(run.path, folder),
        "checkpoint_sha256": files.sha256(run.path),
        "model": run.recipe.model.name,
        "sampler": config.model_dump(),
        "device": device,
        "conditions": conditions.now(device),
        "prompt": os.path.relpath(prompt.path, folder) if prompt and prompt.path else None,
        "prompt_tokens": len(start) - 1,
        **(prompt.made_from if prompt else NO_PROMPT),
    }
    shown = _Shown(tokenizer, start[1:], prompt, report) if stream else None
    size = batch_rows(run.model)
    for first in range(0, config.n, size):
        batch = [place(number) for number in range(first, min(first + size, config.n))]
        unwritten = {path for number, path in enumerate(batch, first) if number in numbers and path not in have}
        if not unwritten:
            continue
        with prepared(run.model, len(batch), config.precision):
            made = generate(
                run.model,
                torch.tensor([start] * len(batch), device=device),
                config.tokens,
                config=config,
                eos=tokenizer.eos,
                constraints=_followed(tokenizer, start, len(batch)),
                progress=None if shown else lambda done: report(_progress(done, config)),
                drawn_id=shown.follow(numbers[0] - first, tokenizer.eos) if shown else None,
                first=first,
            )
        if not shown:
            report(_progress(config.tokens, config))  # they can end early
        for number, (path, ids) in enumerate(zip(batch, made.ids, strict=True)):
            if path not in unwritten:
                continue
            sidecar = same | {
                "number": first + number,
                "tokens": len(ids),
                "ended": bool(ids) and ids[-1] == tokenizer.eos,
                "forced_steps": made.forced[number],
            }
            if shown:
                shown.end()
            _write(tokenizer, start[1:] + ids, path, sidecar, prompt)
            if prompt and ids == [tokenizer.eos]:
                report(Note(text=f"{path}: the model ended right after the prompt, so there is nothing new"))
    return [place(number) for number in numbers]


def batch_rows(model: Decoder) -> int:
    """How many samples are drawn at once: as many as have room, for their caches and for logits of a whole context."""
    config, vocabulary = model.config, model.head.weight.shape[0]
    return max(1, min(MOST_ROWS, MOST_BYTES // (config.context * (model.cache_bytes_per_token() + 4 * vocabulary))))


def _followed(tokenizer: Tokenizer, start: list[int], count: int) -> list[Constraint]:
    """Constraints that have followed the ids that every sample begins with."""
    constraints = [tokenizer.constraint() for _ in range(count)]
    for constraint in constraints:
        for token in start[1:]:
            constraint.push(token)
    return constraints


def _progress(done: int, config: SampleConfig) -> Progress:
    return Progress(task="sample", done=done, total=config.tokens, unit="tokens")


class _Shown:
    """Reports the text of one sample while it is drawn: in total, what its file will hold."""

    def __init__(self, tokenizer: Tokenizer, start: list[int], prompt: Prompt | None, report: Report) -> None:
        self.stream, self.report = tokenizer.stream(), report
        old = tokenizer.stream()
        # What is not shown, as far as the text begins with it: it can end with part of a character.
        self.hidden = "".join(map(old.push, start)) + old.end() if prompt and prompt.only_new else ""
        self._show("".join(map(self.stream.push, start)))

    def follow(self, row: int, eos: int) -> Callable[[int, int], None]:
        """What `generate` is to call with a row and the id drawn for it, to show this row."""

        def drawn_id(its: int, token: int) -> None:
            if its == row and token != eos:
                self._show(self.stream.push(token))

        return drawn_id

    def end(self) -> None:
        """Show what is left."""
        self._show(self.stream.end())

    def _show(self, text: str) -> None:
        same = shared(self.hidden, text)
        self.hidden = self.hidden[same:] if same == len(text) else ""
        if text[same:]:
            self.report(Sampled(text[same:]))


def _write(tokenizer: Tokenizer, ids: list[int], path: Path, sidecar: dict[str, Any], prompt: Prompt | None) -> None:
    """Write a sample, then its .json, or neither. sidecar: its content, but for what the file is like."""
    with cleanup.due(lambda: path.unlink(missing_ok=True)), files.writing(sidecar_path(path)) as stream:
        try:
            found = _decoded(tokenizer, ids, path, sidecar, prompt) | {"sha256": files.sha256(path)}
            stream.write((to_json(sidecar | found, indent=1) + "\n").encode())
            stream.flush()
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    files.sweep(path.parent, f"{glob.escape(path.name)}.")


def _decoded(
    tokenizer: Tokenizer, ids: list[int], path: Path, sidecar: dict[str, Any], prompt: Prompt | None
) -> dict[str, Any]:
    """Write the file of a sample; returns its units, and where what is new begins in it."""
    if prompt is None:
        return {"units": tokenizer.decode(ids, path), "new_begins": None, "left_out": None}
    count, only_new = sidecar["prompt_tokens"], prompt.only_new
    recorded = prompt.path if prompt.seam else None
    found = tokenizer.decode_after(ids, path, count, recorded=recorded, only_new=only_new)
    before, zero = {"token": count}, {"token": 0}
    return {
        "units": found.units,
        "new_begins": (zero if only_new else before) | found.begins,
        "left_out": (before if only_new else zero) | found.left_out,
    }


@dataclass(frozen=True)
class Like:
    """How to make a sample again, from its .json."""

    checkpoint: Path
    prompt: Prompt | None
    settings: list[str]  # of the sampler, as `reading.with_settings` takes them
    number: int
    device: str
    conditions: dict[str, Any]  # empty if an earlier version made the sample

    @property
    def threads(self) -> int:
        """The number of threads that made the sample; 0 if it is not known."""
        count = self.conditions.get("threads")
        return count if type(count) is int and 0 < count <= MOST_THREADS else 0


def like(sidecar: Path, checkpoint: Path | None, prompt: Path | None) -> Like:
    """Read a sample's .json. checkpoint, prompt: where these are now, if they have moved.

    Raises UsageError if the .json or a file that it names is missing, CheckFailed if it is damaged or such a file has
    changed.
    """
    if sidecar.is_dir():
        raise UsageError(f"{sidecar} can't be read: it is a folder")
    try:
        content = read(sidecar)
    except CheckFailed as error:
        raise CheckFailed(f"{sidecar} is not the .json of a sample: {error.message}") from error
    if content is None:
        raise UsageError(f"{sidecar} can't be read: there is no such file")
    try:
        hashed, named = content["checkpoint_sha256"], sidecar.parent / content["checkpoint"]
        settings = [f"sample.{key}={value}" for key, value in content["sampler"].items()]
        number, device = int(content["number"]), str(content["device"])
        made = content.get("conditions")
        made = made if isinstance(made, dict) else {}
        check_file(checkpoint or named, hashed, sidecar, "--ckpt")
        again = kept(content, sidecar, prompt)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckFailed(f"{sidecar} is not the .json of a sample: {in_short(error)}") from error
    return Like(checkpoint or named, again, settings, number, device, made)
