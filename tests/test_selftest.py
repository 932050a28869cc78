"""`osler test` finds an installation right that is, and names the part that is not."""

from __future__ import annotations

import pytest
import torch

from osler import selftest
from osler.cli.main import main
from osler.runtime import faults

CPU = torch.device("cpu")


@pytest.mark.parametrize("title", [title for title in selftest.PARTS if title != "training, checkpoint and resume"])
def test_every_part_is_right_here(title):
    assert selftest.carry_out(title, selftest.PARTS[title], CPU).problem == ""


def test_a_gradient_that_is_wrong_ends_with_2_and_with_what_to_do(monkeypatch, capsys):
    monkeypatch.setenv(faults.VARIABLE, "train-loss:nan:1-")
    faults.visits.clear()
    title = "training, checkpoint and resume"
    monkeypatch.setattr(selftest, "PARTS", {"loss head": selftest.check_loss, title: selftest.check_training})
    assert main(["test"]) == 2
    out = capsys.readouterr().out
    assert "ok     loss head" in out and f"wrong  {title}" in out and "The gradient was not finite" in out
    assert f"{title}: Osler does not compute right here. Install the versions of constraints.txt" in out


@pytest.mark.parametrize("found", [[1.0, 2.0003], [1.0, float("nan")]])
def test_a_difference_that_is_no_rounding_is_told(found):
    with pytest.raises(selftest.Wrong, match=r"logits are off by (1\.5e-04|nan) of the largest, where 1e-04 is rounding"):
        selftest.compare("logits", torch.tensor(found), torch.tensor([1.0, 2.0]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error(capsys):
    assert main(["test", "--gpu"]) == 2
    assert "This torch sees no GPU: `osler doctor` says why." in capsys.readouterr().err


def test_a_run_is_resumed_to_the_bit():
    assert selftest.carry_out("training", selftest.check_training, CPU).problem == ""
