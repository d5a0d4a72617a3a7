"""What `/metrics` shows: numbers of the engine, read when asked for, and times that the server measures."""

from collections.abc import Callable, Iterator
from typing import Any

import prometheus_client
from prometheus_client import core

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_GAUGES = {  # field of the engine's statistics: what it is
    "num_waiting": "Requests that wait for a slot.",
    "num_running": "Requests that are being computed.",
    "num_slots": "Requests that can be computed at once.",
    "waiting_tokens": "Prompt tokens of the requests that wait.",
    "pages_total": "Pages of the cache.",
    "pages_free": "Pages that hold nothing.",
    "pages_cached": "Pages that are kept for prompts to come.",
}
_COUNTERS = {
    "requests": "Requests that were taken on.",
    "failed": "Requests that failed through no fault of their own.",
    "rejected": "Requests that were turned away by a full queue.",
    "prompt_tokens": "Tokens of prompts, those from the cache among them.",
    "cached_tokens": "Tokens of prompts whose rows were in the cache already.",
    "drawn_tokens": "Tokens that were drawn.",
    "preemptions": "Times that a running request gave its pages up.",
    "compiles": "Compilations.",
    "steps": "Steps of the engine.",
}


class Metrics:
    """The measurements of one server.

    Attributes:
      first_token: seconds from a request's arrival at the engine to its first token.
      between_tokens: seconds from a token to the next of the same text, the mean of those that come together.
      request: seconds of a text, from its arrival at the engine to its end.
      responses: HTTP answers by route and status.
      disconnects: requests whose client left before the end.
    """

    def __init__(self, stats: Callable[[], Any], experts: tuple[float, float] | None = None):
        """Makes a registry of its own.

        Args:
          stats: returns the statistics of the engine.
          experts: fewest and most of a token, by the server's setting; None for a model without any.
        """
        self._registry = registry = prometheus_client.CollectorRegistry()
        registry.register(_EngineCollector(stats))
        prometheus_client.ProcessCollector(registry=registry)
        histogram = lambda name, text, buckets: prometheus_client.Histogram(
            f"mla_jax_{name}", text, buckets=buckets, registry=registry
        )
        self.first_token = histogram("first_token_seconds", "Seconds to the first token.", _SECONDS)
        self.between_tokens = histogram(
            "inter_token_seconds", "Seconds between two tokens of a text.", _TOKEN_SECONDS
        )
        self.request = histogram("text_seconds", "Seconds that a text took in all.", _SECONDS)
        self.responses = prometheus_client.Counter(
            "mla_jax_responses", "HTTP answers.", ["route", "status"], registry=registry
        )
        self.disconnects = prometheus_client.Counter(
            "mla_jax_disconnects", "Requests whose client left before the end.", registry=registry
        )

        if experts is not None:
            bounds = prometheus_client.Gauge(
                "mla_jax_experts_per_token",
                "Experts of a token, mean of the layers, by the server's setting.",
                ["bound"],
                registry=registry,
            )
            for bound, count in zip(("lower", "upper"), experts, strict=True):
                bounds.labels(bound).set(count)

    def render(self) -> bytes:
        """Returns all of them in the text format of Prometheus."""
        return prometheus_client.generate_latest(self._registry)


class _EngineCollector:
    """Turns the engine's statistics into metrics whenever they are asked for."""

    def __init__(self, stats):
        self._stats = stats

    def describe(self) -> list[core.Metric]:
        """Names nothing in advance, so that registering asks the engine for nothing."""
        return []

    def collect(self) -> Iterator[core.Metric]:
        """Yields the metrics."""
        stats = self._stats()
        for field, text in _GAUGES.items():
            yield core.GaugeMetricFamily(f"mla_jax_{field}", text, value=getattr(stats, field))
        for field, text in _COUNTERS.items():
            yield core.CounterMetricFamily(f"mla_jax_{field}", text, value=getattr(stats, field))
        finished = core.CounterMetricFamily("mla_jax_finished", "Texts by how they ended.", labels=["reason"])
        for reason, count in stats.finished.items():
            finished.add_metric([str(reason)], count)
        yield finished
        age = stats.seconds_since_step
        yield core.GaugeMetricFamily(
            "mla_jax_seconds_since_step", "Seconds since the last step, 0 when idle.", value=age or 0.0
        )
