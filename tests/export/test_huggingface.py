"""The folder of a model for other programs; tests/model compares the numbers of every shape."""

from __future__ import annotations

import json

import pytest
import torch

from osler.cli.main import main
from osler.inference.load import load_model
from osler.tokenizer.bpe import ANSWER
from osler.tokenizer.chat import encode_prompt


def test_transformers_loads_the_folder_and_computes_and_writes_the_same(runs, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    command, folder = ["export", "hf", str(runs.sft), "--out", str(tmp_path / "hf")], tmp_path / "hf"
    assert main(command) == 0
    loaded = load_model(runs.sft)
    theirs, tokenizer = (cls.from_pretrained(folder) for cls in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer))
    question = "Which drug helps: aspirin (A) or salt (B)?"
    for reasoning in (True, False):
        prompt = encode_prompt(loaded.tokenizer, question, reasoning=reasoning)
        messages = [{"role": "user", "content": question}]
        made = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, reasoning=reasoning)
        assert tokenizer(made)["input_ids"] == prompt
    with torch.inference_mode():
        ids = torch.tensor([prompt])
        torch.testing.assert_close(theirs(ids).logits, loaded.model.logits(loaded.model(ids)), atol=1e-4, rtol=0)
    ids = [*loaded.tokenizer.encode("rest"), loaded.tokenizer.special_id(ANSWER), loaded.tokenizer.eos_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"rest{ANSWER}"
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == loaded.tokenizer.eos_id
    assert main(command) == 2 and "is there already" in capsys.readouterr().err
