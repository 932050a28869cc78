"""What verl is given: rows, reward, options. (The options were compared with verl's own configuration by hand.)"""

from __future__ import annotations

import shlex

import pyarrow.parquet as pq

from osler.cli.main import main
from osler.config.schema import decode
from osler.inference.load import load_model
from osler.rl.config import GrpoConfig
from osler.rl.rollout import step_prompts
from osler.rl.run import load_tasks
from osler.rl.verl import compute_score, verl_options, without_counterpart
from osler.tasks.item import render_question


def test_verl_is_given_the_questions_of_every_step_and_their_rewards(runs, tmp_path, capsys):
    tasks = "tasks=[{task: {type: clinic, split: train, limit: 60}, rewards: {correct: 1.0, format: 0.5}}]"
    fields = [f"init_from={runs.sft}", "steps=3", "algorithm.max_new_tokens=32", "eval_task.limit=5", tasks]
    assert main(["verl", *fields, "--out", str(tmp_path / "verl")]) == 0
    rows = pq.read_table(tmp_path / "verl" / "train.parquet").to_pylist()
    config = decode(GrpoConfig, {"init_from": str(runs.sft), "tasks": [{"task": {"split": "train", "limit": 60}}]})
    tasks = load_tasks(config, load_model(runs.sft))
    asked = [prompt for step in range(3) for prompt in step_prompts(tasks, 0, step, 8)]
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": render_question(prompt.item)}] for prompt in asked]
    assert pq.read_table(tmp_path / "verl" / "validation.parquet").num_rows == 5

    scope: dict = {}
    exec((tmp_path / "verl" / "reward.py").read_text(), scope)
    row = rows[0]
    given = {"data_source": "clinic", "ground_truth": row["reward_model"]["ground_truth"], "extra_info": row["extra_info"]}
    right = f"because<|answer|>{given['ground_truth']}"
    assert scope["compute_score"](solution_str=right, **given) == 1.5
    assert compute_score(solution_str=f"<|answer|>{given['ground_truth']}", **given) == 1.0, "nothing was thought"
    assert compute_score(solution_str="because", **given) == 0.0

    script = (tmp_path / "verl" / "run.sh").read_text()
    words = shlex.split(script[script.index("exec") :])
    options = dict(word.split("=", 1) for word in words if "=" in word)
    assert options["data.max_response_length"] == "32" and options["actor_rollout_ref.rollout.n"] == "8"
    assert options["algorithm.norm_adv_by_std_in_grpo"] == "False" and options["actor_rollout_ref.rollout.top_k"] == "-1"
    assert "# verl has no counterpart of algorithm.quality" in script and "algorithm.quality" in capsys.readouterr().out
    assert main(["verl", *fields, "eval_task.split=train", "--out", str(tmp_path / "both")]) == 2
    assert "are also in eval_task" in capsys.readouterr().err and not (tmp_path / "both").exists()


def test_options_without_a_counterpart_are_named(tmp_path):
    algorithm = {
        "opsm_delta": 0.1, "overlong": "mask", "kl": "k3", "quality": {"action": "off"}, "aggregate": "token_mean",
        "advantage": "leave_one_out", "ratio": "sequence",
    }  # fmt: skip
    sections = {"algorithm": algorithm, "schedule": {"type": "linear"}}
    sections["optim"] = {"type": "muon", "weight_decay_schedule": {"type": "linear"}}
    config = decode(GrpoConfig, {"init_from": "x", **sections})
    lost = without_counterpart(config)
    assert [words.split(":")[0] for words in lost] == [
        "algorithm.opsm_delta", "algorithm.overlong", "optim.type=muon", "optim.weight_decay_schedule", "schedule.type=linear"
    ]  # fmt: skip
    options = verl_options(config, tmp_path, 256)
    assert options["algorithm.adv_estimator"] == "rloo" and options["actor_rollout_ref.actor.policy_loss.loss_mode"] == "gspo"
    assert options["actor_rollout_ref.actor.loss_agg_mode"] == "token-mean" and options["data.max_prompt_length"] == 128
    plain = {"quality": {"action": "off"}, "kl": "k2"}
    assert without_counterpart(decode(GrpoConfig, {"init_from": "x", "algorithm": plain})) == []
