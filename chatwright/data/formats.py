"""Records in common formats -> a conversation, or a comparison of answers.

Only the columns of a record decide its format (null ones count as absent). A record that fits no format, or
more than one, is refused; a `format` in the settings decides instead.

Conversations, by the columns of a record:

* `messages` or `conversations`, a list of {"role", "content"}: `openai`. Our own records are the same with an
  `id`, which is made anew.
* `messages` or `conversations`, a list of {"from", "value"}: `sharegpt`. human is the user, gpt the assistant
  (`SPEAKERS`).
* `instruction` and `output` (and `input`): `alpaca`, one exchange. The user's turn is Alpaca's standard
  prompt. With the format `alpaca-plain`, which is never chosen by itself, it is the instruction, a blank line
  and the input.

A text in a column `system` stands before the conversation as its system message. OpenAI's `tool_calls`,
`tool_call_id` and `reasoning_content`, and ShareGPT's `function_call` (JSON with name and arguments),
become parts of contents (messages.py).

Comparisons, with a column `annotator` where the annotator is known:

* `responses` and `scores`, with `prompt`: `ranked`, K answers. Higher scores are preferred, equal ones tie.
* `chosen` and `rejected`, with `prompt`: `pairs`, scores 1 and 0. The answers are texts, or messages behind
  the prompt, which they may repeat.
* `chosen` and `rejected` alone: `pairs`. Both are lists of messages whose beginning is the same, or texts of
  turns that begin with "\\n\\nHuman:" and "\\n\\nAssistant:".

A prompt is a text (the user's turn; or such turns) or a list of messages, as above.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from chatwright.data.examples import Comparison, Dialogue
from chatwright.messages import (
    Message,
    Part,
    ToolCallPart,
    check_message,
    is_text,
    parts_of,
    text_of,
    written,
)

Format = Literal["auto", "openai", "sharegpt", "alpaca", "alpaca-plain"]
"""Format of conversations; `auto` looks at the columns of each record."""
PreferenceFormat = Literal["auto", "ranked", "pairs"]
"""Format of comparisons; `auto` looks at the columns of each record."""

LISTS = ("messages", "conversations")
"""Columns that hold a list of messages."""
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function_call": "assistant",
    "observation": "tool",
}
"""ShareGPT's `from` -> role."""
STRUCTURED = ("function_call", "audio")
"""Fields of OpenAI's messages that ours do not have."""

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
"""The prompt of Stanford Alpaca (Taori et al. 2023) for an instruction without an input."""
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response "
    "that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
"""The same for an instruction with an input."""


def dialogue(row: Mapping[str, Any], format: Format = "auto", column: str = "") -> Dialogue:
    """The conversation of a record. `column` names the list of messages where it has another name.

    Raises ValueError: no format fits, or more than one; a message that cannot be one; nothing to learn from
    it.
    """
    if format not in get_args(Format):
        raise ValueError(f"format {format!r} is none of {', '.join(get_args(Format))}")
    if format == "auto" and _is_alpaca(row, column):
        format = "alpaca"
    if format in ("alpaca", "alpaca-plain"):
        return Dialogue.of(_alpaca(row, plain=format == "alpaca-plain"))
    return Dialogue.of(_under_system(row, _turns(row, _list_column(row, column), format)))


def _present(row: Mapping[str, Any], *names: str) -> list[str]:
    """The named columns that are not null; Parquet and the hub fill absent ones with null."""
    return [name for name in names if row.get(name) is not None]


def _is_alpaca(row: Mapping[str, Any], column: str) -> bool:
    """Whether a record is Alpaca's. Raises ValueError when it could be that and a list of messages."""
    if column or _present(row, "instruction", "output") != ["instruction", "output"]:
        return False
    others = _present(row, *LISTS)
    if others:
        raise ValueError(
            f"columns of two formats: instruction, output and {', '.join(others)}; choose one by `format`, "
            "or by #column"
        )
    return True


def _list_column(row: Mapping[str, Any], column: str) -> str:
    """The column with the messages. Raises ValueError unless there is exactly one."""
    found = [column] if column else _present(row, *LISTS)
    if len(found) == 1 and found[0] in row:
        return found[0]
    if len(found) > 1:
        raise ValueError(f"both of the columns {', '.join(found)}; choose one by #column")
    wanted = repr(column) if column else "'messages' (or 'conversations', or 'instruction' and 'output')"
    raise ValueError(f"no column {wanted}; the columns found are: {', '.join(map(str, row)) or 'none'}")


