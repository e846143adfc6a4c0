"""What a monitor reads at /metrics, in Prometheus' format."""

import prometheus_client as prometheus

from early_exit.decoding.decoder import Generation
from early_exit.serving.worker import Worker

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)


class Metrics:
    """Counts of one server; each has a registry of its own."""

    def __init__(self, worker: Worker):
        self.registry = prometheus.CollectorRegistry()
        count, seconds = self._counter, self._histogram
        self.answered = count("requests", "Requests by what they were answered with.", ["status"])
        self.prompt_tokens = count("prompt_tokens", "Tokens of prompts.")
        self.tokens = count("generated_tokens", "Tokens of answers, by their mode.", ["mode"])
        self.blocks = count("blocks_run", "Blocks run for them, drafts included.", ["mode"])
        self.drafted = count("drafts_checked", "Drafts that the full model has checked.", ["mode"])
        self.accepted = count("drafts_accepted", "Drafts that it agreed with.", ["mode"])
        self.first = seconds("time_to_first_token_seconds", "From a request to its first token.")
        self.between = seconds("time_per_token_seconds", "Between tokens of an answer, mean.")
        self.whole = seconds("request_seconds", "From a request to its last token.")
        for name, told in (("waiting", "wait"), ("running", "are read or decoded")):
            gauge = prometheus.Gauge(
                f"early_exit_requests_{name}", f"Requests that {told}.", registry=self.registry
            )
            gauge.set_function(lambda name=name: getattr(worker, name))

    def book(self, mode: str, answer: Generation) -> None:
        """What an answer took in the end."""
        self.tokens.labels(mode).inc(len(answer.tokens))
        self.blocks.labels(mode).inc(answer.layer_tokens)
        self.drafted.labels(mode).inc(int(answer.counts.drafted_BW.sum()))
        self.accepted.labels(mode).inc(int(answer.counts.accepted_BW.sum()))

    def text(self) -> bytes:
        return prometheus.generate_latest(self.registry)

    def _counter(self, name: str, told: str, labels: list[str] | None = None):
        return prometheus.Counter(f"early_exit_{name}", told, labels or [], registry=self.registry)

    def _histogram(self, name: str, told: str):
        return prometheus.Histogram(
            f"early_exit_{name}", told, registry=self.registry, buckets=_SECONDS
        )
