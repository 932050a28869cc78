"""Osler in Python: the README's example as it stands, what each function returns, and what is refused."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from osler import api
from osler.cli.main import main
from osler.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
SMALL = "distill/pretrain"
GREEDY = api.SamplingParams(max_new_tokens=12, temperature=0)


def test_the_example_of_the_readme_runs(runs, tmp_path, monkeypatch, capsys):
    example = re.search(r"```python\n(from osler import api\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example is not None
    (tmp_path / "runs/quickstart").mkdir(parents=True)
    (tmp_path / "runs/quickstart/sft").symlink_to(runs.sft)
    monkeypatch.chdir(tmp_path)
    exec(example[1], found := {})
    assert all(name in example[1] for name in ("model_config", "build", "load", "generate", "chat", "score", "loss"))
    assert found["model"].path.parent.parent.resolve() == runs.sft.resolve() and capsys.readouterr().out


def test_a_recipe_is_counted_and_built():
    config = api.model_config(SMALL, "model.num_layers=3")
    model = api.build(SMALL, "model.num_layers=3", seed=1)
    assert config == model.config and config.num_layers == 3
    padding = (config.padded_vocab_size - config.vocab_size) * config.hidden_size * (1 if config.tie_embeddings else 2)
    assert sum(weight.numel() for weight in model.parameters()) == config.num_parameters + padding
    assert not torch.equal(model.embed_tokens.weight, api.build(SMALL, "model.num_layers=3").embed_tokens.weight)


def test_text_replies_and_scores_are_those_of_the_commands(runs, capsys):
    model = api.load(runs.sft)
    assert main(["generate", str(runs.sft), "--prompt", "The", "--temperature", "0", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out == api.generate(model, "The", GREEDY) + "\n"
    reply = api.chat(model, "Which one: aspirin (A) or salt (B)?", GREEDY)
    assert reply.thinking and api.chat(model, "Which one?", GREEDY, reasoning=False).thinking == ""
    sheet, command = runs.sft.parent / "api.json", ["eval", str(runs.sft), "task=clinic", "subset=5", "method=likelihood"]
    assert main([*command, "--json", str(sheet)]) == 0
    table = capsys.readouterr().out
    scores = api.score(model, "clinic", subset=5, method="likelihood")
    assert [score.n for score in scores] == [5] * 4 and all(score.interval[0] <= score.accuracy for score in scores)
    assert all(f"{score.accuracy:.1%}" in table for score in scores)


def test_loss_is_the_mean_over_the_tokens_that_follow_another(runs):
    model = api.load(runs.sft, device="cpu")
    rows = [model.tokenizer.encode("The heart beats."), model.tokenizer.encode("Fever")]
    loss = api.loss(model, rows)
    loss.backward()
    total = count = 0
    for row in rows:
        logp_TV = model.model.logits(model.model(torch.tensor([row])))[0].log_softmax(-1)
        total -= sum(logp_TV[place, token].item() for place, token in enumerate(row[1:]))
        count += len(row) - 1
    assert loss.item() == pytest.approx(total / count, rel=1e-5)
    assert model.model.embed_tokens.weight.grad.norm() > 0
    fresh = api.build(SMALL, "model.head_init=zero", "model.tie_embeddings=false")
    assert api.loss(fresh, torch.tensor([[1, 2, 3], [4, 5, 6]])).item() == pytest.approx(math.log(fresh.config.vocab_size))


def test_what_does_not_exist_or_fit_is_refused(runs, tmp_path):
    model = replace(api.load(runs.pretrain), training={}, state={})  # nothing says that it learned more than text
    for call, words in (
        (lambda: api.build("pure-tinny"), "pure-tiny"),
        (lambda: api.model_config("grpo-debug"), "starts from a checkpoint"),
        (lambda: api.load(tmp_path / "no-run"), "no-run"),
        (lambda: api.chat(model, "Why?"), "text alone"),
        (lambda: api.score(model, "clinic", subsett=5), "subset"),
        (lambda: api.score(model, "medqa:nowhere.jsonl"), "nowhere.jsonl"),
        (lambda: api.loss(model, [[1], [2, 3]]), "rows of 2 to 257"),
        (lambda: api.loss(model, [[1, 512]]), "vocabulary of 512"),
        *((lambda rows=rows: api.loss(model, rows), "lists of token ids") for rows in ("The", ["The"], [1, 2], [[1.0, 2.0]])),
        (lambda: api.load(runs.pretrain, which="last"), "newest or best"),
        (lambda: api.chat(str(tmp_path), "Why?"), "give api.load"),
        (lambda: api.generate(model, "The", stop=["x", ""]), "\\(stop\\) is empty"),
        (lambda: api.generate(model, "The", api.SamplingParams(logit_bias=((512, 1.0),))), "logit_bias has token id 512"),
        (lambda: api.generate(model, ["a", "b"]), "prompt is list, .* once for each text"),
        (lambda: api.chat(model, ["a", "b"]), "question is list"),
    ):
        with pytest.raises(UserError, match=words):
            call()


def test_importing_it_and_counting_take_no_torch_and_type_checkers_see_its_types():
    assert (ROOT / "osler/py.typed").is_file() and '"py.typed"' in (ROOT / "pyproject.toml").read_text()
    counted = "api.model_config('factorized-177m').num_parameters"
    code = f"import sys\nfrom osler import api\nassert {counted} and 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
