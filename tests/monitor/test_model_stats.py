"""A look at everything, each number against the plain formula."""

import math
import re

import pytest
import torch

from osler.model.config import ModelConfig
from osler.model.transformer import Transformer
from osler.monitor.model_stats import (
    ProbeRows,
    activation_stats,
    attention_entropy,
    dead_share,
    effective_rank,
    gradient_stats,
    update_stats,
    weight_stats,
)

SHAPE = ModelConfig(
    num_layers=3, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=100, max_seq_len=32,
    norm_weight=True, head_init="normal", residual_init="scaled", value_embeddings="alternate",
)  # fmt: skip


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request) -> Transformer:
    model = Transformer(SHAPE, compute_dtype=request.param)
    model.init_weights(0)
    return model


@pytest.fixture
def rows() -> ProbeRows:
    ids = torch.randint(0, 100, (3, 24), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)
    labels[:, -1] = labels[0, :9] = -100
    return ProbeRows(ids, labels)


def test_gradients_are_those_of_a_plain_loop(model, rows):
    logits = model.logits(model(rows.ids_BT))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.labels_BT.flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = gradient_stats(gradients.items())
    patterns = {"embed": "embed_tokens", "head": "lm_head", "norm": "norm", "values": r"layers\.\d\.self_attn\.value_embed"}
    patterns |= {f"{n}": rf"layers\.{n}\.(?!self_attn\.value_embed)" for n in range(3)}
    assert {name.rpartition("/")[2] for name in found if name.startswith("grad/norm/")} == patterns.keys()
    for part, pattern in patterns.items():
        plain = math.sqrt(sum(float((g.double() ** 2).sum()) for name, g in gradients.items() if re.match(pattern, name)))
        assert float(found[f"grad/norm/{part}"]) == pytest.approx(plain, rel=1e-4)
    every = torch.cat([gradient.flatten().double() for gradient in gradients.values()])
    plain = {"mean": every.mean(), "std": every.std(correction=0), "max_abs": every.abs().max(), "nonfinite_frac": 0.0}
    plain["zero_frac"] = (every == 0).double().mean()
    for name, value in plain.items():
        assert float(found[f"grad/{name}"]) == pytest.approx(float(value), rel=1e-3, abs=1e-9), name
    assert 0.1 < plain["zero_frac"] < 0.9, "of the unseen words in the embedding"


def test_what_is_not_finite_in_a_gradient_is_counted():
    gradient = torch.zeros(4, 5)
    gradient[1, 2], gradient[3, 3] = float("nan"), float("inf")
    found = gradient_stats([("layers.0.mlp.up_proj.weight", gradient), ("norm.weight", torch.ones(20))])
    assert float(found["grad/nonfinite_frac"]) == pytest.approx(2 / 40)
    assert float(found["grad/zero_frac"]) == pytest.approx(18 / 40)
    assert float(found["grad/norm/norm"]) == pytest.approx(math.sqrt(20)) and found["grad/norm/0"].isnan()


def test_an_update_is_measured_against_the_weights_before_it(model):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.5 if name.startswith("layers.1.") else 1.0)
    found = update_stats(before, dict(model.named_parameters()))
    assert float(found["update/part_ratio/1"]) == pytest.approx(0.5)
    assert float(found["update/part_ratio/0"]) == float(found["update/part_ratio/embed"]) == 0.0
    norms = weight_stats(before)
    plain = 0.5 * float(norms["model/weight_norm/1"]) / math.sqrt(sum(float((w**2).sum()) for w in before.values()))
    assert float(found["update/ratio"]) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (20, 20)])
