"""The server's metrics, in the text form that Prometheus reads. Only the web server's thread may touch them.

The form is described at https://prometheus.io/docs/instrumenting/exposition_formats/. Of a request, only its model,
path and status become labels.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

from osler.runtime.device import resident_bytes

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

Labels = tuple[tuple[str, str], ...]


class Histogram:
    """Counts of observations in seconds, one for each of the upper bounds ``SECONDS`` and one above them."""

    def __init__(self) -> None:
        self.counts, self.sum = [0] * (len(SECONDS) + 1), 0.0

    def observe(self, seconds: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.sum += seconds

    def lines(self, name: str, labels: Labels) -> Iterator[str]:
        """Yield the lines of the text form."""
        total = 0
        for bound, count in zip((*map(str, SECONDS), "+Inf"), self.counts, strict=True):
            total += count
            yield f"{name}_bucket{_written((*labels, ('le', bound)))} {total}"
        yield f"{name}_sum{_written(labels)} {self.sum}"
        yield f"{name}_count{_written(labels)} {total}"


class Metrics:
    """The counters and histograms of a server."""

    def __init__(self) -> None:
        self.requests: Counter[Labels] = Counter()
        self.prompt_tokens: Counter[Labels] = Counter()
        self.drawn_tokens: Counter[Labels] = Counter()
        self.cancelled: Counter[Labels] = Counter()
        self.first_token: defaultdict[Labels, Histogram] = defaultdict(Histogram)
        self.between_tokens: defaultdict[Labels, Histogram] = defaultdict(Histogram)
        self.whole: defaultdict[Labels, Histogram] = defaultdict(Histogram)

    def text(self, outstanding: Mapping[str, int], max_rows: int) -> str:
        """Return all metrics; ``outstanding`` are the completions of each model that run or wait."""
        running: dict[Labels, int] = {(("model", name),): min(count, max_rows) for name, count in outstanding.items()}
        waiting: dict[Labels, int] = {(("model", name),): max(count - max_rows, 0) for name, count in outstanding.items()}
        families: list[tuple[str, str, str, Mapping[Labels, object]]] = [
            ("osler_requests_total", "counter", "Answered requests.", self.requests),
            ("osler_requests_cancelled_total", "counter", "Requests whose client left.", self.cancelled),
            ("osler_prompt_tokens_total", "counter", "Tokens of prompts.", self.prompt_tokens),
            ("osler_drawn_tokens_total", "counter", "Tokens drawn.", self.drawn_tokens),
            ("osler_completions_running", "gauge", "Completions that are drawn.", running),
            ("osler_completions_waiting", "gauge", "Completions that wait for a row.", waiting),
            ("osler_time_to_first_token_seconds", "histogram", "From the request to its first token.", self.first_token),
            ("osler_time_between_tokens_seconds", "histogram", "Mean of a completion.", self.between_tokens),
            ("osler_request_seconds", "histogram", "From the request to its last token.", self.whole),
            ("process_resident_memory_bytes", "gauge", "Memory of the process.", {(): resident_bytes() or 0}),
        ]
        return "".join(f"{line}\n" for family in families for line in _family(*family))


def _family(name: str, kind: str, meaning: str, values: Mapping[Labels, object]) -> Iterable[str]:
    yield f"# HELP {name} {meaning}"
    yield f"# TYPE {name} {kind}"
    for labels, value in sorted(values.items()):
        if isinstance(value, Histogram):
            yield from value.lines(name, labels)
        else:
            yield f"{name}{_written(labels)} {value}"


def _written(labels: Labels) -> str:
    if not labels:
        return ""
    escaped = ((key, value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")) for key, value in labels)
    return "{" + ",".join(f'{key}="{value}"' for key, value in escaped) + "}"
