"""What the server counts, for Prometheus."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from scaledown.serving.engine import Engine
from scaledown.serving.jobs import Usage

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)


class Metrics:
    """Counters of one server; the engine's own numbers are read when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry}
        self._requests = Counter(
            "scaledown_requests", "Requests by route and status.", ["route", "status"], **own
        )
        self._positions = Counter(
            "scaledown_positions", "Positions of prompts, and tokens of answers.", ["kind"], **own
        )
        self._documents = Counter(
            "scaledown_documents", "Document tokens that were compressed, and embeddings.", ["kind"], **own
        )
        self._first = Histogram(
            "scaledown_first_token_seconds", "Until the first text of an answer.", buckets=_SECONDS, **own
        )
        self._whole = Histogram(
            "scaledown_request_seconds", "Until a request is done.", ["route"], buckets=_SECONDS, **own
        )
        self._registry.register(_EngineNumbers(engine))

    def first(self, seconds: float) -> None:
        """An answer began."""
        self._first.observe(seconds)

    def done(self, route: str, status: int, seconds: float, usage: Usage) -> None:
        """A request ended."""
        self._requests.labels(route, str(status)).inc()
        self._whole.labels(route).observe(seconds)
        self._positions.labels("prompt").inc(usage.prompt)
        self._positions.labels("answer").inc(usage.completion)
        self._documents.labels("tokens").inc(usage.document_tokens)
        self._documents.labels("embeddings").inc(usage.embeddings)

    def told(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)


class _EngineNumbers(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> list[Any]:
        """What the engine has at this moment."""
        engine = self._engine
        pairs = CounterMetricFamily(
            "scaledown_embedding_cache_pairs", "Pairs found in the cache, and not.", labels=["found"]
        )
        pairs.add_metric(["yes"], engine.hits)
        pairs.add_metric(["no"], engine.misses)
        return [
            GaugeMetricFamily("scaledown_requests_waiting", "Requests that wait.", engine.waiting),
            GaugeMetricFamily("scaledown_answers_running", "Answers being written.", engine.running),
            GaugeMetricFamily("scaledown_embedding_cache_bytes", "Of embeddings kept.", engine.cached_bytes),
            pairs,
        ]
