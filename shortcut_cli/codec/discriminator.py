"""Adversarial training of a codec, as EnCodec's authors do it."""

from typing import Any

import torch
from torch import Tensor

from shortcut_cli.codec import encodec
from shortcut_cli.codec.losses import Balancer, adversarial_loss, discriminator_loss, feature_loss
from shortcut_cli.config.schema import CodecTrainConfig
from shortcut_cli.data import windows
from shortcut_cli.training.optim import restore, set_rate


class Discriminator:
    """EnCodec's multi-scale STFT discriminator with its optimizer, and the balancer of the codec's losses."""

    def __init__(self, config: CodecTrainConfig, device: str) -> None:
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(windows.key(config.seed, 1) >> 1)
            self.network = encodec.discriminator(config.discriminator_filters).to(device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=config.discriminator_lr, betas=(0.5, 0.9))
        self.balancer = Balancer({name: getattr(config, name) for name in ("mel", "wave", "adversarial", "features")})

    def learn(self, x: Tensor, y: Tensor, share: float) -> dict[str, float]:
        """Take one step on sound x and reconstructions y, (B, N) each; returns the discriminator's loss by name.

        share: of the discriminator's learning rate.
        """
        loss = discriminator_loss(self.network(x[:, None])[0], self.network(y.detach()[:, None])[0])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        set_rate(self.optimizer, self.config.discriminator_lr * share)
        self.optimizer.step()
        return {"discriminator": loss.item()}

    def judge(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """The codec's adversarial and feature losses for reconstructions y of x, (B, N) each, by name."""
        with torch.no_grad():
            _, real = self.network(x[:, None])
        logits, made = self.network(y[:, None])
        return {"adversarial": adversarial_loss(logits), "features": feature_loss(real, made)}

    def state(self) -> dict[str, Any]:
        """Everything that the next step needs."""
        states = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        return states | {"balancer": self.balancer.state}

    def load_state(self, content: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.network.load_state_dict(content["network"])
        restore(self.optimizer, content["optimizer"])
        self.balancer.state = dict(content["balancer"])
