"""FP8 projections by emulation: the arithmetic against its definition, what stays ordinary, what is refused; and it trains."""


import pytest
import torch

from osler.model.layers import Linear
from osler.model.transformer import SummedLoss, Transformer
from osler.optim.build import build_optimizer
from osler.optim.config import AdamWConfig
from osler.parallel.config import NoParallelConfig
from osler.parallel.fp8 import check_gpu, check_shapes, convert_to_fp8
from osler.parallel.parallelize import parallelize
from osler.runtime.errors import UserError
from osler.runtime.world import World
from tests.models import tiny_model

pytestmark = pytest.mark.usefixtures("no_compiled_code", "one_thread")

CPU = torch.device("cpu")
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "vocab_size": 256}


def build(*, fp8: bool, **changes: int) -> Transformer:
    model = tiny_model(compute_dtype=torch.bfloat16, **{**SHAPE, **changes})
    if fp8:
        convert_to_fp8(model, CPU, tokens=[64])
    return model


def batch(number: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows that count on in threes, from anywhere."""
    start = torch.randint(0, 256, (2, 1), generator=torch.Generator().manual_seed(number))
    ids = (start + 3 * torch.arange(65)) % 256
    return ids[:, :-1], ids[:, 1:]


def to_fp8(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is left of ``x`` after it was scaled to the range of ``dtype`` by its largest value and rounded."""
    largest = torch.finfo(dtype).max
    scale = (largest / x.abs().max().double()).float()
    return (x.float() * scale).clamp(-largest, largest).to(dtype).float() / scale


def test_a_projection_equals_the_definition():
    model = build(fp8=True)
    projection = model.layers[0].mlp.up_proj
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 64, generator=generator, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(32, 128, generator=generator, dtype=torch.bfloat16)
    y = projection(x)
    y.backward(grad)
    x8, w8 = (to_fp8(tensor.detach(), torch.float8_e4m3fn) for tensor in (x, projection.weight))
    g8 = to_fp8(grad, torch.float8_e5m2)
    assert y.dtype == torch.bfloat16 and projection.weight.grad.dtype == torch.float32
    assert torch.equal(y, (x8 @ w8.T).bfloat16())
    assert torch.equal(x.grad, (g8 @ w8).bfloat16())
    assert torch.equal(projection.weight.grad, (g8.T @ x8).bfloat16().float())


def test_projections_only_and_everything_else_is_ordinary():
    plain, model = build(fp8=False), build(fp8=True)
    left = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    assert left == {"lm_head"}
    assert {type(module).__name__ for name, module in model.named_modules() if name.endswith("_proj")} == {"Float8Projection"}
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    with torch.no_grad():  # what is evaluated is the model that is saved
        assert torch.equal(model(batch()[0]), plain(batch()[0]))
    assert not torch.equal(model(batch()[0]), plain(batch()[0]))


def fp8_gradients(recompute: str, *, num_layers: int = 2, compiled: bool = False) -> dict[str, torch.Tensor]:
    model = build(fp8=False, num_layers=num_layers)
    world, passes = World(device="cpu"), [2 * 64]
    loss = parallelize(model, NoParallelConfig(), world, precision="fp8", pass_tokens=passes, recompute=recompute).loss
    if compiled:
        loss = torch.compile(loss, fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition")
    loss(*batch(), None).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.slow
def test_compiles_with_recomputation():
    found = fp8_gradients("selective", num_layers=1, compiled=True)
    for name, grad in fp8_gradients("off", num_layers=1).items():
        assert (found[name] - grad).norm() <= 0.05 * grad.norm()


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_changes_no_bit(mode):
    expected, found = fp8_gradients("off"), fp8_gradients(mode)
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


def test_thirty_steps_stay_within_two_percent_of_bf16():
    curves = []
    for fp8 in (False, True):
        model = build(fp8=fp8)
        optimizer = build_optimizer(model, AdamWConfig(lr=3e-3))
        curve = []
        for step in range(30):
            loss = SummedLoss(model)(*batch(step), None) / 128
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(curve)
    bf16, fp8 = curves
    assert bf16[-1] < 0.5 * bf16[0]
    assert max(abs(a / b - 1) for a, b in zip(fp8, bf16, strict=True)) < 0.02


def test_what_cannot_work_is_refused_with_numbers(capsys):
    with pytest.raises(UserError, match=r"intermediate_size 100, num_kv_heads x head_dim 24\..*precision=bf16"):
        check_shapes(build(fp8=False, intermediate_size=100, head_dim=24).config, [64])
    with pytest.raises(UserError, match=r"tokens of a forward pass .* 1,000"):
        check_shapes(build(fp8=False).config, [1024, 1000])
    with pytest.raises(UserError, match=r"NVIDIA A100 has 8\.0"):
        check_gpu("NVIDIA A100", (8, 0))
    for capability in ((8, 9), (9, 0), (10, 0)):
        check_gpu("a newer one", capability)
    build(fp8=True)
    assert "emulated" in capsys.readouterr().err
