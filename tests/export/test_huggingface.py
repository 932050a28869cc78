"""The folder of a model for other programs; tests/model compares the numbers of every shape."""

from __future__ import annotations

import errno
import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from osler.checkpoint.store import read_tensors
from osler.cli.main import main
from osler.inference.load import load_model
from osler.inference.recompute import generate_by_recompute
from osler.model.config import DenseAttentionConfig, SparseAttentionConfig
from osler.ops.sampling_params import SamplingParams
from osler.tokenizer import superbpe
from osler.tokenizer.bpe import ANSWER, EOS, QUESTION, THINKING, Tokenizer
from osler.tokenizer.chat import Turn, encode_examples, encode_prompt
from tests.export.conftest import SHAPES

TEXT = "A patient with fever (A) or a cough (B), 37.5 °C,\n\n  took 12 pills; it's the flu.\r\n\tDr. Ünal said so. " * 40


def fuzzed(count: int) -> list[str]:
    """Texts of words, spaces, line breaks, markers and any characters of Unicode, in any order."""
    draw = random.Random(0)
    parts = ["fever", " cough", "(A)", " (B)", "\n\n", " \r\n", "\t", "  ", "12", " 7", "'s", "é", "e\u0301", "漢字", "🩺", "."]

    def part() -> str:
        character = chr(draw.choice([draw.randrange(0x20, 0x3000), draw.randrange(0xE000, 0x110000)]))
        return draw.choice([*parts, *parts, character])

    return ["".join(part() for _ in range(draw.randrange(30))) for _ in range(count)]


@pytest.fixture(scope="module")
def superwords() -> Tokenizer:
    return superbpe.train([TEXT], 330, 300)


