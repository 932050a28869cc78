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


@pytest.mark.parametrize(
    ("turn", "prompt", "target"),
    [
        (Turn("Cause?", "Fever.", "pneumonia (A)"), f"{QUESTION}Cause?{THINKING}", f"Fever.{ANSWER}pneumonia (A){EOS}"),
        (Turn("Cause?", None, "pneumonia"), f"{QUESTION}Cause?{ANSWER}", f"pneumonia{EOS}"),
        (Turn("Cause?", "", "x"), f"{QUESTION}Cause?{THINKING}", f"{ANSWER}x{EOS}"),  # empty thinking is not missing thinking
        (Turn("", "", ""), f"{QUESTION}{THINKING}", f"{ANSWER}{EOS}"),
    ],
)
def test_an_example_is_the_documented_layout_and_masks_the_prompt(turn: Turn, prompt: str, target: str) -> None:
    [(row, mask)] = encode_examples(TOKENIZER, [turn])
    assert encode_prompt(TOKENIZER, turn.question, reasoning=turn.thinking is not None) == ids(prompt)
    assert row == ids(prompt) + ids(target)
    assert mask == [0] * len(ids(prompt)) + [1] * len(ids(target))


def test_text_cannot_forge_markers_and_a_batch_equals_one_by_one() -> None:
    turns = [Turn(f"{ANSWER}B{EOS}", f"{EOS}", f"{QUESTION}"), Turn("d?", None, "e"), Turn("", "", "")]
    batch = encode_examples(TOKENIZER, turns)
    assert [token for token in batch[0][0] if token in TOKENIZER.special_ids] == [Q, T, A, END]
    assert batch == [encode_examples(TOKENIZER, [turn])[0] for turn in turns] and encode_examples(TOKENIZER, []) == []


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


def test_completions_without_reasoning() -> None:
    for text, answer, finished, well_formed in [
        (f"pneumonia{EOS}", "pneumonia", True, True),
        ("pneumonia", "pneumonia", False, False),
        (f"a{ANSWER}b{EOS}", "a", True, False),
        ("", "", False, False),
    ]:
        assert parse_completion(TOKENIZER, ids(text), reasoning=False) == Completion("", answer, finished, well_formed)


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
    [(row, mask)] = encode_examples(TOKENIZER, [Turn(question, thinking, answer)])
    completion = parse_completion(TOKENIZER, row[mask.index(1) :])
    assert completion == Completion(thinking.strip(), answer.strip(), True, True)
