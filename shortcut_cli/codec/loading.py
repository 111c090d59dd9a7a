"""Loads a codec by its name or path."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from shortcut_cli.codec import checkpoint, encodec, weights
from shortcut_cli.codec.layout import MONO, Layout
from shortcut_cli.data.workers import keep_freed_memory
from shortcut_cli.training import tensor_file


def codec(name: str, block_frames: int = encodec.BLOCK_FRAMES) -> Any:
    """The codec for a known name, "untrained:SEED", or the path of a checkpoint.

    block_frames: how many frames EnCodec computes at once; its codes do not depend on it.

    Raises UsageError if it is none of these, Unavailable if weights can't be fetched, CheckFailed if a file is damaged
    or not a codec.
    """
    if (drawn := weights.seed(name)) is not None:
        return _drawn(*drawn, block_frames)
    return of_file(weights.resolve(name), block_frames)


def of_file(path: Path, block_frames: int = encodec.BLOCK_FRAMES) -> Any:
    """The codec in a codec.pt or in a checkpoint of the `encodec` package."""
    status = path.stat()
    return _read(path, status.st_mtime_ns, status.st_size, block_frames)


# Worker processes receive the tokenizer again with every file, so codecs are cached per process. They are stateless:
# one serves all streams.
@lru_cache(maxsize=2)
def _drawn(seed: int, layout: Layout, block_frames: int) -> Any:
    return _packaged(encodec.untrained(seed, layout), layout, block_frames)


@lru_cache(maxsize=2)
def _read(path: Path, _changed_ns: int, _size: int, block_frames: int) -> Any:
    if tensor_file.is_sealed(path):
        return checkpoint.load(path)
    return _packaged(*encodec.load(path), block_frames)


def layout(path: Path) -> Layout:
    """The layout of the codec in a file."""
    return MONO if tensor_file.is_sealed(path) else encodec.load(path)[1]


def _packaged(model: Any, found: Layout, block_frames: int) -> Any:
    keep_freed_memory()
    return encodec.Codec(model, block_frames) if found == MONO else encodec.Segments(model)
