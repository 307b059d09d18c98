"""Every parameter that OpenAI documents, and those of others: honoured, harmless, or refused by name.

The types of the installed `openai` package are the documented list: a parameter that comes with a new version
and stands in no table fails here.
"""

from __future__ import annotations

import copy
import json
import sys
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import write_api_docs
from openai.types.chat import completion_create_params as of_chat
from openai.types.completion_create_params import CompletionCreateParamsBase
from openai.types.embedding_create_params import EmbeddingCreateParams
from openai.types.responses.response_create_params import ResponseCreateParamsBase

from chatwright.generate.sampling import Sampling
from chatwright.serve.api.chat import ChatRequest
from chatwright.serve.api.parameters import effort_variables
from chatwright.serve.errors import ApiError
from support.serving import DIALOGUES, Running, TinyModel, run_server

DOCUMENTED: dict[str, Any] = {
    "POST /v1/chat/completions": of_chat.CompletionCreateParamsBase,
    "POST /v1/completions": CompletionCreateParamsBase,
    "POST /v1/responses": ResponseCreateParamsBase,
    "POST /v1/embeddings": EmbeddingCreateParams,
}
PLAIN: dict[str, dict[str, Any]] = {
    "POST /v1/chat/completions": {
        "model": "tiny/taught",
        "messages": [{"role": "user", "content": "hello"}],
        "temperature": 0,
        "max_tokens": 24,
    },
    "POST /v1/completions": {
        "model": "tiny/taught",
        "prompt": "Once",
        "temperature": 0,
        "max_tokens": 6,
    },
    "POST /v1/responses": {
        "model": "tiny/taught",
        "input": "hello",
        "temperature": 0,
        "max_output_tokens": 24,
    },
    "POST /v1/embeddings": {"model": "tiny/taught", "input": "hello"},
}
SAMPLES: dict[str, Any] = {
    "user": "u-1",
    "safety_identifier": "u-1",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "flex",
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "priority": 3,
    "request_id": "r",
    "cache_prompt": False,
    "id_slot": 1,
    "keep_alive": "5m",
    "prediction": {"type": "content", "content": "Bye!"},
    "max_tool_calls": 3,
    "stream_options": {"include_obfuscation": True},
}
"""What clients send for harmless parameters."""
WRONG: dict[str, Any] = {
    "best_of": 3,
    "suffix": " end",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "modalities": ["text", "audio"],
    "verbosity": "low",
    "background": True,
    "response_format": {"type": "json_object"},
}
"""Values of refused parameters that ask for something; {"x": 1} does for the others."""


def ask(server: Running, route: str, **more: Any) -> httpx.Response:
    path = route.partition(" ")[2]
    return httpx.post(f"{server.url}{path}", json={**PLAIN[route], **more}, timeout=60)


def said(response: httpx.Response) -> Any:
    """What the model answered."""
    assert response.status_code == 200, response.text
    body = response.json()
    if "data" in body:
        return body["data"][0]["embedding"]
    return body["output"][0]["content"] if "output" in body else body["choices"]


