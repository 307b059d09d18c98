"""Writes a response of /v1/responses: whole, or as a stream of events."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from chatwright.serve.api.probabilities import TokenProbability
from chatwright.serve.api.reading import CallDelta, Delta, Reading, Whole, event, new_id


class Writer:
    """Writes the response and its events.

    The output of a response is a list of items: a message for the text, if there is any, and one item per
    call.
    """

    def __init__(self, settings: dict[str, Any], reading: Reading, *, logprobs: int | None = None) -> None:
        """`settings`: the fields of the request that the response repeats. `logprobs`: how many of the
        likeliest tokens to report at each position; None for no log-probabilities."""
        self._settings, self._reading, self._logprobs = settings, reading, logprobs
        self._id, self._created = new_id("resp_"), time.time()
        self._items: list[dict[str, Any]] = []
        self._open: int | None = None
        """Index of the item that is being written, or None."""
        self._number = 0
        self._unsaid: list[TokenProbability] = []
        """Tokens whose characters are not complete yet."""

    def _spelled(self, tokens: Sequence[TokenProbability]) -> list[dict[str, Any]]:
        """The log-probabilities of tokens, if they were asked for."""
        if self._logprobs is None:
            return []
        found: list[dict[str, Any]] = self._reading.spelling.chat(tokens, self._logprobs)["content"]
        return found

    def response(self, status: str, **changes: Any) -> dict[str, Any]:
        """The response so far."""
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "output": self._items,
            "previous_response_id": None,
            "usage": None,
            "store": False,
            **self._settings,
            **changes,
        }

    def whole(self, one: Whole) -> dict[str, Any]:
        """The response that is not streamed."""
        if one.text.strip() or not one.calls:
            item = _message(new_id("msg_"), one.text, "completed")
            item["content"][0]["logprobs"] = self._spelled(one.tokens)
            self._items.append(item)
        for call in one.calls:
            self._items.append(_call(call.id, call.name, call.arguments, "completed"))
        return self.ended(one.finish)

    def ended(self, finish: str) -> dict[str, Any]:
        """The response at its end."""
        reading = self._reading
        usage = {
            "input_tokens": reading.prompt_tokens,
            "input_tokens_details": {"cached_tokens": reading.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": reading.new_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": reading.prompt_tokens + reading.new_tokens,
        }
        if finish == "length":
            return self.response(
                "incomplete", incomplete_details={"reason": "max_output_tokens"}, usage=usage
            )
        return self.response("completed", usage=usage)

    async def events(self) -> AsyncGenerator[bytes]:
        """Server-sent events."""
        finish = "length"
        yield self._event("response.created", response=self.response("in_progress"))
        yield self._event("response.in_progress", response=self.response("in_progress"))
        async with aclosing(self._reading.deltas()) as deltas:
            async for delta in deltas:
                for one in self._news(delta):
                    yield one
                finish = delta.finish or finish
        if not self._items:
            yield self._begin(_message(new_id("msg_"), "", "in_progress"))
            yield self._part("added")
        for one in self._close():
            yield one
        ended = self.ended(finish)
        yield self._event(f"response.{ended['status']}", response=ended)

    def failed(self, body: dict[str, Any]) -> bytes:
        """The event of an error in the middle of the stream."""
        error = body["error"]
        return self._event(
            "error", code=error["code"] or error["type"], message=error["message"], param=error["param"]
        )

    def _event(self, kind: str, **values: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return event({"type": kind, "sequence_number": number, **values}, kind)

    def _news(self, delta: Delta) -> list[bytes]:
        events = []
        self._unsaid += delta.tokens
        if delta.text and (delta.text.strip() or self._writes_text()):
            if not self._writes_text():
                events += [
                    *self._close(),
                    self._begin(_message(new_id("msg_"), "", "in_progress")),
                    self._part("added"),
                ]
            self._item["content"][0]["text"] += delta.text
            logprobs, self._unsaid = self._spelled(self._unsaid), []
            self._item["content"][0]["logprobs"] += logprobs
            events.append(
                self._event(
                    "response.output_text.delta",
                    **self._place,
                    content_index=0,
                    delta=delta.text,
                    logprobs=logprobs,
                )
            )
        for call in delta.calls:
            events += self._call_news(call)
        return events

    def _call_news(self, call: CallDelta) -> list[bytes]:
        events = []
        if call.name:
            events += [*self._close(), self._begin(_call(call.id, call.name, "", "in_progress"))]
        if call.arguments:
            self._item["arguments"] += call.arguments
            events.append(
                self._event("response.function_call_arguments.delta", **self._place, delta=call.arguments)
            )
        return events

    @property
    def _item(self) -> dict[str, Any]:
        assert self._open is not None
        return self._items[self._open]

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item["id"], "output_index": self._open}

    def _writes_text(self) -> bool:
        return self._open is not None and self._item["type"] == "message"

    def _begin(self, item: dict[str, Any]) -> bytes:
        self._open = len(self._items)
        self._items.append(item)
        shown = item | ({"content": []} if item["type"] == "message" else {})
        return self._event("response.output_item.added", output_index=self._open, item=shown)

    def _part(self, change: str) -> bytes:
        return self._event(
            f"response.content_part.{change}", **self._place, content_index=0, part=self._item["content"][0]
        )

    def _close(self) -> list[bytes]:
        """The events that end the item being written."""
        if self._open is None:
            return []
        item = self._item
        item["status"] = "completed"
        if item["type"] == "message":
            part = item["content"][0]
            said = {"text": part["text"], "logprobs": part["logprobs"]}
            events = [
                self._event("response.output_text.done", **self._place, content_index=0, **said),
                self._part("done"),
            ]
        else:
            values = {"name": item["name"], "arguments": item["arguments"]}
            events = [self._event("response.function_call_arguments.done", **self._place, **values)]
        events.append(self._event("response.output_item.done", output_index=self._open, item=item))
        self._open = None
        return events


def _message(number: str, text: str, status: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"id": number, "type": "message", "role": "assistant", "status": status, "content": [part]}


def _call(call_id: str, name: str, arguments: str, status: str) -> dict[str, Any]:
    number = new_id("fc_")
    return {
        "id": number,
        "type": "function_call",
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
        "status": status,
    }
