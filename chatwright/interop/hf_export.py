"""Models out, in the format of transformers: config.json, safetensors, tokenizer.json, chat template.

Names and layouts are the readers' tables (families/), applied backwards. A shape is written only if reading
its config.json gives the same shape again, so that whatever a family cannot say is refused and not lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chatwright.config import UserError
from chatwright.interop.families import FAMILIES, config_from_hf
from chatwright.interop.hf_tokenizer_export import tokenizer_files
from chatwright.interop.leaving import check_shape, ends_of, exported, family_name
from chatwright.interop.loaded import Loaded, Stored, foreign
from chatwright.model.config import GPTConfig
from chatwright.tensor_files import save_tensors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHARD_BYTES = 5_000_000_000
"""A larger model is written in several files with an index, as transformers does."""
_WHOLE_HEADS = ("llama", "arcee", "gemma2", "gemma3_text", "gpt_neox")
"""Families for which transformers refuses a width that is no multiple of the heads, though it need not."""


def config_to_hf(config: GPTConfig) -> dict[str, Any]:
    """The `config.json` of a shape, without its tokens. Raises UserError naming what the nearest family
    cannot say."""
    family = family_name(config)
    entry = FAMILIES[family]
    values = {"model_type": family, "architectures": [entry.architecture], **entry.settings(config)}
    check_shape(config, config_from_hf(values), f"transformers' {family}")
    if family in _WHOLE_HEADS and config.width % config.heads:
        raise UserError(
            f"the model's width {config.width} is not a multiple of its {config.heads} heads, and "
            f"transformers refuses such a {family}"
        )
    return values


@dataclass(frozen=True)
class HFExport:
    """A model directory that is made and checked, all but the weights, and not yet written."""

    family: str
    texts: Mapping[str, str]
    tensors: Mapping[str, Stored]
    dtype: torch.dtype

    @property
    def notes(self) -> list[str]:
        """What there is to say about it: nothing."""
        return []

    def write(self, directory: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
        """Write into an existing directory, one file's tensors in memory at a time. Raises OSError: disk
        full."""
        for name, text in self.texts.items():
            (directory / name).parent.mkdir(exist_ok=True)  # other chat templates have a folder
            (directory / name).write_text(text, encoding="utf-8")
        shards = self._shards(shard_bytes)
        index: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            file = (
                "model.safetensors"
                if len(shards) == 1
                else f"model-{number:05}-of-{len(shards):05}.safetensors"
            )
            tensors = {name: self.tensors[name].read().to(self.dtype) for name in names}
            save_tensors(
                directory / file, tensors, {"format": "pt"}
            )  # without the note, transformers 4 refuses it
            index |= dict.fromkeys(names, file)
        if len(shards) > 1:
            content = {"metadata": {"total_size": sum(map(self._size, index))}, "weight_map": index}
            (directory / "model.safetensors.index.json").write_text(_json(content), encoding="utf-8")

    def _size(self, name: str) -> int:
        return torch.Size(self.tensors[name].shape).numel() * self.dtype.itemsize

    def _shards(self, most: int) -> list[list[str]]:
        """The tensors of each file: as many as fit, at least one."""
        shards: list[list[str]] = [[]]
        filled = 0
        for name in self.tensors:
            if shards[-1] and filled + self._size(name) > most:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += self._size(name)
        return shards


def plan_hf(parts: Loaded, *, dtype: str = "fp32") -> HFExport:
    """What will be written. Raises UserError for whatever the format cannot carry."""
    config = parts.model.config
    values = config_to_hf(config)
    family = str(values["model_type"])
    tensors = foreign(parts.model, FAMILIES[family].rules)
    name = str(DTYPES[dtype]).removeprefix("torch.")
    values |= {"dtype": name, "torch_dtype": name}  # transformers 5 and 4
    texts: dict[str, str] = {}
    if parts.tokenizer is not None:
        tokenizer = parts.tokenizer
        ends = ends_of(parts, tokenizer)
        around = tokenizer_files(tokenizer, ends)
        values |= around.ids
        generation = {**around.ids, "eos_token_id": around.stops, "pad_token_id": tokenizer.end_of_text_id}
        if parts.generation is not None:
            generation |= parts.generation.to_values()
        settings = {**around.settings, "model_max_length": config.context}
        texts |= {
            "tokenizer.json": around.content,
            "tokenizer_config.json": _json(settings),
            "generation_config.json": _json(generation),
        }
    if parts.template is not None:
        texts |= exported(parts.template).files()
    texts["config.json"] = _json(values)
    return HFExport(f"transformers' {family}", texts, tensors, DTYPES[dtype])


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


@torch.no_grad()
def round_hf(parts: Loaded, dtype: str) -> None:
    """Give a model, in place, the values that its weights have after being stored as `dtype`."""
    config = parts.model.config
    plus = {
        name: rule.plus
        for rule in FAMILIES[family_name(config)].rules
        for layer in range(config.layers if rule.plus else 0)
        for name in rule.names(layer)[1]
    }
    for name, parameter in parts.model.named_parameters():
        more = plus.get(name, 0.0)
        parameter.copy_(
            (parameter - more).to(DTYPES[dtype]).float() + more if more else parameter.to(DTYPES[dtype])
        )
