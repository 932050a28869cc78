"""What every logged number means and costs: one table, name -> (unit, meaning, cost), which `osler metrics` prints.

A name in angle brackets stands for letters, digits, `_`, `-` and `.`: `eval/<split>_accuracy` declares `eval/test_accuracy`. The
names for reinforcement learning are TRL's where it has one. The report takes units and captions from here. Fractions are 0 to 1.
"""

import re
from typing import NamedTuple

from osler.runtime import format as fmt
from osler.runtime.errors import UserError

FREE = "free"  # training knows it anyway
BASIC = "basic"  # marks in the stream, clocks and counters of the host
GRADIENTS = "full: gradients"  # a pass over the gradients, in the steps that probe the model
WEIGHTS = "full: weights"  # a pass over the weights, and for updates a copy of them
FORWARD = "full: forward"  # a forward pass of at most 2,048 tokens of the batch
CLOCK = "full: clock"  # a mark before and after
EVALUATION = "evaluation"  # an evaluation that the recipe asks for


class Metric(NamedTuple):
    """One row of the table: the unit, the meaning and the cost of a value. The cost `full: ...` needs the level `full`."""

    unit: str
    meaning: str
    cost: str = FREE


METRICS: dict[str, Metric] = {
    # training: pretraining, mid-training, supervised fine-tuning
    "train/loss": Metric("nats/token", "mean cross-entropy of the learned tokens of the steps since the previous line"),
    "train/perplexity": Metric("choices", "exp(loss): among how many equally likely tokens the model seems to choose"),
    "train/bits_per_byte": Metric("bits/byte", "training loss per byte of text, by the data's mean bytes per token"),
    "train/token_accuracy": Metric("fraction", "learned tokens that the model found likeliest beforehand", FORWARD),
    "train/entropy": Metric("nats/token", "how undecided the model is about a learned token", FORWARD),
    "train/label_probability": Metric("fraction", "mean probability that the model gives the right token", FORWARD),
    "train/top_probability": Metric("fraction", "mean probability of the likeliest token, right or not: confidence", FORWARD),
    "train/lr": Metric("per step", "learning rate of the first parameter group"),
    "train/grad_norm": Metric("norm", "length of the newest gradient before clipping; GRPO: mean of the step's updates"),
    "train/skipped_steps": Metric("steps", "updates skipped since the previous line, because the gradient was not finite"),
    "train/unlearned_steps": Metric("steps", "steps since the previous line without a token to learn; they count nowhere else"),
    "train/stage": Metric("number", "stage of the curriculum, counted from 1"),
    "train/seq_len": Metric("tokens", "length of the rows of this stage"),
    "train/batch_tokens": Metric("tokens", "tokens in one optimizer step of this stage"),
    "index/kl": Metric("nats/token", "distance of a sparse index from attention to the keys it is compared over, mean of layers"),
    "index/recall": Metric("fraction", "share of attention that falls on the chosen keys; by chance about top_k / keys"),
    "index/entropy": Metric("nats", "entropy of the index over the keys that it is compared over"),
    "index/distance": Metric("tokens", "how many tokens back these keys are on average"),
    "distill/kl": Metric("nats/token", "distance of the model from its teacher, KL(teacher || model) at teacher.temperature"),
    # gradients, before clipping
    "grad/norm_max": Metric("norm", "largest gradient norm of the steps since the previous line"),
    "grad/clipped_frac": Metric("fraction", "steps since the previous line whose gradient was longer than clip_norm"),
    "grad/norm/<part>": Metric("norm", "length of the gradient of one layer, or of embed, values, norm or head", GRADIENTS),
    "grad/mean": Metric("gradient", "mean over all elements of the gradient", GRADIENTS),
    "grad/std": Metric("gradient", "standard deviation over all elements of the gradient", GRADIENTS),
    "grad/max_abs": Metric("gradient", "largest element of the gradient by size", GRADIENTS),
    "grad/zero_frac": Metric("fraction", "elements of the gradient that are zero, rows of tokens not seen included", GRADIENTS),
    "grad/nonfinite_frac": Metric("fraction", "elements of the gradient that are infinite or no number", GRADIENTS),
    "update/ratio": Metric("ratio", "length of one update over that of the weights before it", WEIGHTS),
    "update/part_ratio/<part>": Metric("ratio", "update over weights of one layer, or of embed, values, norm, head", WEIGHTS),
    # the model's health
    "model/weight_norm/<part>": Metric("norm", "length of the weights of one layer, or of embed, values, norm or head", WEIGHTS),
    "model/effective_rank/<matrix>": Metric("directions", "directions that share a matrix's energy, (Σs²)² / Σs⁴", WEIGHTS),
    "model/activation_rms/<layer>": Metric("rms", "size of the residual stream after a layer", FORWARD),
    "model/activation_outlier/<layer>": Metric("ratio", "largest activation after a layer over the rms", FORWARD),
    "model/attention_entropy/<layer>": Metric("nats", "how widely a layer's heads look; near 0 each sees one token", FORWARD),
    "model/dead_units_frac/<layer>": Metric("fraction", "feed-forward units that no token moves by 1 % of the rms", FORWARD),
    "model/logit_max": Metric("logit", "largest logit; steady growth is the start of many a divergence", FORWARD),
    # the data
    "data/epoch": Metric("epochs", "how often the training data have been gone through"),
    "data/padding_frac": Metric("fraction", "places in the rows since the previous line that hold no token"),
    "data/tokens/<source>": Metric("tokens", "tokens of one source gone through so far; GRPO: of answers to one task"),
    "data/epoch/<source>": Metric("epochs", "how often one source has been gone through"),
    "data/target_frac/<source>": Metric("fraction", "share of the tokens (GRPO: questions) that a source is to have"),
    "data/consumed_frac/<source>": Metric("fraction", "share of the tokens (GRPO: questions) that a source has had"),
    # evaluation: never trained on
    "eval/loss": Metric("nats/token", "mean cross-entropy on held-out text, of all validation sets together", EVALUATION),
    "eval/train_gap": Metric("nats/token", "held-out loss minus the training loss of the previous line", EVALUATION),
    "eval/bits_per_byte": Metric("bits/byte", "held-out loss per byte of text, comparable across tokenizers", EVALUATION),
    "eval/token_accuracy": Metric("fraction", "held-out tokens that the model found likeliest", EVALUATION),
    "eval/<set>/loss": Metric("nats/token", "mean cross-entropy on one validation set", EVALUATION),
    "eval/<set>/bits_per_byte": Metric("bits/byte", "loss on one validation set per byte of text", EVALUATION),
    "eval/<set>/token_accuracy": Metric("fraction", "tokens of one validation set that the model found likeliest", EVALUATION),
    "eval/<split>_accuracy": Metric("fraction", "exam questions of the split answered correctly", EVALUATION),
    "eval/<split>_unparsed_frac": Metric("fraction", "exam answers of the split without a readable letter", EVALUATION),
    "eval/seconds": Metric("s", "time this evaluation took", EVALUATION),
    # speed and memory
    "perf/tokens_per_second": Metric("tokens/s", "training tokens through the optimizer, all devices together"),
    "perf/mfu": Metric("fraction", "share of the GPUs' peak arithmetic in use, a teacher's included, where the peak is known"),
    "perf/eta_seconds": Metric("s", "time left at this speed, evaluations and checkpoints not counted"),
    "perf/data_ms": Metric("ms", "wait for the batch, per step", BASIC),
    "perf/forward_ms": Metric("ms", "forward passes, per step", BASIC),
    "perf/backward_ms": Metric("ms", "backward passes, per step, the exchange of gradients included", BASIC),
    "perf/optimizer_ms": Metric("ms", "clipping and update, per step", BASIC),
    "perf/monitor_ms": Metric("ms", "probing the model, spread over the steps since the previous line", CLOCK),
    "perf/other_cpus": Metric("CPUs", "kept busy on average by everything else on rank 0's CPUs, other ranks included", BASIC),
    "perf/memory_allocated_bytes": Metric("bytes", "held by tensors on rank 0's GPU", BASIC),
    "perf/memory_reserved_bytes": Metric("bytes", "taken from rank 0's GPU, held by tensors or kept for them", BASIC),
    "perf/memory_resident_bytes": Metric("bytes", "memory of rank 0's process without mapped files, on a CPU", BASIC),
    "perf/memory_peak_bytes": Metric("bytes", "peak on rank 0's GPU, or on a CPU of its process with mapped files", BASIC),
    "perf/step_seconds": Metric("s", "wall time of one optimizer step"),
    "perf/rollout_tokens_per_second": Metric("tokens/s", "completion tokens sampled per second of sampling"),
    "perf/train_tokens_per_second": Metric("tokens/s", "tokens trained on per second of training, sampling excluded"),
    "perf/rollout_frac": Metric("fraction", "share of the step's time spent sampling"),
    # reinforcement learning (GRPO), TRL's names
    "loss": Metric("objective", "GRPO loss, of steps with something to learn; its level means little, its trend less"),
    "loss/drift": Metric("objective", "GRPO loss beyond that of the policy that drew the samples; its jumps are told as spikes"),
    "reward": Metric("reward", "mean total reward of the batch's completions"),
    "reward_std": Metric("reward", "spread of the reward inside a group, averaged over groups"),
    "frac_reward_zero_std": Metric("fraction", "groups whose rewards are all equal, which teach nothing"),
    "rewards/<name>/mean": Metric("reward", "mean of one reward function"),
    "rewards/<name>/std": Metric("reward", "spread of one reward function"),
    "kl": Metric("nats/token", "distance of the policy from the frozen reference"),
    "entropy": Metric("nats/token", "how undecided the policy is about the next token"),
    "clip_ratio/low_mean": Metric("fraction", "tokens clipped at the lower bound of the probability ratio"),
    "clip_ratio/high_mean": Metric("fraction", "tokens clipped at the upper bound of the probability ratio"),
    "completions/mean_length": Metric("tokens", "mean length of a completion"),
    "completions/min_length": Metric("tokens", "shortest completion of the batch"),
    "completions/max_length": Metric("tokens", "longest completion of the batch"),
    "completions/clipped_ratio": Metric("fraction", "completions cut at the length limit before they ended"),
    "sampling/sampling_logp_difference/mean": Metric("nats", "gap between sampler's and trainer's log-prob, mean"),
    "sampling/sampling_logp_difference/max": Metric("nats", "gap between sampler's and trainer's log-prob, largest"),
    # reinforcement learning, ours
    "opsm/updates": Metric("updates", "optimizer updates on the batch, until max_masked_frac or target_kl ended them"),
    "opsm/masked_frac": Metric("fraction", "completions whose surrogate the off-policy sequence mask removed"),
    "approx_kl": Metric("nats/token", "distance of the policy that drew the samples from the policy as it is; never negative"),
    "opsm/seq_kl_mean": Metric("nats/token", "mean over completions of old minus current log-prob"),
    "groups/effective": Metric("groups", "groups of the batch whose rewards differ, so that they teach"),
    "groups/resting": Metric("questions", "questions that are left out for a while, because their samples all earned the same"),
    "filters/<name>_frac": Metric("fraction", "completions that the named sample-quality filter caught"),
    "answer/letter_<X>_frac": Metric("fraction", "readable answers that chose this letter"),
    "answer/format_ok": Metric("fraction", "completions with a readable answer"),
    "answer/correct_frac": Metric("fraction", "completions with the right answer"),
    "tasks/<name>/reward": Metric("reward", "mean total reward on one task"),
    "tasks/<name>/correct_frac": Metric("fraction", "completions on one task with the right answer"),
}

_PATTERNS = {name: re.compile(re.sub(r"<\w+>", r"[\\w.\\-]+", name)) for name in METRICS if "<" in name}


def declared_name(name: str) -> str | None:
    """Return the name of the `METRICS` row that declares a metric, which may be a pattern, or None."""
    if name in METRICS:
        return name
    return next((row for row, pattern in _PATTERNS.items() if pattern.fullmatch(name)), None)


def describe(name: str) -> Metric | None:
    """Return the declaration of a metric as it appears in a log, or None when there is none."""
    return METRICS.get(declared_name(name) or "")


def table(word: str = "") -> str:
    """Return a line for each metric whose name or meaning has a word: name, unit, cost, meaning."""
    found = {name: metric for name, metric in METRICS.items() if word.lower() in f"{name} {metric.meaning}".lower()}
    if not found:
        raise UserError(f"No metric has `{word}` in its name or meaning; `osler metrics` lists all {len(METRICS)}.")
    return fmt.table([(name, metric.unit, metric.cost, metric.meaning) for name, metric in found.items()], left=4)
