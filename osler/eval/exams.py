"""Score exams, by what a model writes or by which option it finds most likely.

``score_by_generation`` shows the question, lets the model think and answer, and reads the answer as the rewards read it
(``osler.tasks.answers``). ``score_by_likelihood`` needs no form of answer, so it also suits base models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch

from osler.eval.likelihood import BATCH_TOKENS, evaluating, label_logprobs, padded_batches
from osler.eval.score import ANSWERED, CUT, TOO_LONG, UNPARSED, Result, ScoredExam, summarise
from osler.inference.engine import InferenceEngine
from osler.model.transformer import Transformer
from osler.ops.labels import IGNORED
from osler.ops.sampling_params import SamplingParams
from osler.runtime.errors import UserError
from osler.runtime.stop import asked
from osler.tasks.answers import read_answer
from osler.tasks.item import ExamItem, permute, render_answer, render_question, reorder
from osler.tokenizer.bpe import Tokenizer
from osler.tokenizer.chat import Completion, encode_prompt, parse_completion


def greedy(max_new_tokens: int) -> SamplingParams:
    """Return how an exam is mostly sat: always the likeliest token, thinking and answer in ``max_new_tokens`` together."""
    return SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)


def score_by_generation(
    engine: InferenceEngine,
    tokenizer: Tokenizer,
    items: Sequence[ExamItem],
    sampling: SamplingParams,
    *,
    reasoning: bool = True,
    permutations: int = 1,
    cluster_by_group: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ScoredExam:
    """Let the model write an answer to every item and score what it wrote.

    With ``permutations`` k every item is shown in k option orders (k = number of options: the right one stands in each place
    once). Prompt and completion must fit the model's ``max_seq_len``; a context passage is shortened from its front to fit, a
    question is not. The seed of ``sampling`` also draws the orders. ``progress`` is called with the number of answers so far.
    """
    longest = engine.model.config.max_seq_len
    room = longest - sampling.max_new_tokens
    if room < 1:
        raise UserError(
            f"max_new_tokens is {sampling.max_new_tokens}, which leaves no room for a question in the model's "
            f"{longest} tokens: ask for shorter answers."
        )
    shown = list(presentations(items, permutations, sampling.seed))
    prompts = [_fitted(item, lambda text: encode_prompt(tokenizer, text, reasoning=reasoning), room) for item in shown]
    results = [Result(item, TOO_LONG, right=False) for item in shown]
    fitting = [(i, prompt) for i, prompt in enumerate(prompts) if prompt is not None]
    fitting.sort(key=lambda pair: -len(pair[1]))
    for start in range(0, len(fitting), engine.max_rows):
        if asked():  # a trainer that asks all ranks whether to stop makes nothing of this score
            break
        batch = fitting[start : start + engine.max_rows]
        rollout = engine.generate(
            [prompt for _, prompt in batch],
            replace(sampling, stop_ids=(tokenizer.eos_id,), seed=sampling.seed + start),
        )
        for (i, _), ids in zip(batch, rollout.completions, strict=True):
            results[i] = mark(shown[i], parse_completion(tokenizer, ids, reasoning=reasoning))
        if progress is not None:
            progress(len(shown) - len(fitting) + start + len(batch))
    return summarise(
        results, cluster_by_group=cluster_by_group, max_seq_len=longest, max_new_tokens=sampling.max_new_tokens
    )


def presentations(items: Iterable[ExamItem], permutations: int, seed: int) -> Iterator[ExamItem]:
    """Yield every item in ``permutations`` option orders: as it is, then its rotations, then rotations of shuffled orders.

    An item whose options point at each other is shown as often, always as it is, so that all items weigh the same.
    """
    for item in items:
        if item.keeps_order:
            yield from [item] * permutations
            continue
        n = len(item.options)
        for visit in range(permutations if n else 1):
            base = item if visit < n or n == 0 else permute(item, seed, visit // n)
            yield reorder(base, [(visit + k) % n for k in range(n)])


def mark(item: ExamItem, completion: Completion) -> Result:
    """Read the completion's answer and compare it with the item's."""
    reading = read_answer(item, completion)
    status = ANSWERED if reading.readable else UNPARSED if completion.finished else CUT
    return Result(item, status, reading.right, reading.choice, completion.answer or "", completion.thinking)


def score_by_likelihood(
    model: Transformer,
    tokenizer: Tokenizer,
    items: Sequence[ExamItem],
    *,
    template: bool = True,
    normalise: Literal["bytes", "tokens", "none"] = "bytes",
    permutations: int = 1,
    seed: int = 0,
    cluster_by_group: bool = False,
) -> ScoredExam:
    """Choose the option whose text is most likely after the prompt; items must have options.

    With ``template`` the prompt is the chat template up to the answer (no thinking) with the options listed, and an option is
    scored as ``text (B)``; without it the prompt is plain "Question: ... Answer:" and an option is its bare text.

    The log-likelihood of all that is scored is divided by its UTF-8 bytes (the default, the same for every tokenizer), by its
    tokens, or by nothing (lm-evaluation-harness's ``acc``, where short options win). By bytes is the harness's ``acc_norm`` as
    long as the choices are ASCII: it divides by the characters of the choice without the space before it. In the template its
    choices are ``text (A)``, ``text (B)`` and so on. Of equal scores the earlier option wins.
    """
    shown = list(presentations(items, permutations, seed))
    results = [Result(item, TOO_LONG, right=False) for item in shown]
    rows: list[tuple[list[int], int]] = []
    owners: list[tuple[int, range]] = []
    for i, item in enumerate(shown):
        options = option_rows(tokenizer, item, template=template, max_seq_len=model.config.max_seq_len)
        if options is not None:
            owners.append((i, range(len(rows), len(rows) + len(options))))
            rows.extend(options)
    sums = sum_logprobs(model, rows)
    for i, mine in owners:
        item = shown[i]
        sizes = {
            "bytes": [len(text.encode()) for text in scored_texts(item, template=template)],
            "tokens": [len(rows[row][0]) - rows[row][1] for row in mine],
            "none": [1] * len(mine),
        }[normalise]
        scores = [sums[row] / size for row, size in zip(mine, sizes, strict=True)]
        best = scores.index(max(scores))
        results[i] = Result(item, ANSWERED, right=item.is_right(best), predicted=best, text=item.options[best])
    return summarise(results, cluster_by_group=cluster_by_group, max_seq_len=model.config.max_seq_len)


def scored_texts(item: ExamItem, *, template: bool) -> list[str]:
    """Return the text that is scored for every option: the answer as it is taught, or without the template the bare option."""
    if not template:
        return list(item.options)
    return [render_answer(replace(item, answer_index=index)) for index in range(len(item.options))]


def option_rows(
    tokenizer: Tokenizer, item: ExamItem, *, template: bool, max_seq_len: int
) -> list[tuple[list[int], int]] | None:
    """Return for every option the ids of prompt and option together and where scoring starts; None when they do not fit.

    Plain text is tokenised as a whole, because a merge may straddle the border. Scoring starts where the ids of the options, or
    those of the prompt alone, first differ, so that characters on both sides of the border count alike in every option. In the
    template a special token is the border.
    """
    if not item.options:
        raise ValueError(f"item {item.id} has no options to compare")
    texts = scored_texts(item, template=template)
    if template:
        answers = [tokenizer.encode(text) for text in texts]
        room = max_seq_len - max(map(len, answers))
        prompt = _fitted(item, lambda text: encode_prompt(tokenizer, text, reasoning=False), room)
        return None if prompt is None else [(prompt + answer, len(prompt)) for answer in answers]

    def plain(text: str) -> list[int]:
        return tokenizer.encode(f"Question: {text}\nAnswer:")

    longest = max(len(tokenizer.encode(f" {text}")) for text in texts) + 1
    kept = _shortened(replace(item, options=(), answer_index=-1), plain, max_seq_len - longest)
    if kept is None:
        return None
    stem = f"Question: {render_question(kept)}\nAnswer:"
    together = [tokenizer.encode(f"{stem} {text}") for text in texts]
    start = _shared_length([tokenizer.encode(stem), *together])
    fits = max(map(len, together)) <= max_seq_len and start > 0
    return [(ids, start) for ids in together] if fits else None


def sum_logprobs(
    model: Transformer, rows: Sequence[tuple[list[int], int]], *, batch_tokens: int = BATCH_TOKENS
) -> list[float]:
    """Return for every row (ids, start) the sum of log p(ids[t] | ids[:t]) over t >= start, in nats; start >= 1."""
    labelled = [(ids[:-1], [IGNORED] * (start - 1) + ids[start:]) for ids, start in rows]
    sums = [0.0] * len(rows)
    with evaluating(model):
        for numbers, ids_BT, labels_BT in padded_batches(labelled, batch_tokens):
            scored_BT, logprobs_N = label_logprobs(model, ids_BT, labels_BT)
            totals = torch.zeros(len(numbers), dtype=torch.float64, device=logprobs_N.device)
            totals.index_add_(0, scored_BT.nonzero()[:, 0], logprobs_N.double())
            for number, total in zip(numbers, totals.tolist(), strict=True):
                sums[number] = total
    return sums


def _fitted(item: ExamItem, encode: Callable[[str], list[int]], room: int) -> list[int] | None:
    """Return the prompt of an item that is shortened to ``room`` tokens; None when it cannot be."""
    kept = _shortened(item, encode, room)
    return None if kept is None else encode(render_question(kept))


def _shortened(item: ExamItem, encode: Callable[[str], list[int]], room: int) -> ExamItem | None:
    """Return the item with as many last words of its context as fit ``room`` tokens; None when even the question does not.

    The front goes first, because an abstract gives its results last.
    """
    if len(encode(render_question(item))) <= room:
        return item
    words = item.context.split()
    low, high = -1, len(words)  # low fits (or is -1), high does not
    while high - low > 1:
        middle = (low + high) // 2
        kept = replace(item, context=" ".join(words[len(words) - middle :]))
        low, high = (middle, high) if len(encode(render_question(kept))) <= room else (low, middle)
    return None if low < 0 else replace(item, context=" ".join(words[len(words) - low :]))


def _shared_length(sequences: Sequence[Sequence[int]]) -> int:
    shared = 0
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    return shared
