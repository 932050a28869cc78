"""Chat and generate as a person meets them: what is asked, streamed, printed, interrupted and left."""

import io
import random
import signal
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from osler.checkpoint import store
from osler.cli import main as cli
from osler.inference.chat import continue_text, show_answer, stream_answer
from osler.inference.engine import InferenceEngine
from osler.inference.load import TOKENIZER_FILE, LoadedModel, describing_files, open_model
from osler.inference.text import TextStream
from osler.ops.sampling_params import SamplingParams
from osler.runtime.errors import UserError
from osler.tokenizer.bpe import Tokenizer
from osler.tokenizer.chat import encode_prompt, parse_completion


@pytest.fixture
def runs(clinic_runs: Path) -> Path:
    return clinic_runs


@pytest.fixture
def textbook(runs: Path) -> LoadedModel:
    return open_model(runs / "textbook", device="cpu")


def continued(ready: LoadedModel, text: str, new_tokens: int) -> list[str]:
    """The pieces in which the likeliest continuation of a text comes."""
    sampling = SamplingParams(max_new_tokens=new_tokens, temperature=0)
    return list(continue_text(InferenceEngine(ready.model), ready.tokenizer, text, sampling))


def piped(text: str | bytes) -> io.TextIOWrapper:
    """A stdin that a file is piped into."""
    return io.TextIOWrapper(io.BytesIO(text.encode() if isinstance(text, str) else text), encoding="utf-8")


class Terminal(io.StringIO):
    """A stdin that a person sits at."""

    def isatty(self) -> bool:
        return True


