"""Whole numbers for weights: the formula entry by entry, no worse than torchao's, and every name and shape comes back."""

import pytest
import torch

from osler import api
from osler.cli.main import main
from osler.model.config import SparseAttentionConfig
from osler.model.init import is_of_indexer
from osler.model.quantization import SHARES, dequantize, dequantize_weights, quantize, quantize_weights
from tests.models import tiny_model


def plain_dequantize(codes, scales, bits, in_size, group_size):
    rows = []
    for row, row_scales in zip(codes.tolist(), scales.tolist(), strict=True):
        if bits == 4:
            row = [half - 8 for byte in row for half in (byte % 16, byte // 16)]
        rows.append([row[place] * row_scales[place // group_size] for place in range(in_size)])
    return torch.tensor(rows)


@pytest.mark.parametrize("bits", (8, 4))
@pytest.mark.parametrize(("in_size", "group_size"), ((64, 32), (71, 32), (9, 64)))
def test_codes_and_scales_mean_what_the_formula_says(bits, in_size, group_size):
    weight = torch.randn(5, in_size, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[2], weight[3, 0] = 0, 4.0
    codes, scales = quantize(weight, bits, group_size)
    assert codes.shape == ((5, in_size) if bits == 8 else (5, -(-in_size // 2)))
    assert scales.dtype == torch.float16 and scales.shape == (5, -(-in_size // group_size))
    again = dequantize(codes, scales, in_size, group_size)
    assert torch.equal(again, plain_dequantize(codes, scales, bits, in_size, group_size))
    assert again[2].count_nonzero() == 0
    # Half a step, or more where a narrower scale cuts the farthest weight: at most a fifth of it, and that scale was better.
    widest = weight.abs().amax() / 2 ** (bits - 1)
    groups = [slice(first, first + group_size) for first in range(0, in_size, group_size)]
    for group, scale_O in zip(groups, scales.float().T, strict=True):
        error, farthest = (again - weight)[:, group].abs().amax(1), weight[:, group].abs().amax(1)
        assert (error <= scale_O.abs() / 2 * 1.01 + (1 - min(SHARES)) * farthest + widest * 1e-3).all()


def test_a_narrower_scale_is_taken_only_where_it_is_better(monkeypatch):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    errors = {}
    for shares in (SHARES, (1.0,)):
        monkeypatch.setattr("osler.model.quantization.SHARES", shares)
        errors[shares] = (dequantize(*quantize(weight, 4, 64), 256, 64) - weight).view(64, 4, 64).square().sum(-1)
    assert (errors[SHARES] <= errors[1.0,]).all() and errors[SHARES].sum() < 0.95 * errors[1.0,].sum()


def test_a_scale_for_each_group_is_closer_than_torchao_with_one_for_each_row():
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    layer = torch.nn.Linear(256, 64, bias=False)
    weight = layer.weight.detach().clone()
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    theirs = (layer.weight.dequantize() - weight).square().mean()
    ours = (dequantize(*quantize(weight, 8, 64), 256, 64) - weight).square().mean()
    assert 0 < ours < theirs


@pytest.mark.parametrize("bits", (8, 4))
def test_a_state_dict_comes_back_with_its_names_and_nearly_its_numbers(bits):
    model = tiny_model(norm_weight=True, value_embeddings="alternate", copy_head_dim=16)
    torch.nn.init.normal_(model.layers[1].self_attn.value_embed.weight, generator=torch.Generator().manual_seed(3))
    weights = model.state_dict()
    stored = quantize_weights(weights, bits, 32)
    again = dequantize_weights(stored, weights, 32)
    assert list(again) == list(weights)
    assert all(torch.equal(again[name], weight) for name, weight in weights.items() if weight.ndim == 1)
    stored_bytes = sum(tensor.nbytes for tensor in stored.values())
    assert stored_bytes < (bits / 32 + 0.03) * sum(weight.nbytes for weight in weights.values())
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(2))

    def logits():
        hidden = model(ids)
        return model.logits(hidden, model.copies(hidden, ids))

    before = logits()
    model.load_state_dict(again)
    assert 0 < (logits() - before).std() / before.std() < (0.01 if bits == 8 else 0.15)


def test_the_index_of_sparse_attention_stays_as_it_is():
    sparse = SparseAttentionConfig(index_heads=2, index_head_dim=8, top_k=16, local_window=4)
    weights = tiny_model(attention=sparse).state_dict()
    stored = quantize_weights(weights, 8, 32)
    kept = [name for name in weights if is_of_indexer(name)]
    assert kept and all(stored[name] is weights[name] for name in kept)


def test_the_mission_s_model_has_the_sizes_that_it_was_announced_with(capsys):
    config = api.model_config("factorized-177m")
    assert [round(config.weight_bytes(bits) / 2**20) for bits in (32, 16, 8)] == [676, 338, 169]
    assert main(["show", "factorized-177m"]) == 0
    assert "676 MiB in fp32, 338 MiB in bf16, 180 MiB in int8, 95 MiB in int4" in capsys.readouterr().out
    tiny = tiny_model(hidden_size=128, intermediate_size=128, num_heads=8).state_dict()
    parameters = sum(weight.numel() for weight in tiny.values())
    for bits in (8, 4):
        kept = sum(tensor.nbytes for tensor in quantize_weights(tiny, bits, 32).values())
        assert kept * 8 / parameters == bits + 0.5
