"""The same exam, answered by one model in Osler, ``transformers``, ONNX Runtime, llama.cpp and over HTTP: item by item.

    python benchmarks/export_exam.py RUN [--task clinic:new_findings] [--questions 50] [--new-tokens 64] [--threads 2] [--out F]
        [--llama-cpp FOLDER]

Each of them writes its answers greedily, and Osler's reader of answers reads all of them. "osler" is what ``osler eval``
does. The others are the folder of ``osler export`` in ``transformers`` (``generate``, asked through the chat template), its graph
in ONNX Runtime (fp32, int8 and int4), and ``osler serve`` (``/v1/chat/completions``, temperature 0); with ``--llama-cpp``, the
folder in which ``npm install node-llama-cpp`` was run, also its GGUF files in llama.cpp, which cuts the text into tokens itself.
``items_differ`` are the questions to which another option was read than in "osler", ``texts_differ`` counts those with other
thinking or another answer.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_serve import started
from measuring import publish

ONNX = ("fp32", "int8", "int4")
GGUF = ("f32", "f16", "q8_0", "q4_0")
# From a question to the ids of an answer; or to thinking, answer, and whether it ended by itself.
Write = Callable[[str], list[int] | tuple[str, str | None, bool]]


def in_transformers(folder: Path, new_tokens: int) -> Write:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def write(question: str) -> list[int]:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            ids = model.generate(**prompt, max_new_tokens=new_tokens, do_sample=False)
        return list(ids[0, prompt["input_ids"].shape[1] :].tolist())

    return write


def in_onnx_runtime(folder: Path, new_tokens: int) -> Write:
    import numpy as np
    import onnxruntime

    from osler.tokenizer.bpe import Tokenizer
    from osler.tokenizer.chat import encode_prompt

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.load(folder)
    caches = [one for one in session.get_inputs() if one.name.startswith("past_key_values")]

    def write(question: str) -> list[int]:
        new = ids = encode_prompt(tokenizer, question)
        start, past = len(ids), {one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32) for one in caches}
        while len(ids) < start + new_tokens and ids[-1] != tokenizer.eos_id:
            read = {"input_ids": np.array([new]), "attention_mask": np.ones((1, len(ids)), np.int64)}
            logits, *kept = session.run(None, {**read, **past})
            past = dict(zip(past, kept, strict=True))
            new = [int(logits[0, -1].argmax())]
            ids = ids + new
        return ids[start:]

    return write


def in_llama_cpp(library: Path, gguf: Path, tokenizer_folder: Path, new_tokens: int) -> Write:
    from osler.tokenizer.bpe import Tokenizer
    from osler.tokenizer.chat import encode_prompt

    tokenizer, script = Tokenizer.load(tokenizer_folder), Path(__file__).with_name("llama_cpp.mjs")
    numbers = (tokenizer.eos_id, new_tokens, os.environ["OMP_NUM_THREADS"])
    command = ["node", script, library.resolve(), gguf, *numbers]
    process = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    told, heard = process.stdin, process.stdout

    def write(question: str) -> list[int]:
        told.write(json.dumps(tokenizer.decode(encode_prompt(tokenizer, question))) + "\n")
        told.flush()
        return list(json.loads(heard.readline()))

    return write


def over_http(port: int, new_tokens: int) -> Write:
    def write(question: str) -> tuple[str, str | None, bool]:
        body = {"model": "exam", "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": new_tokens}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as reply:
            choice = json.load(reply)["choices"][0]
        message = choice["message"]
        return message.get("reasoning_content") or "", message["content"], choice["finish_reason"] == "stop"

    return write


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from osler.cli.main import main as osler
    from osler.config.schema import decode
    from osler.data.named import load_task
    from osler.eval.config import EvalConfig, named_task
    from osler.eval.exams import grade, greedy, score_by_generation
    from osler.inference.engine import InferenceEngine
    from osler.inference.load import load_model
    from osler.tasks.item import render_question
    from osler.tokenizer.chat import Completion, parse_completion

    ready = load_model(options.run)
    task = decode(EvalConfig, {"task": named_task(options.task)}).task
    items = load_task(task, getattr(task, "split", ""))[: options.questions]
    own = score_by_generation(InferenceEngine(ready.model), ready.tokenizer, items, greedy(options.new_tokens))
    read = {"osler": own.results}
    exports = [("hf", "fp32"), *(("onnx", dtype) for dtype in ONNX)]
    exports += [("gguf", dtype) for dtype in GGUF] if options.llama_cpp else []
    places = {export: folder / "-".join(export) for export in exports}
    for (form, dtype), place in places.items():
        if osler(["export", options.run, "--to", form, "--dtype", dtype, "--out", str(place)]):
            raise SystemExit(f"{form} was not exported in {dtype}")
    server, port = started(
        ["-m", "osler.cli", "serve", f"exam={options.run}", "--port", "0"], options.threads, folder / "server.log"
    )
    try:
        new_tokens, hf = options.new_tokens, places["hf", "fp32"]
        writers = {"transformers": in_transformers(hf, new_tokens)}
        for (form, dtype), place in places.items():
            if form == "onnx":
                writers[f"onnxruntime, {dtype}"] = in_onnx_runtime(place, new_tokens)
            elif form == "gguf":
                writers[f"llama.cpp, {dtype}"] = in_llama_cpp(options.llama_cpp, place, hf, new_tokens)
        for name, write in {**writers, "http": over_http(port, new_tokens)}.items():
            graded = []
            for item in items:
                written = write(render_question(item))
                is_text = isinstance(written, tuple)
                completion = Completion(*written, True) if is_text else parse_completion(ready.tokenizer, written)
                graded.append(grade(item, completion))
            read[name] = graded
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    pairs = {name: list(zip(results, read["osler"], strict=True)) for name, results in read.items()}
    return {
        name: {
            "right": sum(one.right for one, _ in pair),
            "items_differ": [one.item.id for one, other in pair if one.predicted != other.predicted],
            "texts_differ": sum((one.thinking, one.text) != (other.thinking, other.text) for one, other in pair),
        }
        for name, pair in pairs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--task", default="clinic:new_findings")
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        scores = measure(options, Path(folder))
    publish({"task": options.task, "questions": options.questions, "threads": options.threads, "scores": scores}, options.out)


if __name__ == "__main__":
    main()