class ImpatientOutput(io.StringIO):
    """A stdout at which somebody presses Ctrl-C during a write, once, when the text so far ends with ``at``."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at = at

    def write(self, text: str) -> int:
        if self.at and self.getvalue().endswith(self.at):
            self.at = ""
            raise KeyboardInterrupt
        return super().write(text)


def talk(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, stdin: io.TextIOBase, *options: str) -> int:
    monkeypatch.setattr(sys, "stdin", stdin)
    return cli.main(["chat", str(checkpoint), "--max-new-tokens", "6", *options])


def test_every_piped_line_is_a_question(runs, monkeypatch, capsys):
    assert talk(monkeypatch, runs / "sft", piped("What is it?\n\n  Why? \n"), "--seed", "3") == 0
    out = capsys.readouterr().out
    first, second = (part.splitlines() for part in out.removeprefix("> ").split("\n> "))
    assert (first[0], second[0]) == ("What is it?", "Why?")
    assert first[1].startswith("thinking  ") and "\x1b" not in out
    assert talk(monkeypatch, runs / "sft", piped("What is it?\nWhy?\n"), "--seed", "3") == 0
    assert capsys.readouterr().out == out, "a session with the same seed repeats itself"
    assert talk(monkeypatch, runs / "sft", piped("Why?\n"), "--seed", "4") == 0
    assert capsys.readouterr().out.splitlines() == ["> Why?", *second[1:]], "question k is drawn with seed + k"


def test_piped_questions_are_read_as_any_file_is(runs, monkeypatch, capsys):
    assert talk(monkeypatch, runs / "sft", piped(b"\xef\xbb\xbfWhat is it?\r\n\xef\xbb\xbfWhy?\r\nFi\xe8vre?\r\n")) == 2
    captured = capsys.readouterr()
    assert [line for line in captured.out.splitlines() if line.startswith("> ")] == ["> What is it?", "> Why?"]
    assert "stdin:3 is not UTF-8 text: byte 0xe8 at position 27. Convert the file to UTF-8." in captured.err


@pytest.mark.parametrize("leave", ["\n", ""])
def test_a_person_sees_an_example_and_leaves_as_told(leave, runs, monkeypatch, capsys):
    assert talk(monkeypatch, runs / "sft", Terminal(f"What is it?\n{leave}")) == 0
    captured = capsys.readouterr()
    assert captured.out.count("thinking  ") == 1
    assert "(A)" in captured.err and "(D)" in captured.err and "the right answer is" in captured.err
    assert "not medical advice" in captured.err and "Ctrl-D" in captured.err


def test_a_model_of_plain_text_continues_what_is_written_and_says_so(runs, textbook, monkeypatch, capsys):
    assert talk(monkeypatch, runs / "textbook", piped("A patient has\n"), "--temperature", "0") == 0
    captured = capsys.readouterr()
    assert "trained on text alone" in captured.err and "osler sft" in captured.err
    assert captured.out == f"> A patient has\n{''.join(continued(textbook, 'A patient has', 6))}\n"


def test_ctrl_c_stops_one_answer_at_a_terminal_and_everything_in_a_pipe(runs, monkeypatch):
    out = ImpatientOutput("thinking  ")
    monkeypatch.setattr(sys, "stdout", out)
    assert talk(monkeypatch, runs / "sft", Terminal("What is it?\nWhy?\n\n")) == 0
    first, second = out.getvalue().split("thinking  ")[1:]
    assert first.startswith("\n") and len(second.splitlines()[0]) > 0
    monkeypatch.setattr(sys, "stdout", ImpatientOutput("thinking  "))
    assert talk(monkeypatch, runs / "sft", piped("What is it?\nWhy?\n")) == 130


def test_ctrl_c_at_the_prompt_and_bytes_that_are_not_utf8_do_not_leave(runs, monkeypatch, capsys):
    raised = [UnicodeDecodeError("utf-8", b"\xe8", 0, 1, ""), KeyboardInterrupt()]

    class Impatient(Terminal):
        def readline(self, size: int | None = -1, /) -> str:
            if raised:
                raise raised.pop()
            return super().readline(-1 if size is None else size)

    assert talk(monkeypatch, runs / "sft", Impatient("What is it?\n\n")) == 0
    out = capsys.readouterr().out
    assert "leaves" in out and out.count("thinking  ") == 1
    assert "(that line is not UTF-8 text: set the terminal to UTF-8)" in out


def test_sigterm_leaves_at_the_prompt(runs, monkeypatch, capsys):
    class Ended(Terminal):
        def readline(self, size: int | None = -1, /) -> str:
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("the signal was not heard")

    assert talk(monkeypatch, runs / "sft", Ended("")) == 130
    assert "osler: interrupted" in capsys.readouterr().err


def test_a_question_too_long_is_refused_and_the_next_answered_at_once_without_reasoning(runs, monkeypatch, capsys):
    assert talk(monkeypatch, runs / "sft", piped(f"{'fever ' * 400}\nWhy?\n"), "--no-reasoning", "--temperature", "0") == 0
    captured = capsys.readouterr()
    assert "max_seq_len" in captured.err
    assert captured.out.splitlines()[2].startswith("answer    ") and "thinking" not in captured.out


@pytest.mark.parametrize(
    ("option", "value"),
    [("--temperature", "-1"), ("--top-p", "0"), ("--min-p", "2"), ("--top-k", "0"),
     ("--repetition-penalty", "0"), ("--max-new-tokens", "0")],
)  # fmt: skip
def test_settings_without_meaning_are_refused_before_the_model_is_read(option, value, monkeypatch, capsys):
    assert talk(monkeypatch, Path("no/such/run"), piped("Why?\n"), option, value) == 2
    assert option[2:].replace("-", "_") in capsys.readouterr().err


def test_thinking_and_answer_have_a_line_each(capsys):
    reply = [("thinking", "Fever "), ("thinking", "and rash."), ("answer", "measles (B)")]
    show_answer(reply)
    assert capsys.readouterr().out == "thinking  Fever and rash.\nanswer    measles (B)\n"
    show_answer(reply[:2])
    assert capsys.readouterr().out == "thinking  Fever and rash.\n(no answer; --max-new-tokens N may leave room for one)\n"


def test_generate_prints_the_continuation(runs, textbook, capsys):
    arguments = ["generate", str(runs / "textbook"), "--max-new-tokens", "12", "--temperature", "0", "--prompt"]
    assert cli.main([*arguments, "A patient"]) == 0
    out = capsys.readouterr().out
    tokenizer = textbook.tokenizer
    sampling = SamplingParams(max_new_tokens=12, temperature=0, stop_ids=(tokenizer.eos_id,))
    rollout = InferenceEngine(textbook.model).generate([[tokenizer.eos_id, *tokenizer.encode("A patient")]], sampling)
    assert out == tokenizer.decode([token for token in rollout[0].ids if token != tokenizer.eos_id]) + "\n"
    assert cli.main([*arguments, ""]) == 0
    assert len(capsys.readouterr().out) > 1, "an empty prompt is the beginning of a text"


def biased(ready: LoadedModel, ids: list[int]) -> LoadedModel:
    """The same model, made to write ``ids`` one after the other: each token's embedding points at its successor's row."""
    model = ready.model
    with torch.no_grad():
        for block in model.layers:
            for weight in block.parameters():
                weight.zero_()
        model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        for place, (token, after) in enumerate(pairwise(ids)):
            model.embed_tokens.weight[token, place] = 1.0
            model.lm_head.weight[after, place] = 100.0
    return ready


def test_half_a_character_waits_for_its_other_half(textbook):
    ids = textbook.tokenizer.encode("è→x🩺")
    assert len(ids) == len(set(ids)) > 6, "the characters are several tokens each"
    ready = biased(textbook, [textbook.tokenizer.eos_id, *ids])
    assert continued(ready, "", len(ids)) == ["è", "→", "x", "🩺"]
    cut = continued(ready, "", len(ids) - 1)
    assert cut == ["è", "→", "x", "\N{REPLACEMENT CHARACTER}"], "what is never completed is shown at the end"


def test_a_prompt_that_fills_the_context_is_refused_and_a_text_that_does_is_told_to_be_cut(textbook, tmp_path, caplog, capsys):
    """A text that the model itself would never end."""
    head = textbook.model.lm_head.weight.detach().clone()
    head[textbook.tokenizer.eos_id] = 0.0
    weights = textbook.model.state_dict() | {"lm_head.weight": head}
    files = describing_files(textbook.model.config, textbook.tokenizer)
    run = store.save(tmp_path, 1, tensors={"model": weights}, state={"kind": "pretrain"}, files=files)
    textbook = open_model(run, device="cpu")
    with pytest.raises(UserError, match="max_seq_len"):
        continued(textbook, "fever " * 400, 5)
    text = "fever " * 20
    room = 256 - 1 - len(textbook.tokenizer.encode(text))
    assert room > 0
    whole = continued(textbook, text, room)
    assert "The text ends after" not in caplog.text
    assert continued(textbook, text, 10_000) == whole, "new tokens are cut to what is left"
    assert f"The text ends after {room} of the 10,000 new tokens asked for" in caplog.text
    asked = ["generate", str(run), "--prompt", text, "--temperature", "0", "--max-new-tokens"]
    for count, said in (("10000", f"(The text ends after {room} of the 10,000"), (str(room), "")):
        assert cli.main([*asked, count]) == 0
        captured = capsys.readouterr()
        assert captured.out == "".join(whole) + "\n" and ("The text ends" in captured.err) == bool(said) and said in captured.err


def test_a_model_is_asked_to_think_if_it_learned_to():
    for training, reasons in [
        ({}, True),
        ({"data": {"type": "clinic"}}, True),
        ({"data": {"type": "turns", "thinking_field": None}}, False),
        ({"data": {"type": "turns", "thinking_field": "why"}}, True),
        ({"tasks": [{"reasoning": False}]}, False),
    ]:
        assert LoadedModel(path=None, model=None, tokenizer=None, state={}, training=training).reasons is reasons


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["x🩺"], ["è", "→"]),
        (["→y", "🩺", "x"], ["è", "→"]),
        (["xyz"], ["è", "→", "x🩺"]),
        ("x🩺", ["è", "→"]),  # one text, which is no list of its characters
        ("🩺x", ["è", "→", "x", "🩺"]),
    ],
)
def test_text_ends_before_a_stop_string_that_is_several_tokens(textbook, stops, expected):
    ids = textbook.tokenizer.encode("è→x🩺")
    ready = biased(textbook, [textbook.tokenizer.eos_id, *ids])
    sampling = SamplingParams(max_new_tokens=len(ids), temperature=0)
    shown = list(continue_text(InferenceEngine(ready.model), ready.tokenizer, "", sampling, stops))
    assert shown == expected


def test_text_of_a_long_row_is_that_of_its_tokens_together(textbook):
    """Only the last tokens are decoded again, whatever bytes they are; a stop string waits across them."""
    tokenizer, rng = textbook.tokenizer, random.Random(0)
    whole = tokenizer.encode("A fever of 39 °C → 🩺🩺 sleeps well. ") * 20
    for ids in (whole, [rng.choice(whole) for _ in range(300)]):
        text = TextStream(tokenizer, {-1}, ["never"])
        said = [text.add(token) for token in [*ids, -1]]
        assert "".join(said) == tokenizer.decode(ids)
        assert text.shown == text.decoded == len(tokenizer.decode(ids))
    text = TextStream(tokenizer, {-1}, ["🩺 sl"])
    assert "".join(text.add(token) for token in whole) == "A fever of 39 °C → 🩺" and text.is_stopped


def test_characters_that_bytes_stand_in_for_come_whole():
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abefhikorstvw."]
    backend = Backend(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[], byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = Tokenizer(backend)
    for told in ("a fever 🩺😀 is o.k. → é", "体温三十九度，多喝水，" * 9, "🩺" * 30 + " rest " + "a🩺→é" * 20):
        text = TextStream(tokenizer, {-1})
        assert "".join(text.add(token) for token in [*tokenizer.encode(told), -1]) == told
    half = TextStream(tokenizer, {-1})
    assert "".join(half.add(token) for token in [*tokenizer.encode("🩺é")[:-1], -1]).startswith("🩺\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("reasoning", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_pieces_add_up_to_the_completion(runs, seed, reasoning):
    ready = open_model(runs / "sft", device="cpu")
    engine, tokenizer = InferenceEngine(ready.model), ready.tokenizer
    prompt = encode_prompt(tokenizer, "What is it?", reasoning=reasoning)
    sampling = SamplingParams(max_new_tokens=100, temperature=3, stop_ids=(tokenizer.eos_id,), seed=seed)
    ids = engine.generate([prompt], sampling)[0].ids
    pieces = list(stream_answer(engine, tokenizer, "What is it?", sampling, reasoning=reasoning))
    assert all(text for _, text in pieces)
    completion = parse_completion(tokenizer, ids, reasoning=reasoning)
    shown = {part: "".join(text for its, text in pieces if its == part) for part in ("thinking", "answer")}
    if completion.well_formed or not (reasoning or set(ids[:-1]) & tokenizer.special_ids):
        assert shown["thinking"].strip() == completion.thinking
        assert shown["answer"].strip() == (completion.answer or "")
    plain = [token for token in ids if token not in tokenizer.special_ids]
    # Random bytes make broken characters; whole ones must all arrive, in order.
    whole = [c for c in tokenizer.decode(plain) if c.isascii()]
    assert [c for _, text in pieces for c in text if c.isascii()] == whole


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(textbook: LoadedModel, tmp_path: Path) -> None:
    loaded = store.load(textbook.path)
    larger = Tokenizer.train([f"{a}{b}{c}" for a in "bcdfghjv" for b in "aeiouy" for c in "klmnprst"] * 2, vocab_size=600)
    assert larger.vocab_size > textbook.model.config.vocab_size
    files = {**loaded.files, TOKENIZER_FILE: larger.to_bytes()}
    saved = store.save(tmp_path, 1, tensors=loaded.tensors, state=loaded.state, files=files)
    with pytest.raises(UserError, match=rf"has {larger.vocab_size:,} tokens and its model only .*do not belong together"):
        open_model(saved, device="cpu")
