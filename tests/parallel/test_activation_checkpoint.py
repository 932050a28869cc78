"""Recomputation changes memory and nothing else: the same gradients, names and evaluation, eager and compiled."""

from copy import deepcopy

import pytest
import torch

from osler.model.transformer import SummedLoss, Transformer
from osler.parallel.activation_checkpoint import set_recompute
from tests.models import tiny_model

pytestmark = pytest.mark.usefixtures("no_compiled_code")

MODES = ("off", "selective", "full")


def build(mode: str, num_layers: int = 3) -> Transformer:
    model = tiny_model(num_layers=num_layers, vocab_size=256, norm_weight=True, value_embeddings="alternate", copy_head_dim=16)
    set_recompute(model, mode)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 256, (2, 65), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1], ids[:, 1:], torch.arange(64).expand(2, 64) // 20


def gradients(model: Transformer, *, compiled: bool = False, documents: bool = True) -> dict[str, torch.Tensor]:
    loss = SummedLoss(model)
    if compiled:  # traced, differentiated and cut into forward and backward as for inductor, without compiling C++
        loss = torch.compile(loss, fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition")
    ids, labels, document = batch()
    loss(ids, labels, document if documents else None).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def kept_bytes(model: Transformer) -> int:
    """Bytes that the forward pass keeps for the backward pass, parameters aside."""
    kept: list[torch.Tensor] = []  # alive, so that no address is counted twice
    ids, labels, _ = batch()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        SummedLoss(model)(ids, labels, None)
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(size for address, size in sizes.items() if address not in known)


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("documents", [False, True])
def test_gradients_are_the_same_to_the_bit(documents, mode):
    expected, found = (gradients(build(each), documents=documents) for each in ("off", mode))
    assert found.keys() == expected.keys() and all(torch.equal(grad, expected[name]) for name, grad in found.items())


@pytest.mark.parametrize("mode", MODES[1:])
def test_compiles_as_one_graph(mode):
    expected = gradients(build("off", num_layers=1))
    for name, grad in gradients(build(mode, num_layers=1), compiled=True).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-4)


def test_full_keeps_the_least():
    off, full = (kept_bytes(build(mode)) for mode in ("off", "full"))
    assert full < off / 5


@pytest.mark.parametrize("mode", MODES[1:])
def test_names_evaluation_and_copies_are_as_ever(mode):
    plain, recomputing = build("off"), deepcopy(build(mode))
    assert plain.state_dict().keys() == recomputing.state_dict().keys()
    with torch.inference_mode():
        assert torch.equal(plain(batch()[0]), recomputing(batch()[0]))
