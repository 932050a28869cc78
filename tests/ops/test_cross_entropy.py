"""The chunked loss and log-probabilities against the plain formula: values, gradients, padding, memory, compilation."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd

from osler.ops import cross_entropy
from osler.ops.cross_entropy import cross_entropy_reference, entropy, is_likeliest, linear_cross_entropy, linear_logprobs
from osler.ops.labels import IGNORED

pytestmark = pytest.mark.usefixtures("no_compiled_code")


def make(tokens: int, size: int, rows: int, words: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, size, generator=g, dtype=torch.float64).requires_grad_()
    w = torch.randn(rows, size, generator=g, dtype=torch.float64).requires_grad_()
    y = torch.randint(0, words, (tokens,), generator=g)
    return x, w, y


def with_gradients(loss: torch.Tensor, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 40), st.integers(2, 50), st.integers(0, 20), st.integers(0, 1000))
def test_loss_and_gradients_equal_the_reference(tokens: int, chunk: int, words: int, padding: int, seed: int) -> None:
    x, w, y = make(tokens, 8, words + padding, words, seed)
    y[:: 3 + seed % 4] = -100
    ours = with_gradients(3 * linear_cross_entropy(x, w, y, vocab_size=words, chunk_tokens=chunk), x, w)
    torch.testing.assert_close(ours, with_gradients(3 * cross_entropy_reference(x, w, y, vocab_size=words), x, w))


def test_all_labels_ignored_is_zero_with_zero_gradient() -> None:
    x, w, y = make(10, 4, 8, 8)
    assert not any(found.any() for found in with_gradients(linear_cross_entropy(x, w, torch.full_like(y, -100)), x, w))


def test_bf16_features_give_fp32_loss_and_master_weight_gradient() -> None:
    x, w, y = make(64, 16, 32, 32)
    low, master = x.detach().bfloat16().requires_grad_(), w.detach().float().requires_grad_()
    loss, grad_low, grad_master = with_gradients(linear_cross_entropy(low, master, y), low, master)
    assert loss.dtype == torch.float32 and grad_master.dtype == torch.float32 and grad_low.dtype == torch.bfloat16
    torch.testing.assert_close(loss.double(), cross_entropy_reference(x, w, y).detach(), rtol=0.02, atol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_logprobs_entropy_and_gradient_equal_log_softmax(masked: bool) -> None:
    x, w, y = make(40, 8, 24, 20)
    mask = torch.rand(40, 20, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[torch.arange(40), y] = True
    mask_NV = mask if masked else None
    how = {"vocab_size": 20, "temperature": 0.7, "mask_NV": mask_NV, "chunk_tokens": 11}
    logp, entropies = linear_logprobs((x, w), y, entropy, **how)
    same, is_top = linear_logprobs((x, w), y, is_likeliest, **how)
    logits = (x @ w[:20].T) / 0.7
    if masked:
        logits = logits.masked_fill(~mask, float("-inf"))
    full = logits.log_softmax(-1)
    expected = full.gather(1, y[:, None]).squeeze(1)
    torch.testing.assert_close(logp, expected)
    torch.testing.assert_close(entropies, torch.distributions.Categorical(logits=logits).entropy())
    assert torch.equal(is_top, full.argmax(-1) == y) and torch.equal(logp, same)
    weights = torch.linspace(-1, 1, 40, dtype=torch.float64)
    ours = torch.autograd.grad((logp * weights).sum(), (x, w))
    torch.testing.assert_close(ours, torch.autograd.grad((expected * weights).sum(), (x, w)))
    assert not entropies.requires_grad


def test_no_tensor_of_tokens_times_vocabulary_is_made(largest_tensor) -> None:
    tokens, words, chunk = 512, 400, 64
    x, w, y = make(tokens, 8, words, words)
    with largest_tensor:
        linear_cross_entropy(x, w, y, chunk_tokens=chunk).backward()
        linear_logprobs((x, w), y, entropy, chunk_tokens=chunk)[0].sum().backward()
    assert largest_tensor.elements <= chunk * words < tokens * words


def test_freed_logits_are_used_again() -> None:
    """With results of a few bytes between them the C library took new memory for each chunk: twice all logits in the end."""
    program = """
