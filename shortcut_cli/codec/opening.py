"""A codec from what a recipe or a command line calls it."""

from pathlib import Path
from typing import Any

from shortcut_cli import sealed
from shortcut_cli.codec import encodec, own, weights
from shortcut_cli.codec.stream import MONO, Layout


def codec(name: str, block_frames: int = encodec.BLOCK_FRAMES) -> Any:
    """The codec behind a known name, "untrained:SEED", or the path of a checkpoint.

    block_frames: how many frames EnCodec computes at once; its codes do not depend on it.

    Raises UsageError where it is none of these, Unavailable where weights can't be fetched, CheckFailed where a file is
    not what it should be.
    """
    if (drawn := weights.seed(name)) is not None:
        return _packaged(encodec.untrained(*drawn), drawn[1], block_frames)
    return of_file(weights.resolve(name), block_frames)


def of_file(path: Path, block_frames: int = encodec.BLOCK_FRAMES) -> Any:
    """The codec of a codec.pt, or of a checkpoint of the `encodec` package."""
    if sealed.is_sealed(path):
        return own.load(path)
    return _packaged(*encodec.load(path), block_frames)


def layout(path: Path) -> Layout:
    """How the codes of the codec in a file come."""
    return MONO if sealed.is_sealed(path) else encodec.load(path)[1]


def _packaged(model: Any, found: Layout, block_frames: int) -> Any:
    return encodec.Codec(model, block_frames) if found == MONO else encodec.Segments(model)
