"""Let lm-evaluation-harness examine a model of Osler's, with the harness's tasks, prompts and options (extra ``harness``).

    lm_eval.simple_evaluate(model=OslerLM("runs/mine"), tasks=["hellaswag"])

The harness tokenises a prompt and its continuation together, and moves spaces at the end of the prompt to the continuation. This
file has the methods that the harness calls. A prompt that several continuations share runs through the model once, as in
``exams.py``, so ``osler eval prompt=plain`` gives the same sums (``benchmarks/harness_parity.py``).
"""

import json
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from osler.config.schema import decode
from osler.eval.exams import ITEM_ROWS, parse_text
from osler.eval.likelihood import label_logprobs, pad_rows, sum_logprobs
from osler.inference.engine import InferenceEngine
from osler.inference.load import open_model
from osler.inference.rows import Request, warn_of_untrained
from osler.model.decoder import Decoder
from osler.model.layers import Layout
from osler.ops.labels import IGNORED
from osler.ops.sampling_params import SamplingParams
from osler.runtime.errors import UserError

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UserError("lm-evaluation-harness is not installed: pip install -e '.[harness]' in Osler's source tree") from error

logger = logging.getLogger(__name__)

NEW_TOKENS = 256  # most tokens of an answer, unless its task says how long it may be
MOST_TOGETHER = 64  # continuations of one context that are scored in one batch
Encoded = tuple[tuple[str, str], list[int], list[int]]  # texts of context and continuation, and their ids


def run(options: str, device: str, **model: Any) -> int:
    """Run the harness's own command line with ``options``; ``device`` and ``model`` are arguments of ``OslerLM``.

    Return 0. Raises UserError where the harness raises ValueError or ConnectionError: for options, tasks or data not found.
    """
    try:
        given = ["--model", "osler", "--model_args", json.dumps(model), "--device", device, *shlex.split(options)]
        sys.argv = ["lm_eval", "run", *given]
        cli_evaluate()
    except (ValueError, ConnectionError) as error:
        raise UserError(
            f"lm-evaluation-harness, with --harness {options!r}: {error}. `lm_eval ls tasks` lists its tasks and `lm_eval run "
            "--help` its options; without a network a task file reads local files (--include_path)."
        ) from error
    return 0


@register_model("osler")
class OslerLM(TemplateLM):
    """A checkpoint as a model of the harness. It writes ``rows`` answers at once, whatever batch size the harness gives."""

    def __init__(
        self, checkpoint: str | Path, *, device: str = "auto", which: str = "newest", rows: int = 256, **batches: object
    ) -> None:
        super().__init__()
        ready = open_model(checkpoint, device=device, which=which)
        logger.info(ready.describe())
        self.model, self.tokens, self.rows = ready.model, ready.tokenizer, rows
        self.longest = ready.model.config.max_seq_len

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token, which stands for an empty context."""
        return self.tokens.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: object) -> list[int]:
        """Return the ids of a text."""
        return self.tokens.encode(string)

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Raise UserError: text cannot hold the markers of the template."""
        raise UserError("The harness's prompts are text, which cannot hold Osler's template: `osler eval` asks with it.")

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **options: object) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood and whether it is greedy; too long a context loses its beginning."""
        decoder = Decoder(self.model, Layout(self.model.compute_dtype, ITEM_ROWS))
        pairs, found = [], list[tuple[float, bool]]()
        for (_, text), context, continuation in requests:
            if not 0 < len(continuation) <= self.longest:  # the last token is predicted, but not read
                raise UserError(
                    f"The continuation {text!r:.60} has {len(continuation)} tokens after its context; it needs at least one, and "
                    f"the model has room for {self.longest} (max_seq_len)."
                )
            pairs.append((context[-(self.longest + 1 - len(continuation)) :], continuation))
        self._tell_cut(sum(len(kept) < len(given) for (kept, _), (_, given, _) in zip(pairs, requests, strict=True)))
        for context, group in groupby(pairs, key=lambda pair: pair[0]):
            rows = [[*context, *continuation] for _, continuation in group]
            for first in range(0, len(rows), MOST_TOGETHER):
                found += sum_logprobs(decoder, rows[first : first + MOST_TOGETHER], len(context))
        return found

    def _tell_cut(self, count: int) -> None:
        if count:
            logger.warning(f"{count:,} prompts are longer than the {self.longest} tokens of the model; only their ends are read.")

    @torch.inference_mode()
    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, cut into windows as the harness cuts it."""
        sums = []
        for (text,) in (request.args for request in requests):
            ids = self.tokens.encode(text)
            total = 0.0
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.longest, context_len=1):
                before, scored = make_disjoint_window(window)
                row = [*before, *scored[:-1]], [*[IGNORED] * (len(before) - 1), *scored]
                warn_of_untrained(self.model.usable_seq_len, len(row[0]))
                total += label_logprobs(self.model, *pad_rows([row]))[1].double().sum().item()
            sums.append(total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each prompt, up to the stop strings of its task."""
        given = [(context, normalize_gen_kwargs(options, NEW_TOKENS)) for context, options in (one.args for one in requests)]
        asked, cut = [], 0
        for number, (context, options) in enumerate(given):
            drawing = {name: value for name, value in options.items() if name not in ("until", "max_gen_toks", "do_sample")}
            drawing |= {"max_new_tokens": options["max_gen_toks"], "stop_ids": [self.eot_token_id]}
            sampling = decode(SamplingParams, drawing, source="generation_kwargs of the task")
            room = self.longest - sampling.max_new_tokens
            if room < 1:
                raise UserError(f"max_gen_toks={sampling.max_new_tokens} leaves no room for a prompt in {self.longest} tokens.")
            ids = self.tok_encode(context) or [self.eot_token_id]
            cut += len(ids) > room
            asked.append(Request(tuple(ids[-room:]), sampling, number))
        self._tell_cut(cut)
        texts = [""] * len(asked)
        asked.sort(key=lambda request: -len(request.prompt))
        for index, continuation in InferenceEngine(self.model, max_rows=self.rows).complete(asked):
            number = asked[index].number
            texts[number] = parse_text(self.tokens, continuation.ids, given[number][1]["until"]).answer or ""
        return texts
