"""Log-probabilities of labelled tokens, and how many bits a model needs for a byte of held-out text.

Bits per byte is a score of a language model that does not depend on its tokenizer: ``nats / ln 2 / bytes``, where every token of
the text counts once and the bytes are UTF-8. The end-of-text token after a document counts too, because a code must say where a
document ends; it has no bytes. ``windows`` cuts documents that are longer than a row; each window starts without context.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice, takewhile
from math import exp, inf, log

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from osler.data.loader import make_batch
from osler.data.order import Order
from osler.data.packing import WholePacking
from osler.data.shard_set import ShardSet
from osler.inference.rows import warn_of_untrained
from osler.model.decoder import Decoder
from osler.model.transformer import Transformer
from osler.ops.cross_entropy import Statistic, is_likeliest, linear_logprobs
from osler.ops.labels import IGNORED
from osler.runtime.device import to_device
from osler.runtime.errors import UserError
from osler.runtime.stop import AskedToStop, asked
from osler.runtime.world import World

VALIDATION_SEED = 0  # the rows of a set are the same whatever the seed of the run
BATCH_TOKENS = 16_384  # the most in a forward pass, padding included
SORTED_WINDOWS = 4096  # windows sorted by length at a time, for less padding; the sum does not depend on the order
LabelledRow = tuple[list[int], list[int]]  # ids, and a label for each: the id that follows it, or -100 if it is not scored


def pad_rows(rows: Sequence[LabelledRow]) -> tuple[Tensor, Tensor]:
    """Return ids_BT and labels_BT, padded on the right with label -100; causal attention never looks at the padding."""
    ids_BT = pad_sequence([torch.tensor(ids) for ids, _ in rows], batch_first=True)
    labels_BT = pad_sequence([torch.tensor(labels) for _, labels in rows], batch_first=True, padding_value=IGNORED)
    return ids_BT, labels_BT


def label_logprobs(
    model: Transformer,
    ids_BT: Tensor,
    labels_BT: Tensor,
    document_BT: Tensor | None = None,
    *,
    statistic: Statistic = is_likeliest,
    temperature: float = 1.0,
    mask_NV: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return, for each label that is not -100, its row, its log-probability in nats, and the ``statistic`` of its distribution.

    They come row by row. The last result has the measurements of a sparse model's index; see ``Transformer.with_index``.

    Attention stays inside a document where ``document_BT`` is given; ``mask_NV`` is a sampling mask on the model's device. The
    other inputs lie on the CPU, where the labels' places are found without waiting for a device.
    """
    device = model.embed_tokens.weight.device
    row_N, place_N = (labels_BT != IGNORED).nonzero(as_tuple=True)
    documents = None if document_BT is None else to_device(document_BT, device)
    ids = to_device(ids_BT, device)
    hidden_BTD, measured_BTM = model.with_index(ids, documents)
    at = to_device(row_N, device), to_device(place_N, device)
    copies = model.copies(hidden_BTD, ids, documents)
    logp_N, found_N = linear_logprobs(
        model.head(hidden_BTD[at]),
        to_device(labels_BT[row_N, place_N], device),
        statistic,
        vocab_size=model.config.vocab_size,
        temperature=temperature,
        mask_NV=mask_NV,
        copies=None if copies is None else copies.of(at[0] * ids.shape[1] + at[1]),
    )
    return row_N, logp_N, found_N, None if measured_BTM is None else measured_BTM[at]


