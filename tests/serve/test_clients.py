"""OpenAI's own client against the server, and both against the engine that draws."""

from collections.abc import Callable
from typing import Any

import openai
import pytest

from osler.inference.engine import InferenceEngine
from osler.inference.load import LoadedModel
from osler.inference.rows import Continuation
from osler.ops.sampling_params import SamplingParams
from osler.tokenizer.bpe import ANSWER
from osler.tokenizer.chat import encode_prompt, parse_completion

QUESTION = "What helps against fever?"
ASK: list[Any] = [{"role": "user", "content": QUESTION}]
BIAS = {"0": 1.0, "3": 3.0}  # so that answers come, and end


@pytest.fixture
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def drawn(
    ready: LoadedModel, prompt: list[int], *, samples: int = 1, bias: dict[str, float] = BIAS, **changes: Any
) -> list[Continuation]:
    """What the engine draws for a prompt."""
    sampling = SamplingParams(
        stop_ids=(ready.tokenizer.eos_id,), logit_bias=tuple((int(token), value) for token, value in bias.items()), **changes
    )
    return InferenceEngine(ready.model).generate([prompt], sampling, samples_per_prompt=samples)


def prompt_of(ready: LoadedModel, question: str = QUESTION, *, reasoning: bool = True) -> list[int]:
    return encode_prompt(ready.tokenizer, question, reasoning=reasoning)


def bytes_told(token: str) -> bytes:
    """The bytes of a token in the older form of log-probabilities."""
    half = token.startswith("bytes:")
    return bytes.fromhex(token.removeprefix("bytes:").replace(r"\x", "")) if half else token.encode()


def parts_of(ready: LoadedModel, ids: list[int], *, reasoning: bool = True) -> tuple[str, str, int]:
    """Reasoning and answer with their spaces, and the tokens up to the special one that ends the answer."""
    tokenizer = ready.tokenizer
    answer_id = tokenizer.special_id(ANSWER)
    border = (ids.index(answer_id) + 1 if answer_id in ids else len(ids)) if reasoning else 0
    end = next((place for place in range(border, len(ids)) if ids[place] in tokenizer.special_ids), len(ids))
    return tokenizer.decode(ids[:border], skip_special=True), tokenizer.decode(ids[border:end]), min(end + 1, len(ids))


@pytest.mark.parametrize("seed", range(4))
def test_a_chat_is_what_the_engine_draws_whole_and_streamed(client, models, seed) -> None:
    ready = models["asked"]
    expected = drawn(ready, prompt_of(ready), samples=2, max_new_tokens=40, seed=seed, temperature=1.2)
    given: dict[str, Any] = {
        "model": "asked", "messages": ASK, "max_tokens": 40, "seed": seed, "n": 2, "temperature": 1.2, "logit_bias": BIAS,
    }  # fmt: skip
    whole = client.chat.completions.create(**given)
    for choice, continuation in zip(whole.choices, expected, strict=True):
        thinking, answer, count = parts_of(ready, continuation.ids)
        assert (choice.message.reasoning_content or "", choice.message.content) == (thinking, answer)
        assert choice.finish_reason == ("stop" if continuation.finished or count < len(continuation.ids) else "length")
        parsed = parse_completion(ready.tokenizer, continuation.ids)
        assert (thinking.strip(), answer.strip()) == (parsed.thinking, parsed.answer or ""), "as an exam reads it"
    assert whole.usage.prompt_tokens == len(prompt_of(ready)) and whole.model == "asked"
    assert whole.usage.completion_tokens == sum(parts_of(ready, row.ids)[2] for row in expected)
    chunks = list(client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    for index, choice in enumerate(whole.choices):
        own = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == index]
        assert own[0].delta.role == "assistant" and not any(one.delta.role for one in own[1:])
        assert "".join(one.delta.content or "" for one in own) == choice.message.content
        thinking = "".join(getattr(one.delta, "reasoning_content", None) or "" for one in own)
        assert thinking == (choice.message.reasoning_content or "")
        assert [one.finish_reason for one in own] == [None] * (len(own) - 1) + [choice.finish_reason]


