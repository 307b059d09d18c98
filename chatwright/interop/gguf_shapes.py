"""The architectures of llama.cpp that our decoder carries exactly: what metadata means, what tensors are
called.

An architecture is an entry of `ARCHITECTURES`: its table of names, what its metadata says beyond a plain
Llama's, and the same backwards. What llama.cpp takes for granted without a key (Gemma's scaled embeddings,
SmolLM3's layers without rotation) stands in these functions. Metadata that we do not know is refused, because
it may change what the model computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from chatwright.config import UserError
from chatwright.interop.gguf_metadata import Metadata
from chatwright.interop.gguf_names import (
    ARCEE_RULES,
    GEMMA2_RULES,
    GEMMA3_RULES,
    GPT2_RULES,
    GPTNEOX_RULES,
    LLAMA_RULES,
    OLMO2_RULES,
    PHI3_RULES,
    QWEN2_RULES,
    QWEN3_RULES,
)
from chatwright.interop.loaded import Rule, Stored
from chatwright.model.config import GPTConfig
from chatwright.model.rotary_scaling import RotaryScaling

ROPE_DIVISORS = "rope_freqs.weight"
"""What the rotary rates are divided by, one number a pair: the converter writes Llama 3.1's scaling so."""
OWN_ACTIVATION = "chatwright.activation"
"""Which GELU a gptneox file means, a key of ours: llama.cpp has none, and computes both out of one table."""
GELUS = ("gelu", "gelu_tanh")
LARGEST_HEAD = 1 << 16


def known_metadata(values: dict[str, Any], where: str) -> Metadata:
    """The metadata of a file. Raises UserError for an architecture or a key that we do not carry."""
    metadata = Metadata(values, where)
    if metadata.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(
            f"{where}: architecture {metadata.architecture!r:.80} is not supported; supported: {known}"
        )
    metadata.refuse_unknown(ARCHITECTURES[metadata.architecture].keys)
    return metadata


def config_of(metadata: Metadata, tensors: dict[str, Stored]) -> GPTConfig:
    """The shape of the model, from the metadata and the size of the vocabulary.

    The divisors of rotary rates become a part of it and are no longer among `tensors`.
    """
    if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].shape) != 2:
        raise UserError(f"{metadata.where}: no token_embd.weight in it: this is not a language model")
    if metadata.architecture in _WITH_DIVISORS:
        metadata.divisors = tensors.pop(ROPE_DIVISORS, None)
    shape: dict[str, Any] = {
        "vocab_size": metadata.whole("vocab_size", tensors["token_embd.weight"].shape[0]),
        "context": metadata.whole("context_length"),
        "layers": metadata.whole("block_count"),
        "width": metadata.whole("embedding_length"),
        "heads": metadata.whole("attention.head_count"),
        "mlp_width": metadata.whole("feed_forward_length"),
        "tied": "output.weight" not in tensors,
    }
    if shape["layers"] > len(tensors):  # before a list of that length is made
        raise UserError(f"{metadata.where}: {shape['layers']} blocks in it, {len(tensors)} tensors in all")
    form = ARCHITECTURES[metadata.architecture]
    found = {**shape, **form.read(metadata, shape)}
    return GPTConfig(**{"family": form.family or metadata.architecture, **found})


# ---- what metadata means -----------------------------------------------------------------------------------


Shape = dict[str, Any]
"""Fields of GPTConfig."""


def _gpt2(metadata: Metadata, shape: Shape) -> Shape:
    return {"norm_eps": metadata.number("attention.layer_norm_epsilon"), "activation": "gelu_tanh"}


