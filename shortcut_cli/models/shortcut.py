"""The shortcut model: the final layer attends to the intermediate layers.

A reconstruction of "Adaptive Large Language Models By Layerwise Attention Shortcuts" (Verma and Pilanci 2024, arXiv
2409.10870). What we know of it: ten layers; the outputs of layers 2, 4, 6 and 8 are tapped; each goes through a
two-layer MLP of 1,024 neurons; causal cross-attention over the tapped features replaces the final layer's
self-attention. We had neither code nor equations; everything else is our choice, with an option if it could matter:

    F_m = norm'_m(map_m(norm_m(h_m))) (+ e_m),   K = F W_K,   V = F W_V
    y   = h + W_O softmax(q . K[m, j] over all taps m and times j <= i) V,   y = y + feed-forward(norm(y))

norm' is ours. Without it (map_norm off), and with the initial weights of GPT-2, what the maps make is so small that the
output of the last layer's attention starts at 1/31 of the baseline's, and at 1/65 with maps of 256 neurons instead of
1,024 (6 layers of 64, 2 taps, 256 tokens).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from shortcut_cli.config.schema import ModelConfig
from shortcut_cli.errors import UsageError
from shortcut_cli.kernels.attention import attend_sources, distances
from shortcut_cli.kernels.cpu import unit_norm
from shortcut_cli.kernels.rope import qkv_heads, rotate
from shortcut_cli.models.options import ShortcutOptions
from shortcut_cli.models.trace import Reads, Trace, layer_name
from shortcut_cli.models.transformer import (
    Cache,
    Decoder,
    FeedForward,
    Linear,
    RMSNorm,
    attend,
)


def tapped_layers(taps: str, layers: int) -> list[int]:
    """Numbers of the tapped layers, 1 .. layers - 1, and 0 for the embedding.

    Raises UsageError if `taps` names a layer that the last layer can't read.
    """
    below = range(1, layers)
    if taps == "none":
        return []
    if taps == "paper":
        return list(range(2, layers - 1, 2))
    if taps == "all":
        return list(below)
    if taps.startswith("every:"):
        step = int(taps.removeprefix("every:"))
        return list(range(step, layers, step))
    numbers = sorted({int(number) for number in taps.split(",")})
    if numbers[-1] >= layers:
        raise UsageError(f"model.shortcut.taps names layer {numbers[-1]}; the last layer reads 0 to {layers - 1}")
    return numbers


class Features(nn.Module):
    """Tapped states -> features: a norm, a map and a norm per tap, or one map for all, and maybe a depth embedding."""

    def __init__(self, config: ModelConfig, options: ShortcutOptions, taps: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(config.width) for _ in range(taps))
        self.maps = nn.ModuleList(_map(config.width, options) for _ in range(1 if options.share_map else taps))
        self.map_norms = nn.ModuleList()
        if options.map_norm and options.map != "identity":
            size = initial_size(config, options, taps)
            self.map_norms.extend(RMSNorm(config.width, size) for _ in range(taps))
        self.depth = nn.Parameter(torch.zeros(taps, config.width)) if options.depth_embedding else None

    def forward(self, tapped: list[Tensor]) -> Tensor:
        """M states (B, T, D) -> (B, T, M, D)."""
        features = [self.maps[m % len(self.maps)](norm(tapped[m])) for m, norm in enumerate(self.norms)]
        if self.map_norms:
            # In the precision of the states, as every norm: under autocast, maps end in bf16.
            features = [norm(f.type_as(x)) for norm, f, x in zip(self.map_norms, features, tapped, strict=True)]
        stacked = torch.stack(features, 2)
        return stacked if self.depth is None else stacked + self.depth


def initial_size(config: ModelConfig, options: ShortcutOptions, taps: int) -> float:
    """The size of features at which attention to M taps starts as large as to a layer's own keys.

    It starts as a mean. That of M features that do not depend on each other is sqrt(M) smaller than one of them; with
    the layer's own keys between them, (1 + M size^2)^1/2 / (M + 1) = 1. This holds for the small scores that GPT-2's
    initial weights make. With fan_in, scores are of size 1, and what the features of a tap share at all times remains
    in long windows: as large as one, then, so that size 1 is too small over 8 tokens and sqrt(M) too large over 128.
    Their geometric mean is within a factor of 2 over 8 to 256 tokens (8 x 64, 2 to 7 taps).
    """
    if options.concat == "feature":  # one key, of M D inputs
        return taps**-0.5 if config.init == "gpt2" else 1.0
    if options.share_map and options.project == "shared":
        return 1.0  # at first, states of all layers are alike, and so is what is made of them
    if config.init == "fan_in":
        return math.sqrt(math.sqrt(taps))
    return math.sqrt(taps + 2 if options.mode == "add" else taps)


def _map(width: int, options: ShortcutOptions) -> nn.Module:
    if options.map == "mlp":
        inner, out = Linear(width, options.map_width), Linear(options.map_width, width)
        return nn.Sequential(inner, nn.GELU(), out)
    return Linear(width, width) if options.map == "linear" else nn.Identity()


class TapAttention(nn.Module):
    """The last layer's attention: to the taps, instead of or beside its own keys."""

    def __init__(self, config: ModelConfig, options: ShortcutOptions, taps: int) -> None:
        super().__init__()
        self.heads, self.slot, self.mode, self.path = config.heads, config.layers - 1, options.mode, options.attention
        self.name = layer_name(config.layers)
        self.features = Features(config, options, taps)
        self.by_feature, self.qk_norm = options.concat == "feature", config.qk_norm
        self.own = options.mode != "replace"
        width = config.width
        if self.own:
            self.query_key_value = Linear(width, 3 * width, parts=3)
        else:
            self.query = Linear(width, width)
        in_features = width * taps if self.by_feature else width
        projections = taps if options.project == "per_tap" and not self.by_feature else 1
        self.key_value = nn.ModuleList(Linear(in_features, 2 * width, parts=2) for _ in range(projections))
        self.gate = nn.Parameter(torch.zeros(config.heads)) if options.mode == "gated" else None
        self.out = Linear(width, width)

    def forward(
        self, x: Tensor, tapped: list[Tensor], freqs: Tensor, cache: Cache | None, trace: Trace | None
    ) -> Tensor:
        """x (B, T, D), M tapped states (B, T, D) -> (B, T, D)."""
        q, own_k, own_v = self._own(x, freqs)  # (B, T, H, d), (B, T, 1, H, d)
        k, v = self._sources(tapped, freqs)  # (B, T, M, H, d)
        if self.mode == "add":
            k, v = torch.cat((own_k, k), 2), torch.cat((own_v, v), 2)
        q = q.transpose(1, 2)  # (B, H, T, d)
        if self.gate is None:
            y = self._attend(q, k, v, self.slot, cache, trace)
        else:
            # The taps have their own slot of the cache, behind those of the layers.
            tap = self._attend(q, k, v, self.slot + 1, cache, trace)
            y = self._attend(q, own_k, own_v, self.slot, cache, None) + self.gate[:, None, None] * tap
        out: Tensor = self.out(y.transpose(1, 2).flatten(-2))
        return out

    def _own(self, x: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.own:
            q = self._normed(rotate(self.query(x).unflatten(-1, (self.heads, -1)), freqs))
            return q, q, q
        q, k, v = (y.transpose(1, 2) for y in qkv_heads(self.query_key_value(x), freqs, self.heads))
        return self._normed(q), self._normed(k).unsqueeze(2), v.unsqueeze(2)

    def _normed(self, x: Tensor) -> Tensor:
        """Queries or keys, head by head, as in the layers below."""
        return unit_norm(x) if self.qk_norm else x

    def _sources(self, tapped: list[Tensor], freqs: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(tapped)  # (B, T, M, D)
        if self.by_feature:
            features = features.flatten(-2).unsqueeze(2)  # (B, T, 1, M D)
        if len(self.key_value) == 1:
            kv = self.key_value[0](features)
        else:
            kv = torch.stack([project(features[:, :, m]) for m, project in enumerate(self.key_value)], 2)
        k, v = kv.unflatten(-1, (2, self.heads, -1)).unbind(3)
        return self._normed(rotate(k, freqs)), v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, slot: int, cache: Cache | None, trace: Trace | None) -> Tensor:
        """q (B, H, T, d), k and v (B, T, M, H, d) -> (B, H, T, d)."""
        sources = k.shape[2]
        k, v = (x.permute(0, 3, 1, 2, 4) for x in (k, v))  # (B, H, T, M, d)
        merged = self.path == "merge" or (self.path == "auto" and q.device.type == "cuda")
        if trace is not None or (merged and cache is None):
            return attend_sources(q, k, v)[0] if trace is None else self._traced(q, k, v, trace)
        k, v = k.flatten(2, 3), v.flatten(2, 3)
        if cache:
            k, v = cache.extend(slot, k, v)
        return attend(q, k, v, sources)

    def _traced(self, q: Tensor, k: Tensor, v: Tensor, trace: Trace) -> Tensor:
        """q (B, H, T, d), k and v (B, H, T, M, d) -> (B, H, T, d)."""
        pairs = trace.keyed(self.name, k.unbind(3), v.unbind(3))
        kept, shape = list(pairs), (*q.shape[:2], k.shape[3], q.shape[2])
        if trace.measure_distances:
            trace.distances[self.name] = q.new_zeros(shape, dtype=torch.float32)
        if not kept:
            trace.record(self.name, kept, q.new_zeros(0, *q.shape[:3]))
            return torch.zeros_like(q)
        k, v = (torch.stack(parts, 3) for parts in zip(*pairs.values(), strict=True))
        y, shares = attend_sources(q, k, v)
        trace.record(self.name, kept, shares.movedim(2, 0))
        if trace.measure_distances:
            trace.distances[self.name][:, :, kept] = distances(q, k)
        return y


class TapBlock(nn.Module):
    """The last layer: a pre-norm layer like the others, whose attention reads the taps."""

    def __init__(self, config: ModelConfig, options: ShortcutOptions, taps: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width)
        self.attention = TapAttention(config, options, taps)
        self.feed_forward_norm = RMSNorm(config.width)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, tapped: list[Tensor], freqs: Tensor, cache: Cache | None, trace: Trace | None
    ) -> Tensor:
        """x (B, T, D), M tapped states (B, T, D) -> (B, T, D)."""
        x, h = self.attention_norm.fork(x)
        x = x + self.dropout(self.attention(h, tapped, freqs, cache, trace))
        x, h = self.feed_forward_norm.fork(x)
        y: Tensor = x + self.dropout(self.feed_forward(h))
        return y


