"""LiteLLM against a server: litellm_asks.py URL MODEL. Prints what it got, as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import litellm

url, model = sys.argv[1:]
there: dict[str, Any] = {"api_base": f"{url}/v1", "api_key": "unused"}
where: dict[str, Any] = {"model": f"openai/{model}", **there}
hello: list[Any] = [{"role": "user", "content": "hello"}]
schema = {
    "type": "object",
    "properties": {"town": {"enum": ["Oslo", "Rome"]}},
    "required": ["town"],
    "additionalProperties": False,
}
form = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema, "strict": True}}
tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}

whole = litellm.completion(messages=hello, temperature=0, user="anna", **where)
pieces = litellm.completion(messages=hello, temperature=0, stream=True, **where)
streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces)
shaped = litellm.completion(messages=hello, response_format=form, **where)
first = litellm.completion(messages=hello, tools=[tool], tool_choice="required", max_tokens=200, **where)
message = first.choices[0].message
results = [{"role": "tool", "tool_call_id": call.id, "content": "4"} for call in message.tool_calls]
after = litellm.completion(messages=[*hello, message, *results], tools=[tool], max_tokens=4, **where)
likely = litellm.completion(messages=hello, temperature=0, logprobs=True, top_logprobs=2, **where)
vectors = litellm.embedding(input=["hello", "name?"], encoding_format="float", **where)
text = litellm.text_completion(
    model=f"text-completion-openai/{model}", prompt="Once", max_tokens=4, temperature=0, **there
)
try:
    litellm.completion(messages=[{"role": "user", "content": "long " * 3000}], **where)
    refused = ""
except litellm.exceptions.BadRequestError as error:
    refused = type(error).__name__
print(
    json.dumps(
        {
            "whole": whole.choices[0].message.content,
            "streamed": streamed,
            "shaped": shaped.choices[0].message.content,
            "call": [call.function.arguments for call in message.tool_calls],
            "after": after.choices[0].finish_reason,
            "likely": len(likely.choices[0].logprobs.content),
            "vectors": len(vectors.data),
            "text": text.choices[0].text,
            "refused": refused,
        }
    )
)
