"""What the architectures share: norm, attention, feed-forward, cache, and the decoder around them.

Axes: B batch, T time, L layer (depth), H heads, D width, V vocabulary, M sources that the last layer attends to.
"""

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shortcut_cli.config.schema import ModelConfig
from shortcut_cli.errors import UsageError
from shortcut_cli.kernels import bf16
from shortcut_cli.kernels.cpu import attend_once, fork_norm, linear, unit_norm
from shortcut_cli.kernels.rope import qkv_heads, rope_freqs
from shortcut_cli.models.trace import Reads, Trace, layer_name

INIT_STD = 0.02
MOST_ANGLES = 1 << 24  # in the rope table, which takes 40 bytes for each while it is made, and 8 then


class Linear(nn.Linear):
    """A matrix without a bias, or several of equal shape, one below the other, which are optimized each by itself.

    narrow: what reads its products takes them in bf16, if they are (`kernels.bf16`).
    """

    def __init__(self, in_features: int, out_features: int, parts: int = 1, *, narrow: bool = False) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.parts, self.narrow = parts, narrow

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(x, self.weight, self.narrow)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, initial: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fork(x)[1]

    def fork(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x itself, for the residual stream, and its norm, for the sublayer that reads it."""
        return fork_norm(x, self.weight)


class History:
    """What lower layers leave for higher ones to read, for the tokens of one call.

    It is no dataclass: FSDP2 hands a layer copies of those, and what the layer adds would be lost.
    """

    def __init__(self, keys: Iterable[Tensor] = (), values: Iterable[Tensor] = (), trace: Trace | None = None) -> None:
        self.keys = list(keys)  # of each layer, rotated by their time, (B, H, T, d) each
        self.values = list(values)  # of each layer, before any mixing, (B, H, T, d) each
        self.trace = trace  # observes the reads


class Cache:
    """Keys and values of the tokens so far: one or more entries per token in each slot, time-major.

    And what layers that read few tokens back need of the last ones, however long the cache is.
    """

    def __init__(self, entries: list[int], batch: int, config: ModelConfig, length: int, like: Tensor) -> None:
        self.length = length
        self.used = 0
        self.entries = entries
        head_width = config.width // config.heads
        self.pairs = [like.new_empty(2, batch, config.heads, n * length, head_width) for n in entries]
        self.tails: dict[int, Tensor] = {}  # by layer, (B, n, D)

    @property
    def keys(self) -> list[Tensor]:
        """Of each slot, (B, H, S, d)."""
        return [pair[0] for pair in self.pairs]

    @property
    def values(self) -> list[Tensor]:
        """Of each slot, (B, H, S, d)."""
        return [pair[1] for pair in self.pairs]

    def extend(self, slot: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, H, T n, d) to the tokens in use; returns everything in the slot, the new entries included."""
        first = self.used * self.entries[slot]
        end = first + k.shape[2]
        keys, values = self.pairs[slot][:, :, :, :end]
        keys[:, :, first:] = k
        values[:, :, first:] = v
        return keys, values

    def append(self, slot: int, new: Tensor) -> tuple[Tensor, Tensor]:
        """The same for the key and value of one token, (B, 2, H, d), in a slot of one entry; (B H, S, d) each."""
        pair, end = self.pairs[slot], self.used + 1
        pair[:, :, :, self.used].copy_(new.transpose(0, 1))
        keys, values = pair.flatten(1, 2)[:, :, :end].unbind()
        return keys, values

    def follow(self, layer: int, x: Tensor, count: int) -> Tensor:
        """x (B, T, D) behind the `count` states that this layer gave before, or zeros: (B, count + T, D)."""
        before = self.tails.get(layer)
        joined = F.pad(x, (0, 0, count, 0)) if before is None else torch.cat((before, x), 1)
        self.tails[layer] = joined[:, -count:].clone()  # so that the rest is freed
        return joined

    def keep(self, rows: list[int]) -> None:
        """Let these rows of the batch follow each other, and forget the others.

        A row that stays in its place is not copied; one that moves must move forward, over a row that is forgotten.
        """
        for slot, entries in enumerate(self.entries):
            end, pair = self.used * entries, self.pairs[slot]
            for place, row in enumerate(rows):
                if place != row:
                    pair[:, place, :, :end] = pair[:, row, :, :end]
            self.pairs[slot] = pair[:, : len(rows)]
        self.tails = {layer: tail[rows] for layer, tail in self.tails.items()}


def attend(q: Tensor, k: Tensor, v: Tensor, sources: int = 1) -> Tensor:
    """Causal attention of the last T of S times, with `sources` keys per time.

    q (B, H, T, d); k, v (B, H, S M, d), time-major. Query i sees the keys of all times j <= i. Returns (B, H, T, d).
    """
    queries, times = q.shape[2], k.shape[2] // sources
    if queries == 1:
        return attend_once(q, k, v)
    if queries == times and bf16.can_attend(q):
        return bf16.attend(q, k, v)[0]
    if sources == 1 and queries == times:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    mask = torch.ones(queries, times, dtype=torch.bool, device=q.device).tril(times - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat_interleave(sources, 1))


class Attention(nn.Module):
    """Causal self-attention with rotary positions, no biases."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.layer, self.qk_norm = config.heads, layer, config.qk_norm
        self.name = layer_name(layer + 1)
        self.query_key_value = Linear(config.width, 3 * config.width, parts=3)
        self.out = Linear(config.width, config.width)

    def forward(self, x: Tensor, freqs: Tensor, cache: Cache | None, history: History | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q, k, v = self.heads_of(self.query_key_value(x), freqs)
        if history is not None:
            v = self.mix(x, q, k, v, history)
        if cache:
            k, v = cache.extend(self.layer, k, v)
        y: Tensor = self.out(attend(q, k, v).transpose(1, 2).flatten(-2))
        return y

    def heads_of(self, qkv: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One projection (B, T, 3 D) -> queries and keys, turned and normed if asked, and values, (B, H, T, d) each."""
        q, k, v = qkv_heads(qkv, freqs, self.heads)
        return (unit_norm(q), unit_norm(k), v) if self.qk_norm else (q, k, v)

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, history: History) -> Tensor:
        """The values (B, H, T, d) that are attended to and cached, given the layer's input x (B, T, D) and own v."""
        del x, q
        history.keys.append(k)
        history.values.append(v)
        return v


