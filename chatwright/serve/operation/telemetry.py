"""Metrics for Prometheus: requests, size of the batches, time to the first token and between tokens.

The names follow vLLM's, with the prefix `chatwright_`; docs/guide/serving.md lists them. Every application
has a registry of its own. State (queue, the engines' counters, memory) is read when Prometheus scrapes;
events (tokens, answers, responses) are counted when they happen.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from chatwright.generate.engine import Stats
from chatwright.serve.operation.lifecycle import Lifecycle
from chatwright.serve.pool import ModelPool
from chatwright.serve.service import ChatService

FIRST_TOKEN = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
NEXT_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5)
WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 240, 480, 960)
"""Upper bounds of the histograms' buckets, in seconds."""

COUNTERS = {
    "prompt_tokens": ("chatwright_prompt_tokens", "Tokens of the prompts that were given a place"),
    "cached_tokens": (
        "chatwright_prompt_tokens_cached",
        "Those of them that were known already and not computed",
    ),
    "new_tokens": ("chatwright_generation_tokens", "Tokens that were chosen"),
    "preempted": (
        "chatwright_num_preemptions",
        "Times that a running request lost its keys and values to others",
    ),
    "steps": ("chatwright_engine_steps", "Steps in which an engine computed something"),
    "rows": (
        "chatwright_engine_step_rows",
        "Requests computed for, added up over the steps: rows / steps is the batch",
    ),
    "proposed": ("chatwright_spec_decode_draft_tokens", "Tokens guessed by prompt lookup"),
    "accepted": ("chatwright_spec_decode_accepted_tokens", "Guesses that were right"),
}
"""Field of the engine's Stats -> the metric's name (`_total` is appended) and meaning."""


class Telemetry:
    """The metrics of one application. Receives the timings of all answers of `pool` once it is made."""

    def __init__(self, pool: ModelPool, lifecycle: Lifecycle) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Asked(pool, lifecycle))
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "chatwright_http_requests",
            "Responses that were sent, or given up because the client had gone (499)",
            ("method", "route", "status", "model_name"),
            registry=self.registry,
        )
        self._answers = Counter(
            "chatwright_answers",
            "Answers that ended, by how they did: stop, length, cancelled, timeout, error",
            ("model_name", "finished_reason"),
            registry=self.registry,
        )
        self._first = self._histogram(
            "time_to_first_token", "From asking the engine to the first token", FIRST_TOKEN
        )
        self._next = self._histogram(
            "inter_token_latency", "From one token of an answer to its next", NEXT_TOKEN
        )
        self._whole = self._histogram(
            "e2e_request_latency", "From asking the engine to the end of the answer", WHOLE
        )
        pool.listeners.append(self)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        full = f"chatwright_{name}_seconds"
        return Histogram(full, meaning, ("model_name",), buckets=buckets, registry=self.registry)

    def first_token(self, model: str, seconds: float) -> None:
        """See `Listener`."""
        self._first.labels(model).observe(seconds)

    def next_token(self, model: str, seconds: float) -> None:
        """See `Listener`."""
        self._next.labels(model).observe(seconds)

    def answered(self, model: str, reason: str, seconds: float) -> None:
        """See `Listener`."""
        self._answers.labels(model, reason).inc()
        self._whole.labels(model).observe(seconds)

    def responded(self, method: str, route: str, status: int, model: str) -> None:
        """A response was sent. Labels must have few values: no path or name that a client chooses."""
        self._requests.labels(method, route, str(status), model).inc()

    def page(self, accept: str) -> tuple[bytes, str]:
        """The metrics in the format that the Accept header asks for, and their content type."""
        encode, kind = choose_encoder(accept)
        return encode(self.registry), kind


class _Asked(Collector):
    """The metrics that are read at every scrape."""

    def __init__(self, pool: ModelPool, lifecycle: Lifecycle) -> None:
        self._pool, self._lifecycle = pool, lifecycle

    def describe(self) -> list[Metric]:
        """Nothing: the names are not checked against other collectors' names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All gauges, and the counters of the engines."""
        pool = self._pool
        yield GaugeMetricFamily(
            "chatwright_draining",
            "1 while the server finishes and takes nothing new",
            self._lifecycle.draining,
        )
        yield GaugeMetricFamily(
            "chatwright_http_requests_in_flight",
            "HTTP requests being served, this one included",
            self._lifecycle.in_flight,
        )
        loaded = GaugeMetricFamily(
            "chatwright_model_loaded", "1 when the model is in memory", labels=["model_name"]
        )
        size = GaugeMetricFamily(
            "chatwright_model_memory_bytes",
            "Weights, packed weights and keys and values of a model in memory",
            labels=["model_name"],
        )
        for name in pool.names:
            loaded.add_metric([name], bool(pool.size(name)))
            size.add_metric([name], pool.size(name))
        yield loaded
        yield size
        yield from _services(pool.services)
        stats = {name: pool.stats(name) for name in pool.names}
        for field in COUNTERS:
            yield _counter(field, stats)


def _services(services: list[ChatService]) -> Iterator[Metric]:
    names = ["model_name"]
    running = GaugeMetricFamily(
        "chatwright_num_requests_running", "Answers that have a place in the batch", labels=names
    )
    waiting = GaugeMetricFamily(
        "chatwright_num_requests_waiting", "Answers that wait for a place", labels=names
    )
    usage = GaugeMetricFamily(
        "chatwright_kv_cache_usage_ratio", "Share of the keys' and values' memory in use", labels=names
    )
    for service in services:
        engine = service.model.engine
        running.add_metric([service.name], engine.active)
        waiting.add_metric([service.name], engine.waiting)
        usage.add_metric([service.name], engine.cache_usage)
    yield running
    yield waiting
    yield usage


def _counter(field: str, stats: dict[str, Stats]) -> Metric:
    name, meaning = COUNTERS[field]
    counter = CounterMetricFamily(name, meaning, labels=["model_name"])
    for model, one in stats.items():
        counter.add_metric([model], getattr(one, field))
    return counter
