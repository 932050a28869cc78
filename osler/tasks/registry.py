"""The exams that Osler knows: one table from a task's config class to its loader."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any

from osler.config.schema import TAGGED
from osler.files.find import ROW_ENDINGS, find_files
from osler.tasks import clinic, gsm8k, medmcqa, medqa, pubmedqa
from osler.tasks.item import ExamItem

logger = logging.getLogger(__name__)

TaskConfig = Annotated[
    clinic.ClinicTask | medqa.MedqaTask | medmcqa.MedmcqaTask | pubmedqa.PubmedqaTask | gsm8k.Gsm8kTask, TAGGED
]

TASKS: dict[type, Callable[..., list[ExamItem]]] = {
    clinic.ClinicTask: clinic.load,
    medqa.MedqaTask: medqa.load,
    medmcqa.MedmcqaTask: medmcqa.load,
    pubmedqa.PubmedqaTask: pubmedqa.load,
    gsm8k.Gsm8kTask: gsm8k.load,
}

TASK_CONFIGS: dict[str, type] = {cls.type: cls for cls in TASKS}  # type: ignore[attr-defined]  # every task config has the tag


def check_task(config: Any, key: str) -> None:
    """Raise UserError when the files of an exam do not exist; ``key`` is the path of the task in the run's config."""
    if hasattr(config, "path"):
        find_files(config.path, ROW_ENDINGS, key=f"{key}.path")


def load_task(config: Any) -> list[ExamItem]:
    """Return the items that a task config describes (one of ``TaskConfig``), and report how many have unusual options."""
    arguments = {field.name: getattr(config, field.name) for field in fields(config) if field.name != "type"}
    items = TASKS[type(config)](**arguments)
    name = getattr(config, "path", config.type)
    if pointing := sum(item.keeps_order for item in items):
        logger.info(
            f'{name}: {pointing:,} of {len(items):,} questions have options that point at others, such as "All of the above"; '
            "their options are always shown in the order of the file."
        )
    if repeating := sum(item.repeats_an_option for item in items):
        logger.info(f"{name}: {repeating:,} of {len(items):,} questions have an option twice; where it is right, either counts.")
    return items
