"""Rewards: what earns, what does not, and that form never pays by itself."""

from pathlib import Path

import pytest

from osler.runtime.errors import UserError
from osler.tasks.item import ExamItem
from osler.tasks.rewards import MAX_THINKING_CHARS, REWARDS, OwnReward, check_reward, label_of, reward_of
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
    rewards = {name: reward(item, completion) for name, reward in REWARDS.items() if name != "random"}
    assert rewards == {"correct": correct, "format": form, "gated_format": correct * form, "brief_correct": correct}


def test_rewards_by_lot_are_even_and_the_same_again() -> None:
    lots = [REWARDS["random"](ITEM, written(thinking=f"It is {number}.")) for number in range(400)]
    assert set(lots) == {0.0, 1.0} and abs(sum(lots) - 200) < 40
    assert lots[7] == REWARDS["random"](ITEM, written(thinking="It is 7."))


def test_what_is_too_long_earns_less_at_once() -> None:
    thoughtful = written(thinking="x" * (MAX_THINKING_CHARS + 1))
    assert REWARDS["brief_correct"](ITEM, thoughtful) == 0 and REWARDS["correct"](ITEM, thoughtful) == 1
    assert all(reward(ITEM, written("(A) " * 200_000 + "(B)")) == 0 for name, reward in REWARDS.items() if name != "random")
    assert REWARDS["correct"](NUMBER, written("72 " * 200_000)) == 0


# -- a function of one's own ---------------------------------------------------------------------------------------------

OWN = """
import os, time
import numpy as np
print("a message is no answer")

def brief(item, completion):
    print(item.id)
    return np.float32(1 / (1 + len(completion.thinking)))

def known(item, completion): return item.options[item.answer_index] == "amoxicillin"
def raises(item, completion): raise ValueError("no such thing")
def hangs(item, completion):
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
def dies(item, completion): os._exit(3)
def nan(item, completion): return float("nan")
def text(item, completion): return "1"
def nothing(item, completion): pass
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_rewards.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return str(tmp_path / "own_rewards.py")


def test_a_function_of_ones_own_is_named_by_its_file_or_its_module(own: str) -> None:
    assert reward_of(f"{own}:brief", 60)(ITEM, written(thinking="x" * 9)) == pytest.approx(0.1)
    known = reward_of("own_rewards:known", 60)
    assert [known(ITEM, written()), known(ITEM, written("x"))] == [1, 1]
    assert reward_of("correct", 60) is REWARDS["correct"] and label_of(f"{own}:brief") == "brief"


@pytest.mark.parametrize(
    ("name", "seconds", "told"),
    [
        ("raises", 60, r"raised ValueError \(no such thing\)"),
        ("hangs", 0.2, "took more than 0.2 s"),
        ("dies", 60, "ended its process with exit code 3"),
        ("nan", 60, "returned nan, which is no finite number,"),
        ("text", 60, "returned '1', which is no finite number,"),
        ("nothing", 60, "returned None, which is no finite number,"),
    ],
)
def test_what_is_wrong_with_a_function_is_said_with_the_item(own: str, name: str, seconds: float, told: str) -> None:
    reward = reward_of(f"{own}:{name}", seconds)
    with pytest.raises(UserError, match=rf"own_rewards.py:{name} {told} for an answer to item r: 'amoxicillin \(B\)'"):
        reward(ITEM, written())


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no_such_module:reward", r"ModuleNotFoundError \(No module named 'no_such_module'\) when it was loaded"),
        ("own_rewards:absent", "has no attribute 'absent'"),
        ("nowhere/own.py:brief", "FileNotFoundError"),
    ],
)
def test_a_function_that_is_not_there_is_refused_at_the_start(own: str, name: str, told: str) -> None:
    for look in (check_reward, lambda name: reward_of(name, 60)):
        with pytest.raises(UserError, match=f"The reward {name} raised .*{told}"):
            look(name)


def test_the_process_of_a_function_ends_with_the_last_use_of_it(own: str) -> None:
    reward = OwnReward(f"{own}:brief", 60)
    process = reward.process
    assert process.poll() is None
    del reward
    assert process.returncode is not None
