"""The exams Osler knows: one table from a task's config class to its loader, in plain sight."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any

from osler.config import TAGGED
from osler.tasks import clinic, gsm8k, medmcqa, medqa, pubmedqa
from osler.tasks.item import ExamItem
from osler.tasks.rows import check_file

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
    """Raise UserError when the exam's file is not there; ``key`` is the path of the task in the run's config."""
    if hasattr(config, "path"):
        check_file(config.path, f"{key}.path")


def load_task(config: Any) -> list[ExamItem]:
    """The items that a task config describes (one of ``TaskConfig``); how many of them have unusual options is said."""
    arguments = {field.name: getattr(config, field.name) for field in fields(config) if field.name != "type"}
    items = TASKS[type(config)](**arguments)
    name = getattr(config, "path", config.type)
    if fixed := sum(item.keeps_order for item in items):
        logger.info(f"{name}: {fixed:,} of {len(items):,} questions have options that point at others, as \"All of the above\"; "
            "they are always shown in the order of the file.")  # fmt: skip
    if twins := sum(item.repeats_an_option for item in items):
        logger.info(
            f"{name}: {twins:,} of {len(items):,} questions have the same option twice; where it is right, either counts."
        )
    return items
