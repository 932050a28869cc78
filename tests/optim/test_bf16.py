"""Stochastic rounding is right on average, AdamW with it is torch's, and micro-batches are summed in fp32."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from osler.data.loader import Batch
from osler.model.transformer import SummedLoss, Transformer, nan_gradient_unless_finite
from osler.ops.sampling import mix
from osler.optim import bf16
from osler.optim.bf16 import Bf16AdamW, adamw_update, keep_in_bf16, random_bits, round_stochastic
from osler.optim.build import build_optimizer
from osler.optim.config import AdamWConfig
from osler.parallel.engine import ParallelEngine
from osler.runs.micro_batch import MicroBatchLimit
from osler.runs.process import Learner
from osler.train.trainer import TrainStep
from tests.models import tiny_model

pytestmark = pytest.mark.usefixtures("no_compiled_code")

def key(number: int) -> torch.Tensor:
    return torch.tensor(mix(number))


def test_over_all_bits_the_mean_is_exact_between_two_neighbours():
    bits = torch.arange(1 << 16)
    for value in torch.cat([torch.randn(50, generator=torch.Generator().manual_seed(0)), torch.tensor([1e-20, -2.5e30, 1e-39])]):
        rounded = round_stochastic(value.expand(1 << 16).contiguous(), bits)
        inner, outer = rounded[0], rounded[-1]
        assert rounded.double().mean() == value.double()
        assert rounded.unique().numel() == 2 and torch.nextafter(inner, inner.sign() * torch.inf) == outer


def test_what_bf16_can_hold_stays():
    words = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    words = words[~words.isnan()]
    for bits in (0, 1, 12345, (1 << 16) - 1):
        rounded = round_stochastic(words.float(), torch.full(words.shape, bits))
        assert torch.equal(rounded.view(torch.int16), words.view(torch.int16))


def test_bits_are_uniform_independent_and_a_function_of_key_and_position():
    count = 1 << 18
    drawn = torch.stack(random_bits(key(7), 0, count))
    assert drawn.min() >= 0 and drawn.max() < 1 << 16
    centred = drawn.double() / 2**16 - 0.5
    error = (1 / 12) ** 0.5 / count**0.5
    assert centred.mean(1).abs().max() < 5 * error
    others = torch.stack(random_bits(key(8), 0, count)).double() / 2**16 - 0.5
    together = torch.corrcoef(torch.cat([centred, others, centred.roll(1, 1)]))
    assert (together - torch.eye(9)).abs().max() < 5 / count**0.5
    later = torch.stack(random_bits(key(7), 1000, 50))
    assert torch.equal(later, drawn[:, 1000:1050])


def tiny(*, in_bf16: bool) -> Transformer:
    model = tiny_model(max_seq_len=32)
    if in_bf16:
        keep_in_bf16(model)
    return model


def set_gradients(model: nn.Module, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def everything(model, optimizer):
    return [*model.parameters(), *(value for entry in optimizer.state.values() for value in entry.values())]


def test_the_update_is_torchs():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1000, generator=generator)
    expected = nn.Parameter(weight.clone())
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    reference = torch.optim.AdamW([expected], **options)
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, 6):
        grad = torch.randn(1000, generator=generator)
        expected.grad = grad.clone()
        reference.step()
        weight, mean, square = adamw_update(weight, mean, square, grad, torch.tensor(float(step)), options)
        torch.testing.assert_close(weight, expected.detach(), rtol=1e-6, atol=1e-7)


def test_everything_that_is_kept_is_bf16_and_a_chunk_is_no_border(monkeypatch):
    results = []
    for chunk, seed in ((1 << 16, 0), (100, 0), (100, 1)):
        monkeypatch.setattr(bf16, "CPU_CHUNK", chunk)
        model = tiny(in_bf16=True)
        optimizer = build_optimizer(model, AdamWConfig(), seed=seed)
        assert isinstance(optimizer, Bf16AdamW) and model.rope_cos.dtype == torch.float32
        for number in range(2):
            set_gradients(model, number)
            optimizer.step()
        kept = everything(model, optimizer)
        assert {tensor.dtype for tensor in kept if tensor.dim()} == {torch.bfloat16}
        results.append([tensor.detach().clone() for tensor in kept])
    assert all(torch.equal(a, b) for a, b in zip(*results[:2], strict=True))
    assert not torch.equal(results[1][0], results[2][0]), "the seed counts"


def test_the_second_moment_does_not_stand_still():
    """With a beta of 0.999 a step changes it by less than bf16 can hold; on average it arrives all the same."""
    parameter = nn.Parameter(torch.zeros(20_000, dtype=torch.bfloat16))
    optimizer = Bf16AdamW([{"params": [parameter]}], betas=(0.9, 0.999), eps=1e-8)
    for grad in (2.0, *[1.0] * 50):
        parameter.grad = torch.full_like(parameter, grad)
        optimizer.step()
    expected = 0.004 * 0.999**50 + (1 - 0.999**50)
    assert float(optimizer.state[parameter]["exp_avg_sq"].double().mean()) == pytest.approx(expected, rel=1e-3)


def rows() -> torch.Tensor:
    return torch.randint(0, 64, (32, 17), generator=torch.Generator().manual_seed(1))


def row_gradients(number: int) -> dict[str, torch.Tensor]:
    model, ids = tiny(in_bf16=True), rows()[number : number + 1]
    SummedLoss(model)(ids[:, :-1], ids[:, 1:], None).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def step_gradients(micro_batch_tokens: int | None, *, compiled: bool = False) -> dict[str, torch.Tensor]:
    """The gradients that a step of 32 rows leaves to the optimizer."""
    model, ids = tiny(in_bf16=True), rows()
    loss = SummedLoss(model)
    options = {"fullgraph": True, "dynamic": False, "backend": "aot_eager_decomp_partition"}
    engine = ParallelEngine(torch.compile(loss, **options) if compiled else loss)
    found: dict[str, torch.Tensor] = {}

    @contextmanager
    def keep(rows):
        found.update((name, parameter.grad.clone()) for name, parameter in model.named_parameters())
        yield

    learner = Learner(model, build_optimizer(model, AdamWConfig()), engine, 1e9)
    step = TrainStep(learner, micro_batch_limit=MicroBatchLimit(learner, micro_batch_tokens), around_update=keep)
    step(Batch(ids[:, :-1], ids[:, 1:], torch.zeros_like(ids[:, 1:])))
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    return found


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    apart = sum(float((one[name].double() - other[name].double()).square().sum()) for name in other)
    return (apart / sum(float(value.double().square().sum()) for value in other.values())) ** 0.5


@pytest.mark.parametrize("compiled", [False, True])
def test_many_small_batches_give_the_gradient_of_a_large_one(one_thread, compiled):
    """But for one rounding: half a unit in the last place of bf16 is 2 ** -9."""
    alone = [row_gradients(number) for number in range(32)]
    exact = {name: sum(gradient[name].double() for gradient in alone) / (32 * 16) for name in alone[0]}
    summed = step_gradients(16, compiled=compiled)
    assert distance(summed, exact) < 2**-9
    assert distance(summed, step_gradients(None)) < 2**-8


def test_one_batch_is_left_to_autograd_bit_for_bit(one_thread):
    model, ids = tiny(in_bf16=True), rows()
    loss = SummedLoss(model)(ids[:, :-1], ids[:, 1:], None) / (32 * 16)
    nan_gradient_unless_finite(loss).backward()
    found = step_gradients(None)
    assert all(torch.equal(found[name], parameter.grad) for name, parameter in model.named_parameters())
