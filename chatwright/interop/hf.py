"""Models in the format of transformers: `config.json`, safetensors, `tokenizer.json`. Transformers is not
needed.

Names and settings of the families are in families/; here is the reading of directories and of the hub.
Pickles are never opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from chatwright.chat import ChatTemplate
from chatwright.config import UserError
from chatwright.files import read_json
from chatwright.generation_config import GenerationConfig
from chatwright.interop.families import Family, config_from_hf, family_of
from chatwright.interop.hf_tokenizer import read_tokenizer
from chatwright.interop.loaded import (
    Loaded,
    Stored,
    build,
    in_memory,
    translate,
)
from chatwright.interop.templates import template_of
from chatwright.model.config import GPTConfig
from chatwright.tokenizer import Tokenizer

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt"]

# Constants that old versions of transformers saved among the weights: causal masks and rotary frequencies.
_FLOATS = {"F64", "F32", "F16", "BF16"}
_SHARD = re.compile(r"(?!\.)[\w.-]{1,240}\.safetensors", re.ASCII)
_CONSTANTS = re.compile(
    r"(.*\.)?(h\.\d+\.attn\.(bias|masked_bias)|layers\.\d+\.attention\.(bias|masked_bias)|rotary_emb\.inv_freq)"
)


def state_dict_from_hf(
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor | Stored],
    *,
    where: str = "config.json",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The tensors of a transformers model as a state dict for `build(config_from_hf(values), ...)`.

    Raises UserError naming tensors that are missing, unexpected, of the wrong shape, or untied against the
    config.
    """
    family, config = family_of(values, where), config_from_hf(values, where=where)
    stored = {
        _renamed(name, family): tensor if isinstance(tensor, Stored) else in_memory(tensor)
        for name, tensor in tensors.items()
        if not _CONSTANTS.fullmatch(name)
    }
    rules = family.rules
    if not any(name.startswith(family.base) for name in stored):
        rules = tuple(replace(rule, theirs=rule.theirs.removeprefix(family.base)) for rule in rules)
    head = stored.pop(rules[-1].theirs, None) if config.tied else None
    embed = stored.get(rules[0].theirs)
    if head and embed and (head.shape != embed.shape or not torch.equal(head.read(), embed.read())):
        raise UserError(
            f"{where}: says tie_word_embeddings, but {rules[-1].theirs} differs from {rules[0].theirs}"
        )
    return translate(stored, rules, config, where=where, dtype=dtype)


def _renamed(name: str, family: Family) -> str:
    """A tensor's name as the family's rules have it, where a version of transformers has another."""
    for theirs, ours in family.renamed:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


@contextmanager
def _weights(directory: Path) -> Iterator[dict[str, Stored]]:
    """All tensors of the safetensors files in a directory, by name, open for reading."""
    with ExitStack() as stack:
        tensors: dict[str, Stored] = {}
        for file in _weight_files(directory):
            tensors |= open_weights(file, stack)
        yield tensors


def open_weights(file: Path, stack: ExitStack) -> dict[str, Stored]:
    """The tensors of a safetensors file, which stays open as long as `stack` does. Raises UserError: damaged,
    no weights."""
    tensors: dict[str, Stored] = {}
    try:
        opened = stack.enter_context(safetensors.safe_open(str(file), framework="pt"))
        for name in opened.keys():  # noqa: SIM118 (not a dict)
            described = opened.get_slice(name)
            if described.get_dtype() not in _FLOATS:
                raise UserError(f"{file}: {name} has numbers of type {described.get_dtype()}, not weights")
            tensors[name] = Stored(tuple(described.get_shape()), partial(opened.get_tensor, name))
    except (safetensors.SafetensorError, OSError) as error:
        reason = "does not exist" if not file.exists() else f"is damaged or cut short ({error})"
        raise UserError(f"{file} {reason}; fetch it again") from None
    return tensors


def _weight_files(directory: Path) -> list[Path]:
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if single.exists():
        return [single]
    if index.exists():
        names = _read_json(index).get("weight_map")
        if (
            not isinstance(names, dict)
            or not names
            or not all(isinstance(name, str) for name in names.values())
        ):
            raise UserError(f"{index}: no weight_map in it")
        strange = [name for name in names.values() if not _SHARD.fullmatch(name)]
        if strange:
            raise UserError(f"{index}: {strange[0]!r:.80} is not the name of a file beside it")
        return [directory / name for name in sorted(set(names.values()))]
    pickles = sorted(
        file.name for suffix in ("bin", "pt", "pth", "ckpt") for file in directory.glob(f"*.{suffix}")
    )
    if pickles:
        raise UserError(
            f"{directory}: the weights are a pickle ({pickles[0]}), which could run any program when opened; "
            "save the model with transformers' save_pretrained(..., safe_serialization=True) and load that"
        )
    raise UserError(f"{directory}: no model.safetensors in it")


def _read_json(file: Path) -> dict[str, Any]:
    values = read_json(file)
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected an object")
    return values


def load_hf(directory: str | Path, *, dtype: torch.dtype = torch.float32, tokenizer: bool = True) -> Loaded:
    """A model directory as `save_pretrained` writes it. Raises UserError when anything in it is not what we
    carry.

    `tokenizer=False` reads the weights alone, for models whose tokenizer is of a kind that is not read.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory with a model")
    file = directory / "config.json"
    values = _read_json(file)
    config = config_from_hf(values, where=str(file))
    with _weights(directory) as tensors:
        state = state_dict_from_hf(values, tensors, where=str(directory), dtype=dtype)
    text, template = _text_side(directory) if tokenizer else (None, None)
    if text is not None and text.vocab_size > config.vocab_size:
        raise UserError(
            f"{directory}: {text.vocab_size} tokens in tokenizer.json, {config.vocab_size} in the model"
        )
    generation = GenerationConfig.load(directory)
    return Loaded(build(config, state), text, template, str(directory), generation)


def _text_side(directory: Path) -> tuple[Tokenizer | None, ChatTemplate | None]:
    """The tokenizer and the chat template of a model directory."""
    file = directory / "tokenizer.json"
    if not file.exists():
        return None, None
    content = _read_json(file)
    extra = directory / "tokenizer_config.json"
    settings = _read_json(extra) if extra.exists() else {}
    return read_tokenizer(directory, content, settings), template_of(directory, settings)


def hf_shape(directory: Path) -> GPTConfig:
    """The shape of a model in transformers' format, without its weights. Raises UserError."""
    file = directory / "config.json"
    return config_from_hf(_read_json(file), where=str(file))


def hub_shape(name: str) -> GPTConfig:
    """The shape of `owner/name` on the Hugging Face hub, of which only config.json is fetched. Raises
    UserError."""
    import huggingface_hub

    try:
        file = Path(huggingface_hub.hf_hub_download(name, "config.json"))
    except Exception as error:  # the library and its HTTP client raise kinds without a common ancestor
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"hf:{name} cannot be fetched: {reason}") from None
    return hf_shape(file.parent)


def load_hub(name: str, *, revision: str | None = None, dtype: torch.dtype = torch.float32) -> Loaded:
    """`owner/name` from the Hugging Face hub, through its cache. Raises UserError in one line when out of
    reach."""
    import huggingface_hub

    try:
        # Files beside the model only: some repositories keep the same weights once more in folders.
        directory = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]
        )
    except Exception as error:  # the library and its HTTP client raise kinds without a common ancestor
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"hf:{name} cannot be fetched: {reason}") from None
    loaded = load_hf(directory, dtype=dtype)
    return replace(loaded, source=f"hf:{name}")
