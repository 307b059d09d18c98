"""The decoder of the whole lineage: GPT-1, GPT-2, GPT-3, Llama, Qwen3. Read it top to bottom.

    ids -> token embedding (+ position) -> blocks of [attention, MLP] -> (norm) -> logits

Shapes in the comments: B batch, T tokens of this call, S tokens to attend to, H query heads, G key/value heads,
K head size, D width, V vocabulary. The model knows no device, no optimiser, no file format; masks are True where
a token counts.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from chatwright import runtime
from chatwright.config import UserError
from chatwright.model.attention import CausalAttention, blocked_attention, fused_attention
from chatwright.model.cache import Cache
from chatwright.model.config import GPTConfig
from chatwright.model.ragged import Ragged
from chatwright.model.rotary import rotary_angles, rotary_rates, rotate, sinusoids


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32 (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight.to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer norm whose input and weight may differ in precision (arXiv:1607.06450, eq. 4)."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None and self.bias is not None
        shape = self.normalized_shape
        return F.layer_norm(x.float(), shape, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


def norm(config: GPTConfig, width: int) -> nn.Module:
    """The norm layer that the configuration asks for."""
    if config.norm == "rms":
        return RMSNorm(width, config.norm_eps)
    return LayerNorm(width, eps=config.norm_eps)


class Attention(nn.Module):
    """Causal self-attention, softmax(q k^T / sqrt(K)) v, heads in parallel, keys and values shared in groups."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.dropout = config.dropout
        self.query = nn.Linear(config.width, config.heads * config.head_dim, bias=config.bias)
        self.key = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=config.bias)
        self.value = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=config.bias)
        self.output = nn.Linear(config.heads * config.head_dim, config.width, bias=config.bias)
        self.causal: CausalAttention = fused_attention
        self.query_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    @property
    def kernel(self) -> CausalAttention:
        """What computes attention now: in training with dropout only the fused kernel can."""
        return (
            partial(fused_attention, dropout=self.dropout) if self.training and self.dropout else self.causal
        )

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        angles: tuple[Tensor, Tensor] | None,
        attend: Bool[Tensor, "B 1 T S"] | Ragged | None,
        cache: Cache | None,
        layer: int,
        wanted: Int[Tensor, " M"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        batch, tokens, _ = x.shape
        q = self.query(x).view(batch, tokens, self.heads, self.head_dim).transpose(1, 2)  # (B, H, T, K)
        k = self.key(x).view(batch, tokens, self.kv_heads, self.head_dim).transpose(1, 2)  # (B, G, T, K)
        v = self.value(x).view(batch, tokens, self.kv_heads, self.head_dim).transpose(1, 2)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is not None:
            y = fused_attention(q, *cache.extend(layer, k, v), attend)  # type: ignore[arg-type]  # (B, G, S, K)
        elif isinstance(attend, Ragged):
            y = attend.attention(q, k, v, self.kernel)
        else:
            y = self.kernel(q, k, v, attend)
        y = y.transpose(1, 2).reshape(batch, tokens, self.heads * self.head_dim)
        return self.output(y if wanted is None else side_by_side(y, wanted))  # type: ignore[no-any-return]


def gelu_written_out(x: Tensor) -> Tensor:
    """GELU's tanh form (Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2) with (1 + tanh u) / 2 = sigmoid(2 u).

    Equal to `F.gelu(x, approximate="tanh")`. Compiled for a CPU, an exponential costs a third of a tanh; run as it is, it is slower and
    keeps more for the backward pass, so that only the compiler sees it.
    """
    y = x.float()
    return (y * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (y + 0.044715 * y * y * y))).to(x.dtype)


