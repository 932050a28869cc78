"""The page: self-contained, well formed, honest about what is missing, and equal to the files it was made from."""

import json
import re

import pytest

from osler.cli.main import main
from osler.config.schema import encode
from osler.model.config import ModelConfig
from osler.monitor.metrics import METRICS
from osler.report.charts import SPECS
from osler.report.page import build_report, place
from osler.report.read import read_run
from osler.report.words import attention, group_events, headline, marks_of, model_of, summary_text
from osler.runtime import format as fmt
from tests.report.conftest import Page, write


def checked(folder) -> Page:
    """A run's page, well formed, with links that lead somewhere and without numbers that are none."""
    path = build_report(folder)
    assert path == folder / "report.html"
    page = Page(path)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and all(attrs["href"] in {f"#{i}" for i in ids} for attrs in page.names("a"))
    words = page.words.lower().replace("value_embeddings: none", "")  # of the config
    assert not re.search(r"\bnan\b|\binf\b|\bnone\b", words), "a number that is missing shows as a dash"
    return page


def shown_on(folder) -> str:
    return checked(folder).words


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def change_comparison(quickstart, **fields) -> None:
    first, *rest = load(quickstart / "comparison.json")
    write(quickstart / "comparison.json", [first | fields, *rest])


def keep_exam(quickstart, label, **fields) -> None:
    """Leave one checkpoint's score on the test, with some fields changed."""
    row = load(quickstart / "exams.json")[label]["test"]
    write(quickstart / "exams.json", {label: {"test": row | fields}})


def test_the_page_is_self_contained_and_can_be_read_out(quickstart):
    page = checked(quickstart)
    for tag, attrs in page.tags:
        assert not {"src", "srcset", "xlink:href", "action", "data", "poster"} & attrs.keys() and tag not in ("base", "img")
        assert not any(name.startswith("on") for name in attrs), "no inline handlers"
    assert [attrs["href"] for attrs in page.names("link")] == ["data:,"], "those of <a> are in the page"
    text = page.source
    assert not re.search(r"https?://|@import|url\(|@font-face", text) and "default-src 'none'" in text and len(text) < 600_000
    drawings = page.names("svg")
    assert len(drawings) > 20 and all(attrs.get("role") == "img" for attrs in drawings)
    assert len(re.findall(r'<div class="interval c\d" role="img" aria-label="\w', text)) == 3 + 6 + 2
    assert len(re.findall(r"<svg[^>]*><title>[^<]", text)) == len(drawings)
    assert all(attrs.get("scope") for attrs in page.names("th")) and text.count("<h1") == 1 and '<html lang="en">' in text
    figures = re.findall(r'<figure class="card">.*?</figure>', text, re.S)
    assert figures and all(re.search(r"<figcaption>\w[^<]+\.</figcaption>", figure) for figure in figures)


