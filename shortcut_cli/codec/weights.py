"""Sources of codec weights: the package itself, a published checkpoint that is downloaded once, a file, or a seed."""

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shortcut_cli import files, registry
from shortcut_cli.codec.layout import MONO, STEREO, Layout
from shortcut_cli.errors import Unavailable, UsageError

BASE_URL = "https://dl.fbaipublicfiles.com/encodec/v0"  # encodec.model.ROOT_URL
URL_VARIABLE = "SHORTCUT_WEIGHTS_URL"
TIMEOUT_S = 20
ATTEMPTS = 4  # to complete a download that breaks off
SEED_DIGITS = 18  # of 63 bits
UNTRAINED = {"untrained:": MONO, "untrained_48khz:": STEREO}
OnProgress = Callable[[int, int], None]  # bytes on disk, bytes in total (0: unknown)


@dataclass(frozen=True)
class Official:
    """A published checkpoint: file name, and the first digits of its SHA-256 (as torch.hub)."""

    file: str
    sha256: str
    layout: Layout


_FILES = (
    Official("encodec_24khz-d7cc33bc.th", "d7cc33bc", MONO),
    Official("encodec_48khz-7e698e3e.th", "7e698e3e", STEREO),
)
OFFICIAL = dict(zip(registry.OFFICIAL_WEIGHTS, _FILES, strict=True))
EMBEDDED = {"mini": Path(__file__).parent / "mini.pt"}  # a name never changes its file: see docs/mini.md
NAMES = (*EMBEDDED, *OFFICIAL)


def cached(name: str) -> Path:
    """The path of an official checkpoint in the cache, whether it exists or not."""
    return files.cache_folder() / OFFICIAL[name].file


def url(name: str) -> str:
    """The address of an official checkpoint."""
    return f"{os.environ.get(URL_VARIABLE, BASE_URL).rstrip('/')}/{OFFICIAL[name].file}"


def resolve(weights: str) -> Path:
    """The file for `tokenizer.weights`: a known name, downloaded at first use, or a path.

    Raises UsageError if it is neither, Unavailable if an official file can't be downloaded.
    """
    if weights in EMBEDDED:
        return EMBEDDED[weights]
    if weights in OFFICIAL:
        return fetch(weights)
    check(weights)
    return Path(weights)


def check(weights: str) -> None:
    """Raise UsageError if a text is neither a known name nor a file."""
    path = Path(weights)
    if weights not in NAMES and path.is_dir():
        inside = path / "codec.pt"
        state = f"give the file in it: {inside}" if inside.is_file() else "it has no codec.pt either"
        raise UsageError(f"tokenizer.weights {weights!r} is a folder", state)
    if weights not in NAMES and not path.is_file():
        raise UsageError(
            f"tokenizer.weights {weights!r} is neither a file nor one of {', '.join(NAMES)}",
            "give the path of a codec.pt or of a checkpoint of the `encodec` package, or a known name",
        )


def seed(weights: str) -> tuple[int, Layout] | None:
    """The seed and the layout of "untrained:SEED" or "untrained_48khz:SEED" (weights for tests); None for other names.

    Raises UsageError if the seed is not a number of at most SEED_DIGITS digits.
    """
    for prefix, layout in UNTRAINED.items():
        if weights.startswith(prefix):
            text = weights.removeprefix(prefix)
            if not text.isdecimal() or len(text) > SEED_DIGITS:
                raise UsageError(f"tokenizer.weights {weights[:50]!r} has no seed", f"for example {prefix}0")
            return int(text), layout
    return None


def layout(weights: str) -> Layout | None:
    """The layout of a codec if its name determines it, else None."""
    if (drawn := seed(weights)) is not None:
        return drawn[1]
    return OFFICIAL[weights].layout if weights in OFFICIAL else MONO if weights in EMBEDDED else None


def fetch(name: str, progress: OnProgress | None = None) -> Path:
    """The cached file of an official checkpoint, downloaded if it is missing: complete, with the right checksum.

    An interrupted download is kept beside it as .part, and the next one resumes it.

    Raises Unavailable if it can't be downloaded.
    """
    path = cached(name)
    if path.is_file():
        return path
    wait = f"wait until it ends; it fills {path.parent}"
    with files.held(path.parent, "shortcut codec get", wait, known=lambda _: True):
        part = path.with_name(f"{path.name}.part")
        try:
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    _download(url(name), part, progress)
                    break
                except (http.client.HTTPException, ConnectionError, TimeoutError):
                    if attempt == ATTEMPTS:
                        raise
        except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or repr(error)
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            raise Unavailable(
                f"the weights {name} can't be downloaded from {url(name)}: {reason}", ways_out(name)
            ) from error
        sha256 = files.sha256(part)
        if not sha256.startswith(OFFICIAL[name].sha256):
            part.unlink()
            raise Unavailable(
                f"the weights {name} from {url(name)} have SHA-256 {sha256[:16]}..., not {OFFICIAL[name].sha256}...: "
                "the download is damaged or not the published file",
                ways_out(name),
            )
        os.replace(part, path)
        files.sync_folder(path.parent)
    return path


def ways_out(name: str) -> str:
    """What to do if an official checkpoint can't be downloaded."""
    return (
        f"--set tokenizer.weights=mini works offline; or save {OFFICIAL[name].file} as {cached(name)}, give a "
        f"checkpoint with --set tokenizer.weights=PATH, or a mirror with the environment variable {URL_VARIABLE}"
    )


def _download(address: str, part: Path, progress: OnProgress | None) -> None:
    """Complete `part`, resuming at its end if the server supports that."""
    there = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={there}-"} if there else {})  # noqa: S310
    try:
        reply = urllib.request.urlopen(request, timeout=TIMEOUT_S)  # noqa: S310
    except urllib.error.HTTPError as error:
        if there and error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            error.close()  # `part` is complete or belongs to another file; its checksum will tell
            return
        raise
    with reply:
        if reply.status != http.client.PARTIAL_CONTENT:
            there = 0
        length = reply.headers.get("Content-Length")
        total = there + int(length) if length else 0
        with open(part, "r+b" if there else "wb") as stream:
            stream.seek(there)
            while block := reply.read(files.BLOCK_BYTES):
                stream.write(block)
                if progress:
                    progress(stream.tell(), total)
            stream.flush()
            os.fsync(stream.fileno())
            if total and stream.tell() < total:
                raise ConnectionError(f"broke off after {stream.tell():,} of {total:,} bytes")
