"""What is kept of an optimizer; that it makes the very steps it would have made is in tests/optim/test_optim.py."""

from __future__ import annotations

import json

import pytest
import torch

from osler.checkpoint.optimizer_state import flatten_optimizer, restore_optimizer
from osler.runtime.errors import UserError


def test_state_keeps_its_own_dtype_and_settings_are_those_of_the_optimizer_that_takes_it():
    weight = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=0.5, momentum=0.9)
    momentum = torch.full((3, 2), 1 / 3)
    optimizer.state[weight] = {"momentum": momentum, "steps": 7, "nothing": None}
    tensors, state = flatten_optimizer(optimizer, {"w": weight})
    fresh = torch.optim.SGD([weight], lr=0.1)
    restore_optimizer(fresh, {"w": weight}, tensors, json.loads(json.dumps(state)))
    entry = fresh.state[weight]
    assert entry["momentum"].dtype == torch.float32 and torch.equal(entry["momentum"], momentum)
    assert (entry["steps"], entry["nothing"], fresh.param_groups[0]["lr"]) == (7, None, 0.1)


def test_another_model_is_refused_and_the_optimizer_left_as_it_was():
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    tensors, state = flatten_optimizer(optimizer, model.named_parameters())
    renamed = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    with pytest.raises(UserError, match=r"not those of this one: they differ in bias, model\.bias, model\.weight"):
        restore_optimizer(optimizer, renamed, tensors, state)
    assert len(optimizer.state) == 2
