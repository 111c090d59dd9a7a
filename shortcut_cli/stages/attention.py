"""Attention: where the final layer looked, and what that was worth: as numbers and as pictures.

How much attention a source gets is its mass. What it is worth is another thing: how much the loss grows when it is
closed, so that the others share its part, and when it is exchanged for that of another window.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shortcut_cli import files, metrics
from shortcut_cli.checkpoint import Run
from shortcut_cli.errors import UsageError
from shortcut_cli.metrics import Floats
from shortcut_cli.models.blocks import Trace
from shortcut_cli.shards import Ids
from shortcut_cli.tokenizers.base import Classes, Tokenizer

Report = Callable[..., None]
CHANGES = {"closed": lambda m: Trace(closed=m), "exchanged": lambda m: Trace(exchanged=m)}
NAMES = ("attention.png", "use.png", "attention.npz", "attention.json")


@dataclass
class Sums:
    """Sums over the tokens of a class: of losses, as they are and with each source changed, and of shares."""

    tokens: int = 0
    nats: float = 0.0
    mass: Any = 0.0  # (H, M)
    closed: Any = 0.0  # (M,) nats
    exchanged: Any = 0.0  # (M,) nats


@dataclass
class Found:
    """What all windows gave; H heads, M sources, N windows of T tokens."""

    mass: Any = 0.0  # (H, M) sums over tokens
    distance: Any = 0.0  # (H, M) sums over tokens, weighted by mass
    entropy: Any = 0.0  # (H,) nats
    largest: Any = 0.0  # (H,)
    losses: list[Floats] = field(default_factory=list)  # (B,) of windows, each a sum
    closed: list[Floats] = field(default_factory=list)  # (B, M) of windows
    exchanged: list[Floats] = field(default_factory=list)  # (B, M)
    classes: dict[str, dict[str, Sums]] = field(default_factory=dict)


def cut(read: Callable[[int, int], Ids], tokens: int, context: int, most: int) -> Ids:
    """Up to `most` windows (N, T + 1), spread evenly; all but the last id are inputs, all but the first targets.

    read(first, count) gives ids of a row of `tokens`; T is `context`, or what there is.
    """
    length = min(context + 1, tokens)
    count = max(1, min(most, tokens // length))
    starts = np.linspace(0, tokens - length, count).astype(np.int64)
    return np.stack([read(int(start), length) for start in starts])


@torch.no_grad()
def attend(
    run: Run, windows: Ids, folder: Path, *, resamples: int, batch: int, device: str, report: Report
) -> dict[str, Any]:
    """Look at windows of ids, int64 (N, T + 1); write attention.png, use.png, attention.npz and attention.json.

    attention.npz is of the first window, an excerpt: `ids` (T,), the tokens that are predicted; `sources` (M,);
    `depth_weights` (H, M, T): how much of the attention of head h goes to source m where token t is predicted, summing
    to one over the sources; `distances` (H, M, T): how far back in time, in tokens, it reads on average.

    A class of tokens is that of the token that is predicted. Where there is but one window, none can be exchanged, and
    what would come of it is None.

    Raises UsageError where the model attends to no layers, or the files exist already.
    """
    if not run.model.taps:
        raise UsageError(f"{run.path} is a {run.recipe.model.name}, whose final layer attends to no other layer")
    if windows.shape[1] < 2:
        raise UsageError("there are no tokens to look at", "give a longer --prompt")
    for name in NAMES:
        if (folder / name).exists():
            raise UsageError(f"{folder / name} exists already", "choose another --out")
    tokenizer, found = run.tokenizer(), Found()
    excerpt: dict[str, Any] = {}
    for first, part in _batches(windows, batch):
        report("progress", task="attention", done=first, total=len(windows), unit="windows")
        ids = torch.from_numpy(part).to(device)
        trace = Trace(measure_distances=True)
        losses = _losses(run, ids, trace)
        weights, distances = trace.depth_weights, trace.distances  # (B, H, M, T)
        if first == 0:
            shown = {"depth_weights": weights[0], "distances": distances[0]}
            excerpt = {name: tensor.float().cpu().numpy() for name, tensor in shown.items()}
        changed = {
            change: np.stack([_losses(run, ids, asked(m)) for m in range(len(run.model.taps))], 1)
            for change, asked in CHANGES.items()
            if change == "closed" or len(part) > 1
        }  # (B, M, T) each
        _add(found, losses, weights.double().cpu().numpy(), distances.double().cpu().numpy(), changed)
        for row, targets in enumerate(part[:, 1:]):
            mass = weights[row].double().cpu().numpy()  # (H, M, T)
            _sort(found, tokenizer.classes(targets), losses[row], mass, {c: x[row] for c, x in changed.items()})
    result = _result(run, windows, found, resamples)
    _write(run, tokenizer, windows[0, 1:], excerpt, result, folder)
    return result


def _batches(windows: Ids, batch: int) -> Iterator[tuple[int, Ids]]:
    """(first, windows) of two or more each, where there are as many."""
    size = max(2, batch)
    starts = list(range(0, len(windows), size))
    if len(starts) > 1 and len(windows) - starts[-1] == 1:
        starts.pop()  # a last one alone joins the batch before
    for first, end in zip(starts, [*starts[1:], len(windows)], strict=True):
        yield first, windows[first:end]


def _losses(run: Run, ids: torch.Tensor, trace: Trace) -> Floats:
    """Loss of each target, nats (B, T)."""
    logits = run.model(ids[:, :-1], trace=trace)
    found: Floats = metrics.token_losses(logits, ids[:, 1:]).double().cpu().numpy()
    return found


def _add(found: Found, losses: Floats, weights: Floats, distances: Floats, changed: dict[str, Floats]) -> None:
    found.mass = found.mass + weights.sum((0, 3))
    found.distance = found.distance + (weights * distances).sum((0, 3))
    found.entropy = found.entropy - (weights * np.log(np.maximum(weights, 1e-30))).sum((0, 2, 3))
    found.largest = found.largest + weights.max(2).sum((0, 2))
    found.losses.append(losses.sum(1))
    for change, rows in changed.items():
        getattr(found, change).append(rows.sum(2))


def _sort(
    found: Found, sorted_by: dict[str, Classes], losses: Floats, mass: Floats, changed: dict[str, Floats]
) -> None:
    """Add one window to the classes of its targets: losses (T,), mass (H, M, T) and changed losses (M, T)."""
    for way, classes in sorted_by.items():
        sums = found.classes.setdefault(way, {name: Sums() for name in classes.names})
        for number, name in enumerate(classes.names):
            here = classes.of == number
            one = sums[name]
            one.tokens += int(here.sum())
            one.nats += float(losses[here].sum())
            one.mass = one.mass + mass[..., here].sum(-1)
            for change, rows in changed.items():
                setattr(one, change, getattr(one, change) + rows[:, here].sum(1))


def _result(run: Run, windows: Ids, found: Found, resamples: int) -> dict[str, Any]:
    each = windows.shape[1] - 1
    tokens = len(windows) * each
    losses = np.concatenate(found.losses)  # (N,)
    many = len(found.exchanged) == len(found.losses)
    sources = []
    for m, name in enumerate(run.model.taps):
        entry: dict[str, Any] = {
            "source": name,
            "mass": float(found.mass[:, m].mean() / tokens),
            "mass_by_head": (found.mass[:, m] / tokens).tolist(),
            "distance_tokens": float(found.distance[:, m].sum() / found.mass[:, m].sum()),
        }
        for change in ("closed", "exchanged"):
            if change == "exchanged" and not many:
                entry[change] = None
                continue
            rise = np.concatenate(getattr(found, change))[:, m] - losses
            counts = np.full(len(rise), float(each))
            interval = list(metrics.bootstrap(rise, counts, resamples)) if len(rise) > 1 else None
            entry[change] = {"nats_per_token": float(rise.sum() / tokens), "interval_95": interval}
        sources.append(entry)
    result: dict[str, Any] = {
        "schema_version": 1,
        "model": run.recipe.model.name,
        "windows": len(windows),
        "tokens": tokens,
        "nats_per_token": float(losses.sum() / tokens),
        "mean_weights": {entry["source"]: entry["mass"] for entry in sources},
        "sources": sources,
        "entropy_nats_by_head": (found.entropy / tokens).tolist(),
        "largest_share_by_head": (found.largest / tokens).tolist(),
        "classes": {
            way: [_class(name, one, many) for name, one in sums.items() if one.tokens]
            for way, sums in found.classes.items()
        },
    }
    gate = getattr(run.model.blocks[-1].attention, "gate", None)
    if gate is not None:
        result["gate_by_head"] = gate.detach().float().cpu().tolist()
    return result


def _class(name: str, one: Sums, many: bool) -> dict[str, Any]:
    return {
        "class": name,
        "tokens": one.tokens,
        "nats_per_token": one.nats / one.tokens,
        "mass": (one.mass.mean(0) / one.tokens).tolist(),
        "mass_by_head": (one.mass / one.tokens).tolist(),
        "closed": ((one.closed - one.nats) / one.tokens).tolist(),
        "exchanged": ((one.exchanged - one.nats) / one.tokens).tolist() if many else None,
    }


def _write(
    run: Run, tokenizer: Tokenizer, ids: Ids, excerpt: dict[str, Any], result: dict[str, Any], folder: Path
) -> None:
    from shortcut_cli import pictures

    folder.mkdir(parents=True, exist_ok=True)
    picture, use, numbers, content = (folder / name for name in NAMES)
    with files.writing(numbers) as stream:
        np.savez(stream, ids=ids, sources=np.array(run.model.taps), **excerpt)
    shares = excerpt["depth_weights"].mean(0)[:, : pictures.MOST]  # (M, T)
    pictures.draw_excerpt(shares, run.model.taps, tokenizer.excerpt(ids[: pictures.MOST]), picture)
    pictures.draw_use(result, use)
    result |= {"picture": str(picture), "use": str(use), "numbers": str(numbers)}
    files.write(content, json.dumps(result, indent=1) + "\n")
