"""Figures for Prometheus. What means the same has vLLM's name, behind `llmopt:` instead of `vllm:`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from ..batching import Engine
from ..stats import Stats

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Metrics:
    """The figures of one server, in a registry of its own.

    Args:
        engine: What is served.
        name: The served model's, a label of every figure.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        self._registry = CollectorRegistry()
        self._name = name
        self._looks_up = engine.config.prompt_cache is not None
        self._running: dict[int, Stats] = {}  # of answers, which are counted when they have ended
        running = self._gauge("num_requests_running", "Requests that hold pages.")
        running.set_function(lambda: len(engine.loop.scheduler.running))
        self._gauge("num_requests_waiting", "Requests that wait for pages.").set_function(lambda: engine.waiting)
        self._gauge("kv_cache_usage_perc", "Share of the pages that requests hold.").set_function(lambda: _used(engine))
        growing = self._gauge("generation_tokens_running", "Generated tokens of answers that are not whole yet.")
        growing.set_function(lambda: sum(stats.generated_tokens for stats in self._running.values()))
        self._prompt = self._counter("prompt_tokens", "Prompt tokens, found ones included.")
        self._generated = self._counter("generation_tokens", "Generated tokens.")
        self._queries = self._counter("prefix_cache_queries", "Prompt tokens that were looked up.")
        self._hits = self._counter("prefix_cache_hits", "Prompt tokens that were found.")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Guesses that were computed.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Guesses that were right.")
        self._preempted = self._counter("num_preemptions", "How often a request gave its pages to others.")
        self._first = self._histogram("time_to_first_token_seconds", "From the request to its first token.", SECONDS)
        self._between = self._histogram("inter_token_latency_seconds", "From a token to the next.", SECONDS)
        self._whole = self._histogram("e2e_request_latency_seconds", "From the request to its last token.", SECONDS)
        self._asked = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKENS)
        self._answered = self._histogram("request_generation_tokens", "Generated tokens of a request.", TOKENS)
        self._ended = Counter(
            "llmopt:request_success",
            "Requests that ended, by how.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._http = Counter(
            "llmopt:http_requests", "HTTP requests, by path and status.", ["path", "status"], registry=self._registry
        )

    def _gauge(self, name: str, says: str) -> Gauge:
        return Gauge(f"llmopt:{name}", says, ["model_name"], registry=self._registry).labels(self._name)

    def _counter(self, name: str, says: str) -> Counter:
        return Counter(f"llmopt:{name}", says, ["model_name"], registry=self._registry).labels(self._name)

    def _histogram(self, name: str, says: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(f"llmopt:{name}", says, ["model_name"], buckets=buckets, registry=self._registry)
        return made.labels(self._name)

    def text(self) -> tuple[bytes, str]:
        """All figures in Prometheus' text format, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def token(self, seconds: float, first: bool) -> None:
        """A token came, so long after the request or after the token before it."""
        (self._first if first else self._between).observe(seconds)

    def began(self, stats: Stats) -> None:
        """An answer is waited for; `stats` will be its figures."""
        self._running[id(stats)] = stats

    def ended(self, stats: Stats, generated: int, seconds: float, reason: str) -> None:
        """An answer ended.

        Args:
            stats: Its figures.
            generated: Its tokens, without those that came behind a stop string.
            seconds: From the request to the end.
            reason: `stop`, `length`, `abort` or `error`.
        """
        self._running.pop(id(stats), None)
        self._ended.labels(self._name, reason).inc()
        self._prompt.inc(stats.prompt_tokens)
        self._generated.inc(generated)
        if self._looks_up:
            self._queries.inc(stats.prompt_tokens)
            self._hits.inc(stats.cached_tokens)
        self._drafted.inc(stats.drafted_tokens)
        self._accepted.inc(stats.accepted_tokens)
        self._preempted.inc(stats.preemptions)
        self._whole.observe(seconds)
        self._asked.observe(stats.prompt_tokens)
        self._answered.observe(generated)

    def http(self, path: str, status: int) -> None:
        """An HTTP request was answered; `path` is one that exists, or anything else under one name."""
        self._http.labels(path, str(status)).inc()


def _used(engine: Engine) -> float:
    pools = engine.loop.scheduler.pools
    return max((pool.used / pool.num_pages if pool.num_pages else 0.0 for pool in pools), default=0.0)
