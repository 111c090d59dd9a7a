"""The trainer of a codec: the state of one run and its steps."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shortcut_cli.codec import checkpoint, dataset, rvq
from shortcut_cli.codec.discriminator import Discriminator
from shortcut_cli.codec.layout import CODEBOOK_KBPS, CODES
from shortcut_cli.codec.losses import LogMel, si_sdr_db, wave_loss
from shortcut_cli.config.schema import CodecRecipe, CodecTrainConfig, binding
from shortcut_cli.data import windows
from shortcut_cli.errors import UsageError
from shortcut_cli.events import Progress, Report, Validation
from shortcut_cli.kept.inputs import differences
from shortcut_cli.training import conditions, loop, tensor_file
from shortcut_cli.training.loop import PREVIOUS, STATE
from shortcut_cli.training.optim import Optimizer, learning_rate
from shortcut_cli.training.run_log import Log


class CodecTrainer:
    """One run: its network, data and folder. `loop.run` takes it from its current step to the last."""

    task = "codec train"
    result = "codec.pt"

    def __init__(self, resolved: CodecRecipe, folder: Path, data: dataset.Clips, device: str, report: Report) -> None:
        self.recipe: CodecRecipe = resolved
        self.config: CodecTrainConfig = resolved.train
        self.folder, self.device, self.report = folder, device, report
        self.data = data
        self.windows = dataset.ClipWindows(data, "train", resolved.data, self.config.seed)
        held = dataset.ClipWindows(data, "val", resolved.data, self.config.seed)
        self.validation: Tensor = torch.from_numpy(held.spread(self.config.eval_windows)).to(device)
        self.network: checkpoint.Network = checkpoint.network(resolved.codec, self.config.seed).to(device)
        self.judged: checkpoint.Network = checkpoint.network(resolved.codec).to(device).eval().requires_grad_(False)
        self.mel: LogMel = LogMel().to(device)
        self.optimizer = Optimizer(self.network, self.config)
        self.discriminator = Discriminator(self.config, device) if self.config.adversarial_from else None
        self.state = loop.State()
        self.began = 0.0  # see loop.Trainable
        self.log = Log(folder, self.config.tensorboard)
        self.network.train()

    def describe(self) -> str:
        """Size of the network and length of the data."""
        data, rejects = self.data, self.data.folder / "rejects.jsonl"
        return (
            f"{self.recipe.codec.network}: {self.size():,} parameters; {data.seconds('train') / 60:.1f} minutes of "
            f"training data, {data.seconds('val') / 60:.1f} minutes of validation data; {data.rejected} files rejected"
            + (f", see {rejects}" if data.rejected else "")
        )

    def size(self) -> int:
        """Number of parameters, codebooks included."""
        books = sum(layer.codebook.numel() for layer in self.network.quantizer.vq.layers)
        return int(books) + sum(parameter.numel() for parameter in self.network.parameters())

    def changes(self, content: dict[str, Any]) -> list[str]:
        """The differences in the files, and in the keys of the recipe that determine the weights."""
        lines = differences(binding(content["recipe"]), binding(self.recipe.model_dump()))
        same = [*map(tuple, content["data"])] == self.data.fingerprint
        return lines if same else [*lines, "the files are different"]

    def step(self, number: int) -> dict[str, float]:
        """Take one optimizer step; returns its losses by name, and the norm of the gradient before clipping."""
        config = self.config
        torch.manual_seed(windows.key(config.seed, number) >> 1)  # for revived codes and numbers of codebooks
        x = torch.from_numpy(self.windows.batch(number, config.batch_size)).to(self.device)  # (B, N)
        codebooks = self.recipe.codec.codebooks
        drawn = torch.randint(1, codebooks + 1, (len(x),))
        used = torch.where(torch.rand(len(x)) < 0.5, codebooks, drawn).to(self.device)  # half of them use all codebooks
        quantized, commitment = rvq.quantize(self.network.quantizer, self.network.encode(x), used)
        y = self.network.decode(quantized)[:, : x.shape[1]]
        losses = {"mel": self.mel(x, y), "wave": wave_loss(x, y)}
        if self.discriminator and number >= config.adversarial_from:
            learned = self.discriminator.learn(x, y, learning_rate(number, config) / config.lr)
            losses |= self.discriminator.judge(x, y)
            (config.commitment * commitment).backward(retain_graph=True)
            self.discriminator.balancer.backward(losses, y)
        else:
            learned = {}
            weighted = (getattr(config, name) * loss for name, loss in losses.items())
            sum(weighted, config.commitment * commitment).backward()
        values = {name: loss.item() for name, loss in losses.items()} | {"commitment": commitment.item()} | learned
        norm = self.optimizer.clip().item()
        loop.check_finite(number, values | {"norm": norm}, self.folder)
        self.optimizer.step(number)
        return values | {"gradient_norm": norm}

    @torch.no_grad()
    def scores(self) -> dict[str, float]:
        """Scores over the validation windows, with the weights that codec.pt would hold.

        Log-mel distance at the full and at a quarter of the bandwidth, SI-SDR in dB at the full one, and the
        perplexity of the codebook whose codes are used least evenly.
        """
        weights = {name: tensor.half().float() for name, tensor in self.optimizer.weights().items()}
        self.judged.load_state_dict(weights)
        distances: dict[str, list[float]] = {}
        codes, sdrs = [], []
        full = self.recipe.codec.codebooks
        for x in self.validation.split(self.config.batch_size):
            found = self.judged.quantizer.vq.encode(self.judged.encode(x))  # (Q, B, T)
            codes.append(found.flatten(1))
            for count in sorted({full, max(1, full // 4)}):
                y = self.judged.decode(self.judged.quantizer.vq.decode(found[:count]))[:, : x.shape[1]]
                distance = self.mel(x, y).item() * len(x)
                distances.setdefault(f"mel_{count * CODEBOOK_KBPS:g}kbps", []).append(distance)
                if count == full:
                    sdrs.append(si_sdr_db(x, y)[x.abs().amax(1) > 0])  # undefined for silence
        means = {name: sum(parts) / len(self.validation) for name, parts in distances.items()}
        if len(sdr := torch.cat(sdrs)):
            means[f"si_sdr_{full * CODEBOOK_KBPS:g}kbps"] = sdr.mean().item()
        return means | {"perplexity": min(rvq.perplexities(torch.cat(codes, 1), CODES))}

    def save(self) -> None:
        """Write resume.pt: everything that the next step needs."""
        self.log.sync()
        self.state.seconds = time.monotonic() - self.began
        content = {
            "recipe": self.recipe.model_dump(),
            "data": self.data.fingerprint,
            "network": self.network.state_dict(),
            **self.optimizer.state(),
            "opponent": self.discriminator.state() if self.discriminator else None,
            "state": vars(self.state),
        }
        tensor_file.save(self.folder / STATE, content, self.folder / PREVIOUS)

    def saved_all(self) -> None:
        """Nothing is left to wait for."""

    def load_state(self, content: dict[str, Any]) -> None:
        """Restore what `save` wrote."""
        self.network.load_state_dict(content["network"])
        self.optimizer.load_state(content, self.device)
        if self.discriminator:
            self.discriminator.load_state(content["opponent"])
        self.state = loop.State(**content["state"])
        self.state.conditions = conditions.parts(self.state.conditions)

    def validate(self) -> None:
        """Log the validation scores, and write codec.pt if their log-mel distance is the lowest so far."""
        scores = self.scores()
        distance = sum(value for name, value in scores.items() if name.startswith("mel_"))
        self.log.write(step=self.state.step, **scores)
        best = min(distance, self.state.best)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        self.report(Validation(step=self.state.step, text=shown, loss=distance, best=best))
        if distance < self.state.best:
            self.state.best, self.state.best_step = distance, self.state.step
            self._save_result(scores)

    def _save_result(self, scores: dict[str, float]) -> None:
        path, weights = self.folder / self.result, self.optimizer.weights()
        made = self.state.conditions
        checkpoint.save(path, self.recipe, weights, step=self.state.step, scores=scores, conditions=made)

    def save_result(self) -> None:
        """Write codec.pt, with the weights of this step."""
        self._save_result(self.scores())

    def check_result(self, path: Path) -> None:
        """Raise CheckFailed or UsageError if codec.pt is missing, damaged, or another run's."""
        changes = differences(binding(checkpoint.read(path)["recipe"]), binding(self.recipe.model_dump()))
        if changes:
            raise UsageError(
                f"{path} is of a different run\n" + "\n".join(f"  {line}" for line in changes), "choose another --out"
            )

    def write_log(self) -> None:
        """Log the steps since the last line, and report progress."""
        state, config = self.state, self.config
        found = {name: [values[name] for values in state.pending if name in values] for name in state.pending[-1]}
        means = {name: sum(values) / len(values) for name, values in found.items()}
        seconds = time.monotonic() - self.began
        state.pending = []
        lr = learning_rate(state.step - 1, config)
        self.log.write(step=state.step, **means, lr=lr, seconds=round(seconds, 3))
        self.report(
            Progress(
                task=self.task,
                done=state.step,
                total=config.steps,
                unit="steps",
                loss=means["mel"],
                loss_unit="log-mel distance",
                seconds=seconds,
            )
        )
