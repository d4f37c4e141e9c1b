"""What Prometheus reads: requests and stages as they end, and the engine's own counts when it asks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

from ...core.errors import EngineError, missing_extra
from ..work import GenerateResult

try:
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError:
    raise missing_extra("prometheus_client", "serve") from None

if TYPE_CHECKING:
    from .app import Holder

ROUTES = {
    "/",
    "/healthz",
    "/readyz",
    "/metrics",
    "/docs",
    "/openapi.json",
    "/v1/models",
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/stream",
}
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics(Collector):
    """One registry per application, so that several can live in one process."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, holder: Holder) -> None:
        self._holder = holder
        self.registry = CollectorRegistry()
        self.stages = Histogram(
            "imagine_flash_stage_seconds",
            "Seconds of a stage in one request.",
            ["stage"],
            registry=self.registry,
            buckets=SECONDS,
        )
        self.requests = Counter(
            "imagine_flash_requests", "Requests that were drawn.", ["steps"], registry=self.registry
        )
        self.answers = Counter(
            "imagine_flash_answers",
            "Requests by what they were answered; 101 are WebSockets, 499 hung up before.",
            ["route", "status"],
            registry=self.registry,
        )
        self.stale = Counter(
            "imagine_flash_stale", "Requests of sessions that a newer one replaced.", registry=self.registry
        )
        self.sessions = Gauge("imagine_flash_sessions", "WebSockets that are open.", registry=self.registry)
        self.skipped = Counter("imagine_flash_skipped", "Results that a slow reader never saw.", registry=self.registry)
        self.registry.register(self)
        self._stage = cache(self.stages.labels)  # a few microseconds each

    def observe(self, result: GenerateResult) -> None:
        """One request was drawn."""
        self.requests.labels(str(result.steps)).inc()
        for stage, seconds in result.timings.stages().items():
            self._stage(stage).observe(seconds)

    def answered(self, path: str, status: int) -> None:
        """A request was answered; unknown paths are one, so that strangers cannot add series."""
        self.answers.labels(path if path in ROUTES else "other", str(status)).inc()

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """The engine's counts, read when asked."""
        try:
            engine = self._holder.get()
        except EngineError:
            yield GaugeMetricFamily("imagine_flash_ready", "1 once the model is loaded.", value=0)
            return
        stats = engine.stats()
        yield GaugeMetricFamily("imagine_flash_ready", "1 once the model is loaded.", value=1)
        yield GaugeMetricFamily(
            "imagine_flash_waiting_pictures", "Pictures asked for and not yet drawn.", value=stats.waiting
        )
        for name, what in ENGINE_COUNTS.items():
            yield CounterMetricFamily(f"imagine_flash_{name}", what, value=getattr(stats, name))
        yield CounterMetricFamily(
            "imagine_flash_cache_hits", "Prompts whose embeddings were known.", value=stats.cache_hits
        )
        yield CounterMetricFamily("imagine_flash_cache_misses", "Prompts that were encoded.", value=stats.cache_misses)
        yield GaugeMetricFamily("imagine_flash_cache_bytes", "Bytes of the prompt cache.", value=stats.cache_bytes)
        yield _batches(stats.batches, engine.max_batch)


ENGINE_COUNTS = {
    "pictures": "Pictures drawn.",
    "cancelled": "Requests cancelled before they were drawn.",
    "expired": "Requests that were not drawn in time.",
    "failed": "Requests that the backend failed.",
}


def _batches(sizes: dict[int, int], largest: int) -> HistogramMetricFamily:
    """Pictures per network call."""
    total, buckets = 0, []
    for size in range(1, largest + 1):
        total += sizes.get(size, 0)
        buckets.append((str(float(size)), float(total)))
    pictures = sum(size * n for size, n in sizes.items())
    return HistogramMetricFamily(
        "imagine_flash_batch_pictures",
        "Pictures of one network call.",
        buckets=[*buckets, ("+Inf", float(total))],
        sum_value=float(pictures),
    )
