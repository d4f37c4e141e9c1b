"""What Prometheus reads beside HTTP's own numbers: stages as they end, and the engine's counts when it asks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ...core.errors import EngineError
from ..work import GenerateResult
from .model import ServedModel

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics(Collector):
    """One registry per application, so that several can live in one process."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self.registry = registry = CollectorRegistry()
        what = "Seconds of a stage in one request."
        self.stages = Histogram("imagine_flash_stage_seconds", what, ["stage"], registry=registry, buckets=SECONDS)
        self.requests = Counter("imagine_flash_requests", "Requests that were drawn.", ["steps"], registry=registry)
        what = "Pictures that a key was given, by its name."
        self.by_key = Counter("imagine_flash_key_pictures", what, ["key"], registry=registry)
        self.stale = Counter("imagine_flash_stale", "Requests that a session replaced.", registry=registry)
        self.sessions = Gauge("imagine_flash_sessions", "WebSockets that are open.", registry=registry)
        self.skipped = Counter("imagine_flash_skipped", "Results that a slow reader never saw.", registry=registry)
        self.registry.register(self)
        self._stage = cache(self.stages.labels)  # a few microseconds each

    def observe(self, result: GenerateResult, key: str = "") -> None:
        """One request was drawn; key: the name of the key that asked."""
        self.requests.labels(str(result.steps)).inc()
        if key:
            self.by_key.labels(key).inc(len(result.images))
        for stage, seconds in result.timings.stages().items():
            self._stage(stage).observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """The engine's counts, read when asked."""
        try:
            engine = self._model.engine
        except EngineError:
            yield GaugeMetricFamily("imagine_flash_ready", "1 once the model is loaded.", value=0)
            return
        stats = engine.stats()
        yield GaugeMetricFamily("imagine_flash_ready", "1 once the model is loaded.", value=1)
        for name, what in GAUGES.items():
            yield GaugeMetricFamily(f"imagine_flash_{name}", what, value=getattr(stats, name.partition("_pictures")[0]))
        for name, what in COUNTS.items():
            yield CounterMetricFamily(f"imagine_flash_{name}", what, value=getattr(stats, name))
        yield _batches(stats.batches, engine.max_batch)


GAUGES = {"waiting_pictures": "Pictures asked for and not yet drawn.", "cache_bytes": "Bytes of the prompt cache."}
COUNTS = {
    "pictures": "Pictures drawn.",
    "cancelled": "Requests cancelled before they were drawn.",
    "expired": "Requests that were not drawn in time.",
    "failed": "Requests that the backend failed.",
    "cache_hits": "Prompts whose embeddings were known.",
    "cache_misses": "Prompts that were encoded.",
}


def _batches(sizes: dict[int, int], largest: int) -> HistogramMetricFamily:
    """Pictures per network call."""
    total, buckets = 0, []
    for size in range(1, largest + 1):
        total += sizes.get(size, 0)
        buckets.append((str(float(size)), float(total)))
    return HistogramMetricFamily(
        "imagine_flash_batch_pictures",
        "Pictures of one network call.",
        buckets=[*buckets, ("+Inf", float(total))],
        sum_value=float(sum(size * n for size, n in sizes.items())),
    )
