"""The metadata of a GGUF file, read with care: any value may be anything."""

from __future__ import annotations

from typing import Any

import numpy as np

from chatwright.config import UserError
from chatwright.interop.loaded import Stored

_READ = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
"""Metadata that is read for every architecture, as far as it has a meaning there."""
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "rope.scaling.yarn_attn_factor": (1.0,),  # versions of llama.cpp disagree on what others mean
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.finetuned": (True, False),  # says only how the model came about
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "use_parallel_residual": (False,),
}


class Metadata:
    """Keys and values of the file; names without a prefix belong to its architecture."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where
        self.architecture = str(values.get("general.architecture"))
        self.divisors: Stored | None = None
        """Of the rotary rates, where the file has any."""
        if values.get("split.count", 1) not in (0, 1):
            raise UserError(f"{where}: one of several pieces; merge them with llama-gguf-split --merge first")

    def refuse_unknown(self, known: frozenset[str]) -> None:
        """Raise UserError for a key of the architecture that is not read for all, nor among `known`."""
        for key, value in self.values.items():
            name = key.removeprefix(f"{self.architecture}.")
            if name != key and name not in _READ | known and value not in _HARMLESS.get(name, ()):
                raise UserError(f"{self.where}: {key} = {value!r:.80} is not supported")

    def get(self, name: str, default: Any = None) -> Any:
        """A value of the architecture as it stands in the file."""
        return self.values.get(f"{self.architecture}.{name}", default)

    def whole(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number of the architecture, positive unless `least` is 0."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(
                f"{self.where}: {self.architecture}.{name} must be a whole number, not {value!r:.80}"
            )
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number of the architecture. It is stored as float32: the shortest decimal is what its maker
        wrote."""
        value = self.get(name, default)
        if not isinstance(value, float):
            raise UserError(f"{self.where}: {self.architecture}.{name} must be a number, not {value!r:.80}")
        return float(str(np.float32(value)))

    def positive(self, name: str, default: float | None = None) -> float:
        """The same, above zero."""
        value = self.number(name, default)
        if not value > 0.0:
            raise UserError(f"{self.where}: {self.architecture}.{name} must be positive, not {value}")
        return value

    def truth(self, name: str) -> bool:
        """A yes or no of the architecture."""
        value = self.get(name)
        if not isinstance(value, bool):
            raise UserError(
                f"{self.where}: {self.architecture}.{name} must be true or false, not {value!r:.80}"
            )
        return value

    def items(self, name: str, kind: type[Any]) -> list[Any]:
        """A list of metadata whose items are all of this kind; empty when absent."""
        found = self.values.get(name, [])
        if not isinstance(found, list) or any(type(item) is not kind for item in found):
            raise UserError(f"{self.where}: {name} is damaged: not a list of items of type {kind.__name__}")
        return found
