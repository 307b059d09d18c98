"""The forms of an answer as clients ask for them: OpenAI's `response_format` and `text.format`, the variants
of llama.cpp and others, and vLLM's `guided_*` and `structured_outputs`. All become a `Wanted` (form.py).

A schema is always kept to, strict or not. What is not listed here is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from chatwright.serve.api.form import Wanted
from chatwright.serve.api.parameters import Checked, Nothing, parameter_error

MOST_CHOICES = 256
Schema = dict[str, Any]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
Pattern = Annotated[str, Field(min_length=1)]
Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MOST_CHOICES)]


class SchemaFormat(Checked):
    """A JSON schema with its name."""

    place: ClassVar[str] = "json_schema"

    name: Name | None = None
    description: str | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Checked):
    """`text`, `json_object` (any object, or one of a schema beside it), or `json_schema`.

    The schema stands in `json_schema`, as with OpenAI, or beside the type: llama.cpp and others.
    """

    place: ClassVar[str] = "response_format"

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    name: Name | None = None
    description: str | None = None
    strict: bool | None = None

    @property
    def inside(self) -> SchemaFormat:
        """What stands in `json_schema`."""
        return self.json_schema or SchemaFormat()

    @model_validator(mode="after")
    def _one_schema(self) -> ResponseFormat:
        schemas = [one for one in (self.inside.schema_, self.schema_) if one is not None]
        if len(schemas) == 2 and schemas[0] != schemas[1]:
            raise parameter_error("invalid_value", "response_format has two schemas: leave one out")
        _check_schema(self.type, schemas, "response_format")
        return self

    def wanted(self) -> Wanted:
        """The same for `Form`."""
        schema = self.schema_ if self.inside.schema_ is None else self.inside.schema_
        description = self.inside.description or self.description or ""
        return Wanted(self.type if schema is None else "json_schema", schema, description)


class TextFormat(Checked):
    """`text.format` of /v1/responses: the form of the answer's text."""

    place: ClassVar[str] = "text.format"

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Name | None = None
    description: str | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _a_schema(self) -> TextFormat:
        _check_schema(self.type, [self.schema_] if self.schema_ is not None else [], "text.format")
        return self

    def wanted(self) -> Wanted:
        """The same for `Form`."""
        kind = self.type if self.schema_ is None else "json_schema"
        return Wanted(kind, self.schema_, self.description or "", param="text.format")


def _check_schema(kind: str, schemas: Sequence[Schema], place: str) -> None:
    """Raise where a type needs a schema and there is none, or the other way round."""
    if kind == "json_schema" and not schemas:
        raise parameter_error("invalid_value", f"{place}: type json_schema needs a schema")
    if kind == "text" and schemas:
        message = f"{place}: type text has no schema; for JSON that keeps to it the type is json_schema"
        raise parameter_error("invalid_value", message)


class StructuredOutputs(Checked):
    """`structured_outputs` of vLLM."""

    place: ClassVar[str] = "structured_outputs"
    refused: ClassVar[Mapping[str, Nothing]] = {
        "grammar": (),
        "structural_tag": (),
        "disable_fallback": (False,),
        "disable_any_whitespace": (False,),
        "disable_additional_properties": (False,),
        "whitespace_pattern": (),
    }

    json_: Annotated[Schema | str | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: Pattern | None = None
    choice: Choices | None = None


class FormBody(Checked):
    """The parameters of a chat completion that say what form its text has; only one of them may ask."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None
    json_schema: Schema | None = None
    """llama.cpp's."""
    _wanted: Wanted = PrivateAttr(default=Wanted())

    @model_validator(mode="after")
    def _one_form(self) -> FormBody:
        found = [one for one in self._forms() if one.kind != "text"]
        if len(found) > 1:
            names = " and ".join(dict.fromkeys(one.param for one in found))
            message = f"{names}: an answer has one form; leave the others out"
            raise parameter_error("invalid_value", message, found[-1].param)
        if found:
            self._wanted = found[0]
        return self

    @property
    def wanted(self) -> Wanted:
        """The form of the answer's text."""
        return self._wanted

    def _forms(self) -> Iterator[Wanted]:
        if self.response_format is not None:
            yield self.response_format.wanted()
        yield from _guided(
            ("guided_json", "guided_regex", "guided_choice"),
            (self.guided_json, self.guided_regex, self.guided_choice),
        )
        if self.json_schema is not None:
            yield Wanted("json_schema", self.json_schema, param="json_schema")
        if (all_of := self.structured_outputs) is not None:
            yield from _guided(("structured_outputs",) * 3, (all_of.json_, all_of.regex, all_of.choice))
            if all_of.json_object:
                yield Wanted("json_object", param="structured_outputs")


def _guided(
    params: tuple[str, str, str], values: tuple[Schema | str | None, str | None, list[str] | None]
) -> Iterator[Wanted]:
    """vLLM's three ways to ask: a schema (an object, or its JSON as a text), a pattern, choices."""
    schema, pattern, choices = values
    if schema is not None:
        yield Wanted("json_schema", _parsed(schema, params[0]), param=params[0])
    if pattern is not None:
        yield Wanted("regex", pattern=pattern, param=params[1])
    if choices is not None:
        yield Wanted("choice", choices=tuple(choices), param=params[2])


def _parsed(schema: Schema | str, param: str) -> Schema:
    if isinstance(schema, dict):
        return schema
    try:
        found = json.loads(schema)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise parameter_error("invalid_value", f"{param}: the text is no JSON of a schema", param)
    return found
