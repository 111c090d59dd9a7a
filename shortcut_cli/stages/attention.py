"""Attention: what is read across layers, with which weights, and what that is worth, in numbers and pictures.

A source is the embedding, a layer, or a part of one, that layers above it, or the head, read beside or in place of the
state right below them (`models.trace`). Its weight is its share of the softmax in which it is read, or its factor in a
weighted sum, which may be negative. What a source is worth is measured separately, by how much the loss rises when it
is masked, so that in a softmax the others take over its share; when it is shuffled, that is, replaced by the same
source of another window; and when it is mean-ablated, replaced by its mean over all tokens of the batch.
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
from shortcut_cli.inference.layers import LayerSums
from shortcut_cli.inference.metrics import Floats
from shortcut_cli.inference.runs import Run
from shortcut_cli.models.loss import token_losses
from shortcut_cli.models.trace import OWN, Change, Kind, Reads, Trace
from shortcut_cli.tokenizers.base import Classes, Tokenizer

CHANGES: tuple[Kind, ...] = ("masked", "shuffled", "mean_ablated")
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
    mean_ablated: Floats = field(default_factory=_zero)  # (M,) nats with each source replaced by its mean


@dataclass
class ReadSums:
    """Sums over all tokens of one reader's weights. H heads, M sources."""

    weight: Floats = field(default_factory=_zero)  # (H, M)
    entropy: Floats = field(default_factory=_zero)  # (H,) nats
    largest: Floats = field(default_factory=_zero)  # (H,)


@dataclass
class Measured:
    """What was measured in all windows: H heads, M sources, batches of B windows."""

    attention_weight: Floats = field(default_factory=_zero)  # (H, M) sums over tokens
    distance: Floats = field(default_factory=_zero)  # (H, M) sums over tokens, each times its attention weight
    reads: dict[str, ReadSums] = field(default_factory=dict)
    losses: list[Floats] = field(default_factory=list)  # (B,) per batch: nats of each window
    masked: list[Floats] = field(default_factory=list)  # (B, M + 1) per batch; the last: all sources at once
    shuffled: list[Floats] = field(default_factory=list)  # the same, except of single windows
    mean_ablated: list[Floats] = field(default_factory=list)  # (B, M + 1) per batch
    classes: dict[str, dict[str, ClassSums]] = field(default_factory=dict)


