"""From somebody's own notes and questions to a model that writes, answers and has a report: one command after another."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq

from osler.cli.main import main
from osler.inference.load import load_model

SIGNS = {"fever": "infection", "thirst": "diabetes", "wheeze": "asthma", "jaundice": "hepatitis"}
SMALL = [
    "seq_len=64",
    "batch_tokens=512",
    "total_tokens=10_240",
    "eval_every_tokens=5120",
    "optim.lr=1e-2",
    "schedule.warmup_tokens=0",
]
FAST = ["device=cpu", "precision=fp32", "compile=never"]
MODEL = [
    f"model.{field}"
    for field in ("num_layers=1", "hidden_size=32", "intermediate_size=64", "num_heads=2", "num_kv_heads=1", "head_dim=16")
] + ["model.vocab_size=512", "tokenizer.vocab_size=400"]


def osler(*arguments) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def test_notes_and_questions_to_a_model_that_answers(tmp_path, capsys):
    notes = tmp_path / "notes"
    notes.mkdir()
    texts = [f"A patient with {sign} may have {cause}. Note {n}." for n in range(40) for sign, cause in SIGNS.items()]
    (notes / "a.md").write_text("\n".join(texts[:40]))
    (notes / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[40:100]))
    pq.write_table(pa.table({"text": texts[100:]}), notes / "c.parquet")
    cases = tmp_path / "cases.jsonl"
    rows = [{"question": f"Case {n}: {sign}?", "answer": SIGNS[sign]} for n in range(20) for sign in SIGNS]
    cases.write_text("".join(json.dumps(row) + "\n" for row in rows))

    base, tuned = tmp_path / "base", tmp_path / "tuned"
    osler("pretrain", "data.type=files", f"data.path={notes}", *SMALL, *FAST, *MODEL, "--run", base)
    turns = ["data.type=turns", f"data.path={cases}", "packing=whole", "document_mask=true"]
    osler("sft", f"init_from={base}", *turns, *SMALL, *FAST, "total_tokens=40_960", "--run", tuned)

    lines = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["eval/loss"] for line in lines if "eval/loss" in line]
    assert held_out[-1] < 0.3 and held_out[-1] < held_out[0]
    assert load_model(tuned).model.config.num_layers == 1

    capsys.readouterr()
    osler("generate", base, "--prompt", "A patient with fever", "--max-new-tokens", "8", "--temperature", "0")
    assert capsys.readouterr().out.strip()
    osler("report", tuned)
    assert "<html" in (tuned / "report.html").read_text(encoding="utf-8")