def test_effective_rank_counts_directions(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    s = torch.linalg.svdvals(matrix.double())
    assert float(effective_rank(matrix)) == pytest.approx(float((s**2).sum() ** 2 / (s**4).sum()), rel=1e-5)
    assert float(effective_rank(torch.eye(12) * 3e-20)) == pytest.approx(12)
    assert float(effective_rank(matrix[:, :1] @ matrix[:1])) == pytest.approx(1)
    assert float(effective_rank(torch.zeros(shape))) == 0


def plain_entropy(q, k, mask):
    """Entropy of the softmax over all visible keys, at every place and head of one row; q and k are [T, N, H] and [T, K, H]."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.stack([q[:, head].double() @ k[:, head].double().T for head in range(q.shape[1])]) / math.sqrt(q.shape[2])
    return float(torch.special.entr(scores.masked_fill(~mask, -math.inf).softmax(-1)).sum(-1).mean())


def everywhere(x: torch.Tensor) -> torch.Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool)


def test_attention_entropy_is_that_of_the_softmax():
    generator = torch.Generator().manual_seed(2)
    q, k = torch.randn(2, 10, 4, 8, generator=generator), torch.randn(2, 10, 2, 8, generator=generator)
    ids = torch.tensor([[0] * 4 + [1] * 6, [0] * 9 + [1]])
    causal = torch.ones(2, 10, 10, dtype=torch.bool).tril()
    inside = causal & (ids[:, :, None] == ids[:, None])
    for mask, given in ((causal, None), (inside, inside[:, None])):
        plain = sum(plain_entropy(q[row], k[row], mask[row]) for row in range(2)) / 2
        assert float(attention_entropy(q, k, everywhere(q), mask=given)) == pytest.approx(plain, rel=1e-5)
        within = mask.triu(-3)
        plain = sum(plain_entropy(q[row], k[row], within[row]) for row in range(2)) / 2
        assert float(attention_entropy(q, k, everywhere(q), mask=given, window=4)) == pytest.approx(plain, rel=1e-5)


def test_few_queries_of_long_rows_are_enough():
    """Equal scores: query t sees t + 1 keys equally, so the entropy of the chosen places is a mean of logarithms."""
    q, k = torch.zeros(64, 40, 2, 4), torch.zeros(64, 40, 1, 4)
    chosen = sum(math.log(n) for n in (10, 20, 30, 40)) / 4
    assert float(attention_entropy(q, k, everywhere(q))) == pytest.approx(chosen, rel=1e-5)
    q, k = torch.zeros(300, 40, 2, 4), torch.zeros(300, 40, 1, 4)
    assert float(attention_entropy(q, k, everywhere(q))) == pytest.approx(math.log(40))


def test_units_that_no_token_moves_are_dead():
    units = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(3))
    units[..., [1, 4, 5]] *= 1e-6
    assert float(dead_share(units, everywhere(units))) == pytest.approx(3 / 8)
    units[0, 20:, 1] = 9.0
    places = everywhere(units)
    places[0, 20:] = False
    assert float(dead_share(units, places)) == pytest.approx(3 / 8), "only padding moves the unit"
    assert float(dead_share(torch.zeros(2, 3, 8), everywhere(units)[:, :3])) == 1.0


def test_padding_does_not_count(model, rows):
    """Whatever stands behind the last learned token of a row, also as documents of its own, the numbers are the same."""
    found = activation_stats(model, model.state_dict(), rows)
    padded = ProbeRows(torch.full((3, 32), 7), torch.full((3, 32), -100))
    padded.ids_BT[:, :24], padded.labels_BT[:, :24] = rows.ids_BT, rows.labels_BT
    apart = padded._replace(document_BT=(torch.arange(32) >= 24).long().expand(3, -1))
    for other in (padded, apart):
        same = activation_stats(model, model.state_dict(), other)
        assert found.keys() == same.keys() and not any(value.isnan() for value in found.values())
        assert all(float(same[name]) == pytest.approx(float(value), rel=1e-5) for name, value in found.items())


def test_the_look_inside_sees_what_the_model_computes(model, rows):
    """Against the formulas on the outputs of the model's own modules, and without leaving anything on it."""
    model.compute_dtype = torch.float32
    seen: list[torch.Tensor] = []
    handles = [block.register_forward_hook(lambda module, args, out: seen.append(out[0])) for block in model.layers]
    with torch.no_grad():
        hidden = model(rows.ids_BT)
    for handle in handles:
        handle.remove()
    random = torch.get_rng_state()
    found = activation_stats(model, model.state_dict(), rows)
    assert torch.equal(torch.get_rng_state(), random)
    for layer, all_places in enumerate(seen):
        x = all_places[:, :-1]  # behind the last learned token
        assert float(found[f"model/activation_rms/{layer}"]) == pytest.approx(float(x.double().square().mean().sqrt()), rel=1e-5)
        outlier = float(x.abs().max() / x.square().mean().sqrt())
        assert float(found[f"model/activation_outlier/{layer}"]) == pytest.approx(outlier, rel=1e-5)
        assert 0 < float(found[f"model/attention_entropy/{layer}"]) < math.log(24)
        assert float(found[f"model/dead_units_frac/{layer}"]) < 0.1
    logits = model.logits(hidden).detach().double()
    learned = rows.labels_BT >= 0
    p = logits.softmax(-1)[learned]
    label = rows.labels_BT[learned]
    for name, plain in {
        "train/token_accuracy": (p.argmax(-1) == label).double().mean(),
        "train/entropy": -(p * p.log()).sum(-1).mean(),
        "train/label_probability": p[torch.arange(len(label)), label].mean(),
        "train/top_probability": p.amax(-1).mean(),
        "model/logit_max": logits[:, :-1].max(),
    }.items():
        assert float(found[name]) == pytest.approx(float(plain), rel=1e-5), name
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
