"""Adapters in the format of PEFT (`adapter_config.json`, `adapter_model.safetensors`), in and out. PEFT is
not needed.

PEFT names matrices by the layers of transformers, so that the families' tables (families/) say what belongs
where. GPT-1 and GPT-2 there have query, key and value in one layer, c_attn. An adapter of it has one A for
the three: read, each of ours gets a copy of that A and its rows of B, which computes the same. Written, ours
with an A each become one of the summed rank, with the As one above the other and the Bs as blocks on a
diagonal, again the same; a note in the file's header says so, and they are taken apart when they are read.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from chatwright import checkpoint, files, tensor_files
from chatwright.config import UserError
from chatwright.interop.adapter_origin import (
    NOTE,
    README,
    SETTINGS,
    WEIGHTS,
    Origin,
    is_adapter,
    model_card,
    note_of,
    read_origin,
)
from chatwright.interop.families import FAMILIES, shown
from chatwright.interop.hf import open_weights
from chatwright.interop.leaving import family_name
from chatwright.interop.loaded import Rule, Stored, located
from chatwright.model import lora
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.model.lora import DEFAULT, Adapter, LoRAConfig

TENSOR_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
BASE_PRINT, _PARTS = "chatwright.base", "chatwright.parts"  # keys of the header's notes

MOSTTENSOR_NAMES = 4096
"""Most names of layers in a setting: PEFT writes as many as a model has linear layers, if it writes them all.
"""

_HARMLESS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
"""Settings that are read here, or that change nothing once there are tensors: these say which layers have an
adapter."""
_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (
        True,
        False,
        "gaussian",
        "orthogonal",
        "eva",
    ),  # the others change the base model as well
}


def layers_of(config: GPTConfig) -> dict[str, tuple[str, ...]]:
    """PEFT's path of each linear layer of the blocks -> ours, several where theirs is fused."""
    return {path: own for path, (_, own) in _layers(config).items()}


def _layers(config: GPTConfig) -> dict[str, tuple[Rule, tuple[str, ...]]]:
    """The same with the rule that says how the rows of ours lie in theirs."""
    ends = tuple(f".{path}.weight" for path in lora.LAYERS.values())
    rules = FAMILIES[family_name(config)].rules
    table: dict[str, tuple[Rule, tuple[str, ...]]] = {}
    for layer in range(config.layers):
        for rule in rules:
            theirs, own = rule.names(layer)
            if all(name.endswith(ends) for name in own):
                paths = tuple(name.removesuffix(".weight") for name in own)
                table[theirs.removesuffix(".weight")] = rule, paths
    return table