@pytest.mark.parametrize("shape", [*SHAPES, "window", "superbpe"])
def test_transformers_computes_and_writes_the_same(shape, checkpoint, superwords, tmp_path):
    transformers = pytest.importorskip("transformers")
    shapes = {**SHAPES, "superbpe": {}, "window": {"attention": DenseAttentionConfig(window=9)}}
    run = checkpoint(superwords if shape == "superbpe" else None, **shapes[shape])
    assert main(["export", str(run), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    ours = load_model(run)
    theirs, tokenizer = (
        cls.from_pretrained(tmp_path / "hf") for cls in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
    )
    prompt = encode_prompt(ours.tokenizer, "Which drug (A) helps?")[-40:]
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, ours.model.logits(ours.model(ids)), atol=1e-4, rtol=0)
    sampling = SamplingParams(max_new_tokens=12, temperature=0.0, stop_ids=(ours.tokenizer.eos_id,))
    (written,) = generate_by_recompute(ours.model, [prompt], sampling)
    assert theirs.generate(ids, max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist() == list(written.ids)
    plain = [re.sub(r"<\|\w+\|>", "", text) for text in fuzzed(300)]
    assert tokenizer(plain)["input_ids"] == ours.tokenizer.encode_batch(plain)
    assert main(["import", str(tmp_path / "hf"), "--run", str(tmp_path / "back")]) == 0
    assert load_model(tmp_path / "back").model.config.attention == ours.model.config.attention


def test_chat_template_is_the_form_of_training_and_its_markers_stay_readable(runs, tmp_path):
    transformers = pytest.importorskip("transformers")
    assert main(["export", str(runs.sft), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    ours, tokenizer = load_model(runs.sft).tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    question = "Which drug helps: aspirin (A) or salt (B)?"
    asked = [{"role": "user", "content": question}]
    for reasoning in (True, False):
        made = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False, reasoning=reasoning)
        assert tokenizer(made)["input_ids"] == encode_prompt(ours, question, reasoning=reasoning)
        answer = {"role": "assistant", "content": "aspirin (A)", **({"reasoning_content": "It is."} if reasoning else {})}
        ((row, _),) = encode_examples(ours, [Turn(question, "It is." if reasoning else None, "aspirin (A)")])
        assert tokenizer(tokenizer.apply_chat_template([*asked, answer], tokenize=False))["input_ids"] == row
    part = {"type": "text", "text": question}
    history = [{"role": "user", "content": [part, part]}, {"role": "assistant", "content": None, "reasoning_content": "It is."}]
    ((row, _),) = encode_examples(ours, [Turn(question * 2, "It is.", "")])  # as the server reads them
    assert tokenizer(tokenizer.apply_chat_template(history, tokenize=False))["input_ids"] == row
    for message, said in (
        ({"role": "system", "content": "Be brief."}, "no system messages"),
        ({"role": "user", "content": None}, "of the user has no content"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "reads text alone"),
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, "calls no tools"),
    ):
        with pytest.raises(Exception, match=said):
            tokenizer.apply_chat_template([message], tokenize=False)
    ids = [*ours.encode("rest"), ours.special_id(ANSWER), ours.eos_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"rest{ANSWER}"
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == ours.eos_id
    assert {QUESTION, THINKING, EOS} <= set(tokenizer.get_vocab())


def test_a_model_that_answers_at_once_is_asked_so_and_comes_back_so(checkpoint, tmp_path):
    transformers = pytest.importorskip("transformers")
    run = checkpoint(training="{kind: sft, data: {type: turns, thinking_field: null}}")
    assert main(["export", str(run), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for last, given in ((ANSWER, {}), (ANSWER, {"reasoning": False}), (THINKING, {"reasoning": True})):
        made = tokenizer.apply_chat_template(
            [{"role": "user", "content": "A"}], add_generation_prompt=True, tokenize=False, **given
        )
        assert made == f"{QUESTION}A{last}"
    assert main(["import", str(tmp_path / "hf"), "--run", str(tmp_path / "back")]) == 0
    assert not load_model(run).reasons and not load_model(tmp_path / "back").reasons


def test_card_says_what_the_records_say(runs, tmp_path):
    run = shutil.copytree(runs.sft, tmp_path / "sft")
    assert main(["eval", str(run), "task=clinic", "subset=8", "max_new_tokens=24"]) == 0
    assert main(["export", str(run), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    score = next(iter(json.loads((run / "exams.json").read_text())["sft"].values()))
    low, high = score["interval"]
    assert f"| {score['accuracy']:.1%} | [{low:.1%}, {high:.1%}] |" in card and "not medical advice" in card
    assert "**sft**: 61,440 tokens" in card and str(tmp_path) not in card


def test_card_has_one_row_for_an_exam_and_marks_questions_for_training(runs, tmp_path):
    run = shutil.copytree(runs.sft, tmp_path / "sft")
    assert main(["eval", str(run), "task=clinic:train,clinic:new_findings", "subset=8", "max_new_tokens=24"]) == 0
    exams = json.loads((run / "exams.json").read_text())
    exams["sft"]["new_findings"]["n"] = 500  # as a pipeline that has this run as a stage examined it
    (tmp_path / "exams.json").write_text(json.dumps(exams))
    shutil.copytree(run / "answers", tmp_path / "answers")
    (tmp_path / "config.yaml").write_text("exam: {kind: exam, of: {sft: sft}}")
    assert main(["export", str(run), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    rows = [(row[1].strip(), row[-2].strip()) for line in card.splitlines() if len(row := line.split("|")) == 7][2:]
    assert rows == [("train (questions for training)", "8"), ("new_findings", "500")]
    assert "questions for training does not say" in card


def test_bf16_is_written_when_asked_for(checkpoint, tmp_path, capsys):
    run, folder = checkpoint(), tmp_path / "hf"
    assert main(["export", str(run), "--to", "hf", "--dtype", "bf16", "--out", str(folder)]) == 0
    assert {tensor.dtype for tensor in read_tensors(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    command = ["export", str(run), "--to", "hf", "--dtype", "q8_0", "--out", str(tmp_path / "other")]
    assert main(command) == 2 and "which has fp32, bf16" in capsys.readouterr().err
    assert main([*command[:4], "--out", str(folder)]) == 2 and "is there already" in capsys.readouterr().err


def test_one_file_holds_a_sparse_model_as_it_is(checkpoint, tmp_path, capsys):
    run = checkpoint(attention=SparseAttentionConfig(top_k=16, local_window=4))
    assert main(["export", str(run), "--to", "hf", "--out", str(tmp_path / "hf")]) == 2
    assert "`--to safetensors` writes the model as it is" in capsys.readouterr().err
    assert main(["export", str(run), "--to", "hf", "--max-tokens", "16", "--out", str(tmp_path / "hf")]) == 0
    written = replace(load_model(run).model.config, attention=DenseAttentionConfig()).num_parameters  # without the index
    assert f"/hf: {written:,} parameters" in capsys.readouterr().err
    path = tmp_path / "model.safetensors"
    assert main(["export", str(run), "--to", "safetensors", "--out", str(path)]) == 0
    ours, theirs = load_model(run), read_tensors(path)
    torch.testing.assert_close(theirs, dict(ours.model.state_dict()), atol=0, rtol=0)
    with safe_open(path, "pt") as file:
        described = file.metadata()
    assert json.loads(described["model"])["attention"]["top_k"] == 16
    assert Tokenizer.from_bytes(described["tokenizer"].encode()).fingerprint == ours.tokenizer.fingerprint


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_is_interrupted_leaves_nothing(error, checkpoint, tmp_path, monkeypatch, capsys):
    run = checkpoint()

    def fail(path: Path, data: bytes) -> int:
        raise error

    monkeypatch.setattr(Path, "write_bytes", fail)
    command = ["export", str(run), "--to", "hf", "--out", str(tmp_path / "out" / "hf")]
    assert main(command) == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("form", ["hf", "gguf", "safetensors", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_disk_that_takes_no_more_is_named_and_keeps_nothing(form, checkpoint, tmp_path, capsys):
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    command = ["export", str(checkpoint()), "--to", form, "--out", str(tmp_path / "out" / form)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))  # every writer, of any library, meets it as a full disk
    try:
        assert main(command) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.search(rf"{tmp_path}/out/{form}: (File too large|No space left on device)\. ", capsys.readouterr().err)
    assert list((tmp_path / "out").iterdir()) == []
