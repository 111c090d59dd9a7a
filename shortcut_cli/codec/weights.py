"""Where codec weights come from: the package, a name that is fetched once, a file, or a seed."""

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shortcut_cli import files
from shortcut_cli.codec.stream import MONO, STEREO, Layout
from shortcut_cli.errors import Unavailable, UsageError

BASE_URL = "https://dl.fbaipublicfiles.com/encodec/v0"  # encodec.model.ROOT_URL
URL_VARIABLE = "SHORTCUT_WEIGHTS_URL"
TIMEOUT_S = 20
ATTEMPTS = 4  # to go on with a download that breaks off
UNTRAINED = {"untrained:": MONO, "untrained_48khz:": STEREO}
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Official:
    """A published checkpoint: its file, about how large it is, and how its SHA-256 begins (torch.hub's convention)."""

    file: str
    about_mb: int
    sha256: str
    layout: Layout


OFFICIAL = {
    "encodec_24khz": Official("encodec_24khz-d7cc33bc.th", 93, "d7cc33bc", MONO),
    "encodec_48khz": Official("encodec_48khz-7e698e3e.th", 75, "7e698e3e", STEREO),
}
EMBEDDED = {"mini": Path(__file__).parent / "mini.pt"}  # a name stands for one file for ever: see docs/mini.md
NAMES = (*EMBEDDED, *OFFICIAL)


def cached(name: str) -> Path:
    """Where the file of an official checkpoint lies, or would."""
    return files.cache_folder() / OFFICIAL[name].file


def url(name: str) -> str:
    """Where the file of an official checkpoint is fetched from."""
    return f"{os.environ.get(URL_VARIABLE, BASE_URL).rstrip('/')}/{OFFICIAL[name].file}"


def resolve(weights: str) -> Path:
    """The file behind `tokenizer.weights`: a name, fetched at first use, or a path.

    Raises UsageError where it is neither, Unavailable where an official file can't be had.
    """
    if weights in EMBEDDED:
        return EMBEDDED[weights]
    if weights in OFFICIAL:
        return fetch(weights)
    path = Path(weights)
    if not path.is_file():
        raise UsageError(
            f"tokenizer.weights {weights!r} is neither a file nor one of {', '.join(NAMES)}",
            "give the path of a codec.pt or of a checkpoint of the `encodec` package, or a known name",
        )
    return path


def seed(weights: str) -> tuple[int, Layout] | None:
    """The seed of "untrained:SEED", weights for tests, and their layout; None for any other.

    Raises UsageError where the seed is no number.
    """
    for prefix, layout in UNTRAINED.items():
        if weights.startswith(prefix):
            text = weights.removeprefix(prefix)
            if not text.isdecimal():
                raise UsageError(f"tokenizer.weights {weights!r} has no seed", f"for example {prefix}0")
            return int(text), layout
    return None


def layout(weights: str) -> Layout | None:
    """How the codes of a codec come, where its name says so."""
    if (drawn := seed(weights)) is not None:
        return drawn[1]
    return OFFICIAL[weights].layout if weights in OFFICIAL else MONO if weights in EMBEDDED else None


def fetch(name: str, progress: Progress | None = None) -> Path:
    """The cached file of an official checkpoint, downloaded first where it is missing: complete, with the right sum.

    What arrived of a download that broke off stays beside it as .part, and the next one goes on there.
    progress: called with the bytes that are there and the bytes of the file.

    Raises Unavailable where it can't be had.
    """
    path = cached(name)
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.held(path.parent, f"shortcut codec get {name}"):
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
                f"the weights {name} can't be fetched from {url(name)}: {reason}", ways_out(name)
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
    """What to do where an official checkpoint can't be fetched."""
    return (
        f"--set tokenizer.weights=mini works offline; or put {OFFICIAL[name].file} at {cached(name)}, name a "
        f"checkpoint with --set tokenizer.weights=PATH, or a mirror with the environment variable {URL_VARIABLE}"
    )


def _download(address: str, part: Path, progress: Progress | None) -> None:
    """Bring `part` to the length that the server names, going on behind what is there where the server can."""
    there = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={there}-"} if there else {})  # noqa: S310
    try:
        reply = urllib.request.urlopen(request, timeout=TIMEOUT_S)  # noqa: S310
    except urllib.error.HTTPError as error:
        if there and error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            error.close()  # nothing is left to fetch, or `part` is of another file: its sum will say
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
