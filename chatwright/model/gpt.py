"""The decoder of the whole lineage, GPT-1 to GPT-3, and of its open relatives. Read it from top to bottom.

    ids -> token embedding (+ position) -> blocks of [attention, MLP] -> (norm) -> logits

Its configuration says which parts a model has (config.py). Shapes: B batch, T tokens of this call, S tokens
to attend to, H query heads, G key/value heads, K head size, D width, V vocabulary. Masks are True where a
token counts. The model knows no device, optimiser or file format. Forms of its parts for a compiler or a
processor are put in from outside (compile_friendly.py, attention.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from chatwright.config import UserError
from chatwright.model.attention import CausalAttention, fused_attention
from chatwright.model.cache import Cache
from chatwright.model.config import GPTConfig
from chatwright.model.inference_linear import InferenceLinear
from chatwright.model.inputs import AttentionInput, attention_input, block_inputs
from chatwright.model.norms import RMSNorm, norm
from chatwright.model.ragged import gather, pad_to_bucket
from chatwright.model.rotary import rotary_angles, rotary_rates, rotate, sinusoids


class Attention(nn.Module):
    """Causal self-attention, softmax(q k^T / sqrt(K)) v, in H heads; H / G of them share keys and values.

    What the kernels of attention.py do not know, another scale of the scores, is a factor on the queries.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.dropout = config.dropout
        self.scale = config.attention_scale * config.head_dim**0.5 if config.attention_scale else 1.0
        self.softcap, self.norm_whole = config.attention_softcap, config.qk_norm_whole
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.query = nn.Linear(config.width, queries, bias=config.has_qkv_bias)
        self.key = nn.Linear(config.width, keys, bias=config.has_qkv_bias)
        self.value = nn.Linear(config.width, keys, bias=config.has_qkv_bias)
        self.output = nn.Linear(queries, config.width, bias=config.bias)
        if not config.qk_norm_whole:
            queries = keys = config.head_dim
        self.query_norm = RMSNorm(queries, config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(keys, config.norm_eps) if config.qk_norm else None
        self.kernel: CausalAttention = fused_attention

    def forward(self, x: Float[Tensor, "B T D"], inputs: AttentionInput) -> Float[Tensor, "B T D"]:
        batch, tokens, _ = x.shape
        q, k, v = self.query(x), self.key(x), self.value(x)  # (B, T, H x K), (B, T, G x K) twice
        if self.query_norm is not None and self.key_norm is not None and self.norm_whole:
            q, k = self.query_norm(q), self.key_norm(k)
        q = q.view(batch, tokens, self.heads, self.head_dim).transpose(1, 2)  # (B, H, T, K)
        k = k.view(batch, tokens, self.kv_heads, self.head_dim).transpose(1, 2)  # (B, G, T, K)
        v = v.view(batch, tokens, self.kv_heads, self.head_dim).transpose(1, 2)
        if self.query_norm is not None and self.key_norm is not None and not self.norm_whole:
            q, k = self.query_norm(q), self.key_norm(k)
        if inputs.angles is not None:
            q, k = rotate(q, *inputs.angles), rotate(k, *inputs.angles)
        if self.scale != 1.0:
            q = q * self.scale
        y = self.attend(q, k, v, inputs).transpose(1, 2)  # (B, T, H, K)
        y = y.reshape(batch, tokens, self.heads * self.head_dim)
        if inputs.output_indices is not None:
            y = gather(y, inputs.output_indices)  # (1, M, D)
        return self.output(y)  # type: ignore[no-any-return]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInput) -> Float[Tensor, "B H T K"]:
        """softmax(q k^T / sqrt(K)) v, over a cache, over rows without padding, or over the rows as given."""
        kernel = self.kernel
        if inputs.cache is not None:
            k, v = inputs.cache.extend(inputs.layer, k, v)  # (B, G, S, K)
            kernel = fused_attention
        elif self.training and self.dropout:  # only the fused kernel can drop attention weights
            kernel = partial(fused_attention, dropout=self.dropout)
        if self.softcap:
            kernel = partial(kernel, softcap=self.softcap)
        if inputs.ragged is not None:
            return inputs.ragged.attention(q, k, v, kernel, inputs.mask)
        return kernel(q, k, v, inputs.mask)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU with tanh for the error function: that of GPT-1, 2 and 3 (arXiv:1606.08415, section 2)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021, arXiv:2109.08668
    "swiglu": F.silu,
    "geglu": gelu_tanh,
}


