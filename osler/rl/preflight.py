"""GRPO's preflight: what the policy writes before anything is learned, and whether there is anything to learn from.

The policy answers the questions of the first step once ahead of it, at the run's own sampling settings. A draw belongs to (seed,
row, position), so the first step draws the same completions again, and a run is the same with and without its preflight. That
comes before the run takes its folder, so a start which is refused can be mended in the same place.

Why refuse: a model that never saw the template earns nothing, every advantage is zero, and the run would go through its time
without an error and without learning.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict

from osler.eval.exams import mark
from osler.records import jsonl
from osler.rl.config import GrpoConfig
from osler.rl.rollout import Group, Sample
from osler.runtime.errors import UserError
from osler.tasks.item import render_answer, render_question
from osler.tokenizer.bpe import ANSWER

logger = logging.getLogger(__name__)

SAMPLES_SHOWN = 4
MOST_CUT = 0.9  # above this share of cut completions the model does not end by itself


def preflight(groups: Sequence[Group], config: GrpoConfig) -> str:
    """Show the answers to the first step's questions and refuse a hopeless start. Return the lines of the samples file.

    Raises UserError, on every rank, when no completion earned a reward and none keeps to the template with an answer that can be
    read. (A model that draws at random hits a marker and a letter now and then, and hardly ever all of the template.)
    """
    shown = [(group, group.samples[0]) for group in groups[:SAMPLES_SHOWN]]
    shown += [(groups[0], sample) for sample in groups[0].samples[1 : 1 + SAMPLES_SHOWN - len(shown)]]
    for number, (group, sample) in enumerate(shown, start=1):
        logger.info(f"Sample {number} before training: {render_question(group.prompt.item)}")
        logger.info(f"  thinking: {sample.completion.thinking or '(none)'}")
        logger.info(f"  answer:   {sample.completion.answer or '(none)'}")
        logger.info(f"  right:    {render_answer(group.prompt.item)}   (reward {sample.reward:g})")
    samples = [sample for group in groups for sample in group.samples]
    count, effective = len(samples), sum(group.effective for group in groups)
    right = [sum(sample.reading.right for sample in group.samples) for group in groups]
    readable, cut = sum(sample.reading.readable for sample in samples), sum(not sample.completion.finished for sample in samples)
    logger.info(
        f"Before training: pass@1 {sum(right) / count:.3f}, pass@{len(groups[0].samples)} "
        f"{sum(map(bool, right)) / len(groups):.3f} over {len(groups)} questions; {readable / count:.0%} of the answers can be "
        f"read, {cut / count:.0%} of the completions were cut; {effective} of {len(groups)} groups teach something."
    )
    if all(sample.reward <= 0.0 for sample in samples):
        if any(sample.completion.well_formed and sample.reading.readable for sample in samples):
            logger.warning(
                f"none of the {count} completions before training earned a reward, although some keep to the "
                "template. GRPO learns nothing until one does: take easier questions, more algorithm.samples_per_prompt, or "
                "train the model longer on examples first."
            )
        elif config.preflight == "refuse":
            raise UserError(refusal(samples, cut, config))
        else:
            logger.warning(refusal(samples, cut, config))
    elif not effective:
        cause = (
            "all of them are right: take harder questions"
            if sum(right) == count
            else "the samples of each question are alike: take more algorithm.samples_per_prompt, or other questions"
        )
        logger.warning(
            f"no question has samples with different rewards before training, so GRPO learns nothing from them; {cause}, or let "
            "algorithm.dynamic_sampling=true look for others."
        )
    results = (mark(group.prompt.item, sample.completion) for group, sample in shown)
    return "".join(jsonl.to_line(asdict(result.sample("grpo step 0"))) for result in results)


def refusal(samples: Sequence[Sample], cut: int, config: GrpoConfig) -> str:
    """Why nothing can be learned from completions of which none earned a reward or kept to the template, and what to do."""
    count, limit = len(samples), config.algorithm.max_new_tokens
    answered = sum(sample.completion.answer is not None for sample in samples)
    if cut > MOST_CUT * count:
        cause = f"The model never ends: either it was not taught to, or algorithm.max_new_tokens={limit} is too small for it."
    elif answered < (1 - MOST_CUT) * count:
        cause = f"The model does not write the template, in which {ANSWER} stands between reasoning and answer: it never saw it."
    else:
        cause = "The model ends and writes the template, but its answers name no option, or no number where one is asked for."
    start = config.init_from
    return (
        f"GRPO would learn nothing from {start}: of {count} completions before training none earned a reward or kept to the "
        f"template with an answer that can be read; {cut} were cut at {limit} tokens, {answered} have an {ANSWER}. {cause} Teach "
        f"it the format first: `osler sft usmle-2day/format init_from={start} --run NEW_FOLDER` (a smaller model: without the "
        "recipe's name) does so with the built-in clinic, or with data.type=turns on questions of your own; then start from "
        "there with init_from=NEW_FOLDER. To start all the same: preflight=warn."
    )