class FeedForward(nn.Module):
    """GELU or ReLU^2 (So et al. 2021): D -> ffn -> D; SwiGLU: D -> 2 ffn -> ffn -> D (Shazeer 2020); no biases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated, self.squared = config.activation == "swiglu", config.activation == "relu2"
        parts = 2 if self.gated else 1
        self.inner = Linear(config.width, config.ffn * parts, parts, narrow=True)
        self.out = Linear(config.ffn, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        if self.gated:
            gate, h = self.inner(x).chunk(2, -1)
            h = F.silu(gate) * h
        elif self.squared:
            h = F.relu(self.inner(x)).square()
        else:
            h = F.gelu(self.inner(x))
        y: Tensor = self.out(h)
        return y


class Block(nn.Module):
    """Pre-norm decoder layer: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width)
        self.attention: nn.Module = Attention(config, layer)
        self.feed_forward_norm = RMSNorm(config.width)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, freqs: Tensor, cache: Cache | None, history: History | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x, h = self.attention_norm.fork(x)
        x = x + self.dropout(self.attention(h, freqs, cache, history))
        x, h = self.feed_forward_norm.fork(x)
        y: Tensor = x + self.dropout(self.feed_forward(h))
        return y

    def delta(self, x: Tensor, sublayer: int, freqs: Tensor, cache: Cache | None) -> Tensor:
        """What attention (sublayer 0) or the feed-forward (1) adds if it reads x: (B, T, D) -> (B, T, D)."""
        if sublayer == 0:
            h = self.attention(self.attention_norm(x), freqs, cache)
        else:
            h = self.feed_forward(self.feed_forward_norm(x))
        y: Tensor = self.dropout(h)
        return y


