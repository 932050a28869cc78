"""Score exams, by what a model writes or by which option it finds most likely.

``score_by_generation`` lets the model think and answer, ``grade`` reads each answer as the rewards read it
(``tasks/answers.py``), and ``summarise`` (``score.py``) counts them. ``score_by_likelihood`` needs no form of answer, so it also
suits base models.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Literal

from osler.eval.likelihood import sum_logprobs
from osler.eval.score import ANSWERED, CUT, TOO_LONG, UNPARSED, Result, ScoredExam, summarise
from osler.inference.engine import InferenceEngine
from osler.inference.rows import Request
from osler.model.transformer import Transformer
from osler.ops.sampling_params import SamplingParams
from osler.runtime.errors import UserError
from osler.runtime.stop import AskedToStop, asked
from osler.runtime.world import World
from osler.tasks.answers import read_answer
from osler.tasks.item import ExamItem, permute, render_answer, render_question, reorder
from osler.tokenizer.bpe import Tokenizer
from osler.tokenizer.chat import Completion, encode_prompt, parse_completion

ITEMS_AT_ONCE = 32  # presentations scored by likelihood between two calls of ``progress``


def greedy(max_new_tokens: int) -> SamplingParams:
    """Return the usual sampling of an exam: always the likeliest token, ``max_new_tokens`` for thinking and answer together."""
    return SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)


def score_by_generation(
    engine: InferenceEngine,
    tokenizer: Tokenizer,
    items: Sequence[ExamItem],
    sampling: SamplingParams,
    *,
    reasoning: bool = True,
    permutations: int = 1,
    progress: Callable[[int], None] | None = None,
) -> ScoredExam:
    """Let the model write an answer to every item and score what it wrote.

    Every item is shown in ``permutations`` option orders, which the seed of ``sampling`` draws. Prompt and completion must fit
    the model's ``max_seq_len``; a context passage is shortened from its front to fit, a question is not. ``progress`` is called
    with the number of answers so far.
    """
    longest = engine.model.config.max_seq_len
    room = longest - sampling.max_new_tokens
    if room < 1:
        raise UserError(
            f"max_new_tokens is {sampling.max_new_tokens}, which leaves no room for a question in the model's "
            f"{longest} tokens: ask for shorter answers."
        )

    def encode(question: str) -> list[int]:
        return encode_prompt(tokenizer, question, reasoning=reasoning)

    shown = list(presentations(items, permutations, sampling.seed))
    questions = [fitting_question(item, encode, room) for item in shown]
    results = [Result(item, TOO_LONG, right=False) for item in shown]
    fitting = [(i, encode(question)) for i, question in enumerate(questions) if question is not None]
    fitting.sort(key=lambda pair: -len(pair[1]))
    ends = replace(sampling, stop_ids=(tokenizer.eos_id,))
    completed = engine.complete([Request(tuple(prompt), ends, number=i) for i, prompt in fitting])
    for done, (index, continuation) in enumerate(completed, start=len(shown) - len(fitting) + 1):
        i = fitting[index][0]
        results[i] = grade(shown[i], parse_completion(tokenizer, continuation.ids, reasoning=reasoning))
        if progress:
            progress(done)
        if asked():  # a trainer that asks all ranks whether to stop makes nothing of this score
            break
    return summarise(results, max_seq_len=longest)


def shared_exam(
    engine: InferenceEngine,
    tokenizer: Tokenizer,
    items: Sequence[ExamItem],
    sampling: SamplingParams,
    world: World,
    *,
    reasoning: bool = True,
    permutations: int = 1,
) -> tuple[float, float]:
    """Return the shares of the answers that are right and that cannot be read; the ranks share the items.

    Raises UserError when there are no items, and AskedToStop when training is to end.
    """
    share, counts = items[world.rank :: world.size], (0.0, 0.0, 0.0)
    if share or not items:  # an empty exam is refused in words
        score = score_by_generation(engine, tokenizer, share, sampling, reasoning=reasoning, permutations=permutations)
        counts = (score.correct, score.unparsed + score.cut + score.too_long, score.presentations)
    right, unread, shown, left = world.all_reduce_sum(*counts, asked())
    if left:
        raise AskedToStop
    return right / shown, unread / shown


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


def grade(item: ExamItem, completion: Completion) -> Result:
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
    progress: Callable[[int], None] | None = None,
) -> ScoredExam:
    """Choose the option whose text is most likely after the prompt; items must have options.

    With ``template`` the prompt is the chat template up to the answer (no thinking) with the options listed, and an option is
    scored as ``text (B)``; without it the prompt is plain "Question: ... Answer:" and an option is its bare text.

    The log-likelihood is divided by the UTF-8 bytes of what is scored (lm-evaluation-harness's ``acc_norm`` where that is ASCII),
    by its tokens, or by nothing (the harness's ``acc``, where short options win). Of equal scores the earlier option wins.
    """
    longest = model.config.max_seq_len
    shown = list(presentations(items, permutations, seed))
    results: list[Result] = []
    for first in range(0, len(shown), ITEMS_AT_ONCE):
        part = shown[first : first + ITEMS_AT_ONCE]
        options = [option_rows(tokenizer, item, template=template, max_seq_len=longest) or [] for item in part]
        sums = iter(sum_logprobs(model, [row for rows in options for row in rows]))
        for item, rows in zip(part, options, strict=True):
            if not rows:
                results.append(Result(item, TOO_LONG, right=False))
                continue
            sizes = {
                "bytes": [len(text.encode()) for text in scored_texts(item, template=template)],
                "tokens": [len(ids) - start for ids, start in rows],
                "none": [1] * len(rows),
            }[normalise]
            scores = [next(sums) / size for size in sizes]
            best = scores.index(max(scores))
            results.append(Result(item, ANSWERED, right=item.is_right(best), predicted=best, text=item.options[best]))
        if progress:
            progress(len(results))
    return summarise(results, max_seq_len=longest)


def scored_texts(item: ExamItem, *, template: bool) -> list[str]:
    """Return the text that is scored for every option: the answer as it is taught, or without the template the bare option."""
    if not template:
        return list(item.options)
    return [render_answer(replace(item, answer_index=index)) for index in range(len(item.options))]


def option_rows(tokenizer: Tokenizer, item: ExamItem, *, template: bool, max_seq_len: int) -> list[tuple[list[int], int]] | None:
    """Return for every option the ids of prompt and option together and where scoring starts; None when they do not fit.

    Plain text is tokenised as a whole, because a merge may straddle the border. Scoring starts where the ids of the options, or
    those of the prompt alone, first differ, so that it starts alike in every option. In the template a special token is the
    border.
    """
    if not item.options:
        raise ValueError(f"item {item.id} has no options to compare")
    texts = scored_texts(item, template=template)
    if template:
        answers = [tokenizer.encode(text) for text in texts]

        def encode(question: str) -> list[int]:
            return encode_prompt(tokenizer, question, reasoning=False)

        question = fitting_question(item, encode, max_seq_len - max(map(len, answers)))
        prompt = [] if question is None else encode(question)
        return [(prompt + answer, len(prompt)) for answer in answers] if prompt else None
    longest = max(len(tokenizer.encode(f" {text}")) for text in texts) + 1
    bare = replace(item, options=(), answer_index=-1)
    question = fitting_question(bare, lambda text: tokenizer.encode(f"Question: {text}\nAnswer:"), max_seq_len - longest)
    if question is None:
        return None
    stem = f"Question: {question}\nAnswer:"
    together = [tokenizer.encode(f"{stem} {text}") for text in texts]
    columns = zip(tokenizer.encode(stem), *together, strict=False)
    start = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    fits = max(map(len, together)) <= max_seq_len and start > 0
    return [(ids, start) for ids in together] if fits else None


def fitting_question(item: ExamItem, encode: Callable[[str], list[int]], room: int) -> str | None:
    """Return the question with what fits ``room`` tokens of its context's end (where an abstract has its results), else None."""
    if len(encode(whole := render_question(item))) <= room:
        return whole
    words = item.context.split()

    def shortened(kept: int) -> str:
        return render_question(replace(item, context=" ".join(words[len(words) - kept :])))

    too_many = bisect_left(range(len(words)), True, key=lambda kept: len(encode(shortened(kept))) > room)
    return shortened(too_many - 1) if too_many else None
