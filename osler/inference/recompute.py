"""The plain sampling loop, which runs the whole prefix through the model again for every token: slow, and obviously right.

It draws what ``engine.py`` draws. Prompts are padded on the right, where causal attention never looks. Shapes: B rows, T tokens,
V vocabulary.
"""

from collections.abc import Sequence

import torch

from osler.inference.engine import Rollout, check_prompts
from osler.model.transformer import Transformer
from osler.ops.sampling import pack_mask, row_uniform, sample
from osler.ops.sampling_params import SamplingParams


@torch.inference_mode()
def generate_by_recompute(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    *,
    samples_per_prompt: int = 1,
    first_row: int = 0,
) -> Rollout:
    """Sample ``samples_per_prompt`` completions of every prompt, recomputing every prefix."""
    check_prompts(model.config, prompts, sampling)
    device = next(model.parameters()).device
    rows = [list(prompt) for prompt in prompts for _ in range(samples_per_prompt)]
    starts = [len(row) for row in rows]
    logprobs: list[list[float]] = [[] for _ in rows]
    masks: list[list[torch.Tensor]] = [[] for _ in rows]
    finished = [False] * len(rows)
    row_B = torch.arange(len(rows), device=device)
    for _ in range(sampling.max_new_tokens):
        if all(finished):
            break
        width = max(len(row) for row in rows)
        ids_BT = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        length_B = torch.tensor([len(row) for row in rows], device=device)
        logits_BV = model.logits(model(ids_BT)[row_B, length_B - 1])
        u_B = row_uniform(sampling.seed, first_row + row_B, length_B)
        token_B, logp_B, mask_BV = sample(logits_BV, u_B, sampling)
        for index, (token, logp) in enumerate(zip(token_B.tolist(), logp_B.tolist(), strict=True)):
            if finished[index]:
                continue
            rows[index].append(token)
            logprobs[index].append(logp)
            finished[index] = token in sampling.stop_ids
            if mask_BV is not None:
                masks[index].append(pack_mask(mask_BV[index]).cpu())
    completions = [row[start:] for row, start in zip(rows, starts, strict=True)]
    return Rollout(completions, logprobs, finished, [torch.stack(each) for each in masks] if masks and masks[0] else None)
