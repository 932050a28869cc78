"""What monitoring adds to the page: events, families of metrics, and one chart for all layers of a metric."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import pytest

from osler.monitor.metrics import METRICS
from osler.records.jsonl import Event
from osler.report.charts import OTHER, TOGETHER, Figure, bundle, by_layer, charts_of, family_of
from osler.report.curves import Series
from osler.report.page import build_report
from osler.report.read import StageLog, read_run
from osler.report.words import attention, grouped, marks_of, summary_text

Bare = Callable[..., Path]


def event(step: int, kind: str, name: str, message: str = "Said.") -> Event:
    return Event(step, 1e6 + step, kind, name, message)


def lines(*rows: dict[str, object] | Event) -> str:
    return "".join(json.dumps(asdict(row) if isinstance(row, Event) else row) + "\n" for row in rows)


EVENTS = (
    event(10, "alert", "exploding_gradient", "The norm is 4."),
    event(20, "alert", "exploding_gradient", "The norm is 9."),
    event(20, "alert", "exploding_gradient", "The norm is 9 again."),  # the step was made twice
    event(25, "incident", "non_finite", "Step 25 was skipped."),
    event(15, "rollback", "rollback", "Back to step 15."),
    event(30, "data_change", "fingerprint", "Other data, as was allowed."),
)


@pytest.fixture
def monitored(bare: Bare) -> Path:
    """Forty layers, one of which leaves the others; some events."""
    rows = []
    for step in range(1, 41):
        row: dict[str, object] = {"step": step, "tokens": 1000 * step, "time": 1e6 + step, "train/loss": 3.0 - step / 40}
        row |= {f"model/activation_rms/{n}": 1.0 + 0.01 * n + (n == 17) * step / 10 for n in range(40)}
        row |= {f"grad/norm/{n}": 0.1 for n in range(40)} | {"grad/norm/embed": 0.5, "made_up/thing": 1.0}
        row["perf/memory_allocated_bytes"] = 2_500_000_000
        rows.append(row)
    return bare(metrics_jsonl=lines(*rows), events_jsonl=lines(*EVENTS) + '{"torn')


def grave(folder: Path) -> list[str]:
    return [text.removeprefix("Training: ") for text in attention(read_run(folder))]


def test_alike_events_are_one_group_the_newest_first(bare: Bare) -> None:
    told = grouped(EVENTS)
    assert [(group.title.partition(":")[0], group.steps) for group in told] == [
        ("Data change", [30]), ("Rollback", [15]), ("Incident", [25]), ("Alert", [10, 20]),
    ]  # fmt: skip
    assert told[-1].message == "The norm is 9 again."
    words = grave(bare(events_jsonl=lines(*EVENTS)))
    assert [text.split(":")[0] for text in words] == ["Incident", "Rollback, step 15", "Alert"], "the gravest first"
    assert words[2] == "Alert: exploding gradient, 2 times, at steps 10 and 20: The norm is 9 again."
    assert {(step, css) for step, css, _ in marks_of(told)} == {
        (10, "alert"), (20, "alert"), (25, "incident"), (15, "rollback"), (30, "other"),
    }  # fmt: skip


def test_a_failure_weighs_like_an_incident_and_the_edges_of_a_run_are_not_marked(bare: Bare) -> None:
    events = [event(0, "start", "begun"), event(5, "end", "failed"), event(4, "start", "resumed"), event(9, "end", "finished")]
    assert [text.split(":")[:2] for text in grave(bare(events_jsonl=lines(*events)))] == [["End", " failed, step 5"]]
    assert {(step, css) for step, css, _ in marks_of(grouped(events))} == {(5, "incident"), (4, "other")}


def test_many_steps_are_not_all_named(bare: Bare) -> None:
    (text,) = grave(bare(events_jsonl=lines(*(event(step, "alert", "stalled") for step in range(100, 120)))))
    assert "20 times, at steps 100, 101, …, 118 and 119" in text


def test_the_page_tells_what_happened_and_marks_it_in_the_loss(monitored: Path) -> None:
    text = build_report(monitored).read_text(encoding="utf-8")
    section = text[text.index('<section id="happened"') :].split("</section>")[0]
    assert section.count("<tr>") == 1 + 4 and "Other data, as was allowed." in section
    assert section.index("Data change: fingerprint") < section.index("Rollback") < section.index("Alert: exploding gradient")
    (loss,) = re.findall(r'<svg class="chart"(?:(?!</svg>).)*<title>Loss:.*?</svg>', text, re.S)
    assert len(re.findall(r'class="mark (alert|incident|rollback|other)"', loss)) == 5
    assert "<title>Incident: non finite at step 25</title>" in loss
    assert text.count('class="mark alert"') == 2, "in the chart of the loss only"
    found = attention(read_run(monitored))
    assert found[0].endswith("step 25: Step 25 was skipped.") and len(found) == 3
    assert "3 things" in text and "Watch: " in summary_text(monitored)


def test_the_url_of_a_webhook_is_a_secret(bare: Bare) -> None:
    folder = bare(config_yaml="monitor:\n  level: full\n  webhook: https://example.org/hooks/sesame\n")
    text = build_report(folder).read_text(encoding="utf-8")
    assert "webhook: (not shown)" in text and "level: full" in text and "sesame" not in text


def test_layers_share_one_chart_that_names_the_odd_one(monitored: Path) -> None:
    text = build_report(monitored).read_text(encoding="utf-8")
    assert text.count("<figure") == 6, "loss, two of layers, embed, memory, and the one of the plugin"
    (drawing,) = re.findall(r"<title>(model/activation_rms by layer:[^<]*)</title>", text)
    for layer in ("layer 0 from", "layer 20 from", "layer 39 from", "layer 17, farthest from the others from 1.270"):
        assert layer in drawing
    assert text.count('class="c5 area"') == 2 and "The grey area spans all 40 layers." in text
    assert "Model health: 1 more curve" in text and "Gradients: 2 more curves" in text and "2.50 GB" in text
    assert len(text) < 250_000, "forty layers must not make the page forty times as heavy"


def test_the_farthest_layer_is_the_one_that_is_not_finite() -> None:
    layers = {n: Series([1, 2], [1.0, 1.0 + n * n / 10]) for n in range(6)}
    lines_, band = bundle(layers)
    assert [line.label for line in lines_] == ["layer 0", "layer 3", "layer 5, farthest from the others"]
    assert (list(band.x), list(band.low), list(band.high)) == ([1, 2], [1.0, 1.0], [1.0, 3.5])
    layers[1] = Series([1, 2], [1.0, math.nan])
    assert "layer 1, farthest from the others" in [line.label for line in bundle(layers)[0]]
    lines_, band = bundle({0: Series([1], [math.nan])})
    assert [line.label for line in lines_] == ["layer 0"] and not len(band.x)


def rest_of_charts(names: Iterable[str]) -> tuple[str, list[Figure]]:
    stage = StageLog(Path("none"))
    stage.log.curves = {name: Series([1], [1.0]) for name in names}
    ((family, charts),) = charts_of(stage, 0)[1]
    return family.title, charts


def test_metrics_of_one_row_share_a_chart() -> None:
    family, charts = rest_of_charts(f"rewards/r{i}/mean" for i in range(10))
    assert family == "Reinforcement learning" and {line.colour for line in charts[0].lines} == set(range(8))
    assert [[line.label for line in chart.lines] for chart in charts] == [[f"r{i}" for i in range(8)], ["r8", "r9"]]


def test_metrics_that_are_read_beside_one_another_share_a_chart() -> None:
    family, charts = rest_of_charts(f"perf/{part}_ms" for part in ("data", "forward", "loading"))
    assert family == "Performance" and [line.label for line in charts[0].lines] == ["data", "forward"]
    assert [chart.spec.title for chart in charts] == ["Where a step's time goes", "perf/loading_ms"]
    for spec in TOGETHER:
        assert len({family_of(row).title for row, _ in spec.lines}) == 1 and spec.good.endswith(".")


def test_every_metric_of_the_table_has_a_family() -> None:
    assert [name for name in METRICS if family_of(name) is OTHER] == []
    assert family_of("train/grad_norm").title == "Gradients" and family_of("train/loss").title == "Quality"


def test_layers_are_told_by_their_number() -> None:
    whole = ["b", "grad/norm/embed", "model/effective_rank/0.o_proj"]
    assert by_layer(["a/10", *whole, "a/layer_9"]) == (whole, {"a": {9: "a/layer_9", 10: "a/10"}})


def test_events_without_metrics_are_shown(bare: Bare) -> None:
    text = build_report(bare(events_jsonl=lines(event(1, "incident", "non_finite", "At once.")))).read_text(encoding="utf-8")
    assert "At once." in text[text.index('<section id="happened"') :].split("</section>")[0]
