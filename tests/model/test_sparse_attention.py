"""The sparse model: equal to the dense one where all keys are chosen, its two losses apart, documents apart, decoding."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from osler.export.huggingface import qwen3_weights, standard_form
from osler.inference.engine import InferenceEngine
from osler.inference.recompute import generate_by_recompute
from osler.model.config import DenseAttentionConfig, ModelConfig, SparseAttentionConfig
from osler.model.decoder import Decoder
from osler.model.init import is_of_indexer
from osler.model.layers import Layout
from osler.model.transformer import SummedLoss, Transformer
from osler.ops.sampling_params import SamplingParams
from osler.parallel.activation_checkpoint import set_recompute
from osler.runtime.errors import UserError
from tests.models import SHAPE, tiny_model

pytestmark = pytest.mark.usefixtures("no_compiled_code")

SHARED = SparseAttentionConfig(index_heads=2, index_head_dim=16, top_k=12, local_window=3)
BY_GROUP = SparseAttentionConfig(index_heads=4, index_head_dim=16, top_k=12, local_window=3, selection="per_kv_group")
KINDS = pytest.mark.parametrize("kind", [SHARED, BY_GROUP], ids=["token", "per_kv_group"])


def build(attention: Any = SHARED, dtype: torch.dtype = torch.float64, **changes: Any) -> Transformer:
    shape = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "num_layers": 3, **changes}
    model = tiny_model(seed=1, attention=attention, compute_dtype=dtype, **shape).to(dtype)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "value_embed" in name:  # they start at zero, where a forgotten one would not be noticed
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    return model


def ids_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: Transformer, value: Tensor) -> dict[str, Tensor | None]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
    return dict(zip(names, found, strict=True))


def test_where_all_keys_are_chosen_the_model_is_the_dense_one_with_the_same_seed():
    dense, ids = build(DenseAttentionConfig()), ids_of(2, 33)
    sparse = build(SparseAttentionConfig(index_heads=2, index_head_dim=16, top_k=32, local_window=1))
    documents = (torch.arange(32) >= 13).long().expand(2, -1)
    expected = SummedLoss(dense)(ids[:, :-1], ids[:, 1:], documents)
    found = SummedLoss(sparse)(ids[:, :-1], ids[:, 1:], documents)
    torch.testing.assert_close(found[0], expected)
    assert found[4].item() == pytest.approx(64)  # recall, of all tokens
    of_dense, of_sparse = gradients(dense, expected), gradients(sparse, found[-1])
    for name, gradient in of_dense.items():
        torch.testing.assert_close(of_sparse[name], gradient)


@pytest.mark.slow
@KINDS
def test_a_compiled_step_is_the_same(kind):
    model, ids = build(kind, torch.float32, num_layers=2), ids_of(2, 41)
    plain = SummedLoss(model)
    results = []
    for loss in (plain, torch.compile(plain, fullgraph=True)):
        found = loss(ids[:, :-1], ids[:, 1:], None)
        results.append([found, *gradients(model, found[-1]).values()])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-4)


@KINDS
@pytest.mark.parametrize("length", [10, 40])  # tokens of a row: all keys are chosen, or 12 of them
def test_text_teaches_the_indexer_nothing_and_the_kl_the_model_nothing(kind, length):
    model, ids = build(kind), ids_of(2, length + 1)
    losses = SummedLoss(model)(ids[:, :-1], ids[:, 1:], None)
    kl = model.with_index(ids[:, :-1])[1][..., 0].sum()  # type: ignore[index]
    torch.testing.assert_close(losses[-1], losses[0] + 3 * losses[1])
    torch.testing.assert_close(losses[1], kl)
    of_text, of_kl = gradients(model, losses[0]), gradients(model, kl)
    for name in of_text:
        untouched, taught = (of_text, of_kl) if is_of_indexer(name) else (of_kl, of_text)
        assert untouched[name] is None or not untouched[name].any(), name
        assert taught[name] is not None and taught[name].any(), name


def test_sums_are_over_learned_tokens_so_that_parts_of_a_batch_add_up():
    loss, ids = SummedLoss(build()), ids_of(2, 41)
    labels = ids[:, 1:].clone()
    labels[0, :30] = -100
    each = [loss(ids[row : row + 1, :-1], labels[row : row + 1], None) for row in range(2)]
    torch.testing.assert_close(loss(ids[:, :-1], labels, None), each[0] + each[1])
    with_text = each[1] / 40
    assert with_text[1] > 0 and 0 < with_text[4] < 1 and 1 < with_text[3] < 40


@KINDS
def test_packed_documents_equal_separate_ones(kind):
    model, ids = build(kind), ids_of(1, 50)
    documents = torch.tensor([[0] * 21 + [1] * 29])
    together, measured = model.with_index(ids, documents)
    for part in (slice(21), slice(21, 50)):
        alone, of_alone = model.with_index(ids[:, part])
        # RoPE's tables are in fp32, and the second document stands elsewhere.
        torch.testing.assert_close(together[:, part], alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(measured[:, part, 0], of_alone[..., 0], atol=1e-5, rtol=0)


def test_warm_up_trains_the_indexer_alone_until_it_finds_what_is_attended_to():
    model = build(dtype=torch.float32, num_layers=2)
    dense, ids = build(DenseAttentionConfig(), torch.float32, num_layers=2), ids_of(8, 64)
    weights = {name: weight.clone() for name, weight in model.state_dict().items() if not is_of_indexer(name)}
    dense.load_state_dict(weights)
    model.warm_up_indexers()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, loss, seen = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0), SummedLoss(model), []
    torch.testing.assert_close(loss(ids, ids, None)[0], SummedLoss(dense)(ids, ids, None))
    for _ in range(60):
        losses = loss(ids, ids, None) / ids.numel()
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(losses.detach())
    first, last = seen[0], seen[-1]
    # Untrained attention is spread out, so that the recall cannot rise by much.
    assert last[1] < 0.6 * first[1] and last[4] > first[4] + 0.02, (first, last)
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in weights.items())
    assert not model.eager_copy(model.state_dict()).layers[0].self_attn.warms_up


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["off", "selective", "full"])
def test_recomputed_and_compiled_gradients_are_the_same(mode):
    ids, documents = ids_of(2, 41), torch.arange(40).expand(2, -1) // 30
    plain = build(num_layers=1)
    expected = gradients(plain, SummedLoss(plain)(ids[:, :-1], ids[:, 1:], documents)[-1])
    for compiled in (False, True):
        model = build(num_layers=1)
        set_recompute(model, mode)
        loss: Any = SummedLoss(model)
        if compiled:
            loss = torch.compile(loss, fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition")
        found = gradients(model, loss(ids[:, :-1], ids[:, 1:], documents)[-1])
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient)


@KINDS
def test_decoding_equals_the_forward_pass_whatever_shares_the_cache(kind):
    """A row of 20 and one of 5 tokens, both beyond top_k later; one leaves, and a third starts from the beginning of another."""
    model, ids = build(kind, torch.float32, value_embeddings="alternate"), ids_of(3, 60, seed=2)
    ids[2, :25] = ids[0, :25]
    with torch.no_grad():
        expected = model.logits(model(ids))
        decoder = Decoder(model, Layout(torch.float32, 2))
        cache, rows, length = decoder.new_cache(2, 60), torch.tensor([0, 1]), torch.tensor([20, 5])
        filled, logits = decoder.prefill([ids[0, :20].tolist(), ids[1, :5].tolist()])
        cache.put(rows, filled, torch.arange(2))
        for _ in range(15):
            torch.testing.assert_close(logits, expected[rows, length - 1], atol=1e-4, rtol=0)
            logits = decoder.step(ids[rows, length], cache, torch.ones(2, dtype=torch.bool))
            length += 1
        past = cache.beginning(0, 25)
        filled, logits = decoder.prefill([ids[2, :40].tolist()], past)
        torch.testing.assert_close(logits[0], expected[2, 39], atol=1e-4, rtol=0)
        larger, rows, length = decoder.new_cache(3, 60), torch.tensor([0, 1, 2]), torch.tensor([35, 20, 40])
        larger.put(torch.tensor([0, 1]), cache, torch.tensor([0, 1]))
        larger.put(torch.tensor([2]), filled, torch.tensor([0]))
        for _ in range(10):
            logits = decoder.step(ids[rows, length], larger, torch.ones(3, dtype=torch.bool))
            torch.testing.assert_close(logits, expected[rows, length], atol=1e-4, rtol=0)
            length += 1


@KINDS
def test_the_engine_draws_what_recomputing_draws(kind):
    model = build(kind, torch.float32)
    prompts, sampling = [ids_of(20).tolist(), ids_of(4, seed=1).tolist()], SamplingParams(max_new_tokens=25, temperature=0)
    for found, expected in zip(
        InferenceEngine(model).generate(prompts, sampling), generate_by_recompute(model, prompts, sampling), strict=True
    ):
        assert found.ids == expected.ids


@KINDS
def test_config_counts_what_the_model_has(kind):
    model = build(kind, vocab_size=128)
    config = model.config
    assert config.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert config.kv_cache_bytes(2, 10) == 2 * 3 * 2 * 10 * (2 * 32 + 16)
    for each in (model, build(kind, copy_head_dim=8)):
        stored = Decoder(each, Layout(torch.bfloat16, 2)).new_cache(2, 10).stored  # in fp32, because it is on a CPU
        in_bf16 = sum(tensor.numel() * (2 if tensor.is_floating_point() else tensor.itemsize) for tensor in stored)
        assert in_bf16 == each.config.kv_cache_bytes(2, 10)


def test_sparse_costs_fewer_flops_from_a_length_on():
    config = ModelConfig(max_seq_len=32_768, attention=SparseAttentionConfig())
    dense = ModelConfig(max_seq_len=32_768)
    length = config.sparse_wins_from
    assert length is not None
    assert config.flops_per_token(length) < dense.flops_per_token(length)
    assert config.flops_per_token(length - 1) >= dense.flops_per_token(length - 1)
    costly = SparseAttentionConfig(index_heads=64, index_head_dim=128)
    assert ModelConfig(attention=costly).sparse_wins_from is None


def test_export_is_refused_but_for_rows_in_which_the_model_is_dense():
    model = build()
    with pytest.raises(UserError, match="--max-tokens 12"):
        qwen3_weights(model.config, model.state_dict())
    with pytest.raises(UserError, match=r"value embeddings, which.*value_embeddings=none to export it"):
        standard_form(replace(model.config, value_embeddings="all"), 12)
    with pytest.raises(UserError, match=r"copy head, which.*copy_head_dim=null to export it"):
        standard_form(replace(model.config, copy_head_dim=16), 12)
    short = standard_form(model.config, 12)
    dense = Transformer(short, compute_dtype=torch.float64).to(torch.float64)
    names = {name.removeprefix("model."): weight for name, weight in qwen3_weights(short, model.state_dict()).items()}
    dense.load_state_dict({name: names[name] for name in dense.state_dict()})
    assert short.max_seq_len == 12 and not any(map(is_of_indexer, names))
    torch.testing.assert_close(dense(ids_of(2, 12)), model(ids_of(2, 12)))


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"top_k": 65}, "top_k 65 exceeds max_seq_len 64"),
        ({"top_k": 8, "local_window": 7}, "set local_window to 6 at most"),
        ({"index_head_dim": 18, "top_k": 40}, "index_head_dim 18 is not a multiple of 4"),
        ({"index_heads": 3, "top_k": 40, "selection": "per_kv_group"}, "shares 3 index_heads evenly among 2 num_kv_heads"),
    ],
)
def test_shapes_that_cannot_be_are_refused(attention, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**SHAPE, "num_kv_heads": 2, "attention": SparseAttentionConfig(**attention)}).check_attention()
