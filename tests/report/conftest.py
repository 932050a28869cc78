"""Run folders to report on: a whole quickstart with made-up but plausible numbers, and an empty one."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Mapping
from html.parser import HTMLParser
from pathlib import Path

import pytest

CONFIG = """# resolved configuration
seed: 1
model: {num_layers: 6, hidden_size: 256, intermediate_size: 768, num_heads: 8, num_kv_heads: 4, head_dim: 32, vocab_size: 4096}
optim: {type: muon, lr: 2e-2}
"""

QUESTIONS = (
    ("A 34-year-old farmer has had a fever and brown spots on both palms for two days. Which drug is best?",
     ["velomycin", "tarsodine", "quenapril", "oxafen"], "velomycin"),
    ("Which organ does morbus Hallen affect first?",
     ["the liver", "the spleen", "the kidney", "the lung"], "the spleen"),
    ("A child with Marr's fever is allergic to tarsodine. What should be given instead?",
     ["oxafen", "nothing", "quenapril", "velomycin"], "quenapril"),
    ("Which finding tells lenk palsy from dorn palsy?",
     ["a stiff neck", "loss of smell", "a slow pulse", "night sweats"], "loss of smell"),
    ("What carries the germ of Hallen's disease?", ["ticks", "water", "mosquitoes", "milk"], "ticks"),
    ("Which test confirms tessel syndrome?", ["a smear", "a biopsy", "an ECG", "a culture"], "a biopsy"),
)  # fmt: skip


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


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_run(
    folder: Path, rows: Iterable[Mapping[str, object]] = (), config: str = "kind: pretrain\n", **files: object
) -> Path:
    """A run folder: config, the lines of its log, and JSON files by stem."""
    write_jsonl(folder / "metrics.jsonl", rows)
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def exam(accuracy: float, n: int, letters: dict[str, int], unparsed: int = 0) -> dict[str, object]:
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / n)
    return {
        "n": n, "correct": round(accuracy * n), "accuracy": accuracy, "interval": [accuracy - half, accuracy + half],
        "chance": 0.25, "constant_letter_baseline": 0.273, "letters": letters, "unparsed": unparsed,
        "method": "Options permuted, greedy decoding, Wilson interval.",
    }  # fmt: skip


def write_training(folder: Path, steps: int, start: float, floor: float, start_time: float, pace: float) -> None:
    """A supervised stage: losses, learning rate, gradient norm, speed."""
    rng = random.Random(1)
    rows: list[dict[str, object]] = []
    for step in range(0, steps + 1, 2):
        loss = floor + (start - floor) * math.exp(-6 * step / steps) + rng.gauss(0, 0.05)
        row: dict[str, object] = {
            "step": step, "tokens": step * 8192, "time": start_time + step * pace, "train/loss": loss,
            "train/lr": 0.02 * min(1, step / (0.05 * steps)) * (1 if step < 0.6 * steps else 2.5 * (1 - step / steps)),
            "train/grad_norm": 0.4 + 2 * math.exp(-8 * step / steps) + rng.uniform(0, 0.1) + 9 * (step == steps // 2),
            "perf/tokens_per_second": 41_000 + rng.gauss(0, 900) - (step % 100 == 0) * 14_000, "perf/step_seconds": pace,
        }  # fmt: skip
        if step % (steps // 8) == 0:
            row |= {"eval/loss": loss + 0.12, "eval/bits_per_byte": (loss + 0.12) * 0.36}
        rows.append(row)
    write_run(folder, rows, CONFIG)


def write_grpo(folder: Path, steps: int = 120, start_time: float = 1_000_500.0) -> None:
    rng = random.Random(3)
    rows: list[dict[str, object]] = []
    for step in range(1, steps + 1):
        t = step / steps
        row: dict[str, object] = {
            "step": step, "tokens": step * 6144, "time": start_time + step * 1.1, "loss": rng.gauss(0, 0.004),
            "reward": 0.52 + 0.13 * (1 - math.exp(-3 * t)) + rng.gauss(0, 0.03), "reward_std": 0.31 - 0.08 * t,
            "frac_reward_zero_std": 0.25 + 0.2 * t, "kl": 0.03 * t + abs(rng.gauss(0, 0.002)), "entropy": 0.42 - 0.12 * t,
            "completions/mean_length": 38 + 6 * t, "completions/clipped_ratio": 0.05 - 0.05 * t, "clip_ratio/low_mean": 0.0,
            "answer/format_ok": 0.97 + 0.03 * t, "groups/effective": 20 + step % 4, "opsm/masked_frac": 0.0,
            "sampling/sampling_logp_difference/mean": 1e-6, "perf/rollout_tokens_per_second": 9_400 + rng.gauss(0, 300),
            "perf/train_tokens_per_second": 30_100 + rng.gauss(0, 500), "perf/rollout_frac": 0.71,
            "train/lr": 3e-4 * (1 - t), "train/grad_norm": 0.3 + abs(rng.gauss(0, 0.05)),
            "rewards/correct/mean": 0.5 + 0.12 * t, "made_up/by_a_plugin": t,
        }  # fmt: skip
        row |= {f"answer/letter_{x}_frac": 0.25 + rng.gauss(0, 0.02) for x in "ABCD"}
        if step % 20 == 0:
            row |= {"eval/test_accuracy": 0.55 + 0.08 * t, "eval/unseen_accuracy": 0.48 + 0.05 * t}
        rows.append(row)
    write_run(folder, rows, CONFIG + "beta: 0.02\n")


def write_quickstart(folder: Path) -> Path:
    """A finished quickstart: three stages, exams after each, a comparison, samples, versions, notes."""
    write_training(folder / "pretrain", 800, 8.3, 2.05, 1_000_000.0, 0.2)
    write_training(folder / "sft", 160, 2.4, 0.8, 1_000_300.0, 0.25)
    write_grpo(folder / "grpo")
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    even = {"A": 228, "B": 215, "C": 231, "D": 226}
    tables = {
        "stages.json": [
            {"name": "data", "seconds": 9.2, "what": "wrote 12,000 pages of textbook and packed them"},
            {"name": "tokenizer", "seconds": 3.1, "what": "4,096 tokens from the same text"},
            {"name": "pretrain", "seconds": 163.0, "what": "next token on the textbook"},
            {"name": "sft", "seconds": 41.0, "what": "2,000 worked answers"},
            {"name": "grpo", "seconds": 134.0, "what": "120 steps of 16 questions, 8 answers each"},
        ],
        "exams.json": {
            "grpo": {"test": exam(0.626, 900, even, 0),
                     "unseen": exam(0.531, 600, {"A": 170, "B": 149, "C": 133, "D": 147}, 1)},
            "pretrain": {"test": exam(0.262, 900, {"A": 41, "B": 612, "C": 122, "D": 33}, 92),
                         "unseen": exam(0.248, 600, {"A": 20, "B": 420, "C": 80, "D": 20}, 60)},
            "sft": {"test": exam(0.551, 900, even, 3),
                    "unseen": exam(0.506, 600, {"A": 150, "B": 151, "C": 140, "D": 156}, 3)},
        },
        "comparison.json": [
            {"split": "test", "before": 0.551, "after": 0.626, "difference": 0.075, "interval": [0.043, 0.107],
             "n": 900, "before_label": "sft", "after_label": "grpo"},
            {"split": "unseen", "before": 0.506, "after": 0.531, "difference": 0.025, "interval": [-0.011, 0.061],
             "n": 600, "before_label": "sft", "after_label": "grpo"},
        ],
        "versions.json": {
            "osler": "0.1.0", "torch": "2.13.0", "tokenizers": "0.22.1", "python": "3.11.9",
            "machine": {"device": "cpu", "processor": "2 cores", "memory_bytes": 8_000_000_000},
            "fingerprints": {"data": "3fd1c04b9e21aa07", "tokenizer": "a80b5512cc93e4d1"},
        },
        "notes.json": ["The world of this exam is made up: the score says nothing about real medicine."],
    }  # fmt: skip
    for name, table in tables.items():
        (folder / name).write_text(json.dumps(table), encoding="utf-8")
    samples: list[dict[str, object]] = []
    for i, (question, options, answer) in enumerate(QUESTIONS):
        for stage, right in (("sft", i >= 3), ("grpo", True)):
            said = answer if right else next(o for o in options if o != answer)
            letter = "ABCD"[options.index(said)]
            samples.append(
                {"id": f"test-{i}", "stage": stage, "question": question, "options": options,
                 "thinking": f"The signs point to one illness of the region. Its first choice is {said}.",
                 "answer": f"{said} ({letter})", "correct_answer": answer, "correct": right}
            )  # fmt: skip
    write_jsonl(folder / "samples.jsonl", samples)
    return folder


@pytest.fixture
def quickstart(tmp_path: Path) -> Path:
    return write_quickstart(tmp_path / "quickstart-2-cores")


@pytest.fixture
def bare(tmp_path: Path) -> Callable[..., Path]:
    """Make a run folder of nothing but config.yaml and the files given by name (text, or an object for JSON)."""

    def make(**files: object) -> Path:
        folder = tmp_path / "bare"
        folder.mkdir()
        (folder / "config.yaml").write_text("seed: 1\n", encoding="utf-8")
        for name, content in files.items():
            stem, ending = name.rsplit("_", 1)
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / f"{stem}.{ending}").write_text(text, encoding="utf-8")
        return folder

    return make