def test_both_parts_come(models) -> None:
    """Or the test above would show little."""
    ready = models["asked"]
    rows = [
        row
        for seed in range(4)
        for row in drawn(ready, prompt_of(ready), samples=2, max_new_tokens=40, seed=seed, temperature=1.2)
    ]
    assert any(all(parts_of(ready, row.ids)) for row in rows) and len({row.finished for row in rows}) == 2
    assert any(parts_of(ready, row.ids)[2] < len(row.ids) for row in rows), "a special token ends an answer before the end"


def test_without_reasoning_the_answer_comes_at_once_and_earlier_turns_are_examples(client, models) -> None:
    ready = models["asked"]
    given: dict[str, Any] = {"model": "asked", "temperature": 0, "max_completion_tokens": 12, "reasoning_effort": "none"}
    reply = client.chat.completions.create(messages=ASK, **given).choices[0].message
    expected = drawn(ready, prompt_of(ready, reasoning=False), bias={}, max_new_tokens=12, temperature=0)[0]
    assert (reply.content, reply.reasoning_content) == (parts_of(ready, expected.ids, reasoning=False)[1], None)
    history: list[Any] = [*ASK, {"role": "assistant", "content": "Tea.", "reasoning_content": "It is warm."}]
    last = client.chat.completions.create(
        messages=[*history, {"role": "user", "content": [{"type": "text", "text": "Why?"}]}], **given
    )
    special, encode = ready.tokenizer.special_id, ready.tokenizer.encode
    before = [special("<|question|>"), *encode(QUESTION), special("<|thinking|>"), *encode("It is warm.")]
    before += [special(ANSWER), *encode("Tea."), ready.tokenizer.eos_id]
    expected = drawn(ready, [*before, *prompt_of(ready, "Why?", reasoning=False)], bias={}, max_new_tokens=12, temperature=0)[0]
    assert last.choices[0].message.content == parts_of(ready, expected.ids, reasoning=False)[1]


def test_a_text_ends_before_a_stop_string_that_tokens_share(client, models) -> None:
    ready = models["text"]
    prompt = [ready.tokenizer.eos_id, *ready.tokenizer.encode("A fever")]
    given: dict[str, Any] = {"model": "text", "prompt": "A fever", "max_tokens": 60, "seed": 3}
    ids = drawn(ready, prompt, bias={}, max_new_tokens=60, seed=3)[0].ids
    tokens = [ready.tokenizer.decode([token]) for token in ids]
    place = next(k for k in range(20, 50) if all(t.isascii() and len(t.strip()) > 1 for t in tokens[k : k + 2]))
    stop = tokens[place][-1] + tokens[place + 1][0]  # half in one token, half in the next
    text = ready.tokenizer.decode(ids)
    cut = text[: text.index(stop)]
    for stops in (stop, ["never", stop]):
        whole = client.completions.create(**given, stop=stops).choices[0]
        assert (whole.text, whole.finish_reason) == (cut, "stop")
        streamed = list(client.completions.create(**given, stop=stops, stream=True))
        assert "".join(chunk.choices[0].text for chunk in streamed) == cut
        assert streamed[-1].choices[0].finish_reason == "stop"
        told = client.completions.create(**given, stop=stops, logprobs=0).choices[0].logprobs
        kept = ids[: len(told.tokens)]
        assert [bytes_told(token) for token in told.tokens] == [ready.tokenizer.bytes_of(token) for token in kept]
        assert told.text_offset[-1] < len(cut) <= len(ready.tokenizer.decode(kept))
    assert client.completions.create(**given).choices[0].text == text


def test_a_stop_text_ends_the_answer_and_not_the_thinking_before_it(client) -> None:
    given: dict[str, Any] = {
        "model": "asked", "messages": ASK, "max_tokens": 40, "n": 2, "temperature": 1.2, "logit_bias": BIAS,
    }  # fmt: skip
    cut = 0
    for seed in range(4):
        for index, choice in enumerate(client.chat.completions.create(**given, seed=seed).choices):
            thinking, answer = choice.message.reasoning_content or "", choice.message.content
            for stop in {text for text in (thinking[:1], answer[1:2]) if text and text.isascii()}:
                told = client.chat.completions.create(**given, seed=seed, stop=stop).choices[index].message
                assert (told.reasoning_content or "", told.content) == (thinking, answer.partition(stop)[0])
                cut += stop in answer and stop in thinking
    assert cut, "or this would show little"


