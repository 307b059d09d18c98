"""Prometheus figures: read with Prometheus' own parser, from a server that has worked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from chatwright.generate.engine import Engine
from chatwright.generate.request import Request
from chatwright.generate.sampling import Sampling
from chatwright.model.gpt import GPT
from chatwright.serve.pool import ModelPool, Spec
from chatwright.tokenizer import Tokenizer
from support.serving import GatedEngine, Running, TinyModel, run_server
from support.waiting import wait_until

BODY = {"model": "tiny/taught", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
MODEL = {"model_name": "tiny/taught"}
Figures = Callable[..., float]


def post(server: Running, **change: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json={**BODY, **change}, timeout=30)


def scrape(url: str) -> Figures:
    """A function that gives the value of a sample by name and labels; 0 where there is none."""
    response = httpx.get(f"{url}/metrics", timeout=30)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    samples = [
        sample for family in text_string_to_metric_families(response.text) for sample in family.samples
    ]

    def figure(name: str, **labels: str) -> float:
        found = [one.value for one in samples if one.name == name and labels.items() <= one.labels.items()]
        return sum(found)

    return figure


def test_tokens_and_latencies_are_counted(server: Running) -> None:
    before = scrape(server.url)
    assert before("chatwright_generation_tokens_total") == 0
    whole = post(server).json()["usage"]
    streamed = post(server, stream=True, stream_options={"include_usage": True}).text
    usage = json.loads(streamed.split("data: ")[-2])["usage"]
    assert usage["completion_tokens"] == whole["completion_tokens"]
    after = scrape(server.url)
    tokens = 2 * whole["completion_tokens"]
    assert after("chatwright_generation_tokens_total", **MODEL) == tokens
    assert after("chatwright_prompt_tokens_total", **MODEL) == 2 * whole["prompt_tokens"]
    assert (
        after("chatwright_prompt_tokens_cached_total", **MODEL) == whole["prompt_tokens"] - 1
    )  # all but the newest
    assert after("chatwright_time_to_first_token_seconds_count", **MODEL) == 2
    assert after("chatwright_inter_token_latency_seconds_count", **MODEL) == tokens - 2
    assert after("chatwright_e2e_request_latency_seconds_count", **MODEL) == 2
    first, rest, all_of_it = (
        after(f"chatwright_{name}_seconds_sum")
        for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency")
    )
    assert min(first, rest) > 0
    assert first + rest == pytest.approx(all_of_it, rel=0.05)  # the last token is the end
    assert after("chatwright_answers_total", finished_reason="stop", **MODEL) == 2
    steps, rows = after("chatwright_engine_steps_total"), after("chatwright_engine_step_rows_total")
    assert steps == rows == tokens  # one answer at a time: a row a step


def test_latencies_are_those_of_the_engine_and_not_of_a_slow_reader(server: Running) -> None:
    engine = server.model.engine
    engine.allow(3)
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json={**BODY, "stream": True}) as response:
        between = "chatwright_inter_token_latency_seconds_count"
        wait_until(
            lambda: scrape(server.url)(between) == 2, "three tokens to be counted"
        )  # and nobody has read anything
        engine.allow(float("inf"))
        response.read()


def test_what_is_running_and_waiting(server: Running) -> None:
    engine = server.model.engine
    engine.allow(3)
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json={**BODY, "stream": True, "n": 16}):
        wait_until(lambda: engine.allowed <= 0, "the steps")
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json={**BODY, "stream": True, "n": 3}):
            wait_until(lambda: engine.waiting == 3, "the others to wait")
            now = scrape(server.url)
            assert now("chatwright_num_requests_running", **MODEL) == 16
            assert now("chatwright_num_requests_waiting", **MODEL) == 3
            assert now("chatwright_http_requests_in_flight") == 3  # with the scrape
            assert 0 < now("chatwright_kv_cache_usage_ratio", **MODEL) < 1
            assert now("chatwright_engine_step_rows_total") > 16
    # The engine stays held (it steps only to let go of who left): released now, it could come to the end of
    # an answer before the server has seen that the client is gone, and that answer would count as stopped.
    wait_until(
        lambda: scrape(server.url)("chatwright_answers_total", finished_reason="cancelled") == 19,
        "both to end",
    )
    after = scrape(server.url)
    assert after("chatwright_num_requests_running") == after("chatwright_num_requests_waiting") == 0
    assert after("chatwright_kv_cache_usage_ratio") == 0
    assert after("chatwright_http_requests_in_flight") == 1


def test_requests_are_counted_by_route_and_status(server: Running) -> None:
    post(server)
    post(server, model="other")
    post(server, model=None)
    for path in (
        "/nothing",
        "/v1/models/a",
        "/v1/models/b",
        "/static/chat.js",
        "/static/nothing",
        "/wp-login.php",
        "/health",
    ):
        httpx.get(f"{server.url}{path}")
    httpx.request("PROPFIND", f"{server.url}/coffee")
    httpx.get(f"{server.url}/health", headers={"host": "evil.example"})
    now = scrape(server.url)

    def count(**labels: str) -> float:
        return now("chatwright_http_requests_total", **labels)

    chat = "/v1/chat/completions"
    assert count(route=chat, status="200", method="POST", **MODEL) == 1
    assert count(route=chat, status="404", model_name="") == 1  # a name that a client made up is no label
    assert count(route=chat, status="400") == 1
    assert count(route="/v1/models/{name:path}", status="404") == 2
    assert count(route="/static", status="200") == count(route="/static", status="404") == 1
    assert count(route="none", status="404", method="GET") == 2
    assert count(route="none", method="other") == 1
    assert (count(route="/health", status="200"), count(status="403")) == (1, 1)
    assert not re.search("wp-login|coffee|PROPFIND|/nothing", httpx.get(f"{server.url}/metrics").text)


def test_models_come_and_go(taught: tuple[GPT, Tokenizer]) -> None:
    from chatwright.serve.app import create_app

    size = TinyModel(*taught).memory_bytes
    specs = [Spec("a", "-"), Spec("b", "-")]
    pool = ModelPool(specs, budget=int(1.5 * size), loader=lambda _: TinyModel(*taught))
    transport = httpx.ASGITransport(create_app(pool))

    async def check() -> None:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:

            async def figures() -> dict[tuple[str, str], float]:
                text = (await client.get("/metrics")).text
                families = text_string_to_metric_families(text)
                samples = [one for family in families for one in family.samples]
                return {(one.name, one.labels.get("model_name", "")): one.value for one in samples}

            now = await figures()
            assert (now["chatwright_model_loaded", "a"], now["chatwright_model_memory_bytes", "a"]) == (0, 0)
            tokens = 0.0
            for model in ("a", "b", "a"):
                answer = await client.post("/v1/chat/completions", json={**BODY, "model": model})
                assert answer.status_code == 200
                now = await figures()
                other = "b" if model == "a" else "a"
                loaded = {name: now["chatwright_model_loaded", name] for name in ("a", "b")}
                assert loaded == {model: 1, other: 0}
                assert (
                    now["chatwright_model_memory_bytes", model],
                    now["chatwright_model_memory_bytes", other],
                ) == (size, 0)
                tokens = tokens or now["chatwright_generation_tokens_total", "a"]
            assert now["chatwright_generation_tokens_total", "a"] == 2 * tokens  # counters never fall
            assert now["chatwright_generation_tokens_total", "b"] == tokens > 0
            assert now["chatwright_time_to_first_token_seconds_count", "a"] == 2

    import asyncio

    asyncio.run(check())
    pool.close()


def test_two_applications_in_a_process_count_apart(server: Running, taught: tuple[GPT, Tokenizer]) -> None:
    with run_server(TinyModel(*taught)) as other:
        post(server)
        assert scrape(server.url)("chatwright_answers_total") == 1
        assert scrape(other.url)("chatwright_answers_total") == 0


def test_openmetrics_for_who_asks_for_it(server: Running) -> None:
    post(server)
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    response = httpx.get(f"{server.url}/metrics", headers=accept)
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    names = {family.name for family in parse_openmetrics(response.text)}
    assert {"chatwright_generation_tokens", "chatwright_time_to_first_token_seconds"} <= names


def test_every_figure_is_documented_and_every_one_documented_exists(server: Running) -> None:
    post(server)
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    real = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    text = (Path(__file__).parents[2] / "docs" / "guide" / "serving.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(chatwright_\w+)`", text, re.MULTILINE))
    assert documented == {
        name for name in real if name.startswith("chatwright_") and not name.endswith("_created")
    }


def test_steps_and_rows(taught: tuple[GPT, Tokenizer]) -> None:
    """Three requests side by side, of 4, 4 and 2 tokens, all of whose prompts are read in the first step."""
    engine: Engine = GatedEngine(*taught)
    requests = [
        Request((5 + at, 6, 7), Sampling(length, temperature=0.0)) for at, length in enumerate((4, 4, 2))
    ]
    engine.generate(requests)
    assert (engine.stats.steps, engine.stats.rows) == (4, 10)
    engine.step()  # nothing to do
    assert (engine.stats.steps, engine.stats.rows) == (4, 10)