class MLP(nn.Module):
    """Two linear layers around a non-linearity; with SwiGLU a third one gates: down(silu(gate x) * up x)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate = (
            nn.Linear(config.width, config.mlp_width, bias=config.bias)
            if config.activation == "swiglu"
            else None
        )
        self.up = nn.Linear(config.width, config.mlp_width, bias=config.bias)
        self.down = nn.Linear(config.mlp_width, config.width, bias=config.bias)
        self.written_out = False

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        h = self.up(x)
        if self.gate is not None:
            h = F.silu(self.gate(x)) * h
        elif self.activation == "relu2":
            h = F.relu(h).square()  # So et al. 2021, arXiv:2109.08668
        elif self.activation == "gelu_tanh" and self.written_out and torch.compiler.is_compiling():
            h = gelu_written_out(h)
        else:
            h = F.gelu(h, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return self.down(h)  # type: ignore[no-any-return]


@torch.library.custom_op("chatwright::rows_added", mutates_args=())
def rows_added(rows: Tensor, ids: Tensor, count: int) -> Tensor:
    """(count, D) of zeros to which each row of (N, D) is added at its id: the gradient of a table that is looked up.

    An operation of its own so that the compiler leaves it whole: it would add number by number, atomically, and torch's
    `embedding_dense_backward` is no faster on a CPU (12 ms for 4,096 rows of 384; this: 0.3 ms).
    """
    return rows.new_zeros(count, rows.shape[1]).index_add_(0, ids, rows)


@rows_added.register_fake
def _(rows: Tensor, ids: Tensor, count: int) -> Tensor:
    return rows.new_empty(count, rows.shape[1])


class _Lookup(torch.autograd.Function):
    """table[ids], with `rows_added` as its gradient."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.count = table.shape[0]
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        (gradient,) = gradients
        return torch.ops.chatwright.rows_added(gradient.flatten(0, -2), ids.flatten(), ctx.count), None


class Embedding(nn.Embedding):
    """A table of vectors, looked up by number."""

    written_out = False

    def forward(self, ids: Tensor) -> Tensor:
        if self.written_out:
            return _Lookup.apply(self.weight, ids)  # type: ignore[no-untyped-call, no-any-return]
        return super().forward(ids)


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream; the norm stands before or after.

    With `wanted`, places among the B x T tokens, it gives (1, M, D): all tokens are keys and values, but the output matrix and the MLP,
    most of the work, compute these places alone.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.attention_norm = norm(config, config.width)
        self.attention = Attention(config)
        self.mlp_norm = norm(config, config.width)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        attend: Tensor | Ragged | None,
        cache: Cache | None,
        layer: int,
        wanted: Int[Tensor, " M"] | None = None,
    ) -> Tensor:
        y = self.attention_norm(x) if self.pre_norm else x
        y = self.drop(self.attention(y, angles, attend, cache, layer, wanted))
        x = (x if wanted is None else side_by_side(x, wanted)) + y
        if self.pre_norm:
            return x + self.drop(self.mlp(self.mlp_norm(x)))  # type: ignore[no-any-return]
        x = self.attention_norm(x)
        return self.mlp_norm(x + self.drop(self.mlp(x)))  # type: ignore[no-any-return]


def side_by_side(x: Float[Tensor, "B T D"], places: Int[Tensor, " M"]) -> Float[Tensor, "1 M D"]:
    """Some of the B x T tokens."""
    return x.flatten(0, 1).index_select(0, places)[None]


