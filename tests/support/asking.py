"""Requests over HTTP, and what streams say."""

from __future__ import annotations

import json
from typing import Any

import httpx

from support.serving import DIALOGUES, Running

STORY = {
    "model": "tiny/taught",
    "messages": [{"role": "user", "content": "story"}],
    "temperature": 0,
    "max_tokens": 200,
}
HELLO = {"model": "tiny/taught", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}


def post(server: Running, body: Any, **settings: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30, **settings)


def events(text: str) -> list[Any]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def text_of(stream: str) -> str:
    return "".join(
        one["choices"][0]["delta"].get("content", "") for one in events(stream) if one.get("choices")
    )


def reasons_of(stream: str) -> list[str]:
    found = [one["choices"][0]["finish_reason"] for one in events(stream) if one.get("choices")]
    return [reason for reason in found if reason]


STORY_TEXT = DIALOGUES["story"]