# ---- in ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    """One layer's A (rank, inputs) and B (outputs, rank), still in the file, and the settings of just this
    layer."""

    a: Stored
    b: Stored
    config: LoRAConfig


def load_peft(directory: str | Path, model: GPT, name: str = DEFAULT) -> None:
    """Put the adapter of a directory on a model, under this name, and use it; the model is frozen under it.

    Raises UserError, and the model is as it was: a file is missing or damaged, the adapter does not fit the
    model, was trained on another one (where it says on which), or asks for something that is not LoRA as we
    have it.
    """
    directory = Path(directory)
    if not is_adapter(directory):
        raise UserError(f"{directory} holds no adapter: there is no {SETTINGS} in it")
    values = files.read_json(directory / SETTINGS)
    where = str(directory / SETTINGS)
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected an object")
    settings = AdapterSettings(values, where)
    file = directory / WEIGHTS
    if not file.exists():
        pickle = (directory / "adapter_model.bin").exists()
        reason = "its weights are a pickle, which could run any program when opened; save them as safetensors"
        raise UserError(f"{directory}: {reason if pickle else f'no {WEIGHTS} in it'}")
    with ExitStack() as stack:
        tensors = open_weights(file, stack)
        pairs = _pairs(tensors, settings, model.config, str(file))
        shapes = {path: layer.weight.shape for path, layer in lora.linear_layers(model).items()}
        table = _layers(model.config)
        notes = header_notes(file)
        for path, pair in pairs.items():
            _check_shapes(path, pair, [shapes[own] for own in table[path][1]], str(file))
        settings.check_targets(set(pairs), set(table))
        _check_base(model, notes, directory)
        split = _note_of_parts(notes, pairs, layers_of(model.config), str(file))
        adapters: dict[str, Adapter] = {}
        for path, pair in pairs.items():
            adapters |= _adapters(model, *table[path], pair, split.get(path), str(file))
    lora.attach(model, adapters, name)


class AdapterSettings:
    """`adapter_config.json`, read with care."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where
        for key, allowed in _ONLY.items():
            value = values.get(key, allowed[0])
            if not any(type(value) is type(one) and value == one for one in allowed):
                raise UserError(
                    f"{where}: {key} = {shown(value)} is not supported, only "
                    f"{' or '.join(map(shown, allowed))}"
                )
        for key, value in values.items():
            if key not in _HARMLESS and key not in _ONLY and value:
                raise UserError(f"{where}: {key[:80]!r} = {shown(value)} is not supported")
        self.stabilised = values.get("use_rslora") or False
        if not isinstance(self.stabilised, bool):
            raise UserError(f"{where}: use_rslora must be true or false, not {shown(self.stabilised)}")
        self.dropout = self._number("lora_dropout", values.get("lora_dropout") or 0.0, 0.0, 1.0)
        self.ranks, self.alphas = (self._patterns(key) for key in ("rank_pattern", "alpha_pattern"))

    def config(self, path: str) -> LoRAConfig:
        """The settings of one layer."""
        rank = _matching(self.ranks, path, self.values.get("r", 8))
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= 1 << 20:
            raise UserError(f"{self.where}: r must be a positive whole number, not {shown(rank)}")
        alpha = self._number(
            "lora_alpha", _matching(self.alphas, path, self.values.get("lora_alpha", 8)), 0.0, 1e9
        )
        with located(self.where):
            return LoRAConfig(rank, alpha, self.dropout, rank_stabilised=self.stabilised)

    def _number(self, key: str, value: Any, least: float, below: float) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < below:
            raise UserError(
                f"{self.where}: {key} must be a number from {least:g} to {below:g}, not {shown(value)}"
            )
        return float(value)

    def _patterns(self, key: str) -> Mapping[str, Any]:
        """Names of layers, or their ends. Whole expressions are for PEFT to run, not for files of
        strangers."""
        found = self.values.get(key) or {}
        if not isinstance(found, dict):
            raise UserError(f"{self.where}: {key} must be an object, not {shown(found)}")
        self._check_count(key, found)
        for name in found:
            if not re.fullmatch(r"\^?[\w.]{1,240}", name, re.ASCII):
                raise UserError(
                    f"{self.where}: {key} has {name[:80]!r}, and only names of layers are supported"
                )
        return found

    def _check_count(self, key: str, names: Sequence[Any] | Mapping[str, Any]) -> None:
        """Each name is compared with each layer."""
        if len(names) > MOSTTENSOR_NAMES:
            raise UserError(f"{self.where}: {key} has more than {MOSTTENSOR_NAMES} names")

    def check_targets(self, found: set[str], known: set[str]) -> None:
        """Whether every layer that is said to have an adapter has one, and no other. What patterns say is not
        looked into: there the tensors decide."""
        targets = self.values.get("target_modules")
        if not isinstance(targets, list) or any(
            self.values.get(key) for key in ("exclude_modules", "layers_to_transform")
        ):
            return
        self._check_count("target_modules", targets)
        if not all(isinstance(one, str) for one in targets):
            raise UserError(f"{self.where}: target_modules must be names, not {shown(targets)}")
        said = {path for path in known if any(_is_end(one, path) for one in targets)}
        for problem, paths in (
            ("no tensors for", said - found),
            ("tensors for layers that are no target:", found - said),
        ):
            if paths:
                raise UserError(f"{self.where}: {problem} {_listed(paths)}")


