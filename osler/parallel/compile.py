"""All use of ``torch.compile``: whether it works here and is worth its time, what is compiled, and for how many shapes.

Shapes are static, because a training step has one shape in each stage of a curriculum, and code for a known shape is faster.
"""

import contextlib
import functools
import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from osler.model.transformer import SummedLoss, Transformer
from osler.parallel.config import COMPILE_MIN_STEPS
from osler.runtime.errors import UserError

logger = logging.getLogger(__name__)

LINKING_SECONDS = 30  # the C++ compiler needs less to write a library
# The newest instructions of x86 for which torch has code; a compiler that knows them knows the older ones.
VECTOR_FLAGS = "-mavx512f -mavx512vnni -mavx512bf16 -mamx-tile -mamx-bf16 -mamx-int8"
COMPILED_SHAPES = 64  # the most for one function; torch's own limit is 8, and a curriculum may have more stages


def should_compile(mode: str, device: torch.device, *, steps: int) -> bool:
    """Return whether a run of ``steps`` steps compiles; ``auto`` compiles where that works and pays.

    Raises UserError when ``mode`` is "always" and compilation does not work here.
    """
    if mode == "never" or (mode == "auto" and steps < COMPILE_MIN_STEPS):
        return False
    works, reason = compile_works(device)
    if not works and mode == "always":
        raise UserError(f"compile=always, but torch.compile does not work here: {reason}")
    if not works:
        logger.warning(f"torch.compile does not work here ({reason}); training without it, several times slower.")
    return works


def compile_loss(loss: SummedLoss, *, by_block: bool) -> None:
    """Compile ``loss`` in place, once for every shape: as one graph, or ``by_block`` each block and what follows the last one.

    Blocks of the same kind then share a graph, and ranks exchange a block's gradient while the block before it still computes.
    On a CPU it is always by block, because compiling one block instead of all takes less time and a step takes no more.
    """

    def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(function, fullgraph=True, dynamic=False)

    torch._dynamo.config.recompile_limit = COMPILED_SHAPES
    on_cpu = loss.model.embed_tokens.weight.device.type == "cpu"
    if on_cpu:
        trust_vector_instructions()  # on this rank, too: the trial is rank 0's
    if not (by_block or on_cpu):
        loss.forward = compiled(loss.forward)  # type: ignore[method-assign]
        return
    torch._dynamo.config.optimize_ddp = False  # the blocks are cut already, so torch need not cut graphs for DDP
    for block in loss.model.layers:
        block.forward = compiled(block.forward)
    loss.of_hidden = compiled(loss.of_hidden)  # type: ignore[method-assign]


def compile_forward(model: Transformer) -> Callable[..., Tensor]:
    """Return the compiled forward pass of a model that is not trained."""
    torch._dynamo.config.recompile_limit = COMPILED_SHAPES
    return torch.compile(model.forward, fullgraph=True, dynamic=False)


def forget_compiled() -> None:
    """Forget the code of earlier models, before another one is trained in this process; torch keeps such models in memory."""
    torch.compiler.reset()


@contextlib.contextmanager
def compiled_anew() -> Iterator[None]:
    """Inside the context compile into an empty cache, as the first run of a new model would; the cache is deleted at the end."""
    from torch._inductor.utils import fresh_cache

    with TemporaryDirectory(ignore_cleanup_errors=True) as folder, fresh_cache(dir=folder):
        yield


@functools.cache
def compile_works(device: torch.device) -> tuple[bool, str]:
    """Return whether ``torch.compile`` works here, and if not, why. Compiles a tiny function once, which takes seconds."""
    from torch._inductor import cpu_vec_isa
    from torch._inductor.exc import InvalidCxxCompiler
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    from torch._inductor.utils import fresh_cache

    remove_empty_libraries(Path(cache_dir()))

    def tiny(x: Tensor) -> Tensor:
        return torch.tanh(x * 2.0 + 1.0).sum()

    x = torch.ones(64, device=device)
    try:
        # Compiled code in the cache would hide that the compiler is gone, so ask for the compiler and start with an empty cache.
        trust_vector_instructions()
        if device.type == "cpu":
            cpu_vec_isa.valid_vec_isa_list()  # torch's remaining tests take 3 seconds, or 0.4 when its cache has them
        with fresh_cache():
            result = torch.compile(tiny, fullgraph=True)(x)
    except InvalidCxxCompiler:
        return False, "no C++ compiler found: install g++ (or clang)"
    except (RuntimeError, OSError, ImportError) as error:  # every compiler error of torch is a RuntimeError
        return False, _first_reason(str(error)) or type(error).__name__
    if not torch.allclose(result, tiny(x), rtol=1e-4):
        return False, f"a compiled function gave {result.item()} instead of {tiny(x).item()}"
    return True, ""


def trust_vector_instructions() -> None:
    """Let torch take every vector instruction that the processor lists, if the C++ compiler knows them all.

    Torch would compile a test of each kind, which takes 11 to 16 seconds in every process that compiles. Raises torch's error
    where there is no compiler.
    """
    from torch._inductor import config, cpp_builder

    command = [cpp_builder.get_cpp_compiler(), *VECTOR_FLAGS.split(), "-E", "-x", "c++", os.devnull]
    if config.cpp.vec_isa_ok is None and subprocess.run(command, capture_output=True, check=False).returncode == 0:
        config.cpp.vec_isa_ok = True


def remove_empty_libraries(cache: Path) -> None:
    """Remove the libraries without content from torch's cache of compiled code.

    A process that is killed while it links leaves one, and every later run would fail to load it. A file that is younger than
    ``LINKING_SECONDS`` stays, because another process may be linking it.
    """
    for library in cache.rglob("*.so"):
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            status = library.stat()
            if status.st_size == 0 and time.time() - status.st_mtime > LINKING_SECONDS:
                library.unlink()


def _first_reason(text: str) -> str:
    """Return one line out of torch's page-long compiler errors."""
    if "Python.h" in text:
        return "the C++ compiler finds no Python.h: install the Python headers (python3-dev)"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), "".join(lines[:1]))[:200]