def by_length(rows: Sequence[LabelledRow], batch_tokens: int) -> Iterator[list[int]]:
    """Yield lists of row numbers, similar lengths together: at most ``batch_tokens`` with padding, but at least one row."""
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row][0]))
    while order:
        count = max(1, batch_tokens // len(rows[order[0]][0]))
        yield order[:count]
        order = order[count:]


@torch.inference_mode()
def sum_logprobs(decoder: Decoder, rows: Sequence[list[int]], start: int) -> list[tuple[float, bool]]:
    """Return for every row of ids the sum of log p(ids[t] | ids[:t]) over t >= start, in nats.

    With each sum comes whether all of these tokens are the likeliest. Before ``start``, which is at least 1, the rows must be
    alike: this beginning runs through the model once. The sums depend on these rows alone, to the bit, because no other rows
    share their batch.
    """
    for ids in rows:
        warn_of_untrained(decoder.usable_seq_len, len(ids) - 1)  # the last token is predicted, but not read
    past = decoder.read([rows[0][: start - 1]])[0] if start > 1 else None
    cache, hidden_BTD = decoder.read([ids[:-1] for ids in rows], past)
    sums, is_greedy = [], []
    for row, (ids, hidden_TD) in enumerate(zip(rows, hidden_BTD, strict=True)):  # one at a time, because logits are large
        labels_T1 = torch.tensor(ids[start:], device=decoder.device)[:, None]
        place_T = torch.arange(start - 1, len(ids) - 1, device=decoder.device)
        logits_1TV = decoder.logits(hidden_TD[None, : len(labels_T1)], cache, place_T[None], slice(row, row + 1))
        logp_TV = logits_1TV[0].log_softmax(-1)
        sums.append(logp_TV.gather(1, labels_T1).double().sum())
        is_greedy.append((logp_TV.argmax(-1, keepdim=True) == labels_T1).all())
    return list(zip(torch.stack(sums).tolist(), torch.stack(is_greedy).tolist(), strict=True))


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts a text: summed nats, tokens and bytes; `right` counts the tokens that it found likeliest.

    `words` counts the pieces between white space; 0: not counted.
    """

    nats: float
    tokens: int
    right: int
    bytes: int
    words: int = 0

    @classmethod
    def of_all(cls, scores: Collection["TextScore"]) -> "TextScore":
        """Return the score of several texts together, in which each token counts the same."""
        return cls(*(sum(getattr(score, field.name) for score in scores) for field in fields(cls)))

    @property
    def loss(self) -> float:
        """Nats per token; comparable only between models of one tokenizer."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / log(2) / self.bytes

    @property
    def word_perplexity(self) -> float:
        """The perplexity by which WikiText is compared; independent of the tokenizer, like bits per byte."""
        return exp(self.nats / self.words) if 0 < self.nats < 700 * self.words else inf

    @property
    def token_accuracy(self) -> float:
        return self.right / self.tokens


def describe_text(name: str, cost: TextScore, seq_len: int) -> str:
    """Return the score of a text as one line. Bits per byte and perplexity by words compare models of any tokenizers."""
    words = f", {cost.word_perplexity:.1f} by words" if cost.words else ""
    return (
        f"{name}: {cost.bits_per_byte:.4f} bits per byte ({cost.bytes:,} bytes; {cost.tokens:,} tokens at {cost.loss:.4f} nats, "
        f"perplexity {exp(cost.loss):.1f}{words}; read {seq_len} tokens at a time)"
    )


@torch.no_grad()
def measure(model: Transformer, batches: Iterable[tuple[Tensor, ...]], total_bytes: int, world: World | None = None) -> TextScore:
    """Return the score of ``batches`` of (ids_BT, labels_BT) or (ids_BT, labels_BT, document_BT), whose text has ``total_bytes``.

    The ranks of ``world`` share the same batches. Raises UserError without text, and AskedToStop when the run is asked to stop.
    """
    world = world or World()
    nats, tokens, right = 0.0, 0, 0
    for batch in takewhile(lambda _: not asked(), islice(batches, world.rank, None, world.size)):
        if (batch[1] != IGNORED).any():
            _, logp_N, is_top_N, _ = label_logprobs(model, *batch)
            nats -= logp_N.double().sum().item()
            right += int(is_top_N.sum())
            tokens += logp_N.numel()
    nats, scored_tokens, scored_right, left = world.all_reduce_sum(nats, tokens, right, asked())
    if left:
        raise AskedToStop
    if scored_tokens == 0 or total_bytes <= 0:
        raise UserError("There is no text to measure, or none of its tokens is scored: give another text or validation set.")
    return TextScore(nats=nats, tokens=int(scored_tokens), right=int(scored_right), bytes=total_bytes)


def held_out_batches(
    shards: ShardSet, seq_len: int, *, as_examples: bool, drop_torn: bool = False
) -> Iterator[tuple[Tensor, ...]]:
    """Yield windows that do not overlap; ``as_examples`` whole examples, which do not see each other, with loss masks."""
    if not as_examples:
        yield from batches(windows(shards.documents(), seq_len=seq_len, start_id=shards.eos_id))
        return
    packing = WholePacking(Order(shards, VALIDATION_SEED), seq_len, drop_torn=drop_torn)
    count, size = packing.rows_of_first_epoch, max(1, BATCH_TOKENS // seq_len)
    for start in range(0, count, size):
        batch = make_batch(packing, range(start, min(count, start + size)))
        yield batch.ids, batch.labels, batch.document_ids


def windows(documents: Iterable[Sequence[int]], *, seq_len: int, start_id: int) -> Iterator[LabelledRow]:
    """Cut documents into rows of at most ``seq_len`` tokens in which every token is a label exactly once.

    ``start_id`` (the end-of-text token) stands before a document's first token.
    """
    for document in documents:
        ids = [start_id, *map(int, document)]
        for first in range(0, len(ids) - 1, seq_len):
            last = min(first + seq_len, len(ids) - 1)
            yield ids[first:last], ids[first + 1 : last + 1]


def batches(rows: Iterable[LabelledRow], *, batch_tokens: int = BATCH_TOKENS) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of rows of similar length: at most ``batch_tokens`` with padding, but at least one row."""
    remaining = iter(rows)
    while pending := list(islice(remaining, SORTED_WINDOWS)):
        for numbers in by_length(pending, batch_tokens):
            yield pad_rows([pending[number] for number in numbers])
