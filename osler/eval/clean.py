"""The clean subset of an exam: the questions that were looked for in the model's data and not found there."""

import logging
from collections.abc import Iterator, Set
from dataclasses import replace

from osler.data.exams import ExamsInData
from osler.eval.score import ScoredExam, summarise

logger = logging.getLogger(__name__)

CLEAN = ", clean"  # marks the score on questions that were looked for in the model's data and not found


def tell_checked(split: str, ids: Set[str], known: ExamsInData) -> None:
    """Say how many questions of an exam were looked for in the model's data, and how many were found."""
    checked, found = len(ids & known.checked), len(ids & known.found)
    if checked:
        subset = f' "{split}{CLEAN}" is the score on those that were not.' if found and ids & known.clean else ""
        logger.info(
            f"{split}: {checked:,} of its {len(ids):,} questions were looked for in the model's data. {found:,} were found "
            f"there, or in documents that were dropped.{subset}"
        )


def clean_subset(score: ScoredExam, known: ExamsInData) -> Iterator[ScoredExam]:
    """Yield the score on the questions that were looked for in the model's data and not found, if others were found."""
    clean = [result for result in score.results if result.item.id in known.clean]
    if clean and any(result.item.id in known.found for result in score.results):
        subset = summarise(clean, max_seq_len=int(score.max_seq_len))
        split = f"{score.split}{CLEAN}"
        yield replace(subset, split=split, method=score.method, settings=score.settings, is_kept=score.is_kept)
