"""What the bodies of requests have in common: the sampling parameters, and the treatment of other parameters.

Three kinds of other parameters exist. One that would change the answer and is not supported is refused with
400, unless its value has no effect. One that would not change the answer is ignored. An unknown name is
refused; the error names the nearest known one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from chatwright.config import near_match
from chatwright.generate.sampling import Sampling

DEFAULT_NEW_TOKENS = 512
"""Longest answer, in tokens, when the request sets no maximum."""
MOST_ANSWERS = 16
"""Largest `n`."""

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


def parameter_error(code: str, message: str, param: str) -> PydanticCustomError:
    """An error of a validator that becomes a 400 with this code and parameter (serve/errors.py)."""
    # Pydantic fills {names} in the template from the context, and the message itself may contain braces.
    return PydanticCustomError(code, "{message}", {"message": message, "param": param})  # type: ignore[arg-type]


class Body(BaseModel):
    """The body of a request: strict about types, and about names it does not know."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Parameters that this server does not support -> the values (besides null) that have no effect."""
    ignored: ClassVar[frozenset[str]] = frozenset()
    """Parameters that concern only bookkeeping or speed, or belong to a refused parameter."""

    @model_validator(mode="before")
    @classmethod
    def _other_parameters(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in cls.refused:
                if value is not None and value not in cls.refused[name]:
                    raise parameter_error(
                        "unsupported_parameter", f"{name} is not supported by this server", name
                    )
            elif name not in cls.ignored:
                hint = near_match(name, list(cls.model_fields)).partition("; known")[0]
                raise parameter_error("unknown_parameter", f"unknown parameter {name!r}{hint}", name)
        return kept


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    model_config = ConfigDict(strict=True)
    include_usage: bool = False


class SampledBody(Body):
    """How tokens are chosen. `top_k`, `min_p` and `repetition_penalty` are additions of ours to OpenAI's
    parameters."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 31)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None
    ) = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 62)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def answers(self) -> int:
        """Number of answers for each prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling_with(
        self, own: Mapping[str, Any], *, max_new_tokens: int | None, top_logprobs: int = 0
    ) -> Sampling:
        """The engine's settings: those of the request, else the model's `own`, else OpenAI's defaults. Raises
        UserError on values that it refuses."""
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": _token_numbers(self.logit_bias or {}),
            "top_logprobs": top_logprobs,
            "max_new_tokens": max_new_tokens,
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            "seed": self.seed,
        }
        settings = {name: value for name, value in given.items() if value is not None}
        defaults = {"temperature": 1.0, "max_new_tokens": DEFAULT_NEW_TOKENS, **own}
        return Sampling(**{**defaults, **settings})

    @model_validator(mode="after")
    def _bias_names_tokens(self) -> SampledBody:
        wrong = [
            key for key in self.logit_bias or {} if not (key.isascii() and key.isdigit() and len(key) < 10)
        ]
        if wrong:
            raise parameter_error(
                "invalid_value", f"logit_bias: {wrong[0]!r:.40} is not the number of a token", "logit_bias"
            )
        return self


def _token_numbers(bias: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    return tuple((int(token), value) for token, value in bias.items())
