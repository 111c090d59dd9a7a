"""What the architectures share: norm, rotary positions, attention, feed-forward, cache, and the decoder around them.

Axes: B batch, T time, L layer (depth), H heads, D width, V vocabulary, M sources that the last layer attends to.
"""

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shortcut_cli.recipe import ModelKeys

INIT_STD = 0.02
EPSILON = 1e-6  # of the norms
FEW_ROWS = 16  # up to which a product with a large matrix is divided among the threads by its columns
LARGE_MATRIX = 2**17  # weights
_EPSILON = torch.tensor(EPSILON, dtype=torch.float64)  # which takes the type of what it is added to


@dataclass
class Trace:
    """Asks a forward pass to keep where its last layer looked, and, if asked to, to change what it finds there."""

    measure_distances: bool = False
    closed: int | None = None  # a source that gets no attention; the others share its part
    exchanged: int | None = None  # a source with the keys and values of the window before in the batch, same times
    depth_weights: Tensor = field(default_factory=lambda: torch.empty(0))  # (B, H, M, T) fp32: each source's share
    distances: Tensor = field(default_factory=lambda: torch.empty(0))  # (B, H, M, T) fp32: mean, in tokens

    def change(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, T, M, d) as the pass shall find them."""
        if self.exchanged is not None:
            m = self.exchanged
            k, v = k.clone(), v.clone()
            k[:, :, :, m], v[:, :, :, m] = (x[:, :, :, m].roll(1, 0) for x in (k, v))
        if self.closed is not None:
            kept = [m for m in range(k.shape[3]) if m != self.closed]
            k, v = k[:, :, :, kept], v[:, :, :, kept]
        return k, v


def on_cpu(x: Tensor, *, autocast: bool = False) -> bool:
    """Whether to use the functions that are written for a CPU: not while torch.compile traces the model.

    autocast: also under autocast. Most can't be used there, since their gradients need all tensors to have one type.
    """
    plain = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return plain and (autocast or not torch.is_autocast_enabled("cpu"))


class Linear(nn.Linear):
    """A matrix without a bias. While sampling on a CPU, its rows are divided among the threads.

    A product of a few rows by a matrix runs in one thread; here it is one product a thread. All matrices of 6 layers of
    width 256, on two cores: 3.1 ms for one row, where they took 3.7 ms; 4.5 ms for four rows, of 5.9 ms.
    """

    def __init__(self, entering: int, leaving: int) -> None:
        super().__init__(entering, leaving, bias=False)
        self.large = entering * leaving >= LARGE_MATRIX

    def forward(self, x: Tensor) -> Tensor:
        """(..., entering) -> (..., leaving)."""
        entering = self.in_features
        few = self.large and x.numel() <= FEW_ROWS * entering
        if not few or torch.is_grad_enabled() or not on_cpu(x):
            return F.linear(x, self.weight)
        parts = math.gcd(self.out_features, torch.get_num_threads())
        rows = x.reshape(1, -1, entering).expand(parts, -1, -1)
        y = torch.bmm(rows, self.weight.view(parts, -1, entering).mT)  # (parts, rows, leaving / parts)
        return y.transpose(0, 1).reshape(*x.shape[:-1], -1)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (Zhang and Sennrich 2019)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fork(x)[1]

    def fork(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x itself, for the residual stream, and its norm: what pre-norm layers need, with one gradient for both."""
        if not on_cpu(x, autocast=x.dtype == self.weight.dtype):
            return x, F.rms_norm(x, self.weight.shape, self.weight, EPSILON)
        if not torch.is_grad_enabled():
            return x, _cpu_norm(x, self.weight)[0]
        stream, normed = _CpuFork.apply(x, self.weight)
        return stream, normed


