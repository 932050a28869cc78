"""The plain sampling loop, which runs the whole prefix through the model again for every token: slow, and obviously right.

It draws what ``engine.py`` draws. Prompts are padded on the right, where causal attention never looks. Shapes: B rows, T tokens,
V vocabulary.
"""

from collections import Counter
from collections.abc import Sequence

import torch

from osler.inference.rows import Continuation, Request, check_request
from osler.model.transformer import Transformer
from osler.ops.sampling import RowSampling, pack_mask, row_uniform, sample
from osler.ops.sampling_params import SamplingParams


@torch.inference_mode()
def generate_by_recompute(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    *,
    samples_per_prompt: int = 1,
    first_row: int = 0,
) -> list[Continuation]:
    """Sample ``samples_per_prompt`` completions of every prompt, recomputing every prefix."""
    for index, prompt in enumerate(prompts):
        check_request(model.config, Request(tuple(prompt), sampling), f"Prompt {index}")
    device, vocab_size = next(model.parameters()).device, model.config.vocab_size
    rows = [list(prompt) for prompt in prompts for _ in range(samples_per_prompt)]
    parameters = RowSampling.of([sampling], vocab_size, device)
    starts = [len(row) for row in rows]
    logprobs: list[list[float]] = [[] for _ in rows]
    masks: list[list[torch.Tensor]] = [[] for _ in rows]
    alternatives: list[list[dict[int, float]]] = [[] for _ in rows]
    finished = [False] * len(rows)
    row_B = torch.arange(len(rows), device=device)
    for _ in range(sampling.max_new_tokens):
        if all(finished):
            break
        width = max(len(row) for row in rows)
        ids_BT = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        length_B = torch.tensor([len(row) for row in rows], device=device)
        hidden_BTD = model(ids_BT)
        logits_BV = model.logits(hidden_BTD, model.copies(hidden_BTD, ids_BT))[row_B, length_B - 1]
        seen_BV = None
        if parameters.penalises:
            seen_BV = torch.tensor([[token in row for token in range(vocab_size)] for row in map(set, rows)], device=device)
        drawn_before = [Counter(row[start:]) for row, start in zip(rows, starts, strict=True)]
        count_BV = torch.tensor([[float(count[token]) for token in range(vocab_size)] for count in drawn_before], device=device)
        drawn = sample(logits_BV, row_uniform(sampling.seed, first_row + row_B, length_B), parameters, seen_BV, count_BV)
        top_BA, index_BA = drawn.scaled_BV.log_softmax(-1).topk(min(sampling.top_logprobs, vocab_size))
        for index, (token, logp) in enumerate(zip(drawn.token_B.tolist(), drawn.logp_B.tolist(), strict=True)):
            if finished[index]:
                continue
            rows[index].append(token)
            logprobs[index].append(logp)
            finished[index] = token in sampling.stop_ids
            if drawn.mask_BV is not None:
                masks[index].append(pack_mask(drawn.mask_BV[index]).cpu())
            if sampling.top_logprobs:
                alternatives[index].append(dict(zip(index_BA[index].tolist(), top_BA[index].tolist(), strict=True)))
    return [
        Continuation(row[start:], logprobs[i], finished[i], torch.stack(masks[i]) if masks[i] else None, alternatives[i])
        for i, (row, start) in enumerate(zip(rows, starts, strict=True))
    ]