def _check_table(config: ModelConfig) -> None:
    """Raise UsageError if the rope table is too large: no weight of a checkpoint accounts for its memory."""
    angles = config.context * (config.width // config.heads // 2)
    if angles > MOST_ANGLES:
        raise UsageError(
            f"model.context {config.context:,} times half the width of a head is {angles:,}, more than {MOST_ANGLES:,}",
            "choose a smaller model.context, or more model.heads",
        )


class Decoder(nn.Module):
    """Embedding, layers, norm, head. An architecture overrides what it does differently.

    Every parameter is drawn from its own generator, seeded by seed and name, so that tensors of equal name and shape
    start equal in all architectures.
    """

    freqs: Tensor
    taps: tuple[str, ...] = ()  # what the last layer's attention reads in place of its own keys, or beside them
    softmax_reads = False  # whether the weights of each cross-layer read are shares of one softmax

    def __init__(self, config: ModelConfig, vocabulary: int, seed: int | None = None) -> None:
        """Raises UsageError if the rope table is too large."""
        super().__init__()
        _check_table(config)
        self.config, self.vocabulary = config, vocabulary
        # Empty: `initialise` or a checkpoint fills it. Drawing it here would be wasted, and on the meta device it would
        # import torch's compiler, as in `rope_freqs`.
        self.embedding = nn.Embedding.from_pretrained(torch.empty(vocabulary, config.width), freeze=False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(self.make_block(layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.width)
        self.head = Linear(config.width, vocabulary)
        if config.tied:
            self.head.weight = self.embedding.weight
        freqs = rope_freqs(config.context, config.width // config.heads, config.rope_base)
        self.register_buffer("freqs", freqs, persistent=False)
        if seed is not None:  # None: the weights come from a checkpoint
            self.initialise(seed)

    def make_block(self, layer: int) -> nn.Module:
        """The layer with that number, from 0."""
        return Block(self.config, layer)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw the matrices as `model.init` says; vectors stay."""
        for name, weight in self.named_parameters():
            self.draw(name, weight, seed)
        self.init_extra()

    def draw(self, name: str, weight: Tensor, seed: int) -> None:
        """Draw a weight, if it is a matrix."""
        if weight.dim() < 2:
            return
        digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        weight.copy_(torch.randn(weight.shape, generator=generator) * self.initial_std(name, weight))

    def initial_std(self, name: str, weight: Tensor) -> float:
        """Standard deviation of the initial values of a matrix (outputs, inputs).

        fan_in keeps the size of what goes through (He et al. 2015, without the gain), and lets every layer start as
        the identity (ReZero, Bachlechner et al. 2020, has a scalar for that); gpt2: Radford et al. 2019.
        """
        writes = name.endswith(".out.weight")  # to the residual stream
        if self.config.init == "gpt2":
            return INIT_STD / math.sqrt(2 * self.config.layers) if writes else INIT_STD
        if writes:
            return 0.0
        if weight is self.embedding.weight and not self.config.tied:
            return 1.0  # of all its inputs, one is not 0
        return weight.shape[1] ** -0.5 if name in {*self.matrices(), "embedding.weight", "head.weight"} else INIT_STD

    def init_extra(self) -> None:
        """Set what an architecture starts differently, outside of `blocks`: gates, routers, static mixes."""

    def routers(self) -> list[str]:
        """Parameters that route, by the ends of their names: no weight decay, learning rate times `train.router_lr`."""
        return []

    def decays(self) -> dict[str, bool]:
        """Whether AdamW decays parameters that differ in that from their kind, by the ends of their names."""
        return {}

    def rates(self) -> dict[str, float]:
        """Factors of the learning rate of parameters, by the ends of their names."""
        return {}

    def matrices(self) -> dict[str, int]:
        """Names of the weights that multiply states within the layers, but for routers; of how many matrices each is.

        Muon is for these.
        """
        routers = tuple(self.routers())
        named = ((f"{name}.weight", module) for name, module in self.named_modules())
        linear = {name: module for name, module in named if isinstance(module, Linear) and module is not self.head}
        return {name: module.parts for name, module in linear.items() if not name.endswith(routers)}

    def forward(self, ids: Tensor, cache: Cache | None = None, trace: Trace | None = None) -> Tensor:
        """Logits (B, T, V) of the ids that follow each of `ids`, int64 (B, T).

        With a cache, `ids` follow the tokens in it, and are added to it. A trace takes whole windows, without a cache.
        """
        first = cache.used if cache else 0
        freqs = self.freqs[first : first + ids.shape[1]]
        assert len(freqs) == ids.shape[1], f"{first} + {ids.shape[1]} tokens in a context of {self.config.context}"
        x = self.dropout(self.embedding(ids))  # (B, T, D)
        if trace is not None:
            assert cache is None, "reads are observed in whole windows"
            trace.begin(self.reads(), freqs)
        x = self.run_blocks(x, freqs, cache, trace)
        if trace is not None:
            trace.stream(x)
        if cache:
            cache.used += ids.shape[1]
        logits: Tensor = self.head(self.norm(x))
        return logits

    def run_blocks(self, x: Tensor, freqs: Tensor, cache: Cache | None, trace: Trace | None) -> Tensor:
        """All layers: (B, T, D) -> (B, T, D). With a trace, each layer's input and each cross-layer read go to it."""
        for block in self.blocks:
            if trace is not None:
                trace.stream(x)
            x = block(x, freqs, cache)
        return x

    def reads(self) -> Reads:
        """The cross-layer reads: by reader, the names of its sources (`models.trace`)."""
        return {}

    def cache_entries(self) -> list[int]:
        """Keys (and values) per token in each slot of the cache; a layer has one or more slots."""
        return [1] * self.config.layers

    def new_cache(self, batch: int, length: int) -> Cache:
        """An empty cache with room for `length` tokens."""
        return Cache(self.cache_entries(), batch, self.config, length, self.norm.weight)

    def cache_bytes_per_token(self) -> int:
        """fp32 bytes that the cache holds per token."""
        return sum(self.cache_entries()) * 2 * self.config.width * 4

    def count(self) -> dict[str, int]:
        """Number of parameters: embedding, non-embedding, head (0 if tied) and total."""
        total = sum(p.numel() for p in self.parameters())
        embedding = self.embedding.weight.numel()
        head = 0 if self.config.tied else self.head.weight.numel()
        return {"embedding": embedding, "non_embedding": total - embedding - head, "head": head, "total": total}

    def flops(self, context: int, *, causal: bool = True) -> int:
        """Forward FLOPs of one window of `context` tokens.

        Two per multiply-add of the matrices, of attention, and of reads over depth. With `causal` only the pairs that a
        query sees count; without it all T x S, which a dense implementation computes and torch's FlopCounterMode counts
        (which does not count elementwise products, as those of some reads over depth).
        """
        pairs = context * (context + 1) // 2 if causal else context**2
        return 2 * self.macs() * context + 4 * self.config.width * pairs * sum(self.cache_entries())

    def training_flops_per_token(self, context: int) -> int:
        """FLOPs of training on one token of a window of `context`: three times the forward pass."""
        return 3 * self.flops(context) // context

    def macs(self) -> int:
        """Multiply-adds per token of all matrices, and of weighted sums over depth; without those of attention."""
        return sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))


class ReadingDecoder(Decoder):
    """A decoder in which the attention of every layer but the first reads what the layers below left."""

    def make_attention(self, layer: int) -> Attention:
        """The attention of a layer above the first, numbered from 0."""
        raise NotImplementedError

    def make_block(self, layer: int) -> nn.Module:
        """The first layer is the baseline's: there is nothing below it to read."""
        block = Block(self.config, layer)
        if layer:
            block.attention = self.make_attention(layer)
        return block

    def run_blocks(self, x: Tensor, freqs: Tensor, cache: Cache | None, trace: Trace | None) -> Tensor:
        """All layers: (B, T, D) -> (B, T, D)."""
        history = History(trace=trace)
        for block in self.blocks:
            if trace is not None:
                trace.stream(x)
            x = block(x, freqs, cache, history)
        return x