def _turns(row: Mapping[str, Any], column: str, format: Format = "auto") -> list[Message]:
    """The messages in a column, in OpenAI's or ShareGPT's format."""
    listed = row[column]
    if isinstance(listed, str | bytes) or not isinstance(listed, Sequence):
        raise ValueError(f"{column} must be a list, found {type(listed).__name__}")
    if not listed:
        raise ValueError(f"{column} is empty")
    if format == "auto":
        format = _way(listed[0])
    return [_said(turn) if format == "sharegpt" else _message(turn) for turn in listed]


def _way(turn: Any) -> Format:
    """The format of a list of messages, from its first message."""
    if not isinstance(turn, Mapping):
        raise ValueError(
            f"a message must be an object with role and content, found {type(turn).__name__} {turn!r:.40}"
        )
    found = _present(turn, "role", "from")
    if len(found) != 1:
        raise ValueError(
            "a message has both role and from"
            if found
            else "a message has neither role (and content) nor from (and value)"
        )
    return "openai" if found == ["role"] else "sharegpt"


def _message(turn: Any) -> Message:
    """A message in OpenAI's format or in ours; `developer` is a system message, and text parts are joined.

    Tool calls, tool results and thinking become parts. Images and what is in `STRUCTURED` are refused.
    """
    if not isinstance(turn, Mapping):
        return check_message(turn)
    _refuse_unlearnt(turn)
    if found := [name for name in STRUCTURED if turn.get(name)]:
        raise ValueError(
            f"a message has {found[0]}, which is not read: write calls as tool_calls, or leave it out"
        )
    role = "system" if turn.get("role") == "developer" else turn.get("role")
    checked = check_message({**turn, "role": role})
    content = checked["content"]
    if any(part["type"] == "image" for part in parts_of(content)):
        raise ValueError(
            "a message's content holds an image, and models here learn from text only: leave the record out"
        )
    return Message(role=checked["role"], content=text_of(content) if is_text(content) else content)


def _said(turn: Any) -> Message:
    """A message in ShareGPT's format."""
    if not isinstance(turn, Mapping):
        raise ValueError(
            f"a message must be an object with from and value, found {type(turn).__name__} {turn!r:.40}"
        )
    _refuse_unlearnt(turn)
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise ValueError(f"a message is from {speaker!r}; known: {', '.join(SPEAKERS)}")
    value = turn.get("value")
    return check_message(
        {"role": SPEAKERS[speaker], "content": _called(value) if speaker == "function_call" else value}
    )


def _called(value: Any) -> list[Part]:
    """The calls in a `function_call` of ShareGPT: a JSON object with name and arguments, or a list of
    them."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    parts: list[Part] = []
    for call in found if isinstance(found, list) and found else [found]:
        name, arguments = (
            (call.get("name"), call.get("arguments")) if isinstance(call, Mapping) else (None, None)
        )
        if not isinstance(name, str) or not isinstance(arguments, Mapping | str):
            raise ValueError(
                f'a function_call must be JSON like {{"name": ..., "arguments": ...}}, found {value!r:.80}'
            )
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        parts.append(ToolCallPart(type="tool_call", id="", name=name, arguments=text))
    return parts


def _refuse_unlearnt(turn: Mapping[str, Any]) -> None:
    """Raise ValueError for OpenAI's `weight` 0, which keeps an answer out of the loss: it must not be learnt
    against its author's intent."""
    if turn.get("weight") not in (None, 1):
        raise ValueError(
            f"a message has weight {turn['weight']!r}: leaving single answers out of the loss is not "
            "supported"
        )


def _under_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """The conversation, preceded by the system message of the column `system`, if there is one."""
    system = row.get("system")
    if system in (None, ""):
        return messages
    if messages[0]["role"] == "system":
        raise ValueError("a column `system`, and a system message in the conversation as well")
    return [check_message({"role": "system", "content": system}), *messages]


def _alpaca(row: Mapping[str, Any], *, plain: bool) -> list[Message]:
    """One exchange from instruction, input and output."""
    parts = {name: row.get(name) for name in ("instruction", "input", "output")}
    parts["input"] = parts["input"] or ""
    for name, value in parts.items():
        if not isinstance(value, str):
            raise ValueError(
                f"{name} must be text, found {'nothing (null)' if value is None else type(value).__name__}"
            )
        if name != "input" and not value.strip():
            raise ValueError(f"{name} is empty")
    if row.get("history"):
        raise ValueError(
            "earlier turns in a column `history` are not read: write such conversations as `messages`"
        )
    if plain:
        asked = "\n\n".join(part for part in (parts["instruction"], parts["input"]) if part)
    else:  # not str.format: the texts may hold braces
        prompt = ALPACA_INPUT if parts["input"] else ALPACA
        asked = re.sub(r"\{(instruction|input)\}", lambda found: str(parts[found[1]]), prompt)
    turns: list[Message] = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": str(parts["output"])},
    ]
    return _under_system(row, turns)


