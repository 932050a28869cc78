"""A pruned checkpoint: the layers and neurons that matter least are gone, and what is left is an ordinary model."""

import re
import shlex
from dataclasses import replace

import pytest
import torch

from osler.cli.main import main
from osler.eval.likelihood import measure
from osler.export.prune import check_sizes, healing, least_useful_layers, texts, with_neurons, without_layers, worth_of_neurons
from osler.inference.load import load_model
from osler.model.config import ModelConfig
from osler.model.transformer import Transformer
from osler.ops.labels import IGNORED
from osler.runtime.errors import UserError
from osler.runtime.files import read_json
from tests.models import tiny_model


def small(**changes):
    return tiny_model(**{"num_layers": 4, "norm_weight": True, "value_embeddings": "all", "copy_head_dim": 16, **changes}).eval()


@pytest.fixture
def model():
    model = small()
    for layer, block in enumerate(model.layers):  # they start at zero, where one of another layer would not be noticed
        torch.nn.init.normal_(block.self_attn.value_embed.weight, generator=torch.Generator().manual_seed(layer))
    return model


@pytest.fixture
def text():
    ids = torch.randint(64, (3, 24), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)
    labels[:, -1] = labels[1, 10:] = IGNORED
    return [(ids, labels)]


def test_the_layer_goes_without_which_the_loss_is_least(model, text):
    before = model.state_dict()

    def loss_without(*removed: int) -> float:
        smaller = small(num_layers=4 - len(removed))
        smaller.load_state_dict(without_layers(before, removed))
        return measure(smaller, text, 1).loss

    found = list(least_useful_layers(model, text, 2))
    first = {layer: loss_without(layer) for layer in range(4)}
    least = min(first, key=first.get)
    second = {layer: loss_without(least, layer) for layer in range(4) if layer != least}
    expected = [(least, first[least]), (min(second, key=second.get), min(second.values()))]
    assert [layer for layer, _ in found] == [layer for layer, _ in expected]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-6)
    assert len(model.layers) == 4 and all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_neuron_is_worth_how_far_it_moves_the_residual_stream(model, text):
    worths = worth_of_neurons(model, text)
    (ids, labels), inputs = text[0], []
    handle = model.layers[2].mlp.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    model(ids)
    handle.remove()
    mlp = model.layers[2].mlp
    activations = torch.nn.functional.silu(mlp.gate_proj(inputs[0])) * mlp.up_proj(inputs[0])
    scored = [activations[row, place].abs() for row in range(3) for place in range(24) if labels[row, place] != IGNORED]
    expected = sum(scored) / len(scored) * mlp.down_proj.weight.square().sum(0).sqrt()
    torch.testing.assert_close(worths[2], expected)


def test_a_model_with_fewer_neurons_is_the_one_whose_other_neurons_do_nothing(model, text):
    kept = [torch.arange(layer % 2, 64, 2) for layer in range(4)]
    narrow = small(intermediate_size=32)
    narrow.load_state_dict(with_neurons(model.state_dict(), kept))
    for block, neurons in zip(model.layers, kept, strict=True):
        gone = torch.ones(64, dtype=torch.bool)
        gone[neurons] = False
        with torch.no_grad():
            block.mlp.down_proj.weight[:, gone] = 0
    ids = text[0][0]
    torch.testing.assert_close(narrow(ids), model(ids), atol=1e-5, rtol=1e-5)