def test_numbers_on_the_page_are_those_in_the_files(quickstart):
    shown = shown_on(quickstart)
    for splits in load(quickstart / "exams.json").values():
        for score in splits.values():
            low, high = score["interval"]
            assert f"{100 * score['accuracy']:.1f}%" in shown
            assert f"{100 * low:.1f}% to {100 * high:.1f}%" in shown
            assert f"{score['correct']} of {score['n']}" in shown
    assert "+7.5 points" in shown and "+4.3 to +10.7" in shown and "−1.1 to +6.1" in shown
    for stage in load(quickstart / "stages.json"):
        assert stage["what"] in shown
    text = (quickstart / "report.html").read_text(encoding="utf-8")
    assert 'style="width: 46.5%" title="Pretraining: 2 min 43 s (46.5%)"' in text
    assert "Time per stage: Data preparation 9.2 s;" in text
    last = json.loads((quickstart / "pretrain" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert f"{last['train/loss']:.3f}" in shown and f"{last['eval/loss']:.3f}" in shown
    assert "6.82M" in shown, "the parameters that the model's configuration counts"
    assert "a80b5512cc93e4d1" in shown and "2.13.0" in shown and "7.5 GiB" in shown
    assert "The world of this exam is made up" in shown


def test_the_story_is_told_in_order_and_with_its_uncertainty(quickstart):
    page, run = checked(quickstart), read_run(quickstart)
    shown = page.words
    assert [stage.name for stage in run.runs] == ["pretrain", "sft", "grpo"]
    assert list(dict.fromkeys(score.label for score in run.exams)) == ["pretrain", "sft", "grpo"], "not the file's order"
    assert "between 59.4% and 65.8% (95% interval)" in shown and "clearly above guessing (25.0%)" in shown
    assert "A real gain" in shown and "No measurable change" in shown
    assert shown.count("✓ right") == 9 and shown.count("✗ wrong") == 3 and "Correct answer: velomycin" in shown
    sections = ["exams", "grpo", "samples", "time", "curves", "watch", "record"]
    assert [attrs["id"] for attrs in page.names("section") if "id" in attrs] == sections


def test_every_chart_names_declared_metrics_and_undeclared_ones_are_shown_too(quickstart):
    assert all(row in METRICS for spec in SPECS for row, _ in spec.lines)
    shown = shown_on(quickstart)
    assert "made_up/by_a_plugin" in shown and "Not described in the table of metrics." in shown
    assert METRICS["groups/effective"].meaning[1:] in shown


def test_the_answers_of_two_models_to_one_exam_are_told_apart(quickstart):
    answer = {"id": "1", "question": "q", "thinking": "", "answer": "(A)", "correct_answer": "A", "number": 0}
    for label in ("sft", "grpo", ""):
        sheet = [{"label": label, "exam": "new questions", "method": "generation", "asked": 1}, answer]
        write(quickstart / "answers" / f"{label or 'x'}.jsonl", sheet)
    words = checked(quickstart).words
    assert all(f"{model}, new questions: 1 answer" in words for model in ("Supervised fine-tuning", "GRPO", "Training"))


def test_hostile_text_stays_text(quickstart):
    evil = "</p><script>alert(1)</script><img src=x onerror=alert(2)>' \" & {braces}"
    texts = dict.fromkeys(("id", "stage", "question", "thinking", "answer", "correct_answer"), evil)
    score = {"n": 10, "accuracy": 0.5, "interval": [0.2, 0.8], "letters": {evil: 50}, "method": evil}
    score["measures"] = {evil: evil, "pass@2": {"value": 0.625, "interval": [0.1, 0.9], "n": 10, "confidence": evil}}
    for name, content in {
        "samples.jsonl": [{**texts, "options": [evil, "b"], "correct": False}],
        "answers/x.jsonl": [{"label": evil, "exam": evil, "method": evil, "asked": 1}, {**texts, "number": 0}],
        "notes.json": [evil],
        "config.yaml": {"note": evil},
        "versions.json": {evil: evil, "machine": {evil: evil}},
        "exams.json": {evil: {evil: score}},
        "stages.json": [{"name": evil, "seconds": 1, "what": evil}],
        "sft/events.jsonl": [{"step": 1, "time": 1, "kind": evil, "name": evil, "message": evil}],
        "sft/metrics.jsonl": [{"step": 999, "tokens": 1, "time": 1, evil: 1.0, "stage": evil}],
    }.items():
        write(quickstart / name, content)
    page = checked(quickstart)
    assert len(page.names("script")) == 1 and not page.names("img") and evil in "".join(page.text)
    assert "pass@2 62.5% 10" in page.words and "answers" in [attrs.get("id") for attrs in page.names("section")]


@pytest.mark.parametrize(
    "missing", ["exams.json", "stages.json", "comparison.json", "samples.jsonl", "versions.json", "notes.json",
                "grpo", "sft", "pretrain/metrics.jsonl", "pretrain/config.yaml"]
)  # fmt: skip
def test_each_missing_piece_is_only_missing(quickstart, missing):
    whole, path = shown_on(quickstart), quickstart / missing
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        file.unlink()
    shown = shown_on(quickstart)
    assert shown != whole and "could not be read" not in shown and summary_text(quickstart)


@pytest.mark.parametrize("name", ["exams_json", "stages_json", "comparison_json", "versions_json", "notes_json"])
@pytest.mark.parametrize(
    "content", ['{"torn": [1, 2', "null", "[1, null, {}]", '{"a": {"b": {}}}', '"text"', "[[]]", '{"a": null}']
)
def test_odd_files_do_not_break_the_page(bare, name, content):
    folder = bare(**{name: content})
    assert ("could not be read" in shown_on(folder)) == content.startswith('{"torn"')
    summary_text(folder)


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("", "Nothing measured yet"),
        ('{"step": 7, "tokens": 10, "time": 5, "train/loss": 3.25}\n', "Loss of 3.250"),
        ('{"step": 1, "train/loss": 3.25}\n{"step": 2, "train/loss": 2.5}\n{"step": 3, "tok', "Loss from 3.250 to 2.500"),
        ('{"step": 0,\n{"step": 1, "train/loss": 3.25}\n', "1 unreadable line skipped"),
        ("".join(f'{{"step": {n}, "train/loss": {v}}}\n' for n, v in enumerate(["3.5", "NaN", "null", "Infinity", "2.25"])),
         "Loss from 3.500 to 2.250"),
        ([{"step": 1, "time": 0, "train/loss": 9}, {"step": 2, "time": 9, "eval/loss": 3.25}], "loss of 3.250 , in 9.0 s"),
        ([{"step": 1, "train/loss": 9.0}, {"step": 2, "eval/bits_per_byte": 1.502}], "Held-out bits per byte of 1.502"),
        ([{"step": 1, "eval/bits_per_byte": 2.5}, {"step": 2, "eval/bits_per_byte": 1.502}],
         "Held-out bits per byte from 2.500 to 1.502"),
    ],
)  # fmt: skip
def test_what_a_log_may_hold(bare, log, said):
    page = checked(bare(log))
    assert said in page.words and ("unreadable" in page.words) == ("unreadable" in said), "a kill leaves a torn last line behind"
    assert ("[3.5,null,null,null,2.25]" in page.source) == ("3.500" in said), "values that are not finite are gaps"


