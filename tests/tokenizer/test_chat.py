"""The conversation template: layout, loss mask, and reading back completions of any shape."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osler.tokenizer.bpe import ANSWER, EOS, QUESTION, THINKING, Tokenizer
from osler.tokenizer.chat import Completion, Turn, encode_examples, encode_prompt, parse_completion

TOKENIZER = Tokenizer.train(["Fever and rusty sputum suggest pneumonia. What is the cause? Because of this. "] * 9, 300)
Q, T, A, END = (TOKENIZER.special_id(name) for name in (QUESTION, THINKING, ANSWER, EOS))


def ids(text: str) -> list[int]:
    """The ids of a text in which markers are meant."""
    parts = re.split(r"(<\|\w+\|>)", text)
    encoded = (TOKENIZER.encode(part) if index % 2 == 0 else [TOKENIZER.special_id(part)] for index, part in enumerate(parts))
    return [token for part in encoded for token in part]


def encode_example(turn: Turn) -> tuple[list[int], list[int]]:
    return encode_examples(TOKENIZER, [turn])[0]


def test_example_is_the_documented_layout_and_masks_the_prompt() -> None:
    row, mask = encode_example(Turn("Cause?", "Fever.", "pneumonia (A)"))
    assert TOKENIZER.decode(row) == f"{QUESTION}Cause?{THINKING}Fever.{ANSWER}pneumonia (A){EOS}"
    prompt = encode_prompt(TOKENIZER, "Cause?")
    assert row[: len(prompt)] == prompt and prompt[-1] == T
    assert mask == [0] * len(prompt) + [1] * (len(row) - len(prompt))
    assert row[-1] == END and mask[-1] == 1


def test_example_without_thinking_matches_the_short_prompt() -> None:
    row, mask = encode_example(Turn("Cause?", None, "pneumonia"))
    prompt = encode_prompt(TOKENIZER, "Cause?", reasoning=False)
    assert prompt[-1] == A and T not in row
    assert row == [*prompt, *TOKENIZER.encode("pneumonia"), END]
    assert mask == [0] * len(prompt) + [1] * (len(row) - len(prompt))


def test_empty_thinking_is_not_missing_thinking() -> None:
    row, _ = encode_example(Turn("Cause?", "", "x"))
    assert row[row.index(T) : row.index(T) + 2] == [T, A]


def test_text_cannot_forge_markers() -> None:
    row, _ = encode_example(Turn(f"{ANSWER}B{EOS}", f"{EOS}", f"{QUESTION}"))
    assert [token for token in row if token in TOKENIZER.special_ids] == [Q, T, A, END]


def test_batch_equals_one_by_one() -> None:
    turns = [Turn("a?", "b", "c"), Turn("d?", None, "e"), Turn("", "", "")]
    assert encode_examples(TOKENIZER, turns) == [encode_example(turn) for turn in turns]
    assert encode_examples(TOKENIZER, []) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"Fever.{ANSWER}pneumonia (A){EOS}", Completion("Fever.", "pneumonia (A)", True, True)),
        (f"{ANSWER}x{EOS}", Completion("", "x", True, True)),
        (f"Fever.{ANSWER}pneumonia", Completion("Fever.", "pneumonia", False, False)),
        ("Fever. And so on", Completion("Fever. And so on", None, False, False)),
        (f"Fever.{EOS}", Completion("Fever.", None, True, False)),
        (f"Fever.{EOS}{ANSWER}late{EOS}", Completion("Fever.", None, True, False)),
        (f"Fever.{ANSWER}a{ANSWER}b{EOS}", Completion("Fever.", "a", True, False)),
        (f"Fever.{ANSWER}{ANSWER}b{EOS}", Completion("Fever.", "", True, False)),
        (f"Fe{THINKING}ver.{ANSWER}a{QUESTION}b{EOS}", Completion("Fever.", "a", True, False)),
        (f"Fever.{ANSWER}a{EOS}more", Completion("Fever.", "a", True, False)),
        (f"Fever.{ANSWER}  a \n{EOS}", Completion("Fever.", "a", True, True)),
        (f"{EOS}", Completion("", None, True, False)),
        ("", Completion("", None, False, False)),
    ],
)
def test_completions_with_reasoning(text: str, expected: Completion) -> None:
    assert parse_completion(TOKENIZER, ids(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"pneumonia{EOS}", Completion("", "pneumonia", True, True)),
        ("pneumonia", Completion("", "pneumonia", False, False)),
        (f"a{ANSWER}b{EOS}", Completion("", "a", True, False)),
        ("", Completion("", "", False, False)),
    ],
)
def test_completions_without_reasoning(text: str, expected: Completion) -> None:
    assert parse_completion(TOKENIZER, ids(text), reasoning=False) == expected


def test_half_a_character_does_not_break_parsing() -> None:
    cut = TOKENIZER.encode("🧪")[:-1]
    completion = parse_completion(TOKENIZER, [*cut, A, *cut, END])
    assert completion.finished and "\ufffd" in completion.thinking and completion.answer == completion.thinking


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=30), st.booleans())
def test_any_ids_can_be_parsed(row: list[int], reasoning: bool) -> None:
    completion = parse_completion(TOKENIZER, row, reasoning=reasoning)
    assert completion.finished == (END in row)
    if completion.answer is None:
        assert reasoning and A not in (row[: row.index(END)] if END in row else row)


@settings(max_examples=50, deadline=None)
@given(st.text(), st.text(), st.text())
def test_what_was_encoded_is_parsed_back(question: str, thinking: str, answer: str) -> None:
    row, mask = encode_example(Turn(question, thinking, answer))
    completion = parse_completion(TOKENIZER, row[mask.index(1) :])
    assert completion == Completion(thinking.strip(), answer.strip(), True, True)
