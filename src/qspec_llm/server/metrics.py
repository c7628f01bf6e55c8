"""Prometheus metrics, under the names that dashboards for LLM servers know."""

import logging
import time
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from qspec_llm.engine.engine import MAX_GAMMA, Engine
from qspec_llm.engine.request import FinishReason, Request

__all__ = ["Metrics"]

logger = logging.getLogger("qspec")

PREFIX = "qspec:"
disable_created_metrics()  # type: ignore[no-untyped-call]
SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
WARN_EVERY = 60.0  # seconds between two warnings
WARN_AFTER = 200  # drafts tested since the last look, before their acceptance means anything


@dataclass
class _Window:
    """Drafts since the last look at their acceptance."""

    tested: int = 0
    accepted: int = 0
    since: float = 0.0


class Metrics:
    """Counters of one server; the engine's thread writes, scrapers read."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(PREFIX + name, text, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(PREFIX + name, text, buckets=buckets, registry=self.registry)

        self._num_drafts = counter("spec_decode_num_drafts", "cycles that drafted")
        self._num_draft_tokens = counter("spec_decode_num_draft_tokens", "tokens drafted")
        self._num_accepted = counter("spec_decode_num_accepted_tokens", "drafted tokens accepted")
        self._accepted_at = counter(
            "spec_decode_num_accepted_tokens_per_pos", "accepted, by place in the draft", "position"
        )
        self._lengths = histogram(
            "spec_decode_accepted_length",
            "drafted tokens accepted in a cycle",
            tuple(map(float, range(MAX_GAMMA + 1))),
        )
        self._gamma = gauge("spec_decode_gamma", "tokens that the last cycle drafted at most")
        self._acceptance = gauge("spec_decode_acceptance", "share of tested drafts accepted lately")
        self._first = histogram("time_to_first_token_seconds", "from arrival to the first token")
        self._between = histogram("inter_token_latency_seconds", "between tokens of one answer")
        self._whole = histogram("e2e_request_latency_seconds", "from arrival to the last token")
        self._queue = histogram("request_queue_time_seconds", "from arrival to the first step")
        self._running = gauge("num_requests_running", "requests that hold cache blocks")
        self._waiting = gauge("num_requests_waiting", "requests that wait for a place")
        self._usage = gauge("kv_cache_usage_perc", "share of cache blocks held, 0 to 1")
        self._queries = counter("prefix_cache_queries", "prompt tokens looked up in the cache")
        self._hits = counter("prefix_cache_hits", "prompt tokens found in the cache")
        self._evicted = counter("prefix_cache_evicted_blocks", "cached blocks given to others")
        self._preempted = counter("num_preemptions", "requests that lost their blocks")
        self._prompt = counter("prompt_tokens", "prompt tokens of requests that began")
        self._generated = counter("generation_tokens", "tokens generated")
        self._success = counter("request_success", "requests that ended", "finished_reason")
        self._seconds = counter("step_seconds", "where the engine's time went", "part")
        for position in range(MAX_GAMMA):
            self._accepted_at.labels(position)
        for reason in ("stop", "length", "abort"):
            self._success.labels(reason)
        self._last: dict[str, float] = {}
        self._window = _Window(since=time.monotonic())

    def render(self) -> bytes:
        """The text that scrapers read."""
        return generate_latest(self.registry)

    def started(self, waited: float, request: Request) -> None:
        """A request had its first step."""
        self._queue.observe(waited)
        self._prompt.inc(len(request.prompt))
        self._queries.inc(len(request.prompt))
        self._hits.inc(request.num_cached)

    def cycle(self, num_drafted: int, num_accepted: int, num_tokens: int) -> None:
        """A request's cycle decided tokens."""
        self._generated.inc(num_tokens)
        if not num_drafted:
            return
        self._num_drafts.inc()
        self._num_draft_tokens.inc(num_drafted)
        self._num_accepted.inc(num_accepted)
        self._lengths.observe(num_accepted)
        for position in range(num_accepted):
            self._accepted_at.labels(position).inc()
        self._window.tested += min(num_accepted + 1, num_drafted)
        self._window.accepted += num_accepted

    def first_token(self, seconds: float) -> None:
        """A request has its first token."""
        self._first.observe(seconds)

    def tokens(self, seconds: float, number: int) -> None:
        """Some more tokens came at once, so long after the last."""
        for _ in range(number):
            self._between.observe(seconds / number)

    def finished(self, reason: FinishReason, seconds: float | None = None) -> None:
        """A request ended."""
        self._success.labels(reason).inc()
        if seconds is not None:
            self._whole.observe(seconds)

    def state(self, engine: Engine) -> None:
        """What the engine looks like after a step."""
        scheduler, blocks = engine.scheduler, engine.scheduler.blocks
        self._running.set(len(scheduler.running))
        self._waiting.set(len(scheduler.waiting))
        self._usage.set(1 - blocks.num_free / blocks.num_blocks)
        self._gamma.set(max((request.gamma for request in scheduler.running), default=0))
        self._acceptance.set(engine.gammas.acceptance)
        self._raise(self._preempted, "preempted", scheduler.num_preempted)
        self._raise(self._evicted, "evicted", blocks.num_evicted)
        for part, seconds in (
            ("draft", engine.seconds.draft),
            ("verify", engine.seconds.verify),
            ("cycle", engine.seconds.cycles),  # of both, where they run as one graph
            ("host", engine.seconds.other),
        ):
            self._raise(self._seconds.labels(part), part, seconds)
        self._warn(engine)

    def _raise(self, counter: Counter, name: str, total: float) -> None:
        """Bring a counter up to a total that is counted elsewhere."""
        counter.inc(max(total - self._last.get(name, 0.0), 0.0))
        self._last[name] = total

    def _warn(self, engine: Engine) -> None:
        """Say so in the log when drafts are accepted less often than pays."""
        window, now = self._window, time.monotonic()
        if now - window.since < WARN_EVERY or window.tested < WARN_AFTER:
            return
        self._window = _Window(since=now)
        needed, rate = engine.gammas.least_acceptance(), window.accepted / window.tested
        if needed is not None and rate < needed:
            logger.warning(
                "%.0f%% of the tested drafts were accepted in the last %.0f s; on this machine "
                "drafting pays from %.0f%% on",
                rate * 100,
                now - window.since,
                needed * 100,
            )