def test_the_command_writes_a_model_that_reads_trains_and_says_how_to_heal_it(runs, tmp_path, capsys):
    out = tmp_path / "small"
    assert main(["prune", str(runs.sft), "--layers", "1", "--intermediate-size", "40", "--out", str(out)]) == 0
    told = capsys.readouterr().err
    pruned, original = load_model(out), load_model(runs.sft)
    assert (pruned.model.config.num_layers, pruned.model.config.intermediate_size) == (1, 40)
    assert (pruned.kind, pruned.training) == ("sft", original.training)
    [note] = read_json(out / "notes.json")
    assert re.search(r"`osler prune` of step-\d+, without layer \d \(counted from 0\), with 40 neurons in every", note)
    losses = [float(loss) for loss in re.findall(r"(\d\.\d{4})", told)]
    text = texts(original, None, "text", 65_536)
    assert losses[0] == pytest.approx(measure(original.model, text, 1).loss, abs=1e-4)
    assert losses[-1] == pytest.approx(measure(pruned.model, text, 1).loss, abs=1e-4)
    healing = shlex.split(told.strip().splitlines()[-1])[1:]
    assert f"teacher.path={original.path}" in healing and "init_from=" + out.as_posix() in healing
    steps = original.state["total_tokens"] // 4 // original.training["batch_tokens"]
    assert f"total_tokens={steps * original.training['batch_tokens']}" in healing and steps > 0
    fast = ["total_tokens=1024", "checkpoint.every_tokens=1024", "compile=never", "precision=fp32", "device=cpu"]
    assert main([*healing, *fast, "batch_tokens=512"]) == 0
    assert f"osler eval {out}-healed task=questions:FILE " in capsys.readouterr().err  # the shards are made of questions
    healed = load_model(tmp_path / "small-healed").model
    assert healed.config == pruned.model.config and isinstance(healed, Transformer)
    for words in (["sft", "--run", str(out), "--resume"], ["sft", "--branch", str(out), "--run", str(tmp_path / "new")]):
        assert main(words) == 2 and "made by `osler prune`" in capsys.readouterr().err


def test_text_of_ones_own_decides_where_it_is_given(runs, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("The heart beats, and the fever falls. " * 20)
    options = ["--intermediate-size", "16", "--data", str(tmp_path / "text.txt"), "--tokens", "40"]
    assert main(["prune", str(runs.pretrain), *options, "--out", str(tmp_path / "small")]) == 0
    pruned, original = load_model(tmp_path / "small"), load_model(runs.pretrain)
    given = texts(original, str(tmp_path / "text.txt"), "text", 40)
    assert 40 <= sum(int((labels != IGNORED).sum()) for _, labels in given) < 40 + 64
    for layer, worth_I in enumerate(worth_of_neurons(original.model, given)):
        narrow, wide = (ready.model.layers[layer].mlp.up_proj.weight for ready in (pruned, original))
        assert torch.equal(narrow, wide[worth_I.topk(16).indices.sort().values])


def test_shards_decide_for_a_model_that_has_none(runs, tmp_path, capsys):
    command, shards = ["prune", str(runs.sft), "--layers", "1", "--out"], str(runs.sft / "data")
    moved = replace(load_model(runs.sft), path=tmp_path / "alone")
    tuned = replace(moved, state={"kind": "grpo"}, training={"init_from": str(runs.sft)})  # as GRPO leaves a model
    with pytest.raises(UserError, match=f"has no text to measure .* such as --data {re.escape(shards)}"):
        texts(tuned, None, "text", 100)
    assert healing(tuned, "small", shards).split()[-6:-2] == healing(moved, "small", shards).split()[-6:-2]
    assert len(texts(moved, shards, "text", 100)) == 1
    assert main([*command, str(tmp_path / "small"), "--data", shards]) == 0
    assert f"data.type=prepared data.path={shards} " in capsys.readouterr().err
    assert main([*command, str(tmp_path / "other"), "--data", str(runs.pretrain / "data")]) == 0  # of the same tokenizer


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ([], "What is to become smaller"),
        (["--layers", "2"], "--layers 2 is not from 1 to 1"),
        (["--intermediate-size", "64"], "--intermediate-size 64 is not from 1 to 63"),
        (["--layers", "1", "--tokens", "0"], "--tokens 0"),
        (["--layers", "1", "--data", "nowhere.txt"], "nowhere.txt"),
    ),
)
def test_what_cannot_be_pruned_is_refused(options, message, runs, tmp_path, capsys):
    assert main(["prune", str(runs.sft), *options, "--out", str(tmp_path / "small")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "small").exists()


def test_layers_of_alternating_kinds_stay_together():
    alternate, everywhere = (ModelConfig(value_embeddings=kind) for kind in ("alternate", "all"))
    with pytest.raises(UserError, match="value embeddings in every second layer"):
        check_sizes(alternate, 2, None)
    check_sizes(alternate, None, 64)
    check_sizes(everywhere, 2, None)
