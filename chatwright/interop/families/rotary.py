"""Rotary positions in `config.json`: where versions of transformers keep their base and scaling, and how ours
are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chatwright.config import UserError
from chatwright.interop.families.settings import KINDS as LAYERS
from chatwright.interop.families.settings import Settings, named, shown
from chatwright.model.config import GPTConfig
from chatwright.model.rotary_scaling import RotaryScaling

# The settings that each kind of rotary scaling has, next to its base.
KINDS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "truncate",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
    },
}


def rotary(settings: Settings, *, base: float = 10_000.0) -> dict[str, Any]:
    """Base and scaling of the rotary angles; `base` is the family's usual one."""
    settings.only("partial_rotary_factor", None, 1, 1.0)
    rope = Settings(rope_values(settings), settings.where)
    rope.only("partial_rotary_factor", None, 1, 1.0)
    return base_and_scaling(rope, settings, settings.number("rope_theta", base))


def rope_values(settings: Settings) -> Mapping[str, Any]:
    """The object that describes rotary positions, out of the places where versions of transformers keep
    it."""
    found = settings.values.get("rope_parameters") or settings.values.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise UserError(f"{settings.where}: rope_parameters must be an object, not {shown(found)}")
    return found


def base_and_scaling(
    rope: Settings, settings: Settings, base: float, kinds: tuple[str, ...] = tuple(KINDS)
) -> dict[str, Any]:
    """The fields `rope_base` and `rope_scaling`. `base` is what holds where `rope` does not say it."""
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind not in kinds:
        raise UserError(f"{settings.where}: rotary scaling of type {named(kind)} is not supported")
    usual = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    strange = sorted(set(rope.values) - usual - KINDS[kind])
    if strange:
        raise UserError(f"{settings.where}: rotary setting {strange[0]!r:.80} is not supported")
    return {
        "rope_base": rope.number("rope_theta", base),
        "rope_scaling": _scaling(kind, rope, settings),
    }


def partial_rotary(
    settings: Settings, *, base: float = 10_000.0, part: float = 1.0, kinds: tuple[str, ...] = tuple(KINDS)
) -> dict[str, Any]:
    """The same for families that rotate a part of each head, and the field `rotary_dim`. `part` is the
    family's usual one; `kinds` are the kinds of scaling that it has."""
    rope = Settings(rope_values(settings), settings.where)
    fields = base_and_scaling(rope, settings, settings.number("rope_theta", base), kinds)
    part = rope.positive("partial_rotary_factor", settings.positive("partial_rotary_factor", part))
    if part > 1.0:
        raise UserError(f"{settings.where}: partial_rotary_factor {part} is more than a whole head")
    head_dim = settings.whole(
        "head_dim", settings.whole("hidden_size") // settings.whole("num_attention_heads")
    )
    size = int(head_dim * part)
    if size < 2 or size % 2:
        raise UserError(f"{settings.where}: rotary positions need an even number of features, not {size}")
    return {**fields, "rotary_dim": size}


def rotary_by_layer(
    settings: Settings, windows: tuple[int, ...], *, base: float, window_base: float | None
) -> dict[str, Any]:
    """The same where layers with a window may have angles of their own: one object for each kind of layer; or
    one for the layers without a window, and `rope_local_base_freq` for the others. `window_base` is the usual
    one of these, None for that of the other layers."""
    settings.only("partial_rotary_factor", None, 1, 1.0)
    found = rope_values(settings)
    nested = any(kind in found for kind in LAYERS)
    parts = [found.get(kind) or {} for kind in LAYERS] if nested else [found, {}]
    if not all(isinstance(one, Mapping) for one in parts) or (nested and set(found) - set(LAYERS)):
        raise UserError(f"{settings.where}: rope_parameters = {shown(dict(found))} is not supported")
    full, windowed = (Settings(one, settings.where) for one in parts)
    for one in (full, windowed):
        one.only("partial_rotary_factor", None, 1, 1.0)
    fields = base_and_scaling(full, settings, settings.number("rope_theta", base))
    usual = settings.number("rope_theta", base) if window_base is None else window_base
    own = base_and_scaling(windowed, settings, settings.number("rope_local_base_freq", usual))
    if own["rope_scaling"] is not None:
        raise UserError(f"{settings.where}: rotary scaling in layers with a window is not supported")
    return {**fields, "window_rope_base": own["rope_base"] if windows else 0.0}


def _scaling(kind: str, rope: Settings, settings: Settings) -> RotaryScaling | None:
    if kind == "default":
        return None
    factor = rope.number("factor")
    if kind == "linear":
        return RotaryScaling("linear", factor)
    # Where it stands at the top it is meant; else it stands with the scaling, else the context has not grown.
    context = settings.values.get("original_max_position_embeddings")
    original = rope.whole("original_max_position_embeddings", settings.whole("max_position_embeddings"))
    original = original if context is None else settings.whole("original_max_position_embeddings")
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        return RotaryScaling("llama3", factor, original, low, high)
    usual = RotaryScaling.usual_attention_factor
    attention = usual(factor)
    if rope.values.get("attention_factor") is not None:
        attention = rope.number("attention_factor")
    elif rope.values.get("mscale") and rope.values.get("mscale_all_dim"):
        attention = usual(factor, rope.number("mscale")) / usual(factor, rope.number("mscale_all_dim"))
    return RotaryScaling(
        "yarn",
        factor,
        original,
        low_turns=rope.number("beta_slow", 1.0) or 1.0,  # transformers takes 0 for absent
        high_turns=rope.number("beta_fast", 32.0) or 32.0,
        whole_pairs=rope.truth("truncate", True),
        attention_factor=attention,
    )


def scaling_values(scaling: RotaryScaling | None) -> dict[str, Any]:
    """A scaling as an object of `config.json`; undoes `base_and_scaling`."""
    if scaling is None:
        return {"rope_type": "default"}
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return values
    values["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind == "llama3":
        return {**values, "low_freq_factor": scaling.low_turns, "high_freq_factor": scaling.high_turns}
    return {
        **values,
        "beta_slow": scaling.low_turns,
        "beta_fast": scaling.high_turns,
        "truncate": scaling.whole_pairs,
        "attention_factor": scaling.attention_factor,
    }


def rotary_values(config: GPTConfig) -> dict[str, Any]:
    """Base and scaling where transformers 5 and 4 look for them."""
    rope = {"rope_theta": config.rope_base, **scaling_values(config.rope_scaling)}
    return {"rope_theta": config.rope_base, "rope_parameters": rope}


def partial_rotary_values(config: GPTConfig) -> dict[str, Any]:
    """The same with the part of a head that is rotated."""
    values, part = rotary_values(config), config.rotated / config.head_dim
    if int(config.head_dim * part) != config.rotated:  # rounded down by a last bit
        part = (config.rotated + 0.5) / config.head_dim
    values["rope_parameters"]["partial_rotary_factor"] = part
    return {**values, "partial_rotary_factor": part}


def rotary_by_layer_values(config: GPTConfig) -> dict[str, Any]:
    """One object for each kind of layer, and `rope_theta` for transformers 4."""
    full = {"rope_theta": config.rope_base, **scaling_values(config.rope_scaling)}
    base = config.window_rope_base or config.rope_base
    windowed = {"rope_theta": base, "rope_type": "default"}
    return {
        "rope_theta": config.rope_base,
        "rope_parameters": dict(zip(LAYERS, (full, windowed), strict=True)),
    }
