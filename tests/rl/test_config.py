"""GRPO's configuration: it decodes, it round-trips, it refuses what has no meaning, and it never loads torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from osler.config.schema import decode, encode
from osler.rl.config import AlgorithmConfig, GrpoConfig


def test_defaults_round_trip():
    config = decode(GrpoConfig, {"init_from": "runs/sft"})
    assert decode(GrpoConfig, encode(config)) == config
    assert config.algorithm == AlgorithmConfig()


def test_parts_are_changed_one_field_at_a_time():
    config = decode(GrpoConfig, {"init_from": "x", "algorithm": {"clip": {"high": 0.28}, "opsm_delta": 0.2}})
    assert (config.algorithm.clip.low, config.algorithm.clip.high, config.algorithm.opsm_delta) == (0.2, 0.28, 0.2)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({}, "init_from"),
        ({"init_from": "x", "algorithm": {"kll": "k3"}}, "did you mean `algorithm.kl`"),
        ({"init_from": "x", "algorithm": {"kl": "k4"}}, "algorithm.kl"),
        ({"init_from": "x", "algorithm": {"samples_per_prompt": 1}}, "samples_per_prompt: must be at least 2"),
        ({"init_from": "x", "algorithm": {"temperature": 0.0}}, "temperature"),
        ({"init_from": "x", "algorithm": {"temperature": 1e-30}}, "temperature: must be at least 0.01"),
        ({"init_from": "x", "algorithm": {"top_k": 1}}, "top_k: must be at least 2"),
        ({"init_from": "x", "algorithm": {"top_p": 1e-6}}, "top_p: must be at least 0.1"),
        ({"init_from": "x", "steps": 0}, "^the configuration: 1 error\n  steps"),
        ({"init_from": "x", "algorithm": {"top_k": 0}}, "top_k"),
        ({"init_from": "x", "algorithm": {"clip": {"low": 0.0}}}, "clip.low"),
        ({"init_from": "x", "tasks": []}, "tasks need at least one"),
        ({"init_from": "x", "tasks": [{}, {}]}, "its own name"),
        ({"init_from": "x", "tasks": [{"rewards": {"corect": 1.0}}]}, "corect"),
    ],
)
def test_mistakes_are_refused_by_name(mapping, message):
    with pytest.raises(match=message):
        decode(GrpoConfig, mapping)


def test_configuration_does_not_load_torch():
    program = "import osler.rl.config, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