def _rotary(metadata: Metadata, shape: Shape, *, partial: bool = False) -> Shape:
    """Heads and rotary positions; `partial`: fewer features of a head may be rotated."""
    head_dim = metadata.whole("attention.key_length", shape["width"] // shape["heads"])
    for name in ("attention.value_length", "rope.dimension_count"):
        found = metadata.whole(name, head_dim)
        if found != head_dim and not (partial and name == "rope.dimension_count"):
            raise UserError(f"{metadata.where}: {name} differs from the head size {head_dim}; not supported")
    return {
        "kv_heads": metadata.whole("attention.head_count_kv", shape["heads"]),
        "head_dim": head_dim,
        "position": "rotary",
        "rotary_dim": metadata.whole("rope.dimension_count", head_dim),
        "rope_base": metadata.number("rope.freq_base", 10_000.0),
        "rope_scaling": _scaling(metadata),
    }


def _llama(metadata: Metadata, shape: Shape, *, partial: bool = False) -> Shape:
    return {
        **_rotary(metadata, shape, partial=partial),
        "norm": "rms",
        "norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "activation": "swiglu",
        "bias": False,
    }


def _smollm3(metadata: Metadata, shape: Shape) -> Shape:
    """Every fourth layer is not rotated; no key says so."""
    return {**_llama(metadata, shape), "rotary_layers": _smollm3_layers(shape["layers"])}


def _smollm3_layers(layers: int) -> tuple[bool, ...]:
    return tuple((layer + 1) % 4 != 0 for layer in range(layers))


def _phi3(metadata: Metadata, shape: Shape) -> Shape:
    """llama.cpp itself leaves the window out; the models were trained with it."""
    windows = (metadata.whole("attention.sliding_window", 0, least=0),) * shape["layers"]
    return {**_llama(metadata, shape, partial=True), "windows": windows}


def _granite(metadata: Metadata, shape: Shape) -> Shape:
    if metadata.get("rope.scaling.finetuned", True) is not True:  # here it is the switch of the rotation
        raise UserError(f"{metadata.where}: granite without rotary positions is not supported")
    return {
        **_llama(metadata, shape),
        "logit_scale": 1.0 / metadata.positive("logit_scale"),
        "residual_scale": metadata.number("residual_scale", 0.0) or 1.0,
        "embed_scale": metadata.number("embedding_scale", 0.0) or 1.0,
        "attention_scale": metadata.number("attention.scale", 0.0),
    }


def _olmo2(metadata: Metadata, shape: Shape) -> Shape:
    """With windows (OLMo 3), layers that have one rotate with the same base and are not stretched."""
    found = _llama(metadata, shape)
    windows = _windows(metadata, shape["layers"], _PERIODS["olmo2"])
    base = found["rope_base"]
    if metadata.number("rope.freq_base_swa", base) != base:
        raise UserError(f"{metadata.where}: olmo2 with a second rotary base is not supported")
    return {
        **found,
        "branch_norm": "after",
        "qk_norm": True,
        "qk_norm_whole": True,
        "windows": windows,
        "window_rope_base": base if any(windows) and found["rope_scaling"] else 0.0,
        "family": "olmo3" if any(windows) else "olmo2",
    }


def _gemma(metadata: Metadata, shape: Shape, largest: int) -> Shape:
    """What Gemma 2 and 3 have in common. The model of 27B, known by its number of layers, has a scale of its
    own."""
    found = _llama(metadata, shape)
    size = shape["width"] // shape["heads"]
    own = shape["layers"] == largest and size not in (0, found["head_dim"])
    return {
        **found,
        "activation": "geglu",
        "branch_norm": "both",
        "embed_scale": shape["width"] ** 0.5,
        "attention_scale": size**-0.5 if own else 0.0,
    }


def _gemma2(metadata: Metadata, shape: Shape) -> Shape:
    found = _gemma(metadata, shape, 46)
    windows = _windows(metadata, shape["layers"], _PERIODS["gemma2"], usual=4096)
    second = metadata.positive("rope.freq_base_swa", found["rope_base"])
    if second != found["rope_base"] and found["rope_scaling"]:  # layers with a window are stretched as well
        raise UserError(f"{metadata.where}: gemma2 with two rotary bases and scaling is not supported")
    return {
        **found,
        "attention_softcap": metadata.positive("attn_logit_softcapping", 50.0),
        "logit_softcap": metadata.positive("final_logit_softcapping", 30.0),
        "windows": windows,
        "window_rope_base": second if any(windows) and second != found["rope_base"] else 0.0,
    }


def _gemma3(metadata: Metadata, shape: Shape) -> Shape:
    """Layers with a window have a rotary base of their own, without linear scaling."""
    found = _gemma(metadata, shape, 62)
    windows, scaling = _windows(metadata, shape["layers"], _PERIODS["gemma3"]), found["rope_scaling"]
    second = metadata.positive("rope.freq_base_swa", 10_000.0)
    if any(windows) and scaling is not None and (scaling.kind != "linear" or scaling.attention_factor != 1.0):
        raise UserError(f"{metadata.where}: gemma3 with windows and yarn is not supported")
    own = any(windows) and (second != found["rope_base"] or scaling)
    return {
        **found,
        "qk_norm": True,
        "logit_softcap": metadata.number("final_logit_softcapping", 0.0),
        "windows": windows,
        "window_rope_base": second if own else 0.0,
    }


def _gptneox(metadata: Metadata, shape: Shape) -> Shape:
    """llama.cpp computes either GELU out of its table of 16-bit numbers, whose error is larger than what the
    two differ by. Without a key of ours the exact one is meant: Pythia's, and that of most models."""
    activation = metadata.values.get(OWN_ACTIVATION, "gelu")
    if activation not in GELUS:
        raise UserError(f"{metadata.where}: {OWN_ACTIVATION} is {activation!r:.80}, not gelu or gelu_tanh")
    return {
        **_rotary(metadata, shape, partial=True),
        "norm_eps": metadata.number("attention.layer_norm_epsilon"),
        "activation": activation,
        "parallel": metadata.truth("use_parallel_residual"),
    }


_PERIODS = {"gemma2": 2, "gemma3": 6, "olmo2": 4}
"""Of so many layers the last one has no window, where no key says otherwise."""


def _usual_pattern(layers: int, period: int) -> list[bool]:
    return [period == 0 or layer % period < period - 1 for layer in range(layers)]


def _windows(metadata: Metadata, layers: int, period: int, usual: int = 0) -> tuple[int, ...]:
    """How many tokens each layer attends to."""
    size = metadata.whole("attention.sliding_window", usual, least=0)
    name = "attention.sliding_window_pattern"
    pattern = metadata.get(name, period)
    if isinstance(pattern, list):
        if len(pattern) != layers or any(type(one) not in (bool, int) for one in pattern):
            raise UserError(f"{metadata.where}: {name} must say yes or no for each of {layers} layers")
    else:
        pattern = _usual_pattern(layers, metadata.whole(name, period, least=0))
    return tuple(size if one else 0 for one in pattern)


def _scaling(metadata: Metadata) -> RotaryScaling | None:
    """How the rotary angles are stretched, as llama.cpp understands the metadata and the tensor of
    divisors."""
    kind = metadata.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise UserError(f"{metadata.where}: rotary scaling of type {kind!r} is not supported")
    factor = metadata.number("rope.scaling.factor", metadata.number("rope.scale_linear", 0.0)) or 1.0
    attention = metadata.number("rope.scaling.attn_factor", 1.0)
    each: tuple[float, ...] = ()
    if metadata.divisors is not None:
        if len(metadata.divisors.shape) != 1 or metadata.divisors.shape[0] > LARGEST_HEAD:
            raise UserError(f"{metadata.where}: {ROPE_DIVISORS} has a strange shape")
        each = tuple(float(str(number)) for number in metadata.divisors.read().numpy())
    if kind == "yarn":
        original = metadata.whole("rope.scaling.original_context_length", metadata.whole("context_length"))
        low = metadata.number("rope.scaling.yarn_beta_slow", 1.0)
        high = metadata.number("rope.scaling.yarn_beta_fast", 32.0)
        attention *= RotaryScaling.usual_attention_factor(factor)
        return RotaryScaling("yarn", factor, original, low, high, attention_factor=attention, divisors=each)
    scaling = RotaryScaling(
        "linear", 1.0 if kind == "none" else factor, attention_factor=attention, divisors=each
    )
    return None if scaling == RotaryScaling("linear") else scaling


# ---- the same backwards: metadata that says a shape --------------------------------------------------------


def stored(value: float) -> float:
    """A number as the file holds it."""
    return float(np.float32(value))


def _say_granite(config: GPTConfig) -> dict[str, Any]:
    values = {
        "logit_scale": stored(1.0 / config.logit_scale),
        "residual_scale": stored(config.residual_scale),
        "embedding_scale": stored(config.embed_scale),
    }
    return {
        **values,
        **({"attention.scale": stored(config.attention_scale)} if config.attention_scale else {}),
    }


def _say_windows(config: GPTConfig, architecture: str) -> dict[str, Any]:
    if not config.windows:
        return {}
    values: dict[str, Any] = {"attention.sliding_window": max(config.windows)}
    pattern = [window > 0 for window in config.windows]
    if pattern != _usual_pattern(config.layers, _PERIODS[architecture]):
        values["attention.sliding_window_pattern"] = pattern
    return values


def _say_gemma2(config: GPTConfig) -> dict[str, Any]:
    values = _say_windows(config, "gemma2")
    if config.window_rope_base and config.window_rope_base != config.rope_base:
        values["rope.freq_base_swa"] = stored(config.window_rope_base)
    if config.attention_softcap:
        values["attn_logit_softcapping"] = stored(config.attention_softcap)
    if config.logit_softcap:
        values["final_logit_softcapping"] = stored(config.logit_softcap)
    return values


def _say_gemma3(config: GPTConfig) -> dict[str, Any]:
    values = _say_windows(config, "gemma3")
    if config.windows:
        values["rope.freq_base_swa"] = stored(config.window_rope_base or config.rope_base)
    if config.logit_softcap:
        values["final_logit_softcapping"] = stored(config.logit_softcap)
    return values


def _say_gptneox(config: GPTConfig) -> dict[str, Any]:
    return {"use_parallel_residual": config.parallel}


# ---- the architectures -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp computes under one name."""

    rules: tuple[Rule, ...]
    read: Callable[[Metadata, Shape], Shape]
    """What the metadata says beyond sizes."""
    say: Callable[[GPTConfig], dict[str, Any]] = lambda config: {}
    """The metadata of this architecture alone; what is common to all stands in gguf_export.py."""
    keys: frozenset[str] = frozenset()
    """Further metadata that `read` reads."""
    whole_width: bool = False
    """llama.cpp expects the heads to have exactly the width's features."""
    head: Literal["any", "own", "shared"] = "any"
    """llama.cpp wants an output matrix apart from the token table, or none."""
    family: str = ""
    """transformers' name for it, where that is another."""


_WINDOW_KEYS = frozenset(
    {"attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"}
)
_GRANITE_KEYS = frozenset(
    {"logit_scale", "residual_scale", "embedding_scale", "attention.scale", "rope.scaling.finetuned"}
)
_WITH_DIVISORS = ("llama", "granite")
ARCHITECTURES = {
    "llama": Architecture(LLAMA_RULES, _llama),
    "qwen3": Architecture(
        QWEN3_RULES,
        lambda metadata, shape: {**_llama(metadata, shape), "qk_norm": True},
    ),
    "gpt2": Architecture(GPT2_RULES, _gpt2),
    "arcee": Architecture(
        ARCEE_RULES,
        lambda metadata, shape: {**_llama(metadata, shape), "activation": "relu2"},
    ),
    "qwen2": Architecture(
        QWEN2_RULES,
        lambda metadata, shape: {**_llama(metadata, shape), "qkv_bias": True},
        whole_width=True,
    ),
    "smollm3": Architecture(LLAMA_RULES, _smollm3),
    "olmo2": Architecture(
        OLMO2_RULES,
        _olmo2,
        lambda config: _say_windows(config, "olmo2"),
        _WINDOW_KEYS,
        whole_width=True,
        head="own",
    ),
    "phi3": Architecture(PHI3_RULES, _phi3, keys=frozenset({"attention.sliding_window"}), whole_width=True),
    "granite": Architecture(LLAMA_RULES, _granite, _say_granite, _GRANITE_KEYS),
    "gemma2": Architecture(
        GEMMA2_RULES,
        _gemma2,
        _say_gemma2,
        _WINDOW_KEYS | {"attn_logit_softcapping", "final_logit_softcapping"},
        head="shared",
    ),
    "gemma3": Architecture(
        GEMMA3_RULES,
        _gemma3,
        _say_gemma3,
        _WINDOW_KEYS | {"final_logit_softcapping"},
        family="gemma3_text",
    ),
    "gptneox": Architecture(
        GPTNEOX_RULES,
        _gptneox,
        _say_gptneox,
        frozenset({"use_parallel_residual"}),
        whole_width=True,
        head="own",
        family="gpt_neox",
    ),
}
