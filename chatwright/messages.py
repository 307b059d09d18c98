"""What a message is: a role, and a content that is a text or a list of typed parts.

Records, the store and chat templates use one form of parts. A part is a flat object whose values are texts.
A content of nothing but text is usually a plain `str`.

| type of part | its other fields | in messages of |
|---|---|---|
| `text` | text | any role |
| `image` | url; mime and sha256 where known | user, tool |
| `tool_call` | id, name, arguments (a JSON object, as text) | assistant |
| `tool_result` | tool_call_id, content | tool |
| `thinking` | thinking: what a model wrote before its answer | assistant |

OpenAI's interface has another form: `tool_calls` and `reasoning_content` stand beside the content of an
assistant's message, `tool_call_id` beside that of a tool's, and images are parts of type `image_url`.
`check_message` reads both forms and returns ours; `to_openai` writes theirs.

A model that reads only text gets `written(content)`: tool calls in the form of Hermes (generate/tools.py),
thinking between <think> and </think>. An image has no such text, so `written` raises UnreadablePart for it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict, cast

from chatwright.config import UserError, near_match

ROLES = ("system", "user", "assistant", "tool")


class TextPart(TypedDict):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImagePart(TypedDict):
    """A reference to an image."""

    type: Literal["image"]
    url: str
    """A URL (data:, http:, https:), or a file's path."""
    mime: NotRequired[str]
    """Its kind, such as image/png."""
    sha256: NotRequired[str]
    """SHA-256 of the image's bytes, 64 hexadecimal digits: it identifies the image for good."""


class ToolCallPart(TypedDict):
    """The assistant's request to call a tool."""

    type: Literal["tool_call"]
    id: str
    """The tool result refers to it; empty if unknown."""
    name: str
    arguments: str
    """A JSON object, as the model wrote it."""


class ToolResultPart(TypedDict):
    """What a tool gave back."""

    type: Literal["tool_result"]
    tool_call_id: str
    content: str


class ThinkingPart(TypedDict):
    """What a model wrote before its answer, for itself."""

    type: Literal["thinking"]
    thinking: str


Part = TextPart | ImagePart | ToolCallPart | ToolResultPart | ThinkingPart
Content = str | list[Part]


class Message(TypedDict):
    """One turn. `role` is one of ROLES."""

    role: str
    content: Content
    learn: NotRequired[bool]
    """False in an answer that is not to be learnt, where a conversation becomes rows of training
    (data/chat_rows.py); it is nowhere else, and no part of records (examples.py)."""


class UnreadablePart(UserError):
    """A message holds a part that the model cannot read."""


_FIELDS: Mapping[str, tuple[str, ...]] = {
    "text": ("text",),
    "image": ("url",),
    "tool_call": ("id", "name", "arguments"),
    "tool_result": ("tool_call_id", "content"),
    "thinking": ("thinking",),
}
_OPTIONAL: Mapping[str, tuple[str, ...]] = {"image": ("mime", "sha256")}
_WHOSE: Mapping[str, tuple[str, ...]] = {
    "text": ROLES,
    "image": ("user", "tool"),
    "tool_call": ("assistant",),
    "tool_result": ("tool",),
    "thinking": ("assistant",),
}

_BESIDE = ("tool_calls", "reasoning_content", "tool_call_id")
"""What OpenAI's form may have beside the content."""

# ---- reading -----------------------------------------------------------------------------------------------


