"""The engine against the plain loop that recomputes every prefix, and against itself in every other batch."""

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch

from osler.inference.engine import InferenceEngine, Rollout
from osler.inference.recompute import generate_by_recompute
from osler.model.config import ModelConfig
from osler.model.decoder import Decoder
from osler.model.layers import Layout
from osler.model.transformer import Transformer
from osler.ops.sampling_params import SamplingParams
from osler.runtime.errors import UserError

PLAIN = ModelConfig(
    num_layers=2, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8, max_seq_len=64,
    vocab_size=50,  # padded to 64: the 14 rows that no tokenizer knows must never be drawn
)  # fmt: skip
CONFIGS = {  # tests/model compares decoding with Qwen3 in more shapes
    "grouped": PLAIN,
    "norm-weights": replace(PLAIN, norm_weight=True, qk_norm_weight=True),
    "tied-factorized": replace(PLAIN, tie_embeddings=True, head_init="normal", embed_rank=16),
    "unpadded-vocab": replace(PLAIN, vocab_size=128),
}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [3], [1, 2, 3]]
STOP_IDS = (1, 2, 30)
SAMPLING = SamplingParams(max_new_tokens=24, stop_ids=STOP_IDS, seed=5)
GREEDY = SamplingParams(max_new_tokens=8, temperature=0)
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0}, "plain": {}, "hot": {"temperature": 1.7}, "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.7, "temperature": 0.8}, "both": {"top_k": 20, "top_p": 0.9},
}  # fmt: skip


