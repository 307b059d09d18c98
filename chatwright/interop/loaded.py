"""What an import gives, and the one way in which foreign tensors become ours.

A family of files (GPT-2's safetensors, llama.cpp's GGUF) is a table of `Rule`s: their name, our names, and
how the numbers lie. Every rule can be inverted, so the same table serves for writing. Names and shapes of the
whole file are checked before a single number is read, and nothing is skipped in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from chatwright.chat import ChatTemplate
from chatwright.config import UserError
from chatwright.generation_config import GenerationConfig
from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT
from chatwright.tokenizer import Tokenizer


@dataclass(frozen=True)
class Loaded:
    """A model and what came with it."""

    model: GPT
    tokenizer: Tokenizer | None
    """None when the source holds weights only."""
    template: ChatTemplate | None
    """None when the source has no chat template."""
    source: str
    """Where it came from, for messages."""
    generation: GenerationConfig | None = None
    """The sampling settings that its makers recommend; None where they say nothing."""


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in a file: its shape is known, its numbers are read when they are wanted."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@contextmanager
def located(where: str) -> Iterator[None]:
    """Errors of what happens inside name the file, unless they do already."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def in_memory(tensor: Tensor) -> Stored:
    """A tensor that is already here."""
    return Stored(tuple(tensor.shape), lambda: tensor)


@dataclass(frozen=True)
class Rule:
    """How one of their tensors becomes one or several of ours. `{}` in a name stands for the number of the
    block."""

    theirs: str
    own: str | tuple[str, ...]
    """Several when theirs is fused: ours follow one another along dimension 0 (the outputs of a linear
    layer), as wholes or head by head."""
    transposed: bool = False
    """Theirs is (inputs, outputs), as in GPT-2's Conv1D; ours, like torch's, is (outputs, inputs)."""
    paired: Literal["heads", "kv_heads"] | None = None
    """Rotary pairs lie side by side (x_0 with x_1), as llama.cpp stores Llama's; ours are (x_i, x_{i + K/2}).
    Names the configuration's number of heads in this tensor."""
    by_head: bool = False
    """Several of ours follow one another within each head, and not as wholes (GPT-NeoX)."""
    plus: float = 0.0
    """Ours is theirs plus this number: Gemma's norms store their weights less one. A weight below 1/2 that
    was trained here loses some last bits when it is written, 6e-8 at most."""

    def names(self, layer: int) -> tuple[str, tuple[str, ...]]:
        """Their name and ours for one block."""
        own = (self.own,) if isinstance(self.own, str) else self.own
        return self.theirs.format(layer), tuple(name.format(layer) for name in own)

    def stored_shape(self, shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """The shape of theirs, given the shapes of ours."""
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        return shape[::-1] if self.transposed else shape

    def apply(self, tensor: Tensor, rows: Sequence[int], config: GPTConfig) -> tuple[Tensor, ...]:
        """Theirs -> ours; `rows` are the sizes of ours along dimension 0."""
        if self.transposed:
            tensor = tensor.T
        if self.paired:
            heads = getattr(config, self.paired)
            pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])  # (H, K / 2, 2, D)
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        if self.plus:
            tensor = tensor.float() + self.plus
        return self.split(tensor, rows, config)

    def split(self, tensor: Tensor, rows: Sequence[int], config: GPTConfig) -> tuple[Tensor, ...]:
        """The rows of a fused matrix (outputs, ...) apart."""
        if not self.by_head:
            return tuple(torch.split(tensor, list(rows)))
        by_head = tensor.reshape(config.heads, len(rows), config.head_dim, *tensor.shape[1:])
        return tuple(part.reshape(-1, *tensor.shape[1:]) for part in by_head.unbind(1))

    def join(self, parts: Sequence[Tensor], config: GPTConfig) -> Tensor:
        """Undoes `split`."""
        if not self.by_head:
            return parts[0] if len(parts) == 1 else torch.cat(list(parts))
        shape = parts[0].shape[1:]
        heads = [part.reshape(config.heads, config.head_dim, *shape) for part in parts]
        return torch.stack(heads, 1).reshape(-1, *shape)

    def invert(self, parts: Sequence[Tensor], config: GPTConfig) -> Tensor:
        """Ours -> theirs: stack ours along dimension 0, pair the rotary halves, transpose. Undoes `apply`."""
        tensor = self.join(parts, config)
        if self.paired:
            heads = getattr(config, self.paired)
            halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])  # (H, 2, K / 2, D)
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        if self.plus:
            tensor = tensor - self.plus
        return tensor.T if self.transposed else tensor


