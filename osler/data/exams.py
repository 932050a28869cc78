"""Which exam items were looked for in data, and which were found. Both lists lie beside the shards and in checkpoints.

From them an evaluation knows the items whose answers a model cannot have seen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

from osler.data.clean import Cleaner
from osler.data.shards import read_data_manifest
from osler.data.writing import read_journal
from osler.runtime.errors import UserError

EXAMS_FILE = "exams.json"  # beside the shards, and in checkpoints


@dataclass(frozen=True)
class ExamsInData:
    """The ids of the items that were looked for in all of the data, and of those found anywhere, even in dropped documents."""

    checked: frozenset[str] = frozenset()
    found: frozenset[str] = frozenset()

    def with_data(self, other: ExamsInData) -> ExamsInData:
        """Return what is known of these data and others together."""
        return ExamsInData(self.checked & other.checked, self.found | other.found)

    @property
    def clean(self) -> frozenset[str]:
        """Return the ids of the items that are not in the data."""
        return self.checked - self.found

    def as_files(self) -> dict[str, bytes]:
        """Return the file in which a folder of shards or a checkpoint keeps this."""
        return {EXAMS_FILE: json.dumps({"checked": sorted(self.checked), "found": sorted(self.found)}, indent=0).encode()}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], name: str = EXAMS_FILE) -> ExamsInData:
        """Return what the file of a checkpoint says, or nothing if there is no such file; raises UserError when it is damaged."""
        try:
            lists = json.loads(files.get(EXAMS_FILE, '{"checked": [], "found": []}'))
            return cls(frozenset(lists["checked"]), frozenset(lists["found"]))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{name} is damaged; prepare the data again.") from None


def read_exams_in_data(folder: Path) -> ExamsInData:
    """Return what is known of a folder of shards; nothing while it is being prepared."""
    file = folder / EXAMS_FILE
    return ExamsInData.from_files({EXAMS_FILE: file.read_bytes()} if file.is_file() else {}, str(file))


def refuse_unchecked(folder: Path) -> None:
    """Raise UserError when some source of a folder of shards was not cleaned of exam questions."""
    for name, source in read_data_manifest(folder)["sources"].items():
        clean = source["content"]["options"].get("clean") or {}
        if not clean.get("exams") or clean["exam_questions"] != "drop":
            raise UserError(
                f"The recipe claims no_benchmark_contamination, but the source {name} in {folder} was prepared without dropping "
                "exam questions: prepare it with clean.exams, or leave the claim out."
            )


def look_through(cleaners: Mapping[Path, Cleaner | None]) -> ExamsInData:
    """Return which exam items were looked for and found in finished sources, which are given by their folders."""
    sources = []
    for folder, clean in cleaners.items():
        checked = frozenset(clean.index.ids).difference(clean.index.too_short) if clean and clean.exams else frozenset()
        sources.append(ExamsInData(checked, frozenset(read_journal(folder).exam_items)))
    return reduce(ExamsInData.with_data, sources)