def _is_end(name: str, path: str) -> bool:
    """Whether a name is a path or the end of it; behind ^ it must be all of it."""
    return path == name.removeprefix("^") or path.endswith(f".{name}")


def _matching(patterns: Mapping[str, Any], path: str, otherwise: Any) -> Any:
    return next((value for name, value in patterns.items() if _is_end(name, path)), otherwise)


def _listed(names: set[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name[:120] for name in sorted(names)[:most]) + more


def _pairs(
    tensors: Mapping[str, Stored], settings: AdapterSettings, shape: GPTConfig, where: str
) -> dict[str, _Pair]:
    """The pair of each layer by its full path. Raises UserError for whatever is no pair of a layer of this
    model."""
    found: dict[str, dict[str, Stored]] = {}
    strange = set()
    for name, tensor in tensors.items():
        matched = TENSOR_NAME.fullmatch(name)
        if matched:
            found.setdefault(matched[1], {})[matched[2]] = tensor
        else:
            strange.add(name)
    if strange or not found:
        raise UserError(f"{where}: tensors that are no part of a LoRA: {_listed(strange) or 'it is empty'}")
    base = FAMILIES[family_name(shape)].base
    bare = not any(path.startswith(base) for path in found)  # trained on the model without its output matrix
    full = {base + path if bare else path: path for path in found}
    unknown = set(full) - set(layers_of(shape))
    if unknown:
        raise UserError(
            f"{where}: adapters for layers that this model does not have or carry: {_listed(unknown)}"
        )
    alone = {path for path, pair in found.items() if len(pair) < 2}
    if alone:
        raise UserError(f"{where}: only one of lora_A and lora_B for {_listed(alone)}")
    return {
        path: _Pair(found[name]["A"], found[name]["B"], settings.config(name)) for path, name in full.items()
    }


def _check_shapes(path: str, pair: _Pair, layers: Sequence[Sequence[int]], where: str) -> None:
    want_a, want_b = (pair.config.rank, layers[0][1]), (sum(shape[0] for shape in layers), pair.config.rank)
    for letter, stored, want in (("A", pair.a, want_a), ("B", pair.b, want_b)):
        if stored.shape != want:
            times = " x ".join(map(str, stored.shape)) or "a single number"
            raise UserError(
                f"{where}: lora_{letter} of {path} is {times}, not {want[0]} x {want[1]}: it is for another "
                "model"
            )


def header_notes(file: Path) -> dict[str, str]:
    with safetensors.safe_open(str(file), framework="pt") as opened:
        return dict(opened.metadata() or {})


def _check_base(model: GPT, notes: Mapping[str, str], directory: Path) -> None:
    if BASE_PRINT in notes:
        with lora.without_adapter(model):
            own = checkpoint.fingerprint(lora.merged_tensors(model))
        if notes[BASE_PRINT] != own:
            raise UserError(
                f"{directory}: the adapter was trained on another model of this shape (fingerprint "
                f"{notes[BASE_PRINT][:12]!r}, this model's is {own[:12]!r}); {_where_it_belongs(directory)}"
            )


def _where_it_belongs(directory: Path) -> str:
    """What to do with an adapter that is refused on other weights."""
    origin = read_origin(directory)
    if origin is None:
        return "use it with the weights it was trained on"
    right = "+".join((origin.name, *origin.adapters, str(directory)))
    full = (
        f". {origin.weights[:1].upper()}{origin.weights[1:]}, those of hf:{origin.hub} are others: an "
        "adapter for these must be trained over them"
        if origin.weights and origin.hub
        else ""
    )
    return f"it belongs on {'+'.join((origin.name, *origin.adapters))}: give {right}{full}"


def _note_of_parts(
    notes: Mapping[str, str], pairs: Mapping[str, _Pair], table: Mapping[str, tuple[str, ...]], where: str
) -> dict[str, dict[str, int]]:
    """Fused layer -> the rank of each of our layers' blocks, for those that were written as blocks on a
    diagonal."""
    if _PARTS not in notes:
        return {}
    try:
        parts = json.loads(notes[_PARTS])
    except (ValueError, RecursionError):
        parts = None
    if not isinstance(parts, dict):
        raise UserError(f"{where}: the note {_PARTS} in its header is damaged")
    for path, ranks in parts.items():
        fits = path in pairs and isinstance(ranks, dict) and set(ranks) <= set(table[path])
        if (
            not fits
            or not all(type(one) is int and one > 0 for one in ranks.values())
            or sum(ranks.values()) != pairs[path].config.rank
        ):
            raise UserError(f"{where}: the note {_PARTS} in its header is damaged")
    return parts


def _adapters(
    model: GPT, rule: Rule, own: Sequence[str], pair: _Pair, ranks: Mapping[str, int] | None, where: str
) -> dict[str, Adapter]:
    """Our layers' adapters out of one of theirs: with a copy of A each, or a block each."""
    layers = {path: model.get_submodule(path) for path in own}
    sizes = [int(layer.out_features) for layer in layers.values()]  # type: ignore[arg-type]
    rows = dict(zip(own, rule.split(pair.b.read(), sizes, model.config), strict=True))
    whole, config, made, start = pair.a.read(), pair.config, {}, 0
    for path in own:
        a, b, own_config = whole, rows[path], config
        if ranks is not None:
            if path not in ranks:
                if rows[path].any():
                    raise UserError(f"{where}: the note {_PARTS} in its header is damaged")
                continue
            end = start + ranks[path]
            a, b = whole[start:end], rows[path][:, start:end]
            if rows[path][:, :start].any() or rows[path][:, end:].any():
                raise UserError(f"{where}: the note {_PARTS} in its header is damaged")
            own_config, start = _same_scale(config, ranks[path]), end
        layer = layers[path]
        assert isinstance(layer, torch.nn.Linear)
        made[path] = _adapter(layer, own_config, a, b)
    return made


def _same_scale(config: LoRAConfig, rank: int) -> LoRAConfig:
    """These settings for another rank, with the same factor s."""
    times = (rank / config.rank) ** (0.5 if config.rank_stabilised else 1.0)
    return replace(config, rank=rank, alpha=config.alpha * times)


@torch.no_grad()
def _adapter(layer: torch.nn.Linear, config: LoRAConfig, a: Tensor, b: Tensor) -> Adapter:
    with torch.random.fork_rng(
        devices=[]
    ):  # its first values are not kept, and training's stream is not to notice
        adapter = Adapter(layer, config)
    adapter.a.copy_(a)
    adapter.b.copy_(b)
    return adapter


# ---- out ---------------------------------------------------------------------------------------------------


def write_peft(
    model: GPT,
    directory: str | Path,
    *,
    base: str = "",
    origin: Origin | None = None,
    name: str = DEFAULT,
) -> None:
    """Write one adapter of a model as a directory that PEFT, vLLM and `load_peft` read.

    `origin` says what it was trained over. Without it, `base` names the model that PEFT is to load.

    Raises UserError when there is no such adapter, or the disk is full; what was there before is then intact.
    """
    adapters = lora.adapters_of(model, name)
    first = next(iter(adapters.values())).config
    table = _layers(model.config)
    stabilised = all(one.config.rank_stabilised for one in adapters.values())
    tensors: dict[str, Tensor] = {}
    configs: dict[str, LoRAConfig] = {}
    parts: dict[str, dict[str, int]] = {}
    for path, (rule, own) in table.items():
        chosen = {one: adapters[one] for one in own if one in adapters}
        if not chosen:
            continue
        sizes = [model.get_submodule(one).out_features for one in own]
        a, b, config, blocks = _fused(chosen, dict(zip(own, sizes, strict=True)))  # type: ignore[arg-type]
        tensors[f"base_model.model.{path}.lora_A.weight"] = a
        tensors[f"base_model.model.{path}.lora_B.weight"] = rule.join(torch.split(b, sizes), model.config)  # type: ignore[arg-type]
        alpha = config.alpha if config.rank_stabilised == stabilised else config.scale * config.rank
        configs[path] = replace(config, alpha=alpha)
        if blocks:
            parts[path] = blocks
    (rank, alpha), _ = Counter((config.rank, config.alpha) for config in configs.values()).most_common(1)[0]
    others = {
        path: config for path, config in configs.items() if (config.rank, config.alpha) != (rank, alpha)
    }
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        **base_entries(origin or Origin(base, base.removeprefix("hf:"))),
        "r": rank,
        "lora_alpha": _short(alpha),
        "lora_dropout": first.dropout,
        "use_rslora": stabilised,
        "bias": "none",
        "target_modules": _targets(set(configs), set(table)),
        "rank_pattern": {path: config.rank for path, config in others.items() if config.rank != rank},
        "alpha_pattern": {
            path: _short(config.alpha) for path, config in others.items() if config.alpha != alpha
        },
        "fan_in_fan_out": family_name(model.config) in ("gpt2", "openai-gpt"),  # their layers are Conv1D
        "inference_mode": True,
        "init_lora_weights": True,
    }
    with lora.without_adapter(model):
        notes = {"format": "pt", BASE_PRINT: checkpoint.fingerprint(lora.merged_tensors(model))}
    if parts:
        notes[_PARTS] = json.dumps(parts)
    write_files(Path(directory), tensors, values, notes, origin)


