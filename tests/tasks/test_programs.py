"""Programs that models write: how an answer becomes one, how it is judged, and what it cannot do by accident."""

from pathlib import Path

import pytest

from osler.tasks.answers import read_answer
from osler.tasks.item import ExamItem
from osler.tasks.programs import PASSED, TIMED_OUT, complete, run_tests
from osler.tasks.rewards import correct
from osler.tokenizer.chat import Completion

PROMPT = 'def total(xs):\n    """Add all."""'
TESTS = "def check(f):\n    assert f([1, 2]) == 3\n\ncheck(total)\n"
LOOP = "count = 0\n    for x in xs:\n        count += x\n    return count"
DEFINED = "def total(xs):\n    return sum(xs)"


@pytest.mark.parametrize(
    "answer",
    [
        "return sum(xs)",
        "    return sum(xs)\n",
        "def helper(ys):\n        return sum(ys)\n    return helper(xs)",
        LOOP,  # whose first line has lost its indentation
        LOOP.replace("\n    ", "\n"),  # and all lines
        f"{LOOP}\n\n\ndef other(:\n    what comes after the body",
        DEFINED,
        f"# All at once\nimport math\n\n{DEFINED}\n\nprint(total([]))",
        f"Here it is:\n```python\n{DEFINED}\n```\nIt is short. ```total([1])```",
        f"```\n{DEFINED}",  # cut
        "```py\n    return sum(xs)\n```",
        "import math\n    return int(math.fsum(xs))",
        "imported = xs\n    return sum(imported)",
    ],
)
def test_the_forms_of_a_right_answer(answer: str) -> None:
    assert run_tests(complete(PROMPT, answer), TESTS) == PASSED


@pytest.mark.parametrize(
    ("answer", "outcome", "readable"),
    [
        ("return 4", "AssertionError", True),
        ("I would add all of them.", "SyntaxError", False),
        ("", "AssertionError", False),
        ("return sum(ys)", "NameError", True),
        ("import sys\n    sys.exit(0)", "exit code 0", True),  # which is not to have passed
        ("import os\n    os._exit(0)", "exit code 0", True),
        ("return input()", "EOFError", True),
        ("return 'x' * (1 << 32)", "MemoryError", True),
        ("return total(xs)", "RecursionError", True),
        ("open('notes', 'w').write('x' * (1 << 22))", "OSError", True),
        ("open('../notes', 'w')", "PermissionError", True),
        ("import os\n    os.remove(__import__('sys').executable)", "PermissionError", True),
        ("import shutil\n    shutil.rmtree('/tmp/none')", "PermissionError", True),
        ("import socket\n    socket.create_connection(('127.0.0.1', 9))", "PermissionError", True),
        ("import subprocess\n    subprocess.run(['true'])", "PermissionError", True),
        ("import os\n    os.fork()", "PermissionError", True),
        ("import os\n    os.kill(os.getppid(), 9)", "PermissionError", True),
        ("import os\n    os.system('true')", "PermissionError", True),
    ],
)
def test_what_is_not_right_and_what_a_program_cannot_do(answer: str, outcome: str, readable: bool) -> None:
    item = ExamItem("p", PROMPT, (), -1, tests=TESTS)
    said = run_tests(complete(PROMPT, answer), TESTS)
    assert said == outcome
    completion = Completion(thinking="", answer=answer, finished=False, well_formed=False)
    reading = read_answer(item, completion)
    assert (reading.readable, reading.right, correct(item, completion)) == (readable, False, 0.0)


@pytest.mark.parametrize("answer", ["while True: pass", "import time\n    time.sleep(600)"])
def test_a_program_that_does_not_end_is_stopped(answer: str) -> None:
    assert run_tests(complete(PROMPT, answer), TESTS, 1, 2) == TIMED_OUT


def test_what_a_program_prints_and_leaves_in_its_folder_goes_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    program = "print('passed' * 100000)\nimport os\nos.mkdir('new')\nopen('a', 'w').write('x')\nos.rename('a', 'new/notes')\n"
    assert run_tests(program, "assert False") == "AssertionError"
    assert run_tests(program, "assert open('new/notes').read() == 'x'") == PASSED
    assert not list(tmp_path.iterdir())
