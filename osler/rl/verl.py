"""The same GRPO for verl (https://verl.readthedocs.io), for those who outgrow one machine: model, questions, reward and options.

The folder holds the model as Hugging Face's Qwen3, ``train.parquet`` with a row for each question as this run would ask it, step
after step, ``validation.parquet``, ``reward.py``, and ``run.sh`` with the options under verl's names (those of its version 0.8).
What has no counterpart there is named in ``run.sh`` and on the terminal.
"""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from osler.config.recipe import load_recipe, override
from osler.config.schema import decode
from osler.export.run import run as write_model
from osler.inference.load import load_model, load_start
from osler.optim.config import AdamWConfig
from osler.optim.schedule import ConstantConfig, ConstantWeightDecay, CosineConfig, warmup_of
from osler.rl.config import GrpoConfig
from osler.rl.rollout import Prompt, RlTask, step_prompts
from osler.rl.run import check_held_out, check_start, load_exam, load_tasks
from osler.runtime.files import write_atomic
from osler.tasks.item import ExamItem, render_answer, render_question
from osler.tasks.rewards import reward_of
from osler.tokenizer.bpe import ANSWER
from osler.tokenizer.chat import Completion

REWARD_FILE = "from osler.rl.verl import compute_score  # noqa: F401 - verl looks for it in this file\n"
ADVANTAGES = {"mean": "grpo", "mean_std": "grpo", "leave_one_out": "rloo"}
AGGREGATES = {"sequence_mean": "seq-mean-token-mean", "token_mean": "token-mean", "constant": "seq-mean-token-sum-norm"}
KLS = {"unbiased": "k2", "k3": "k3", "k2": "k2", "k1": "k1"}  # k2 too has the right gradient on the policy's own samples
OFF = {  # options that verl does not have, with the values that switch them off
    "opsm_delta": None, "reference_refresh_steps": None, "dynamic_sampling": False, "overlong": "keep",
    "beta_schedule": ConstantConfig(), "most_rested_epochs": 0, "target_kl": None,
}  # fmt: skip


def write(recipe: str | None, overrides: Sequence[str], out: str) -> int:
    """Write a folder from which verl runs the GRPO of a recipe: the command ``verl``."""
    given = load_recipe(recipe, overrides) if recipe else override({}, overrides)
    config = decode(GrpoConfig, {**given, "kind": "grpo"}, source=recipe or "")
    check_start(config)
    start = load_model(load_start(config.init_from).path)
    folder = Path(out).absolute()
    tasks = load_tasks(config, start)
    exam = load_exam(config, start)
    check_held_out(tasks, exam)
    write_model(config.init_from, str(folder / "model"))
    count, balanced = config.algorithm.prompts_per_step, config.algorithm.balanced_letters
    steps = (step_prompts(tasks, config.seed, step, count, balanced=balanced) for step in range(config.steps))
    prompts = [prompt for asked in steps for prompt in asked]
    write_rows(folder / "train.parquet", prompts, config)
    exam = exam or [prompt.item for prompt in prompts[:1]]
    validation = RlTask("validation", tuple(exam), tasks[0].rewards, reasoning=tasks[0].reasoning)
    write_rows(folder / "validation.parquet", [Prompt(validation, item) for item in exam], config)
    write_atomic(folder / "reward.py", REWARD_FILE)
    lost = without_counterpart(config)
    options = verl_options(config, folder, start.model.config.max_seq_len)
    lines = [f"{key}={shlex.quote(str(value))}" for key, value in options.items()]
    comments = [f"# verl has no counterpart of {words}" for words in lost]
    command = " \\\n  ".join(["exec python3 -m verl.trainer.main_ppo", *lines, '"$@"'])
    write_atomic(folder / "run.sh", "\n".join(["#!/bin/sh", *comments, command, ""]))
    print("\n".join([f"{folder}: start verl with `sh {folder / 'run.sh'}`", *comments]))
    return 0


