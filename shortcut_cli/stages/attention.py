"""Attention: where the final layer looked and what that was worth, in numbers and pictures.

A source is a layer that the final layer reads; its attention weight is the share of the attention that it gets. What a
source is worth is measured separately, by how much the loss rises when it is masked, so that the others take over its
share, and when it is shuffled, that is, replaced by the same source of another window.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shortcut_cli import SCHEMA_VERSION, cleanup, files
from shortcut_cli.data.shards import Ids
from shortcut_cli.errors import UsageError
from shortcut_cli.events import Progress, Report
from shortcut_cli.formatting import to_json
from shortcut_cli.inference import metrics
from shortcut_cli.inference.metrics import Floats
from shortcut_cli.inference.runs import Run
from shortcut_cli.models.loss import token_losses
from shortcut_cli.models.transformer import Trace
from shortcut_cli.tokenizers.base import Classes, Tokenizer

CHANGES: dict[str, Callable[[int], Trace]] = {
    "masked": lambda m: Trace(masked=m),
    "shuffled": lambda m: Trace(shuffled=m),
}
UNIT = "attention"  # what the four files are
NAMES = ("attention.png", "use.png", "attention.npz", "attention.json")


def _zero() -> Floats:
    """Where a sum of arrays of any shape starts."""
    return np.zeros(())


@dataclass
class ClassSums:
    """Sums over the tokens of one class. H heads, M sources."""

    tokens: int = 0
    nats: float = 0.0
    attention_weight: Floats = field(default_factory=_zero)  # (H, M)
    masked: Floats = field(default_factory=_zero)  # (M,) nats with each source masked
    shuffled: Floats = field(default_factory=_zero)  # (M,) nats with each source shuffled


@dataclass
class Measured:
    """What was measured in all windows: H heads, M sources, batches of B windows."""

    attention_weight: Floats = field(default_factory=_zero)  # (H, M) sums over tokens
    distance: Floats = field(default_factory=_zero)  # (H, M) sums over tokens, each times its attention weight
    entropy: Floats = field(default_factory=_zero)  # (H,) sums over tokens, nats
    largest: Floats = field(default_factory=_zero)  # (H,) sums over tokens
    losses: list[Floats] = field(default_factory=list)  # (B,) per batch: nats of each window
    masked: list[Floats] = field(default_factory=list)  # (B, M) per batch
    shuffled: list[Floats] = field(default_factory=list)  # (B, M) per batch, except of single windows
    classes: dict[str, dict[str, ClassSums]] = field(default_factory=dict)


def cut(read: Callable[[int, int], Ids], tokens: int, context: int, most: int) -> Ids:
    """At most `most` windows (N, T + 1), spread evenly; all but the last id are inputs, all but the first targets.

    read(first, count) returns part of `tokens` consecutive ids; T is `context`, or less if there are fewer tokens.
    """
    length = min(context + 1, tokens)
    count = max(1, min(most, tokens // length))
    starts = np.linspace(0, tokens - length, count).astype(np.int64)
    return np.stack([read(int(start), length) for start in starts])


@torch.no_grad()
def analyse(
    run: Run, windows: Ids, folder: Path, *, resamples: int, batch: int, device: str, report: Report
) -> dict[str, Any]:
    """Look at windows of ids, int64 (N, T + 1); write attention.png, use.png, attention.npz and attention.json.

    attention.npz describes the first window, as an excerpt: `ids` (T,), the tokens that are predicted; `sources` (M,);
    `depth_weights` (H, M, T): the attention weight of source m in head h when token t is predicted, with a sum of one
    over the sources; `distances` (H, M, T): how far back in time, in tokens, it reads on average.

    Tokens are classified by the token that is predicted. A single window can't be shuffled; then "shuffled" is None.

    Returns the content of attention.json.

    Raises UsageError if the model attends to no layers, if the windows are too short, or if the files exist already.
    """
    if not run.model.taps:
        raise UsageError(f"{run.path} is a {run.recipe.model.name}, whose final layer attends to no other layer")
    if windows.shape[1] < 2:
        raise UsageError("there are no tokens to look at", "give a longer --prompt")
    files.check_free(folder, UNIT, NAMES)
    tokenizer, measured = run.tokenizer(), Measured()
    excerpt: dict[str, Any] = {}
    for first, part in _batches(windows, batch):
        report(Progress(task="attention", done=first, total=len(windows), unit="windows"))
        ids = torch.from_numpy(part).to(device)
        trace = Trace(measure_distances=True)
        losses = _losses(run, ids, trace)
        if first == 0:
            shown = {"depth_weights": trace.depth_weights[0], "distances": trace.distances[0]}
            excerpt = {name: tensor.float().cpu().numpy() for name, tensor in shown.items()}
        changed = {
            change: np.stack([_losses(run, ids, changing(m)) for m in range(len(run.model.taps))], 1)
            for change, changing in CHANGES.items()
            if change == "masked" or len(part) > 1
        }  # (B, M, T) each
        attention_weights = trace.depth_weights.double().cpu().numpy()  # (B, H, M, T)
        _add(measured, losses, attention_weights, trace.distances.double().cpu().numpy(), changed)
        for row, targets in enumerate(part[:, 1:]):
            mine = {change: changed_losses[row] for change, changed_losses in changed.items()}
            _add_classes(measured, tokenizer.classes(targets), losses[row], attention_weights[row], mine)
    result = _result(run, windows, measured, resamples)
    _write(run, tokenizer, windows[0, 1:], excerpt, result, folder)
    return result


def _batches(windows: Ids, batch: int) -> Iterator[tuple[int, Ids]]:
    """(first, windows) of each batch: at least two windows, which shuffling needs, unless there is only one."""
    size = max(2, batch)
    starts = list(range(0, len(windows), size))
    if len(starts) > 1 and len(windows) - starts[-1] == 1:
        starts.pop()  # a single last window joins the batch before it
    for first, end in zip(starts, [*starts[1:], len(windows)], strict=True):
        yield first, windows[first:end]


def _losses(run: Run, ids: torch.Tensor, trace: Trace) -> Floats:
    """Loss of each target, nats (B, T)."""
    logits = run.model(ids[:, :-1], trace=trace)
    found: Floats = token_losses(logits, ids[:, 1:]).double().cpu().numpy()
    return found


def _add(measured: Measured, losses: Floats, weights: Floats, distances: Floats, changed: dict[str, Floats]) -> None:
    """Add one batch: losses (B, T), attention weights and distances (B, H, M, T), and changed losses (B, M, T)."""
    measured.attention_weight = measured.attention_weight + weights.sum((0, 3))
    measured.distance = measured.distance + (weights * distances).sum((0, 3))
    measured.entropy = measured.entropy - (weights * np.log(np.maximum(weights, 1e-30))).sum((0, 2, 3))
    measured.largest = measured.largest + weights.max(2).sum((0, 2))
    measured.losses.append(losses.sum(1))
    for change, rows in changed.items():
        getattr(measured, change).append(rows.sum(2))


def _add_classes(
    measured: Measured, sorted_by: dict[str, Classes], losses: Floats, weights: Floats, changed: dict[str, Floats]
) -> None:
    """Add one window to the classes of its targets: losses (T,), attention weights (H, M, T), changed losses (M, T)."""
    for way, classes in sorted_by.items():
        sums = measured.classes.setdefault(way, {name: ClassSums() for name in classes.names})
        for number, name in enumerate(classes.names):
            here = classes.of == number
            one = sums[name]
            one.tokens += int(here.sum())
            one.nats += float(losses[here].sum())
            one.attention_weight = one.attention_weight + weights[..., here].sum(-1)
            for change, rows in changed.items():
                setattr(one, change, getattr(one, change) + rows[:, here].sum(1))


def _result(run: Run, windows: Ids, measured: Measured, resamples: int) -> dict[str, Any]:
    each = windows.shape[1] - 1
    tokens = len(windows) * each
    losses = np.concatenate(measured.losses)  # (N,)
    has_shuffled = len(measured.shuffled) == len(measured.losses)
    sources = []
    for m, name in enumerate(run.model.taps):
        attention_weight = measured.attention_weight[:, m]  # (H,)
        entry: dict[str, Any] = {
            "source": name,
            "attention_weight": float(attention_weight.mean() / tokens),
            "attention_weight_by_head": (attention_weight / tokens).tolist(),
            "distance_tokens": float(measured.distance[:, m].sum() / attention_weight.sum()),
        }
        for change in CHANGES:
            if change == "shuffled" and not has_shuffled:
                entry[change] = None
                continue
            rise = np.concatenate(getattr(measured, change))[:, m] - losses
            counts = np.full(len(rise), float(each))
            interval = list(metrics.bootstrap(rise, counts, resamples)) if len(rise) > 1 else None
            entry[change] = {"nats_per_token": float(rise.sum() / tokens), "interval_95": interval}
        sources.append(entry)
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": run.recipe.model.name,
        "windows": len(windows),
        "tokens": tokens,
        "nats_per_token": float(losses.sum() / tokens),
        "mean_weights": {entry["source"]: entry["attention_weight"] for entry in sources},
        "sources": sources,
        "entropy_nats_by_head": (measured.entropy / tokens).tolist(),
        "largest_share_by_head": (measured.largest / tokens).tolist(),
        "classes": {
            way: [_class(name, one, has_shuffled) for name, one in sums.items() if one.tokens]
            for way, sums in measured.classes.items()
        },
    }
    gate = getattr(run.model.blocks[-1].attention, "gate", None)
    if gate is not None:
        result["gate_by_head"] = gate.detach().float().cpu().tolist()
    return result


def _class(name: str, one: ClassSums, has_shuffled: bool) -> dict[str, Any]:
    return {
        "class": name,
        "tokens": one.tokens,
        "nats_per_token": one.nats / one.tokens,
        "attention_weight": (one.attention_weight.mean(0) / one.tokens).tolist(),
        "attention_weight_by_head": (one.attention_weight / one.tokens).tolist(),
        "masked": ((one.masked - one.nats) / one.tokens).tolist(),
        "shuffled": ((one.shuffled - one.nats) / one.tokens).tolist() if has_shuffled else None,
    }


def _write(
    run: Run, tokenizer: Tokenizer, ids: Ids, excerpt: dict[str, Any], result: dict[str, Any], folder: Path
) -> None:
    from shortcut_cli.plots import attention_maps

    with files.temporary_folder() as scratch:
        picture, use, numbers, content = (scratch / name for name in NAMES)
        with files.writing(numbers) as stream:
            np.savez(stream, ids=ids, sources=np.array(run.model.taps), **excerpt)
        shown = excerpt["depth_weights"].mean(0)[:, : attention_maps.MAX_TOKENS]  # (M, up to MAX_TOKENS)
        attention_maps.draw_excerpt(shown, run.model.taps, tokenizer.excerpt(ids[: attention_maps.MAX_TOKENS]), picture)
        attention_maps.draw_use(result, use)
        result |= {name: str(folder / file) for name, file in zip(("picture", "use", "numbers"), NAMES, strict=False)}
        files.write(content, to_json(result, indent=1) + "\n")
        cleanup.last()
        with files.together(folder, UNIT, NAMES):
            for made in sorted(scratch.iterdir(), key=lambda path: NAMES.index(path.name)):
                files.write(folder / made.name, made.read_bytes(), durable=False)
