"""lm-evaluation-harness with our model as its LM, and `osler eval` with the harness's prompts: the same scores of every item."""

import importlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from osler.cli import main as cli
from osler.eval.likelihood import label_logprobs
from osler.runtime.errors import UserError

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -e '.[harness]'")
harness = importlib.import_module("osler.eval.harness")

ROWS = 6
LETTERS = "ABCD"


@pytest.fixture(scope="module")
def run(clinic_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(clinic_runs / "notes", tmp_path_factory.mktemp("harness") / "notes"))


@pytest.fixture(scope="module")
def lm(run: Path) -> object:
    return harness.OslerLM(run, device="cpu")


def asked(*arguments: object) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


def rows(kind: str) -> list[dict[str, object]]:
    made: list[dict[str, object]] = []
    for number in range(ROWS):
        texts = [f"drug {letter}{number}" + " mg" * (k == number % 4) for k, letter in enumerate(LETTERS)]
        question, right = f"Day {number}. The fever is high; what helps?", number % 4
        made.append({
            "medqa": {"question": question, "options": dict(zip(LETTERS, texts, strict=True)), "answer": texts[right],
                      "answer_idx": LETTERS[right]},
            "medmcqa": {"id": f"q{number}", "question": question, "cop": right, "exp": None,
                        **dict(zip(("opa", "opb", "opc", "opd"), texts, strict=True))},
            "pubmedqa": {"pubid": number, "question": question, "context": {"contexts": ["It is gone.", "Day 2 – well."]},
                         "long_answer": "Perhaps.", "final_decision": ("yes", "no", "maybe")[number % 3]},
            "hellaswag": {"activity_label": "Health", "ctx_a": f"[header] Day {number}. [title] The fever is high.",
                          "ctx_b": "the patient", "endings": [f"[step] sleeps – {text}." for text in texts], "label": str(right)},
            "gsm8k": {"question": question, "answer": f"It is <<1+{number}={number + 1}>>{number + 1}.\n#### {number + 1}"},
        }[kind])  # fmt: skip
    return made


@pytest.mark.parametrize(
    ("options", "told"),
    [("--tasks no-such-task", "no-such-task"), ("--tasks 'hella", "No closing quotation"), ("--limit 1", "No tasks specified")],
)
def test_what_the_harness_does_not_find_is_told_in_words(run, options, told, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [])
    assert cli.main(["eval", str(run), "device=cpu", "--harness", options]) == 2
    assert told in (said := capsys.readouterr().err) and "`lm_eval ls tasks` lists its tasks" in said


@pytest.mark.parametrize(("kind", "shots"), [("medqa", 1), ("medmcqa", 0), ("pubmedqa", 0), ("hellaswag", 0), ("gsm8k", 0)])
def test_every_item_has_the_score_of_the_harness(run, tmp_path, monkeypatch, kind, shots):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    parity = importlib.import_module("harness_parity")
    monkeypatch.setattr(parity, "NEW_TOKENS", 64)
    monkeypatch.setattr("osler.eval.harness.NEW_TOKENS", 64)
    given = rows(kind)
    found = parity.compare(run, kind, given[shots:], tmp_path, given[:shots])
    for part in [found] if kind != "gsm8k" else [found["strict-match"], found["flexible-extract"]]:
        assert {value for name, value in part.items() if name.startswith("items_") and "twice" not in name} == {ROWS - shots}
    if kind != "gsm8k":
        assert found["largest_difference_nats"] == 0 and found["items_that_print_an_option_twice"] == 0


def test_log_likelihoods_by_the_harnesss_rules(lm):
    """Spaces at the end of a context belong to the continuation, no context is end-of-text, and only the likeliest are greedy."""
    joint, moved, empty = lm.loglikelihood([asked("The fever", " is"), asked("The fever ", "is"), asked("", "The fever")], True)
    assert joint == pytest.approx(moved)

    def one_by_one(before: list[int], scored: list[int]) -> tuple[float, bool]:
        total, greedy = 0.0, True
        for number, token in enumerate(scored):
            logits = lm.model.logits(lm.model(torch.tensor([[*before, *scored[:number]]])))[0, -1].double()
            total, greedy = total + float(logits.log_softmax(-1)[token]), greedy and int(logits.argmax()) == token
        return total, greedy

    with torch.no_grad():
        assert empty[0] == pytest.approx(one_by_one([lm.eot_token_id], lm.tok_encode("The fever"))[0], abs=1e-4)
        [written] = lm.generate_until([asked("The fever", {"until": ["\n"], "max_gen_toks": 4, "do_sample": False})])
        [(total, greedy)] = lm.loglikelihood([asked("The fever", written)], True)
        before = lm.tok_encode("The fever")
        whole = lm.tok_encode(f"The fever{written}")
        assert whole[: len(before)] == before
        assert (total, greedy) == (pytest.approx(one_by_one(before, whole[len(before) :])[0], abs=1e-4), True)
    assert not lm.loglikelihood([asked("The fever", " zzzz")], True)[0][1]


def test_a_long_text_is_cut_into_windows_in_which_every_token_counts_once(lm):
    text = "Day 1. The fever is gone. " * 60
    ids = [lm.eot_token_id, *lm.tok_encode(text)]
    longest = lm.longest
    assert longest < len(ids) < 4 * longest
    expected = 0.0
    for first in range(0, len(ids) - 1, longest):  # each window begins with the token before it; the last reads a whole row
        last = min(first + longest, len(ids) - 1)
        start = max(last - longest, 0)
        labels = [-100] * (first - start) + ids[first + 1 : last + 1]
        with torch.no_grad():
            logp = label_logprobs(lm.model, torch.tensor([ids[start:last]]), torch.tensor([labels]))[1]
        expected += float(logp.double().sum())
    assert lm.loglikelihood_rolling([asked(text)], True) == [pytest.approx(expected, rel=1e-6)]


def test_what_does_not_fit_is_told(lm, capsys):
    [(total, _)] = lm.loglikelihood([asked("fever " * 600, " is")], True)
    assert total < 0 and "1 prompts are longer than the 256 tokens of the model" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"' fever.* has \d+ tokens after its context.*256"):
        lm.loglikelihood([asked("The", " fever" * 600)], True)
    for options, problem in (({"max_gen_toks": 256}, "no room"), ({"num_beams": 4}, "num_beams")):
        with pytest.raises(UserError, match=problem):
            lm.generate_until([asked("The", {"until": ["\n"], "do_sample": False, **options})])


@pytest.mark.slow
def test_the_harnesss_own_command_line_examines_a_checkpoint(run, tmp_path, capsys):
    data = tmp_path / "hellaswag.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows("hellaswag")))
    stock = Path(lm_eval.__file__).parent / "tasks" / "hellaswag" / "hellaswag.yaml"
    (tmp_path / "local").mkdir()
    local = {"include": str(stock), "task": "hellaswag_local", "dataset_path": "json", "dataset_name": None}
    files = {"training_split": None, "dataset_kwargs": {"data_files": {"validation": str(data)}}}
    (tmp_path / "local" / "hellaswag.yaml").write_text(json.dumps({**local, **files}))
    options = f"--tasks hellaswag_local --include_path '{tmp_path / 'local'}' --limit 4"
    assert cli.main(["eval", str(run), "device=cpu", "--harness", options]) == 0
    assert "hellaswag_local" in capsys.readouterr().out
    assert cli.main(["eval", str(run), "subset=3", "--harness", options]) == 2
