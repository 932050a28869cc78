"""Rewards: what earns, what does not, and that form never pays by itself."""

import pytest

from osler.tasks.item import ExamItem
from osler.tasks.rewards import MAX_THINKING_CHARS, REWARDS
from osler.tokenizer.chat import Completion

ITEM = ExamItem(id="r", question="?", options=("penicillin", "amoxicillin"), answer_index=1)
NUMBER = ExamItem(id="n", question="?", options=(), answer_index=-1, answer="72")
TEXT = ExamItem(id="t", question="?", options=(), answer_index=-1, answer="lobar pneumonia")


def written(
    answer: str | None = "amoxicillin (B)", thinking: str = "It is a pneumonia.", well_formed: bool = True
) -> Completion:
    return Completion(thinking=thinking, answer=answer, finished=True, well_formed=well_formed)


@pytest.mark.parametrize(
    ("item", "completion", "correct", "form"),
    [
        (ITEM, written(), 1, 1),
        (ITEM, written("penicillin (A)"), 0, 1),
        (ITEM, written("penicillin (B)"), 0, 0),
        (ITEM, written("B"), 1, 0),
        (ITEM, written("amoxicillin"), 1, 0),
        (ITEM, written(None, well_formed=False), 0, 0),
        (ITEM, written(""), 0, 0),
        (ITEM, written(thinking=" "), 1, 0),
        (ITEM, written(well_formed=False), 1, 0),
        (ITEM, written("(A) (B)"), 0, 0),
        (NUMBER, written("72"), 1, 1),
        (NUMBER, written("72.0 apples"), 1, 1),
        (NUMBER, written("#### 72"), 1, 1),
        (NUMBER, written("71"), 0, 1),
        (NUMBER, written("71 or 72"), 0, 0),
        (NUMBER, written(None), 0, 0),
        (TEXT, written("Lobar pneumonia"), 1, 1),
        (TEXT, written("asthma"), 0, 1),
        (TEXT, written(""), 0, 0),
    ],
)
def test_reward_table(item: ExamItem, completion: Completion, correct: float, form: float) -> None:
    rewards = {name: reward(item, completion) for name, reward in REWARDS.items()}
    assert rewards == {"correct": correct, "format": form, "gated_format": correct * form, "brief_correct": correct}


def test_what_is_too_long_earns_less_at_once() -> None:
    thoughtful = written(thinking="x" * (MAX_THINKING_CHARS + 1))
    assert REWARDS["brief_correct"](ITEM, thoughtful) == 0 and REWARDS["correct"](ITEM, thoughtful) == 1
    assert all(reward(ITEM, written("(A) " * 200_000 + "(B)")) == 0 for reward in REWARDS.values())
    assert REWARDS["correct"](NUMBER, written("72 " * 200_000)) == 0