BELOW = {"correct": 90, "accuracy": 0.1, "interval": [0.08, 0.12], "presentations": 900, "max_seq_len": 256}


@pytest.mark.parametrize(
    ("label", "fields", "said", "unsaid"),
    [
        ("pretrain", {}, ("That cannot be told apart from guessing (25.0%) or always giving the same letter (27.3%).",
                          "of the answers are B. That is a habit, not knowledge."), "clearly above"),
        ("sft", {**BELOW, "too_long": 0}, ("something is systematically wrong",), "did not fit"),
        ("sft", {**BELOW, "too_long": 700},
         ("always giving the same letter (27.3%). 700 of 900 questions did not fit into the model's context of 256 tokens",
          "Supervised fine-tuning on test: 700 of 900 questions"), "something is systematically wrong"),
        ("sft", {**BELOW, "cut": 880, "too_long": 7, "unparsed": 0},
         ("880 of 900 answers were cut; max_new_tokens=N gives more room", "0, 880 cut, 7 too long"),
         "something is systematically wrong"),
        ("sft", {**BELOW, "cut": 3, "unparsed": 0}, ("something is systematically wrong", "0, 3 cut"), "were cut"),
        ("grpo", {"n": 225, "presentations": 900, "unparsed": 40},
         ("It answered 563 of 900 questions (225 different ones, each asked several times) right.",),
         "had no readable letter"),
    ],
)  # fmt: skip
def test_what_is_said_of_a_score(quickstart, label, fields, said, unsaid):
    keep_exam(quickstart, label, **fields)
    shown = shown_on(quickstart)
    assert all(words in shown for words in said) and unsaid not in shown


def test_what_is_said_of_grpo(quickstart):
    """GRPO from an earlier checkpoint shows what GRPO does; what the run reached is the supervised score."""
    assert headline(read_run(quickstart))[1] == "62.6%"
    change_comparison(quickstart, difference=-0.01, interval=[-0.04, 0.02])
    shown = shown_on(quickstart)
    assert "−1.0 points" in shown and "A real gain" not in shown
    change_comparison(quickstart, before_label="sft, earlier checkpoint", branch=True)
    assert headline(read_run(quickstart))[1] == "55.1%"


def test_intervals_are_drawn_where_the_axis_says(quickstart):
    keep_exam(quickstart, "sft", interval=[-0.1, 1.2], accuracy=0.5, constant_letter_baseline=None, letters={"A": 30, "B": 10})
    drawn = checked(quickstart).source.split('<table class="exams">')[1]
    (bar,) = re.findall(r'<div class="interval c1".*?</div>', drawn, re.S)
    assert "left: 0.0%; right: 0.0%" in bar and "left: 50.0%" in bar and bar.count('class="mark') == 1 and "guessing 25.0%" in bar
    assert 'title="A: 75.0%"' in drawn and 'title="B: 25.0%"' in drawn
    assert [place(value, -0.2, 0.2) for value in (-1.0, 0.0, 0.1, 1.0)] == [0, 50, 75, 100]


def test_time_leaves_pauses_out(bare):
    rows = [{"step": i, "time": 10.0 * i + (7200 if i > 20 else 0), "train/loss": 1.0} for i in range(41)]
    summary = summary_text(bare(rows))
    assert "in 6 min 30 s" in summary and "Watch: Training: 1 pause in the log, the longest of 2 h 00 min" in summary


def test_the_summary_says_what_the_page_says(quickstart):
    page, summary = shown_on(quickstart), summary_text(quickstart)
    first, second, *others = summary.splitlines()
    assert first == "From random weights to 62.6% on test, in 5 min 50 s" and len(others) < 18
    assert all(sentence.strip(" .") in page for sentence in second.split(". "))
    assert "(59.4% to 65.8%, n = 900)" in summary and str(quickstart / "report.html") in summary


