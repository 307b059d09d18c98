"""What llama.cpp's files call the tensors of an architecture, and how numbers lie in them."""

from __future__ import annotations

from collections.abc import Iterable

from chatwright.interop.loaded import Rule


def _named(pairs: Iterable[tuple[str, str]], kinds: tuple[str, ...] = ("weight",)) -> tuple[Rule, ...]:
    """Rules for parts of a block whose numbers lie as ours do."""
    return tuple(
        Rule(f"blk.{{}}.{theirs}.{kind}", f"blocks.{{}}.{own}.{kind}")
        for theirs, own in pairs
        for kind in kinds
    )


_ENDS = (
    Rule("token_embd.weight", "embed.weight"),
    Rule("output_norm.weight", "final_norm.weight"),
    Rule("output.weight", "head.weight"),
)
_NORMS_BEFORE = (("attn_norm", "attention_norm"), ("ffn_norm", "mlp_norm"))
_NORMS_BEHIND = (("post_attention_norm", "attention_out_norm"), ("post_ffw_norm", "mlp_out_norm"))
_QK_NORMS = (("attn_q_norm", "attention.query_norm"), ("attn_k_norm", "attention.key_norm"))
_QK = (("attn_q", "attention.query"), ("attn_k", "attention.key"))
_MATRICES = (
    ("attn_v", "attention.value"),
    ("attn_output", "attention.output"),
    ("ffn_gate", "mlp.gate"),
    ("ffn_up", "mlp.up"),
    ("ffn_down", "mlp.down"),
)
_PLAIN = (*_ENDS, *_named((*_QK, *_MATRICES)))
"""Where llama.cpp rotates the pairs (x_i, x_{i + K/2}), as we do."""
LLAMA_RULES = (
    *_ENDS,
    *_named((*_NORMS_BEFORE, *_MATRICES)),
    Rule("blk.{}.attn_q.weight", "blocks.{}.attention.query.weight", paired="heads"),
    Rule("blk.{}.attn_k.weight", "blocks.{}.attention.key.weight", paired="kv_heads"),
)
"""Where it rotates neighbours."""


def _fused(kind: str) -> Rule:
    own = tuple(f"blocks.{{}}.attention.{part}.{kind}" for part in ("query", "key", "value"))
    return Rule(f"blk.{{}}.attn_qkv.{kind}", own)


PHI3_RULES = (
    *_ENDS,
    *_named((*_NORMS_BEFORE, ("attn_output", "attention.output"), ("ffn_down", "mlp.down"))),
    _fused("weight"),
    Rule("blk.{}.ffn_up.weight", ("blocks.{}.mlp.gate.weight", "blocks.{}.mlp.up.weight")),
)
GPTNEOX_RULES = (
    *_ENDS,
    Rule("output_norm.bias", "final_norm.bias"),
    *_named(
        (*_NORMS_BEFORE, *(pair for pair in _MATRICES if pair[0] not in ("attn_v", "ffn_gate"))),
        ("weight", "bias"),
    ),
    *map(_fused, ("weight", "bias")),
)
QWEN3_RULES = (*_PLAIN, *_named((*_NORMS_BEFORE, *_QK_NORMS)))
QWEN2_RULES = (*_PLAIN, *_named(_NORMS_BEFORE), *_named((*_QK, _MATRICES[0]), ("bias",)))
ARCEE_RULES = tuple(rule for rule in LLAMA_RULES if "ffn_gate" not in rule.theirs)
OLMO2_RULES = (*_PLAIN, *_named((*_NORMS_BEHIND, *_QK_NORMS)))
GEMMA2_RULES = (*_PLAIN, *_named((*_NORMS_BEFORE, *_NORMS_BEHIND)))
GEMMA3_RULES = (*GEMMA2_RULES, *_named(_QK_NORMS))
GPT2_RULES = (*GPTNEOX_RULES, Rule("position_embd.weight", "positions.weight"))
