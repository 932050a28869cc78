"""The clinic as a task: conversion keeps what the clinic made."""

from __future__ import annotations

from osler.clinic.exam import exam
from osler.tasks.answers import read_choice
from osler.tasks.clinic import ClinicTask, load
from osler.tasks.item import render_answer, render_question
from osler.tasks.registry import load_task


def test_clinic_items_keep_question_options_answer_and_reasoning() -> None:
    made, items = exam(3, "new_findings", 40), load(split="new_findings", limit=40, seed=3)
    assert len(items) == len({item.id for item in items}) == 40
    for clinic, item in zip(made, items, strict=True):
        assert (item.question, item.options, item.answer_index) == (clinic.question, clinic.options, clinic.answer_index)
        assert item.thinking == clinic.thinking and item.split == "new_findings"
        assert item.group == f"{clinic.relation}/{clinic.condition}"
        assert all(f"{option} (" in render_question(item) for option in item.options)
        assert read_choice(render_answer(item), item.options) == item.answer_index


def test_the_config_and_the_function_agree() -> None:
    assert load_task(ClinicTask(split="validation", limit=5, seed=9)) == load(split="validation", limit=5, seed=9)


def test_the_drill_split_is_made_of_drills() -> None:
    items = load(split="drill", limit=20, seed=3)
    assert len(items) == 20 and all(item.split == "drill" and item.options[item.answer_index] in item.question for item in items)