def base_entries(origin: Origin) -> dict[str, Any]:
    """What adapter_config.json says of the base model: a name that PEFT can load, or none."""
    return {"base_model_name_or_path": origin.loadable, "revision": origin.revision or None}


def write_files(
    directory: Path,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    notes: Mapping[str, str],
    origin: Origin | None,
) -> None:
    """Write an adapter's files, whole or not at all. Raises UserError."""
    if origin is not None:
        notes = {**notes, NOTE: note_of(origin, directory)}
    with files.whole_directory(directory) as aside:
        tensor_files.save_tensors(aside / WEIGHTS, tensors, dict(notes))
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (aside / SETTINGS).write_text(text, encoding="utf-8")
        if origin is not None:
            (aside / README).write_text(model_card(origin, directory), encoding="utf-8")


def _short(alpha: float) -> float:
    """16 for 16.0, as PEFT writes it."""
    return int(alpha) if alpha == int(alpha) else alpha


def _fused(
    chosen: Mapping[str, Adapter], outputs: Mapping[str, int]
) -> tuple[Tensor, Tensor, LoRAConfig, dict[str, int]]:
    """The adapters of our layers as one of theirs: A, B, its settings and, where they are blocks, the rank of
    each."""
    adapters = list(chosen.values())
    first = adapters[0]
    if len(outputs) == 1:
        return first.a, first.b, first.config, {}
    same = len(chosen) == len(outputs) and all(
        torch.equal(one.a, first.a) and one.config == first.config for one in adapters
    )
    if same:
        return first.a, torch.cat([one.b for one in adapters]), first.config, {}
    ranks = {path: one.config.rank for path, one in chosen.items()}
    b = first.b.new_zeros(sum(outputs.values()), sum(ranks.values()))
    row = column = 0
    for path, size in outputs.items():
        if path in chosen:
            factor = chosen[path].config.scale / first.config.scale  # 1 unless they come from different files
            b[row : row + size, column : column + ranks[path]] = factor * chosen[path].b.detach()
            column += ranks[path]
        row += size
    return torch.cat([one.a for one in adapters]), b, _same_scale(first.config, sum(ranks.values())), ranks


def _targets(chosen: set[str], known: set[str]) -> list[str]:
    """The shortest names that mean exactly these layers: q_proj, else self_attn.q_proj, else the whole
    paths."""
    for depth in (1, 2):
        ends = {".".join(path.split(".")[-depth:]) for path in chosen}
        if {path for path in known if any(_is_end(end, path) for end in ends)} == chosen:
            return sorted(ends)
    return sorted(chosen)
