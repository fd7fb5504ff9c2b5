"""What /metrics shows: counted in the front process, and of each engine what it last said."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pace.engine.engine import EngineStats
from pace.engine.speculation import SpeculationStats

from .admission import Admission
from .fleet import Engine
from .protocol import Embedded, Progress

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """With a registry of its own: several servers in one process do not mix."""

    def __init__(self, engines: Sequence[Engine], admission: Admission) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "pace_requests", "HTTP requests that have ended, by outcome.", ["endpoint", "outcome"], registry=registry
        )
        self.prompt_tokens = Counter("pace_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.generation_tokens = Counter("pace_generation_tokens", "Tokens written.", registry=registry)
        self.cached_tokens = Counter(
            "pace_cached_prompt_tokens", "Tokens of prompts that a cache had already.", registry=registry
        )
        self.first_token = Histogram(
            "pace_time_to_first_token_seconds", "From a request to its first token.", buckets=SECONDS, registry=registry
        )
        self.per_output_token = Histogram(
            "pace_time_per_output_token_seconds",
            "Of one text after its first token, on average.",
            buckets=TOKEN_SECONDS,
            registry=registry,
        )
        self.inter_token = Histogram(
            "pace_inter_token_latency_seconds",
            "Between the news of a request.",
            buckets=TOKEN_SECONDS,
            registry=registry,
        )
        self.duration = Histogram(
            "pace_request_duration_seconds", "From a request to its end.", buckets=SECONDS, registry=registry
        )
        Gauge("pace_requests_in_flight", "HTTP requests that are being answered.", registry=registry).set_function(
            lambda: admission.in_flight
        )
        Gauge("pace_requests_waiting", "Requests without a first token.", registry=registry).set_function(
            lambda: admission.waiting
        )
        self.log_lines_lost = Counter(
            "pace_log_lines_lost", "Lines of the log that could not be written.", registry=registry
        )
        registry.register(_Engines(engines))

    def page(self) -> bytes:
        return generate_latest(self.registry)


class RequestMeter:
    """The clock of one request. Seconds are those since it arrived."""

    def __init__(self, metrics: Metrics, admitted: Callable[[], None] | None = None) -> None:
        self._metrics, self._begun = metrics, admitted
        self.arrived = time.perf_counter()
        self.first: float | None = None
        self._last = self.arrived
        self._written: dict[str, int] = {}

    def tick(self, news: Progress | Embedded) -> None:
        now = time.perf_counter()
        if isinstance(news, Progress):
            self._count(news)
        if self.first is None:
            self.first = now - self.arrived
            self._metrics.first_token.observe(self.first)
            if self._begun is not None:
                self._begun()
        else:
            self._metrics.inter_token.observe(now - self._last)
        self._last = now

    def _count(self, news: Progress) -> None:
        """At once, so that long texts show while they are written. A request that is begun anew is counted once."""
        before = self._written.get(news.id, 0)
        self._written[news.id] = max(before, news.completion_tokens)
        self._metrics.generation_tokens.inc(self._written[news.id] - before)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.arrived


class _Engines(Collector):
    """Read when asked for."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        for kind, name, text, values in (
            (GaugeMetricFamily, "engine_up", "Whether an engine takes requests.", self._all(lambda e: e.up)),
            (CounterMetricFamily, "engine_restarts", "How often it was begun anew.", self._all(lambda e: e.restarts)),
            (GaugeMetricFamily, "sequences_running", "Texts in the batch.", self._known(lambda s: s.running)),
            (GaugeMetricFamily, "sequences_waiting", "Texts that wait for room.", self._known(lambda s: s.waiting)),
            (GaugeMetricFamily, "cache_used_ratio", "Of the cache.", self._known(_used)),
            (GaugeMetricFamily, "cache_capacity_bytes", "Of the cache.", self._known(lambda s: s.cache.capacity_bytes)),
            (GaugeMetricFamily, "prefix_hit_ratio", "Of prompts' tokens.", self._known(lambda s: s.prefix_hit_rate)),
            (CounterMetricFamily, "preemptions", "Texts put back to the queue.", self._known(lambda s: s.preemptions)),
            (CounterMetricFamily, "engine_steps", "Forward passes.", self._known(lambda s: s.steps)),
            (CounterMetricFamily, "drafted_tokens", "Guessed ahead.", self._drafts(lambda s: s.drafted)),
            (CounterMetricFamily, "accepted_tokens", "Of these, right.", self._drafts(lambda s: s.accepted)),
            (CounterMetricFamily, "verifications", "Of a text's drafts.", self._drafts(lambda s: s.verifications)),
            (CounterMetricFamily, "proposing_seconds", "Of drafts.", self._drafts(lambda s: s.proposing_seconds)),
            (GaugeMetricFamily, "speculation_speed_up", "Of steps.", self._drafts(lambda s: s.speed_up)),
        ):
            family = kind(f"pace_{name}", text, labels=["engine"])
            for index, value in values:
                family.add_metric([str(index)], float(value))
            yield family

    def _all(self, value: Callable[[Engine], float]) -> Iterable[tuple[int, float]]:
        return [(engine.index, max(value(engine), 0)) for engine in self._engines]

    def _known(self, value: Callable[[EngineStats], float]) -> Iterable[tuple[int, float]]:
        return [(engine.index, value(engine.stats)) for engine in self._engines if engine.stats is not None]

    def _drafts(self, value: Callable[[SpeculationStats], float]) -> Iterable[tuple[int, float]]:
        return self._known(lambda stats: value(stats.speculation))


def _used(stats: EngineStats) -> float:
    return stats.cache.used_bytes / stats.cache.capacity_bytes
