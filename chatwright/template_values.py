"""What a chat template is given: the values of transformers' `apply_chat_template`, with their origins.

Messages are taken as they are, with what stands beside the content: `tool_calls` (arguments that are an
object stay one, and a text stays a text), `reasoning_content`, `name`, `tool_call_id`. As in transformers
what is null is left out, and thinking has several names. Messages in our own form (messages.py: typed parts)
become such messages where the template knows tool calls and thinking; for any other template they are
written into the content in the form of Hermes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict, cast

from chatwright.config import UserError
from chatwright.messages import (
    ROLES,
    Content,
    ImagePart,
    Message,
    is_text,
    parts_of,
    refuse_image,
    text_part,
    to_openai,
    written,
)
from chatwright.template_abilities import Abilities
from chatwright.traced_text import BESIDE, CALL, CONTENT, OTHER, THINKING, of_message, owned

TRUSTED_ROLES = frozenset(
    (*ROLES, "developer", "function", "ipython", "model", "observation", "tool_response")
)
"""Names of roles that a template may make control tokens of; any other role is text of the message."""
REASONING = ("reasoning_content", "thinking", "reasoning")
_KINDS = {"content": CONTENT, "tool_calls": CALL, **dict.fromkeys(REASONING, THINKING)}


class Beside(TypedDict, total=False):
    """What may be given beside the messages, by transformers' names."""

    tools: Sequence[Mapping[str, Any]] | None
    """Tools, as OpenAI's interface has them."""
    documents: Sequence[Mapping[str, Any]] | None
    """Documents for an answer that cites them, each with title and text."""
    variables: Mapping[str, Any] | None
    """Variables of the template's own, such as enable_thinking (vLLM's chat_template_kwargs)."""
    continue_final_message: bool | str
    """The last message stays open, for the model to go on with it; or the field of it that does."""


def beside_of(options: Mapping[str, Any]) -> tuple[Beside, dict[str, Any]]:
    """What of named options is for the template, and the others."""
    beside = {name: value for name, value in options.items() if name in Beside.__annotations__}
    others = {name: value for name, value in options.items() if name not in beside}
    return cast(Beside, beside), others


def plain_message(message: Mapping[str, Any], number: int, able: Abilities) -> Iterator[dict[str, Any]]:
    """A message as the template gets it, as one message or, out of typed parts, several. Raises
    UnreadablePart for an image, UserError for what is no message."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise UserError(f"message {number}: a message must be an object with role and content")
    content = message.get("content")
    if not isinstance(content, list | tuple):
        yield _reasoned({**message, "content": _fitting(content, able)})
        return
    for part in content:
        if isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
            refuse_image(ImagePart(type="image", url=_url(part)))
    typed = [part.get("type") for part in content if isinstance(part, Mapping)]
    if not {"tool_call", "tool_result", "thinking"} & set(typed):
        yield _reasoned({**message, "content": _fitting(content, able)})
        return
    own = Message(role=message["role"], content=cast(Content, list(content)))
    if not able.calls and {"tool_call", "tool_result"} & set(typed):
        own["content"] = written(own["content"])
    elif not able.thinking and "thinking" in typed:
        own["content"] = [
            text_part(written([part])) if part["type"] == "thinking" else part
            for part in parts_of(own["content"])
        ]
        if is_text(own["content"]):
            own["content"] = written(own["content"])
    for turn in to_openai([own]):
        for call in turn.get("tool_calls", ()) if able.objects else ():
            call["function"]["arguments"] = _as_object(call["function"]["arguments"])
        yield _reasoned({**turn, "content": _fitting(turn.get("content"), able)})


def _url(part: Mapping[str, Any]) -> str:
    """Where an image is, in our form or in OpenAI's."""
    link = part.get("image_url", part.get("url"))
    return str(link.get("url") if isinstance(link, Mapping) else link)


def _reasoned(message: dict[str, Any]) -> dict[str, Any]:
    """Without what is null (and our own mark of what is not learnt), and with thinking under all names that
    transformers gives it."""
    known = {key: value for key, value in message.items() if value is not None and key != "learn"}
    thought = next((known[name] for name in REASONING if name in known), None)
    return known if thought is None else {"thinking": thought, **known, "reasoning_content": thought}