class Head(nn.Linear):
    """Hidden states to logits, bent by the configuration's soft cap if there is one."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config.width, config.vocab_size, bias=False)
        self.softcap = config.logit_softcap

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        learnt = torch.is_grad_enabled() or torch.compiler.is_compiling()
        logits = super().forward(x) if learnt else runtime.product(x, self.weight)
        return self.softcap * torch.tanh(logits.float() / self.softcap) if self.softcap else logits


class GPT(nn.Module):
    """A language model: `forward` gives the logits of the next token at every position."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.width)
        self.positions = Embedding(config.context, config.width) if config.position == "learned" else None
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = norm(config, config.width) if config.pre_norm else nn.Identity()
        self.head = Head(config)
        if config.tied:
            self.head.weight = self.embed.weight
        self.recompute = False
        """Keep only what enters each block and compute the rest again in the backward pass (Chen et al. 2016,
        arXiv:1604.06174): the activations of one block instead of all, for about a third more time."""
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Normal(0, 0.02) (Radford et al. 2018, section 4.1); what writes into the residual stream starts smaller.

        GPT-2 divides it by sqrt(2 x layers) (section 2.3). The `rms` family starts it at zero instead, so that every
        block is the identity at first, and scales the other matrices by their fan-in.
        """
        config = self.config
        for name, parameter in self.named_parameters():
            if parameter.is_meta or "norm" in name:
                continue
            if name.endswith("bias"):
                parameter.zero_()
            elif name.endswith(("attention.output.weight", "mlp.down.weight")):
                if config.norm == "rms":
                    parameter.zero_()
                else:
                    parameter.normal_(0.0, 0.02 / math.sqrt(2 * config.layers))
            elif config.norm == "rms" and ".blocks." in f".{name}":
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
            else:
                parameter.normal_(0.0, 0.02)

    def use_attention(self, kernel: CausalAttention) -> None:
        """Compute attention (without a cache, without dropout) with this function; results are equal."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.causal = kernel

    def write_out(self) -> None:
        """Choose the forms that are fastest once compiled for a CPU, and slower as they are; results are equal."""
        self.use_attention(blocked_attention)
        for module in self.modules():
            if isinstance(module, MLP | Embedding):
                module.written_out = True

    def parameter_count(self, *, embeddings: bool = True) -> int:
        """Number of parameters, shared ones once; without token and position tables when `embeddings` is False."""
        total = sum(parameter.numel() for parameter in self.parameters())
        if not embeddings:
            total -= self.embed.weight.numel() + (self.positions.weight.numel() if self.positions else 0)
        return total

    def angles(self, positions: Int[Tensor, "B T"]) -> tuple[Tensor, Tensor] | None:
        """cos and sin of the rotary positions, times the scaling's factor; None for other kinds of positions."""
        if self.config.position != "rotary":
            return None
        return rotary_angles(positions, *rotary_rates(self.config, positions.device))

    def hidden(
        self,
        ids: Int[Tensor, "B T"],
        *,
        mask: Bool[Tensor, "B T"] | None = None,
        lengths: Int[Tensor, " B"] | None = None,
        positions: Int[Tensor, "B T"] | None = None,
        documents: Int[Tensor, "B T"] | None = None,
        cache: Cache | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Final hidden states, what the output matrix sees.

        mask: True on real tokens (all, when None). Padding may stand left or right; positions count real tokens only.
            Hidden states at padding are meaningless numbers, never NaN. With a cache, padding must stand on the right.
        lengths: instead of all the others: real tokens of each row, the rest of which is padding. Only they are computed (ragged.py);
            hidden states at padding are 0.
        positions: overrides the counting, for packed rows.
        documents: a number per token; a token attends only to tokens of the same number (packed rows).
        cache: keys and values of earlier calls; the real tokens of this call are appended to it.
        angles: `self.angles(positions)`, for callers who use the same positions again and again.
        Raises UserError when a sequence is longer than the context.
        """
        self._check_length(ids.shape[1] if cache is None else cache.longest + ids.shape[1])
        if lengths is not None:
            if any(given is not None for given in (mask, positions, documents, cache, angles)):
                raise ValueError("lengths goes with none of mask, positions, documents, cache, angles")
            ragged = Ragged.of(lengths, ids.shape[1])
            return ragged.put_back(self._decoded(ragged.taken(ids), ragged.columns, ragged))
        if positions is None:
            positions = token_positions(ids, mask, cache.lengths if cache is not None else None)
        x = self._decoded(ids, positions, attention_mask(ids, mask, documents, cache), cache, angles)
        if cache is not None:
            cache.advance(ids.shape[1] if mask is None else mask.sum(1))
        return x

    def hidden_at(
        self,
        ids: Int[Tensor, "B T"],
        places: Int[Tensor, " M"],
        *,
        mask: Bool[Tensor, "B T"] | None = None,
        lengths: Int[Tensor, " B"] | None = None,
        positions: Int[Tensor, "B T"] | None = None,
        documents: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "M D"]:
        """`hidden` at some places, each given as row x T + column: for a loss that looks at some tokens only.

        The last block computes little else, which spares a reward model of four layers (it looks at one token of each row) a
        fifth of its time. The other arguments as in `hidden`; with `lengths`, the places must be of real tokens. Raises as `hidden`.
        """
        self._check_length(ids.shape[1])
        wanted = Ragged.chosen(places)
        attend: Tensor | Ragged | None
        if lengths is not None:
            if any(given is not None for given in (mask, positions, documents)):
                raise ValueError("lengths goes with none of mask, positions, documents")
            attend = Ragged.of(lengths, ids.shape[1])
            wanted = attend.found(wanted)
            ids, positions = attend.taken(ids), attend.columns
        else:
            attend = attention_mask(ids, mask, documents, None)
            positions = token_positions(ids, mask, None) if positions is None else positions
        return self._decoded(ids, positions, attend, wanted=wanted)[0, : len(places)]

    def _check_length(self, tokens: int) -> None:
        if self.config.position == "learned" and tokens > self.config.context:
            raise UserError(f"{tokens} tokens do not fit into the model's context of {self.config.context}")

    def _decoded(
        self,
        ids: Int[Tensor, "B T"],
        positions: Int[Tensor, "B T"],
        attend: Bool[Tensor, "B 1 T S"] | Ragged | None,
        cache: Cache | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
        wanted: Int[Tensor, " M"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Tables, blocks and the last norm; (1, M, D) of the `wanted` places among the B x T tokens."""
        x = self.embed(ids)
        if self.positions is not None:
            x = x + self.positions(positions.clamp(max=self.config.context - 1))
        elif self.config.position == "sinusoidal":
            x = x + sinusoids(positions, self.config.width).to(x.dtype)
        if angles is None:
            angles = self.angles(positions)
        x = self.drop(x)
        for layer, block in enumerate(self.blocks):
            last = wanted if layer == len(self.blocks) - 1 else None
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, angles, attend, cache, layer, last, use_reentrant=False)
            else:
                x = block(x, angles, attend, cache, layer, last)
        return self.final_norm(x)  # type: ignore[no-any-return]

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        *,
        mask: Bool[Tensor, "B T"] | None = None,
        positions: Int[Tensor, "B T"] | None = None,
        documents: Int[Tensor, "B T"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits of the next token, float32. Arguments as in `hidden`."""
        x = self.hidden(ids, mask=mask, positions=positions, documents=documents, cache=cache)
        return self.head(x).float()  # type: ignore[no-any-return]


def token_positions(ids: Tensor, mask: Tensor | None, start: Tensor | None) -> Tensor:
    """Position of each token of (B, T): how many real tokens stand before it, those in the cache included."""
    if mask is None:
        count = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    else:
        count = (mask.long().cumsum(1) - 1).clamp(min=0)
    return count if start is None else count + start[:, None]


def attention_mask(
    ids: Tensor, mask: Tensor | None, documents: Tensor | None, cache: Cache | None
) -> Bool[Tensor, "B 1 T S"] | None:
    """Who may look at whom; None means plain causal.

    Every token may always look at itself, padding included: a row of the softmax without any True would be NaN.
    """
    if cache is not None:
        return cache.attention_mask(ids.shape[1])
    if mask is None and documents is None:
        return None
    tokens = ids.shape[1]
    attend = torch.ones(tokens, tokens, dtype=torch.bool, device=ids.device).tril()[None]
    if mask is not None:
        attend = attend & mask[:, None, :]
    if documents is not None:
        attend = attend & (documents[:, :, None] == documents[:, None, :])
    return (attend | torch.eye(tokens, dtype=torch.bool, device=ids.device))[:, None]
