"""What every benchmark's JSON says of the machine it was measured on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

FILE = Path(__file__).parents[2] / "benchmarks" / "measuring.py"


def test_a_result_names_its_machine(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("measuring", FILE)
    measuring = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(measuring)
    measuring.publish({"benchmark": "x", "threads": 7}, tmp_path / "x.json")
    machine = json.loads((tmp_path / "x.json").read_text())["machine"]
    assert machine["processor"] and machine["threads"] == 7, "the threads are those of the processes that were measured"
    assert {"cores", "memory_bytes", "torch", "python", "system", "thread_variables"} <= machine.keys()
    assert json.loads(capsys.readouterr().out)["machine"] == machine