def _fitting(content: Any, able: Abilities) -> Any:
    """A content of text alone, as text or as a list of parts: what the template goes through."""
    if isinstance(content, str):
        return [text_part(content)] if able.lists_only else content
    if not isinstance(content, list | tuple):
        return content
    texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    if len(texts) == len(content) and all(isinstance(text, str) for text in texts) and not able.lists:
        return "".join(cast(list[str], texts))
    return list(content)


def _as_object(arguments: Any) -> Any:
    """The object that a text says; the text itself where it says none."""
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, TypeError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def traced_message(message: Mapping[str, Any], number: int) -> dict[Any, Any]:
    """A message whose texts know where they come from."""
    made: dict[Any, Any] = {}
    for key, value in message.items():
        if key == "role":
            known = isinstance(value, str) and value in TRUSTED_ROLES
            made["role"] = str(value) if known else traced(value, of_message(number, BESIDE))
        elif isinstance(key, str):
            own = key in _KINDS or key in ("name", "tool_call_id", "weight")
            origin = of_message(number, _KINDS.get(key, BESIDE))
            made[key if own else owned(key, of_message(number, BESIDE))] = traced(value, origin)
    return made


def traced(value: Any, origin: int) -> Any:
    """A value of plain JSON whose texts have an origin. As in transformers, anything else becomes the name of
    its type: a template must not reach the methods of an object."""
    if isinstance(value, str):
        return owned(str.__str__(value), origin)
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, Mapping):
        return {traced(key, origin): traced(one, origin) for key, one in value.items()}
    if isinstance(value, list):
        return [traced(one, origin) for one in value]
    if isinstance(value, tuple):
        return tuple(traced(one, origin) for one in value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    return owned(f"<{type(value).__name__}>", origin)


def traced_beside(beside: Beside) -> dict[str, Any]:
    """Tools, documents and variables, as a template gets them. Raises UserError for what is none."""
    tools, documents = beside.get("tools"), beside.get("documents")
    for name, given in (("tools", tools), ("documents", documents)):
        if given is not None and not all(isinstance(one, Mapping) for one in given):
            raise UserError(f"each of the {name} of a chat template must be an object")
    variables = dict(beside.get("variables") or {})
    strange = {"messages", "tools", "documents", "add_generation_prompt"} & set(variables)
    if strange:
        name = sorted(strange)[0]
        raise UserError(f"a variable of a chat template cannot be called {name!r}: give it by that name")
    return {
        **{str(key): traced(value, OTHER) for key, value in variables.items()},
        "tools": traced(list(tools), OTHER) if tools is not None else None,
        "documents": traced(list(documents), OTHER) if documents is not None else None,
    }


def opened(messages: list[dict[str, Any]], field: str, tag: str, source: str) -> str:
    """Put `tag` behind the last message's text in `field`, and return that text. The template's result is
    then cut at the tag. Raises UserError where there is nothing to go on with."""
    last = messages[-1]
    fields = [field]
    found = last.get(field)
    if field in REASONING:
        fields = [name for name in REASONING if name in last and last[name] == found]
    if found is None or not any(name in source for name in fields):
        raise UserError(f"there is no {field!r} in the last message that the chat template could leave open")
    if isinstance(found, list):
        part = next((one for one in reversed(found) if isinstance(one, dict) and "text" in one), None)
        if part is None:
            raise UserError("the last message has no text that the model could go on with")
        text = str(part["text"])
        part["text"] = part["text"] + tag
        return text
    for name in fields:
        last[name] = last[name] + tag
    return str(found)


def cut_open(text: str, last: str, tag: str) -> str:
    """A rendered text up to the tag that `opened` put behind the last message, as transformers cuts it."""
    plain = str.__str__(text)
    at = plain.rfind(tag.strip())
    if at < 0 or last.strip() not in plain:
        raise UserError("the chat template changes the last message, so that it cannot be left open")
    return text[:at] if plain.startswith(tag, at) else text[:at].rstrip()


def fits_template(message: Mapping[str, Any], able: Abilities) -> bool:
    """Whether a message may be given to a template as it is; else in our own form, which `plain_message`
    brings into one that the template knows."""
    calls = message.get("tool_calls")
    if calls:
        functions = [call.get("function", {}) for call in calls]
        texts = any(isinstance(function.get("arguments"), str) for function in functions)
        if not able.calls or (texts and able.objects):
            return False
    return not any(message.get(name) for name in REASONING) or able.thinking
