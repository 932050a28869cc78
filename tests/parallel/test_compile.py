"""Whether compiling works is tried; many shapes are compiled, each once, and compute the same."""

import functools
import os
import time

import pytest
import torch

from osler.model.transformer import SummedLoss
from osler.parallel.compile import LINKING_SECONDS, compile_works, remove_empty_libraries
from osler.parallel.config import NoParallelConfig
from osler.parallel.parallelize import parallelize
from osler.runtime.world import World
from tests.models import tiny_model

LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)


@pytest.mark.slow
def test_more_lengths_than_torch_allows_are_compiled_once_each(no_compiled_code, monkeypatch):
    """The loss that training compiles, at the row lengths of a curriculum of ten stages, and at the first of them again."""
    from torch._dynamo.testing import CompileCounter

    model = tiny_model(num_layers=2)
    eager, counter = SummedLoss(model), CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    loss = parallelize(model, NoParallelConfig(), World(), compile=True).loss
    assert len(LENGTHS) > 8
    for seq_len in (*LENGTHS, LENGTHS[0]):
        ids = torch.randint(0, 64, (2, seq_len + 1), generator=torch.Generator().manual_seed(seq_len))
        rows = ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None
        torch.testing.assert_close(loss(*rows), eager(*rows))
    assert counter.frame_count == 2 * len(LENGTHS), "a block, which is the code of all blocks, and what follows the last one"


def test_compile_says_what_is_missing(monkeypatch):
    """Without a compiler the trial answers with what to install."""
    import torch._inductor.config

    monkeypatch.setenv("PATH", "")
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):  # what monkeypatch undoes is hidden afterwards
        works, reason = compile_works.__wrapped__(torch.device("cpu"))
    assert not works and "no C++ compiler found: install g++" in reason


def test_empty_libraries_of_a_killed_compilation_are_removed(tmp_path):
    long_ago = time.time() - 2 * LINKING_SECONDS
    for name, content, is_old in (("torn.so", b"", True), ("whole.so", b"ELF", True), ("linking.so", b"", False)):
        (tmp_path / "ab").mkdir(exist_ok=True)
        (tmp_path / "ab" / name).write_bytes(content)
        if is_old:
            os.utime(tmp_path / "ab" / name, (long_ago, long_ago))
    remove_empty_libraries(tmp_path)
    assert {path.name for path in (tmp_path / "ab").iterdir()} == {"whole.so", "linking.so"}
