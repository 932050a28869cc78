"""How fast one process judges documents, and how many a second are compared with all earlier ones.

    python benchmarks/bench_clean.py --text FILE ... --exam TYPE=FILE ... [--out FILE]

Exams are in the schemas of `osler eval`. Times are of the CPU. `found` says how many documents contain an exam question, and
`halves` how many items of every second one of an exam are found in the text of the others, which should be next to none.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from measuring import publish


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True, help="files of text")
    parser.add_argument("--exam", nargs="*", default=[], metavar="TYPE=FILE", help="exams that are looked for")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()

    from osler.config.schema import decode
    from osler.data.clean import Cleaner
    from osler.data.config import CleanConfig
    from osler.data.contamination import ExamIndex
    from osler.data.documents import in_memory
    from osler.data.duplicates import Seen, rows_of
    from osler.data.named import load_task, open_exam
    from osler.data.ngrams import Words
    from osler.data.readers import TextFiles
    from osler.tasks.item import render_question

    exams = [dict(zip(("type", "path"), exam.split("=", 1), strict=True)) for exam in given.exam]
    documents = [document for path in given.text for document in TextFiles(path) if not document.is_empty]
    corpus = in_memory(documents)
    size = sum(len(document.text.encode()) for document in documents)
    result: dict[str, Any] = {"documents": len(documents), "bytes": size}
    configs: dict[str, dict[str, Any]] = {
        "quality": {"duplicates": "keep"},
        "quality_and_exams": {"duplicates": "keep", "exams": exams},
        "all": {"duplicates": "near", "languages": ["en"], "exams": exams},
    }
    for name, config in configs.items():
        clean = decode(CleanConfig, config)
        cleaner = Cleaner(clean, tuple(open_exam(exam, "", "--exam") for exam in clean.exams))
        cleaner.looks([document.texts for document in documents[:2]])  # reads exams and models
        began = time.process_time()
        cleaned = replace(corpus, clean=cleaner)
        judged = [(document, look) for part in corpus.parts for document, _, look in cleaned.judged(part)]
        seconds = time.process_time() - began
        result[name] = {
            "megabytes_per_second": size / seconds / 1e6,
            "documents_per_second": len(documents) / seconds,
            "found": sum(bool(look.exam_items) for _, look in judged),
        }
    kept = [(document, look) for document, look in judged if not look.reason]
    rows = rows_of([document.content_key() for document, _ in kept], [look.signature for _, look in kept])
    with tempfile.TemporaryDirectory() as folder:
        seen = Seen(Path(folder) / "seen.bin", near=True, similarity=0.8, memory_bytes=256 << 20)
        began = time.process_time()
        reasons = list(seen.add(rows))
    result["copies"] = {
        "documents_per_second": len(kept) / (time.process_time() - began),
        "found": {reason: reasons.count(reason) for reason in sorted(set(reasons) - {""})},
    }
    result["halves"] = {}
    for task in decode(CleanConfig, {"exams": exams}).exams:
        items = load_task(task)
        index = ExamIndex(items[::2])
        others = [render_question(item) for item in items[1::2]]
        result["halves"][task.type] = [len(index.find(Words(others))), len(others)]
    publish(result, given.out)


if __name__ == "__main__":
    main()