def check_message(message: object) -> Message:
    """The message as {"role", "content"} and nothing else; it may be in our form or in OpenAI's.

    A content that is a `str` stays one. Raises ValueError naming what is wrong.
    """
    if not isinstance(message, Mapping):
        raise ValueError(f"a message must be an object with role and content, found {kind_of(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"a message has role {role!r}; known roles: {', '.join(ROLES)}")
    if isinstance(content, str) and not any(map(message.get, _BESIDE)):
        return Message(role=role, content=content)  # nearly all are so: data sets have millions
    return Message(role=role, content=_content(role, message))


def _content(role: str, message: Mapping[Any, Any]) -> Content:
    """The content of a message that may have parts, with what stands beside it."""
    content, beside, call = message.get("content"), _beside(role, message), message.get("tool_call_id")
    if isinstance(content, list | tuple):
        parts = [check_part(part) for part in content]
    elif isinstance(content, str):
        parts = [text_part(content)] if content or not beside else []
    elif content is None and beside:
        parts = []
    else:
        raise ValueError(f"the content of a {role} message must be text or parts, found {kind_of(content)}")
    if role == "tool" and isinstance(call, str) and call:
        parts = _result(call, parts)
    parts = [part for part in beside if part["type"] == "thinking"] + parts
    parts += [part for part in beside if part["type"] == "tool_call"]
    for part in parts:
        if role not in _WHOSE[part["type"]]:
            whose = " or ".join(_WHOSE[part["type"]])
            raise ValueError(f"a part of type {part['type']!r} belongs into a message of {whose}, not {role}")
    if isinstance(content, str) and parts == [text_part(content)]:
        return content
    return parts or ""


def check_part(part: object) -> Part:
    """The part with its own fields alone; OpenAI's `image_url` becomes `image`. Raises ValueError."""
    if not isinstance(part, Mapping):
        raise ValueError(f"a part of a content must be an object with a type, found {kind_of(part)}")
    kind = part.get("type")
    if kind == "image_url":
        link = part.get("image_url")
        kind, part = "image", {"url": link.get("url") if isinstance(link, Mapping) else link}
    if not isinstance(kind, str) or kind not in _FIELDS:
        hint = near_match(kind, list(_FIELDS)) if isinstance(kind, str) else f"; known: {', '.join(_FIELDS)}"
        raise ValueError(f"a part of a content is of type {kind!r}{hint}")
    checked = {"type": kind}
    for name in (*_FIELDS[kind], *_OPTIONAL.get(kind, ())):
        value = part.get(name)
        if value is None and name in _OPTIONAL.get(kind, ()):
            continue
        if not isinstance(value, str):
            raise ValueError(f"{name} of a part of type {kind!r} must be text, found {kind_of(value)}")
        checked[name] = value
    if kind == "tool_call" and not checked["name"]:
        raise ValueError("the name of a tool that is called is empty")
    if kind == "image":
        _check_image(checked)
    return cast(Part, checked)


def _check_image(part: Mapping[str, str]) -> None:
    if not part["url"]:
        raise ValueError("url of a part of type 'image' is empty")
    if not re.fullmatch("[0-9a-f]{64}", part.get("sha256", "0" * 64)):
        raise ValueError(f"sha256 of an image must be 64 hexadecimal digits, found {part['sha256']!r:.80}")
    if not part.get("mime", "image/").startswith("image/"):
        raise ValueError(f"mime of an image must begin with image/, found {part['mime']!r:.80}")
    if part["url"].startswith("data:"):
        data_of(part["url"])


def data_of(url: str) -> bytes:
    """The bytes in a URL of the form data:image/png;base64,... Raises ValueError."""
    head, comma, data = url.partition(",")
    if not comma or not re.fullmatch(r"data:image/[\w.+-]+;base64", head):
        raise ValueError(f"an image's data URL must begin with data:image/...;base64, found {url!r:.40}")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("an image's data URL holds no sound base64") from None


def _beside(role: str, message: Mapping[Any, Any]) -> list[Part]:
    """The parts that OpenAI's form keeps beside the content: thinking and tool calls."""
    thought, calls = message.get("reasoning_content"), message.get("tool_calls")
    if calls and role != "assistant":
        raise ValueError("only an assistant's message has tool_calls")
    if role != "assistant":
        return []
    beside: list[Part] = []
    if isinstance(thought, str) and thought:
        beside.append(ThinkingPart(type="thinking", thinking=thought))
    if calls and (isinstance(calls, str | bytes) or not isinstance(calls, Sequence)):
        raise ValueError(f"tool_calls must be a list, found {kind_of(calls)}")
    return [*beside, *(_call(call) for call in calls or ())]


def _call(call: object) -> Part:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise ValueError(
            'a tool call must be an object {"id", "type", "function": {"name", "arguments"}}, '
            f"found {kind_of(call)}"
        )
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):  # as data sets write them
        arguments = json.dumps(arguments, ensure_ascii=False)
    fields = {"id": call.get("id") or "", "name": function.get("name"), "arguments": arguments}
    return check_part({"type": "tool_call", **fields})


def _result(call: str, parts: Sequence[Part]) -> list[Part]:
    """The parts of a tool's message in OpenAI's form: its texts are the result."""
    if any(part["type"] == "tool_result" for part in parts):
        return list(parts)
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    others = [part for part in parts if part["type"] != "text"]
    return [ToolResultPart(type="tool_result", tool_call_id=call, content=text), *others]


def kind_of(value: object) -> str:
    """A value's type and the beginning of its repr, for error messages."""
    return "nothing (null)" if value is None else f"{type(value).__name__} {value!r:.40}"


def text_part(text: str) -> TextPart:
    """A part of text."""
    return TextPart(type="text", text=text)


def parts_of(content: Content) -> list[Part]:
    """The content as parts: a text is one."""
    return [text_part(content)] if isinstance(content, str) else list(content)


def text_of(content: Content) -> str:
    """The text parts of a content joined, other parts left out: for titles and previews."""
    return "".join(part["text"] for part in parts_of(content) if part["type"] == "text")


def is_text(content: Content) -> bool:
    """Whether there is nothing but text in it."""
    return all(part["type"] == "text" for part in parts_of(content))


