"""The server's metrics for Prometheus."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from scaledown.serving.engine import Engine
from scaledown.serving.jobs import Usage

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)


class Metrics:
    """Counters of one server. The engine's own numbers are read at each scrape."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self._registry}
        self._requests = Counter(
            "scaledown_requests", "Requests by route and status.", ["route", "status"], **options
        )
        self._positions = Counter(
            "scaledown_positions", "Positions of prompts and tokens of answers.", ["kind"], **options
        )
        self._documents = Counter(
            "scaledown_documents",
            "Document tokens that were compressed, and embeddings.",
            ["kind"],
            **options,
        )
        self._first = Histogram(
            "scaledown_first_token_seconds",
            "Seconds until the first text of an answer.",
            buckets=_SECONDS,
            **options,
        )
        self._whole = Histogram(
            "scaledown_request_seconds",
            "Seconds until a request is done.",
            ["route"],
            buckets=_SECONDS,
            **options,
        )
        self._registry.register(_EngineNumbers(engine))

    def first(self, seconds: float) -> None:
        """Record the seconds until the first text of an answer."""
        self._first.observe(seconds)

    def done(self, route: str, status: int, seconds: float, usage: Usage) -> None:
        """Record a request that has ended.

        Args:
            route: The path of the request.
            status: Its HTTP status.
            seconds: From its arrival to its end.
            usage: Its tokens and embeddings; zeros if it failed.
        """
        self._requests.labels(route, str(status)).inc()
        self._whole.labels(route).observe(seconds)
        self._positions.labels("prompt").inc(usage.prompt)
        self._positions.labels("answer").inc(usage.completion)
        self._documents.labels("tokens").inc(usage.document_tokens)
        self._documents.labels("embeddings").inc(usage.embeddings)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineNumbers(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> list[Any]:
        """Return the engine's numbers at this moment."""
        engine = self._engine
        pairs = CounterMetricFamily(
            "scaledown_embedding_cache_pairs",
            "Pairs of query and document, found in the cache or not.",
            labels=["found"],
        )
        pairs.add_metric(["yes"], engine.hits)
        pairs.add_metric(["no"], engine.misses)
        return [
            GaugeMetricFamily("scaledown_requests_waiting", "Requests that wait.", engine.waiting),
            GaugeMetricFamily("scaledown_answers_running", "Answers being written.", engine.running),
            GaugeMetricFamily(
                "scaledown_embedding_cache_bytes", "Bytes of embeddings in the cache.", engine.cached_bytes
            ),
            pairs,
        ]
