"""The engine against the plain loop that recomputes every prefix, and against itself in every other batch."""

import gc
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from osler.inference.batch import Batch
from osler.inference.engine import InferenceEngine
from osler.inference.recompute import generate_by_recompute
from osler.inference.rows import Capabilities, Continuation, Request, Rows
from osler.model import layers
from osler.model.config import DenseAttentionConfig, ModelConfig
from osler.model.decoder import Decoder
from osler.model.kv_cache import KVCache
from osler.model.layers import Layout
from osler.model.transformer import Transformer
from osler.ops.sampling import RowSampling
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
    "copying-in-a-window": replace(PLAIN, copy_head_dim=8, attention=DenseAttentionConfig(window=6)),
}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [3], [1, 2, 3]]
STOP_IDS = (1, 2, 30)
SAMPLING = SamplingParams(max_new_tokens=24, stop_ids=STOP_IDS, seed=5)
GREEDY = SamplingParams(max_new_tokens=8, temperature=0)
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0}, "plain": {}, "hot": {"temperature": 1.7}, "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.7, "temperature": 0.8}, "both": {"top_k": 20, "top_p": 0.9}, "min-p": {"min_p": 0.2},
    "penalised": {"repetition_penalty": 1.5}, "greedy-penalised": {"repetition_penalty": 1.3, "temperature": 0.0},
    "counted": {"presence_penalty": 0.7, "frequency_penalty": -0.4},
    "greedy-counted": {"frequency_penalty": 1.5, "temperature": 0.0},
    "alternatives": {"top_logprobs": 3, "top_k": 9}, "biased": {"logit_bias": ((7, 2.5), (8, -100.0)), "temperature": 0.5},
}  # fmt: skip


