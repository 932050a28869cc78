"""Runs side by side: what they share is overlaid, what differs is named, and what does not compare is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from osler.cli.main import main
from osler.report.compare import compare
from osler.runtime.errors import UserError
from tests.report.conftest import MODEL, Page, write_run


@pytest.fixture
def make_run(tmp_path):
    """A run of some steps, with a config and other files by name."""

    def make(name: str, *, steps: int = 40, config: str = "kind: pretrain\n", metrics: str = "train/loss", **more: Any) -> Path:
        own = ({"step": step, "tokens": 512 * step, "time": 1e6 + step} for step in range(1, steps + 1))
        rows = [{**row, **dict.fromkeys(metrics.split(), 2.0 + 1 / row["step"])} for row in own]
        return write_run(tmp_path / name, rows, config, **more)

    return make


def row(text: str, what: str) -> list[str]:
    (found,) = [line for line in text.splitlines() if line.startswith(what)]
    return re.split(r"\s{2,}", found[len(what) :].strip())


def test_two_runs_are_overlaid_over_tokens(make_run, tmp_path):
    score = {"n": 500, "accuracy": 0.55, "correct": 275, "interval": [0.506, 0.593]}
    shared, other = "kind: pretrain\nseed: 0\n", "curriculum: [{seq_len: 64}]\nmax_minutes: 3\n"
    config = f"{shared}optim: {{lr: 0.01, type: adamw}}\nmax_minutes: null\n"
    a = make_run("a", config=config, exams_json={"a": {"test": score}})
    b = make_run("b", config=f"{shared}optim: {{lr: 0.02, type: adamw}}\n{other}", steps=20)
    text = compare([str(a), str(b)], page := tmp_path / "out.html")
    assert row(text, "steps") == ["40", "20"] and row(text, "tokens") == ["20,480", "10,240"]
    assert row(text, "time") == ["39 s", "19 s"]
    assert row(text, "optim.lr") == ["0.01", "0.02"] and row(text, "curriculum[0].seq_len") == ["–", "64"]
    assert row(text, "max_minutes") == ["null", "3"]
    assert "seed" not in text and "optim.type" not in text
    assert row(text, "exam on test, 95% interval") == ["55.0% (50.6% to 59.3%)", "–"]
    html = page.read_text(encoding="utf-8")
    assert "Loss: train: a from 3.000 at 512 tokens to 2.025 at 20,480 tokens; b from 3.000 at 512 tokens to 2.050 at" in html
    assert html.count("<figure") == 1 and "0.02" in html and "55.0% (50.6% to 59.3%)" in html
    assert "http://" not in html and "https://" not in html and "default-src 'none'" in html


def test_other_kinds_share_what_they_share(make_run, tmp_path):
    a = make_run("a", metrics="train/loss train/grad_norm perf/tokens_per_second")
    g = make_run("g", config="kind: grpo\n", metrics="reward train/grad_norm")
    text = compare([str(a), str(g)], page := tmp_path / "out.html")
    html = page.read_text(encoding="utf-8")
    assert re.findall(r"<h4>([^<]+?)(?: <small>.*?)?</h4>", html) == ["Gradient norm"]
    assert row(text, "kind") == ["pretrain", "grpo"] and row(text, "reward, mean of the last tenth")[0] == "–"


def test_the_terminal_has_short_values_and_hostile_names_stay_text(make_run, tmp_path):
    evil = "<script>alert(1)<-script>"
    a = make_run(evil, config=f"seed: 0\nevil: {json.dumps(evil)}\nnote: {'long ' * 40}\n")
    g = make_run("g", config="seed: 1\nnote: short\n")
    text = compare([str(a), str(g)], page := tmp_path / "out.html")
    assert row(text, "seed") == ["0", "1"] and row(text, "note") == ["long " * 7 + "l", "short"]
    assert max(map(len, text.splitlines())) < 120 and "long " * 39 in page.read_text(encoding="utf-8")
    assert len(Page(page).names("script")) == 1


def test_stories_are_compared_stage_by_stage(make_run, tmp_path):
    for story, steps in (("one", 10), ("two", 20)):
        for stage in ("sft", "pretrain"):
            make_run(f"{story}/{stage}", steps=steps, config=f"kind: {stage}\n")
        (tmp_path / story / "config.yaml").write_text("kind: pipeline\n", encoding="utf-8")
    make_run("plain", config="kind: sft\n", steps=30)
    text = compare([str(tmp_path / name) for name in ("one", "two", "plain")], page := tmp_path / "out.html")
    first, second = text.split("\n\n")[0], text.split("Supervised fine-tuning")[1]
    assert first.startswith("Pretraining") and row(first, "steps") == ["10", "20"] and row(second, "steps") == ["10", "20", "30"]
    html = page.read_text(encoding="utf-8")
    assert html.index("<h2>Pretraining</h2>") < html.index("<h2>Supervised fine-tuning</h2>")


def test_models_differ_as_they_were_trained(make_run, tmp_path):
    """The fields of ``model`` in the config of a run with ``init_from`` are defaults that nothing uses."""
    wide = {**MODEL, "hidden_size": 512}
    new = make_run("new", config=f"kind: pretrain\nmodel: {json.dumps(MODEL)}\ninit_from: null\n", model_json=MODEL)
    unused = "kind: sft\nmodel: {num_layers: 99}\ninit_from: new\n"
    tuned, bare = make_run("tuned", config=unused, model_json=MODEL), make_run("bare", config=unused)
    text = compare([str(new), str(tuned)], tmp_path / "out.html")
    assert row(text, "init_from") == ["null", "new"] and "model." not in text
    assert "model." not in compare([str(bare), str(make_run("other", config=unused.replace("99", "98")))], tmp_path / "out.html")
    text = compare([str(tuned), str(make_run("wide", config=unused, model_json=wide))], tmp_path / "out.html")
    assert row(text, "model.hidden_size") == ["256", "512"] and text.count("model.") == 1


def test_runs_of_one_name_are_told_by_their_path(make_run, tmp_path):
    folders = [str(make_run("x/run")), str(make_run("y/run"))]
    text = compare(folders, tmp_path / "out.html")
    assert folders[0] in text and folders[1] in text


def test_what_does_not_compare_is_refused(make_run, tmp_path, capsys):
    a, story = make_run("a"), tmp_path / "story"
    for stage in ("sft", "grpo"):
        make_run(f"story/{stage}", config=f"kind: {stage}\n")
    (story / "config.yaml").write_text("kind: pipeline\n", encoding="utf-8")
    empty = make_run("empty", steps=0)
    for folders, message in (
        ([a], "2 to 8"), ([a, a], "given twice"), ([a, tmp_path], "not a run folder"), ([a, empty], "no metrics yet"),
        ([a, story], "no stage in common"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            compare([str(folder) for folder in folders], tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()
    assert main(["compare", str(a), str(make_run("b")), "--out", str(tmp_path / "no" / "out.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main(["compare", str(a), str(tmp_path / "b"), "--out", str(tmp_path / "out.html")]) == 0
    assert capsys.readouterr().out.rstrip().endswith("out.html")
