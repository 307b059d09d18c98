"""Somebody with a browser of their own, as the page's scripts talk to the server."""

from __future__ import annotations

import json
from typing import Any, Self

import httpx

Json = dict[str, Any]
SURE = {"temperature": 0.0}


class Person:
    """Speaks to a server under a cookie of its own."""

    def __init__(
        self, url: str, *, model: str = "tiny/taught", headers: dict[str, str] | None = None
    ) -> None:
        self.client, self.model = httpx.Client(base_url=url, timeout=30, headers=headers), model
        assert self.client.post("/chat/owner").status_code == 200

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def get(self, path: str, **params: Any) -> Json:
        """JSON of a route that must work."""
        response = self.client.get(path, params=params)
        assert response.status_code == 200, response.text
        return dict(response.json())

    def post(self, path: str, body: Json, *, expect: int = 201) -> Json:
        """JSON of a route that must answer with this status."""
        response = self.client.post(path, json=body)
        assert response.status_code == expect, response.text
        return dict(response.json())

    def begin(self, text: str, **more: Any) -> Json:
        """A new conversation."""
        return self.post(
            "/chat/conversations", {"content": text, "model": self.model, "settings": SURE, **more}
        )

    def ask(self, conversation: str, parent: int, *, settings: Json | None = None, **more: Any) -> Json:
        """Have the message `parent` answered: {"id": the job's, "turn"}."""
        body = {"parent": parent, "model": self.model, "settings": {**SURE, **(settings or {})}, **more}
        return self.post(f"/chat/conversations/{conversation}/answers", body)

    def start(self, text: str, **more: Any) -> tuple[str, str]:
        """A new conversation whose answer is under way: its id and the job's."""
        made = self.begin(text)
        return made["id"], self.ask(made["id"], made["leaf"], **more)["id"]

    def events(self, job: str, after: int = 0) -> list[Json]:
        """A job's events to its end."""
        response = self.client.get(f"/chat/jobs/{job}/events", params={"after": after})
        assert response.status_code == 200, response.text
        return [json.loads(line) for line in response.text.splitlines() if line]

    def answer(self, conversation: str, parent: int, **more: Any) -> Json:
        """Have the message `parent` answered, and wait: the last event."""
        return self.events(self.ask(conversation, parent, **more)["id"])[-1]

    def read(self, conversation: str) -> Json:
        """The whole conversation."""
        return self.get(f"/chat/conversations/{conversation}")

    def shown(self, conversation: str) -> list[Json]:
        """The turns of the branch that is shown."""
        found = self.read(conversation)
        turns = {turn["id"]: turn for turn in found["turns"]}
        branch, leaf = [], found["leaf"]
        while leaf is not None:
            branch.append(turns[leaf])
            leaf = turns[leaf]["parent"]
        return branch[::-1]


def text_of(events: list[Json]) -> str:
    """What the text events say."""
    return "".join(event["text"] for event in events if event["type"] == "text")
