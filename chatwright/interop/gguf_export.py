"""Models out, in GGUF: one file that llama.cpp, and what is built on it (Ollama, LM Studio), runs.

Names and layouts are the reader's tables (gguf.py), applied backwards; a shape or a tokenizer is written only
if reading it gives the same again. llama.cpp knows the ways of cutting text by name, so that only those can
be written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

from chatwright.config import UserError
from chatwright.interop.gguf_metadata import Metadata
from chatwright.interop.gguf_shapes import ARCHITECTURES, GELUS, OWN_ACTIVATION, config_of, stored
from chatwright.interop.gguf_tokenizer_export import roles, vocabulary
from chatwright.interop.leaving import check_shape, ends_of, exported
from chatwright.interop.loaded import Loaded, Stored, foreign
from chatwright.model.config import GPTConfig
from chatwright.model.rotary_scaling import RotaryScaling

DTYPES = {"f32": Kind.F32, "bf16": Kind.BF16, "q8_0": Kind.Q8_0}
_FILE_TYPES = {
    Kind.F32: gguf.LlamaFileType.ALL_F32,
    Kind.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    Kind.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}

_POSITIONS = "position_embd.weight"


_POST_NORM = (
    "the model is post-norm (GPT-1), which no architecture of llama.cpp computes; --format hf carries it"
)


def _architecture(config: GPTConfig) -> str:
    """The nearest architecture of llama.cpp; whether it carries all of the shape is `metadata_of`'s."""
    if config.position != "rotary":
        if not config.pre_norm:
            raise UserError(_POST_NORM)
        return "gpt2"
    own_scores = config.attention_scale not in (0.0, config.head_dim**-0.5)
    scaled = own_scores or (config.embed_scale, config.residual_scale, config.logit_scale) != (1.0, 1.0, 1.0)
    for name, fits in (
        ("gptneox", config.norm == "layer"),
        ("gemma3", config.branch_norm == "both" and config.qk_norm),
        ("gemma2", config.branch_norm == "both" or config.activation == "geglu"),
        ("olmo2", config.branch_norm == "after"),
        ("arcee", config.activation == "relu2"),
        ("granite", scaled),
        ("smollm3", bool(config.rotary_layers)),
        ("phi3", bool(config.rotary_dim) or config.family == "phi3"),  # a Llama, its matrices fused
        ("qwen2", config.qkv_bias is True),
        ("qwen3", config.qk_norm),
    ):
        if fits:
            return name
    return "llama"


def _has_windows(architecture: str) -> bool:
    """Whether llama.cpp computes sliding windows there. In phi3 it reads the key and leaves them out."""
    return architecture != "phi3" and "attention.sliding_window" in ARCHITECTURES[architecture].keys


def _without_idle_windows(config: GPTConfig) -> GPTConfig:
    """The shape without windows that are never full: those of at least the context."""
    idle = all(window == 0 or window >= config.context for window in config.windows)
    return replace(config, windows=()) if idle and not config.window_rope_base else config


def _refuse_lacks(config: GPTConfig, architecture: str) -> None:
    """Raise UserError for what llama.cpp lacks though metadata could say it."""
    form = ARCHITECTURES[architecture]
    if config.windows and not _has_windows(architecture):
        raise UserError(
            f"the model has sliding windows of {max(config.windows)} tokens, and llama.cpp's {architecture}, "
            "the nearest family, lets every token see all earlier ones; --format hf carries them"
        )
    if form.whole_width and config.heads * config.head_dim != config.width:
        raise UserError(
            f"the model's {config.heads} heads of {config.head_dim} features are not its width of "
            f"{config.width}, which llama.cpp's {architecture} expects; --format hf carries it"
        )
    if form.head == ("own" if config.tied else "shared"):
        raise UserError(
            f"the model has tied {config.tied}, and llama.cpp's {architecture} reads only files "
            f"{'with' if config.tied else 'without'} an output matrix of its own; --format hf carries it"
        )


def metadata_of(config: GPTConfig) -> dict[str, Any]:
    """The keys of the architecture, without its name in front. Raises UserError naming what it cannot say."""
    architecture = _architecture(config)
    config = config if _has_windows(architecture) else _without_idle_windows(config)
    _refuse_lacks(config, architecture)
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.context,
        "embedding_length": config.width,
        "block_count": config.layers,
        "feed_forward_length": config.mlp_width,
        "attention.head_count": config.heads,
    }
    kind = "layer_norm_epsilon" if architecture in ("gpt2", "gptneox") else "layer_norm_rms_epsilon"
    values[f"attention.{kind}"] = stored(config.norm_eps)
    if architecture != "gpt2":
        values |= {
            "attention.head_count_kv": config.kv_heads,
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "rope.dimension_count": config.rotated,
            "rope.freq_base": stored(config.rope_base),
            **_rotary(config.rope_scaling),
        }
    values |= ARCHITECTURES[architecture].say(config)
    planned = {f"{architecture}.{key}": value for key, value in values.items()}
    planned["general.architecture"] = architecture
    if architecture == "gptneox" and config.activation in GELUS:
        planned[OWN_ACTIVATION] = config.activation
    table = Stored((config.vocab_size, config.width), lambda: torch.empty(0))
    names = ("token_embd.weight",) if config.tied else ("token_embd.weight", "output.weight")
    tensors = dict.fromkeys((*names, *map(str, range(config.layers))), table)  # not fewer than blocks
    carried = config_of(Metadata(planned, "GGUF"), tensors)
    check_shape(_as_carried(config, carried), carried, f"llama.cpp's {architecture}")
    del planned["general.architecture"]  # the writer adds it
    return planned


