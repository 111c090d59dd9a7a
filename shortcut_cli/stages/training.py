"""Train: shards -> run.pt, resumable to the bit at any step.

Each step depends on the weights, the optimiser's state and its own number: the windows are computed from the seed and
the step, the learning rate from the step, and dropout is seeded for each step. So resume.pt needs no generator state.
"""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shortcut_cli import batches, checkpoint, files, loop, metrics, optim, recipe, registry, sealed
from shortcut_cli.errors import CheckFailed, ShortcutError, UsageError
from shortcut_cli.loop import PREVIOUS, STATE, Log, Report, Stop
from shortcut_cli.recipe import Recipe
from shortcut_cli.shards import Shards, Split
from shortcut_cli.workers import keep_freed_memory


@dataclass
class State:
    """What changes from step to step beside weights and optimiser."""

    step: int = 0  # optimiser steps done
    best: float = math.inf  # lowest validation loss so far, nats per token
    seconds: float = 0.0  # of training, all parts of a resumed run together
    pending: list[float] = field(default_factory=list)  # losses of the steps since the last line of the log


class Trainer:
    """One run: its model, data and folder. `loop.run` takes it from where it is to the last step."""

    def __init__(self, resolved: Recipe, folder: Path, device: str, report: Report) -> None:
        self.recipe, self.keys = resolved, resolved.train
        self.folder, self.device, self.report = folder, device, report
        shards = Shards(Path(resolved.data.shards))
        _check_tokenizer(resolved, shards)
        self.shards = shards
        self.windows = batches.Windows(shards.split("train"), resolved.model.context, self.keys.seed)
        self.validation = validation_batch_starts(shards.split("val"), resolved.model.context, self.keys.eval_windows)
        kind = registry.load(registry.MODELS, resolved.model.name)
        self.model = kind(resolved.model, shards.tokenizer["vocabulary"], self.keys.seed).to(device)
        self.forward = torch.compile(self.model) if self.keys.compile else self.model
        self.optimizer = optim.adamw(self.model, self.keys, self.model.routers(), self.keys.router_lr)
        self.average = optim.Average(self.model, self.keys.ema) if self.keys.ema else None
        self.bf16 = self.keys.precision == "bf16" or (self.keys.precision == "auto" and device.startswith("cuda"))
        self.state = State()
        self.began = 0.0  # when the training would have begun, had it not been interrupted
        self.norm = 0.0  # of the last step's gradient, before clipping
        self.log = Log(folder, resolved.train.tensorboard)
        self.model.train()

    def step(self, number: int) -> float:
        """One optimiser step; returns the loss in nats per token."""
        keys = self.keys
        if self.recipe.model.dropout:
            torch.manual_seed(batches.key(keys.seed, number) >> 1)
        part = keys.batch_size // keys.accumulation
        total = 0.0
        for index in range(keys.accumulation):
            x, y = self.windows.batch(number * keys.batch_size + index * part, part)  # (B, T)
            with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.bf16):
                logits = self.forward(x.to(self.device))  # (B, T, V)
            loss = metrics.loss(logits, y.to(self.device)) / keys.accumulation
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), keys.clip or math.inf).item()
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise ShortcutError(
                f"the loss or its gradient is not finite at step {number + 1} (loss {total}, norm {norm}); "
                f"the last good state is kept in {self.folder}",
                "a lower train.lr, a longer train.warmup or train.clip = 1.0 usually helps",
            )
        optim.set_rate(self.optimizer, optim.learning_rate(number, keys))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update(self.model, number)
        self.norm = norm
        return total

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss over the validation windows, nats per token, with the averaged weights where there are some."""
        kept = {name: weight.clone() for name, weight in self.model.state_dict().items()} if self.average else None
        if self.average:
            self.model.load_state_dict(self.average.weights)
        self.model.eval()
        total = 0.0
        split, context = self.shards.split("val"), self.recipe.model.context
        for first in range(0, len(self.validation), self.keys.batch_size):
            starts = self.validation[first : first + self.keys.batch_size]
            ids = torch.stack([torch.from_numpy(split.read(start, context + 1)) for start in starts]).to(self.device)
            with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.bf16):
                logits = self.model(ids[:, :-1])
            total += metrics.loss(logits, ids[:, 1:]).item() * len(starts)
        if kept:
            self.model.load_state_dict(kept)
        self.model.train()
        return total / len(self.validation)

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights that are validated and kept in run.pt."""
        return self.average.weights if self.average else self.model.state_dict()

    def content(self, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
        """All of a run.pt."""
        return {
            "format": checkpoint.FORMAT,
            "recipe": self.recipe.model_dump(),
            "model": weights,
            "vocabulary": self.shards.tokenizer["vocabulary"],
            "tokenizer": {
                "fingerprint": self.shards.tokenizer["fingerprint"],
                "files": checkpoint.pack_folder(self.shards.folder / "tokenizer"),
            },
            "shards": self.shards.manifest["checksum"],
            "step": self.state.step,
            "scores": {"validation": self.state.best},
            "versions": sealed.versions(),
        }

    def save(self) -> None:
        """Write resume.pt: all that the next step needs."""
        self.state.seconds = time.monotonic() - self.began
        extra = {
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.weights if self.average else None,
            "state": {"seconds": self.state.seconds, "pending": self.state.pending, "best": self.state.best},
        }
        content = self.content(self.model.state_dict()) | extra
        checkpoint.save(self.folder / STATE, content, previous=self.folder / PREVIOUS)

    def resume(self, content: dict[str, Any]) -> None:
        """Take over the state of a resume.pt; the log of an unfinished run loses what was written after it."""
        try:
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            if self.average:
                self.average.weights = {name: weight.to(self.device) for name, weight in content["average"].items()}
            self.state = State(step=content["step"], **content["state"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CheckFailed(f"{self.folder / 'resume.pt'} is no state of this run: {error}") from error
        if self.state.step < self.keys.steps:
            self.log.cut(self.state.step)

    def validate(self) -> None:
        """Log the validation loss, and keep run.pt where it is the lowest so far."""
        loss = self.validation_loss()
        self.log.write(step=self.state.step, validation=loss)
        self.report("validation", step=self.state.step, loss=loss, best=min(loss, self.state.best))
        if loss < self.state.best:
            self.state.best = loss
            checkpoint.save(self.folder / "run.pt", self.content(self.weights()))

    def write_log(self) -> None:
        """A line of the log, and of progress."""
        state, keys = self.state, self.keys
        seconds = time.monotonic() - self.began
        line = {
            "step": state.step,
            "loss": sum(state.pending) / len(state.pending),
            "lr": optim.learning_rate(state.step - 1, keys),
            "gradient_norm": self.norm,
            "tokens": state.step * keys.batch_size * self.recipe.model.context,
            "seconds": round(seconds, 3),
        }
        state.pending = []
        self.log.write(**line)
        self.report("progress", task="train", done=state.step, total=keys.steps, unit="steps", **line)


def validation_batch_starts(split: Split, context: int, count: int) -> list[int]:
    """First tokens of at most `count` windows of context + 1 ids, evenly spread over a split, none overlapping."""
    fitting = (split.tokens - 1) // context
    if not fitting:
        raise UsageError(
            f"the {split.name} split has {split.tokens} tokens, too few for a context of {context}",
            "prepare more data, a larger data.val, or a smaller model.context",
        )
    count = min(count, fitting)
    return [index * fitting // count * context for index in range(count)]


def _check_tokenizer(resolved: Recipe, shards: Shards) -> None:
    made = shards.manifest["request"]["tokenizer"]
    changes = recipe.differences(made, resolved.tokenizer.model_dump())
    if changes:
        raise UsageError(
            f"{shards.folder} was tokenized with other keys than the recipe's "
            f"(fingerprint {shards.tokenizer['fingerprint'][:12]})\n" + "\n".join(f"  tokenizer.{c}" for c in changes),
            "prepare the data with this recipe, or point data.shards at other shards",
        )


def train(resolved: Recipe, folder: Path, *, device: str, resume: str, report: Report, stop: Stop) -> dict[str, Any]:
    """Train the recipe's model into the run folder; go on where an unfinished run lies there.

    resume: "auto", or "never" to begin again. Returns a summary, with "worked" telling whether there was anything to
    do.

    Raises UsageError where the folder holds a run of another recipe or other shards, Interrupted after a signal,
    ShortcutError where the loss is not finite.
    """
    keep_freed_memory()
    if resolved.train.deterministic:
        torch.use_deterministic_algorithms(True)
    with files.held(folder, "shortcut train"):
        began = loop.earlier(folder, "run.pt", resume, report, checkpoint.load)
        trainer = Trainer(resolved, folder, device, report)
        if began is not None:
            _check_same(began, trainer)
        worked = began is None or began["step"] < resolved.train.steps
        if began is None:
            for name in ("log.jsonl", "run.pt", STATE, PREVIOUS):
                (folder / name).unlink(missing_ok=True)
            files.write(folder / "recipe.toml", recipe.dump(resolved))
            report("note", text=_describe(trainer))
        else:
            trainer.resume(began)
            report("note", text=f"going on at step {trainer.state.step}" if worked else "this run is finished already")
        with stop as asked:
            loop.run(trainer, asked)
    return {
        "run": str(folder / "run.pt"),
        "worked": worked,
        "step": trainer.state.step,
        "validation_nats_per_token": trainer.state.best,
        "parameters": trainer.model.count(),
        "seconds": round(trainer.state.seconds, 1),
    }


def _check_same(began: dict[str, Any], trainer: Trainer) -> None:
    changes = recipe.differences(began["recipe"], trainer.recipe.model_dump())
    changes = [line for line in changes if not line.startswith("data.shards:")]
    if began["shards"] != trainer.shards.manifest["checksum"]:
        changes.append(f"shards: {began['shards'][:12]} -> {trainer.shards.manifest['checksum'][:12]}")
    loop.refuse(trainer.folder, changes)


def _describe(trainer: Trainer) -> str:
    count, context = trainer.model.count(), trainer.recipe.model.context
    flops = 3 * trainer.model.flops(context) / context
    tokens = trainer.windows.split.tokens
    epochs = trainer.keys.steps * trainer.keys.batch_size * context / tokens
    return (
        f"{trainer.recipe.model.name}: {count['total']:,} parameters ({count['trunk']:,} in the trunk), "
        f"{flops / 1e6:.1f} training MFLOPs a token; {tokens:,} training tokens, {epochs:.2f} epochs"
    )
