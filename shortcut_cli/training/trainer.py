"""The trainer of a model: the state of one run and its steps.

The windows, the learning rate and the dropout of a step depend only on the recipe and the number of the step.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shortcut_cli import files, registry
from shortcut_cli.config import writing
from shortcut_cli.config.schema import Recipe, TrainConfig
from shortcut_cli.data import windows
from shortcut_cli.data.shards import Shards, Split
from shortcut_cli.errors import UsageError
from shortcut_cli.events import Progress, Report, Validation
from shortcut_cli.kept.inputs import differences
from shortcut_cli.kernels import bf16
from shortcut_cli.models.loss import loss as cross_entropy
from shortcut_cli.models.transformer import Decoder
from shortcut_cli.training import (
    activations,
    checkpoint,
    compiling,
    conditions,
    lineage,
    loop,
    parts,
    precision,
    sharded,
    tensor_file,
)
from shortcut_cli.training.device import check_room
from shortcut_cli.training.loop import PREVIOUS, STATE
from shortcut_cli.training.optim import Optimizer, learning_rate
from shortcut_cli.training.parallel import ALONE, Processes
from shortcut_cli.training.run_log import Log, NoLog

MOST_UNREAD = 100  # steps whose losses are read from the device at once


class Loss(nn.Module):
    """The loss of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y int64 (B, T) -> nats per token, 0-dim."""
        return cross_entropy(self.model(x), y)


class Trainer:
    """One run: its model, data and folder. `loop.run` takes it from its current step to the last."""

    task = "train"
    result = "run.pt"

    def __init__(
        self,
        resolved: Recipe,
        folder: Path,
        device: str,
        report: Report,
        ancestor: lineage.Ancestor | None = None,
        shares: int = 1,
    ) -> None:
        """ancestor: the checkpoint that the run begins with, if any.

        shares: among how many processes the weights are divided, which have no values then before `connect`.
        """
        self.recipe: Recipe = resolved
        self.config: TrainConfig = resolved.train
        self.folder, self.device, self.report = folder, device, report
        context = resolved.model.context
        self.shards = Shards(files.place(resolved.data.shards))
        _check_tokenizer(resolved, self.shards)
        self.windows = windows.Windows(self.shards.split("train"), context, self.config.seed)
        self.validation = validation_starts(self.shards.split("val"), context, self.config.eval_windows)
        kind: type[Decoder] = registry.load(registry.MODELS, resolved.model.name)
        vocabulary = self.shards.tokenizer["vocabulary"]
        with torch.device("meta"):  # to be counted, it takes no memory
            count = kind(resolved.model, vocabulary).count()
        check_room(count["total"], vocabulary, device, shares)
        self.model: Decoder
        if shares > 1:
            with sharded.unallocated():
                self.model = kind(resolved.model, vocabulary)
        else:
            self.model = kind(resolved.model, vocabulary, self.config.seed).to(device)
        self.ancestor, self.shares = ancestor, shares
        self.lineage: dict[str, Any] = ancestor.give(self.model) if ancestor else {}
        if self.config.checkpoint_activations:
            activations.forget(self.model.blocks)
        if shares == 1:
            self.optimizer = self._optimizer()
        self.source: dict[str, Any] | None = None  # of the resume.pt that divided weights come from
        self.saving: Future[Any] | None = None  # a state that is being written
        self.owes_result = False  # whether run.pt is to be made again, once there are weights
        self.precision = precision.choose(resolved, device)
        self.state = loop.State()
        self.began = 0.0  # see loop.Trainable
        self.unread: list[tuple[int, Tensor, Tensor]] = []  # step, loss and norm, on the device: see `settle`
        self.norm = 0.0  # of the gradient of the last step that was read, before clipping
        self.validated: dict[int, float] = {}  # the newest validation loss, by its step
        self.log = Log(folder, self.config.tensorboard)
        self.own_log: Log = NoLog()  # of this process, if each has one
        self.processes, self.part, self.compiles = ALONE, self.config.batch_size, False
        if shares == 1:
            self.connect(ALONE)
        self.model.train()

    def _optimizer(self) -> Optimizer:
        model, config = self.model, self.config
        matrices = model.matrices() if config.optimizer == "muon" else {}
        return Optimizer(model, config, model.routers(), config.router_lr, matrices, model.decays(), model.rates())

    def connect(self, processes: Processes) -> None:
        """Train together with other processes, all of which do this now, from the same state."""
        if self.shares > 1:
            assert processes.count == self.shares, (processes.count, self.shares)
            processes = processes.with_parts()
            self._divide(processes)
        self.processes = processes
        self.part = processes.part(self.config.batch_size, self.config.accumulation)  # windows computed at once
        if self.optimizer.muon:
            self.optimizer.muon.processes = processes
        loss: nn.Module = Loss(self.model)
        self.compiles = compiling.choose(self.config, self.device, processes.count)
        if self.compiles:
            loss = compiling.compiled(loss, self.device, adds=self.config.accumulation * processes.count > 1)
        self.nats = processes.forward(loss)
        if not processes.leads:
            self.log = NoLog()
        if processes.logs:
            self.own_log = Log(self.folder, False, f"rank-{processes.rank}.jsonl")
            self.own_log.cut(self.state.step)
        if self.shares > 1 and processes.told(self.owes_result):
            self.save_result()

    def describe(self) -> str:
        """Size and cost of the model, how often it sees the training data, and which weights it begins with."""
        count, context = self.model.count(), self.recipe.model.context
        flops = self.model.training_flops_per_token(context)
        tokens = self.windows.split.tokens
        epochs = self.config.steps * self.config.batch_size * context / tokens
        computed = f"in {self.precision}" + ", compiled" * self.compiles
        return (
            f"{self.recipe.model.name}: {count['total']:,} parameters ({count['non_embedding']:,} non-embedding), "
            f"{flops / 1e6:.1f} training MFLOPs per token {computed}; {tokens:,} training tokens, "
            f"{epochs:,.2f} epochs"
            + (f"\n{lineage.told(self.lineage, self.shards.tokenizer['fingerprint'])}" if self.lineage else "")
        )

    def changes(self, content: dict[str, Any]) -> list[str]:
        """The differences in shards, first weights, and the keys of the recipe that determine the weights."""
        wanted = checkpoint.made_from(self.recipe.model_dump(), self.shards.manifest["checksum"], self.lineage)
        return differences(checkpoint.made_from(content["recipe"], content["shards"], content.get("lineage")), wanted)

    def step(self, number: int) -> Tensor:
        """Take one optimizer step; returns the loss in nats per token, 0-dim.

        Nothing here waits for the device: `settle` reads the losses of many steps at once.
        """
        if len(self.unread) == MOST_UNREAD:
            self.settle()
        self.processes.at(number)
        began = time.monotonic()
        config, processes, rank = self.config, self.processes, self.processes.rank
        if self.recipe.model.dropout:
            torch.manual_seed(windows.key(config.seed, number, *([rank] if rank else [])) >> 1)
        total = torch.zeros((), device=self.device)
        for index in range(config.accumulation):
            first = number * config.batch_size + (index * processes.count + rank) * self.part
            x, y = map(self._moved, self.windows.batch(first, self.part))  # (B, T)
            with processes.sends(self.nats, index == config.accumulation - 1):
                with precision.products(self.precision, self.device):
                    loss = self.nats(x, y) / config.accumulation
                loss.backward()
            total += loss.detach()
        if processes.logs:
            own, computed = total.item(), time.monotonic()
        self.unread.append((number, processes.mean(total), self.optimizer.clip()))
        with bf16.products(self.precision == "bf16"):  # of Muon, on a CPU
            self.optimizer.step(number)
        if processes.logs:
            seconds = {"computed_s": computed - began, "seconds": time.monotonic() - began}
            self.own_log.write(step=number + 1, loss=own, **{key: round(value, 4) for key, value in seconds.items()})
        return total

    def _divide(self, processes: Processes) -> None:
        """Make this process' part of the weights and of the optimizer's state, and give it the values it begins with.

        These are in the state that `load_state` was given; else they come from the seed, and an ancestor.
        """
        from shortcut_cli.training import resharding  # PyTorch's part of which takes a second to import

        content, seed = self.source, self.config.seed

        def start(name: str, weight: Tensor) -> None:
            if content is None:
                self.model.draw(name, weight, seed)

        sharded.divide(self.model, self.device, processes.group, processes.timeout_s, start)
        if self.precision == "bf16":
            sharded.narrow(self.model)
        if self.ancestor and content is None:
            self.ancestor.give(self.model)
        self.optimizer = self._optimizer()
        if content is not None:
            self.optimizer.allocate()
            own = {"model": self.model.state_dict()} | self.optimizer.state()
            self.optimizer.load_state(resharding.load(self.folder, content, own, processes), self.device)
        self.source = None

    def _moved(self, ids: Tensor) -> Tensor:
        """ids on the device; a GPU fetches them from pinned memory while the next operations are queued."""
        if self.device.startswith("cuda"):
            return ids.pin_memory().to(self.device, non_blocking=True)
        return ids.to(self.device)

    def settle(self) -> None:
        """Read the losses and norms of the last steps, before anything is logged, validated or saved.

        So no step that is not finite gets into a file. Raises Diverged for the first such step.
        """
        if not self.unread:
            return
        numbers, losses, norms = zip(*self.unread, strict=True)
        found, scales = (torch.stack(values).tolist() for values in (losses, norms))
        self.unread = []
        for number, loss, norm in zip(numbers, found, scales, strict=True):
            loop.check_finite(number, {"loss": loss, "norm": norm}, self.folder)
        self.norm = scales[-1]
        read = iter(found)
        pending = self.state.pending
        pending[:] = [next(read) if isinstance(loss, Tensor) else loss for loss in pending]  # the loop holds the list

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss over the validation windows in nats per token, of the EMA weights if the recipe asks for them.

        Each process takes some of the batches.
        """
        ema = self.optimizer.ema
        kept = {name: weight.clone() for name, weight in self.model.state_dict().items()} if ema else None
        if ema:
            self.model.load_state_dict(ema.weights)
        self.model.eval()
        losses: list[Tensor] = []
        counts: list[int] = []
        split, context = self.shards.split("val"), self.recipe.model.context
        size, processes = self.config.batch_size, self.processes
        for turn in range(0, len(self.validation), processes.count * size):
            starts = self.validation[turn + processes.rank * size :][:size]
            if not starts and not processes.sharded:
                break
            counts.append(len(starts))
            starts = starts or self.validation[:1]  # the others need this process' part of the weights
            ids = self._moved(torch.stack([torch.from_numpy(split.read(start, context + 1)) for start in starts]))
            with precision.products(self.precision, self.device):
                logits = self.model(ids[:, :-1])
            losses.append(cross_entropy(logits, ids[:, 1:]))
        if kept:
            self.model.load_state_dict(kept)
        self.model.train()
        values: list[float] = torch.stack(losses).tolist() if losses else []
        total = sum(value * count for value, count in zip(values, counts, strict=True))
        if processes.count > 1:
            total = processes.sum(torch.tensor(total, dtype=torch.float64)).item()
        return total / len(self.validation)

    def content(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        """The content of a run.pt with these weights. Raises Diverged if a step was not finite."""
        self.settle()
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
            "versions": tensor_file.versions(),
            "conditions": [*self.state.conditions],
            "precision": self.precision,
            "lineage": self.lineage,
        }

    def save(self) -> None:
        """Write resume.pt; with divided weights the next steps are taken meanwhile."""
        if self.processes.sharded:
            from shortcut_cli.training import resharding

            self.saved_all()
            self.saving = resharding.save(self.folder, self.saved(), self.processes, self._commit)
        else:
            self._commit(self.saved() if self.processes.leads else None)

    def _commit(self, content: dict[str, Any] | None) -> None:
        if content:
            checkpoint.save(self.folder / STATE, content, previous=self.folder / PREVIOUS)
            parts.sweep(self.folder, STATE, PREVIOUS)

    def saved_all(self) -> None:
        """Wait until what `save` began is written. Raises what went wrong with it."""
        if self.saving:
            from shortcut_cli.training import resharding

            saving, self.saving = self.saving, None
            resharding.wait(saving, self.processes.rank)

    def write(self, name: str, content: Callable[[], dict[str, Any]]) -> None:
        """Write a file of the run, if this process leads; all help to make its content if each has only a part."""
        if self.processes.sharded:
            found = sharded.later(content(), self.processes.leads)
        elif self.processes.leads:
            found = content()
        if self.processes.leads:
            checkpoint.save(self.folder / name, found)

    def saved(self) -> dict[str, Any]:
        """The content of a resume.pt: everything that the next step needs. The disk has the log after this."""
        self.settle()
        self.log.sync()
        self.state.seconds = time.monotonic() - self.began
        state = {"seconds": self.state.seconds, "pending": [*self.state.pending], "best": self.state.best}
        state["best_step"] = self.state.best_step
        if self.shares > 1 and not self.processes.sharded:
            return self.content({name: torch.empty(0) for name in self.model.state_dict()}) | {"state": state}
        return self.content(self.model.state_dict()) | self.optimizer.state() | {"state": state}

    def load_state(self, content: dict[str, Any]) -> None:
        """Restore what `save` wrote; divided weights get their values by `connect`."""
        if self.shares > 1:
            from shortcut_cli.training import resharding

            resharding.check(content, self.model)
            self.source = content
        else:
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state(content, self.device)
        self.load_rest(content)

    def load_rest(self, content: dict[str, Any]) -> None:
        """Restore what is not in tensors."""
        self.lineage = content.get("lineage") or {}
        self.precision = precision.of(content)
        made = conditions.parts(content.get("conditions"))
        self.state = loop.State(step=content["step"], conditions=made, **content["state"])

    def validate(self) -> None:
        """Log the validation loss, and write run.pt if it is the lowest so far."""
        self.settle()
        loss = self.validation_loss()
        self.validated = {self.state.step: loss}
        self.log.write(step=self.state.step, validation=loss)
        self.report(Validation(step=self.state.step, loss=loss, best=min(loss, self.state.best)))
        if loss < self.state.best:
            self.state.best, self.state.best_step = loss, self.state.step
            self.save_result()

    def save_result(self) -> None:
        """Write run.pt, with the weights of this step; if they are to be divided, as soon as they are."""
        if self.shares > 1 and not self.processes.sharded:
            self.owes_result = True
        else:
            self.write(self.result, lambda: self.content(self.optimizer.weights()))

    def check_result(self, path: Path) -> None:
        """Raise CheckFailed or UsageError if run.pt is missing, damaged, or another run's."""
        loop.check_same(self, checkpoint.load(path), path)

    def write_log(self) -> None:
        """Log the steps since the last line, and report progress."""
        self.settle()
        state, config = self.state, self.config
        seconds = time.monotonic() - self.began
        loss = sum(state.pending) / len(state.pending)
        tokens = state.step * config.batch_size * self.recipe.model.context
        state.pending = []
        self.log.write(
            step=state.step,
            loss=loss,
            lr=learning_rate(state.step - 1, config),
            gradient_norm=self.norm,
            tokens=tokens,
            seconds=round(seconds, 3),
        )
        self.report(
            Progress(
                task=self.task,
                done=state.step,
                total=config.steps,
                unit="steps",
                loss=loss,
                loss_unit="nats per token",
                epochs=tokens / self.windows.split.tokens,
                tokens=tokens,
                seconds=seconds,
            )
        )


def validation_starts(split: Split, context: int, count: int) -> list[int]:
    """First tokens of at most `count` windows of context + 1 ids, spread evenly over a split without overlap.

    Raises UsageError if the split is too small for one window.
    """
    fitting = (split.tokens - 1) // context
    if not fitting:
        raise UsageError(
            f"the {split.name} split has {split.tokens} tokens, too few for a context of {context}",
            "prepare more data, a larger data.val, or a smaller model.context",
        )
    count = min(count, fitting)
    return [index * fitting // count * context for index in range(count)]


def _check_tokenizer(resolved: Recipe, shards: Shards) -> None:
    made = shards.manifest["request"].get("tokenizer", {})
    changes = writing.differences(made, resolved.tokenizer.model_dump())
    if changes:
        raise UsageError(
            f"{shards.folder} was tokenized with a different [tokenizer] than the recipe's "
            f"(fingerprint {shards.tokenizer['fingerprint'][:12]})\n" + "\n".join(f"  tokenizer.{c}" for c in changes),
            "prepare the data with this recipe, or point data.shards at other shards",
        )
