"""An optimizer taken to disk and back makes the very steps it would have made."""

from __future__ import annotations

import json

import pytest
import torch

from osler.checkpoint.optimizer_state import flatten_optimizer, restore_optimizer
from osler.checkpoint.store import load, save
from osler.runtime.errors import UserError


def build(**options) -> tuple[torch.nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    decayed = [p for p in model.parameters() if p.dim() == 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1, "name": "decayed"}, {"params": plain, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), **options)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) ** 2 + x.sum()).mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "resumed_options"),
    [
        ({}, {}),
        ({"fused": True}, {"fused": True}),
        ({"foreach": True}, {"foreach": False}),
        ({"amsgrad": True}, {"amsgrad": True}),
    ],
)
def test_five_more_steps_are_equal_to_the_last_bit(tmp_path, options, resumed_options):
    model, optimizer = build(**options)
    train(model, optimizer, 0, 5)
    tensors, state = flatten_optimizer(optimizer, model.named_parameters())
    path = save(tmp_path, 5, tensors={"model": model.state_dict(), "optimizer": tensors}, state={"optimizer": state})
    train(model, optimizer, 5, 10)

    resumed, resumed_optimizer = build(**resumed_options)
    loaded = load(path)
    resumed.load_state_dict(loaded.tensors["model"])
    untouched = {name: tensor.clone() for name, tensor in loaded.tensors["optimizer"].items()}
    restore_optimizer(resumed_optimizer, resumed.named_parameters(), loaded.tensors["optimizer"], loaded.state["optimizer"])
    train(resumed, resumed_optimizer, 5, 10)

    expected, expected_state = flatten_optimizer(optimizer, model.named_parameters())
    actual, actual_state = flatten_optimizer(resumed_optimizer, resumed.named_parameters())
    assert expected_state == actual_state
    pairs = [(resumed.state_dict(), model.state_dict()), (actual, expected), (loaded.tensors["optimizer"], untouched)]
    for found, wanted in pairs:
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], value) for name, value in wanted.items())


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
    model, optimizer = build()
    train(model, optimizer, 0, 1)
    tensors, state = flatten_optimizer(optimizer, model.named_parameters())
    before = len(optimizer.state)

    renamed = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    with pytest.raises(UserError, match=r"not those of this one: they differ in 0\.bias, 0\.weight"):
        restore_optimizer(optimizer, renamed, tensors, state)
    assert len(optimizer.state) == before