def without_ids(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


@pytest.mark.parametrize("route", DOCUMENTED)
def test_every_documented_parameter_is_known(route: str) -> None:
    body = write_api_docs.BODIES[route]
    documented = set(typing.get_type_hints(DOCUMENTED[route]))
    known = {*write_api_docs.honoured(body), *body.harmless, *body.refused}
    assert documented <= known, f"{documented - known} stand in no table of {body.__name__}"


@pytest.mark.parametrize("route", DOCUMENTED)
def test_harmless_parameters_change_nothing(server: Running, route: str) -> None:
    names = write_api_docs.harmless(write_api_docs.BODIES[route])
    assert set(names) <= set(SAMPLES), "a harmless parameter without an example here"
    plain = said(ask(server, route))
    together = {name: SAMPLES[name] for name in names}
    assert without_ids(said(ask(server, route, **together))) == without_ids(plain)
    assert without_ids(said(ask(server, route, **dict.fromkeys(names)))) == without_ids(plain)


@pytest.mark.parametrize("route", DOCUMENTED)
def test_refused_parameters_are_named(server: Running, route: str) -> None:
    body = write_api_docs.BODIES[route]
    for name in body.refused:
        response = ask(server, route, **{name: WRONG.get(name, {"x": 1})})
        assert response.status_code == 400, name
        error = response.json()["error"]
        assert (error["param"], error["code"]) == (name, "unsupported_parameter"), error
        assert name in error["message"]
        assert error["type"] == "invalid_request_error"
    nothing = {name: values[0] for name, values in body.refused.items() if values and name != "function_call"}
    assert without_ids(said(ask(server, route, **nothing))) == without_ids(said(ask(server, route)))
    nulls = dict.fromkeys(body.refused)
    assert without_ids(said(ask(server, route, **nulls))) == without_ids(said(ask(server, route)))


@pytest.mark.parametrize("route", DOCUMENTED)
def test_an_honoured_parameter_of_the_wrong_kind_is_named(server: Running, route: str) -> None:
    for name in write_api_docs.honoured(write_api_docs.BODIES[route]):
        error = ask(server, route, **{name: {"no": "sense"}}).json().get("error")
        if name in (
            "metadata",
            "guided_json",
            "json_schema",
            "logit_bias",
            "chat_template_kwargs",
        ):  # objects, of whatever holds
            continue
        assert error is not None, name
        assert error["param"].partition(".")[0].partition("[")[0] == name, error


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-8, 1e-5, 0.0001, 0.001])
def test_tiny_temperatures_are_as_good_as_greedy(server: Running, temperature: float) -> None:
    for route, name in (("POST /v1/chat/completions", "hello"), ("POST /v1/responses", "hello")):
        content = json.dumps(said(ask(server, route, temperature=temperature)))
        assert DIALOGUES[name] in content
    whole = ask(server, "POST /v1/completions", temperature=temperature, seed=1)
    greedy = ask(server, "POST /v1/completions")
    if temperature < 1e-4:
        assert said(whole) == said(greedy)


@pytest.mark.parametrize("top_p", [0, 0.0, 1e-300, 1e-9])
def test_top_p_of_0_takes_the_likeliest_token(server: Running, top_p: float) -> None:
    for route in list(DOCUMENTED)[:3]:
        warm = ask(server, route, temperature=2, top_p=top_p)
        assert without_ids(said(warm)) == without_ids(said(ask(server, route)))


def test_any_seed_of_64_bits(server: Running) -> None:
    def drawn(seed: int | None) -> Any:
        route = "POST /v1/completions"
        return said(ask(server, route, temperature=2, seed=seed, n=2, max_tokens=12))

    for seed in (0, 1, -1, 2**62, 2**63 - 1, -(2**63), 9223372036854776000, -9223372036854776000, 2**64 - 1):
        assert drawn(seed) == drawn(seed), seed
    assert drawn(-1) != drawn(1)
    first, second = drawn(-2)
    assert first != second
    assert drawn(-1)[0]["text"] == second["text"]  # answer k has seed + k
    for wrong in (2**64, -(2**64), 1.5, "1"):
        error = ask(server, "POST /v1/completions", seed=wrong).json()["error"]
        assert error["param"] == "seed"


def test_the_ends_of_all_ranges_are_taken(server: Running) -> None:
    ends: list[dict[str, Any]] = [
        {"temperature": 2, "presence_penalty": -2, "frequency_penalty": 2},
        {"temperature": 0, "presence_penalty": 2.0, "frequency_penalty": -2.0},
        {"top_p": 1, "logit_bias": {"5": -100, "6": 100.0}},
        {"stop": None, "max_tokens": None, "n": None, "seed": None, "logit_bias": None, "stream": None},
        {"stop": ["a", "b", "c", "d"]},
        {"stop": "?", "logprobs": True, "top_logprobs": 20, "n": 3},
        {"stop": [], "logprobs": True, "top_logprobs": 0},
        {"max_completion_tokens": 5, "max_tokens": None, "tools": [], "tool_choice": "auto"},
        {
            "reasoning_effort": "high",
            "verbosity": "medium",
            "modalities": ["text"],
            "parallel_tool_calls": True,
        },
    ]
    for settings in ends:
        response = ask(server, "POST /v1/chat/completions", **settings)
        assert response.status_code == 200, (settings, response.text)
    for most in (
        {"max_tokens": 9, "max_completion_tokens": 4},
        {"max_tokens": 4, "max_completion_tokens": 9},
    ):
        usage = ask(server, "POST /v1/chat/completions", **most).json()["usage"]
        assert usage["completion_tokens"] == 4  # neither is ignored


