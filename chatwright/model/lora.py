"""Low-rank adapters (LoRA): y = W x + s B A x, W frozen.  Hu et al. 2021, arXiv:2106.09685, eq. 3.

Beside a linear layer an adapter has two small matrices, A (rank, inputs) and B (outputs, rank); s = alpha /
rank. A model may carry several adapters, each with a name. One of them is active, or none: then the model
computes what its base computes, bit for bit.

Departures from the paper: A starts uniform (Kaiming's rule, as in the authors' code) and not normal, and
every linear layer of a block has an adapter unless `targets` names some (the paper: query and value). Tables,
norms, biases and the output matrix, which may be the token table, have none.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from chatwright import checkpoint
from chatwright.config import UsageError, UserError
from chatwright.model.gpt import GPT, Block

LAYERS = {
    "query": "attention.query",
    "key": "attention.key",
    "value": "attention.value",
    "output": "attention.output",
    "gate": "mlp.gate",
    "up": "mlp.up",
    "down": "mlp.down",
}
"""What a setting calls a linear layer, and where a block has it."""

DEFAULT = "default"
"""The adapter's name where none is given."""

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class LoRAConfig:
    """Size of an adapter, and the layers that it stands beside."""

    rank: int = 0
    """Rank of the adapters; 0 means no adapters: all weights are trained."""
    alpha: float = 16.0
    """An adapter's output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs that is dropped in training; ppo and reinforce allow 0 only."""
    targets: tuple[str, ...] = ()
    """Layers with an adapter, of query, key, value, output, gate, up, down. Empty: all that the model has."""
    rank_stabilised: bool = False
    """Multiply by alpha / sqrt(rank), as strong at every rank (Kalajdzievski 2023, arXiv:2312.03732)."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise UsageError(f"lora.rank {self.rank} must be at least 0")
        if not 0 < self.alpha < math.inf:
            raise UsageError(f"lora.alpha {self.alpha} must be above 0")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"lora.dropout {self.dropout} must be at least 0 and below 1")
        for target in self.targets:
            if target not in LAYERS:
                raise UsageError(f"lora.targets: {target!r} is none of {', '.join(LAYERS)}")

    @property
    def scale(self) -> float:
        """s of the equation, for ranks above 0."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


class Adapter(nn.Module):
    """s B A x for one linear layer. B starts at zero, so that an adapter at first changes nothing."""

    def __init__(self, layer: nn.Linear, config: LoRAConfig) -> None:
        super().__init__()
        self.config = config
        self.a = nn.Parameter(layer.weight.new_empty(config.rank, layer.in_features))
        self.b = nn.Parameter(layer.weight.new_zeros(layer.out_features, config.rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))  # uniform within 1 / sqrt(inputs)

    def forward(self, x: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        x = F.dropout(x, self.config.dropout, self.training)
        return self.config.scale * F.linear(F.linear(x, self.a), self.b)

    def product(self) -> Float[Tensor, "outputs inputs"]:
        """s B A in float32, which merging adds to W."""
        return self.config.scale * (self.b.float() @ self.a.float())


class LoRALinear(nn.Linear):
    """A linear layer with adapters; weight and bias, names included, are those of the layer it replaces."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would make matrices of its own
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = layer.weight
        self.register_parameter("bias", layer.bias)
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.train(layer.training)

    def forward(self, x: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        y = super().forward(x)
        return y if self.active is None else y + self.adapters[self.active](x)  # type: ignore[no-any-return]

    @torch.no_grad()
    def merged(self) -> Float[Tensor, "outputs inputs"]:
        """W + s B A of the active adapter, rounded once; W itself without one."""
        if self.active is None:
            return self.weight
        adapter = self.adapters[self.active]
        assert isinstance(adapter, Adapter)
        return (self.weight.float() + adapter.product()).to(self.weight.dtype)

    def plain(self, weight: nn.Parameter) -> nn.Linear:
        """A plain layer with this matrix and the same bias."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight = weight
        layer.bias = self.bias
        return layer.train(self.training)


def _adapted(model: nn.Module) -> list[tuple[str, LoRALinear]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, LoRALinear)]


def _decoders(model: nn.Module) -> list[GPT]:
    return [module for module in model.modules() if isinstance(module, GPT)]


def _replace(model: nn.Module, path: str, layer: nn.Linear) -> None:
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)


def adapter_names(model: nn.Module) -> list[str]:
    """Names of a model's adapters, in the order in which they were added."""
    return list(dict.fromkeys(name for _, layer in _adapted(model) for name in layer.adapters))


def active_adapter(model: nn.Module) -> str | None:
    """Name of the active adapter, if there is one."""
    return next((layer.active for _, layer in _adapted(model) if layer.active is not None), None)