def test_prompts_in_every_form_are_continued(client, models) -> None:
    ready = models["text"]
    tokenizer = ready.tokenizer
    given: dict[str, Any] = {"model": "text", "max_tokens": 8, "temperature": 0}
    ids = {text: [tokenizer.eos_id, *tokenizer.encode(text)] for text in ("rest", "tea and", "")}
    expected = {
        text: tokenizer.decode(drawn(ready, row, bias={}, max_new_tokens=8, temperature=0)[0].ids) for text, row in ids.items()
    }
    for prompt, texts in (
        ("rest", ["rest"]),
        (["rest", "tea and", ""], ["rest", "tea and", ""]),
        (ids["rest"], ["rest"]),
        ([ids["tea and"], ids["rest"]], ["tea and", "rest"]),
    ):
        reply = client.completions.create(prompt=prompt, **given)
        assert [choice.text for choice in reply.choices] == [expected[text] for text in texts]
        assert reply.usage.prompt_tokens == sum(len(ids[text]) for text in texts)
    without_limit = client.completions.create(model="text", prompt="", logit_bias={"0": -100})
    assert without_limit.usage.completion_tokens == 16, "as in OpenAI's API"


def test_seeds_repeat_and_no_seed_does_not(client) -> None:
    def texts(**changes: Any) -> list[str]:
        return [
            choice.text for choice in client.completions.create(model="text", prompt="A", n=3, max_tokens=16, **changes).choices
        ]

    assert texts(seed=-5) == texts(seed=-5) != texts(seed=6)
    assert len({*texts(), *texts()}) == 6 and len(set(texts(seed=2**62))) == 3


def test_logprobs_are_those_of_the_tokens_that_are_told(client, models) -> None:
    ready = models["asked"]
    given: dict[str, Any] = {
        "model": "asked", "messages": ASK, "max_tokens": 60, "seed": 1, "logit_bias": BIAS, "logprobs": True, "top_logprobs": 3,
    }  # fmt: skip
    expected = drawn(ready, prompt_of(ready), max_new_tokens=60, seed=1, top_logprobs=3)[0]
    border = expected.ids.index(ready.tokenizer.special_id(ANSWER))
    kept = list(range(border + 1, parts_of(ready, expected.ids)[2] - 1))
    whole = client.chat.completions.create(**given).choices[0]
    streamed = [token for chunk in client.chat.completions.create(**given, stream=True)
                for token in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])]  # fmt: skip
    assert len(kept) > 3
    for told in (whole.logprobs.content, streamed):
        assert [token.token for token in told] == [ready.tokenizer.decode([expected.ids[place]]) for place in kept]
        assert [token.logprob for token in told] == pytest.approx([expected.logprobs[place] for place in kept], abs=1e-5)
        for token, place in zip(told, kept, strict=True):
            assert [one.logprob for one in token.top_logprobs] == pytest.approx(
                list(expected.top_logprobs[place].values()), abs=1e-5
            )
            assert bytes(token.bytes).decode(errors="replace") == token.token
    assert b"".join(bytes(token.bytes) for token in streamed).decode(errors="replace") == whole.message.content
    reply = client.completions.create(
        model="text", prompt="A", max_tokens=9, seed=2, logprobs=2, extra_body={"top_k": 1}
    ).choices[0]
    assert b"".join(map(bytes_told, reply.logprobs.tokens)).decode(errors="replace") == reply.text
    assert reply.logprobs.token_logprobs == pytest.approx([0.0] * 9) and reply.logprobs.text_offset[0] == 0
    assert all(len(top) == 1 for top in reply.logprobs.top_logprobs), "what could not be drawn is not told"


