"""Sampling throughput: the engine beside the plain loop that recomputes every prefix, and beside ``transformers`` generate.

    python benchmarks/bench_sample.py [--models tiny small base] [--dtypes fp32 bf16] [--rounds 3] [--out FILE]

64 rows draw 256 tokens each after prompts of 48, at temperature 1 and without stopping. ``transformers`` runs Qwen3ForCausalLM
with the same weights (checked: equal logits) and its default key/value cache. Two workloads: "distinct" has 64 prompts, and
"grouped" has 8 prompts with 8 samples each, as in GRPO (``num_return_sequences`` for transformers). Every measurement is a
fresh process that warms up and then times a few whole calls, prefill included; contestants take turns, so that a machine that
slows down slows all of them. Numbers are medians over rounds, ratios are taken round by round. The recompute loop is timed
for the smallest model on the first workload only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from measuring import measured, publish

# 1.3, 6 and 88 million parameters
MODELS: dict[str, dict[str, int]] = {
    "tiny": {"layers": 4, "width": 128, "inner": 384, "heads": 4, "kv_heads": 2, "head_dim": 32, "vocab": 2048},
    "small": {"layers": 6, "width": 256, "inner": 704, "heads": 8, "kv_heads": 2, "head_dim": 32, "vocab": 4096},
    "base": {"layers": 12, "width": 768, "inner": 2048, "heads": 12, "kv_heads": 4, "head_dim": 64, "vocab": 8192},
}
ROWS, PROMPT_TOKENS, NEW_TOKENS, GROUP = 64, 48, 256, 8
TIMED_CALLS = {"tiny": 3, "small": 3, "base": 1}


def build_model(shape: dict[str, int], dtype: Any) -> Any:
    """Osler's model with random weights, none of them zero."""
    import torch

    from osler.model.config import ModelConfig
    from osler.model.transformer import Transformer

    config = ModelConfig(
        num_layers=shape["layers"],
        hidden_size=shape["width"],
        intermediate_size=shape["inner"],
        num_heads=shape["heads"],
        num_kv_heads=shape["kv_heads"],
        head_dim=shape["head_dim"],
        vocab_size=shape["vocab"],
        max_seq_len=PROMPT_TOKENS + NEW_TOKENS,
    )
    model = Transformer(config, compute_dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return model


def build_qwen3(model: Any, dtype: Any) -> Any:
    """Hugging Face's Qwen3 with the same weights; its norms keep their ones, because the model's have no weight."""
    import torch
    import transformers
    from beside_peers import qwen3_config

    config = model.config
    qwen3 = transformers.Qwen3ForCausalLM(qwen3_config(transformers, config)).eval()
    weights = {name if name.startswith("lm_head") else f"model.{name}": value for name, value in model.state_dict().items()}
    missing, unexpected = qwen3.load_state_dict(weights, strict=False)
    if unexpected or any("norm" not in name for name in missing):
        raise SystemExit(f"the two models do not match: missing {missing}, unexpected {unexpected}")
    ids = torch.randint(config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        difference = (qwen3(ids).logits - model.logits(model(ids))).abs().max().item()
    if model.compute_dtype == torch.float32 and difference > 1e-3:
        raise SystemExit(f"the two models disagree by {difference}")
    qwen3.generation_config.eos_token_id = None
    qwen3.generation_config.pad_token_id = 0
    return qwen3.to(dtype)


def measure(contestant: str, model_name: str, dtype_name: str, workload: str) -> dict[str, float]:
    """Time whole calls in this process: seconds of the median one, and of the first where it compiles."""
    import torch

    from osler.inference.engine import InferenceEngine
    from osler.inference.recompute import generate_by_recompute
    from osler.ops.sampling_params import SamplingParams

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    shape = MODELS[model_name]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype_name]
    model = build_model(shape, dtype)
    samples = GROUP if workload == "grouped" else 1
    shape_PT = (ROWS // samples, PROMPT_TOKENS)
    prompts_PT = torch.randint(shape["vocab"], shape_PT, generator=torch.Generator().manual_seed(2))
    prompts = prompts_PT.tolist()
    result: dict[str, float] = {}
    if contestant == "transformers":
        qwen3 = build_qwen3(build_model(shape, torch.float32), dtype)

        def call(new_tokens: int) -> int:
            with torch.inference_mode():
                output = qwen3.generate(
                    prompts_PT,
                    attention_mask=torch.ones_like(prompts_PT),
                    max_new_tokens=new_tokens,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    num_return_sequences=samples,
                )
            return (output.shape[1] - PROMPT_TOKENS) * output.shape[0]

    elif contestant == "recompute":

        def call(new_tokens: int) -> int:
            sampling = SamplingParams(max_new_tokens=new_tokens)
            rollout = generate_by_recompute(model, prompts, sampling, samples_per_prompt=samples)
            return sum(len(row.ids) for row in rollout)

    else:
        engine = InferenceEngine(model)

        def call(new_tokens: int) -> int:
            sampling = SamplingParams(max_new_tokens=new_tokens)
            rollout = engine.generate(prompts, sampling, samples_per_prompt=samples)
            return sum(len(row.ids) for row in rollout)

    call(4)
    seconds = []
    for _ in range(1 if contestant == "recompute" else TIMED_CALLS[model_name]):
        started = time.perf_counter()
        tokens = call(NEW_TOKENS)
        seconds.append(time.perf_counter() - started)
        if tokens != ROWS * NEW_TOKENS:
            raise SystemExit(f"{contestant} drew {tokens} tokens instead of {ROWS * NEW_TOKENS}")
    result["tokens_per_second"] = ROWS * NEW_TOKENS / statistics.median(seconds)
    return result


def in_fresh_process(contestant: str, model: str, dtype: str, workload: str, threads: int) -> dict[str, float]:
    return measured([__file__, "--child", contestant, model, dtype, workload], threads=threads, TRANSFORMERS_VERBOSITY="error")


def compare(model: str, dtype: str, workload: str, rounds: int, threads: int) -> dict[str, Any]:
    """All contestants in turn, ``rounds`` times."""
    contestants = ["engine", "transformers"]
    contestants += ["recompute"] if workload == "distinct" and model == "tiny" else []
    runs: dict[str, list[dict[str, float]]] = {contestant: [] for contestant in contestants}
    for index in range(rounds):
        for contestant in contestants if index % 2 == 0 else contestants[::-1]:
            runs[contestant].append(in_fresh_process(contestant, model, dtype, workload, threads))
            rate = runs[contestant][-1]["tokens_per_second"]
            print(f"{model} {dtype} {workload} round {index + 1} {contestant}: {rate:,.0f} tokens/s", file=sys.stderr)
    rates = {contestant: [run["tokens_per_second"] for run in done] for contestant, done in runs.items()}
    ratios = {
        f"engine / {other}": statistics.median(mine / theirs for mine, theirs in zip(rates["engine"], rates[other], strict=True))
        for other in contestants[1:]
    }
    return {
        "model": model,
        "dtype": dtype,
        "workload": workload,
        "tokens_per_second": {contestant: round(statistics.median(values), 1) for contestant, values in rates.items()},
        "ratio": {name: round(value, 2) for name, value in ratios.items()},
        "rounds": {contestant: [round(value, 1) for value in values] for contestant, values in rates.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--workloads", nargs="+", choices=["distinct", "grouped"], default=["distinct", "grouped"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        contestant, model, dtype, workload = asked.child
        print(json.dumps(measure(contestant, model, dtype, workload)))
        return
    import transformers

    results = [
        compare(model, dtype, workload, asked.rounds, asked.threads)
        for model in asked.models
        for dtype in asked.dtypes
        for workload in asked.workloads
    ]
    report = {
        "benchmark": "sample",
        "threads": asked.threads,
        "versions": {"transformers": transformers.__version__},
        "rows": ROWS,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "models": {name: MODELS[name] for name in asked.models},
        "results": results,
    }
    publish(report, asked.out)


if __name__ == "__main__":
    main()
