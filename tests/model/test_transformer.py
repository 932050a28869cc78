"""The model and its decoding against an independent implementation, compiled against plain, its start against its table."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from osler.config.schema import encode
from osler.export.huggingface import qwen3_config, qwen3_weights, standard_form
from osler.model import layers
from osler.model.config import DenseAttentionConfig, ModelConfig, YarnConfig
from osler.model.decoder import Decoder
from osler.model.layers import Layout, Linear, joint_linear
from osler.model.transformer import SummedLoss, Transformer
from osler.ops import cross_entropy, pieces
from osler.parallel.compile import compile_works
from osler.runtime.errors import UserError
from tests.models import tiny_model

pytestmark = pytest.mark.usefixtures("no_compiled_code")

SHAPES: dict[str, dict[str, Any]] = {
    "untied": {"head_init": "normal"},
    "tied": {"tie_embeddings": True, "head_init": "normal"},
    "weighted_norms": {"norm_weight": True, "qk_norm_weight": True, "head_init": "normal"},
    "head_dim_72": {"head_dim": 72, "num_heads": 4, "num_kv_heads": 1, "head_init": "normal"},
    "multi_head": {"num_heads": 4, "num_kv_heads": 4, "head_init": "normal"},
    "factorized": {"embed_rank": 16, "head_init": "normal"},
    "factorized_and_tied": {"embed_rank": 16, "tie_embeddings": True, "head_init": "normal"},
    "value_embeddings": {"value_embeddings": "alternate", "head_init": "normal"},
    "value_embeddings_of_all": {"value_embeddings": "all", "num_kv_heads": 1, "head_init": "normal"},
    "yarn": {"rope_scaling": YarnConfig(factor=4, original_max_seq_len=10, beta_fast=1.5, beta_slow=0.1), "head_init": "normal"},
    "window": {"attention": DenseAttentionConfig(window=7), "head_init": "normal"},
    "window_of_one": {"attention": DenseAttentionConfig(window=1), "head_init": "normal"},
}


def build(**changes: Any) -> Transformer:
    shape = {"num_layers": 3, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 130}
    model = tiny_model(seed=1, **{**shape, "head_init": "zero", **changes})
    with torch.no_grad():  # norm weights start at one and value embeddings at zero, where a forgotten one would not be noticed
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if name.endswith(("norm.weight", "value_embed.weight")):
                parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(number)) + 0.5)
    return model.eval()


def random_ids(*shape: int, below: int = 130, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))


def to_qwen3(model: Transformer) -> Any:
    """The same weights in Hugging Face's class, which this project had no part in; value embeddings join by hooks."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**qwen3_config(model.config)))
    weights = {name: weight for name, weight in model.state_dict().items() if "value_embed" not in name}
    named = qwen3_weights(replace(model.config, value_embeddings="none"), weights)
    missing, unexpected = theirs.load_state_dict(named, strict=False)
    assert not unexpected and missing == ["lm_head.weight"] * model.config.tie_embeddings
    read: list[torch.Tensor] = []
    theirs.model.embed_tokens.register_forward_hook(lambda module, args, out: read.append(args[0]))

    def added(table: torch.Tensor) -> Any:
        return lambda module, args, out: out + table[read[-1]]

    for name, table in model.state_dict().items():
        if "value_embed" in name:
            theirs.model.layers[int(name.split(".")[1])].self_attn.v_proj.register_forward_hook(added(table))
    return theirs.eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_qwen3(shape: str) -> None:
    model, ids = build(**SHAPES[shape]), random_ids(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(ids)), to_qwen3(model)(ids).logits[..., :130], atol=1e-4, rtol=0)


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_and_steps_equal_qwen3(shape: str, packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are uneven: 12 and 5 tokens."""
    if not packs:  # as on a GPU
        monkeypatch.setattr(layers, "packs_weights", lambda device: False)
    model, ids, both = build(**SHAPES[shape]), random_ids(2, 20, seed=2), torch.arange(2)
    with torch.no_grad():
        expected = to_qwen3(model)(ids).logits[..., :130]
        decoder = Decoder(model, Layout(torch.float32, 2))
        cache = decoder.new_cache(2, 20)
        filled, logits = decoder.prefill([ids[0, :12].tolist(), ids[1, :5].tolist()])
        cache.put(both, filled, both)
        for step in range(9):
            last = both, torch.tensor([11, 4]) + step
            logits = decoder.step(ids[last], cache, both >= 0) if step else logits
            torch.testing.assert_close(logits, expected[last], atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", ["weighted_norms", "window"])
def test_rows_join_and_leave_in_flight(shape: str) -> None:
    """Each row is at its own position, whatever shares the cache with it or stood in its place before."""
    model = build(**SHAPES[shape])
    ids = random_ids(3, 30, seed=6)
    plain = model.logits(model(ids))
    decoder = Decoder(model, Layout(torch.float32, 2))
    cache = decoder.new_cache(2, 24)
    place: dict[int, int] = {}  # row of the cache, by sequence
    length = [0, 0, 0]

    def join(sequence: int, prompt: int, row: int) -> None:
        filled, logits = decoder.prefill([ids[sequence, :prompt].tolist()])
        torch.testing.assert_close(logits[0], plain[sequence, prompt - 1], atol=1e-5, rtol=0)
        cache.put(torch.tensor([row]), filled, torch.tensor([0]))
        place[sequence], length[sequence] = row, prompt

    def steps(count: int) -> None:
        for _ in range(count):
            tokens = torch.zeros(len(cache.length_B), dtype=torch.int64)  # a row that nobody uses is given anything
            for sequence, row in place.items():
                tokens[row] = ids[sequence, length[sequence]]
            logits = decoder.step(tokens, cache, torch.ones(len(tokens), dtype=torch.bool))
            for sequence, row in place.items():
                torch.testing.assert_close(logits[row], plain[sequence, length[sequence]], atol=1e-5, rtol=0)
                length[sequence] += 1

    with torch.inference_mode():
        join(0, 5, row=0)
        steps(3)
        join(1, 11, row=1)
        steps(4)
        del place[0]
        join(2, 2, row=0)
        steps(6)
        assert cache.filled == 21  # of the longer row
        smaller = decoder.new_cache(1, 22)
        smaller.put(torch.tensor([0]), cache, torch.tensor([0]))
        cache, place = smaller, {2: 0}
        steps(13)


@pytest.mark.parametrize("window", [None, 7])
def test_document_ids_keep_documents_apart(window: int | None) -> None:
    model, ids = build(head_init="normal", attention=DenseAttentionConfig(window=window)), random_ids(1, 30, seed=4)
    documents = torch.tensor([[0] * 12 + [1] * 18])
    with torch.no_grad():
        together = model(ids, document_BT=documents)
        torch.testing.assert_close(together[:, :12], model(ids[:, :12]), atol=1e-5, rtol=0)
        # RoPE is relative, so the second document may stand anywhere in the row.
        torch.testing.assert_close(together[:, 12:], model(ids[:, 12:]), atol=1e-4, rtol=0)


def test_first_loss_is_exactly_that_of_a_uniform_guess() -> None:
    model, ids = build(num_layers=1, vocab_size=50_304), random_ids(1, 64, below=50_304)
    assert round(SummedLoss(model)(ids, ids, None).item() / 64, 4) == 10.8258 == round(math.log(50_304), 4)


def test_padding_words_take_no_probability() -> None:
    model, ids = build(head_init="normal"), random_ids(1, 8)
    assert model.config.padded_vocab_size == 192
    with torch.no_grad():
        model.lm_head.weight[130:] = 1e3  # type: ignore[union-attr, index]
        by_hand = -model.logits(model(ids)).log_softmax(-1).gather(-1, ids[..., None]).sum()
        torch.testing.assert_close(SummedLoss(model)(ids, ids, None), by_hand, atol=1e-3, rtol=1e-5)


def test_eighty_layers_start_with_finite_gradients_and_learn() -> None:
    shape = {"num_layers": 80, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "head_dim": 16, "vocab_size": 64}
    model = Transformer(ModelConfig(**shape, norm_weight=True, residual_init="scaled", head_init="normal"))
    model.init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids, losses = random_ids(4, 33, below=64), []
    for _ in range(8):
        loss = SummedLoss(model)(ids[:, :-1], ids[:, 1:], None) / 128
        loss.backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


def test_init_is_the_table_and_a_seed_is_a_model() -> None:
    model, again, other = build(), build(), Transformer(build().config)
    other.init_weights(2)
    for (name, ours), theirs in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert not torch.equal(model.layers[0].mlp.gate_proj.weight, other.layers[0].mlp.gate_proj.weight)
    zero = Transformer(ModelConfig())
    zero.init_weights(0)
    assert zero.lm_head is not None and not zero.lm_head.weight.any()
    assert not zero.layers[0].self_attn.o_proj.weight.any() and not zero.layers[0].mlp.down_proj.weight.any()
    assert zero.layers[0].mlp.gate_proj.weight.std().item() == pytest.approx(128**-0.5, rel=0.02)


def test_mirrored_attention_starts_as_look_at_alike_and_copy() -> None:
    model = build(attention_init="mirrored")
    layer = model.layers[0].self_attn
    q = layer.q_proj.weight.view(2, 2, 16, 64)  # kv head, group, head size, hidden
    k, v = layer.k_proj.weight.view(2, 16, 64), layer.v_proj.weight.view(2, 16, 64)
    o = layer.o_proj.weight.T.reshape(2, 2, 16, 64)
    for group in range(2):
        assert torch.equal(q[:, group], k)
        torch.testing.assert_close(o[:, group], 0.25 * v)


def test_a_copy_head_starts_as_match_what_is_alike() -> None:
    model = build(copy_head_dim=16)
    assert model.copy_head is not None and torch.equal(model.copy_head.q_proj.weight, model.copy_head.k_proj.weight)
    assert model.copy_head.k_proj.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)


@pytest.mark.parametrize("changes", [*SHAPES.values(), {"norm_weight": True}])
def test_config_counts_what_the_model_has(changes: dict[str, Any]) -> None:
    model = build(**changes, vocab_size=128)  # a multiple of 64: no padding rows
    assert model.config.num_parameters == sum(parameter.numel() for parameter in model.parameters()), encode(model.config)


def test_a_window_costs_the_same_in_longer_rows_and_exports_for_rows_that_fit() -> None:
    config = ModelConfig(max_seq_len=64, attention=DenseAttentionConfig(window=8))
    assert config.flops_per_token(64) == config.flops_per_token(8) == ModelConfig().flops_per_token(8)
    assert config.exportable_as == "Qwen3 with a sliding window, and without it in rows of at most 8 tokens"
    for windows in (False, True):
        assert standard_form(config, 8, windows=windows) == ModelConfig(max_seq_len=8)
    assert standard_form(config, 9, windows=True) == replace(config, max_seq_len=9)
    with pytest.raises(UserError, match=r"attends to 8 of at most 9 tokens.*--max-tokens 8.*--to hf"):
        standard_form(config, 9)


def test_with_a_window_longer_rows_hold_no_state_that_shorter_ones_do_not() -> None:
    """Three layers of a window of 5: a state depends on the latest 13 tokens."""
    model, ids = build(attention=DenseAttentionConfig(window=5), max_seq_len=64, head_init="normal"), random_ids(1, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[0, -1], model(ids[:, -13:])[0, -1], atol=1e-5, rtol=0)
        assert (model(ids)[0, -1] - model(ids[:, -12:])[0, -1]).abs().max() > 1e-4
    assert [model.config.usable_seq_len(trained) for trained in (12, 13, 64)] == [12, 64, 64]
    assert build(max_seq_len=64).config.usable_seq_len(13) == 13


def test_wired_induction_head_looks_one_back_and_then_at_the_same_token() -> None:
    """Untrained: layer 0's first head attends to the previous position, layer 1's to what followed an equal token."""
    sharper = {"norm_weight": True, "qk_norm_weight": True, "qk_norm_init": 1.4}
    model = Transformer(ModelConfig(attention_init="induction", residual_init="scaled", **sharper))
    model.init_weights(0)
    g = torch.Generator().manual_seed(1)
    first = torch.randperm(2048, generator=g)[:30]
    ids = torch.cat([first, first])[None]  # every token of the second half stood 30 places before
    seen: list[torch.Tensor] = []

    def watch(layer: Any, args: tuple[Any, ...]) -> None:
        q, k = (heads[0, :, 0] for heads in layer.project(*args)[:2])
        scores = (q @ k.T / 32**0.5).masked_fill(torch.ones(60, 60).triu(1).bool(), float("-inf"))
        seen.append(scores.softmax(-1))

    for block in list(model.layers)[:2]:
        block.self_attn.register_forward_pre_hook(watch)  # type: ignore[union-attr, operator]
    with torch.no_grad():
        model(ids)
    back, match = seen
    assert back[torch.arange(1, 60), torch.arange(59)].mean() > 0.5
    second_half = torch.arange(31, 60)
    assert match[second_half, second_half - 29].mean() > 0.4  # the token after the earlier occurrence, out of up to 60
    assert match[second_half].argmax(-1).eq(second_half - 29).float().mean() > 0.8


INDUCTION = {"attention_init": "induction"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"tie_embeddings": True}, "needs head_init=normal"),
        ({"embed_rank": 1000}, "embed_rank 1000"),
        ({**INDUCTION, "num_layers": 1}, "attention_init=induction"),
        ({**INDUCTION, "hidden_size": 40}, "attention_init=induction"),
        ({**INDUCTION, "tie_embeddings": True, "head_init": "normal"}, "attention_init=induction"),
        ({**INDUCTION, "embed_rank": 8}, "attention_init=induction"),
    ],
)
def test_impossible_shapes_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ModelConfig(**changes)


def test_value_embeddings_start_as_if_they_were_not_there() -> None:
    shape = {"num_layers": 5, "norm_weight": True, "residual_init": "scaled", "head_init": "normal"}
    without, ids = tiny_model(**shape), random_ids(2, 12, below=64)
    occurs = torch.isin(torch.arange(64), ids)
    for kind, layers_with in (("alternate", [0, 2, 4]), ("all", [0, 1, 2, 3, 4])):
        model = tiny_model(**shape, value_embeddings=kind)
        assert [int(name.split(".")[1]) for name in model.state_dict() if "value_embed" in name] == layers_with
        with torch.no_grad():
            assert torch.equal(model(ids), without(ids))
        SummedLoss(model)(ids, ids.roll(-1, 1), None).backward()
        for name, parameter in model.named_parameters():
            if "value_embed" in name:
                assert parameter.grad is not None and torch.equal(parameter.grad.norm(dim=1) > 0, occurs)


class Doubled(Linear):
    """Stands for a layer that computes in its own way, such as one converted to FP8."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("kinds", [(Linear, Linear, Linear), (Linear, Doubled, Linear)])
def test_joint_layers_equal_single_ones(kinds: tuple[type[Linear], ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8, requires_grad=True)
    single = [kind(8, size) for kind, size in zip(kinds, (6, 2, 4), strict=True)]
    weights = [torch.nn.init.normal_(layer.weight) for layer in single]
    outs = joint_linear(x, *single), tuple(layer(x) for layer in single)
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(sum(out.square().sum() for out in each), [x, *weights]) for each in outs))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "near", "window"), [(torch.float32, 1e-4, None), (torch.bfloat16, 3e-2, None), (torch.bfloat16, 3e-2, 24)]
)
def test_compiled_gradients_are_the_plain_ones(
    dtype: torch.dtype, near: float, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several pieces of the queries, chunks of the tokens and tiles of the vocabulary, of which the last ends in padding."""
    if not compile_works(torch.device("cpu"))[0]:
        pytest.skip("no C++ compiler here")
    monkeypatch.setattr(pieces, "FEWEST", 16)
    monkeypatch.setattr(pieces, "MOST", 16)
    monkeypatch.setattr(cross_entropy, "TILE_WORDS", 64)
    monkeypatch.setattr(cross_entropy, "TILED_CHUNK_TOKENS", 128)
    attention = DenseAttentionConfig(window=window)
    model = build(num_layers=2, vocab_size=300, head_init="normal", copy_head_dim=16, attention=attention)
    ids = random_ids(3, 65, below=300, seed=1)
    plain, compiled = SummedLoss(model), torch.compile(SummedLoss(model), fullgraph=True, dynamic=False)
    found = []
    for compute, run in ((torch.float32, plain), (dtype, compiled)):
        model.zero_grad()
        model.compute_dtype = compute
        loss = run(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None)
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for expected, ours in zip(*found, strict=True):
        assert expected.norm() > 0 and (ours - expected).norm() < near * expected.norm()
