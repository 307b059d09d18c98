"""Adapters written for PEFT elsewhere: those that belong together as one adapter, or side by side.

LoRA adds s B A to a matrix W. Two of them, one trained over the other, add s1 B1 A1 + s2 B2 A2 to the W of
the model at the bottom. That is the product of [s1 B1, s2 B2] and A1 above A2: one adapter whose rank is the
sum, exactly. Side by side, PEFT adds the two products itself, when both are active.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from chatwright import files
from chatwright.config import UserError
from chatwright.interop.adapter_origin import README, SETTINGS, WEIGHTS, Origin, is_adapter, read_origin
from chatwright.interop.peft import (
    BASE_PRINT,
    TENSOR_NAME,
    AdapterSettings,
    base_entries,
    header_notes,
    write_files,
)

Together = Literal["merged", "stacked"]


def chain_of(adapter: Path) -> tuple[Origin, list[Path]]:
    """The model at the bottom, and the adapters over it, the first one first and `adapter` last.

    Raises UserError for an adapter of others, which does not say on what it belongs, and when one that it
    lies on is not there any more.
    """
    origin = read_origin(adapter)
    if origin is None:
        raise UserError(f"{adapter} does not say which model it was trained over: it was not trained here")
    chain = [*map(Path, origin.adapters), adapter]
    for one in chain:
        if not is_adapter(one):
            raise UserError(f"{adapter} was trained over the adapter {one}, which is not there any more")
    return replace(origin, adapters=()), chain


def write_adapters(chain: list[Path], target: Path, together: Together, origin: Origin) -> list[Path]:
    """Write the adapters of a chain for the model `origin`; returns the directories. Raises UserError."""
    if together == "merged" or len(chain) == 1:
        _write_merged(chain, target, origin)
        return [target]
    written: list[Path] = []
    with files.whole_directory(target) as aside:
        for number, place in enumerate(chain, 1):
            one = f"{number}-{place.parent.name if place.name == 'adapter' else place.name}"
            values = {**files.read_json(place / SETTINGS), **base_entries(origin)}
            under = replace(origin, adapters=tuple(str((aside / path.name).resolve()) for path in written))
            notes = header_notes(place / WEIGHTS)
            write_files(aside / one, load_file(place / WEIGHTS), values, notes, under)
            written.append(target / one)
        text = _stacked_card(origin, [place.name for place in written])
        (aside / README).write_text(text, encoding="utf-8")
    return written


def _write_merged(chain: list[Path], target: Path, origin: Origin) -> None:
    """Write the adapters as one. A single one is written as it is."""
    notes = {key: text for key, text in header_notes(chain[0] / WEIGHTS).items() if key == BASE_PRINT}
    if len(chain) == 1:
        values = {**files.read_json(chain[0] / SETTINGS), **base_entries(origin)}
        notes = header_notes(chain[0] / WEIGHTS)
        write_files(target, load_file(chain[0] / WEIGHTS), values, notes, origin)
        return
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for place in chain:
        for path, pair in _scaled(place).items():
            parts.setdefault(path, []).append(pair)
    tensors, ranks = {}, {}
    for path, pairs in parts.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.cat([a for a, _ in pairs])
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.cat([b for _, b in pairs], dim=1)
        ranks[path] = sum(len(a) for a, _ in pairs)
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: one for path, one in ranks.items() if one != rank}
    values = {
        **files.read_json(chain[0] / SETTINGS),
        **base_entries(origin),
        "r": rank,
        "lora_alpha": rank,  # the factor alpha / r is 1: each B has its own already
        "use_rslora": False,
        "lora_dropout": 0.0,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(parts),
    }
    write_files(target, tensors, values, {"format": "pt", **notes}, origin)


def _scaled(adapter: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> (A, B times the adapter's factor), in float32."""
    file = adapter / WEIGHTS
    settings = AdapterSettings(files.read_json(adapter / SETTINGS), str(adapter / SETTINGS))
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(file).items():
        matched = TENSOR_NAME.fullmatch(name)
        if matched is None:
            raise UserError(f"{file}: {name[:120]} is no part of a LoRA")
        found.setdefault(matched[1], {})[matched[2]] = tensor.float()
    if any(len(pair) < 2 for pair in found.values()):
        raise UserError(f"{file}: only one of lora_A and lora_B for a layer")
    return {path: (pair["A"], pair["B"] * settings.config(path).scale) for path, pair in found.items()}


def _stacked_card(origin: Origin, names: list[str]) -> str:
    """README.md of adapters that lie side by side."""
    base = json.dumps(origin.hub or origin.name)
    lines = [
        f"# Adapters over {origin.name}",
        "",
        f"They belong together, all active at once: {', '.join(names)}.",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), {names[0]!r}, "
        f"adapter_name={names[0]!r})",
        *(f"model.load_adapter({name!r}, adapter_name={name!r})" for name in names[1:]),
        f"model.base_model.set_adapter({names!r})",
        "```",
    ]
    if origin.weights:
        lines += ["", f"They were trained over rounded weights: {origin.weights}."]
    return "\n".join(lines) + "\n"