def joined(first: Content, second: Content) -> Content:
    """One content after the other. Two texts make a text."""
    if isinstance(first, str) and isinstance(second, str):
        return first + second
    return parts_of(first) + parts_of(second)


def image_name(part: ImagePart) -> str:
    """What identifies an image: the SHA-256 of its bytes where it is known, else its reference."""
    if "sha256" in part:
        return part["sha256"]
    url = part["url"]
    return hashlib.sha256(data_of(url)).hexdigest() if url.startswith("data:") else url


# ---- as text -----------------------------------------------------------------------------------------------

OPEN, CLOSE = "<tool_call>", "</tool_call>"
BEFORE_NAME, BEFORE_ARGUMENTS, BEHIND_ARGUMENTS, BETWEEN = '\n{"name": "', '", "arguments": ', "}\n", "\n"
"""The text around name and arguments between the tags, and between two calls, as trained models write it."""


def write_tool_call(name: str, arguments: str) -> str:
    """A tool call as a model writes it, for earlier turns of the assistant. `arguments`: a JSON object, as
    text."""
    return f"{OPEN}{BEFORE_NAME}{name}{BEFORE_ARGUMENTS}{arguments or '{}'}{BEHIND_ARGUMENTS}{CLOSE}"


def write_thinking(thinking: str) -> str:
    """Thinking as DeepSeek-R1 and Qwen3 write it before an answer."""
    return f"<think>\n{thinking}\n</think>\n\n"


def written(content: Content) -> str:
    """The content as a text-only model reads or writes it. Raises UnreadablePart for an image."""
    return _written(content, refuse_image)


def described(content: Content) -> str:
    """The content as text for people and for content ids; an image is written as its name."""
    return _written(content, lambda part: f"[image {image_name(part)}]")


def _written(content: Content, image: Callable[[ImagePart], str]) -> str:
    """The parts as one text. A tool call begins and ends its line, and so does each of several results."""
    if isinstance(content, str):
        return content
    text, before = "", ""
    for part in content:
        kind = part["type"]
        apart = "tool_call" in (kind, before) or before == kind == "tool_result"
        text += (BETWEEN if apart and text else "") + _piece(part, image)
        before = kind
    return text


def _piece(part: Part, image: Callable[[ImagePart], str]) -> str:
    match part["type"]:
        case "text":
            return part["text"]
        case "image":
            return image(part)
        case "tool_call":
            return write_tool_call(part["name"], part["arguments"])
        case "tool_result":
            return part["content"]
        case "thinking":
            return write_thinking(part["thinking"])


def refuse_image(part: ImagePart) -> str:
    raise UnreadablePart(
        f"a message holds an image ({part['url'][:40]}), and this model reads text only: leave the image out"
    )


# ---- writing for others ------------------------------------------------------------------------------------


def to_openai(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """The messages in OpenAI's form, which `check_message` reads. Messages with plain texts do not change.

    Their form has thinking, then text and images, then tool calls, and one tool result in a message. A
    message of ours with another order, or with several results, becomes several messages.
    """
    return [turn for message in messages for turn in _turns(message)]


_PLACES = {"tool_result": 0, "thinking": 0, "text": 1, "image": 1, "tool_call": 2}
"""The order of parts in a message of OpenAI's form; at most one part of order 0."""


def _turns(message: Message) -> list[dict[str, Any]]:
    if isinstance(message["content"], str) or not message["content"]:
        return [dict(message)]
    groups: list[list[Part]] = []
    for part in message["content"]:
        place = _PLACES[part["type"]]
        if not groups or place == 0 or place < _PLACES[groups[-1][-1]["type"]]:
            groups.append([])
        groups[-1].append(part)
    return [_turn(message["role"], group) for group in groups]


def _turn(role: str, parts: Sequence[Part]) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": role}
    thoughts = [part["thinking"] for part in parts if part["type"] == "thinking"]
    calls = [part for part in parts if part["type"] == "tool_call"]
    shown: list[Part] = [part for part in parts if part["type"] in ("text", "image")]
    for part in parts:
        if part["type"] == "tool_result":
            turn["tool_call_id"] = part["tool_call_id"]
            shown.insert(0, text_part(part["content"]))
    if thoughts:
        turn["reasoning_content"] = "".join(thoughts)
    if is_text(shown):
        turn["content"] = text_of(shown) if shown or not calls else None
    else:
        turn["content"] = [
            {"type": "image_url", "image_url": {"url": part["url"]}} if part["type"] == "image" else part
            for part in shown
        ]
    if calls:
        turn["tool_calls"] = [
            {
                "id": part["id"],
                "type": "function",
                "function": {"name": part["name"], "arguments": part["arguments"]},
            }
            for part in calls
        ]
    return turn
