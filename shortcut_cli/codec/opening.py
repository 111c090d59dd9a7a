"""A codec from what a recipe or a command line calls it."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from shortcut_cli import sealed
from shortcut_cli.codec import encodec, own, weights
from shortcut_cli.codec.stream import MONO, Layout
from shortcut_cli.workers import keep_freed_memory


def codec(name: str, block_frames: int = encodec.BLOCK_FRAMES) -> Any:
    """The codec behind a known name, "untrained:SEED", or the path of a checkpoint.

    block_frames: how many frames EnCodec computes at once; its codes do not depend on it.

    Raises UsageError where it is none of these, Unavailable where weights can't be fetched, CheckFailed where a file is
    not what it should be.
    """
    if (drawn := weights.seed(name)) is not None:
        return _drawn(*drawn, block_frames)
    return of_file(weights.resolve(name), block_frames)


def of_file(path: Path, block_frames: int = encodec.BLOCK_FRAMES) -> Any:
    """The codec of a codec.pt, or of a checkpoint of the `encodec` package."""
    status = path.stat()
    return _read(path, status.st_mtime_ns, status.st_size, block_frames)


# A worker process is given the tokenizer anew with every file; a codec keeps nothing of a stream, and serves them all.
@lru_cache(maxsize=2)
def _drawn(seed: int, layout: Layout, block_frames: int) -> Any:
    return _packaged(encodec.untrained(seed, layout), layout, block_frames)


@lru_cache(maxsize=2)
def _read(path: Path, _changed_ns: int, _size: int, block_frames: int) -> Any:
    if sealed.is_sealed(path):
        return own.load(path)
    return _packaged(*encodec.load(path), block_frames)


def layout(path: Path) -> Layout:
    """How the codes of the codec in a file come."""
    return MONO if sealed.is_sealed(path) else encodec.load(path)[1]


def _packaged(model: Any, found: Layout, block_frames: int) -> Any:
    keep_freed_memory()
    return encodec.Codec(model, block_frames) if found == MONO else encodec.Segments(model)
