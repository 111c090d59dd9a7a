"""Eval: run.pt and shards -> scores in natural units; every token of a split is scored exactly once."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shortcut_cli import SCHEMA_VERSION
from shortcut_cli.config.schema import EvalConfig
from shortcut_cli.data.shards import Ids, Shards, Split
from shortcut_cli.errors import CheckFailed, UsageError
from shortcut_cli.events import Note, Progress, Report
from shortcut_cli.inference import metrics
from shortcut_cli.inference.runs import Run
from shortcut_cli.models import loss
from shortcut_cli.models.trace import Trace
from shortcut_cli.models.transformer import Decoder
from shortcut_cli.training import precision

BLOCKS = 100  # groups for the bootstrap if a split has too few documents
FEW_DOCUMENTS = 10


@dataclass
class Totals:
    """Sums over the scored tokens, by group (document or block)."""

    nats: metrics.Floats
    tokens: metrics.Floats
    counts: Ids  # (V,) how often each id is a target
    correct: int = 0
    depth: torch.Tensor | None = None  # (H, M) sums of attention weights over tokens


def windows(tokens: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(first input, end, first scored) of each window, such that every target 0 .. tokens is scored exactly once.

    Target i is id i of the split; input i is the id before it (EOS before the first). A window reads the inputs
    first .. end and scores the targets scored .. end, `stride` of them except in the last window.
    """
    for scored in range(0, tokens, stride):
        end = min(scored + stride, tokens)
        yield max(0, end - context), end, scored


def evaluate(
    run: Run, shards: Shards, name: str, config: EvalConfig | None = None, *, device: str, report: Report
) -> dict[str, Any]:
    """Score a run on a split of a shards folder, in the precision it was trained in. config: default: the run's own.

    Returns nats per token with a 95 % interval, perplexity, accuracy, bits per natural unit, the unigram entropy of
    the split; for text, bits per character and perplexity per word; and, for models that attend to layers, their mean
    attention weights over layers ("depth_weights"); "groups": arrays "nats" and "tokens" with the sums of each document
    (or block).

    Raises UsageError if the shards were made by another tokenizer or the split is empty.
    """
    check_tokenizer(run, shards)
    split, config = shards.split(name), config or run.recipe.eval
    if not split.tokens:
        raise UsageError(f"the {name} split of {shards.folder} is empty")
    ends, over = _groups(split)
    totals = Totals(np.zeros(len(ends)), np.zeros(len(ends)), np.zeros(run.content["vocabulary"], np.int64))
    eos = shards.tokenizer["end"]
    done = 0
    for batch in _batches(split.tokens, run.recipe.model.context, config):
        with precision.products(run.precision, device):
            _score(run.model, split, batch, eos, ends, totals, device)
        done += sum(end - scored for _, end, scored in batch)
        report(Progress(task="eval", done=done, total=split.tokens, unit="tokens"))
    result = _summary(run, shards, split, totals, over, config)
    if result["bits_per_unit"] is None:
        unit = result["unit"]
        report(Note(text=f"the {name} split of {shards.folder} has no {unit}s, so bits per {unit} are not known"))
    return result


def check_tokenizer(run: Run, shards: Shards) -> None:
    """Raises UsageError if the shards were not made by the run's tokenizer, CheckFailed if one is damaged."""
    ours, theirs = run.content["tokenizer"]["fingerprint"], shards.tokenizer["fingerprint"]
    if ours != theirs:
        raise UsageError(
            f"{run.path} was trained with tokenizer {ours[:12]}, {shards.folder} was made with {theirs[:12]}",
            "point --shards to the data that the run was trained on",
        )
    if run.content["vocabulary"] != shards.tokenizer["vocabulary"]:
        raise CheckFailed(
            f"{run.path} has a vocabulary of {run.content['vocabulary']} ids, {shards.folder} one of "
            f"{shards.tokenizer['vocabulary']}, though their tokenizers are the same"
        )


def _groups(split: Split) -> tuple[Ids, str]:
    """The ends of the groups that the bootstrap draws from, and their kind: documents, or blocks of equal size."""
    documents = np.cumsum(split.document_tokens())
    if len(documents) >= FEW_DOCUMENTS:
        return documents, "documents"
    blocks = min(BLOCKS, split.tokens)
    return np.arange(1, blocks + 1, dtype=np.int64) * split.tokens // blocks, "blocks"


