"""Ask a model that `osler export RUN --to onnx --out FOLDER` wrote; it needs onnxruntime and tokenizers, and no torch.

python examples/onnx_chat.py FOLDER "A question? one (A) other (B)"
python examples/onnx_chat.py FOLDER < questions.txt        a question on each line; or type them
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path)
parser.add_argument("question", nargs="?", help="default: every line of the standard input")
arguments = parser.parse_args()
folder = arguments.folder
if not (folder / "model.onnx").is_file():
    parser.error(f"{folder} has no model.onnx: give the folder that `osler export RUN --to onnx --out FOLDER` wrote")
session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.encode_special_tokens = True  # a marker that stands in a question is plain text
config = json.loads((folder / "config.json").read_text())
longest, first = config["max_position_embeddings"], "<|thinking|>" if config["osler"]["reasons"] else "<|answer|>"
question_id, first_id, end_id = map(tokenizer.token_to_id, ("<|question|>", first, "<|endoftext|>"))
caches = [one for one in session.get_inputs() if one.name.startswith("past_key_values")]
nothing = {one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32) for one in caches}

for question in sys.stdin if arguments.question is None else [arguments.question]:
    ids = [question_id, *tokenizer.encode(question.strip(), add_special_tokens=False).ids, first_id]
    start, new, past = len(ids), ids, nothing
    while len(ids) < longest and ids[-1] != end_id:
        read = {"input_ids": np.array([new]), "attention_mask": np.ones((1, len(ids)), np.int64)}
        logits, *kept = session.run(None, {**read, **past})
        past = dict(zip(nothing, kept, strict=True))
        new = [int(logits[0, -1].argmax())]
        ids += new
    written = tokenizer.decode(ids[start:], skip_special_tokens=False)
    print(re.sub(r"<\|\w+\|>", "\n", written).strip(), flush=True)  # reasoning and answer, each on a line