def translate(
    tensors: Mapping[str, Stored],
    rules: Iterable[Rule],
    config: GPTConfig,
    *,
    where: str,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Their tensors as a state dict for `GPT(config)`; a tied output matrix is not in it.

    Raises UserError naming the tensors that are missing, unexpected, or of another shape than `config`
    implies.
    """
    if config.layers > len(tensors):  # before anything is built to that number
        raise UserError(
            f"{where}: {config.layers} blocks in the configuration, {len(tensors)} tensors in all"
        )
    own_shapes = _own_shapes(config.with_layers(1))  # the tensors of all blocks are alike
    for layer in range(1, config.layers):
        own_shapes |= {
            name.replace("blocks.0.", f"blocks.{layer}.", 1): shape
            for name, shape in own_shapes.items()
            if name.startswith("blocks.0.")
        }
    plan: list[tuple[Rule, str, tuple[str, ...]]] = []
    missing, wrong, known = [], [], set()
    for rule in rules:
        for layer in range(config.layers) if "{}" in rule.theirs else (0,):
            theirs, own = rule.names(layer)
            if own[0] not in own_shapes:  # the output matrix of a tied model
                continue
            known.add(theirs)
            want = rule.stored_shape([own_shapes[name] for name in own])
            if theirs not in tensors:
                missing.append(theirs)
            elif tensors[theirs].shape != want:
                wrong.append(f"{theirs} ({_times(tensors[theirs].shape)}, not {_times(want)})")
            plan.append((rule, theirs, own))
    problems = [
        f"{what} {_listed(names)}"
        for what, names in (
            ("missing tensors:", missing),
            ("tensors that this model has no place for:", sorted(set(tensors) - known)),
            ("tensors of the wrong shape:", wrong),
        )
        if names
    ]
    if problems:
        raise UserError(f"{where}: the weights do not fit the configuration; {'; '.join(problems)}")
    state = {}
    for rule, theirs, own in plan:
        parts = rule.apply(tensors[theirs].read(), [own_shapes[name][0] for name in own], config)
        for name, part in zip(own, parts, strict=True):
            # A copy of its own: neither a view of a mapped file nor of the fused tensor.
            state[name] = part.to(dtype=dtype, copy=True, memory_format=torch.contiguous_format)
    return state


def foreign(model: GPT, rules: Iterable[Rule]) -> dict[str, Stored]:
    """A model's tensors as their format names and lays them out, each made when it is read: undoes
    `translate`.

    A tied output matrix is not among them. Raises UserError naming a tensor of ours that no rule has a place
    for.
    """
    config = model.config
    own_tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if config.tied:
        del own_tensors["head.weight"]
    tensors: dict[str, Stored] = {}
    left = set(own_tensors)
    for rule in rules:
        for layer in range(config.layers) if "{}" in rule.theirs else (0,):
            theirs, own = rule.names(layer)
            if not set(own) <= set(own_tensors):
                continue
            left -= set(own)
            parts = [own_tensors[name] for name in own]
            tensors[theirs] = Stored(
                rule.stored_shape([part.shape for part in parts]), partial(rule.invert, parts, config)
            )
    if left:
        raise UserError(f"no place for {_listed(sorted(left))} in this format")
    return tensors


def build(config: GPTConfig, state: Mapping[str, Tensor]) -> GPT:
    """A model with these weights, in evaluation mode. It takes the tensors over, it does not copy them."""
    model = _empty(config)
    whole = dict(state)
    if config.tied:
        whole["head.weight"] = whole["embed.weight"]
    model.load_state_dict(whole, assign=True)
    if config.tied:
        model.head.weight = model.embed.weight
    return model.eval()


class _Undrawn(TorchFunctionMode):
    """Draw no random numbers: on the meta device there are none, yet torch takes two seconds to find that
    out."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.init.normal_:
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _empty(config: GPTConfig) -> GPT:
    """The model without memory for its parameters."""
    with torch.device("meta"), _Undrawn():
        return GPT(config)


def _own_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(tensor.shape) for name, tensor in _empty(config).state_dict().items()}
    if config.tied:
        del shapes["head.weight"]
    return shapes


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a single number"


def _listed(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""What families call the token between documents. A chat model's end of sequence may be the end of a turn
instead."""


def end_of_text(controls: Iterable[str], end_of_sequence: str | None, *, where: str) -> str:
    """The token that ends a document: the first usual name among the control tokens, else the end of
    sequence."""
    names = set(controls)
    for name in (*ENDS_OF_TEXT, end_of_sequence):
        if name is not None and name in names:
            return name
    raise UserError(f"{where}: none of the tokenizer's control tokens ends a text; name one as its eos_token")
