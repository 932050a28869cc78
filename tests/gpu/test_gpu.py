"""On a CUDA device: the same model and loss as on the CPU, and a training step without waiting for the device."""

import pytest
import torch

from osler.data.loader import Batch
from osler.model.config import ModelConfig
from osler.model.transformer import SummedLoss, Transformer
from osler.optim.build import build_optimizer
from osler.optim.config import AdamWConfig, MuonConfig
from osler.parallel.config import NoParallelConfig
from osler.parallel.parallelize import parallelize
from osler.runs.micro_batch import MicroBatchLimit
from osler.runs.process import Learner
from osler.runtime.world import World
from osler.train.trainer import TrainStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_loss_and_gradients_equal_the_cpu() -> None:
    model = Transformer(ModelConfig(head_init="normal", residual_init="scaled"))
    model.init_weights(0)
    ids = torch.randint(0, 2048, (4, 65), generator=torch.Generator().manual_seed(0))
    on_cpu = SummedLoss(model)(ids[:, :-1], ids[:, 1:], None)
    on_cpu.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model.cuda()
    on_gpu = SummedLoss(model)(ids[:, :-1].cuda(), ids[:, 1:].cuda(), None)
    on_gpu.backward()
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-4, atol=1e-2)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.cpu(), expected[name], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("recompute", ["off", "selective", "full"])
@pytest.mark.parametrize(
    ("precision", "optim"),
    [("bf16", AdamWConfig()), ("bf16", MuonConfig()), ("pure-bf16", AdamWConfig()), ("fp8", AdamWConfig())],
    ids=["bf16", "bf16-muon", "pure-bf16", "fp8"],
)
def test_a_compiled_step_makes_no_host_synchronisation(precision: str, optim: AdamWConfig | MuonConfig, recompute: str) -> None:
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with FP8")

    model = Transformer(ModelConfig(), compute_dtype=torch.bfloat16).cuda()
    model.init_weights(0)
    world, passes = World(device="cuda"), [4 * 64]
    engine = parallelize(
        model, NoParallelConfig(), world, precision=precision, pass_tokens=passes, recompute=recompute, compile=True
    )
    learner = Learner(model, build_optimizer(model, optim), engine, 1.0)
    step = TrainStep(learner, micro_batch_limit=MicroBatchLimit(learner, 4 * 64))
    ids = torch.randint(0, 2048, (8, 65))
    inputs, labels = (part.contiguous().pin_memory() for part in (ids[:, :-1], ids[:, 1:]))
    batch = Batch(inputs, labels, torch.zeros(8, 64, dtype=torch.int64))
    step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [step(batch) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(results[-1].loss)


def test_muon_steps_as_on_the_cpu_and_skips_without_a_trace() -> None:
    ends = {}
    for device in ("cpu", "cuda"):
        model = Transformer(ModelConfig(norm_weight=True))
        model.init_weights(0)
        optimizer = build_optimizer(model.to(device), MuonConfig())
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
                if step == 1:
                    parameter.grad.view(-1)[0] = float("nan")
            optimizer.found_inf = torch.tensor(float(step == 1), device=device)  # type: ignore[attr-defined]
            optimizer.step()
        ends[device] = [parameter.detach().cpu() for parameter in model.parameters()]
    for on_gpu, on_cpu in zip(ends["cuda"], ends["cpu"], strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-3)