def _cpu_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """RMS norm in few passes over memory, and 1 / rms(x): torch 2.14 has no fused kernel for it on a CPU."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = torch.addcmul(_EPSILON, norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return (x * scale).mul_(weight), scale


class _CpuFork(torch.autograd.Function):
    """(x, norm of x) with its gradient: that of layer norm at a mean of 0, less its part that centres the gradient.

    (16, 256, 256), forward and backward on two cores: 1.6 ms, where F.rms_norm took 3.4 ms. The gradient of the
    residual stream is added in place, where autograd would write the sum to memory of its own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        y, scale = _cpu_norm(x, weight)
        ctx.save_for_backward(x, weight, scale)
        return x, y

    @staticmethod
    def backward(ctx: Any, stream: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if grad is None:
            return stream, None
        x, weight, scale = ctx.saved_tensors
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, torch.zeros_like(scale), scale, weight, None, [True, True, False]
        )
        grad_x.add_((grad @ weight).unsqueeze(-1).mul_(scale).div_(x.shape[-1]))
        return grad_x if stream is None else grad_x.add_(stream), grad_weight


def rotary_table(context: int, head_width: int, base: float) -> Tensor:
    """exp(i * t * base^(-2k/d)) for time t and pair k (Su et al. 2021, eq. 34), complex64 (context, head_width / 2)."""
    if torch.get_default_device().type == "meta":  # shapes alone; numbers there would import torch's compiler, 2 s
        return torch.empty(context, head_width // 2, dtype=torch.complex64)
    frequencies = base ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angles = torch.outer(torch.arange(context, dtype=torch.float64), frequencies)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn neighbouring pairs of channels by their time's angles: x (B, T, ..., d), table (T, d / 2)."""
    angles = table.view(-1, *(1,) * (x.dim() - 3), table.shape[-1])
    if torch.compiler.is_compiling():  # which makes nothing of complex numbers
        (a, b), (cos, sin) = x.float().unflatten(-1, (-1, 2)).unbind(-1), torch.view_as_real(angles).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).type_as(x)
    return torch.view_as_real(_pairs(x) * angles).flatten(-2).type_as(x)


def _pairs(x: Tensor) -> Tensor:
    """(..., d) as complex64 (..., d / 2); the same memory where x is fp32 and its channels lie side by side."""
    x = x.float()
    return torch.view_as_complex((x if x.stride(-1) == 1 else x.contiguous()).unflatten(-1, (-1, 2)))


