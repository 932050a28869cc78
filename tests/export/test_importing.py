"""Models of others become runs: what they compute stays as it is, and what Osler's model does not compute is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from osler.checkpoint.store import read_tensors, write_tensors
from osler.cli.main import main
from osler.export.importing import rope_of
from osler.inference.load import load_model
from osler.model.config import YarnConfig
from osler.tokenizer.bpe import EOS, SPECIALS, Tokenizer
from tests.export.conftest import SHAPES
from tests.export.test_huggingface import TEXT

QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.fixture
def published(tmp_path) -> Callable[..., Path]:
    """``published(specials, unused)`` is a folder as transformers saves it: bf16, tied, in several files, rows to spare."""
    transformers = pytest.importorskip("transformers")

    def save(specials: tuple[str, ...] = QWEN, unused: int = 70) -> Path:
        tokenizer = Tokenizer.train([TEXT], 330, specials)
        shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32}
        ends = {"eos_token_id": [len(specials) - 1], "rope_theta": 1e6}
        ends["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}  # transformers 5; 4.57 reads the field above
        config = transformers.Qwen3Config(
            **shape,
            **ends,
            num_key_value_heads=2,
            vocab_size=tokenizer.vocab_size + unused,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        model = transformers.Qwen3ForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(tmp_path / "published", max_shard_size="60KB")
        (tmp_path / "published" / "tokenizer.json").write_bytes(tokenizer.to_bytes())
        return tmp_path / "published"

    return save


def logits_of(run: Path, ids: torch.Tensor) -> torch.Tensor:
    model = load_model(run).model
    with torch.inference_mode():
        return model.logits(model(ids))


def test_a_published_model_computes_what_transformers_computes_and_learns(published, tiny, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    folder, run, ids = published(), tmp_path / "run", torch.arange(40)[None]
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert main(["import", str(folder), "--run", str(run)]) == 0
    said, tokenizer = capsys.readouterr().err, load_model(run).tokenizer
    first = Tokenizer.load(folder).vocab_size
    assert f"has not learned: <|question|> ({first}), <|thinking|> ({first + 1}), <|answer|> ({first + 2})" in said
    assert tokenizer.encode(TEXT) == Tokenizer.load(folder).encode(TEXT) and tokenizer.eos_id == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(logits_of(run, ids), theirs(ids).logits, atol=1e-4, rtol=0)
    assert main(["generate", str(run), "--prompt", "Dr.", "--max-new-tokens", "4"]) == 0
    shorter = [
        "total_tokens=1024",
        "eval_every_tokens=4096",
        "checkpoint.every_tokens=1024",
        "tokenizer.path=null",
        "seq_len=256",
    ]
    assert main(["sft", tiny.sft, f"init_from={run}", *shorter, "--run", str(tmp_path / "sft")]) == 0
    assert main(["sft", tiny.sft, *shorter, "--run", str(run)]) == 2  # no run began in this folder


def test_tokens_that_do_not_fit_get_rows_and_another_end_of_text_its_name(published, tmp_path, capsys):
    folder, run = published(specials=("<s>", "</s>"), unused=0), tmp_path / "run"
    assert main(["import", str(folder), "--run", str(run)]) == 0
    said, loaded = capsys.readouterr().err, load_model(run)
    assert f"</s>, which ends its texts, is called {EOS}" in said and loaded.tokenizer.eos_id == 1
    assert loaded.tokenizer.encode(TEXT) == Tokenizer.load(folder).encode(TEXT)
    first = Tokenizer.load(folder).vocab_size
    assert loaded.model.config.vocab_size == first + 3 and loaded.tokenizer.special_ids >= {0, 1, *range(first, first + 3)}
    rows = loaded.model.embed_tokens.weight.detach()
    torch.testing.assert_close(rows[first : first + 3], rows[:first].mean(0).expand(3, -1))


def test_fields_that_are_left_out_or_null_are_looked_for_elsewhere(published, tmp_path):
    folder = published(specials=("<s>", "</s>"))
    (folder / "generation_config.json").write_text('{"eos_token_id": null}')  # config.json has it
    assert main(["import", str(folder), "--run", str(tmp_path / "run")]) == 0
    assert load_model(tmp_path / "run").tokenizer.eos_id == 1
    tokenizer = json.loads(Tokenizer.train([TEXT], 330, ()).to_bytes())
    tokenizer["model"]["vocab"][EOS] = len(tokenizer["model"]["vocab"])
    del tokenizer["added_tokens"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(["import", str(folder), "--run", str(tmp_path / "bare")]) == 0
    assert load_model(tmp_path / "bare").tokenizer.eos_id == tokenizer["model"]["vocab"][EOS]


def test_tied_weights_may_be_there_under_the_name_of_the_head_alone(checkpoint, tmp_path):
    folder = tmp_path / "hf"
    assert main(["export", str(checkpoint(**SHAPES["tied"])), "--to", "hf", "--out", str(folder)]) == 0
    assert main(["import", str(folder), "--run", str(tmp_path / "embedding")]) == 0
    with_weights(lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))(folder)
    assert main(["import", str(folder), "--run", str(tmp_path / "head")]) == 0
    assert torch.equal(*(logits_of(tmp_path / name, torch.arange(60)[None]) for name in ("embedding", "head")))


def test_fields_that_say_what_osler_does_anyway_are_taken():
    described = {"rope_parameters": {**YARN, "truncate": True, "attention_factor": None}, "max_position_embeddings": 64}
    assert rope_of(described, "")["rope_scaling"] == {"type": "yarn", "factor": 2.0, "original_max_seq_len": 32}
    older = {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 2.0}, "max_position_embeddings": 64}
    assert rope_of(older, "")["rope_scaling"]["original_max_seq_len"] == 64


@pytest.mark.parametrize("shape", [*SHAPES, "yarn"])
def test_there_and_back_is_the_same_to_the_bit(shape, checkpoint, tmp_path):
    yarn = {"rope_scaling": YarnConfig(factor=4, original_max_seq_len=16, beta_fast=16.0)}
    run, folders = checkpoint(**(yarn if shape == "yarn" else SHAPES[shape])), [tmp_path / name for name in ("hf", "again")]
    assert main(["export", str(run), "--to", "hf", "--out", str(folders[0])]) == 0
    assert main(["import", str(folders[0]), "--run", str(tmp_path / "back")]) == 0
    assert main(["export", str(tmp_path / "back"), "--to", "hf", "--out", str(folders[1])]) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    before, after = load_model(run), load_model(tmp_path / "back")
    assert before.tokenizer.to_bytes() == after.tokenizer.to_bytes()
    ids = torch.arange(60)[None]
    if shape != "factorized":  # whose matrices are one from then on
        assert torch.equal(logits_of(run, ids), logits_of(tmp_path / "back", ids))
        for name, weight in before.model.state_dict().items():
            assert torch.equal(after.model.state_dict()[name][: 532 if "norm" not in name else None], weight[:532]), name


def test_a_model_that_answers_still_does_after_the_way_back(runs, tiny, tmp_path, capsys):
    back = str(tmp_path / "back")
    assert main(["export", str(runs.sft), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    assert main(["import", str(tmp_path / "hf"), "--run", back]) == 0
    before, after = (load_model(path) for path in (runs.sft, back))
    assert after.answers_questions and after.model.trained_seq_len == before.model.trained_seq_len
    shutil.copytree(runs.sft, tmp_path / "sft")
    for run in (str(tmp_path / "sft"), back):
        assert main(["eval", run, "task=clinic", "subset=4", "max_new_tokens=24"]) == 0
    assert main(["report", back]) == 0 and main(["compare", str(tmp_path / "sft"), back]) == 0  # which need its answers
    told = capsys.readouterr()
    assert f"Saved to {back}/exams.json" in told.err and "new_findings   sft → back" in told.out
    for words in (["--resume"], [tiny.sft, f"init_from={runs.sft}"]):
        assert main(["sft", *words, "--run", back]) == 2
        assert "was made by `osler import` of hf and has weights alone" in capsys.readouterr().err
    assert main(["grpo", tiny.grpo, f"init_from={back}", "steps=1", "eval_task=null", "--run", str(tmp_path / "grpo")]) == 0


def with_config(**fields) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))

    return change


def with_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in read_tensors(folder / "model.safetensors").items()}  # not the file's
        change(tensors)
        write_tensors(folder / "model.safetensors", tensors)

    return write


def torn(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def with_index(content: object, *, alone: bool = True) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
        if alone:
            (folder / "model.safetensors").unlink()

    return write


def without_an_end(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(Tokenizer.train([TEXT], 300, SPECIALS[1:]).to_bytes())


def without_any_end(folder: Path) -> None:
    without_an_end(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": []}')


YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
Q = "model.layers.1.self_attn.q_proj.weight"


def test_a_folder_and_a_run_that_are_taken_for_one_another_are_told(checkpoint, tmp_path, capsys):
    run, folder = checkpoint(), tmp_path / "hf"
    assert main(["export", str(run), "--to", "hf", "--out", str(folder)]) == 0
    for command in (["eval"], ["quantize", "--to", "int8", "--out", str(tmp_path / "new")], ["checkpoint", "list"]):
        assert main([*command, str(folder)]) == 2
        assert f"`osler import {folder} --run runs/hf`" in capsys.readouterr().err
    for source, said in (
        (run, "needs no import"),
        (run / "checkpoints" / "step-000000000", "needs no import"),
        (folder / "model.safetensors", "is a file, and a folder is needed"),
        (tmp_path / "Qwen3", "`hf download Qwen/Qwen3-0.6B-Base"),
    ):
        assert main(["import", str(source), "--run", str(tmp_path / "new")]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_config(layer_types=5), "layer_types has more than full_attention"),
        (with_config(layer_types=[["full_attention"]]), "layer_types has more than full_attention"),
        (with_config(rope_theta=[1e4]), "and only one of them can be meant"),
        (with_config(model_type="llama"), "model_type is 'llama', and Osler's model has 'qwen3'"),
        (with_config(attention_bias=True), "attention_bias is True"),
        (with_config(use_sliding_window=True), "layer_types has more than sliding_attention"),
        (with_config(layer_types=["full_attention", "sliding_attention"]), "layer_types has more than full_attention"),
        (with_config(use_sliding_window=True, layer_types=None, max_window_layers=1), "max_window_layers is not 0"),
        (with_config(use_sliding_window=True, layer_types=None, max_window_layers=0), "lacks sliding_window"),
        (with_config(use_sliding_window=True, layer_types=["sliding_attention"] * 2, sliding_window=0), "window"),
        (with_config(quantization_config={"bits": 4}), "quantization_config is {'bits': 4}"),
        (with_config(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}), "RoPE of the type 'llama3'"),
        (with_config(rope_parameters={**YARN, "attention_factor": 1.3}), "no attention_factor=1.3"),
        (with_config(rope_parameters={**YARN, "truncate": False}), "no truncate=False"),
        (with_config(rope_parameters={"rope_theta": 1e4, "full_attention": YARN}), "'default' has no full_attention="),
        (with_config(rope_theta=5e5), "and only one of them can be meant"),
        (with_config(rope_scaling=["yarn"]), "rope_scaling should be a mapping, and is ['yarn']"),
        (with_config(head_dim=None), "lacks head_dim"),
        (with_config(osler={"trained_seq_len": "a"}), "config.json: osler: 1 error\n  trained_seq_len"),
        (with_config(osler=["sft"]), "config.json: osler: should be a mapping"),
        (with_config(hidden_size=48), "lm_head.weight is (532, 32), and by config.json it would be (532, 48)"),
        (with_weights(lambda tensors: tensors.pop(Q)), "1 weights are missing, such as layers.1.self_attn.q_proj.weight"),
        (with_weights(lambda tensors: tensors.update({"norm.weight": torch.zeros(32)})), "norm.weight is there twice"),
        (with_weights(lambda tensors: tensors.update(lora_A=torch.ones(2))), "have no place in a Qwen3, such as lora_A"),
        (with_weights(lambda tensors: tensors.update({Q: tensors[Q].to(torch.int8)})), "is torch.int8"),
        (with_weights(lambda tensors: tensors[Q].fill_(torch.nan)), "has numbers that are NaN or infinite"),
        (torn, "is not a readable safetensors file"),
        (with_index({"weight_map": {"lm_head.weight": "model-2.safetensors"}}), "names model-2.safetensors, which is not there"),
        (with_index({"weight_map": None}), "does not say which file has which weight"),
        (with_index({}, alone=False), "has both model.safetensors and model.safetensors.index.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json, which says what model it holds"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json holds no JSON object"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (with_config(vocab_size=500), "tokens and the model only 500 (vocab_size)"),
        (without_an_end, "has no <|endoftext|>, and no added token of it is the model's eos_token_id"),
        (without_any_end, "no added token of it is the model's eos_token_id ([])"),
    ],
)  # fmt: skip
def test_what_the_model_cannot_compute_is_refused_by_name(change, said, checkpoint, tmp_path, capsys):
    assert main(["export", str(checkpoint()), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    change(tmp_path / "hf")
    assert main(["import", str(tmp_path / "hf"), "--run", str(tmp_path / "new")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "new").exists()
    shutil.rmtree(tmp_path / "hf")