import torch
from osler.ops.cross_entropy import is_likeliest, linear_logprobs
from osler.runtime.device import keep_freed_memory
from osler.runtime.machine import peak_process_bytes
keep_freed_memory()
x, w, y = torch.randn(4096, 16), torch.randn(50_304, 16), torch.randint(50_000, (4096,))
before = peak_process_bytes()
linear_logprobs((x, w), y, is_likeliest)
print(peak_process_bytes() - before)
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(told.stdout) < 0.4 * 4096 * 50_304 * 4


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk is worked on by blocks of rows, the last of them smaller; padding and labels without loss included."""
    x, w, y = make(100, 8, 64, 60)
    y[::7] = IGNORED
    results = []
    for logits_in_a_block in (1 << 21, 3 * 64):
        monkeypatch.setitem(cross_entropy.BLOCK_LOGITS, "cpu", logits_in_a_block)
        results.append(with_gradients(linear_cross_entropy(x, w, y, vocab_size=60, chunk_tokens=40), x, w))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("chunk", "waits"), [(40, 2 + 3 * 7), (None, 7)])
def test_compiled_chunks_and_tiles_stand_in_turn(chunk: int | None, waits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but these operators keeps a compiler from working on all chunks, or all tiles of one, at once."""
    monkeypatch.setattr(cross_entropy, "_tile_words", lambda head_VR: 24)
    x, w, y = make(100, 8, 64, 60)
    graphs = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(sum(node.target is torch.ops.osler.in_turn.default for node in graph.graph.nodes))
        return graph

    function = torch.compile(
        lambda: linear_cross_entropy(x, w, y, chunk_tokens=chunk), fullgraph=True, backend=aot_autograd(fw_compiler=count)
    )
    function().backward()
    assert graphs[0] == waits


@pytest.mark.parametrize(("most_bytes", "rows"), [(1 << 20, 100), (1 << 10, 64)])
def test_compiled_logits_stand_in_memory_at_once_only_where_they_are_small(
    most_bytes: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 weights get fp32 gradients, near those of fp64 features, either way."""
    monkeypatch.setattr(cross_entropy, "TILED_CHUNK_BYTES", most_bytes)
    x, w, y = make(100, 8, 64, 60)
    low, master = x.detach().bfloat16().requires_grad_(), w.detach().float().requires_grad_()
    widest = 0

    def watch(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        nonlocal widest
        shapes = [node.meta["val"].shape for node in graph.graph.nodes if node.target is torch.ops.aten.mm.default]
        widest = max([widest, *(height for height, width in shapes if width == 64)])
        return graph

    compiled = torch.compile(
        lambda: linear_cross_entropy(low, master, y, vocab_size=60), fullgraph=True, backend=aot_autograd(fw_compiler=watch)
    )
    _, *ours = with_gradients(compiled(), low, master)
    assert widest == rows and [grad.dtype for grad in ours] == [torch.bfloat16, torch.float32]
    _, *plain = with_gradients(cross_entropy_reference(x, w, y, vocab_size=60), x, w)
    torch.testing.assert_close([grad.double() for grad in ours], plain, rtol=0.03, atol=0.05)


@pytest.mark.parametrize("tile_words", [100, 24])
def test_compiled_gradients_in_bf16_are_near_where_the_model_is_sure(tile_words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels have from next to none to nearly all of the probability; each gradient is compared as a whole."""
    monkeypatch.setattr(cross_entropy, "_tile_words", lambda head_VR: tile_words)
    _, w, y = make(96, 16, 64, 60)
    sure = torch.linspace(-1, 1, 96, dtype=torch.float64)[:, None] * w.detach()[y]
    low, master = sure.bfloat16().requires_grad_(), w.detach().bfloat16().float().requires_grad_()
    compiled = torch.compile(
        lambda: linear_cross_entropy(low, master, y, vocab_size=60, chunk_tokens=40), fullgraph=True, backend="aot_eager"
    )
    exact = low.detach().double().requires_grad_(), master.detach().double().requires_grad_()
    loss, *plain = with_gradients(cross_entropy_reference(*exact, y, vocab_size=60), *exact)
    found, *ours = with_gradients(compiled(), low, master)
    torch.testing.assert_close(found.double(), loss, rtol=2e-3, atol=0)
    for mine, reference in zip(ours, plain, strict=True):
        assert (mine.double() - reference).norm() < 0.01 * reference.norm()


@pytest.mark.parametrize(("chunk", "tile_words"), [(40, 100), (40, 24), (None, 100), (None, 20)])
def test_both_compile_as_one_graph(chunk: int | None, tile_words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several chunks, or in one that goes by tiles: of the last one a part is padding, or all of it."""
    monkeypatch.setattr(cross_entropy, "_tile_words", lambda head_VR: tile_words)
    x, w, y = make(96, 8, 64, 60)
    y[::7] = IGNORED

    def both(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = linear_cross_entropy(x, w, y, vocab_size=60, chunk_tokens=chunk)
        logp, entropies = linear_logprobs((x, w), y.clamp_min(0), entropy, vocab_size=60, chunk_tokens=chunk)
        return loss + (logp.square() * entropies).sum()

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")  # the graph is the question, not the C++ compiler
    torch.testing.assert_close(with_gradients(compiled(x, w, y), x, w), with_gradients(both(x, w, y), x, w))


@pytest.mark.parametrize(("words", "parts"), [(64, [64]), (12_800, [12_800]), (50_304, [12_800] * 3 + [11_904]), (200_005, 4)])
def test_tiles_are_few_and_whole_cache_lines(words: int, parts: list[int] | int) -> None:
    sizes = [tile.shape[0] for tile in torch.empty(words, 0).split(cross_entropy._tile_words(torch.empty(words, 0)))]
    assert (len(sizes) if isinstance(parts, int) else sizes) == parts
    assert all(size % 64 == 0 for size in sizes[:-1])