def linear_layers(model: nn.Module, targets: tuple[str, ...] = ()) -> dict[str, nn.Linear]:
    """Path -> linear layer of the blocks, all or those that `targets` names.

    Raises UsageError for a target that the model does not have.
    """
    blocks = [(path, module) for path, module in model.named_modules() if isinstance(module, Block)]
    found: dict[str, nn.Linear] = {}
    for path, block in blocks:
        for target in targets or LAYERS:
            part, _, attribute = LAYERS[target].partition(".")
            layer = getattr(getattr(block, part), attribute)
            if layer is not None:
                found[f"{path}.{LAYERS[target]}"] = layer
            elif targets:
                raise UsageError(f"lora.targets: the model has no {target}")
    return found


def add_lora(model: nn.Module, config: LoRAConfig, name: str = DEFAULT) -> None:
    """Add a new adapter to a decoder (or to the one inside a scalar model), in place, and activate it.

    At first the model computes what it did before, bit for bit. Trained afterwards are this adapter and what
    is outside of the decoder (a scalar head); the decoder and its other adapters are frozen. A is drawn from
    torch's global random stream. Raises UserError for a rank of 0, a target that the model does not have, and
    a name that is taken.
    """
    if config.rank < 1:
        raise UsageError("an adapter needs a rank of at least 1")
    layers = linear_layers(model, config.targets)
    attach(model, {path: Adapter(layer, config) for path, layer in layers.items()}, name)


def attach(model: nn.Module, adapters: Mapping[str, Adapter], name: str = DEFAULT) -> None:
    """Add one adapter, a pair of matrices for each path, and activate it. Raises UserError for a bad name."""
    if not re.fullmatch(r"[\w-]{1,64}", name, re.ASCII) or hasattr(nn.ModuleDict(), name):
        raise UserError(
            f"an adapter cannot be called {name!r}: letters, digits, - and _, and no word of torch's"
        )
    if name in adapter_names(model):
        raise UserError(f"the model has an adapter called {name!r} already")
    for decoder in _decoders(model):
        decoder.requires_grad_(False)
    for path, adapter in adapters.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        if not isinstance(layer, LoRALinear):
            layer = LoRALinear(layer)
            _replace(model, path, layer)
        layer.adapters[name] = adapter.train(layer.training)
    use_adapter(model, name)


def use_adapter(model: nn.Module, name: str | None) -> None:
    """Activate the adapter of this name, or none. Raises UserError for an unknown name."""
    known = adapter_names(model)
    if name is not None and name not in known:
        raise UserError(
            f"no adapter is called {name!r}; this model has {', '.join(map(repr, known)) or 'none'}"
        )
    for _, layer in _adapted(model):
        layer.active = name if name is not None and name in layer.adapters else None


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Inside, no adapter is active: the policy is then PPO's frozen reference, without a second copy."""
    before = active_adapter(model)
    use_adapter(model, None)
    try:
        yield
    finally:
        use_adapter(model, before)


def lora_parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """The matrices of one adapter, or of all when no name is given."""
    adapters = [
        layer.adapters[key] for _, layer in _adapted(model) for key in layer.adapters if name in (None, key)
    ]
    return [parameter for adapter in adapters for parameter in adapter.parameters()]


def adapters_of(model: nn.Module, name: str = DEFAULT) -> dict[str, Adapter]:
    """Path of a layer -> its pair of matrices, of one adapter. Raises UserError for an unknown name."""
    found = {path: layer.adapters[name] for path, layer in _adapted(model) if name in layer.adapters}
    if not found:
        raise UserError(f"no adapter is called {name!r} on this model")
    return found  # type: ignore[return-value]


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """W <- W + s B A with the active adapter, in place; then no adapter is left, and all weights are trained.

    Equal to the model with its adapter up to the rounding of one sum. Models that share these matrices change
    too; `plain` makes new ones instead.
    """
    for path, layer in _adapted(model):
        layer.weight.copy_(layer.merged())
        _replace(model, path, layer.plain(cast(nn.Parameter, layer.weight)))
    for decoder in _decoders(model):
        decoder.requires_grad_(True)


def sharing_copy(model: Model, instead: Mapping[int, nn.Module] | None = None) -> Model:
    """A copy whose parameters share the model's memory, but can be frozen without freezing the model's.

    `instead` maps the id of a module to the module that takes its place.
    """
    memo: dict[int, object] = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, memo | dict(instead or {}))


def plain(model: Model) -> Model:
    """A frozen model without adapters that computes the same, for programs that read its weights.

    The model itself if it has no adapters, else a copy with merged matrices that shares all else with it.
    """
    layers = _adapted(model)
    if not layers:
        return model
    instead = {
        id(layer): layer.plain(nn.Parameter(layer.merged(), requires_grad=False)) for _, layer in layers
    }
    return sharing_copy(model, instead).requires_grad_(False)


def merged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors with its adapters merged, under the names of a model without adapters."""
    layers = {f"{path}.weight": layer for path, layer in _adapted(model)}
    return {
        name: layers[name].merged() if name in layers else tensor
        for name, tensor in checkpoint.model_tensors(model).items()
        if ".adapters." not in name
    }


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a model with adapters has beyond its frozen base: the trained adapter, a scalar head, buffers."""
    return {
        name: tensor
        for name, tensor in checkpoint.model_tensors(model).items()
        if tensor.requires_grad or not isinstance(tensor, nn.Parameter)
    }
