"""What the bodies of requests have in common: the sampling parameters, and the treatment of all others.

A parameter is one of three things. It is honoured: a field of the body. It is harmless: by its documentation
it does not change the answer, so that it is taken and has no effect. Or it is refused with 400, unless its
value asks for nothing. A name that nobody knows is refused too; the error names the nearest known one. So
nothing that would change the answer is ignored.

The tables `harmless` and `refused` of the bodies are what docs/guide/serving.md and the tests are made from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from chatwright.config import near_match
from chatwright.generate.sampling import SEEDS, Sampling
from chatwright.serve.errors import ApiError

if TYPE_CHECKING:
    from chatwright.chat import ChatTemplate

DEFAULT_NEW_TOKENS = 512
"""Longest answer, in tokens, when the request sets no maximum."""
MOST_ANSWERS = 128
"""Largest `n`, as with OpenAI."""
MOST_STOPS = 16
"""Most stop texts; OpenAI allows 4."""

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Seed = Annotated[int, Field(gt=-SEEDS, lt=SEEDS)]
StopText = Annotated[str, Field(min_length=1)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Nothing = tuple[Any, ...]
"""Values of a refused parameter, besides null, that ask for nothing."""

BOOKKEEPING: Mapping[str, str] = {
    "user": "names the end user, for OpenAI's monitoring",
    "safety_identifier": "names the end user, for OpenAI's monitoring",
    "metadata": "labels for the client's own use",
    "store": "asks OpenAI to keep the answer; nothing is kept here",
    "service_tier": "chooses OpenAI's price and speed",
    "prompt_cache_key": "helps OpenAI's prompt cache; the one here needs no help",
    "prompt_cache_options": "helps OpenAI's prompt cache; the one here needs no help",
    "prompt_cache_retention": "helps OpenAI's prompt cache; the one here needs no help",
    "priority": "vLLM: the place in the queue, which is the order of arrival here",
    "request_id": "vLLM: a name for the request",
    "cache_prompt": "llama.cpp: its prompt cache; the one here is always on",
    "id_slot": "llama.cpp: which slot computes",
    "keep_alive": "Ollama: how long the model stays in memory",
}
"""Harmless parameters of all bodies -> what they are for."""

SAMPLERS: Mapping[str, Nothing] = {
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "add_special_tokens": (True,),
    "typical_p": (1.0,),
    "repeat_penalty": (1.0,),
    "mirostat": (0,),
    "dry_multiplier": (0.0,),
    "xtc_probability": (0.0,),
    "dynatemp_range": (0.0,),
    "n_predict": (),
    "grammar": ("",),
    "guided_grammar": (),
}
"""Parameters of vLLM and llama.cpp that would change the answer and are not supported."""


def parameter_error(
    code: str, message: str, param: str | None = None, *, field: str | None = None
) -> PydanticCustomError:
    """An error of a validator that becomes a 400 with this code (serve/errors.py).

    param: the parameter's name; None is the place in the body where the validator stands. field: a name below
    that place.
    """
    # Pydantic fills {names} in the template from the context, and the message itself may contain braces.
    context = {"message": message, "param": param, "field": field}
    return PydanticCustomError(code, "{message}", context)  # type: ignore[arg-type]


def effort_variables(template: ChatTemplate | None, effort: str | None, param: str) -> dict[str, Any]:
    """The variables of a chat template that say how much the model is to think. A template that has none
    belongs to a model to which the effort makes no difference.

    Raises ApiError where thinking can only be turned on or off, and the request asks for another amount.
    """
    source = template.source if template is not None else ""
    if effort is None:
        return {}
    switch = {"enable_thinking": effort != "none"} if "enable_thinking" in source else {}
    if "reasoning_effort" in source:
        return {"reasoning_effort": effort, **switch}
    if switch and effort not in ("none", "medium"):
        message = f"{param}: this model's thinking can only be turned off (none) or left on (medium)"
        raise ApiError(400, message, param=param, code="unsupported_value")
    return switch


def check_answers(count: int, most: int, param: str = "n") -> None:
    """Raise ApiError for more answers to one request than the server ever gives at a time: waiting is of no
    use."""
    if count > most:
        message = f"{count} answers in one request: this server gives at most {most} (--max_requests)"
        raise ApiError(400, message, param=param, code="invalid_value")


class Checked(BaseModel):
    """An object in a request: strict about types, and about names it does not know."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    refused: ClassVar[Mapping[str, Nothing]] = {}
    """Parameters that would change the answer and are not supported."""
    harmless: ClassVar[Mapping[str, str]] = {}
    """Parameters that do not change the answer -> what they are for."""
    place: ClassVar[str] = ""
    """What messages call this object, for one inside of a body."""

    @model_validator(mode="before")
    @classmethod
    def _other_parameters(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        kept = {}
        for name, value in data.items():
            if name in known:
                kept[name] = value
            elif name not in cls.harmless:
                cls._check_other(name, value, sorted(known))
        return kept

    @classmethod
    def _check_other(cls, name: str, value: Any, known: list[str]) -> None:
        """Raise for a parameter that is neither honoured nor harmless, unless it asks for nothing."""
        whole = f"{cls.place}.{name}" if cls.place else name
        if name in cls.refused:
            asks_nothing = (
                one == value and isinstance(one, bool) == isinstance(value, bool) for one in cls.refused[name]
            )
            if value is None or any(asks_nothing):
                return
            message = f"{whole} is not supported by this server"
            if cls.refused[name]:
                message += f"; the only value taken is {cls.refused[name][0]!r}"
            raise parameter_error("unsupported_parameter", message, field=name)
        if cls.place and value is None:  # programs send whole objects back, with nulls for what is not there
            return
        hint = near_match(name, known).partition("; known")[0]
        raise parameter_error("unknown_parameter", f"unknown parameter {whole!r}{hint}", field=name)


class Body(Checked):
    """The body of a request."""


class StreamOptions(Checked):
    """What a stream carries besides text."""

    place: ClassVar[str] = "stream_options"
    harmless: ClassVar = {"include_obfuscation": "random characters that hide the lengths of the pieces"}
    refused: ClassVar = {"continuous_usage_stats": (False,)}

    include_usage: bool | None = None


class SampledBody(Body):
    """How tokens are chosen. `top_k`, `min_p` and `repetition_penalty` are additions of ours to OpenAI's
    parameters."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 31)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None
    ) = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None = None
    seed: Seed | None = None
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

    def check_bias(self, vocab_size: int) -> None:
        """Raise ApiError for a bias on a token that the model does not have."""
        beyond = [key for key in self.logit_bias or {} if int(key) >= vocab_size]
        if beyond:
            message = f"logit_bias: {beyond[0]} is beyond this model's vocabulary (0 to {vocab_size - 1})"
            raise ApiError(400, message, param="logit_bias", code="invalid_value")

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