# ---- comparisons -------------------------------------------------------------------------------------------


HH = re.compile(r"\n\n(Human|Assistant):")
"""How turns begin in Anthropic's helpful-harmless data (Bai et al. 2022)."""


def comparison(row: Mapping[str, Any], format: PreferenceFormat = "auto") -> Comparison:
    """The comparison of a record. Raises ValueError as `dialogue` does."""
    if format not in get_args(PreferenceFormat):
        raise ValueError(f"format {format!r} is none of {', '.join(get_args(PreferenceFormat))}")
    ranked, pair = (
        len(_present(row, *names)) == 2 for names in (("responses", "scores"), ("chosen", "rejected"))
    )
    if format == "auto":
        if ranked == pair:
            found = ", ".join(map(str, row)) or "none"
            raise ValueError(
                "columns of two formats: responses, scores and chosen, rejected; choose one by `format`"
                if ranked
                else "no columns 'responses' and 'scores', or 'chosen' and 'rejected'; the columns found "
                f"are: {found}"
            )
        format = "ranked" if ranked else "pairs"
    elif not (ranked if format == "ranked" else pair):
        wanted = "'responses' and 'scores'" if format == "ranked" else "'chosen' and 'rejected'"
        raise ValueError(f"no columns {wanted}; the columns found are: {', '.join(map(str, row)) or 'none'}")
    annotator = _annotator(row)
    if format == "ranked":
        return Comparison.of(_prompt(row), row["responses"], row["scores"], annotator)
    prompt, answers = _pair(row)
    return Comparison.of(prompt, answers, (1.0, 0.0), annotator)


def _annotator(row: Mapping[str, Any]) -> str:
    """The annotator; numbers count as names."""
    found = row.get("annotator")
    if isinstance(found, bool) or not isinstance(found, str | int | None):
        raise ValueError(f"annotator must be a name or a number, found {type(found).__name__}")
    return "" if found is None else str(found)


def _prompt(row: Mapping[str, Any]) -> list[Message]:
    """The conversation up to the answers."""
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        if HH.match(prompt):
            return _spoken(prompt.removesuffix("\n\nAssistant:"))
        return [{"role": "user", "content": prompt}]
    if prompt is None:
        raise ValueError(f"no column 'prompt'; the columns found are: {', '.join(map(str, row))}")
    return _turns(row, "prompt")


def _pair(row: Mapping[str, Any]) -> tuple[list[Message], list[str]]:
    """The prompt and both answers, the preferred one first."""
    kinds = {name: isinstance(row[name], str) for name in ("chosen", "rejected")}
    if len(set(kinds.values())) == 2:
        raise ValueError("one of chosen and rejected is a text, the other is not")
    given = _prompt(row) if row.get("prompt") is not None else None
    if all(kinds.values()) and given is not None:
        spoken = isinstance(row["prompt"], str) and HH.match(row["prompt"])
        return given, [row[name].strip() if spoken else row[name] for name in kinds]
    if all(kinds.values()):
        whole = [_spoken(row[name]) for name in kinds]
    else:
        whole = [_turns(row, name) for name in kinds]
    ends = [_behind(turns, given) for turns in whole]
    prompt = given if given is not None else whole[0][:-1]
    if given is None and whole[0][:-1] != whole[1][:-1]:
        raise ValueError(
            "chosen and rejected differ before their last message: they do not answer the same prompt"
        )
    return prompt, ends


def _behind(turns: list[Message], prompt: list[Message] | None) -> str:
    """The answer at the end of a conversation that may repeat the prompt."""
    if prompt is None:
        if len(turns) < 2:
            raise ValueError(
                "without a column 'prompt', chosen and rejected must hold it before their last message"
            )
        left = turns[-1:]
    else:
        repeated = len(turns) > len(prompt) and turns[: len(prompt)] == prompt
        left = turns[len(prompt) :] if repeated else turns
    if len(left) != 1 or left[0]["role"] != "assistant":
        told = ", ".join(turn["role"] for turn in left) or "nothing"
        raise ValueError(f"behind the prompt there must be one message of the assistant, found: {told}")
    return written(left[0]["content"])


def _spoken(text: str) -> list[Message]:
    """A text of turns that begin with Human: and Assistant: as messages."""
    before, *parts = HH.split(text)
    if before.strip() or not parts:
        raise ValueError(
            'without a column "prompt", texts must begin with "\\n\\nHuman:" (messages are another way)'
        )
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [
        {"role": "user" if who == "Human" else "assistant", "content": said.strip()} for who, said in turns
    ]
