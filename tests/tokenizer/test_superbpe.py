"""SuperBPE: the superwords of a toy corpus, what is refused, exact round trips, an ordinary file, time in proportion."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as Backend

from osler.config.schema import decode
from osler.runtime.errors import UserError
from osler.tokenizer import superbpe
from osler.tokenizer.bpe import ANSWER, SPECIALS, Tokenizer
from osler.tokenizer.config import LARGEST_TRANSITION, SuperBPEConfig

WORDS = ["fever", "cough", "lung", "heart", "liver", "brain", "blood", "bone"]
PHRASES = [f"{one} by the way {other} as well as {third}" for one in WORDS for other in WORDS for third in WORDS[:4]]
MIXED = [*PHRASES, *["Dose: 38.5 mg.\n\nOption (A) or (B):  it's é日本語🧪\tnot two"] * 9]


def learn(texts: Sequence[str], superwords: int) -> tuple[Tokenizer, list[str]]:
    """Let BPE learn all that there is to learn of a short text; return the tokenizer with the superwords learned after that."""
    size = Tokenizer.train(texts, 10_000).vocab_size
    tokenizer = superbpe.train(texts, size + superwords, size)
    return tokenizer, [tokenizer.decode([token_id]) for token_id in range(size, tokenizer.vocab_size)]


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([token_id]) for token_id in tokenizer.encode(text)]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return superbpe.train(MIXED, 360, 330)


def test_words_that_stand_together_become_one_token() -> None:
    tokenizer, superwords = learn(PHRASES, 4)
    assert superwords == [" as well", " the way", " by the way", " as well as"]
    assert pieces(tokenizer, "bone by the way liver as well as lung") == ["bone", " by the way", " liver", " as well as", " lung"]
    assert pieces(tokenizer, "liver by the way, as well") == ["liver", " by the way", ",", " as well"]


def test_the_first_tokens_are_those_of_bpe(trained: Tokenizer) -> None:
    model, plain = (json.loads(t.to_bytes())["model"] for t in (trained, Tokenizer.train(MIXED, 330)))
    assert len(model["vocab"]) == 360 and plain["vocab"].items() <= model["vocab"].items()
    assert model["merges"][: len(plain["merges"])] == plain["merges"]
    assert superbpe.train(MIXED, 330, 330).encode(PHRASES[0]) == Tokenizer.train(MIXED, 330).encode(PHRASES[0])


def test_no_superword_has_five_words_or_a_space_behind_a_colon_or_at_its_end() -> None:
    _, superwords = learn([f"{one} zinc iron gold lead tin {other}" for one in WORDS for other in WORDS], 12)
    assert superwords == [" lead tin", " gold lead tin", " iron gold lead tin"]
    _, superwords = learn([f"{one}  {other}: {one}  {other}:{third}" for one in WORDS for other in WORDS for third in "xyz"], 500)
    assert {":x", "  fever", "  fever:x"} <= set(superwords)
    assert not [word for word in superwords if ": " in word or word.endswith(" ")]


REFUSED = ["ĠaĠbĠcĠdĠe", "aĠbĠcĠdĠe", "aĠĠbĠcĠdĠe", ":Ġa", "a:Ġ", "Ġ:ĠĠ", "aĠ", "ĠaĠĠ", ANSWER]
ALLOWED = ["ĠaĠbĠcĠd", "aĠbĠĠcĠd", "Ġ", "ĠĠĠ", ":", "Ġ:", "a:b", ".ĠThe", f"Ġ{ANSWER}"]


@pytest.mark.parametrize("token", REFUSED + ALLOWED)
def test_refused(token: str) -> None:
    assert superbpe._is_refused(token) == (token in REFUSED)


def test_what_is_built_on_a_refused_token_goes_with_it_and_what_comes_twice_counts_once() -> None:
    tokens = ["a", "b", "Ġ", "ab", "Ġa", "bĠa"]
    a, b, space, ab, _, b_space_a = (chr(0x10000 + token_id) for token_id in range(6))
    learned = [
        (a, space),  # aĠ: refused
        (a + space, a),  # its child, which as a text would be allowed
        (b, ab),  # bab
        (a, b),  # ab, as BPE knows it: its rank stays
        (b + ab, b_space_a),  # babbĠa
        (a, b_space_a),  # abĠa
        (ab, _),  # abĠa once more: another merge, no other token
        (ab, ab),  # one too many
    ]
    vocab, merges = superbpe._with_superwords(tokens, [["a", "b"], ["Ġ", "a"], ["b", "Ġa"]], learned, 9)
    assert list(vocab) == [*tokens, "bab", "babbĠa", "abĠa"] and list(vocab.values()) == list(range(9))
    assert merges == [("a", "b"), ("Ġ", "a"), ("b", "Ġa"), ("b", "ab"), ("bab", "bĠa"), ("a", "bĠa")]


def test_refused_tokens_leave_their_place_to_others() -> None:
    """The 64 pairs that are most frequent here have a space behind a colon."""
    colons = [f"{one}: {other}" for one in WORDS for other in WORDS] * 40
    assert learn([*colons, *PHRASES], 4)[1] == learn(PHRASES, 4)[1]


def test_text_never_becomes_a_special_token() -> None:
    tokenizer, superwords = learn([ANSWER, f"{ANSWER} (A)"] * 50, 50)
    assert superwords == ["<|answer"]
    for text in (ANSWER, f"x{ANSWER}{ANSWER} (A)"):
        ids = tokenizer.encode(text)
        assert tokenizer.special_ids.isdisjoint(ids) and tokenizer.decode(ids) == text


@settings(max_examples=150, deadline=None)
@given(st.text() | st.lists(st.sampled_from([*PHRASES[:3], *SPECIALS, *"a 1\n\t<|>'(A):", "\u0301", " (B)"])).map("".join))
def test_any_text_round_trips(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text and trained.special_ids.isdisjoint(ids)


def test_digits_options_and_lines_stand_alone(trained: Tokenizer) -> None:
    cut = pre_tokenizers.Split(Regex(superbpe.PIECES), behavior="isolated").pre_tokenize_str
    text = "He is 38.5 kg, H2O. \n \nIs it (A), x(B) (C) or ( D)?"
    assert [piece for piece, _ in cut(text)] == [
        "He is", " 3", "8", ".", "5", " kg, H", "2", "O. ", "\n", " ", "\n", "Is it", " (A)", ", x", "(B)", " (C)", " or ( D)?",
    ]  # fmt: skip
    assert max(len(piece) for piece, _ in cut("word " * 999 + "é" * 9999 + " " * 9999)) <= 64 * 17
    assert trained.encode("38 (A)\n\n")[-1] == trained.encode("\n\n")[0]


def test_training_is_deterministic_and_ends_where_nothing_is_left_to_learn(trained: Tokenizer) -> None:
    assert superbpe.train(iter(MIXED), 360, 330).to_bytes() == trained.to_bytes()
    assert superbpe.train(["once upon a time"], 2000, 300).vocab_size < 300
    assert superbpe.train([""], 2000, 300).vocab_size == 260
    with pytest.raises(UserError, match="vocab_size=100 is too small"):
        superbpe.train(MIXED, 300, 100)


def test_the_file_loads_in_other_libraries_unchanged(trained: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_bytes(trained.to_bytes())
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in MIXED[-1], *PHRASES[:3], "\n 1 (A)":
        ids = trained.encode(text)
        assert backend.encode(text).ids == ids == fast(text)["input_ids"]
        assert backend.decode(ids) == text == fast.decode(ids)


def test_a_transition_leaves_room_for_bytes_and_superwords() -> None:
    assert SuperBPEConfig(vocab_size=8192).bpe_size == 4096
    assert SuperBPEConfig(vocab_size=400).bpe_size == 300
    assert SuperBPEConfig(vocab_size=400, transition=400).bpe_size == 400
    assert SuperBPEConfig(vocab_size=3_000_000).bpe_size == LARGEST_TRANSITION
    assert SuperBPEConfig(path="tokenizer.json", transition=80_000).vocab_size == 2048  # which the file decides
    with pytest.raises(UserError, match="transition 401 is larger than vocab_size 400"):
        decode(SuperBPEConfig, {"vocab_size": 400, "transition": 401})
    with pytest.raises(UserError, match="transition: must be"):
        decode(SuperBPEConfig, {"vocab_size": 400, "transition": 299})


def test_the_published_vocabulary_is_read_as_it_is_meant(shared_data: Callable[[str], Path]) -> None:
    tokenizer = Tokenizer.load(shared_data("tokenizers/superbpe-t80k"))
    found = pieces(tokenizer, "She was able to go by the way of the lung")
    assert found == ["She", " was able to", " go", " by the way", " of the", " lung"]