def _as_carried(config: GPTConfig, carried: GPTConfig) -> GPTConfig:
    """The shape with what `carried` means as well, said in its way.

    Dropout acts in training only, and a GGUF file is not for training. Scales are compared as the file holds
    them, in 32 bits.
    """
    changes: dict[str, Any] = {"dropout": carried.dropout}
    usual = config.head_dim**-0.5
    for name in ("embed_scale", "residual_scale", "logit_scale", "attention_scale"):
        mine, theirs = getattr(config, name), getattr(carried, name)
        if name == "attention_scale":
            mine, theirs = mine or usual, theirs or usual
        if stored(mine) == stored(theirs):
            changes[name] = getattr(carried, name)
    if config.window_rope_base == config.rope_base and config.rope_scaling is None:
        changes["window_rope_base"] = 0.0  # the same angles in all layers
    return replace(config, **changes)


def _rotary(scaling: RotaryScaling | None) -> dict[str, Any]:
    """Rotary scaling, as far as metadata can say it: llama3's is a tensor of divisors in these files, and is
    refused."""
    if scaling is None or scaling.kind == "llama3":
        return {}
    values: dict[str, Any] = {
        "rope.scaling.type": scaling.kind,
        "rope.scaling.factor": stored(scaling.factor),
    }
    if scaling.kind == "yarn":
        values["rope.scaling.original_context_length"] = scaling.original_context
        values["rope.scaling.yarn_beta_slow"] = stored(scaling.low_turns)
        values["rope.scaling.yarn_beta_fast"] = stored(scaling.high_turns)
    return values


def kind_of(name: str, shape: tuple[int, ...], wanted: Kind) -> Kind:
    """How a tensor is stored, by its name in the file: vectors and learned positions always in float32, as
    llama.cpp has them, and rows that cannot be cut into blocks as well."""
    if len(shape) < 2 or name == _POSITIONS:
        return Kind.F32
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return Kind.F32 if shape[-1] % block else wanted


# ---- the file ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GGUFExport:
    """A file that is made and checked, all but the weights, and not yet written."""

    architecture: str
    values: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    kind: Kind
    told: tuple[str, ...] = ()
    """What there is to say about the tokenizer."""

    @property
    def family(self) -> str:
        """Who computes it."""
        return f"llama.cpp's {self.architecture}"

    @property
    def notes(self) -> list[str]:
        """What there is to say: what llama.cpp's tokenizer does otherwise, which matrices stay in float32
        because their rows cannot be cut into blocks."""
        block, _ = gguf.GGML_QUANT_SIZES[self.kind]
        left = [name for name, one in self.tensors.items() if len(one.shape) > 1 and one.shape[-1] % block]
        left = [name for name in left if name != _POSITIONS]
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        kind, names = self.kind.name.lower(), ", ".join(left[:3])
        wide = f"In float32, as {kind} wants rows of a multiple of {block}: {names}{more}."
        return [*self.told, *([wide] if left else [])]

    def write(self, path: Path) -> None:
        """Write the file, one tensor in memory at a time. Raises OSError when the disk is full."""
        writer = gguf.GGUFWriter(path, self.architecture)
        try:
            for key, value in self.values.items():
                _add(writer, key, value)
            for name, tensor in self.tensors.items():
                kind = kind_of(name, tensor.shape, self.kind)
                block, size = gguf.GGML_QUANT_SIZES[kind]
                count = torch.Size(tensor.shape).numel() // block * size
                writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), count, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, tensor in self.tensors.items():
                numbers = tensor.read().float().cpu().contiguous().numpy()
                writer.write_tensor_data(quantize(numbers, kind_of(name, tensor.shape, self.kind)))
        finally:
            writer.close()


def plan_gguf(parts: Loaded, *, dtype: str = "f32") -> GGUFExport:
    """What will be written. Raises UserError for whatever llama.cpp would not compute or read as we do."""
    config, kind = parts.model.config, DTYPES[dtype]
    values = metadata_of(config)
    architecture = _architecture(config)
    tensors = foreign(parts.model, ARCHITECTURES[architecture].rules)
    values |= {
        "general.file_type": int(_FILE_TYPES[kind]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    told: tuple[str, ...] = ()
    if parts.tokenizer is not None:
        words = vocabulary(parts.tokenizer, config.vocab_size)
        around = roles(parts, parts.tokenizer, ends_of(parts, parts.tokenizer))
        values |= {**words.values, **around.values}
        told = (*words.notes, *around.notes)
    if parts.template is not None:
        template = exported(parts.template)
        values["tokenizer.chat_template"] = template.source
        values |= {f"tokenizer.chat_template.{name}": text for name, text in template.named.items()}
        if template.named:
            values["tokenizer.chat_templates"] = sorted(template.named)
    return GGUFExport(architecture, values, tensors, kind, told)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


@torch.no_grad()
def round_gguf(parts: Loaded, dtype: str) -> None:
    """Give a model, in place, the values that its weights have after being stored as `dtype`.

    Rows are cut into blocks one by one, and our tensors have the rows of the file's, in another order at
    most.
    """
    config = parts.model.config
    places = {
        own: rule.theirs
        for rule in ARCHITECTURES[_architecture(config)].rules
        for own in ((rule.own,) if isinstance(rule.own, str) else rule.own)
    }
    for name, parameter in parts.model.named_parameters():
        pattern = ".".join("{}" if part.isdigit() else part for part in name.split("."))
        kind = kind_of(places[pattern], tuple(parameter.shape), DTYPES[dtype])
        if kind == Kind.BF16:
            parameter.copy_(parameter.bfloat16())
        elif kind != Kind.F32:
            numbers = dequantize(quantize(parameter.detach().float().cpu().numpy(), kind), kind)
            parameter.copy_(torch.from_numpy(numbers))