def build(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model with every weight away from zero and from one, so that each of them matters."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.25, generator=generator)
    return model


def assert_same(a: Rollout, b: Rollout) -> None:
    assert a.completions == b.completions
    assert a.finished == b.finished
    for x, y in zip(a.logprobs, b.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(x), torch.tensor(y), atol=1e-5, rtol=0)
    assert (a.packed_masks is None) == (b.packed_masks is None)
    for x, y in zip(a.packed_masks or (), b.packed_masks or (), strict=True):
        assert torch.equal(x, y)


def draw(
    model: Transformer, prompts: list[list[int]] = PROMPTS, *, samples: int = 3, first_row: int = 0, **changes: Any
) -> Rollout:
    given = {name: changes.pop(name) for name in ("max_rows", "poll_steps", "dtype") if name in changes}
    sampling = replace(SAMPLING, **changes)
    return InferenceEngine(model, **given).generate(prompts, sampling, samples_per_prompt=samples, first_row=first_row)


def recompute(
    model: Transformer, prompts: list[list[int]] = PROMPTS, *, samples: int = 3, first_row: int = 0, **changes: Any
) -> Rollout:
    sampling = replace(SAMPLING, **changes)
    return generate_by_recompute(model, prompts, sampling, samples_per_prompt=samples, first_row=first_row)


# ---- against the plain loop


PAIRS = [*((name, "plain") for name in CONFIGS), *(("grouped", name) for name in SETTINGS)]


@pytest.mark.parametrize(("config", "settings"), PAIRS)
def test_engine_draws_what_the_plain_loop_draws(config: str, settings: str) -> None:
    model = build(CONFIGS[config])
    assert_same(draw(model, poll_steps=2, **SETTINGS[settings]), recompute(model, **SETTINGS[settings]))


def test_a_part_of_a_call_draws_what_the_whole_draws() -> None:
    model = build(PLAIN)
    whole = draw(model)
    part = draw(model, prompts=PROMPTS[1:], first_row=3)
    assert part.completions == whole.completions[3:] != draw(model, prompts=PROMPTS[1:]).completions
    assert_same(part, recompute(model, PROMPTS[1:], first_row=3))


# ---- against itself


@pytest.mark.parametrize("changes", [{"poll_steps": 1}, {"poll_steps": 7}, {"poll_steps": 1000}, {"max_rows": 5}])
@pytest.mark.parametrize("name", ["plain", "top-p"])
def test_polling_compaction_and_waves_change_nothing(changes: dict[str, int], name: str) -> None:
    model = build(PLAIN)
    expected = draw(model, samples=6, **SETTINGS[name])
    lengths = {len(completion) for completion in expected.completions}
    assert len(lengths) > 5, "rows must end at different steps, or compaction is not exercised"
    assert_same(draw(model, samples=6, **changes, **SETTINGS[name]), expected)


def test_samples_of_one_prompt_equal_that_many_prompts() -> None:
    model = build(PLAIN)
    shared = draw(model, PROMPTS[:2], samples=4)
    separate = draw(model, [PROMPTS[0]] * 4 + [PROMPTS[1]] * 4, samples=1)
    assert_same(shared, separate)
    assert len({tuple(completion) for completion in shared.completions[:4]}) > 1
    assert draw(model, PROMPTS[:2], samples=4).completions == shared.completions
    assert draw(model, PROMPTS[:2], samples=4, seed=6).completions != shared.completions


def test_the_engine_follows_the_weights_of_the_model_and_keeps_no_copy() -> None:
    model = build(PLAIN)
    engine = InferenceEngine(model)
    before = engine.generate(PROMPTS, GREEDY)
    model.load_state_dict(build(PLAIN, seed=1).state_dict())
    after = engine.generate(PROMPTS, GREEDY)
    assert before.completions != after.completions
    assert_same(after, InferenceEngine(model).generate(PROMPTS, GREEDY))
    assert not [thing for thing in gc.get_objects() if type(thing) is Decoder]


def test_a_stream_is_the_first_row_of_generate() -> None:
    model = build(PLAIN)
    for prompt in PROMPTS:
        streamed = list(InferenceEngine(model).stream(prompt, SAMPLING))
        assert streamed == InferenceEngine(model).generate([prompt], SAMPLING).completions[0]
    with torch.enable_grad():
        for _ in InferenceEngine(model).stream(PROMPTS[0], SAMPLING):
            assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_bf16_logprobs_are_near_those_of_a_bf16_forward() -> None:
    model = build(PLAIN)
    rollout = draw(model, dtype=torch.bfloat16)
    assert model.compute_dtype == torch.float32
    low = Transformer(PLAIN, compute_dtype=torch.bfloat16)
    low.load_state_dict(model.state_dict())
    errors = []
    for row, (completion, logprobs) in enumerate(zip(rollout.completions, rollout.logprobs, strict=True)):
        prompt = PROMPTS[row // 3]
        logits = low.logits(low(torch.tensor([prompt + completion])))[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        errors.append((torch.tensor(logprobs) - expected.detach()).abs())
    assert float(torch.cat(errors).mean()) < 0.03
    assert Decoder(model, Layout(torch.bfloat16, 1)).new_cache(1, 1).k.dtype == torch.float32


# ---- ends


def test_completions_end_with_their_first_stop_token_or_at_the_limit() -> None:
    rollout = draw(build(PLAIN), samples=8)
    assert 0 < sum(rollout.finished) < len(rollout.finished)
    for completion, logprobs, finished in zip(rollout.completions, rollout.logprobs, rollout.finished, strict=True):
        assert len(completion) == len(logprobs)
        assert not set(completion[:-1]) & set(STOP_IDS)
        assert finished == (completion[-1] in STOP_IDS)
        assert finished or len(completion) == 24


def test_a_stop_on_the_first_and_on_the_last_possible_token_and_the_whole_length() -> None:
    model = build(PLAIN)
    first = InferenceEngine(model).generate([[1]], GREEDY).completions[0]
    for position in (0, GREEDY.max_new_tokens - 1):
        stop = first[position]
        rollout = InferenceEngine(model, poll_steps=1).generate([[1]], replace(GREEDY, stop_ids=(stop,)))
        assert rollout.completions[0] == first[: first.index(stop) + 1]
        assert rollout.finished == [True]
    assert InferenceEngine(model).generate([[1]], SamplingParams(max_new_tokens=1)).finished == [False]
    assert InferenceEngine(model).generate([], GREEDY).completions == []
    whole: dict[str, Any] = {"samples": 1, "max_new_tokens": 14, "stop_ids": ()}  # all 64 places of the model
    assert_same(draw(model, [[1] * 50], **whole), recompute(model, [[1] * 50], **whole))


def test_padding_of_the_vocabulary_is_never_drawn() -> None:
    model = build(PLAIN)
    with torch.no_grad():
        model.lm_head.weight[PLAIN.vocab_size :] *= 100  # would win by far
    rollout = draw(model, stop_ids=(), samples=8, temperature=5.0)
    assert max(max(completion) for completion in rollout.completions) < PLAIN.vocab_size
    assert_same(draw(build(PLAIN), stop_ids=(), samples=8, temperature=5.0), rollout)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([[1], []], ["Prompt 1", "empty"]),
        ([[1] * 50], ["50 tokens", "24 new", "max_seq_len 64", "at most 14"]),
        ([[1, 50]], ["id 50", "0 to 49"]),
        ([[-1]], ["id -1"]),
    ],
)
def test_mistakes_are_named(prompts: list[list[int]], words: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        draw(build(PLAIN), prompts)
    for word in words:
        assert word in str(raised.value)