def build(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model with every weight away from zero and from one, so that each of them matters."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.25, generator=generator)
    return model


def assert_same(a: list[Continuation], b: list[Continuation]) -> None:
    assert [row.ids for row in a] == [row.ids for row in b]
    for mine, other in zip(a, b, strict=True):
        assert mine.finished == other.finished
        torch.testing.assert_close(torch.tensor(mine.logprobs), torch.tensor(other.logprobs), atol=1e-5, rtol=0)
        assert (mine.packed_masks is None) == (other.packed_masks is None)
        if mine.packed_masks is not None and other.packed_masks is not None:
            assert torch.equal(mine.packed_masks, other.packed_masks)
        assert mine.top_logprobs == [pytest.approx(top, abs=1e-5) for top in other.top_logprobs]


def draw(
    model: Transformer, prompts: list[list[int]] = PROMPTS, *, samples: int = 3, first_row: int = 0, **changes: Any
) -> list[Continuation]:
    given = {name: changes.pop(name) for name in ("max_rows", "poll_steps", "dtype") if name in changes}
    sampling = replace(SAMPLING, **changes)
    return InferenceEngine(model, **given).generate(prompts, sampling, samples_per_prompt=samples, first_row=first_row)


def recompute(
    model: Transformer, prompts: list[list[int]] = PROMPTS, *, samples: int = 3, first_row: int = 0, **changes: Any
) -> list[Continuation]:
    sampling = replace(SAMPLING, **changes)
    return generate_by_recompute(model, prompts, sampling, samples_per_prompt=samples, first_row=first_row)


def ids_of(rows: list[Continuation]) -> list[list[int]]:
    return [row.ids for row in rows]


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
    assert ids_of(part) == ids_of(whole)[3:] != ids_of(draw(model, prompts=PROMPTS[1:]))
    assert_same(part, recompute(model, PROMPTS[1:], first_row=3))


# ---- against itself


@pytest.mark.parametrize("changes", [{"poll_steps": 1}, {"poll_steps": 7}, {"poll_steps": 1000}, {"max_rows": 5}])
@pytest.mark.parametrize("name", ["plain", "top-p"])
@pytest.mark.parametrize("config", ["grouped", "copying-in-a-window"])
def test_polling_compaction_and_waves_change_nothing(changes: dict[str, int], name: str, config: str) -> None:
    model = build(CONFIGS[config])
    expected = draw(model, samples=6, **SETTINGS[name])
    lengths = {len(row.ids) for row in expected}
    assert len(lengths) > 5, "rows must end at different steps, or compaction is not exercised"
    assert_same(draw(model, samples=6, **changes, **SETTINGS[name]), expected)


def test_samples_of_one_prompt_equal_that_many_prompts() -> None:
    model = build(PLAIN)
    shared = draw(model, PROMPTS[:2], samples=4)
    separate = draw(model, [PROMPTS[0]] * 4 + [PROMPTS[1]] * 4, samples=1)
    assert_same(shared, separate)
    assert len({tuple(row.ids) for row in shared[:4]}) > 1
    assert ids_of(draw(model, PROMPTS[:2], samples=4)) == ids_of(shared) != ids_of(draw(model, PROMPTS[:2], samples=4, seed=6))


def test_the_engine_follows_the_weights_of_the_model_and_keeps_no_copy() -> None:
    def decoders() -> set[int]:
        return {id(thing) for thing in gc.get_objects() if type(thing) is Decoder}

    model, of_others = build(PLAIN), decoders()  # such as a server of other tests
    engine = InferenceEngine(model)
    before = engine.generate(PROMPTS, GREEDY)
    model.load_state_dict(build(PLAIN, seed=1).state_dict())
    after = engine.generate(PROMPTS, GREEDY)
    assert ids_of(before) != ids_of(after)
    assert_same(after, InferenceEngine(model).generate(PROMPTS, GREEDY))
    assert decoders() <= of_others


def test_a_stream_is_the_first_row_of_generate() -> None:
    model = build(PLAIN)
    for prompt in PROMPTS:
        streamed = list(InferenceEngine(model).stream(prompt, SAMPLING))
        assert streamed == InferenceEngine(model).generate([prompt], SAMPLING)[0].ids
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
    for number, row in enumerate(rollout):
        prompt = PROMPTS[number // 3]
        logits = low.logits(low(torch.tensor([prompt + row.ids])))[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(row.ids)[:, None])[:, 0]
        errors.append((torch.tensor(row.logprobs) - expected.detach()).abs())
    assert float(torch.cat(errors).mean()) < 0.03
    assert Decoder(model, Layout(torch.bfloat16, 1)).new_cache(1, 1).k.dtype == torch.float32


# ---- rows that join and leave


def alone(model: Transformer, request: Request) -> Continuation:
    return generate_by_recompute(model, [request.prompt], request.sampling, first_row=request.number)[0]


def all_of(batch: Batch, steps: int = 3) -> dict[int, Continuation]:
    found = {}
    while batch:
        batch.step(steps)
        found |= dict(batch.collect())
    return found


@pytest.mark.parametrize("config", ["grouped", "copying-in-a-window"])
def test_no_row_notices_the_others_whatever_they_ask_for_and_whenever_they_come(config: str) -> None:
    """Requests with different prompts, lengths and parameters join at random steps and wait for few rows."""
    model, rng = build(CONFIGS[config]), random.Random(0)
    requests = []
    for number in range(24):
        sampling = replace(
            SAMPLING, **SETTINGS[rng.choice(list(SETTINGS))], seed=rng.randrange(3), max_new_tokens=rng.randint(1, 20)
        )
        stop_ids = tuple(rng.sample(range(50), rng.randrange(5)))
        prompt = tuple(rng.randrange(50) for _ in range(rng.randint(1, 40)))
        requests.append(Request(prompt, replace(sampling, stop_ids=stop_ids), number))
    for max_rows in (1, 5, 64):
        batch = InferenceEngine(model).open(60, 20, max_rows, Capabilities.needed(requests, PLAIN.vocab_size))
        found: dict[int, Continuation] = {}
        for request in requests:
            batch.add(request)
            if rng.random() < 0.5:
                batch.step(rng.randrange(4))
                found |= dict(batch.collect())
        found |= all_of(batch)
        assert_same([found[number] for number in range(24)], [alone(model, request) for request in requests])


@pytest.mark.parametrize("config", ["grouped", "copying-in-a-window"])
def test_a_prompt_goes_on_from_what_a_row_has_of_it(monkeypatch: pytest.MonkeyPatch, config: str) -> None:
    """A conversation in turns, and several prompts with the same worked examples: only what is new runs through the model."""
    model, taught = build(CONFIGS[config]), tuple(range(3, 33))
    run: list[int] = []
    prefill = Decoder.prefill

    def counted(decoder: Decoder, prompts: list[tuple[int, ...]], past: KVCache | None = None) -> tuple[KVCache, torch.Tensor]:
        run.append(sum(map(len, prompts)) - len(prompts) * (past.filled if past else 0))
        return prefill(decoder, prompts, past)

    monkeypatch.setattr(Decoder, "prefill", counted)
    sampling = replace(SAMPLING, max_new_tokens=8, stop_ids=())
    batch = InferenceEngine(model).open(64, 8, 256, Capabilities())
    batch.add(Request(taught, sampling))
    first = all_of(batch)[0]
    follow_up = Request((*taught, *first.ids, 40, 41), sampling, 1)
    batch.add(follow_up)
    assert_same([all_of(batch)[1]], [alone(model, follow_up)])
    others = [Request((*taught, *end), sampling, 2 + number) for number, end in enumerate(([9, 8, 7], [6], [5, 4, 3, 2]))]
    for request in others:
        batch.add(request)
    found = all_of(batch)
    assert_same([found[number] for number in (2, 3, 4)], [alone(model, request) for request in others])
    assert run == [30, 3, 3 + 1 + 4], "the last token drawn is in no cache"


def test_news_is_what_was_drawn_since_the_last_look_and_a_row_that_is_given_up_makes_room() -> None:
    """A server's loop: one row at a time is cancelled, waiting or running, and the others draw what they draw alone."""
    model = build(PLAIN)
    settings = [{}, SETTINGS["alternatives"], SETTINGS["top-p"], SETTINGS["greedy-penalised"], {"top_logprobs": 1}, {}]
    requests = [
        Request((1, 2, number), replace(SAMPLING, **changes, stop_ids=()), number) for number, changes in enumerate(settings)
    ]
    can = Capabilities.needed(requests, PLAIN.vocab_size)
    batch = InferenceEngine(model).open(60, 24, 3, can, keeps_masks=False)
    for request in requests:
        batch.add(request)
    told = {number: Continuation([], [], finished=False) for number in range(6)}
    ended: dict[int, Continuation] = {}
    for step in range(60):
        batch.step(1)
        for number, news in batch.news():
            told[number].ids.extend(news.ids)
            told[number].logprobs.extend(news.logprobs)
            told[number].top_logprobs.extend(news.top_logprobs)
        if step == 4:
            batch.cancel(0)  # runs
            batch.cancel(5)  # waits
            batch.cancel(99)
        ended |= dict(batch.collect())
        assert not any(news.ids for _, news in batch.news())
    assert not batch and sorted(ended) == [0, 1, 2, 3, 4]
    for number, completion in ended.items():
        expected = alone(model, requests[number])
        length = 6 if number == 0 else 24
        cut = Continuation(expected.ids[:length], expected.logprobs[:length], False, None, expected.top_logprobs[:length])
        assert_same([completion, told[number]], [cut, cut])


def test_prompts_join_a_few_at_a_step_and_one_that_is_too_long_alone() -> None:
    model = build(PLAIN)
    requests = [Request((3,) * length, replace(SAMPLING, max_new_tokens=4, stop_ids=()), length) for length in (5, 5, 1, 20, 9)]
    batch = InferenceEngine(model).open(40, 4, 8, Capabilities(), join_tokens=11)
    for request in requests:
        batch.add(request)
    joined = []
    for _ in range(4):
        batch.step(0)
        joined.append(sum(len(news.ids) for _, news in batch.news()))
    assert joined == [3, 1, 1, 0], "11 tokens, then 20 at once, then the last"
    found = all_of(batch)
    assert_same([found[number] for number in range(5)], [alone(model, request) for request in requests])


def test_a_batch_refuses_what_it_was_not_made_for() -> None:
    batch = InferenceEngine(build(PLAIN)).open(40, 8, 4, Capabilities(stop_ids=1))
    short = SamplingParams(max_new_tokens=8)
    for prompt, changes in (([1] * 33, {}), ([1], {"max_new_tokens": 9}), ([1], {"stop_ids": (1, 2)}), ([1], {"top_p": 0.5})):
        with pytest.raises(ValueError, match="the batch has 40 slots"):
            batch.add(Request(tuple(prompt), replace(short, **changes)))
    with pytest.raises(UserError, match="The prompt has token id 50"):
        batch.add(Request((50,), short))
    assert not batch


# ---- ends


def test_completions_end_with_their_first_stop_token_or_at_the_limit() -> None:
    rollout = draw(build(PLAIN), samples=8)
    assert 0 < sum(row.finished for row in rollout) < len(rollout)
    for row in rollout:
        assert len(row.ids) == len(row.logprobs)
        assert not set(row.ids[:-1]) & set(STOP_IDS)
        assert row.finished == (row.ids[-1] in STOP_IDS)
        assert row.finished or len(row.ids) == 24


def test_a_stop_on_the_first_and_on_the_last_possible_token_and_the_whole_length() -> None:
    model = build(PLAIN)
    first = InferenceEngine(model).generate([[1]], GREEDY)[0].ids
    for position in (0, GREEDY.max_new_tokens - 1):
        stop = first[position]
        rollout = InferenceEngine(model, poll_steps=1).generate([[1]], replace(GREEDY, stop_ids=(stop,)))
        assert rollout[0].ids == first[: first.index(stop) + 1] and rollout[0].finished
    assert not InferenceEngine(model).generate([[1]], SamplingParams(max_new_tokens=1))[0].finished
    assert InferenceEngine(model).generate([], GREEDY) == []
    whole: dict[str, Any] = {"samples": 1, "max_new_tokens": 14, "stop_ids": ()}  # all 64 places of the model
    assert_same(draw(model, [[1] * 50], **whole), recompute(model, [[1] * 50], **whole))


def test_padding_of_the_vocabulary_is_never_drawn() -> None:
    model = build(PLAIN)
    with torch.no_grad():
        model.lm_head.weight[PLAIN.vocab_size :] *= 100  # would win by far
    rollout = draw(model, stop_ids=(), samples=8, temperature=5.0)
    assert max(max(row.ids) for row in rollout) < PLAIN.vocab_size
    assert_same(draw(build(PLAIN), stop_ids=(), samples=8, temperature=5.0), rollout)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([[1], []], ["Prompt 1", "empty"]),
        ([[1] * 50], ["50 tokens", "24 new", "max_seq_len 64", "at most 14"]),
        ([[1] * 64], ["64 tokens, but", "to less than 64"]),
        ([[1, 50]], ["id 50", "0 to 49"]),
        ([[-1]], ["id -1"]),
    ],
)
def test_mistakes_are_named(prompts: list[list[int]], words: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        draw(build(PLAIN), prompts)
    for word in words:
        assert word in str(raised.value)


def test_the_host_reads_nothing_of_the_device_between_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no values, so whatever would wait for one raises."""
    monkeypatch.setattr(layers, "packs_weights", lambda device: False)  # as on a GPU
    asked = replace(SAMPLING, top_k=9, top_p=0.9, min_p=0.1, temperature=0.7, repetition_penalty=1.3, top_logprobs=2)
    requests = [Request((1, 2, 3), asked, number) for number in range(3)]
    with FakeTensorMode():
        decoder = Decoder(Transformer(PLAIN), Layout(torch.float32, 3))
        cache = decoder.new_cache(3, 32)
        can = Capabilities.needed(requests, PLAIN.vocab_size)
        rows = Rows(3, 24, can, PLAIN.vocab_size, torch.device("cpu"), mask_places=25)
        sampling = RowSampling.of([asked] * 3, PLAIN.vocab_size, torch.device("cpu"))
        for _ in range(3):
            rows.draw(decoder.step(rows.token_B, cache, rows.running_B), sampling)
        with pytest.raises(DataDependentOutputException):
            rows.drawn_B.sum().item()
