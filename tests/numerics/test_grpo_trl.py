"""The GRPO loss beside TRL's on the same log-probabilities, for every option both have."""

import types
from collections import defaultdict

import pytest
import torch

from osler.rl.config import AlgorithmConfig, ClipConfig
from osler.rl.loss import LossInputs, group_advantages, grpo_loss, loss_metrics, token_weights

ROWS, WIDTH, MAX_NEW_TOKENS = 8, 6, 10
LOSS_TYPE = {"sequence_mean": "grpo", "token_mean": "bnpo", "constant": "dr_grpo"}

OPTIONS = [
    AlgorithmConfig(beta=0.0),
    AlgorithmConfig(beta=0.05, kl="unbiased"),
    AlgorithmConfig(beta=0.05, kl="k3"),
    AlgorithmConfig(beta=0.05, kl="k3", ratio="sequence"),
    AlgorithmConfig(beta=0.05, kl="unbiased", aggregate="token_mean", clip=ClipConfig(low=0.2, high=0.28)),
    AlgorithmConfig(beta=0.0, aggregate="constant", advantage="mean_std"),
    AlgorithmConfig(beta=0.05, kl="unbiased", opsm_delta=0.1),
    AlgorithmConfig(beta=0.05, kl="k3", ratio="sequence", aggregate="token_mean", opsm_delta=0.1),
]


class Accelerator:
    """One process: what TRL's loss asks of its accelerator while it computes metrics."""

    num_processes = 1

    def reduce(self, tensor, reduction="sum"):
        return tensor

    def gather(self, tensor):
        return tensor


def bare_trainer(trl_trainer, algorithm, logp):
    """TRL's trainer with just the attributes its loss reads; given log-probabilities replace the model's forward."""
    trainer = trl_trainer.__new__(trl_trainer)
    trainer.model = types.SimpleNamespace(training=True)
    trainer.accelerator = Accelerator()
    trainer.beta = algorithm.beta
    trainer.loss_type = LOSS_TYPE[algorithm.aggregate]
    trainer.importance_sampling_level = algorithm.ratio
    trainer.epsilon_low, trainer.epsilon_high = algorithm.clip.low, algorithm.clip.high
    trainer.off_policy_mask_threshold = algorithm.opsm_delta
    trainer.max_completion_length = MAX_NEW_TOKENS
    trainer.current_gradient_accumulation_steps = 1
    trainer.top_entropy_quantile = 1.0
    trainer.aux_loss_enabled = trainer.use_vllm = trainer._entropy_bonus_enabled = False
    trainer.args = types.SimpleNamespace(delta=None, use_bias_correction_kl=algorithm.kl == "unbiased")
    trainer._metrics = {"train": defaultdict(list)}
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logp, torch.zeros_like(logp), None)
    return trainer


@pytest.mark.parametrize("algorithm", OPTIONS, ids=lambda a: f"{a.aggregate}-{a.ratio}-{a.kl}-{a.beta}-{a.opsm_delta}")
@pytest.mark.parametrize("seed", [0, 1])
def test_parity_with_trl(algorithm, seed):
    trl_trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, WIDTH + 1, (ROWS,), generator=generator)
    mask = torch.arange(WIDTH)[None] < lengths[:, None]
    old = -noise(ROWS, WIDTH).abs() - 0.05
    logp = old + 0.4 * noise(ROWS, WIDTH)
    ref = old + 0.4 * noise(ROWS, WIDTH)
    rewards = torch.rand(ROWS // 4, 4, generator=generator, dtype=torch.float64)
    advantages = group_advantages(rewards, algorithm.advantage).flatten()

    ours_logp = logp.clone().requires_grad_()
    weight = token_weights(mask, algorithm.aggregate, max_new_tokens=MAX_NEW_TOKENS, dtype=torch.float64)
    ours, sums = grpo_loss(LossInputs(ours_logp, old, ref, mask, advantages, weight), algorithm)

    theirs_logp = logp.clone().requires_grad_()
    trainer = bare_trainer(trl_trainer, algorithm, theirs_logp)
    ids = torch.zeros(ROWS, WIDTH, dtype=torch.int64)
    theirs = trainer._compute_loss(
        trainer.model,
        {
            "prompt_ids": ids[:, :2],
            "prompt_mask": torch.ones_like(ids[:, :2]),
            "completion_ids": ids,
            "completion_mask": mask.to(torch.int64),
            "advantages": advantages,
            "old_per_token_logps": old,
            "ref_per_token_logps": ref,
        },
    )
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    gradients = torch.autograd.grad(ours, ours_logp)[0], torch.autograd.grad(theirs, theirs_logp)[0]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)

    metrics, logged = loss_metrics(sums), trainer._metrics["train"]
    if algorithm.beta > 0:
        assert metrics["kl"].item() == pytest.approx(logged["kl"][0], abs=1e-6)
    if algorithm.ratio == "token":  # at the sequence level TRL averages rows and Osler tokens
        for name in ("clip_ratio/low_mean", "clip_ratio/high_mean"):
            assert metrics[name].item() == pytest.approx(logged[name][0], abs=1e-6)
