"""Attention: where the final layer looked, as a picture and as numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from shortcut_cli import files
from shortcut_cli.checkpoint import Run
from shortcut_cli.errors import UsageError
from shortcut_cli.models.blocks import Trace

SHOWN_TOKENS = 256  # columns that can still be told apart in the picture


@torch.no_grad()
def attend(run: Run, ids: np.ndarray, folder: Path, *, device: str) -> dict[str, Any]:
    """Write attention.png and attention.npz for the first `context` of `ids`, int64 (T,); return the mean weights.

    attention.npz: `ids` (T,), `sources` (M,), `depth_weights` (H, M, T): how much of the attention of head h at token
    t goes to source m, summing to one over the sources.

    Raises UsageError where the model attends to no layers, or the files exist already.
    """
    if not run.model.taps:
        raise UsageError(f"{run.path} is a {run.recipe.model.name}, whose final layer attends to no other layer")
    if not len(ids):
        raise UsageError("there are no tokens to look at", "give a longer --prompt")
    picture, numbers = folder / "attention.png", folder / "attention.npz"
    for path in (picture, numbers):
        if path.exists():
            raise UsageError(f"{path} exists already", "choose another --out")
    ids = ids[: run.recipe.model.context]
    trace = Trace()
    run.model(torch.from_numpy(ids)[None].to(device), trace=trace)
    weights = trace.depth_weights[0].float().cpu().numpy()  # (H, M, T)
    folder.mkdir(parents=True, exist_ok=True)
    with files.writing(numbers) as stream:
        np.savez(stream, ids=ids, sources=np.array(run.model.taps), depth_weights=weights)
    _draw(weights, run.model.taps, picture)
    shares = {source: float(share) for source, share in zip(run.model.taps, weights.mean(axis=(0, 2)), strict=True)}
    return {
        "schema_version": 1,
        "model": run.recipe.model.name,
        "tokens": len(ids),
        "mean_weights": shares,
        "picture": str(picture),
        "numbers": str(numbers),
    }


def _draw(weights: np.ndarray, sources: tuple[str, ...], path: Path) -> None:
    """Two heat maps: source by token (mean over heads), and source by head (mean over tokens). weights: (H, M, T)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.5 + 0.5 * len(sources)), layout="constrained")
    FigureCanvasAgg(figure)
    by_token, by_head = figure.subplots(1, 2, width_ratios=(4, 1))
    shown = weights.mean(axis=0)[:, :SHOWN_TOKENS]
    for axes, grid, label in ((by_token, shown, "token"), (by_head, weights.mean(axis=2).T, "head")):
        image = axes.imshow(grid, aspect="auto", origin="lower", interpolation="nearest", vmin=0)
        axes.set_xlabel(label)
        figure.colorbar(image, ax=axes)
    by_token.set_yticks(range(len(sources)), sources)
    by_head.set_yticks([])
    by_token.set_title("share of the final layer's attention, mean over heads", fontsize="medium")
    by_head.set_title("by head", fontsize="medium")
    with files.writing(path) as stream:
        figure.savefig(stream, format="png", dpi=120)
