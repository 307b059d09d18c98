"""Models out, in GGUF: one file that llama.cpp, and what is built on it (Ollama, LM Studio), runs.

Names and layouts are the reader's tables (gguf.py), applied backwards; a shape or a tokenizer is written only
if reading it gives the same again. llama.cpp knows the ways of cutting text by name, so that only those can
be written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

from chatwright.config import UserError
from chatwright.interop import gguf as reading
from chatwright.interop.gguf_metadata import Metadata
from chatwright.interop.gguf_shapes import ARCHITECTURES, GELUS, OWN_ACTIVATION, config_of, stored
from chatwright.interop.leaving import check_shape, ends_of, portable
from chatwright.interop.loaded import Loaded, Stored, foreign
from chatwright.model.config import GPTConfig
from chatwright.model.rotary_scaling import RotaryScaling
from chatwright.tokenizer import PATTERN, Tokenizer

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
    if config.attention_scale:  # 0 stands for a number that people want to see
        carried = replace(carried, attention_scale=carried.attention_scale or config.head_dim**-0.5)
    check_shape(_as_carried(config, carried), carried, f"llama.cpp's {architecture}")
    del planned["general.architecture"]  # the writer adds it
    return planned


def _as_carried(config: GPTConfig, carried: GPTConfig) -> GPTConfig:
    """The shape with what `carried` means as well, said in its way.

    Dropout acts in training only, and a GGUF file is not for training. Scales are compared as the file holds
    them, in 32 bits.
    """
    changes: dict[str, Any] = {"dropout": carried.dropout}
    for name in ("embed_scale", "residual_scale", "logit_scale", "attention_scale"):
        if stored(getattr(config, name)) == stored(getattr(carried, name)):
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


# ---- tokenizer ---------------------------------------------------------------------------------------------


def _pre_tokenizer(backend: tokenizers.Tokenizer) -> Any:
    """How a tokenizer cuts text, as JSON, without what changes no ids.

    Contractions are spelled out: llama.cpp reads the published (?i:'s|'t|...) so too (see PATTERN for the
    difference).
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items() if key != "trim_offsets"}
        if isinstance(value, str):
            return value.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", PATTERN.partition("|[^")[0])
        return [plain(one) for one in value] if isinstance(value, list) else value

    return plain(json.loads(backend.to_str())["pre_tokenizer"])


def pre_name(tokenizer: Tokenizer) -> str:
    """llama.cpp's name for how a tokenizer cuts text before merging. Raises UserError when it has none."""
    wanted = _pre_tokenizer(tokenizer.backend)
    for name, pre_tokenizer in reading.PRE_TOKENIZERS.items():
        known = tokenizers.Tokenizer(tokenizers.models.BPE())
        known.pre_tokenizer = pre_tokenizer
        if _pre_tokenizer(known) == wanted:
            return name
    raise UserError(
        "the tokenizer cuts text in a way that llama.cpp has no name for, and it would see other tokens "
        f"there (known: {', '.join(reading.PRE_TOKENIZERS)}; tokenizers that chatwright trains now are qwen2)"
    )


def _check_tokenizer(content: Mapping[str, Any], pre: str) -> None:
    """Raise UserError for what llama.cpp's byte-level BPE does not do."""
    model = content["model"]
    if model.get("type") != "BPE":
        raise UserError(
            f"the tokenizer is of type {model.get('type')}, and only byte-level BPE can be written"
        )
    if content.get("normalizer"):
        kind = content["normalizer"].get("type")
        raise UserError(f"the tokenizer normalises text first ({kind}), which llama.cpp does not")
    for name in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise UserError(f"the tokenizer has {name} = {model[name]!r}, which llama.cpp's BPE does not")
    whole_words = pre == "llama-bpe"
    if bool(model.get("ignore_merges")) != whole_words:
        raise UserError(
            f"the tokenizer has ignore_merges = {not whole_words}, and llama.cpp's {pre} means {whole_words}"
        )
    for token in content.get("added_tokens", []):
        strange = [
            name for name in ("single_word", "lstrip", "rstrip") if token.get(name) and not token["special"]
        ]
        if strange:
            raise UserError(
                f"the tokenizer's {token['content']!r} has {strange[0]}, which llama.cpp does not"
            )


def vocabulary(tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    """The tokenizer's keys, with names for all `size` rows of the model's table. Raises UserError for what
    llama.cpp would do otherwise."""
    content, pre = json.loads(tokenizer.to_json()), pre_name(tokenizer)
    _check_tokenizer(content, pre)
    kinds = {
        token["id"]: reading.CONTROL if token["special"] else reading.USER_DEFINED
        for token in content.get("added_tokens", [])
    }
    spelling = {
        number: token for token, number in tokenizer.backend.get_vocab(with_added_tokens=True).items()
    }
    tokens = [spelling.get(number, f"[PAD{number}]") for number in range(size)]
    if len(set(tokens)) != size:
        raise UserError("the tokenizer has tokens called [PAD...], as llama.cpp calls the unused ones")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in content["model"]["merges"]]
    if not pairs:
        raise UserError("the tokenizer has not a single merge, and llama.cpp reads none without")
    if any(" " in part for pair in pairs for part in pair):
        raise UserError("the tokenizer merges pieces with spaces in them: it is not byte-level BPE")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            kinds.get(number, reading.NORMAL) if number in spelling else reading.UNUSED
            for number in range(size)
        ],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in pairs],
        "tokenizer.ggml.add_bos_token": False,
    }


# ---- the file ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GGUFExport:
    """A file that is made and checked, all but the weights, and not yet written."""

    architecture: str
    values: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    kind: Kind

    @property
    def family(self) -> str:
        """Who computes it."""
        return f"llama.cpp's {self.architecture}"

    @property
    def notes(self) -> list[str]:
        """What there is to say: which matrices stay in float32 because their rows cannot be cut into
        blocks."""
        block, _ = gguf.GGML_QUANT_SIZES[self.kind]
        left = [name for name, one in self.tensors.items() if len(one.shape) > 1 and one.shape[-1] % block]
        left = [name for name in left if name != _POSITIONS]
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        kind, names = self.kind.name.lower(), ", ".join(left[:3])
        return [f"In float32, as {kind} wants rows of a multiple of {block}: {names}{more}."] if left else []

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
    if parts.tokenizer is not None:
        tokenizer, ends = parts.tokenizer, ends_of(parts, parts.tokenizer)
        values |= vocabulary(tokenizer, config.vocab_size)
        values["tokenizer.ggml.bos_token_id"] = tokenizer.end_of_text_id
        values["tokenizer.ggml.eos_token_id"] = tokenizer.control_ids[ends.sequence]
        if ends.turn:
            values["tokenizer.ggml.eot_token_id"] = tokenizer.control_ids[ends.turn]
    if parts.template is not None:
        values["tokenizer.chat_template"] = portable(parts.template)
    return GGUFExport(architecture, values, tensors, kind)


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
