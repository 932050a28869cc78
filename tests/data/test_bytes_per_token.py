"""`osler tokenizer compare`: the table by hand, text in every form the readers know, and what cannot be compared."""

import json
from pathlib import Path

import pytest

from osler.cli.main import main
from osler.data import bytes_per_token
from osler.tokenizer.bpe import Tokenizer

TEXT = "fever and cough, fever and cough."


@pytest.fixture
def tokenizers(tmp_path: Path) -> list[str]:
    """One that knows bytes alone, and one that has learned the text."""
    paths = [tmp_path / "bytes.json", tmp_path / "learned.json"]
    for path, texts in zip(paths, ([""], [TEXT] * 9), strict=True):
        path.write_bytes(Tokenizer.train(texts, 600).to_bytes())
    return [str(path) for path in paths]


def test_a_row_for_each_tokenizer_and_a_column_for_each_text(tokenizers, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bytes_per_token, "_BATCH", 2)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text(TEXT)
    (tmp_path / "notes" / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [TEXT, "", "é", TEXT]))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "é" * 10, "note": TEXT}) + "\n")
    texts = [str(tmp_path / "notes"), str(tmp_path / "rows.jsonl")]
    assert main(["tokenizer", "compare", *tokenizers, "--text", *texts]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    learned = Tokenizer.load(tokenizers[1])
    rate = (3 * len(TEXT) + 2) / (3 * len(learned.encode(TEXT)) + 2)
    assert lines == [
        ["bytes", "per", "token", "vocabulary", "notes", "rows.jsonl"],
        [tokenizers[0], "260", "1.000", "1.000"],
        [tokenizers[1], str(learned.vocab_size), f"{rate:.3f}", "1.000"],
    ]
    assert main(["tokenizer", "compare", tokenizers[1], "--field", "note", "--text", texts[1]]) == 0
    assert f"{len(TEXT) / len(learned.encode(TEXT)):.3f}" in capsys.readouterr().out


def test_a_tokenizer_that_changes_the_text_is_named(tokenizers, tmp_path, capsys):
    content = json.loads(Path(tokenizers[1]).read_bytes())
    (tmp_path / "lower.json").write_text(json.dumps(content | {"normalizer": {"type": "Lowercase"}}))
    (tmp_path / "a.txt").write_text("Fever")
    assert main(["tokenizer", "compare", *tokenizers, str(tmp_path / "lower.json"), "--text", str(tmp_path / "a.txt")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{tmp_path / 'lower.json'} does not give every text back, so its numbers are too good."


@pytest.mark.parametrize(
    ("tokenizer", "more", "said"),
    [
        ("absent.json", ["--text", "a.txt"], "There is no tokenizer at absent.json"),
        ("bytes.json", ["--text", "absent.txt"], "absent.txt"),
        ("bytes.json", ["--text", "a.txt", "empty.txt"], "There is no text in empty.txt"),
        ("bytes.json", ["--text", "rows.jsonl"], "Set --field=NAME to the column that holds it"),
    ],
)
def test_what_cannot_be_compared_is_told(tokenizer, more, said, tokenizers, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(TEXT)
    Path("empty.txt").write_text("")
    Path("rows.jsonl").write_text('{"body": "x"}\n')
    assert main(["tokenizer", "compare", tokenizer, *more]) == 2
    assert said in capsys.readouterr().err
