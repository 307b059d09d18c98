"""instructor against a server: instructor_asks.py URL MODEL. Prints what it got, as JSON."""

from __future__ import annotations

import json
import sys
from typing import Literal

import instructor
import openai
from pydantic import BaseModel, ConfigDict, field_validator

url, model = sys.argv[1:]
tries: list[str] = []


class Mood(BaseModel):
    """How somebody feels."""

    model_config = ConfigDict(extra="forbid")  # a tiny model would write properties of its own for ever

    mood: Literal["good", "bad"]
    score: Literal[1, 2, 3]

    @field_validator("mood")
    @classmethod
    def _only_the_third_time(cls, mood: str) -> str:
        tries.append(mood)
        if len(tries) < 3:
            raise ValueError("not convincing, try again")
        return mood


found = {}
for mode in ("TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"):
    if not hasattr(instructor.Mode, mode):
        continue
    tries.clear()
    client = instructor.from_openai(
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0), mode=instructor.Mode[mode]
    )
    answer = client.chat.completions.create(
        model=model,
        response_model=Mood,
        max_retries=3,
        temperature=1,
        max_tokens=300,
        **({"parallel_tool_calls": False} if mode.startswith("TOOLS") else {}),
        messages=[{"role": "user", "content": "hello"}],
    )
    found[mode] = {"tries": len(tries), **answer.model_dump()}
print(json.dumps(found))
