"""Run folders to report on: a whole quickstart with made-up but plausible numbers, and an empty one."""

import json
import math
import random
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest

from osler.monitor.metrics import METRICS
from osler.report.charts import family_of

CONFIG = """# resolved configuration
seed: 1
optim: {type: muon, lr: 2e-2}
"""

MODEL = {
    "num_layers": 6, "hidden_size": 256, "intermediate_size": 768, "num_heads": 8, "num_kv_heads": 4, "head_dim": 32,
    "vocab_size": 4096,
}  # fmt: skip
DRUGS = ["velomycin", "tarsodine", "quenapril", "oxafen"]
GRPO_METRICS = [name for name in METRICS if "<" not in name and family_of(name).title == "Reinforcement learning"]
GRPO_METRICS += ["answer/letter_A_frac", "rewards/correct/mean", "train/lr", "made_up/by_a_plugin"]


class Page(HTMLParser):
    """A page's tags and its text; complains where a tag closes what another opened, or has an attribute twice."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in {"meta", "link", "br", "hr", "img", "input"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute of <{tag}> is given twice"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes {self.open[-3:]}"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def names(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of all tags of a name."""
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def write(path: Path, content: object) -> None:
    """Write text as it is, and anything else as JSON: a line for each row where the file's name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl" and not isinstance(content, str):
        content = "".join(json.dumps(row) + "\n" for row in content)  # type: ignore[attr-defined]
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def write_run(folder: Path, rows: object = (), config: str = "kind: pretrain\n", **files: object) -> Path:
    """A run folder: the lines of its log, its config, and files by name (`exams_json`)."""
    for name, content in {"metrics_jsonl": rows, "config_yaml": config, **files}.items():
        write(folder / ".".join(name.rsplit("_", 1)), content)
    return folder


def exam(accuracy: float, n: int, letters: dict[str, int], unparsed: int = 0) -> dict[str, object]:
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / n)
    return {
        "n": n, "presentations": n, "correct": round(accuracy * n),
        "accuracy": accuracy, "interval": [accuracy - half, accuracy + half],
        "chance": 0.25, "constant_letter_baseline": 0.273, "letters": letters, "unparsed": unparsed,
        "method": "Options permuted, greedy decoding, Wilson interval.",
    }  # fmt: skip


def write_training(folder: Path, steps: int, start: float, floor: float, start_time: float, pace: float) -> None:
    """A supervised stage: losses, learning rate, gradient norm with a spike, speed with dips."""
    rng = random.Random(1)
    rows: list[dict[str, object]] = []
    for step in range(0, steps + 1, 2):
        loss = floor + (start - floor) * math.exp(-6 * step / steps) + rng.gauss(0, 0.05)
        row: dict[str, object] = {
            "step": step, "tokens": step * 8192, "time": start_time + step * pace, "train/loss": loss,
            "train/lr": 0.02 * (1 - step / steps), "train/grad_norm": 0.4 + rng.uniform(0, 0.1) + 9 * (step == steps // 2),
            "perf/tokens_per_second": 41_000 + rng.gauss(0, 900) - (step % 100 == 0) * 14_000, "perf/step_seconds": pace,
        }  # fmt: skip
        if step % (steps // 8) == 0:
            row |= {"eval/loss": loss + 0.12, "eval/bits_per_byte": (loss + 0.12) * 0.36}
        rows.append(row)
    write_run(folder, rows, CONFIG, model_json=MODEL)


def write_grpo(folder: Path, steps: int = 120) -> None:
    rows: list[dict[str, object]] = []
    for step in range(1, steps + 1):
        t = step / steps
        row: dict[str, object] = {"step": step, "tokens": step * 6144, "time": 1_000_500.0 + step * 1.1}
        row |= {name: (0.2 + t / 2) / (1 + number) for number, name in enumerate(GRPO_METRICS)}
        row |= {"eval/test_accuracy": 0.55 + 0.08 * t, "eval/unseen_accuracy": 0.48 + 0.05 * t} if step % 20 == 0 else {}
        rows.append(row)
    write_run(folder, rows, CONFIG + "beta: 0.02\n")


def compared(split: str, n: int, before: float, after: float, low: float, high: float) -> dict[str, object]:
    both = {"split": split, "n": n, "before": before, "after": after, "difference": after - before}
    return {**both, "interval": [low, high], "before_label": "sft", "after_label": "grpo"}


def sample(number: int, stage: str, right: bool) -> dict[str, object]:
    said = number % 4 if right else (number + 1) % 4
    asked = {"id": f"test-{number}", "stage": stage, "question": f"Which drug helps in case {number}?", "options": DRUGS}
    answer = {"thinking": f"The first choice is {DRUGS[said]}.", "answer": f"{DRUGS[said]} ({'ABCD'[said]})"}
    return {**asked, **answer, "correct_answer": DRUGS[number % 4], "correct": right}


@pytest.fixture
def quickstart(tmp_path: Path) -> Path:
    """A finished quickstart: three stages, exams after each, a comparison, samples, versions, notes."""
    folder = tmp_path / "quickstart-2-cores"
    write_training(folder / "pretrain", 800, 8.3, 2.05, 1_000_000.0, 0.2)
    write_training(folder / "sft", 160, 2.4, 0.8, 1_000_300.0, 0.25)
    write_grpo(folder / "grpo")
    even, habit = {"A": 228, "B": 215, "C": 231, "D": 226}, {"A": 41, "B": 612, "C": 122, "D": 33}
    details = {  # seconds, and what was done
        "data": (9.2, "wrote 12,000 pages of textbook and packed them"),
        "tokenizer": (3.1, "4,096 tokens from the same text"),
        "pretrain": (163.0, "next token on the textbook"),
        "sft": (41.0, "2,000 worked answers"),
        "grpo": (134.0, "120 steps of 16 questions, 8 answers each"),
    }
    write_run(
        folder, (), CONFIG,
        stages_json=[{"name": name, "seconds": seconds, "what": what} for name, (seconds, what) in details.items()],
        exams_json={  # not in the order of training
            "grpo": {"test": exam(0.626, 900, even), "unseen": exam(0.531, 600, even, 1)},
            "pretrain": {"test": exam(0.262, 900, habit, 92), "unseen": exam(0.248, 600, habit, 60)},
            "sft": {"test": exam(0.551, 900, even, 3), "unseen": exam(0.506, 600, even, 3)},
        },
        comparison_json=[
            compared("test", 900, 0.551, 0.626, 0.043, 0.107), compared("unseen", 600, 0.506, 0.531, -0.011, 0.061)
        ],
        versions_json={
            "osler": "0.1.0", "torch": "2.13.0", "machine": {"device": "cpu", "memory_bytes": 8_000_000_000},
            "fingerprints": {"data": "3fd1c04b9e21aa07", "tokenizer": "a80b5512cc93e4d1"},
        },
        notes_json=["The world of this exam is made up: the score says nothing about real medicine."],
        samples_jsonl=[sample(n, stage, stage == "grpo" or n >= 3) for n in range(6) for stage in ("sft", "grpo")],
    )  # fmt: skip
    return folder


@pytest.fixture
def bare(tmp_path: Path) -> Callable[..., Path]:
    """Make a run folder of the lines of a log and what else is given."""
    return partial(write_run, tmp_path / "bare")
