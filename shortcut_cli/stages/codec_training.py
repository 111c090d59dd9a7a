"""Train a codec: sound files -> codec.pt, resumable to the bit at any step.

As in `training`, each step depends on the weights, the states of the optimisers and its own number alone.
"""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shortcut_cli import batches, clips, files, loop, optim, recipe, sealed
from shortcut_cli.codec import encodec, objectives, own, rvq
from shortcut_cli.codec.stream import CODES
from shortcut_cli.errors import CheckFailed, ShortcutError
from shortcut_cli.loop import PREVIOUS, STATE, Report, Stop
from shortcut_cli.recipe import CodecRecipe
from shortcut_cli.workers import keep_freed_memory

KBPS = 0.75  # of one codebook
RESULT = "codec.pt"


@dataclass
class State:
    """What changes from step to step beside weights and optimisers."""

    step: int = 0
    best: float = math.inf  # lowest validation distance so far
    seconds: float = 0.0
    pending: list[dict[str, float]] = field(default_factory=list)  # losses since the last line of the log


class Trainer:
    """One run: its network, data and folder. `loop.run` takes it from where it is to the last step."""

    def __init__(self, resolved: CodecRecipe, folder: Path, data: clips.Clips, device: str, report: Report) -> None:
        self.recipe, self.keys, self.folder = resolved, resolved.train, folder
        self.device, self.report = device, report
        self.data = data
        self.windows = clips.Windows(data, "train", resolved.data, self.keys.seed)
        held = clips.Windows(data, "val", resolved.data, self.keys.seed)
        self.validation = torch.from_numpy(held.spread(self.keys.eval_windows)).to(device)
        self.network = own.network(resolved.codec, self.keys.seed).to(device)
        self.judged = own.network(resolved.codec).to(device).eval().requires_grad_(False)
        self.mel = objectives.LogMel().to(device)
        self.optimizer = optim.adamw(self.network, self.keys)
        self.average = optim.Average(self.network, self.keys.ema) if self.keys.ema else None
        self.opponent = Opponent(resolved, device) if self.keys.adversarial_from else None
        self.state = State()
        self.began = 0.0  # when the training would have begun, had it not been interrupted
        self.log = loop.Log(folder, self.keys.tensorboard)
        self.network.train()

    def step(self, number: int) -> dict[str, float]:
        """One optimiser step; returns its losses, by name, and the norm of the gradient before clipping."""
        keys = self.keys
        torch.manual_seed(batches.key(keys.seed, number) >> 1)  # of revived codes and the number of codebooks
        x = torch.from_numpy(self.windows.batch(number, keys.batch_size)).to(self.device)  # (B, N)
        codebooks = self.recipe.codec.codebooks
        drawn = torch.randint(1, codebooks + 1, (len(x),))
        used = torch.where(torch.rand(len(x)) < 0.5, codebooks, drawn).to(self.device)  # half of them at the full rate
        quantized, commitment = rvq.quantize(self.network.quantizer, self.network.encode(x), used)
        y = self.network.decode(quantized)[:, : x.shape[1]]
        losses = {"mel": self.mel(x, y), "wave": wave_loss(x, y)}
        learning_rate = optim.learning_rate(number, keys)
        if self.opponent and number >= keys.adversarial_from:
            shares = self.opponent.learn(x, y, learning_rate / keys.lr)
            losses |= self.opponent.judge(x, y)
            (keys.commitment * commitment).backward(retain_graph=True)
            self.opponent.balancer.backward(losses, y)
        else:
            shares = {}
            weighted = sum((getattr(keys, name) * loss for name, loss in losses.items()), keys.commitment * commitment)
            weighted.backward()
        values = {name: loss.item() for name, loss in losses.items()} | {"commitment": commitment.item()} | shares
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), keys.clip or math.inf).item()
        if not all(map(math.isfinite, (*values.values(), norm))):
            raise ShortcutError(
                f"a loss or its gradient is not finite at step {number + 1} (norm {norm}, {values}); "
                f"the last good state is kept in {self.folder}",
                "a lower train.lr, a longer train.warmup or train.clip = 1.0 usually helps",
            )
        optim.set_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update(self.network, number)
        return values | {"gradient_norm": norm}

    @torch.no_grad()
    def scores(self) -> dict[str, float]:
        """Figures over the validation windows, with the weights that codec.pt would hold.

        Log-mel distance at the full and at a quarter of the rate, SI-SDR in dB at the full one, and the perplexity of
        the codebook that is used least evenly.
        """
        weights = {name: tensor.half().float() for name, tensor in self.weights().items()}
        self.judged.load_state_dict(weights)
        distances: dict[str, list[float]] = {}
        codes, sdrs = [], []
        full = self.recipe.codec.codebooks
        for x in self.validation.split(self.keys.batch_size):
            found = self.judged.quantizer.vq.encode(self.judged.encode(x))  # (Q, B, T)
            codes.append(found.flatten(1))
            for count in sorted({full, max(1, full // 4)}):
                y = self.judged.decode(self.judged.quantizer.vq.decode(found[:count]))[:, : x.shape[1]]
                distances.setdefault(f"mel_{count * KBPS:g}kbps", []).append(self.mel(x, y).item() * len(x))
                if count == full:
                    sdrs.append(objectives.si_sdr_db(x, y)[x.abs().amax(1) > 0])  # of silence it is meaningless
        means = {name: sum(parts) / len(self.validation) for name, parts in distances.items()}
        if len(sdr := torch.cat(sdrs)):
            means[f"si_sdr_{full * KBPS:g}kbps"] = sdr.mean().item()
        return means | {"perplexity": min(rvq.perplexities(torch.cat(codes, 1), CODES))}

    def weights(self) -> dict[str, Tensor]:
        """The weights that are validated and kept in codec.pt."""
        found: dict[str, Tensor] = self.average.weights if self.average else self.network.state_dict()
        return found

    def save(self) -> None:
        """Write resume.pt: all that the next step needs."""
        self.state.seconds = time.monotonic() - self.began
        content = {
            "recipe": self.recipe.model_dump(),
            "data": self.data.fingerprint,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.weights if self.average else None,
            "opponent": self.opponent.state() if self.opponent else None,
            "state": vars(self.state),
        }
        sealed.save(self.folder / STATE, content, self.folder / PREVIOUS)

    def resume(self, content: dict[str, Any]) -> None:
        """Take over the state of a resume.pt; the log of an unfinished run loses what was written after it."""
        try:
            self.network.load_state_dict(content["network"])
            self.optimizer.load_state_dict(content["optimizer"])
            if self.average:
                self.average.weights = {name: weight.to(self.device) for name, weight in content["average"].items()}
            if self.opponent:
                self.opponent.resume(content["opponent"])
            self.state = State(**content["state"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CheckFailed(f"{self.folder / STATE} is no state of this run: {error}") from error
        if self.state.step < self.keys.steps:
            self.log.cut(self.state.step)

    def validate(self) -> None:
        """Log the validation's figures, and keep codec.pt where they are the best so far."""
        scores = self.scores()
        distance = sum(value for name, value in scores.items() if name.startswith("mel_"))
        self.log.write(step=self.state.step, **scores)
        best = min(distance, self.state.best)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        self.report("validation", step=self.state.step, text=shown, loss=distance, best=best)
        if distance < self.state.best:
            self.state.best = distance
            own.save(self.folder / RESULT, self.recipe, self.weights(), step=self.state.step, scores=scores)

    def write_log(self) -> None:
        """A line of the log, and of progress."""
        state, keys = self.state, self.keys
        found = {name: [values[name] for values in state.pending if name in values] for name in state.pending[-1]}
        means = {name: sum(values) / len(values) for name, values in found.items()}
        seconds = time.monotonic() - self.began
        line = {**means, "lr": optim.learning_rate(state.step - 1, keys), "seconds": round(seconds, 3)}
        state.pending = []
        self.log.write(step=state.step, **line)
        self.report(
            "progress",
            task="codec train",
            done=state.step,
            total=keys.steps,
            unit="steps",
            loss=means["mel"],
            seconds=seconds,
        )


def wave_loss(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference of samples, each window relative to its own loudness, (B, N) each."""
    loudness = x.square().mean(1, keepdim=True).sqrt().clamp(min=1e-2)
    return F.l1_loss(y / loudness, x / loudness)


class Opponent:
    """EnCodec's discriminator and loss balancer, and the discriminator's optimiser."""

    def __init__(self, resolved: CodecRecipe, device: str) -> None:
        self.keys = resolved.train
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(batches.key(self.keys.seed, 1) >> 1)
            self.network = encodec.discriminator(self.keys.discriminator_filters).to(device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.keys.discriminator_lr, betas=(0.5, 0.9))
        shares = {name: getattr(self.keys, name) for name in ("mel", "wave", "adversarial", "features")}
        self.balancer = objectives.Balancer(shares)

    def learn(self, x: Tensor, y: Tensor, share: float) -> dict[str, float]:
        """One step of the discriminator on sound x and reconstructions y, (B, N); share: of its learning rate."""
        loss = objectives.discriminator_loss(self.network(x[:, None])[0], self.network(y.detach()[:, None])[0])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = self.keys.discriminator_lr * share
        self.optimizer.step()
        return {"discriminator": loss.item()}

    def judge(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """What the reconstructions y are charged with, by name."""
        with torch.no_grad():
            _, real = self.network(x[:, None])
        logits, made = self.network(y[:, None])
        return {"adversarial": objectives.adversarial_loss(logits), "features": objectives.feature_loss(real, made)}

    def state(self) -> dict[str, Any]:
        """All that the next step needs."""
        states = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        return states | {"balancer": self.balancer.state}

    def resume(self, content: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        self.network.load_state_dict(content["network"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.balancer.state = dict(content["balancer"])


def train(
    resolved: CodecRecipe,
    paths: list[str],
    folder: Path,
    *,
    n_workers: int,
    device: str,
    resume: str,
    report: Report,
    stop: Stop,
) -> dict[str, Any]:
    """Train the recipe's codec on sound files into the run folder; go on where an unfinished run lies there.

    resume: "auto", or "never" to begin again. Returns a summary.

    Raises UsageError where the folder holds a run of another recipe or other files, Interrupted after a signal,
    ShortcutError where a loss is not finite.
    """
    keep_freed_memory()
    with files.held(folder, "shortcut codec train"):
        began = loop.earlier(folder, RESULT, resume, report, lambda path: sealed.load(path, STATE))
        data = clips.stage(paths, folder / "data", resolved.data, n_workers=n_workers, report=report)
        trainer = Trainer(resolved, folder, data, device, report)
        if began is None:
            for name in ("log.jsonl", RESULT, STATE, PREVIOUS):
                (folder / name).unlink(missing_ok=True)
            files.write(folder / "recipe.toml", recipe.dump(resolved))
            report("note", text=_describe(trainer))
        else:
            changes = recipe.differences(began["recipe"], resolved.model_dump())
            changes += ["the files are others"] if [*map(tuple, began["data"])] != data.fingerprint else []
            loop.refuse(folder, changes)
            trainer.resume(began)
            report("note", text=f"going on at step {trainer.state.step}")
        worked = trainer.state.step < resolved.train.steps
        with stop as asked:
            loop.run(trainer, asked)
    return {
        "codec": str(folder / RESULT),
        "worked": worked,
        "step": trainer.state.step,
        "validation_distance": trainer.state.best,
        "parameters": _size(trainer.network),
        "rejected": data.rejected,
        "seconds": round(trainer.state.seconds, 1),
    }


def _size(network: Any) -> int:
    """Parameters, codebooks included."""
    books = sum(layer.codebook.numel() for layer in network.quantizer.vq.layers)
    return books + sum(parameter.numel() for parameter in network.parameters())


def _describe(trainer: Trainer) -> str:
    data = trainer.data
    return (
        f"{trainer.recipe.codec.network}: {_size(trainer.network):,} parameters; "
        f"{data.seconds('train') / 60:.1f} minutes to train on, {data.seconds('val') / 60:.1f} to validate; "
        f"{data.rejected} files rejected" + (f", see {data.folder / 'rejects.jsonl'}" if data.rejected else "")
    )