def test_the_page_can_be_written_elsewhere(quickstart, tmp_path, capsys):
    page = tmp_path / "sent.html"
    assert main(["report", str(quickstart), "--out", str(page)]) == 0
    assert f"Report: {page}" in capsys.readouterr().out and page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert not (quickstart / "report.html").exists()
    assert main(["report", str(quickstart), "--out", str(tmp_path)]) == 2
    assert f"The page cannot be written to {tmp_path}" in (said := capsys.readouterr().err) and "--out" in said


def test_what_is_no_run_is_told_with_what_to_give(quickstart, capsys):
    step = quickstart / "sft" / "checkpoints" / "step-000000010"
    for name in ("config.yaml", "manifest.json"):
        write(step / name, {})
    (quickstart / "grpo" / "metrics.jsonl").unlink()
    (quickstart / "grpo" / "metrics.jsonl").mkdir()
    for path, said in (
        (quickstart / "none", "is no folder"),
        (quickstart / "config.yaml", "is a file and no folder"),
        (step, f"is a checkpoint and not a run folder. Give the folder of its run: {(quickstart / 'sft').resolve()}."),
        (step.parent, "is not a run folder: it has no config.yaml"),
        (quickstart / "grpo", "metrics.jsonl cannot be read: Is a directory"),
    ):
        assert main(["report", str(path)]) == 2
        assert said in " ".join(capsys.readouterr().err.split())


MODEL = ModelConfig(num_layers=3, hidden_size=64)


def test_the_model_is_the_one_that_is_trained(bare):
    """The section `model` of a config with `init_from` is not what is trained; without a description nothing is claimed."""
    folder = bare(config="init_from: runs/earlier\nmodel: {num_layers: 6, hidden_size: 256}\n", model_json='{"torn')
    assert model_of(read_run(folder)) is None and "parameters" not in shown_on(folder).lower()
    write(folder / "model.json", encode(MODEL))
    shown = shown_on(folder)
    assert f"A model of {fmt.count(MODEL.num_parameters)} parameters (3 layers of width 64)" in shown
    assert "Started from runs/earlier: its model and tokenizer take the place" in shown and "hidden_size: 64" in shown


# What monitoring adds.


def event(step: int, kind: str, name: str, message: str = "Said.") -> dict[str, object]:
    return {"step": step, "time": 1e6 + step, "kind": kind, "name": name, "message": message}


EVENTS = (
    event(10, "alert", "exploding_gradient", "The norm is 4."),
    event(20, "alert", "exploding_gradient", "The norm is 9."),
    event(20, "alert", "exploding_gradient", "The norm is 9 again."),  # the step was made twice
    event(25, "incident", "non_finite", "Step 25 was skipped."),
    event(15, "rollback", "rollback", "Back to step 15."),
    event(30, "data_change", "fingerprint", "Other data, as was allowed."),
)
ENDS = (event(0, "start", "begun"), event(5, "end", "failed"), event(4, "start", "resumed"), event(9, "end", "finished"))
OFTEN = tuple(event(step, "alert", "stalled") for step in range(100, 120))


@pytest.mark.parametrize(
    ("events", "titles", "marks", "told"),
    [
        (EVENTS, ["Data change: fingerprint", "Rollback", "Incident: non finite", "Alert: exploding gradient"],
         {(10, "alert"), (20, "alert"), (25, "incident"), (15, "rollback"), (30, "other")},
         ["Incident: non finite, step 25: Step 25 was skipped.", "Rollback, step 15: Back to step 15.",
          "Alert: exploding gradient, 2 times, at steps 10 and 20: The norm is 9 again."]),
        (ENDS, ["End: finished", "Start: resumed", "End: failed", "Start: begun"], {(5, "incident"), (4, "other")},
         ["End: failed, step 5: Said."]),
        (OFTEN, ["Alert: stalled"], {(step, "alert") for step in range(100, 120)},
         ["Alert: stalled, 20 times, at steps 100, 101, …, 118 and 119: Said."]),
    ],
    ids=["alike events", "a failure is an incident and the edges of a run are not marked", "many steps"],
)  # fmt: skip
def test_events_are_grouped_the_newest_first_and_told_the_gravest_first(bare, events, titles, marks, told):
    run = read_run(bare(events_jsonl=events))
    groups = group_events(run.own.events)
    assert [group.title for group in groups] == titles and {(step, css) for step, css, _ in marks_of(groups)} == marks
    assert attention(run) == [f"Training: {text}" for text in told]