def cut(read: Callable[[int, int], Ids], tokens: int, context: int, most: int) -> Ids:
    """At most `most` windows (N, T + 1), spread evenly; all but the last id are inputs, all but the first targets.

    read(first, count) returns part of `tokens` consecutive ids; T is `context`, or less if there are fewer tokens.
    """
    length = min(context + 1, tokens)
    count = max(1, min(most, tokens // length))
    starts = np.linspace(0, tokens - length, count).astype(np.int64)
    return np.stack([read(int(start), length) for start in starts])


def sources_of(reads: Reads) -> tuple[str, ...]:
    """The names of all sources, those that readers would read anyway first."""
    names = list(dict.fromkeys(name for sources in reads.values() for name in sources))
    return tuple(sorted(names, key=lambda name: not name.startswith(OWN)))


@torch.no_grad()
def analyse(
    run: Run,
    windows: Ids,
    folder: Path,
    *,
    resamples: int,
    batch: int,
    device: str,
    report: Report,
    split: str | None = None,
) -> dict[str, Any]:
    """Look at windows of ids, int64 (N, T + 1); write attention.png, use.png, attention.npz and attention.json.

    split: that the windows are of; None: they are of a prompt.

    attention.npz describes the first window, as an excerpt: `ids` (T,), the tokens that are predicted; `sources` (M,);
    `depth_weights` (H, M, T): the weight of source m in head h when token t is predicted, the mean over its readers;
    `read READER` (H, m, T): the weights of one reader, whose sources attention.json names; `distances` (H, M, T),
    of models that look back in time in the sources: how far, in tokens, they do on average; and what the first tokens
    of the excerpt represent, `excerpt_texts` and so on: the parts of a `tokenizers.base.Excerpt` that there are.

    Tokens are classified by the token that is predicted. A single window can't be shuffled; then "shuffled" is None.

    Returns the content of attention.json.

    Raises UsageError if the model reads nothing across layers, if the windows are too short, or if the files exist
    already.
    """
    reads = run.model.reads()
    if not reads:
        raise UsageError(f"{run.path} is a {run.recipe.model.name}, none of whose layers reads across another")
    if windows.shape[1] < 2:
        raise UsageError("there are no tokens to look at", "give a longer --prompt")
    files.check_free(folder, UNIT, NAMES)
    tokenizer, measured, sources, layers = run.tokenizer(), Measured(), sources_of(reads), LayerSums(run.model)
    excerpt: dict[str, Any] = {}
    for first, part in _batches(windows, batch):
        report(Progress(task="attention", done=first, total=len(windows), unit="windows"))
        ids = torch.from_numpy(part).to(device)
        trace = Trace(measure_distances=True)
        losses = _losses(run, ids, trace)
        layers.add(ids)
        by_reader = {reader: weights.double().cpu().numpy() for reader, weights in trace.weights.items()}
        weights = _by_source(reads, by_reader, sources)  # (B, H, M, T)
        distances = next((each.double().cpu().numpy() for each in trace.distances.values()), None)
        if first == 0:
            excerpt = {f"read {reader}": each[0].astype(np.float32) for reader, each in by_reader.items()}
            excerpt["depth_weights"] = weights[0].astype(np.float32)
            if distances is not None:
                excerpt["distances"] = distances[0].astype(np.float32)
        changed = {
            kind: np.stack([_losses(run, ids, Trace(Change(kind, source))) for source in (*sources, None)], 1)
            for kind in CHANGES
            if kind != "shuffled" or len(part) > 1
        }  # (B, M + 1, T) each; the last: all sources at once
        _add(measured, losses, changed)
        _add_weights(measured, by_reader, weights, distances)
        for row, targets in enumerate(part[:, 1:]):
            mine = {kind: changed_losses[row, :-1] for kind, changed_losses in changed.items()}
            _add_classes(measured, tokenizer.classes(targets), losses[row], weights[row], mine)
    report(Progress(task="attention", done=len(windows), total=len(windows), unit="windows"))
    result = _result(run, windows, measured, resamples) | {"split": split} | layers.result()
    _write(run, tokenizer, windows[0, 1:], excerpt, result, folder)
    return result


def _by_source(reads: Reads, weights: dict[str, Floats], sources: tuple[str, ...]) -> Floats:
    """The mean weight of each source over its readers, (B, H, M, T), from those of each reader."""
    found = []
    for source in sources:
        mine = [
            each[:, :, [name == source for name in reads[reader]]].sum(2)
            for reader, each in weights.items()
            if source in reads[reader]
        ]
        found.append(np.mean(mine, 0))
    return np.stack(found, 2)


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


def _add(measured: Measured, losses: Floats, changed: dict[Kind, Floats]) -> None:
    """Add one batch: losses (B, T), and changed losses (B, M + 1, T)."""
    measured.losses.append(losses.sum(1))
    for kind, rows in changed.items():
        getattr(measured, kind).append(rows.sum(2))


def _add_weights(measured: Measured, by_reader: dict[str, Floats], weights: Floats, distances: Floats | None) -> None:
    """Add one batch: weights of each reader (B, H, m, T), of all (B, H, M, T), and distances like these, if any."""
    measured.attention_weight = measured.attention_weight + weights.sum((0, 3))
    if distances is not None:
        measured.distance = measured.distance + (weights * distances).sum((0, 3))
    for reader, each in by_reader.items():
        sums = measured.reads.setdefault(reader, ReadSums())
        sums.weight = sums.weight + each.sum((0, 3))
        sums.entropy = sums.entropy - (each * np.log(np.maximum(each, 1e-30))).sum((0, 2, 3))
        sums.largest = sums.largest + each.max(2).sum((0, 2))


def _add_classes(
    measured: Measured, sorted_by: dict[str, Classes], losses: Floats, weights: Floats, changed: dict[Kind, Floats]
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
    tokens, names = len(windows) * each, sources_of(run.model.reads())
    losses = np.concatenate(measured.losses)  # (N,)
    has_shuffled = len(measured.shuffled) == len(measured.losses)

    def costs(m: int) -> dict[str, Any]:
        """What each change adds to the loss, of source m or, if it is -1, of all."""
        found: dict[str, Any] = {}
        for kind in CHANGES:
            if kind == "shuffled" and not has_shuffled:
                found[kind] = None
                continue
            rise = np.concatenate(getattr(measured, kind))[:, m] - losses
            interval = metrics.bootstrap(rise, np.full(len(rise), float(each)), resamples) if len(rise) > 1 else None
            found[kind] = {"nats_per_token": float(rise.sum() / tokens), "interval_95": interval and list(interval)}
        return found

    sources = []
    for m, name in enumerate(names):
        weight = measured.attention_weight[:, m]  # (H,)
        entry: dict[str, Any] = {
            "source": name,
            "attention_weight": float(weight.mean() / tokens),
            "attention_weight_by_head": (weight / tokens).tolist(),
            "distance_tokens": float(measured.distance[:, m].sum() / weight.sum()) if run.model.taps else None,
        }
        sources.append(entry | costs(m))
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": run.recipe.model.name,
        "checkpoint": f"{run.path.resolve().parent.name}/{run.path.name}",
        "step": run.content.get("step"),
        "windows": len(windows),
        "tokens": tokens,
        "nats_per_token": float(losses.sum() / tokens),
        "mean_weights": {entry["source"]: entry["attention_weight"] for entry in sources},
        "sources": sources,
        "all_sources": costs(-1),
        **_reads(run, measured, tokens),
        "classes": {
            way: [_class(name, one, has_shuffled) for name, one in sums.items() if one.tokens]
            for way, sums in measured.classes.items()
        },
    }
    gate = getattr(run.model.blocks[-1].attention, "gate", None)
    if gate is not None and run.model.taps:
        result["gate_by_head"] = gate.detach().float().cpu().tolist()
    return result


def _reads(run: Run, measured: Measured, tokens: int) -> dict[str, Any]:
    """The weights of each reader; and of shares of a softmax, how evenly they are spread, the mean over readers."""
    sums = measured.reads.values()
    found: dict[str, Any] = {
        "softmax": run.model.softmax_reads,
        "reads": [
            {
                "reader": reader,
                "sources": list(run.model.reads()[reader]),
                "weights": (one.weight.mean(0) / tokens).tolist(),
                "weights_by_head": (one.weight / tokens).tolist(),
            }
            for reader, one in measured.reads.items()
        ],
        "entropy_nats_by_head": None,
        "largest_share_by_head": None,
    }
    if run.model.softmax_reads:
        found["entropy_nats_by_head"] = (np.mean([one.entropy for one in sums], 0) / tokens).tolist()
        found["largest_share_by_head"] = (np.mean([one.largest for one in sums], 0) / tokens).tolist()
    return found


def _class(name: str, one: ClassSums, has_shuffled: bool) -> dict[str, Any]:
    return {
        "class": name,
        "tokens": one.tokens,
        "nats_per_token": one.nats / one.tokens,
        "attention_weight": (one.attention_weight.mean(0) / one.tokens).tolist(),
        "attention_weight_by_head": (one.attention_weight / one.tokens).tolist(),
        "masked": ((one.masked - one.nats) / one.tokens).tolist(),
        "shuffled": ((one.shuffled - one.nats) / one.tokens).tolist() if has_shuffled else None,
        "mean_ablated": ((one.mean_ablated - one.nats) / one.tokens).tolist(),
    }


def _write(
    run: Run, tokenizer: Tokenizer, ids: Ids, excerpt: dict[str, Any], result: dict[str, Any], folder: Path
) -> None:
    from shortcut_cli.plots import attention_maps

    sources = sources_of(run.model.reads())
    held = tokenizer.excerpt(ids[: attention_maps.MAX_TOKENS])
    parts: dict[str, Any] = {
        f"excerpt_{part}": np.array(value) for part, value in vars(held).items() if value is not None
    }
    with files.temporary_folder() as scratch:
        picture, use, numbers, content = (scratch / name for name in NAMES)
        with files.writing(numbers) as stream:
            np.savez(stream, ids=ids, sources=np.array(sources), **parts, **excerpt)
        shown = excerpt["depth_weights"].mean(0)[:, : attention_maps.MAX_TOKENS]  # (M, up to MAX_TOKENS)
        attention_maps.draw_excerpt(shown, sources, held, picture, attention_maps.heading_of(result))
        attention_maps.draw_use(result, use)
        result |= {name: str(folder / file) for name, file in zip(("picture", "use", "numbers"), NAMES, strict=False)}
        files.write(content, to_json(result, indent=1) + "\n")
        cleanup.last()
        with files.together(folder, UNIT, NAMES):
            for made in sorted(scratch.iterdir(), key=lambda path: NAMES.index(path.name)):
                files.write(folder / made.name, made.read_bytes(), durable=False)
