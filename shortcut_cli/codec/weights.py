"""Where codec weights come from: a name that is fetched once, a file, or a seed."""

import hashlib
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from shortcut_cli import files
from shortcut_cli.errors import Unavailable, UsageError

BASE_URL = "https://dl.fbaipublicfiles.com/encodec/v0"  # encodec.model.ROOT_URL
URL_VARIABLE = "SHORTCUT_WEIGHTS_URL"
TIMEOUT_S = 20
UNTRAINED = "untrained:"


@dataclass(frozen=True)
class Official:
    """A published checkpoint: its file, and how its SHA-256 begins (torch.hub's convention)."""

    file: str
    sha256: str


OFFICIAL = {"encodec_24khz": Official("encodec_24khz-d7cc33bc.th", "d7cc33bc")}


def cached(name: str) -> Path:
    """Where the file of an official checkpoint lies, or would."""
    return files.cache_folder() / OFFICIAL[name].file


def resolve(weights: str) -> Path:
    """The file behind `tokenizer.weights`: an official name, fetched at first use, or a path.

    Raises UsageError where it is neither, Unavailable where an official file can't be had.
    """
    if weights in OFFICIAL:
        path = cached(weights)
        if not path.is_file():
            _fetch(weights, path)
        return path
    path = Path(weights)
    if not path.is_file():
        known = ", ".join(OFFICIAL)
        raise UsageError(
            f"tokenizer.weights {weights!r} is neither a file nor one of {known}",
            "give the path of a checkpoint of the `encodec` package, or a known name",
        )
    return path


def seed(weights: str) -> int | None:
    """The seed of "untrained:SEED", weights for tests; None for any other.

    Raises UsageError where the seed is no number.
    """
    if not weights.startswith(UNTRAINED):
        return None
    text = weights.removeprefix(UNTRAINED)
    if not text.isdecimal():
        raise UsageError(f"tokenizer.weights {weights!r} has no seed", "for example untrained:0")
    return int(text)


def _fetch(name: str, path: Path) -> None:
    """Download into the cache, complete and with the right sum, or not at all."""
    official = OFFICIAL[name]
    url = f"{os.environ.get(URL_VARIABLE, BASE_URL).rstrip('/')}/{official.file}"
    path.parent.mkdir(parents=True, exist_ok=True)
    ways_out = (
        f"put {official.file} at {path}, name a checkpoint with --set tokenizer.weights=PATH, "
        f"or a mirror with the environment variable {URL_VARIABLE}"
    )
    digest = hashlib.sha256()
    try:
        # The scheme is the program's or the user's own choice; nothing of it comes from a file.
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as reply, files.writing(path) as stream:  # noqa: S310
            while block := reply.read(files.BLOCK_BYTES):
                digest.update(block)
                stream.write(block)
            if not digest.hexdigest().startswith(official.sha256):
                raise Unavailable(
                    f"the weights {name} from {url} have SHA-256 {digest.hexdigest()[:16]}..., "
                    f"not {official.sha256}...: the download is damaged or not the published file",
                    ways_out,
                )
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise Unavailable(f"the weights {name} can't be fetched from {url}: {reason}", ways_out) from error
