"""Preparations that are killed at every visit of every fault point, and gone on with: the same bytes, no shard twice.

    killed_preparations.py FOLDER

Every case is a line "ok STAGE VISIT". Cases are forks, so that nothing is imported twice.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from osler.data import shards, writing
from osler.data.documents import Corpus
from osler.data.prepare import prepare
from osler.data.readers import TextFiles
from osler.data.shards import INDEX, RECORD, shard_name
from osler.files import parts
from osler.files.parts import Parts
from osler.runtime import faults
from osler.tokenizer import bpe, memory
from osler.tokenizer.bpe import Tokenizer

STAGES = (
    "prepare-manifest",
    "write-atomic",
    "prepare-chunk",
    "write-shard",
    "write-index",
    "prepare-journal",
    "prepare-complete",
)


def run(root: Path, out: Path, spec: str | None, processes: int = 0) -> int:
    """Prepare in a fork; return how it ended."""
    if not (child := os.fork()):
        if spec:
            os.environ[faults.VARIABLE] = spec
        tokenizer = Tokenizer.load(root / "tokenizer.json")
        corpora = {}
        for name, fraction in (("a", 0.2), ("b", 0.0), ("set", 0.0)):
            reader = TextFiles(root / f"{name}.jsonl")
            corpora[name] = Corpus(Parts(reader.files()), reader.read, {}, None, fraction)
        checked = {"set": corpora.pop("set")}
        prepare(corpora, tokenizer, out, weights=[3, 1], validation=checked, processes=processes)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def content(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def finished(out: Path) -> dict[Path, tuple[int, int]]:
    """What tells whether a shard that the indexes name is written again."""
    found = {}
    for index in out.rglob(INDEX):
        for number in range(index.stat().st_size // RECORD.itemsize):
            status = (index.parent / shard_name(number)).stat()
            found[index.parent / shard_name(number)] = (status.st_ino, status.st_mtime_ns)
    return found


def main(root: Path) -> None:
    parts.PART_BYTES, writing.SHARD_TOKENS, writing.FIRST_SHARD_TOKENS, writing.CUT_BYTES = 1500, 400, 100, 6000
    shards.FIRST_SHARD_TOKENS, writing.VALIDATION_TOKENS = 100, 600
    if not (child := os.fork()):
        tokenizer = Tokenizer.train(["Text 1 of many, with words and numbers. "] * 9, 300)
        (root / "tokenizer.json").write_bytes(tokenizer.to_bytes())
        os._exit(0)
    os.waitpid(child, 0)
    memory.Memory(bpe.PIECES, list).encode_batch([])  # the tables of characters are made once, for all forks
    for name, of, numbers in (("a", "a", range(300)), ("b", "b", range(120)), ("set", "a", range(0, 300, 3))):
        rows = (json.dumps({"text": f"Text {number} of many of {of}."}) + "\n" for number in numbers)
        (root / f"{name}.jsonl").write_text("".join(rows))
    assert run(root, root / "whole", None) == 0
    whole = content(root / "whole")
    assert sum(name.endswith(".bin") for name in whole) > 20
    assert len(whole["validation.set/keys.bin"]) == 8 * 100, "of all documents, though not all of them are tokenised"
    out = root / "in-processes"
    for visit in (3, 2, 5, 0):
        status = run(root, out, f"prepare-journal:kill:{visit}" if visit else None, processes=2)
        assert os.WIFSIGNALED(status) == bool(visit)
        print("ok in processes", visit, flush=True)
    assert content(out) == whole
    for stage in STAGES:
        visit = 1
        while True:
            out = root / f"{stage}-{visit}"
            if (status := run(root, out, f"{stage}:kill:{visit}")) == 0:
                break
            assert os.WIFSIGNALED(status), stage
            before = finished(out)
            twice = run(root, out, f"{stage}:kill:2")  # a second kill, where the first one let it begin
            assert twice == 0 or before.items() <= finished(out).items(), (stage, visit)
            before = finished(out)
            assert run(root, out, None) == 0
            assert before.items() <= finished(out).items(), f"{stage} {visit}: a shard was written again"
            assert content(out) == whole, f"{stage} {visit}: other bytes"
            print("ok", stage, visit, flush=True)
            visit = 2 * visit + 1


main(Path(sys.argv[1]))