class MLP(nn.Module):
    """down(f(up x)); with a gate down(f(gate x) * up x) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gate = nn.Linear(config.width, config.mlp_width, bias=config.bias) if config.gated else None
        self.up = nn.Linear(config.width, config.mlp_width, bias=config.bias)
        self.down = nn.Linear(config.mlp_width, config.width, bias=config.bias)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        h = self.up(x)
        h = self.activation(h) if self.gate is None else self.activation(self.gate(x)) * h
        return self.down(h)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream; with `parallel` both read the same stream.

    Norms stand before each branch (GPT-2), behind it (OLMo 2), on both sides (Gemma 2), or behind the sum
    (GPT-1). With `inputs.output_indices` the result is (1, M, D): the output matrix and the MLP, most of the
    work, are computed for these tokens alone.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.pre_norm, self.parallel, self.scale = config.pre_norm, config.parallel, config.residual_scale
        self.attention_norm = norm(config) if config.branch_norm != "after" else nn.Identity()
        self.attention = Attention(config)
        self.attention_out_norm = norm(config) if config.branch_norm != "before" else nn.Identity()
        self.mlp_norm = norm(config) if config.branch_norm != "after" else nn.Identity()
        self.mlp = MLP(config)
        self.mlp_out_norm = norm(config) if config.branch_norm != "before" else nn.Identity()
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "B T D"], inputs: AttentionInput) -> Float[Tensor, "B T D"]:
        y = self.attention(self.attention_norm(x) if self.pre_norm else x, inputs)
        if inputs.output_indices is not None:
            x = gather(x, inputs.output_indices)
        z = x if self.parallel else None
        x = torch.add(x, self.drop(self.attention_out_norm(y)), alpha=self.scale)
        if not self.pre_norm:
            x = self.attention_norm(x)
            return self.mlp_norm(x + self.drop(self.mlp(x)))  # type: ignore[no-any-return]
        z = self.mlp_out_norm(self.mlp(self.mlp_norm(x if z is None else z)))
        return torch.add(x, self.drop(z), alpha=self.scale)


class Head(InferenceLinear):
    """Hidden states to logits, with a soft cap if there is one (Gemma 2, arXiv:2408.00118, section 2)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config.width, config.vocab_size, bias=False)
        self.softcap = config.logit_softcap

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        logits = super().forward(x)
        return self.softcap * torch.tanh(logits.float() / self.softcap) if self.softcap else logits


