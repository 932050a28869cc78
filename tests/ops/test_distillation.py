"""The chunked loss of distillation against the plain formula and torch's own: values, gradients, padding, memory, compilation."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from osler.ops import distillation
from osler.ops.cross_entropy import linear_cross_entropy
from osler.ops.distillation import Mix, distillation_reference, linear_distillation

pytestmark = pytest.mark.usefixtures("no_compiled_code")


def make(tokens: int, rows: int, words: int, seed: int = 0) -> tuple[list[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Return features, head and labels of a student in fp64, and features and head of a wider teacher; every third label is
    without loss."""
    g = torch.Generator().manual_seed(seed)
    x, w, tx, tw = (
        torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((tokens, 8), (rows, 8), (tokens, 12), (rows, 12))
    )
    labels = torch.randint(0, words, (tokens,), generator=g)
    labels[:: 3 + seed % 4] = -100
    return [x.requires_grad_(), w.requires_grad_(), labels], (tx, tw)


def with_gradients(sums: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return sums.detach(), *torch.autograd.grad(3 * sums[2], (x, w))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 40), st.integers(2, 50), st.integers(0, 20), st.integers(0, 1000),
    st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0.5, 1.0, 4.0]),
)  # fmt: skip
def test_value_and_gradient_equal_the_reference(
    tokens: int, chunk: int, words: int, padding: int, seed: int, share: float, temperature: float
) -> None:
    student, teacher = make(tokens, words + padding, words, seed)
    mix = Mix(share, temperature, words)
    ours = with_gradients(linear_distillation(*student, teacher, mix, chunk_tokens=chunk), *student[:2])
    torch.testing.assert_close(ours, with_gradients(distillation_reference(*student, teacher, mix), *student[:2]))


def test_it_is_the_kl_of_torch_and_at_its_ends_the_cross_entropy_alone() -> None:
    (x, w, labels), (tx, tw) = make(30, 20, 20)
    learned = labels != -100
    sums = linear_distillation(x, w, labels, (tx, tw), Mix(0.25, 2.0, 20))
    q, p = (((x @ w.T) / 2)[learned].log_softmax(-1), ((tx @ tw.T) / 2)[learned].log_softmax(-1))
    kl = F.kl_div(q, p, reduction="sum", log_target=True)
    ce = F.cross_entropy((x @ w.T)[learned], labels[learned], reduction="sum")
    torch.testing.assert_close(sums, torch.stack([ce, kl, 0.75 * ce + 0.25 * 4 * kl]))
    torch.testing.assert_close(torch.autograd.grad(sums[2], (x, w)), torch.autograd.grad(0.75 * ce + kl, (x, w)))
    alone = torch.autograd.grad(linear_distillation(x, w, labels, (tx, tw), Mix(0.0, 2.0, 20))[2], (x, w))
    torch.testing.assert_close(alone, torch.autograd.grad(linear_cross_entropy(x, w, labels), (x, w)))
    itself = linear_distillation(x, w, labels, (x, w), Mix(1.0, 2.0, 20))
    assert abs(itself[1]) < 1e-12 and all(grad.abs().max() < 1e-12 for grad in torch.autograd.grad(itself[2], (x, w)))


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = make(100, 64, 60)
    results = []
    for logits_in_a_block in (1 << 21, 3 * 64):
        monkeypatch.setitem(distillation.BLOCK_LOGITS, "cpu", logits_in_a_block)
        sums = linear_distillation(*student, teacher, Mix(0.5, 2.0, 60), chunk_tokens=40)
        results.append(with_gradients(sums, *student[:2]))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_bf16_features_give_fp32_sums_and_master_weight_gradient() -> None:
    (x, w, labels), (tx, tw) = make(64, 32, 32)
    low, master = x.detach().bfloat16().requires_grad_(), w.detach().float().requires_grad_()
    sums = linear_distillation(low, master, labels, (tx.bfloat16(), tw.bfloat16()), Mix(0.5, 2.0, 32))
    found, grad_low, grad_master = with_gradients(sums, low, master)
    assert (found.dtype, grad_low.dtype, grad_master.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    expected = with_gradients(distillation_reference(x, w, labels, (tx, tw), Mix(0.5, 2.0, 32)), x, w)
    torch.testing.assert_close(found.double(), expected[0], rtol=0.02, atol=0)
    torch.testing.assert_close([grad_low.double(), grad_master.double()], list(expected[1:]), rtol=0.05, atol=0.3)


def test_no_tensor_of_tokens_times_vocabulary_is_made_and_none_flows_into_the_teacher(largest_tensor) -> None:
    tokens, words, chunk = 512, 400, 64
    student, (tx, tw) = make(tokens, words, words)
    with largest_tensor:
        loss = linear_distillation(*student, (tx.requires_grad_(), tw.requires_grad_()), Mix(0.5, 2.0, words), chunk_tokens=chunk)
        loss[2].backward()
    assert largest_tensor.elements <= chunk * words < tokens * words
    assert tx.grad is None and tw.grad is None and student[0].grad is not None


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_it_compiles_as_one_graph(temperature: float) -> None:
    student, teacher = make(96, 64, 60)

    def ours(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, *teacher: torch.Tensor) -> torch.Tensor:
        return linear_distillation(x, w, y, teacher, Mix(0.5, temperature, 60), chunk_tokens=40)

    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        with_gradients(compiled(*student, *teacher), *student[:2]), with_gradients(ours(*student, *teacher), *student[:2])
    )
