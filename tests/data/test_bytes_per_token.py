"""`osler tokenizer compare`: the table by hand, text in every form the readers know, and what cannot be compared."""

import json
from pathlib import Path

import pytest

from osler.cli.main import main
from osler.data import from_recipe
from osler.tokenizer.bpe import Tokenizer

TEXT = "fever and cough, fever and cough."


@pytest.fixture(autouse=True)
def tokenizers(tmp_path, monkeypatch):
    """One that knows bytes alone, one that has learned the text, and one that changes it."""
    monkeypatch.chdir(tmp_path)
    for name, texts in {"bytes.json": [""], "learned.json": [TEXT] * 9}.items():
        Path(name).write_bytes(Tokenizer.train(texts, 600).to_bytes())
    Path("lower.json").write_text(json.dumps(json.loads(Path("bytes.json").read_bytes()) | {"normalizer": {"type": "Lowercase"}}))
    Path("notes").mkdir()
    Path("notes/a.txt").write_text(TEXT)
    Path("notes/b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [TEXT, "", "é", TEXT]))
    Path("rows.jsonl").write_text(json.dumps({"body": "É" * 10}) + "\n")
    Path("empty.txt").write_text("")


def test_a_row_for_each_tokenizer_and_a_column_for_each_text(capsys, monkeypatch):
    monkeypatch.setattr(from_recipe, "COMPARED_CHARS", 40)
    assert main(["tokenizer", "compare", "bytes.json", "learned.json", "--text", "notes", "notes/a.txt"]) == 0
    learned = Tokenizer.load("learned.json")
    whole, rate = len(TEXT) / len(learned.encode(TEXT)), (3 * len(TEXT) + 2) / (3 * len(learned.encode(TEXT)) + 2)
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["bytes", "per", "token", "vocabulary", "notes", "a.txt"],
        ["bytes.json", "260", "1.000", "1.000"],
        ["learned.json", str(learned.vocab_size), f"{rate:.3f}", f"{whole:.3f}"],
    ]
    assert main(["tokenizer", "compare", "bytes.json", "lower.json", "--field", "body", "--text", "rows.jsonl"]) == 0
    assert capsys.readouterr().out.endswith("\nlower.json does not give every text back, so its numbers are too good.\n")


@pytest.mark.parametrize(
    ("tokenizer", "text", "said"),
    [
        ("absent.json", "notes", "There is no tokenizer at absent.json"),
        ("bytes.json", "absent.txt", "absent.txt"),
        ("bytes.json", "empty.txt", "There is no text in empty.txt"),
        ("bytes.json", "rows.jsonl", "Set --field=NAME to the column that holds it"),
    ],
)
def test_what_cannot_be_compared_is_told(tokenizer, text, said, capsys):
    assert main(["tokenizer", "compare", tokenizer, "--text", text]) == 2
    assert said in capsys.readouterr().err