def test_halves_of_a_character_are_told_by_their_bytes(client, models) -> None:
    halves = models["asked"].tokenizer.encode("é")
    assert len(halves) == 2, "the text that it was trained on has none"
    given: dict[str, Any] = {"max_tokens": 1, "logit_bias": {str(token): 100 for token in halves}}
    legacy = client.completions.create(model="text", prompt="A", logprobs=2, **given).choices[0].logprobs
    assert legacy.top_logprobs[0].keys() == {r"bytes:\xc3", r"bytes:\xa9"} and legacy.tokens[0] in legacy.top_logprobs[0]
    told = client.chat.completions.create(
        model="asked", messages=ASK, logprobs=True, top_logprobs=2, reasoning_effort="none", **given
    ).choices[0].logprobs.content[0]
    assert sorted((one.token, one.bytes) for one in told.top_logprobs) == [("�", [0xA9]), ("�", [0xC3])]


def test_sampling_parameters_of_vllm_are_heard(client, models) -> None:
    ready = models["text"]
    prompt = [ready.tokenizer.eos_id, *ready.tokenizer.encode("A fever")]
    settings: list[dict[str, Any]] = [
        {"top_k": 3}, {"top_k": -1}, {"min_p": 0.3},
        {"presence_penalty": 1.5}, {"frequency_penalty": -1.0},
        {"repetition_penalty": 1.7, "temperature": 0.0}, {"top_p": 0.4, "temperature": 1.5},
    ]  # fmt: skip
    for changes in settings:
        asked = {**changes, "top_k": None if changes.get("top_k") == -1 else changes.get("top_k")}
        expected = drawn(ready, prompt, bias={}, max_new_tokens=20, seed=9, **asked)[0]
        extra = {name: changes[name] for name in ("top_k", "min_p", "repetition_penalty") if name in changes}
        own = {
            name: changes[name] for name in ("top_p", "temperature", "presence_penalty", "frequency_penalty") if name in changes
        }
        reply = client.completions.create(model="text", prompt="A fever", max_tokens=20, seed=9, extra_body=extra, **own)
        assert reply.choices[0].text == ready.tokenizer.decode(expected.ids, skip_special=False)
    forced = client.completions.create(model="text", prompt="A", max_tokens=3, temperature=0, logit_bias={"40": 100})
    assert forced.choices[0].text == ready.tokenizer.decode([40] * 3)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "call no tools"),
    ({"response_format": {"type": "json_object"}}, "response_format", "cannot force a form"),
    ({"extra_body": {"echo": True}}, "echo", "the prompt is not scored"),
    ({"presence_penalty": 2.5}, "presence_penalty", "at most 2"),
    ({"extra_body": {"temprature": 1}}, "temprature", "did you mean `temperature`"),
    ({"extra_body": {"guided_json": {}}}, "guided_json", "unknown key"),
    ({"temperature": 3}, "temperature", "at most 2"),
    ({"top_p": 1.1}, "top_p", "at most 1"),
    ({"n": 0}, "n", "at least 1"),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs=true"),
    ({"stop": ""}, "stop", "1 to 256 characters"),
    ({"stop": ["x"] * 17}, "stop", "up to 16"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "two names of one limit"),
    ({"logit_bias": {"99999": 1}}, "logit_bias", '"99999" is no token id'),
    ({"logit_bias": {"1" * 5000: 1}}, "logit_bias", '"1{76}... is no token id'),
    ({"logit_bias": {"5": 1, "05": 2}}, "logit_bias", '"05" is no token id'),
    ({"logit_bias": {"4": 101}}, "logit_bias", "at most 100"),
    ({"max_tokens": 5000}, "max_tokens", "at most 2.. tokens can follow this prompt: the model reads 256 in all"),
    ({"max_tokens": 250}, "max_tokens", "at most 2.. tokens can follow this prompt: the model reads 256 in all"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "leave it out .* or give 'none'"),
    ({"messages": []}, "messages", "begin and end with one of the user"),
    ({"messages": [{"role": "system", "content": "Be brief."}, *ASK]}, "messages", "no role system"),
    ({"messages": [*ASK, *ASK]}, "messages", "must alternate"),
    ({"messages": [{"role": "user", "content": None}]}, "messages", "content is missing in a message of the user"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages", "'text'"),
    ({"messages": [*ASK, {"role": "assistant", "content": None, "tool_calls": [{}]}, *ASK]}, "messages", "tool_calls"),
    ({"messages": [*ASK, {"role": "assistant", "content": None}]}, "messages", "begin and end with one of the user"),
    ({"messages": [{"role": "user", "content": "fever " * 300}]}, "messages", "takes at most 255"),
]