def split_heads(qkv: Tensor, table: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """One projection (B, T, 3 D) -> queries, keys (both turned) and values, (B, H, T, d) each; table (T, d / 2)."""
    if torch.compiler.is_compiling():
        q, k, v = (y.unflatten(-1, (heads, -1)) for y in qkv.chunk(3, -1))  # (B, T, H, d)
        return rotate(q, table).transpose(1, 2), rotate(k, table).transpose(1, 2), v.transpose(1, 2)
    if torch.is_grad_enabled():
        q, k, v = _Heads.apply(qkv, table, heads)
        return q, k, v
    return _turned(qkv, table, heads)


def _turned(qkv: Tensor, table: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys lie head by head, which attention reads faster than it reads what lies token by token.

    At (16, 256, 768) and 8 heads, forward on two cores: 16.3 ms of attention where it took 18.0 ms, for 1.0 ms more of
    turning; backward 40.7 ms where it took 41.9 ms.
    """
    batch, times = qkv.shape[:2]
    shape = (batch, times, 3, heads, -1)
    pairs = torch.view_as_complex(qkv.float().view(*shape, 2)[..., :2, :, :, :]).permute(2, 0, 3, 1, 4)
    turned = pairs.new_empty(pairs.shape)  # (2, B, H, T, d / 2)
    torch.mul(pairs, table, out=turned)
    q, k = torch.view_as_real(turned).flatten(-2).type_as(qkv).unbind()
    return q, k, qkv.view(shape)[:, :, 2].transpose(1, 2)


class _Heads(torch.autograd.Function):
    """`split_heads` with its gradient.

    Backward writes all three gradients into one tensor, which makes rotary positions free: with attention at
    (16, 256, 768) and 8 heads, forward and backward on two cores, 27.4 ms with them and without them.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, table: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(table)
        return _turned(qkv, table, heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        heads = grads[0].shape[1]
        q, k, v = (grad.transpose(1, 2).flatten(-2) for grad in grads)  # (B, T, D)
        back = ctx.saved_tensors[0].conj().repeat(1, heads)  # one long row: 0.89 ms; a short one a head takes 1.06 ms
        grad = q.new_empty(*q.shape[:2], 3, q.shape[-1], dtype=torch.float32)
        torch.mul(_pairs(q), back, out=_pairs(grad[:, :, 0]))
        torch.mul(_pairs(k), back, out=_pairs(grad[:, :, 1]))
        grad[:, :, 2] = v
        return grad.flatten(2).type_as(q), None, None


@dataclass
class History:
    """What lower layers leave for higher ones to read, of the tokens of one call."""

    keys: list[Tensor] = field(default_factory=list)  # of each layer, turned by their time, (B, H, T, d) each
    values: list[Tensor] = field(default_factory=list)  # of each layer, before any mixing, (B, H, T, d) each


class Cache:
    """Keys and values of the tokens so far, one entry a token in each slot, or several; time-major."""

    def __init__(self, entries: list[int], batch: int, keys: ModelKeys, length: int, like: Tensor) -> None:
        self.length = length
        self.used = 0
        self.entries = entries
        head_width = keys.width // keys.heads
        shapes = [(batch, keys.heads, n * length, head_width) for n in entries]
        self.keys = [like.new_empty(shape) for shape in shapes]
        self.values = [like.new_empty(shape) for shape in shapes]

    def extend(self, slot: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, H, T n, d) behind the tokens in use; returns all of the slot, those included."""
        first = self.used * self.entries[slot]
        end = first + k.shape[2]
        keys, values = self.keys[slot], self.values[slot]
        keys[:, :, first:end] = k
        values[:, :, first:end] = v
        return keys[:, :, :end], values[:, :, :end]


def attend(q: Tensor, k: Tensor, v: Tensor, sources: int = 1) -> Tensor:
    """Attention of the last T of S times to `sources` keys a time: q (B, H, T, d), k and v (B, H, S M, d), time-major.

    Query i sees the keys of every time j <= i. Returns (B, H, T, d).
    """
    queries, times = q.shape[2], k.shape[2] // sources
    if queries == 1:
        return F.scaled_dot_product_attention(q, k, v)
    if sources == 1 and queries == times:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    mask = torch.ones(queries, times, dtype=torch.bool, device=q.device).tril(times - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat_interleave(sources, 1))


class Attention(nn.Module):
    """Causal self-attention with rotary positions, no biases."""

    def __init__(self, keys: ModelKeys, layer: int) -> None:
        super().__init__()
        self.heads, self.layer = keys.heads, layer
        self.query_key_value = Linear(keys.width, 3 * keys.width)
        self.out = Linear(keys.width, keys.width)

    def forward(self, x: Tensor, table: Tensor, cache: Cache | None, history: History | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q, k, v = split_heads(self.query_key_value(x), table, self.heads)  # (B, H, T, d)
        if history is not None:
            v = self.mix(x, q, k, v, history)
        if cache:
            k, v = cache.extend(self.layer, k, v)
        return self.out(attend(q, k, v).transpose(1, 2).flatten(-2))

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, history: History) -> Tensor:
        """The values that are attended to and cached, of the layer's own v, (B, H, T, d); x (B, T, D) is its input."""
        del x, q
        history.keys.append(k)
        history.values.append(v)
        return v


class FeedForward(nn.Module):
    """GELU: D -> ffn -> D; SwiGLU: D -> 2 ffn -> ffn -> D (Shazeer 2020); no biases."""

    def __init__(self, keys: ModelKeys) -> None:
        super().__init__()
        self.gated = keys.activation == "swiglu"
        self.inner = Linear(keys.width, keys.ffn * (2 if self.gated else 1))
        self.out = Linear(keys.ffn, keys.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        if self.gated:
            gate, h = self.inner(x).chunk(2, -1)
            return self.out(F.silu(gate) * h)
        if on_cpu(x) and torch.is_grad_enabled():
            y: Tensor = _CpuFeedForward.apply(x, self.inner.weight, self.out.weight)
            return y
        return self.out(F.gelu(self.inner(x)))


class _CpuFeedForward(torch.autograd.Function):
    """GELU between two matrices; backward writes the gradient of GELU over that of its output.

    (16, 256, 256) to 1,024 and back, forward and backward on two cores: 46.0 ms, where torch's own took 46.5 ms.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, inner: Tensor, out: Tensor) -> Tensor:
        h = F.linear(x, inner)
        g = F.gelu(h)
        ctx.save_for_backward(x, inner, out, h, g)
        return F.linear(g, out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, inner, out, h, g = ctx.saved_tensors
        shape = x.shape
        grad, x, h, g = (t.flatten(0, -2) for t in (grad, x, h, g))
        grad_h = grad @ out
        torch.ops.aten.gelu_backward.grad_input(grad_h, h, grad_input=grad_h)
        return (grad_h @ inner).view(shape), grad_h.t() @ x, grad.t() @ g


def join(x: Tensor, y: Tensor) -> Tensor:
    """x + y, written over y, the output of a sublayer that nothing else reads, unless x is wider (autocast)."""
    return y.add_(x) if y.dtype == x.dtype else x + y


class Block(nn.Module):
    """Pre-norm decoder layer: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, keys: ModelKeys, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(keys.width)
        self.attention: nn.Module = Attention(keys, layer)
        self.feed_forward_norm = RMSNorm(keys.width)
        self.feed_forward = FeedForward(keys)
        self.dropout = nn.Dropout(keys.dropout)

    def forward(self, x: Tensor, table: Tensor, cache: Cache | None, history: History | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x, h = self.attention_norm.fork(x)
        x = join(x, self.dropout(self.attention(h, table, cache, history)))
        x, h = self.feed_forward_norm.fork(x)
        return join(x, self.dropout(self.feed_forward(h)))

    def delta(self, x: Tensor, sublayer: int, table: Tensor, cache: Cache | None) -> Tensor:
        """What attention (sublayer 0) or the feed-forward (1) adds where it reads x: (B, T, D) -> (B, T, D)."""
        if sublayer == 0:
            return self.dropout(self.attention(self.attention_norm(x), table, cache))
        return self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Decoder(nn.Module):
    """Embedding, layers, norm, head. An architecture replaces what it does differently.

    Every parameter is drawn from a generator of its own, keyed by seed and name, so that tensors of equal name and
    shape start equal in all architectures.
    """

    table: Tensor
    taps: tuple[str, ...] = ()  # what the last layer attends to beside its own input

    def __init__(self, keys: ModelKeys, vocabulary: int, seed: int | None = None) -> None:
        super().__init__()
        self.keys, self.vocabulary = keys, vocabulary
        # Empty: `initialise` or a checkpoint fills it. Drawing it here would be for nothing, and on the meta device
        # would import torch's compiler, as in `rotary_table`.
        self.embedding = nn.Embedding.from_pretrained(torch.empty(vocabulary, keys.width), freeze=False)
        self.dropout = nn.Dropout(keys.dropout)
        self.blocks = nn.ModuleList(self.make_block(layer) for layer in range(keys.layers))
        self.norm = RMSNorm(keys.width)
        self.head = Linear(keys.width, vocabulary)
        if keys.tied:
            self.head.weight = self.embedding.weight
        self.register_buffer("table", rotary_table(keys.context, keys.width // keys.heads, keys.rope_base), False)
        if seed is not None:  # None: the weights come from a checkpoint
            self.initialise(seed)

    def make_block(self, layer: int) -> nn.Module:
        """The layer of that number, from 0."""
        return Block(self.keys, layer)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Matrices N(0, 0.02), those that write to the residual stream divided by sqrt(2 L) (GPT-2); vectors stay."""
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                continue
            digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            scale = 1 / math.sqrt(2 * self.keys.layers) if name.endswith(".out.weight") else 1.0
            weight.copy_(torch.randn(weight.shape, generator=generator) * (INIT_STD * scale))
        self.begin()

    def begin(self) -> None:
        """What an architecture sets beside, after all matrices have been drawn: gates, routers, static mixes."""

    def routers(self) -> list[str]:
        """Parameters (by the end of their names) that route: no weight decay, and `train.router_lr` times the rate."""
        return []

    def forward(self, ids: Tensor, cache: Cache | None = None, trace: Trace | None = None) -> Tensor:
        """Logits (B, T, V) of the ids that follow each of `ids`, int64 (B, T).

        With a cache, `ids` follow the tokens that it holds, and are added to it.
        """
        first = cache.used if cache else 0
        table = self.table[first : first + ids.shape[1]]
        assert len(table) == ids.shape[1], f"{first} + {ids.shape[1]} tokens in a context of {self.keys.context}"
        x = self.dropout(self.embedding(ids))  # (B, T, D)
        x = self.trunk(x, table, cache, trace)
        if cache:
            cache.used += ids.shape[1]
        return self.head(self.norm(x))

    def trunk(self, x: Tensor, table: Tensor, cache: Cache | None, trace: Trace | None) -> Tensor:
        """All layers: (B, T, D) -> (B, T, D)."""
        del trace
        for block in self.blocks:
            x = block(x, table, cache)
        return x

    def cache_entries(self) -> list[int]:
        """Keys (and values) that each slot of the cache keeps for a token; a layer has one slot, or more."""
        return [1] * self.keys.layers

    def new_cache(self, batch: int, length: int) -> Cache:
        """An empty cache with room for `length` tokens."""
        return Cache(self.cache_entries(), batch, self.keys, length, self.norm.weight)

    def cache_bytes_per_token(self) -> int:
        """fp32 bytes that the cache holds for each token."""
        return sum(self.cache_entries()) * 2 * self.keys.width * 4

    def count(self) -> dict[str, int]:
        """Number of parameters: embedding, trunk, head (0 where it is tied) and total."""
        total = sum(p.numel() for p in self.parameters())
        embedding = self.embedding.weight.numel()
        head = 0 if self.keys.tied else self.head.weight.numel()
        return {"embedding": embedding, "trunk": total - embedding - head, "head": head, "total": total}

    def flops(self, context: int, *, causal: bool = True) -> int:
        """Forward FLOPs of one window of `context` tokens; training takes three times as many.

        Two for each multiply-add of the matrices and of attention; with `causal` only pairs that a query sees count,
        without it all T x S, which is what a dense implementation runs and what torch's FlopCounterMode counts.
        """
        pairs = context * (context + 1) // 2 if causal else context**2
        return 2 * self.multiplications() * context + 4 * self.keys.width * pairs * sum(self.cache_entries())

    def multiplications(self) -> int:
        """Multiply-adds of all matrices for one token, attention apart."""
        return sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))


class ReadingDecoder(Decoder):
    """A decoder in which the attention of every layer but the first reads what the layers below left."""

    def attention(self, layer: int) -> Attention:
        """The attention of a layer above the first, numbered from 0."""
        raise NotImplementedError

    def make_block(self, layer: int) -> nn.Module:
        """The first layer is the baseline's: there is nothing below it."""
        block = Block(self.keys, layer)
        if layer:
            block.attention = self.attention(layer)
        return block

    def trunk(self, x: Tensor, table: Tensor, cache: Cache | None, trace: Trace | None) -> Tensor:
        """All layers: (B, T, D) -> (B, T, D)."""
        del trace
        history = History()
        for block in self.blocks:
            x = block(x, table, cache, history)
        return x
