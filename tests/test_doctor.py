"""The doctor tries everything, finds nothing missing fatal, and can be read by a program."""

from __future__ import annotations

import json

import pytest

from osler import doctor
from osler.doctor import Check
from osler.runtime import machine


def test_what_fails_is_missing_with_advice_and_no_error(monkeypatch, tmp_path):
    from osler.parallel import compile

    monkeypatch.setattr(compile, "compile_works", lambda device: (False, "no C++ compiler found\nand more"))
    monkeypatch.setattr(doctor, "CHECKS", {name: doctor.CHECKS[name] for name in ("compile", "disk")})
    compiler, disk = doctor.examine(tmp_path / "absent")
    assert compiler == ("compile", "missing", "no C++ compiler found", "Training works without it, more slowly")
    assert disk.status == "missing" and "--run DIR" in disk.advice
    assert "MiB/s" in doctor.find_disk(tmp_path)[0] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("quota", "usable"), [("max 100000", 6), ("200000 100000", 2), ("50000 100000", 1), ("", 6)])
def test_a_containers_quota_limits_the_cores(monkeypatch, tmp_path, quota, usable):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    monkeypatch.setattr(machine, "_cgroup", lambda name: quota)
    finding, advice = doctor.find_cores(tmp_path)
    assert finding.startswith(f"{usable} usable") and bool(advice) == (usable < 6)


def test_a_containers_limit_counts_as_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_cgroup", lambda name: str(2 * doctor.GIB))
    assert doctor.find_memory(tmp_path) == ("2.0 GiB", "Below 4 GiB only the smallest models fit")


def test_other_work_on_the_cpus_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_NEIGHBOUR_SECONDS", 0.01)
    for busy, said in ((1.04, "other processes keep 1.0 CPUs busy"), (0.1, "other processes keep 0.1 CPUs busy")):
        monkeypatch.setattr(doctor, "busy_elsewhere", lambda before, after: busy)  # noqa: B023
        finding, advice = doctor.find_other_work(tmp_path)
        assert finding == said and bool(advice) == (busy > 1)


def test_advice_stands_below_the_table():
    text = doctor.render([Check("bf16", "ok", "fast", ""), Check("compile", "missing", "no g++", "install g++")])
    assert text.splitlines()[-1] == "- compile: install g++" and "Advice" not in doctor.render([Check("bf16", "ok", "fast", "")])


@pytest.mark.parametrize("as_json", [False, True])
def test_run_prints_every_check_and_returns_zero(monkeypatch, capsys, tmp_path, as_json):
    from osler.parallel import compile

    # Compiling takes ten seconds or more and has its own tests in tests/parallel.
    monkeypatch.setattr(compile, "compile_works", lambda device: (True, ""))
    monkeypatch.setattr(doctor, "_MATMUL_TRIAL_SECONDS", 0.01)
    assert doctor.run(as_json=as_json, folder=tmp_path) == 0
    out = capsys.readouterr().out
    assert not as_json or {check["name"] for check in json.loads(out)["checks"]} == set(doctor.CHECKS)
    assert all(name in out for name in doctor.CHECKS) and "GFLOP/s" in out and "MiB/s" in out