def test_more_answers_than_the_server_gives_at_a_time_are_no_matter_of_waiting(tiny: TinyModel) -> None:
    with run_server(tiny, max_requests=3) as server:
        for route, more in (("chat/completions", {"n": 4}), ("completions", {"n": 2, "prompt": ["a", "b"]})):
            response = ask(server, f"POST /v1/{route}", **more)
            assert response.status_code == 400, response.text
            assert "at most 3 (--max_requests)" in response.json()["error"]["message"]
        assert ask(server, "POST /v1/chat/completions", n=3).status_code == 200


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "messages[0].weight"),
        ({"messages": [{"role": "user", "content": "x", "prefix": True}]}, "messages[0].prefix"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}]},
            "messages[0].content[0].y",
        ),
        ({"messages": [{"role": "assistant", "content": None, "refusal": "no"}]}, "messages[0].refusal"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "long " * 400}]}, "messages"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"stream_options": {"include_use": True}}, "stream_options.include_use"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "f", "cache": 1}}]}, "tools[0].function.cache"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools"),
        ({"tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tool_choice": "wizard"}, "tool_choice"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"nonsense": None}, "nonsense"),
    ],
    ids=str,
)
def test_errors_name_the_field(server: Running, change: dict[str, Any], param: str) -> None:
    response = ask(server, "POST /v1/chat/completions", **change)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": "x", "weight": 1}]}, "input[0].weight"),
        ({"input": "long " * 400}, "input"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"verbosity": "high"}}, "text.verbosity"),
        ({"reasoning": {"mode": "x"}}, "reasoning.mode"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"include": ["no.such"]}, "include[0]"),
    ],
    ids=str,
)
def test_errors_of_responses_name_the_field(server: Running, change: dict[str, Any], param: str) -> None:
    response = ask(server, "POST /v1/responses", **change)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_what_other_programs_put_into_messages_is_taken(server: Running) -> None:
    marked = {"type": "text", "text": "hello", "cache_control": {"type": "ephemeral"}}
    turns = [
        {"role": "user", "content": "hello", "name": "anna", "type": "text"},
        {
            "role": "assistant",
            "content": "Hm.",
            "refusal": None,
            "audio": None,
            "function_call": None,
            "tool_calls": None,
            "annotations": [],
            "parsed": None,
            "provider_specific_fields": {"a": 1},
        },
        {"role": "user", "content": [marked]},
    ]
    assert said(ask(server, "POST /v1/chat/completions", messages=turns))


def test_thoughts_that_are_sent_back_reach_the_model(server: Running) -> None:
    def tokens(**more: str) -> int:
        turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Hm.", **more}]
        turns.append({"role": "user", "content": "name?"})
        response = ask(server, "POST /v1/chat/completions", messages=turns)
        return int(response.json()["usage"]["prompt_tokens"])

    assert tokens(reasoning_content="a small thought") == tokens(reasoning="a small thought") > tokens() + 5


def test_a_long_conversation_is_cut_only_where_that_is_allowed(server: Running) -> None:
    turns = [{"role": role, "content": "many words " * 8} for _ in range(6) for role in ("user", "assistant")]
    turns.append({"role": "user", "content": "hello"})
    assert ask(server, "POST /v1/responses", input=turns, truncation="auto").status_code == 200
    error = ask(server, "POST /v1/responses", input=turns, truncation="disabled").json()["error"]
    assert (error["param"], error["code"]) == ("input", "context_length_exceeded")


def test_responses_give_log_probabilities(server: Running) -> None:
    route = "POST /v1/responses"
    plain = ask(server, route).json()["output"][0]["content"][0]
    assert plain["logprobs"] == []
    for more in ({"include": ["message.output_text.logprobs"], "top_logprobs": 2}, {"top_logprobs": 2}):
        part = ask(server, route, **more).json()["output"][0]["content"][0]
        assert part["text"] == plain["text"] == "".join(one["token"] for one in part["logprobs"])
        assert all(len(one["top_logprobs"]) == 2 for one in part["logprobs"])
    streamed = ask(server, route, stream=True, top_logprobs=2, input="snowman")
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: ")]
    deltas = [one for one in events if one["type"] == "response.output_text.delta"]
    tokens = [token for one in deltas for token in one["logprobs"]]
    assert b"".join(bytes(one["bytes"]) for one in tokens).decode() == DIALOGUES["snowman"]
    (done,) = (one for one in events if one["type"] == "response.output_text.done")
    assert done["logprobs"] == tokens


