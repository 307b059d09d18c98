"""openai-agents against a server: agents_ask.py URL MODEL. Prints what it got, as JSON.

The tiny model calls a tool where it must. So it must in every turn, and the run ends with the second result.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Literal

import agents
import openai
from agents.models.openai_chatcompletions import OpenAIChatCompletionsModel
from agents.models.openai_responses import OpenAIResponsesModel

url, name = sys.argv[1:]
agents.set_tracing_disabled(True)
client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
called: list[str] = []


@agents.function_tool
def weather(town: Literal["Oslo", "Rome"]) -> str:
    """The weather of a town."""
    called.append(town)
    return f"sunny in {town}"


def after_two(context: Any, results: Any) -> agents.ToolsToFinalOutputResult:
    """The run goes on until the tool has been called twice."""
    return agents.ToolsToFinalOutputResult(is_final_output=len(called) >= 2, final_output=results[-1].output)


found = {}
for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
    called.clear()
    agent = agents.Agent(
        name="tiny",
        instructions="Be brief.",
        model=kind(model=name, openai_client=client),
        model_settings=agents.ModelSettings(
            tool_choice="required", parallel_tool_calls=False, max_tokens=200, temperature=1.0
        ),
        tools=[weather],
        tool_use_behavior=after_two,
        reset_tool_choice=False,
    )
    run = agents.Runner.run_sync(agent, "hello", max_turns=4)
    plain = agents.Agent(
        name="plain",
        model=kind(model=name, openai_client=client),
        model_settings=agents.ModelSettings(temperature=0.0),
    )
    found[kind.__name__] = {
        "called": list(called),
        "final": run.final_output,
        "turns": len(run.raw_responses),
        "plain": agents.Runner.run_sync(plain, "hello").final_output,
    }
print(json.dumps(found))