@pytest.mark.parametrize(
    ("given", "param", "words"), REFUSED, ids=[f"{param}-{number}" for number, (_, param, _) in enumerate(REFUSED)]
)
def test_what_is_not_honoured_is_refused_by_name(client, given, param, words) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        client.chat.completions.create(**{"model": "asked", "messages": ASK, **given})
    assert refused.value.param == param and refused.value.type == "invalid_request_error"


def test_what_asks_for_nothing_is_taken(client) -> None:
    answer = client.chat.completions.create(
        model="asked", messages=ASK, max_tokens=1, tools=[], response_format={"type": "text"}, presence_penalty=0, store=False,
        user="somebody", top_p=None, seed=None, stream=False, max_completion_tokens=1, top_logprobs=0,
    )  # fmt: skip
    assert answer.usage.completion_tokens == 1
    said = answer.choices[0].message.model_dump()  # has nulls, which clients send back as they are
    assert None in said.values()
    for earlier in (said, {**said, "content": None}):
        again = client.chat.completions.create(model="asked", messages=[*ASK, earlier, *ASK], max_tokens=1)
        assert again.usage.completion_tokens == 1


def test_a_share_of_nothing_takes_the_likeliest_token(client) -> None:
    given: dict[str, Any] = {"model": "text", "prompt": "A fever", "max_tokens": 20, "seed": 1}
    greedy = client.completions.create(**given, temperature=0).choices[0].text
    assert client.completions.create(**given, top_p=0).choices[0].text == greedy
    assert client.completions.create(**given).choices[0].text != greedy


def test_models_are_listed_and_chosen_by_name(client) -> None:
    asked, text = client.models.list().data
    assert (asked.id, text.id) == ("asked", "text") and client.models.retrieve("text") == text
    assert (asked.answers_questions, asked.reasons, text.answers_questions, text.reasons) == (True, True, False, False)
    assert asked.max_model_len == 256
    with pytest.raises(openai.NotFoundError, match="there are: asked, text") as unknown:
        client.chat.completions.create(model="gpt-4", messages=ASK)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="use /v1/completions"):
        client.chat.completions.create(model="text", messages=ASK)


def test_a_key_is_demanded(serve: Callable[..., Any]) -> None:
    running = serve(key="secret")
    for key in ("wrong", "secre", "secrets"):
        with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
            openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0).models.list()
    assert openai.OpenAI(base_url=f"{running.url}/v1", api_key="secret").models.list().data


def test_a_full_server_says_when_to_come_again(serve: Callable[..., Any], long_models: Any) -> None:
    running = serve(models=long_models, max_rows=1, max_waiting=1, max_new_tokens=4000)
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="3 completions are more than this server draws"):
        client.completions.create(model="text", prompt="A", n=3)
    with client.completions.create(prompt="A", model="text", max_tokens=4000, logit_bias={"0": -100}, stream=True) as running_one:
        next(iter(running_one))
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model="text", prompt="A", n=2)
    assert int(refused.value.response.headers["Retry-After"]) >= 1 and refused.value.code == "overloaded"
    running.wait_for(lambda: sum(served.outstanding for served in running.served) == 0)
    assert len(client.completions.create(model="text", prompt="A", n=2).choices) == 2


def test_sampling_params_have_no_field_that_the_api_forgets() -> None:
    """A new way to sample must be offered here or left out on purpose."""
    known = {"max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "logit_bias", "top_logprobs"}
    known |= {"presence_penalty", "frequency_penalty", "stop_ids", "seed"}
    assert set(vars(SamplingParams())) == known