def write_rows(path: Path, prompts: Sequence[Prompt], config: GrpoConfig) -> None:
    """Write questions in verl's schema; the reward finds the item and the weights of its rewards in ``extra_info``."""
    rewards = {entry.label: entry for entry in config.tasks}
    rows = [
        {
            "data_source": prompt.task.name,
            "prompt": [{"role": "user", "content": render_question(prompt.item)}],
            "ability": "exam",
            "reward_model": {"style": "rule", "ground_truth": render_answer(prompt.item)},
            "extra_info": {
                "index": index,
                "item": json.dumps({**asdict(prompt.item), "shots": ()}),
                "rewards": json.dumps(rewards.get(prompt.task.name, config.tasks[0]).rewards),
                "seconds": rewards.get(prompt.task.name, config.tasks[0]).reward_seconds,
                "reasoning": prompt.task.reasoning,
            },
        }
        for index, prompt in enumerate(prompts)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def compute_score(solution_str: str, extra_info: dict[str, Any], **_: Any) -> float:
    """Return the weighted reward of a completion. It counts as finished, because verl leaves out the end of text."""
    fields: dict[str, Any] = json.loads(extra_info["item"])
    fields |= {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    item = ExamItem(**fields)
    before, marker, after = solution_str.partition(ANSWER) if extra_info["reasoning"] else ("", ANSWER, solution_str)
    completion = Completion(before.strip(), after.strip() if marker else None, True, bool(marker) and ANSWER not in after)
    weights: dict[str, float] = json.loads(extra_info["rewards"])
    return sum(weight * _reward(name, extra_info["seconds"])(item, completion) for name, weight in weights.items())


_reward = functools.cache(reward_of)  # made once, because a function of the user's own gets a process


def verl_options(config: GrpoConfig, folder: Path, max_seq_len: int) -> dict[str, Any]:
    """Return the options of ``verl.trainer.main_ppo``."""
    algorithm, optim = config.algorithm, config.optim
    data = {
        "train_files": folder / "train.parquet",
        "val_files": folder / "validation.parquet",
        "train_batch_size": algorithm.prompts_per_step,
        "shuffle": False,
        "max_prompt_length": max_seq_len - algorithm.max_new_tokens,
        "max_response_length": algorithm.max_new_tokens,
    }
    actor = {
        "ppo_mini_batch_size": algorithm.prompts_per_step,
        "ppo_epochs": algorithm.updates_per_batch,
        "use_dynamic_bsz": True,
        "ppo_max_token_len_per_gpu": config.micro_batch_tokens,
        "clip_ratio_low": algorithm.clip.low,
        "clip_ratio_high": algorithm.clip.high,
        "clip_ratio_c": 1e6,  # no second clip of negative advantages
        "loss_agg_mode": AGGREGATES[algorithm.aggregate],
        "policy_loss.loss_mode": "gspo" if algorithm.ratio == "sequence" else "vanilla",
        "use_kl_loss": algorithm.beta > 0,
        "kl_loss_coef": algorithm.beta,
        "kl_loss_type": KLS[algorithm.kl],
        "optim.lr": optim.lr if isinstance(optim, AdamWConfig) else optim.adamw_lr,
        "optim.betas": f"[{optim.beta1},{optim.beta2}]",
        "optim.weight_decay": optim.weight_decay,
        "optim.lr_scheduler_type": "cosine" if isinstance(config.schedule, CosineConfig) else "constant",
        "optim.min_lr_ratio": getattr(config.schedule, "final_fraction", 1.0),
        "optim.lr_warmup_steps": warmup_of(config.schedule, config.budget_tokens) // config.budget_tokens_per_step,
        "optim.clip_grad": config.clip_norm,
    }
    rollout = {
        "name": "vllm",
        "n": algorithm.samples_per_prompt,
        "temperature": algorithm.temperature,
        "top_p": algorithm.top_p,
        "top_k": algorithm.top_k or -1,
        "tensor_model_parallel_size": 1,
        "calculate_log_probs": True,
    }
    trainer = {
        "total_epochs": 1,
        "test_freq": config.eval_every_steps,
        "save_freq": config.checkpoint.every_steps,
        "n_gpus_per_node": 1,
        "logger": '["console"]',
    }
    sections = {"data": data, "actor_rollout_ref.actor": actor, "actor_rollout_ref.rollout": rollout, "trainer": trainer}
    return {
        "algorithm.adv_estimator": ADVANTAGES[algorithm.advantage],
        "algorithm.norm_adv_by_std_in_grpo": algorithm.advantage == "mean_std",
        "actor_rollout_ref.model.path": folder / "model",
        "custom_reward_function.path": folder / "reward.py",
        **{f"{section}.{key}": value for section, options in sections.items() for key, value in options.items()},
        **({} if config.tasks[0].reasoning else {"+data.apply_chat_template_kwargs.reasoning": False}),
    }


def without_counterpart(config: GrpoConfig) -> list[str]:
    """Return in words which parts of a run verl does differently or not at all."""
    algorithm = config.algorithm
    words = [f"algorithm.{name}" for name, off in OFF.items() if getattr(algorithm, name) != off]
    for differs, what in (
        (algorithm.quality.action != "off", "algorithm.quality: bad samples keep their reward"),
        (algorithm.kl == "unbiased", "algorithm.kl=unbiased: k2 has its gradient in the first update on a batch"),
        (algorithm.aggregate == "constant", "algorithm.aggregate=constant: the scale of the loss differs"),
        (not isinstance(config.optim, AdamWConfig), f"optim.type={config.optim.type}: AdamW trains everything"),
        (config.optim.weight_decay_schedule != ConstantWeightDecay(), "optim.weight_decay_schedule: constant weight decay"),
        (not isinstance(config.schedule, (ConstantConfig, CosineConfig)), f"schedule.type={config.schedule.type}: constant lr"),
        (config.early_stopping_patience is not None, "early_stopping_patience"),
        (len({task.reasoning for task in config.tasks}) > 1, "tasks with and without reasoning: all are asked like the first"),
    ):
        words += [what] if differs else []
    return words