class Shortcut(Decoder):
    """A decoder whose final layer attends to the intermediate layers; with no taps it is the baseline."""

    softmax_reads = True

    def __init__(self, config: ModelConfig, vocabulary: int, seed: int | None = None) -> None:
        self.options = self.options_of(config)
        self.tapped = tapped_layers(self.options.taps, config.layers)
        super().__init__(config, vocabulary, seed)
        self.taps = self._labels()

    def options_of(self, config: ModelConfig) -> ShortcutOptions:
        """The options that this arm uses."""
        options: ShortcutOptions = config.shortcut  # type: ignore[attr-defined]
        return options

    def sources(self, states: list[Tensor]) -> list[Tensor]:
        """What the taps read, out of the embedding and the outputs of all layers but the last, (B, T, D) each."""
        return [states[layer] for layer in self.tapped]

    def make_block(self, layer: int) -> nn.Module:
        """The last layer reads the taps, if there are any."""
        if self.tapped and layer == self.config.layers - 1:
            return TapBlock(self.config, self.options, len(self.tapped))
        return super().make_block(layer)

    def run_blocks(self, x: Tensor, freqs: Tensor, cache: Cache | None, trace: Trace | None) -> Tensor:
        """All layers: (B, T, D) -> (B, T, D)."""
        if not self.tapped:
            return super().run_blocks(x, freqs, cache, trace)
        states = [x]
        for block in self.blocks[:-1]:
            states.append(block(states[-1], freqs, cache))
        if trace is not None:
            for state in states:
                trace.stream(state)
        y: Tensor = self.blocks[-1](states[-1], self.sources(states), freqs, cache, trace)
        return y

    def reads(self) -> Reads:
        """The last layer reads the taps."""
        return {layer_name(self.config.layers): self.taps} if self.taps else {}

    def cache_entries(self) -> list[int]:
        """The last slot has one key per source; `gated` keeps the layer's own keys apart from the taps'."""
        if not self.tapped:
            return super().cache_entries()
        sources = 1 if self.options.concat == "feature" else len(self.tapped)
        last = {"replace": [sources], "add": [sources + 1], "gated": [1, sources]}[self.options.mode]
        return [1] * (self.config.layers - 1) + last

    def decays(self) -> dict[str, bool]:
        """The vectors of the depth embedding do not, though they are one parameter."""
        return {"features.depth": False}

    def macs(self) -> int:
        """A map or projection that all taps share runs once per tap; a gate weighs what the taps give."""
        total = super().macs()
        if not self.tapped:
            return total
        if self.options.mode == "gated":  # the gate's products
            total += self.config.width
        attention: Any = self.blocks[-1].attention
        again = list(attention.features.maps) if self.options.share_map else []
        if self.options.project == "shared" and self.options.concat == "time":
            again += list(attention.key_value)
        repeated = sum(m.weight.numel() for part in again for m in part.modules() if isinstance(m, nn.Linear))
        return total + (len(self.tapped) - 1) * repeated

    def _labels(self) -> tuple[str, ...]:
        names = [layer_name(layer) for layer in self.tapped]
        if names and self.options.concat == "feature":
            names = [" + ".join(names)]
        if names and self.options.mode == "add":
            names = ["own keys", *names]
        return tuple(names)
