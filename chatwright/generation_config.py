"""Sampling settings that a model's makers recommend: `generation_config.json`, as transformers writes it.

A small model can be coherent at its makers' temperature and talk nonsense at another one. So these settings
travel with a model: they are read with it, kept in checkpoints that are trained from it, written when it is
exported, and used wherever the user says nothing else: in chats, on pages, in texts that are continued and
behind the server's interface alike. Where the makers say nothing, the temperature is DEFAULT_TEMPERATURE. As
in vLLM, keys that are not sampling settings (`max_length` ...) are not read; `eos_token_id` is, by
`end_ids_of`, for it belongs to the tokenizer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from chatwright.config import UserError
from chatwright.files import read_json

FILE = "generation_config.json"

WORDS = {"temperature": "temperature", "top_k": "top-k", "top_p": "top-p", "min_p": "min-p"}
"""What people call a setting."""


@dataclass(frozen=True)
class GenerationConfig:
    """Recommended settings; None where the makers say nothing. The names are those of
    `chatwright.generate.sampling.Sampling`."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    source: str = field(default=FILE, compare=False)
    """Where they come from, for people."""

    def options(self) -> dict[str, Any]:
        """The settings that are known."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "source"}
        return {name: value for name, value in values.items() if value is not None}

    def to_json(self) -> str:
        """The file."""
        return json.dumps(self.to_values(), indent=2) + "\n"

    def to_values(self) -> dict[str, Any]:
        """The file's content. transformers samples only where `do_sample` is true; a temperature of 0 is
        written as its opposite, for it refuses one."""
        options = self.options()
        if options.get("temperature") == 0:
            del options["temperature"]
            return {"do_sample": False, **options}
        return {"do_sample": True, **options}

    @classmethod
    def of(cls, values: Mapping[str, Any], *, where: str, source: str = FILE) -> GenerationConfig | None:
        """The settings in a file's content; None when there are none. Raises UserError for a value that makes
        no sense."""
        found: dict[str, Any] = {}
        for name, (fits, wanted) in _CHECKS.items():
            value = values.get(name)
            if value is None:
                continue
            number = None if isinstance(value, bool) or not isinstance(value, int | float) else value
            if number is None or not fits(number):
                raise UserError(f"{where}: {name} is {value!r}; it must be {wanted}: mend it or take it out")
            found |= _meant(name, number)
        if values.get("do_sample") is False:
            found["temperature"] = 0.0
        elif values.get("do_sample") is True:  # transformers samples at 1 where nothing else is said
            found.setdefault("temperature", 1.0)
        return cls(**found, source=source) if found else None

    @classmethod
    def load(cls, directory: Path) -> GenerationConfig | None:
        """Those beside a model; None when there is no such file. Raises UserError when it is damaged."""
        file = directory / FILE
        if not file.is_file():
            return None
        values = read_json(file)
        if not isinstance(values, dict):
            raise UserError(f"{file}: expected an object")
        return cls.of(values, where=str(file))


_CHECKS: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: 0 <= value < math.inf, "0, or a number above it"),
    "top_k": (
        lambda value: -1 <= value < math.inf and value == int(value),
        "a whole number of at least 0, or -1 for all",
    ),
    "top_p": (lambda value: 0 <= value <= 1, "between 0 and 1"),
    "min_p": (lambda value: 0 <= value <= 1, "between 0 and 1"),
    "repetition_penalty": (lambda value: 0 < value < math.inf, "a number above 0"),
}
"""Setting -> whether a number is possible, and which are."""
LEAST_TEMPERATURE = 1e-4
"""Below, dividing by the temperature leaves nothing but the likeliest token: it is read as 0."""


def _meant(name: str, value: float) -> dict[str, Any]:
    """A setting of a file as the sampler has it: -1 keeps all tokens, a `top_p` of 0 the likeliest alone."""
    if name == "top_k":
        return {"top_k": max(0, int(value))}
    if name == "top_p" and value == 0:
        return {"top_k": 1}
    if name == "temperature" and value < LEAST_TEMPERATURE:
        return {"temperature": 0.0}
    return {name: value}


def end_ids_of(values: Mapping[str, Any], where: str) -> Iterator[int]:
    """The ids that end an answer by `eos_token_id` of a generation_config.json or config.json: a number, or a
    list of numbers. Negative ones stand for none. Raises UserError for anything else."""
    found = values.get("eos_token_id")
    for one in found if isinstance(found, list) else [found]:
        if one is None:
            continue
        if type(one) is not int:
            raise UserError(f"{where}: eos_token_id is {str(found)[:80]}; it must be ids of tokens")
        if 0 <= one < 1 << 31:
            yield one


def described(options: Mapping[str, Any]) -> str:
    """Sampling settings for people: `temperature 0.2, top-p 0.9`. Those that change nothing are left out."""
    idle = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    parts = [
        f"{WORDS.get(name, name.replace('_', ' '))} {options[name]:g}"
        for name in _CHECKS
        if name in options and options[name] != idle.get(name)
    ]
    return ", ".join(parts)


DEFAULT_TEMPERATURE = 0.7
"""What is taken wherever neither the user nor the model says a temperature. At 1 a small model draws from
the whole vocabulary so often beside the point that its answers make no sense."""


def own_default() -> GenerationConfig:
    """What models that are trained here recommend, where the model that they began from says nothing."""
    return GenerationConfig(temperature=DEFAULT_TEMPERATURE)


def chat_options(own: GenerationConfig | None, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The sampling settings: the user's, else the model's own, else a temperature of DEFAULT_TEMPERATURE."""
    options = own.options() if own is not None else {}
    return {"temperature": DEFAULT_TEMPERATURE, **options, **(given or {})}


def told(own: GenerationConfig | None, given: Mapping[str, Any] | None = None) -> str:
    """These settings for people, and where they come from: `temperature 0.2, top-p 0.9 (from ...)`."""
    options, given = chat_options(own, given), given or {}
    theirs = {} if own is None else own.options()
    sources = ["as given"] if given else []
    if own is not None and set(theirs) - set(given):
        sources.append(f"from {own.source}")
    if "temperature" not in {*theirs, *given}:
        sources.append("the default, for the model recommends none")
    return f"{described(options)} ({'; '.join(sources)})"
