"""The doctor tries everything, finds nothing missing fatal, and can be read by a program."""

from __future__ import annotations

import json

import pytest
import torch

from osler import doctor
from osler.doctor import Check

CPU = torch.device("cpu")


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    check = doctor.check_disk(tmp_path / "absent")
    assert check.status == "missing" and check.advice
    assert "MiB/s" in doctor.check_disk(tmp_path).finding and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("quota", "usable"), [("max 100000", 6), ("200000 100000", 2), ("50000 100000", 1), ("", 6)])
def test_a_containers_quota_limits_the_cores(monkeypatch, quota, usable):
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    monkeypatch.setattr(doctor, "_cgroup", lambda name: quota)
    assert doctor.check_cores().finding.startswith(f"{usable} usable")


def test_a_containers_limit_counts_as_memory(monkeypatch):
    monkeypatch.setattr(doctor, "_cgroup", lambda name: str(2 * doctor.GIB))
    assert doctor.check_memory()[1:3] == ("slow", "2.0 GiB")


def test_other_work_on_the_cpus_is_told(monkeypatch):
    monkeypatch.setattr(doctor, "_NEIGHBOUR_SECONDS", 0.01)
    monkeypatch.setattr(doctor, "busy_elsewhere", lambda before, after: 1.04)
    check = doctor.check_neighbours()
    assert check.status == "slow" and check.finding == "other processes keep 1.0 CPUs busy" and check.advice
    monkeypatch.setattr(doctor, "busy_elsewhere", lambda before, after: 0.1)
    assert doctor.check_neighbours().status == "ok"


def test_compile_failure_is_advice_not_an_error(monkeypatch):
    from osler.parallel import compile

    monkeypatch.setattr(compile, "compile_works", lambda device: (False, "no C++ compiler found"))
    check = doctor.check_compile(CPU)
    assert (check.status, check.finding) == ("missing", "no C++ compiler found") and check.advice


def test_advice_stands_below_the_table():
    text = doctor.render([Check("bf16", "ok", "fast"), Check("compile", "missing", "no g++", "install g++")])
    assert text.splitlines()[-1] == "- compile: install g++" and "Advice" not in doctor.render([Check("bf16", "ok", "fast")])


@pytest.mark.parametrize("as_json", [False, True])
def test_run_prints_every_check_and_returns_zero(monkeypatch, capsys, tmp_path, as_json):
    from osler.parallel import compile

    # Compiling takes ten seconds or more and has its own tests in tests/parallel.
    monkeypatch.setattr(compile, "compile_works", lambda device: (True, ""))
    monkeypatch.setattr(doctor, "_MATMUL_TRIAL_SECONDS", 0.01)
    assert doctor.run(as_json=as_json, folder=tmp_path) == 0
    out = capsys.readouterr().out
    wanted = {"python", "cores", "memory", "disk", "torch", "device", "bf16", "attention", "compile"}
    names = [check["name"] for check in json.loads(out)["checks"]] if as_json else out.split()
    assert wanted <= set(names) and "GFLOP/s" in out and "MiB/s" in out
