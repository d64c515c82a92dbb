"""GET /metrics: what the server does, in the format of Prometheus. Labels are routes and statuses, never text of clients.

Each process has its own numbers: with several workers, a scrape sees the one that answers it.

Format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.types import Scope

from mmllm.inference.engine import Engine
from mmllm.inference.request import Generated

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
RATES = (1, 2, 5, 10, 15, 20, 30, 50, 75, 100, 150, 200, 400)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.engine: Engine | None = None
        self.requests = Counter("mmllm_requests", "Requests", ["route", "status"], registry=self.registry)
        whole = "From the header to the end of the response"
        self.request_s = self.histogram("request_seconds", whole, SECONDS, ["route"])
        self.queue_s = self.histogram("queue_seconds", "Until a request got its slot", SECONDS)
        self.first_token_s = self.histogram("time_to_first_token_seconds", "With the time in the queue", SECONDS)
        self.rate = self.histogram("tokens_per_second", "Of one answer, after its first token", RATES)
        ProcessCollector(registry=self.registry)  # memory, CPU time and open files
        self.registry.register(self)

    def histogram(self, name: str, text: str, buckets: tuple[float, ...], labels: list[str] | None = None) -> Histogram:
        return Histogram(f"mmllm_{name}", text, labels or (), buckets=buckets, registry=self.registry)

    def count_request(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self.requests.labels(route, status).inc()
        self.request_s.labels(route).observe(seconds)

    def count_answer(self, answer: Generated, queue_s: float, prefill_s: float, decode_s: float) -> None:
        self.queue_s.observe(queue_s)
        self.first_token_s.observe(queue_s + prefill_s)
        if len(answer.ids) > 1 and decode_s > 0:
            self.rate.observe((len(answer.ids) - 1) / decode_s)

    def collect(self) -> Iterator[Metric]:
        """The engine's own numbers, as Prometheus's library asks for them."""
        if self.engine is None:
            return
        engine, counters, store = self.engine, self.engine.counters, self.engine.store
        for name, text, value in (
            ("slots", "Requests that can be answered side by side", engine.slots),
            ("slots_busy", "Requests that are being answered", engine.busy),
            ("requests_waiting", "Requests that wait for a slot", len(engine.waiting)),
            ("store_bytes", "Images and prompts that are kept", store.bytes),
        ):
            yield GaugeMetricFamily(f"mmllm_{name}", text, value)
        for name, text, value in (
            ("prompt_tokens", "Tokens of prompts that were read", counters.prompt_tokens),
            ("reused_tokens", "Tokens of prompts that the store had", counters.reused_tokens),
            ("generated_tokens", "Tokens of answers", counters.new_tokens),
            ("prefill_seconds", "Time in which prompts were read", counters.prefill_s),
            ("decode_seconds", "Time in which answers were written", counters.decode_s),
            ("steps", "Steps of the model", counters.steps),
            ("store_hits", "Images and blocks of prompts that the store had", store.hits),
            ("store_misses", "Images and blocks of prompts that it had not", store.misses),
        ):
            yield CounterMetricFamily(f"mmllm_{name}", text, value)
