"""Rewards: what earns, what does not, and that form never pays by itself."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from osler.tasks.item import ExamItem
from osler.tasks.rewards import MAX_THINKING_CHARS, REWARDS

ITEM = ExamItem(id="r", question="?", options=("penicillin", "amoxicillin"), answer_index=1)
NUMBER = ExamItem(id="n", question="?", options=(), answer_index=-1, answer="72")
TEXT = ExamItem(id="t", question="?", options=(), answer_index=-1, answer="lobar pneumonia")


@dataclass(frozen=True)
class Written:
    thinking: str = "It is a pneumonia."
    answer: str | None = "amoxicillin (B)"
    finished: bool = True
    well_formed: bool = True


@pytest.mark.parametrize(
    ("item", "written", "correct", "form"),
    [
        (ITEM, Written(), 1, 1),
        (ITEM, Written(answer="penicillin (A)"), 0, 1),
        (ITEM, Written(answer="penicillin (B)"), 0, 0),
        (ITEM, Written(answer="B"), 1, 0),
        (ITEM, Written(answer="amoxicillin"), 1, 0),
        (ITEM, Written(answer=None, well_formed=False), 0, 0),
        (ITEM, Written(answer=""), 0, 0),
        (ITEM, Written(thinking=" "), 1, 0),
        (ITEM, Written(well_formed=False), 1, 0),
        (ITEM, Written(answer="(A) (B)"), 0, 0),
        (NUMBER, Written(answer="72"), 1, 1),
        (NUMBER, Written(answer="72.0 apples"), 1, 1),
        (NUMBER, Written(answer="#### 72"), 1, 1),
        (NUMBER, Written(answer="71"), 0, 1),
        (NUMBER, Written(answer="71 or 72"), 0, 0),
        (NUMBER, Written(answer=None), 0, 0),
        (TEXT, Written(answer="Lobar pneumonia"), 1, 1),
        (TEXT, Written(answer="asthma"), 0, 1),
        (TEXT, Written(answer=""), 0, 0),
    ],
)
def test_reward_table(item: ExamItem, written: Written, correct: float, form: float) -> None:
    rewards = {name: reward(item, written) for name, reward in REWARDS.items()}
    assert rewards == {"correct": correct, "format": form, "gated_format": correct * form, "brief_correct": correct}


def test_long_thinking_loses_the_brief_reward_only() -> None:
    written = Written(thinking="x" * (MAX_THINKING_CHARS + 1))
    assert REWARDS["brief_correct"](ITEM, written) == 0 and REWARDS["correct"](ITEM, written) == 1


def test_an_endless_answer_is_wrong_and_quick() -> None:
    endless = Written(answer="(A) " * 200_000 + "(B)")
    assert all(reward(ITEM, endless) == 0 for reward in REWARDS.values())
    assert REWARDS["correct"](NUMBER, Written(answer="72 " * 200_000)) == 0