def test_effort_reaches_a_template_that_knows_of_thinking(server: Running) -> None:
    def variables(source: str, effort: str | None) -> dict[str, Any]:
        return effort_variables(SimpleNamespace(source=source), effort, "reasoning_effort")  # type: ignore[arg-type]

    assert variables("{{ reasoning_effort }}", "high") == {"reasoning_effort": "high"}
    assert variables("{{ enable_thinking }}", "none") == {"enable_thinking": False}
    assert variables("{{ enable_thinking }}", "medium") == {"enable_thinking": True}
    assert variables("{{ enable_thinking }}", None) == variables("{{ messages }}", "low") == {}
    with pytest.raises(ApiError, match="turned off \\(none\\) or left on \\(medium\\)") as caught:
        variables("{{ enable_thinking }}", "low")
    assert (caught.value.param, caught.value.code) == ("reasoning_effort", "unsupported_value")
    for route, more in (
        ("POST /v1/chat/completions", {"reasoning_effort": "none"}),
        ("POST /v1/responses", {"reasoning": {"effort": "high", "summary": "auto"}}),
    ):
        assert without_ids(said(ask(server, route, **more))) == without_ids(said(ask(server, route)))


def test_variables_and_documents_of_a_template(tiny: TinyModel) -> None:
    assert tiny.template is not None
    own = copy.copy(tiny.template)
    opening = "{% if enable_thinking is defined and not enable_thinking %}no thoughts {% endif %}"
    opening += "{% for one in documents or [] %}{{ one.text }}{% endfor %}"
    own.source = opening + own.source
    tiny.template = own
    route = "POST /v1/chat/completions"
    with run_server(tiny) as server:

        def tokens(**more: Any) -> int:
            response = ask(server, route, max_tokens=1, **more)
            assert response.status_code == 200, response.text
            return int(response.json()["usage"]["prompt_tokens"])

        off = tokens(chat_template_kwargs={"enable_thinking": False})
        assert off == tokens(reasoning_effort="none") > tokens() == tokens(reasoning_effort="medium")
        assert tokens(chat_template_kwargs={}) == tokens(documents=[]) == tokens()
        assert tokens(documents=[{"text": "a small fact"}]) > tokens()
        error = ask(server, route, chat_template_kwargs={"messages": []}).json()["error"]
        assert (error["param"], error["type"]) == ("messages", "invalid_request_error")


def test_documents_are_refused_where_a_template_has_no_place_for_them(server: Running) -> None:
    error = ask(server, "POST /v1/chat/completions", documents=[{"text": "x"}]).json()["error"]
    assert (error["param"], error["code"]) == ("documents", "unsupported_parameter")


def test_tokens_of_the_model_s_own_defaults() -> None:
    body = ChatRequest(model="m", messages=[{"role": "user", "content": "Hi"}], temperature=1e-9, seed=-5)
    assert body.sampling({}).greedy
    assert body.sampling({}).seed == -5
    assert Sampling(top_p=0.0).greedy


def test_the_guide_lists_what_the_server_knows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert write_api_docs.block() in write_api_docs.FILE.read_text(encoding="utf-8")
    page = tmp_path / "serving.md"
    page.write_text(f"Before.\n{write_api_docs.BEGIN}\nold\n{write_api_docs.END}\nAfter.\n", encoding="utf-8")
    monkeypatch.setattr(write_api_docs, "FILE", page)
    monkeypatch.setattr(sys, "argv", ["write_api_docs.py", "--check"])
    assert write_api_docs.main() == 1
    monkeypatch.setattr(sys, "argv", ["write_api_docs.py"])
    assert write_api_docs.main() == 0
    written = page.read_text(encoding="utf-8")
    assert written.startswith("Before.\n") and written.endswith("After.\n") and "`temperature`" in written
    monkeypatch.setattr(sys, "argv", ["write_api_docs.py", "--check"])
    assert write_api_docs.main() == 0
