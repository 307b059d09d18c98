"""The shape of a model, and the shapes that have names.

One dataclass describes every decoder of the lineage. A preset is a row of a paper's table:

* `gpt1`      Radford et al. 2018, section 4.1
* `gpt2*`     Radford et al. 2019, table 2
* `gpt3-*`    Brown et al. 2020 (arXiv:2005.14165), table 2.1
* `modern-*`  the Qwen3 shape (arXiv:2505.09388) at small widths: RMS norm, rotary positions, grouped queries,
              QK-norm, SwiGLU. With `qk_norm=False` it is the Llama shape.
* `smollm2-135m`  SmolLM2 (arXiv:2502.02737), Llama shape
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

from chatwright.config import UserError
from chatwright.model.rotary_scaling import LARGEST, RotaryScaling, check_kinds

Shape = TypeVar("Shape")
Position = Literal["learned", "sinusoidal", "rotary"]
Norm = Literal["layer", "rms"]
Activation = Literal["gelu", "gelu_tanh", "swiglu", "geglu", "relu2"]
BranchNorm = Literal["before", "after", "both"]


@dataclass(frozen=True)
class GPTConfig:
    """A decoder-only Transformer. Widths in numbers, nothing about devices, data or training."""

    vocab_size: int
    """Number of tokens."""
    context: int
    """Longest sequence, in tokens."""
    layers: int
    """Number of blocks."""
    width: int
    """Size of the residual stream."""
    heads: int
    """Query heads."""
    kv_heads: int = 0
    """Key/value heads; 0 means as many as query heads. Fewer: grouped-query attention (arXiv:2305.13245)."""
    head_dim: int = 0
    """Size of a head; 0 means width / heads."""
    mlp_width: int = 0
    """Hidden size of the MLP; 0 means 4 x width."""
    position: Position = "learned"
    """Kind of position. Sinusoids have base 10000 (Vaswani et al. 2017, section 3.5)."""
    rope_base: float = 10_000.0
    """Base of the rotary angles (arXiv:2104.09864)."""
    rope_scaling: RotaryScaling | None = None
    """How rotary positions are stretched beyond an earlier context; None: not at all."""
    rotary_dim: int = 0
    """Features of a head that are rotated, the first ones; 0 means all (GPT-NeoX rotates a quarter)."""
    rotary_layers: tuple[bool, ...] = ()
    """For each layer, whether positions are rotated there; empty: everywhere (SmolLM3: not in every 4th)."""
    windows: tuple[int, ...] = ()
    """For each layer, how many tokens a token attends to, itself included; 0: to all. Empty: no layer has a
    window (sliding-window attention, Mistral, arXiv:2310.06825, section 2)."""
    window_rope_base: float = 0.0
    """Base of the rotary angles in layers with a window, which are then not stretched by `rope_scaling`; 0:
    the same angles as in all layers (Gemma 3, arXiv:2503.19786, section 2)."""
    norm: Norm = "layer"
    """Layer norm (arXiv:1607.06450) or RMS norm (arXiv:1910.07467)."""
    norm_eps: float = 1e-5
    """Added to the variance."""
    pre_norm: bool = True
    """Normalise the input of each sub-layer (GPT-2), or the sum behind it (GPT-1: without a final norm)."""
    branch_norm: BranchNorm = "before"
    """With `pre_norm`: normalise the input of each sub-layer, its output before it is added to the residual
    stream (`after`: OLMo 2, arXiv:2501.00656, section 3.2), or `both` (Gemma 2)."""
    parallel: bool = False
    """With `pre_norm`: attention and MLP read the same residual stream and are added together (GPT-NeoX,
    arXiv:2204.06745, section 2.1.2)."""
    activation: Activation = "gelu_tanh"
    """Non-linearity of the MLP; `swiglu` and `geglu` add a gate matrix (arXiv:2002.05202), through SiLU
    or the tanh form of GELU; `relu2` is max(x, 0)^2."""
    bias: bool = True
    """Biases in the linear layers."""
    qkv_bias: bool | None = None
    """Biases of queries, keys and values; None: as `bias` says (Qwen 2 has these alone)."""
    qk_norm: bool = False
    """RMS-normalise queries and keys, per head, before the rotation."""
    qk_norm_whole: bool = False
    """With `qk_norm`: over the features of all heads together (OLMo 2)."""
    tied: bool = True
    """The output matrix is the token embedding."""
    logit_softcap: float = 0.0
    """Soft cap c on logits, c tanh(logit / c) (Gemma 2, arXiv:2408.00118, section 2); 0 for none. No preset
    has one: of the families that other programs run, only Gemma's do."""
    attention_softcap: float = 0.0
    """The same for attention scores, before the softmax; 0 for none."""
    attention_scale: float = 0.0
    """Factor on the scores q k; 0 means head_dim ** -0.5."""
    embed_scale: float = 1.0
    """Factor on token embeddings (Gemma: the square root of the width). The output matrix is not scaled."""
    residual_scale: float = 1.0
    """Factor on what each sub-layer adds to the residual stream (Granite, arXiv:2407.13739)."""
    logit_scale: float = 1.0
    """Factor on logits. It multiplies the final hidden states, so that whoever applies the output matrix
    need not know it."""
    dropout: float = 0.0
    """Share of activations dropped in training: embeddings, attention weights, sub-layer outputs."""
    family: str = field(default="", compare=False)
    """What transformers calls the family that the model was read as. It changes no number: some families
    compute the same, and this says by which names a model is written and its adapters call its layers."""

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        check_kinds(self)
        if not self.kv_heads:
            set_(self, "kv_heads", self.heads)
        if self.heads < 1 or self.layers < 1 or self.width < 1:
            raise UserError("model: layers, width and heads must be at least 1")
        if not self.head_dim:
            if self.width % self.heads:
                raise UserError(
                    f"model: width {self.width} is not a multiple of heads {self.heads}; set head_dim"
                )
            set_(self, "head_dim", self.width // self.heads)
        if not self.mlp_width:
            set_(self, "mlp_width", 4 * self.width)
        if self.heads % self.kv_heads:
            raise UserError(f"model: heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        self._check_sizes()
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RotaryScaling):
            raise UserError(f"model: rope_scaling is {self.rope_scaling!r:.80}, not an object")
        if self.position == "rotary":
            self._check_rotary()
        elif self.rope_scaling is not None:
            raise UserError("model: rope_scaling is for rotary positions")
        if self.position == "sinusoidal" and self.width % 2:
            raise UserError(f"model: sinusoidal positions need an even width, not {self.width}")
        for name, choices in (
            ("position", ("learned", "sinusoidal", "rotary")),
            ("norm", ("layer", "rms")),
            ("activation", ("gelu", "gelu_tanh", "swiglu", "geglu", "relu2")),
            ("branch_norm", ("before", "after", "both")),
        ):
            if getattr(self, name) not in choices:
                raise UserError(f"model: {name} is {getattr(self, name)!r}; it can be {', '.join(choices)}")
        self._check_layers()
        self._check_branches()
        for name in ("logit_softcap", "attention_softcap", "attention_scale"):
            if getattr(self, name) < 0.0:
                raise UserError(f"model: {name} {getattr(self, name)} is neither 0 nor a positive number")
        for name in ("embed_scale", "residual_scale", "logit_scale"):
            if getattr(self, name) <= 0.0:
                raise UserError(f"model: {name} {getattr(self, name)} is not a positive number")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"model: dropout {self.dropout} is not in [0, 1)")

    def _check_sizes(self) -> None:
        """Raise UserError for absurd sizes, before anything that large is made."""
        sizes = ("vocab_size", "context", "layers", "width", "heads", "kv_heads", "head_dim", "mlp_width")
        for name in sizes:
            if not 1 <= getattr(self, name) <= LARGEST:
                raise UserError(f"model: {name} is {getattr(self, name)}; it can be 1 to {LARGEST}")
        if self.heads * self.head_dim > LARGEST:
            raise UserError(
                f"model: {self.heads} heads of size {self.head_dim} are more than {LARGEST} features"
            )

    def _check_layers(self) -> None:
        """Raise UserError for lists that are not of one value a layer; what says nothing becomes empty."""
        for name, kind, usual in (("windows", int, 0), ("rotary_layers", bool, True)):
            values = getattr(self, name)
            if not isinstance(values, list | tuple) or any(type(value) is not kind for value in values):
                raise UserError(f"model: {name} is {values!r:.80}, not a list of {kind.__name__} values")
            if values and len(values) != self.layers:
                raise UserError(f"model: {len(values)} {name} for {self.layers} layers; give one a layer")
            object.__setattr__(self, name, () if all(value == usual for value in values) else tuple(values))
        if any(not 0 <= window <= LARGEST for window in self.windows):
            raise UserError(f"model: windows are {self.windows!r:.80}; each can be 0 to {LARGEST}")
        if self.window_rope_base and not (self.windows and self.position == "rotary"):
            raise UserError("model: window_rope_base is for rotary positions in layers with windows")
        if self.window_rope_base < 0.0:
            raise UserError(f"model: window_rope_base {self.window_rope_base} is negative")
        if (self.rotary_layers or self.rotary_dim) and self.position != "rotary":
            raise UserError("model: rotary_layers and rotary_dim are for rotary positions")

    def _check_branches(self) -> None:
        """Raise UserError for settings of norms and biases that contradict each other."""
        if self.qkv_bias is not None and type(self.qkv_bias) is not bool:
            raise UserError(f"model: qkv_bias is {self.qkv_bias!r:.80}, not true, false or null")
        for name, value, usual in (  # one spelling of each shape
            ("qkv_bias", self.bias, None),
            ("attention_scale", self.head_dim**-0.5, 0.0),
            ("window_rope_base", self.rope_base if self.rope_scaling is None else None, 0.0),
        ):
            if getattr(self, name) == value:
                object.__setattr__(self, name, usual)
        if not isinstance(self.family, str) or len(self.family) > 100:
            raise UserError(f"model: family is {self.family!r:.80}, not a name")
        if self.qk_norm_whole and not self.qk_norm:
            raise UserError("model: qk_norm_whole needs qk_norm")
        if (self.branch_norm != "before" or self.parallel) and not self.pre_norm:
            raise UserError("model: branch_norm and parallel are for pre_norm")
        if self.branch_norm != "before" and self.parallel:
            raise UserError(f"model: parallel goes with branch_norm before, not {self.branch_norm}")

    def _check_rotary(self) -> None:
        """Raise UserError for settings of rotary positions that contradict each other."""
        if self.head_dim % 2:
            raise UserError(f"model: rotary positions need an even head_dim, not {self.head_dim}")
        if self.rotary_dim == self.head_dim:
            object.__setattr__(self, "rotary_dim", 0)
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim < self.head_dim:
            raise UserError(f"model: rotary_dim {self.rotary_dim} is not even and up to {self.head_dim}")
        scaling = self.rope_scaling
        if not self.rope_base > (1.0 if scaling is not None and scaling.kind == "yarn" else 0.0):
            raise UserError(f"model: rope_base {self.rope_base} is too small")
        if scaling is not None and len(scaling.divisors) not in (0, self.rotated // 2):
            raise UserError(
                f"model: {len(scaling.divisors)} divisors of rotary rates for {self.rotated // 2} pairs"
            )

    @property
    def rotated(self) -> int:
        """Features of a head that are rotated, with rotary positions."""
        return self.rotary_dim or self.head_dim

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate matrix."""
        return self.activation in ("swiglu", "geglu")

    def window(self, layer: int) -> int:
        """How many tokens a token attends to in this layer, itself included; 0: all."""
        return self.windows[layer] if self.windows else 0

    def is_rotated(self, layer: int) -> bool:
        """Whether this layer rotates positions."""
        return self.position == "rotary" and (not self.rotary_layers or self.rotary_layers[layer])

    def with_layers(self, layers: int) -> GPTConfig:
        """The shape with another number of layers; what is said of single layers is repeated or cut off."""
        repeated = {
            name: (getattr(self, name) * -(-layers // self.layers))[:layers]
            for name in ("windows", "rotary_layers")
        }
        base = self.window_rope_base if any(repeated["windows"]) else 0.0
        return replace(self, layers=layers, window_rope_base=base, **repeated)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> GPTConfig:
        """The named shape, with some fields changed. Raises UserError for an unknown name."""
        if name not in PRESETS:
            near = difflib.get_close_matches(name.lower(), PRESETS, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(PRESETS)}"
            raise UserError(f"no model shape is called {name!r}{hint}")
        base = PRESETS[name]
        # Sizes that follow from others do so again: a narrower gpt2 has a narrower MLP.
        usual = {"kv_heads": base.heads, "head_dim": base.width // base.heads, "mlp_width": 4 * base.width}
        derived = {name: 0 for name, value in usual.items() if getattr(base, name) == value}
        return replace(base, **{**derived, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GPTConfig:
        """Inverse of `to_dict`. Raises UserError when fields are unknown or missing."""
        scaling = values.get("rope_scaling")  # checkpoints of earlier versions have none
        if isinstance(scaling, dict):
            values = {**values, "rope_scaling": _from_fields(RotaryScaling, scaling)}
        return _from_fields(cls, values)


def _from_fields(cls: type[Shape], values: dict[str, Any]) -> Shape:
    """A dataclass from its fields. Raises UserError when some are unknown or missing."""
    unknown = sorted(set(values) - {one.name for one in fields(cls)})  # type: ignore[arg-type]
    if unknown:
        raise UserError(f"model: unknown fields {', '.join(unknown)} (written by a newer chatwright?)")
    try:
        return cls(**values)
    except TypeError as error:
        raise UserError(f"model: {error}") from None


def _gpt2(layers: int, width: int, heads: int) -> GPTConfig:
    return GPTConfig(vocab_size=50_257, context=1_024, layers=layers, width=width, heads=heads)


def _gpt3(layers: int, width: int, heads: int) -> GPTConfig:
    # The head size is width / heads. Two rows of table 2.1 contradict themselves: 1.3B (24 heads of 128 for
    # 2048 features; here 16 heads) and 13B (5140 features; here 5120). GPT-3's sparse layers are left out.
    return GPTConfig(vocab_size=50_257, context=2_048, layers=layers, width=width, heads=heads)


def _modern(layers: int, width: int, heads: int, kv_heads: int, mlp_width: int, **changes: Any) -> GPTConfig:
    base = GPTConfig(
        vocab_size=4_096,
        context=256,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        mlp_width=mlp_width,
        position="rotary",
        norm="rms",
        norm_eps=1e-6,
        activation="swiglu",
        bias=False,
        qk_norm=True,
    )
    return replace(base, **changes)


PRESETS: dict[str, GPTConfig] = {
    "gpt1": GPTConfig(
        vocab_size=40_478,
        context=512,
        layers=12,
        width=768,
        heads=12,
        pre_norm=False,
        activation="gelu_tanh",
        dropout=0.1,
    ),
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1_024, 16),
    "gpt2-large": _gpt2(36, 1_280, 20),
    "gpt2-xl": _gpt2(48, 1_600, 25),
    "gpt3-125m": _gpt3(12, 768, 12),
    "gpt3-350m": _gpt3(24, 1_024, 16),
    "gpt3-760m": _gpt3(24, 1_536, 16),
    "gpt3-1.3b": _gpt3(24, 2_048, 16),
    "gpt3-2.7b": _gpt3(32, 2_560, 32),
    "gpt3-6.7b": _gpt3(32, 4_096, 32),
    "gpt3-13b": _gpt3(40, 5_120, 40),
    "gpt3-175b": _gpt3(96, 12_288, 96),
    "modern-nano": _modern(2, 64, 2, 1, 192, vocab_size=512, context=128),
    "modern-tiny": _modern(4, 256, 4, 2, 768),
    "modern-small": _modern(12, 512, 8, 4, 1_536, vocab_size=16_384, context=1_024),
    "modern-base": _modern(12, 768, 12, 4, 2_048, vocab_size=32_768, context=2_048),
    "modern-large": _modern(24, 1_536, 12, 4, 4_096, vocab_size=49_152, context=4_096, head_dim=128),
    "smollm2-135m": GPTConfig(
        vocab_size=49_152,
        context=8_192,
        layers=30,
        width=576,
        heads=9,
        kv_heads=3,
        mlp_width=1_536,
        position="rotary",
        rope_base=100_000.0,
        norm="rms",
        norm_eps=1e-5,
        activation="swiglu",
        bias=False,
    ),
}