class GPT(nn.Module):
    """A language model: `forward` gives the logits of the next token at every position."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.context, config.width) if config.position == "learned" else None
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = norm(config) if config.pre_norm else nn.Identity()
        self.head = Head(config)
        if config.tied:
            self.head.weight = self.embed.weight
        self.activation_checkpointing = False
        """Keep only each block's input and compute the rest again in the backward pass (Chen et al. 2016,
        arXiv:1604.06174): the activations of one block instead of all, for about a third more time."""
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Normal(0, 0.02) (Radford et al. 2018, section 4.1), smaller for what writes to the residual stream.

        GPT-2 divides these matrices by sqrt(2 x layers) (section 2.3). The `rms` family starts them at zero,
        so that every block is the identity at first (unless a norm stands behind them, whose slope at zero
        is huge), and scales all other matrices by their fan-in.
        """
        config = self.config
        for name, parameter in self.named_parameters():
            if parameter.is_meta or "norm" in name:
                continue
            if name.endswith("bias"):
                parameter.zero_()
            elif name.endswith(("attention.output.weight", "mlp.down.weight")):
                if config.norm == "rms" and config.branch_norm == "before":
                    parameter.zero_()
                else:
                    parameter.normal_(0.0, 0.02 / math.sqrt(2 * config.layers))
            elif config.norm == "rms" and ".blocks." in f".{name}":
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
            else:
                parameter.normal_(0.0, 0.02)

    def use_attention(self, kernel: CausalAttention) -> None:
        """Compute attention with this function where there is no cache and no dropout. Results are equal."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.kernel = kernel

    def parameter_count(self, *, embeddings: bool = True) -> int:
        """Number of parameters, shared ones once. `embeddings` False leaves out token and position tables."""
        total = sum(parameter.numel() for parameter in self.parameters())
        if not embeddings:
            total -= self.embed.weight.numel() + (self.positions.weight.numel() if self.positions else 0)
        return total

    def angles(self, positions: Int[Tensor, "B T"]) -> tuple[Tensor, ...] | None:
        """Cosine and sine of rotary positions, (B, 1, T, R / 2) each, then those of layers with a window if
        these have a base of their own; None for other kinds of positions."""
        if self.config.position != "rotary":
            return None
        kinds = (False, True) if self.config.window_rope_base else (False,)
        rates = (rotary_rates(self.config, positions.device, windowed=kind) for kind in kinds)
        return tuple(part for one in rates for part in rotary_angles(positions, *one))

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        *,
        mask: Bool[Tensor, "B T"] | None = None,
        positions: Int[Tensor, "B T"] | None = None,
        documents: Int[Tensor, "B T"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits of the next token, float32. Arguments and errors as in `hidden`."""
        x = self.hidden(ids, mask=mask, positions=positions, documents=documents, cache=cache)
        return self.head(x).float()  # type: ignore[no-any-return]

    def hidden(
        self,
        ids: Int[Tensor, "B T"],
        *,
        mask: Bool[Tensor, "B T"] | None = None,
        lengths: Int[Tensor, " B"] | None = None,
        positions: Int[Tensor, "B T"] | None = None,
        documents: Int[Tensor, "B T"] | None = None,
        cache: Cache | None = None,
        angles: tuple[Tensor, ...] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Final hidden states, the input of the output matrix.

        mask: True on real tokens (None: all are). Padding may stand on the left or on the right, with a cache
            only on the right; positions count real tokens. Hidden states at padding are finite, no more.
        lengths: real tokens of each row, with padding behind them. Only real tokens are computed (ragged.py);
            hidden states at padding are 0. It goes with no other argument.
        positions: position of each token, for packed rows.
        documents: a number per token, for packed rows; tokens attend only to tokens of the same number.
        cache: keys and values of earlier calls; the real tokens of this call are appended.
        angles: `self.angles(positions)`, for callers that use the same positions again and again.
        Raises UserError for rows longer than the context, ValueError for `lengths` with another argument.
        """
        self._check_length(ids.shape[1] if cache is None else cache.longest + ids.shape[1])
        inputs = attention_input(ids, mask, lengths, positions, documents, cache, angles)
        x = self._decode(ids, inputs)
        if cache is not None:
            cache.advance(ids.shape[1] if mask is None else mask.sum(1))
        return x if inputs.ragged is None else inputs.ragged.pad(x)

    def hidden_at(
        self,
        ids: Int[Tensor, "B T"],
        indices: Int[Tensor, " M"],
        *,
        mask: Bool[Tensor, "B T"] | None = None,
        lengths: Int[Tensor, " B"] | None = None,
        positions: Int[Tensor, "B T"] | None = None,
        documents: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "M D"]:
        """`hidden` of some tokens, each given as row x T + column: for losses that look at some tokens only.

        The last block computes little else. A reward model of four layers, which looks at one token of each
        row, saves a fifth of its time. Other arguments and errors as in `hidden`; with `lengths` no token may
        be padding.
        """
        self._check_length(ids.shape[1])
        inputs = attention_input(ids, mask, lengths, positions, documents)
        chosen = pad_to_bucket(indices, 0)
        if inputs.ragged is not None:
            chosen = inputs.ragged.locate(chosen)
        return self._decode(ids, inputs._replace(output_indices=chosen))[0, : len(indices)]

    def _check_length(self, tokens: int) -> None:
        if self.config.position == "learned" and tokens > self.config.context:
            raise UserError(f"{tokens} tokens do not fit into the model's context of {self.config.context}")

    def _decode(self, ids: Int[Tensor, "B T"], inputs: AttentionInput) -> Float[Tensor, "B T D"]:
        """Embedding, blocks, final norm; (1, N, D) of rows without padding, (1, M, D) of M output indices."""
        x = self.embed(ids if inputs.ragged is None else inputs.ragged.unpad(ids))
        if self.config.embed_scale != 1.0:
            x = x * self.config.embed_scale
        if self.positions is not None:
            x = x + self.positions(inputs.positions.clamp(max=self.config.context - 1))
        elif self.config.position == "sinusoidal":
            x = x + sinusoids(inputs.positions, self.config.width).to(x.dtype)
        x = self.drop(x)
        if inputs.angles is None:
            inputs = inputs._replace(angles=self.angles(inputs.positions))
        for block, given in zip(self.blocks, block_inputs(inputs, self.config), strict=True):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, given, use_reentrant=False)
            else:
                x = block(x, given)
        x = self.final_norm(x)
        if self.config.logit_scale != 1.0:
            x = x * self.config.logit_scale
        return x  # type: ignore[no-any-return]