@pytest.fixture
def monitored(bare):
    """Forty layers, one of which leaves the others; some events."""
    rows = []
    for step in range(1, 41):
        row: dict[str, object] = {"step": step, "tokens": 1000 * step, "time": 1e6 + step, "train/loss": 3.0 - step / 40}
        row |= {f"model/activation_rms/{n}": 1.0 + 0.01 * n + (n == 17) * step / 10 for n in range(40)}
        row |= {f"grad/norm/{n}": 0.1 for n in range(40)} | {"grad/norm/embed": 0.5, "made_up/thing": 1.0}
        rows.append(row | {"perf/memory_allocated_bytes": 2_500_000_000})
    return bare(rows, events_jsonl="".join(json.dumps(row) + "\n" for row in EVENTS) + '{"torn')


def test_the_page_tells_what_happened_and_marks_it_in_the_loss(monitored):
    text = checked(monitored).source
    section = text[text.index('<section id="happened"') :].split("</section>")[0]
    assert section.count("<tr>") == 1 + 4 and "Other data, as was allowed." in section
    assert section.index("Data change: fingerprint") < section.index("Rollback") < section.index("Alert: exploding gradient")
    (loss,) = re.findall(r'<svg class="chart"(?:(?!</svg>).)*<title>Loss:.*?</svg>', text, re.S)
    assert len(re.findall(r'class="mark (alert|incident|rollback|other)"', loss)) == 5
    assert "<title>Incident: non finite at step 25</title>" in loss
    assert text.count('class="mark alert"') == 2, "in the chart of the loss only"
    assert "3 things" in text and "Watch: Training: Incident: non finite, step 25" in summary_text(monitored)


def test_events_without_metrics_are_shown_and_the_url_of_a_webhook_is_not(bare):
    config = "seed: 1\nmonitor:\n  level: full\n  webhook: https://example.org/hooks/sesame\n"
    page = checked(bare(config=config, events_jsonl=[event(1, "incident", "non_finite", "At once.")]))
    assert "Nothing measured yet" in page.words and "At once." in page.words and not page.names("svg")
    assert "webhook: (not shown)" in page.source and "level: full" in page.source and "sesame" not in page.source


def test_layers_share_one_chart_that_names_the_odd_one(monitored):
    text = checked(monitored).source
    assert text.count("<figure") == 6, "loss, two of layers, embed, memory, and the one of the plugin"
    (drawing,) = re.findall(r"<title>(model/activation_rms by layer:[^<]*)</title>", text)
    for layer in ("layer 0 from", "layer 20 from", "layer 39 from", "layer 17, farthest from the others from 1.270"):
        assert layer in drawing
    assert text.count('class="c5 area"') == 2 and "The grey area spans all 40 layers." in text
    assert "Model health: 1 more curve" in text and "Gradients: 2 more curves" in text and "2.50 GB" in text
    assert len(text) < 250_000, "forty layers must not make the page forty times as heavy"


def test_a_needle_test_is_drawn_for_each_checkpoint_with_words_for_who_cannot_see_it(quickstart):
    shares = {(256, 0): 1.0, (256, 50): 0.25, (2048, 0): 0.6, (2048, 50): 0.1}
    groups = {f"{n} tokens, {d}% deep": {"n": 20, "accuracy": share, "interval": [0, 1]} for (n, d), share in shares.items()}
    broken = {"256 tokens, 0% deep": {"accuracy": "much"}, "256 tokens, 50% deep": 3, "512 tokens": {}}
    scores = load(quickstart / "exams.json")
    for label, of in (("sft", groups), ("grpo", broken)):
        scores[label]["needle, letters"] = scores[label]["test"] | {"groups": of, "method": "letters"}
        scores[label]["copy, raw"] = scores[label]["test"] | {"groups": of, "method": "likelihood, raw"}
    write(quickstart / "exams.json", scores)
    page = checked(quickstart)
    [drawn] = re.findall('<svg class="chart heat".*?</svg>', page.source, re.S)
    spoken, *cells = re.findall("<title>(.*?)</title>", drawn)
    assert spoken.endswith("by length and depth. 0%: 100% at 256, 60% at 2k; 50%: 25% at 256, 10% at 2k.")
    assert cells[2] == "2,048 tokens, 0% deep: 60.0% of 20 questions, 95% interval 0.0% to 100.0%"
    colours = [float(found) for found in re.findall('fill-opacity="([0-9.]+)"', drawn)]
    assert colours[0] == max(colours) < 0.6 and colours[1] == colours[3] == 0.0 < colours[2] < colours[0]
    assert 'href="#needle"' in page.source and not page.source.count("NaN")