def _batches(tokens: int, context: int, config: EvalConfig) -> Iterator[list[tuple[int, int, int]]]:
    """Batches of windows of equal length."""
    batch: list[tuple[int, int, int]] = []
    for window in windows(tokens, context, config.stride):
        if batch and (len(batch) == config.batch_size or window[1] - window[0] != batch[0][1] - batch[0][0]):
            yield batch
            batch = []
        batch.append(window)
    yield batch


@torch.no_grad()
def _score(
    model: Decoder, split: Split, batch: list[tuple[int, int, int]], eos: int, ends: Ids, totals: Totals, device: str
) -> None:
    targets = np.stack([split.read(first, end - first) for first, end, _ in batch])  # (B, T)
    before = [split.read(first - 1, 1)[0] if first else eos for first, _, _ in batch]
    inputs = np.concatenate([np.array(before)[:, None], targets[:, :-1]], axis=1)
    trace = Trace() if model.taps else None
    goal = torch.from_numpy(targets).to(device)
    logits = model(torch.from_numpy(inputs).to(device), trace=trace)  # (B, T, V)
    losses = loss.token_losses(logits, goal).double().cpu().numpy()
    correct = (logits.argmax(-1) == goal).cpu().numpy()
    for row, (first, end, scored) in enumerate(batch):
        kept = slice(scored - first, end - first)
        group = np.searchsorted(ends, np.arange(scored, end), side="right")
        totals.nats += np.bincount(group, losses[row, kept], len(ends))
        totals.tokens += np.bincount(group, minlength=len(ends))
        totals.counts += np.bincount(targets[row, kept], minlength=len(totals.counts))
        totals.correct += int(correct[row, kept].sum())
        if trace is not None:
            (weights,) = trace.weights.values()
            seen = weights[row, :, :, kept].sum(-1).double().cpu()  # (H, M)
            totals.depth = seen if totals.depth is None else totals.depth + seen


def _of_text(nats: float, units: dict[str, float]) -> dict[str, float]:
    """Bits per character and perplexity per word, if the split counts these; each newline counts as a word.

    So do the perplexities published for WikiText: its 245,569 test tokens are 241,211 words and 4,358 newlines. EOS
    tokens are in the nats, but not among the words.
    """
    found: dict[str, float] = {}
    if units.get("character"):
        found |= {"characters": units["character"], "bits_per_character": nats / math.log(2) / units["character"]}
    if units.get("word"):
        found |= {"words": units["word"], "word_perplexity": _exp(nats / units["word"])}
    return found


def _exp(exponent: float) -> float:
    """e^exponent; the perplexity of a poor model on long words can exceed the largest float, and is then infinite."""
    return math.inf if exponent >= 700 else math.exp(exponent)


def _summary(run: Run, shards: Shards, split: Split, totals: Totals, over: str, config: EvalConfig) -> dict[str, Any]:
    nats, tokens = float(totals.nats.sum()), int(totals.tokens.sum())
    low, high = metrics.bootstrap(totals.nats, totals.tokens, config.resamples)
    unit = shards.tokenizer["unit"]
    amount = split.units.get(unit, 0)
    bits = [metrics.bits_per_unit(total, amount) for total in (nats, low * tokens, high * tokens)] if amount else None
    result = {
        "schema_version": SCHEMA_VERSION,
        "model": run.recipe.model.name,
        "step": run.content["step"],
        "precision": run.precision,
        "split": split.name,
        "tokens": tokens,
        "documents": len(split.document_tokens()),
        "stride": config.stride,
        "context": run.recipe.model.context,
        "nats_per_token": nats / tokens,
        "interval_95": [low, high],
        "interval_over": over,
        "perplexity": _exp(nats / tokens),
        "accuracy": totals.correct / tokens,
        "unit": unit,
        "units": amount,
        "bits_per_unit": bits and bits[0],
        "bits_per_unit_interval_95": bits and bits[1:],
        "unigram_entropy": metrics.entropy(totals.counts),
        **_of_text(nats, split.units),
        "groups": {"nats": totals.nats, "tokens": totals.tokens},
    }
    if totals.depth is not None:
        shares = (totals.depth / tokens).tolist()  # (H, M)
        result["depth_weights"] = {"sources": list(run.model.taps), "by_head": shares}
    return result
