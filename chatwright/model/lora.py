"""Low-rank adapters (LoRA): y = W x + s B A x, W frozen, s = alpha / rank.  Hu et al. 2021, arXiv:2106.09685, eq. 3.

An adapter is a pair of small matrices A (rank, inputs) and B (outputs, rank) beside some of the blocks' linear layers. Several,
each with a name, may lie on one model; one of them is in use, or none: the model is then its base again, bit for bit.

Departures from the paper: A starts uniform instead of normal (Kaiming's, as in the authors' code), and every linear layer of a
block gets an adapter unless `targets` names some (the paper: query and value). Tables, norms, biases and the output matrix,
which may be the token table, get none.
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
"""The adapter's name where only one is spoken of."""

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class LoRAConfig:
    """An adapter's size and place."""

    rank: int = 0
    """Rank of the adapters; 0 means none: all weights are trained."""
    alpha: float = 16.0
    """What an adapter gives is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs that are left out in training (ppo, reinforce: none may be)."""
    targets: tuple[str, ...] = ()
    """Layers that get one: of query, key, value, output, gate, up, down. None named: all that the model has."""
    rank_stabilised: bool = False
    """Multiply by alpha / sqrt(rank) instead, which is as strong at every rank (Kalajdzievski 2023, arXiv:2312.03732)."""

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
        """s of the formula. Needs a rank above 0."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


class Adapter(nn.Module):
    """s B A x for one linear layer. B is zero at first, and with it all that comes out."""

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
        """s B A in float32: what is added to W when they are merged."""
        return self.config.scale * (self.b.float() @ self.a.float())


class LoRALinear(nn.Linear):
    """A linear layer with adapters beside it. Weight and bias are those of the layer it stands for, under the same names."""

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
        """W + s B A of the adapter in use, rounded once; W itself without one."""
        if self.active is None:
            return self.weight
        adapter = self.adapters[self.active]
        assert isinstance(adapter, Adapter)
        return (self.weight.float() + adapter.product()).to(self.weight.dtype)

    def plain(self, weight: nn.Parameter) -> nn.Linear:
        """A layer without adapters, with this matrix and the same bias."""
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
    """The adapters that lie on a model, in the order in which they came."""
    return list(dict.fromkeys(name for _, layer in _adapted(model) for name in layer.adapters))


def active_adapter(model: nn.Module) -> str | None:
    """The adapter in use."""
    return next((layer.active for _, layer in _adapted(model) if layer.active is not None), None)


def linear_layers(model: nn.Module, targets: tuple[str, ...] = ()) -> dict[str, nn.Linear]:
    """Path -> layer of the blocks' linear layers that `targets` names (none: all). Raises UsageError for one it lacks."""
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
    """Put a new adapter on a decoder (or on the one inside a scalar model), in place, and use it.

    At first the model computes what it did before, bit for bit. What is trained afterwards is this adapter, and what stands
    outside of the decoder (a scalar head); the decoder and its other adapters are frozen. A is drawn from torch's global
    stream. Raises UserError for a rank of 0, a layer that the model lacks, and a name that is taken.
    """
    if config.rank < 1:
        raise UsageError("an adapter needs a rank of at least 1")
    layers = linear_layers(model, config.targets)
    attach(model, {path: Adapter(layer, config) for path, layer in layers.items()}, name)


def attach(model: nn.Module, adapters: Mapping[str, Adapter], name: str = DEFAULT) -> None:
    """Put one adapter, made of a pair of matrices for each path, on a model: the second half of `add_lora`."""
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
    """Let a model compute with the adapter of this name, or with none. Raises UserError when there is none of this name."""
    known = adapter_names(model)
    if name is not None and name not in known:
        raise UserError(
            f"no adapter is called {name!r}; this model has {', '.join(map(repr, known)) or 'none'}"
        )
    for _, layer in _adapted(model):
        layer.active = name if name is not None and name in layer.adapters else None


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base: the frozen reference that PPO compares its policy with, without a second copy."""
    before = active_adapter(model)
    use_adapter(model, None)
    try:
        yield
    finally:
        use_adapter(model, before)


def lora_parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """The matrices of one adapter, of all when no name is given."""
    adapters = [
        layer.adapters[key] for _, layer in _adapted(model) for key in layer.adapters if name in (None, key)
    ]
    return [parameter for adapter in adapters for parameter in adapter.parameters()]


def adapters_of(model: nn.Module, name: str = DEFAULT) -> dict[str, Adapter]:
    """Path of the layer -> its pair of matrices, for one adapter. Raises UserError when there is none of this name."""
    found = {path: layer.adapters[name] for path, layer in _adapted(model) if name in layer.adapters}
    if not found:
        raise UserError(f"no adapter is called {name!r} on this model")
    return found  # type: ignore[return-value]


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """W <- W + s B A with the adapter in use, in place; all adapters go, and the decoder can be trained as a whole again.

    Equal to the model with its adapter up to the rounding of one sum. Matrices that other models share change for them too:
    `plain` makes new ones.
    """
    for path, layer in _adapted(model):
        layer.weight.copy_(layer.merged())
        _replace(model, path, layer.plain(cast(nn.Parameter, layer.weight)))
    for decoder in _decoders(model):
        decoder.requires_grad_(True)


def sharing_copy(model: Model, instead: Mapping[int, nn.Module] | None = None) -> Model:
    """A copy whose parameters lie in the same memory as the model's, and can be frozen without freezing the model's.

    `instead` maps the id of a module to what stands in its place.
    """
    memo: dict[int, object] = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, memo | dict(instead or {}))


def plain(model: Model) -> Model:
    """A model without adapters that computes the same: itself if it has none, else a copy with merged matrices that shares
    everything else with it. For programs that read weights, such as the CPU kernels; frozen."""
    layers = _adapted(model)
    if not layers:
        return model
    instead = {
        id(layer): layer.plain(nn.Parameter(layer.merged(), requires_grad=False)) for _, layer in layers
    }
    return sharing_copy(model, instead).requires_grad_(False)


def merged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors as those of one without adapters: the matrices merged, the names those of the plain model."""
    layers = {f"{path}.weight": layer for path, layer in _adapted(model)}
    return {
        name: layers[name].merged() if name in layers else tensor
        for name, tensor in checkpoint.model_tensors(model).items()
        if ".adapters." not in name
    }


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What an adapted model has beyond its frozen base: the adapter in training, a scalar head, buffers."""
    return {
        name: tensor
        for name, tensor in checkpoint.model_tensors(model).items()
        if tensor.requires_grad or not isinstance(tensor, nn.Parameter)
    }
