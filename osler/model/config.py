"""The shape of a model and what follows from it: parameters, FLOPs per token, bytes of KV cache. Torch-free.

One family covers every recipe: decoder-only, pre-norm RMSNorm, RoPE, QK-norm before RoPE, grouped-query attention, SwiGLU,
no biases. The standard class with the same mathematics is Hugging Face's Qwen3; parameters carry its names.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from osler.config.schema import TAGGED, Ge, PositiveFloat, PositiveInt, config, decode
from osler.runtime.errors import UserError

MODEL_FILE = "model.json"  # in every checkpoint: the config of its model
VOCAB_MULTIPLE = 64  # matmuls over the vocabulary run at full speed only at multiples of the tile size


@config
class DenseAttentionConfig:
    """Every token attends to all tokens before it, or to the latest ones."""

    type: Literal["dense"] = "dense"
    # how many of the latest tokens a token attends to, itself included; null: all. What stands further back reaches it through
    # other layers, or a copy head
    window: PositiveInt | None = None

    def keys(self, seq_len: int) -> int:
        """Return the most tokens that a token attends to in rows of this length."""
        return min(seq_len, self.window or seq_len)


@config
class SparseAttentionConfig:
    """Every token attends to the ``top_k`` tokens before it that a small index scores highest (model/sparse_attention.py).

    It is for long context: ``osler show`` tells from which length on it costs fewer FLOPs than dense attention.
    """

    type: Literal["sparse"] = "sparse"
    index_heads: PositiveInt = 4  # heads of the index
    index_head_dim: PositiveInt = 64  # width of an index head and of the index key of a token; a multiple of 4
    top_k: PositiveInt = 256  # keys that a token attends to; rows that are no longer are attended to densely
    local_window: PositiveInt = 32  # how many of these keys are always the latest ones, the token itself included
    # whether all heads of a token share one choice of keys, or each key/value head has its own share of the index heads
    selection: Literal["token", "per_kv_group"] = "token"

    def __post_init__(self) -> None:
        if self.index_head_dim % 4:
            raise ValueError(
                f"index_head_dim {self.index_head_dim} is not a multiple of 4; RoPE rotates pairs in half of an index head"
            )
        if self.local_window > self.top_k - 2:
            raise ValueError(
                f"local_window {self.local_window} leaves nothing of top_k {self.top_k} to choose, because the window and the "
                f"first token of a document are always kept; set local_window to {self.top_k - 2} at most, or a larger top_k"
            )

    def keys(self, seq_len: int) -> int:
        """Return the most tokens that a token attends to in rows of this length."""
        return min(seq_len, self.top_k)

    def parameters(self, hidden_size: int) -> int:
        """Return the number of parameters of a layer's index."""
        return hidden_size * (self.index_heads * self.index_head_dim + self.index_head_dim + self.index_heads)

    def flops_per_token(self, seq_len: int) -> int:
        """Return the training FLOPs of a layer's scores: of all keys forward, but only of the chosen ones backward."""
        return 2 * self.index_heads * self.index_head_dim * (seq_len + 2 * self.keys(seq_len))


AttentionConfig = Annotated[DenseAttentionConfig | SparseAttentionConfig, TAGGED]


@config
class YarnConfig:
    """RoPE for longer rows than a model was trained on (YaRN, arXiv 2309.00071)."""

    type: Literal["yarn"] = "yarn"
    factor: Annotated[float, Ge(1)]  # rows may be this many times as long; the slowest rotations are slowed by it
    original_max_seq_len: PositiveInt  # tokens of the longest rows before
    beta_fast: PositiveFloat = 32.0  # pairs that rotate at least this often in such a row keep their speed
    beta_slow: PositiveFloat = 1.0  # pairs that rotate at most this often are slowed by the whole factor

    def __post_init__(self) -> None:
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast {self.beta_fast:g} is not above beta_slow {self.beta_slow:g}")


@config
class ModelConfig:
    """A decoder-only transformer. The defaults are the quickstart's one-million-parameter model."""

    num_layers: PositiveInt = 4  # transformer blocks
    hidden_size: PositiveInt = 128  # width of the residual stream
    intermediate_size: PositiveInt = 384  # width inside the feed-forward layers
    num_heads: PositiveInt = 4  # query heads
    num_kv_heads: PositiveInt = 2  # key/value heads; each serves num_heads / num_kv_heads query heads
    head_dim: PositiveInt = 32  # width of a head; even
    attention: AttentionConfig = DenseAttentionConfig()  # which of the tokens before it a token attends to
    vocab_size: PositiveInt = 2048  # tokens; no fewer than the tokenizer's
    max_seq_len: Annotated[int, Ge(2)] = 2048  # the most tokens of context
    rope_theta: PositiveFloat = 10_000.0  # base of the rotary position embedding
    rope_scaling: YarnConfig | None = None  # RoPE for longer rows than before; a run sets it with `context`
    norm_eps: PositiveFloat = 1e-6  # added to the mean square in every RMSNorm
    norm_weight: bool = False  # false: every RMSNorm, QK-norm included, is parameter-free
    qk_norm_weight: bool = False  # whether QK-norm has weights; needs norm_weight
    tie_embeddings: bool = False  # whether the head is the input embedding
    embed_rank: PositiveInt | None = None  # factorized embedding, [vocab_size, rank] then [rank, hidden_size]; null: one matrix
    # which layers add an embedding of the token to its attention values (arXiv 2410.17897), which costs parameters and no FLOPs;
    # alternate: the last layer and every second one before it. Such a model has no standard form to export to
    value_embeddings: Literal["none", "alternate", "all"] = "none"
    # width of a copy head, by which each token can also be predicted as a repetition of one in its row (model/copy_head.py);
    # null: none. Such a model has no standard form to export to
    copy_head_dim: PositiveInt | None = None
    residual_init: Literal["zero", "scaled"] = "zero"  # what the output projections of a block start as (model/init.py)
    head_init: Literal["zero", "normal"] = "zero"  # what the head starts as
    # bigrams: a new run lets embedding and head start from how often tokens of its data follow each other (model/bigrams.py)
    embedding_init: Literal["normal", "bigrams"] = "normal"
    # how attention starts: mirrored heads look at tokens like theirs, induction adds a head that copies
    attention_init: Literal["independent", "mirrored", "induction"] = "independent"
    qk_norm_init: float = 1.0  # what weighted QK-norms start at; above 1 attention starts sharper

    def __post_init__(self) -> None:
        induction, places = self.attention_init == "induction", 3 * self.head_dim + 1
        for is_wrong, message in (
            (self.num_heads % self.num_kv_heads, f"num_heads {self.num_heads} is not a multiple of num_kv_heads "
             f"{self.num_kv_heads}; every key/value head must serve the same number of query heads"),
            (self.head_dim % 2, f"head_dim {self.head_dim} is odd; RoPE rotates pairs, so it must be even"),
            ((self.embed_rank or 0) > self.hidden_size, f"embed_rank {self.embed_rank} exceeds hidden_size {self.hidden_size}"),
            (self.tie_embeddings and self.head_init == "zero", "tie_embeddings=true needs head_init=normal: a tied head is the "
             "embedding and cannot start at zero"),
            (self.qk_norm_weight and not self.norm_weight, "qk_norm_weight=true needs norm_weight=true"),
            (self.qk_norm_init != 1.0 and not self.qk_norm_weight, f"qk_norm_init {self.qk_norm_init} needs qk_norm_weight=true"),
            (induction and (self.num_layers < 2 or self.hidden_size < places), "attention_init=induction needs 2 layers and a "
             f"hidden_size of 3 x head_dim + 1 = {places}, not {self.num_layers} and {self.hidden_size}"),
            (induction and (self.tie_embeddings or self.embed_rank), "attention_init=induction needs untied, unfactorized "
             "embeddings: it reserves places in them"),
            (self.embedding_init == "bigrams" and (self.tie_embeddings or self.embed_rank), "embedding_init=bigrams needs "
             "untied, unfactorized embeddings: the head is another factor"),
        ):  # fmt: skip
            if is_wrong:
                raise ValueError(message)

    def check_attention(self) -> None:
        """Raise ValueError if sparse attention does not fit the shape, which in a run with ``init_from`` is that of its start."""
        sparse = self.attention
        if not isinstance(sparse, SparseAttentionConfig):
            return
        if sparse.top_k > self.max_seq_len:
            raise ValueError(
                f"attention.top_k {sparse.top_k} exceeds max_seq_len {self.max_seq_len}, so there is nothing to choose: set a "
                "smaller top_k, or attention.type=dense"
            )
        if sparse.selection == "per_kv_group" and sparse.index_heads % self.num_kv_heads:
            raise ValueError(
                f"attention.selection=per_kv_group shares {sparse.index_heads} index_heads evenly among {self.num_kv_heads} "
                "num_kv_heads: set a multiple"
            )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the head; those past ``vocab_size`` are never trained, sampled or counted."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def window(self) -> int | None:
        """How many of the latest tokens a token attends to, itself included; None: all, or those that an index chooses."""
        return self.attention.window if isinstance(self.attention, DenseAttentionConfig) else None

    def usable_seq_len(self, trained_seq_len: int) -> int:
        """Return the longest rows that a model reads as well as those of ``trained_seq_len`` tokens that it was trained on.

        With a window a state depends on so many of the latest tokens at most: of each layer those of the window before. Where
        rows of training held them all, no state of a longer row is like none that was learned.
        """
        if self.window is None or self.num_layers * (self.window - 1) >= trained_seq_len:
            return trained_seq_len
        return self.max_seq_len

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def has_value_embedding(self, layer: int) -> bool:
        """Return whether the layer with this number, from 0 on, has a value embedding."""
        return self.value_embeddings == "all" or (self.value_embeddings == "alternate" and (self.num_layers - layer) % 2 == 1)

    @property
    def value_embedding_size(self) -> int:
        """How many numbers the value embeddings of all layers have for a token."""
        return self.kv_size * sum(map(self.has_value_embedding, range(self.num_layers)))

    @property
    def _matrix_parameters(self) -> int:
        attention = self.hidden_size * (2 * self.query_size + 2 * self.kv_size)
        if isinstance(self.attention, SparseAttentionConfig):
            attention += self.attention.parameters(self.hidden_size)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def _embedding_parameters(self) -> int:
        rank = self.embed_rank
        return self.vocab_size * self.hidden_size if rank is None else (self.vocab_size + self.hidden_size) * rank

    @property
    def num_parameters(self) -> int:
        """Number of parameters without padding rows."""
        head = 0 if self.tie_embeddings else self.vocab_size * self.hidden_size
        norms = (2 * self.num_layers + 1) * self.hidden_size if self.norm_weight else 0
        qk_norms = 2 * self.head_dim * self.num_layers if self.qk_norm_weight else 0
        values = self.vocab_size * self.value_embedding_size
        copying = 2 * self.hidden_size * (self.copy_head_dim or 0)
        return self._matrix_parameters + self._embedding_parameters + values + head + norms + qk_norms + copying

    def weight_bytes(self, bits: float = 32) -> int:
        """Return the bytes of all parameters with ``bits`` bits each; `osler quantize` writes 8.5 or 4.5, scales included."""
        return round(self.num_parameters * bits / 8)

    def flops_per_token(self, seq_len: int) -> int:
        """Return the training FLOPs per token by the PaLM convention (non-causal).

        6 x (matrices and head) + 12 x num_layers x num_heads x head_dim x keys, where keys are seq_len, or at most the window or
        the top_k of attention. For a sparse model the scores of its index are added.
        """
        head = self._embedding_parameters if self.tie_embeddings else self.vocab_size * self.hidden_size
        attention, keys = 0, self.attention.keys(seq_len)
        if isinstance(self.attention, SparseAttentionConfig):
            attention = self.attention.flops_per_token(seq_len)
        copying = (self.copy_head_dim or 0) * (12 * self.hidden_size + 6 * seq_len)
        return 6 * (self._matrix_parameters + head) + self.num_layers * (attention + 12 * self.query_size * keys) + copying

    @property
    def sparse_wins_from(self) -> int | None:
        """The shortest rows in which sparse attention costs fewer training FLOPs than dense; None where it never does."""
        sparse, dense = self, replace(self, attention=DenseAttentionConfig())
        assert isinstance(self.attention, SparseAttentionConfig)
        # From top_k on, both grow linearly with the length; at top_k sparse attention costs more, because of its index.
        start = self.attention.top_k
        extra = sparse.flops_per_token(start) - dense.flops_per_token(start)
        gain = (dense.flops_per_token(start + 1) - sparse.flops_per_token(start + 1)) + extra  # per token of length
        return start + extra // gain + 1 if gain > 0 else None

    @property
    def beyond_qwen3(self) -> dict[str, str]:
        """The parts of the model that Qwen3 does not have, and the setting that leaves each out."""
        return {
            **({"value embeddings": "model.value_embeddings=none"} if self.value_embedding_size else {}),
            **({"copy head": "model.copy_head_dim=null"} if self.copy_head_dim else {}),
        }

    @property
    def exportable_as(self) -> str:
        """Return in words which form a model of this shape can take in other programs."""
        if self.beyond_qwen3:
            return f"safetensors alone, because of its {' and its '.join(self.beyond_qwen3)}"
        in_rows = f"in rows of at most {self.attention.keys(self.max_seq_len):,} tokens"
        if self.attention.keys(self.max_seq_len) == self.max_seq_len:
            return "Qwen3"
        return f"Qwen3, {in_rows}" if self.window is None else f"Qwen3 with a sliding window, and without it {in_rows}"

    def consequences(self) -> dict[str, str]:
        """Return as entries of a recipe's numbers when sparse attention pays, and what the model can be exported as."""
        exports = {"exports as": self.exportable_as}
        if not isinstance(self.attention, SparseAttentionConfig):
            return exports
        length, costs = self.sparse_wins_from, "more FLOPs than dense at every length: make its index smaller"
        if length is not None:
            costs = f"fewer FLOPs than dense in rows of {length:,} tokens and more"
        return {"sparse attention": costs, **exports}

    def kv_cache_bytes(self, batch: int, seq_len: int, dtype_bytes: int = 2) -> int:
        """Return the bytes of the cache of ``batch`` rows of ``seq_len`` tokens.

        It holds keys and values, the keys of a sparse index, and of a copy head the keys and a token for each place.
        """
        index = self.attention.index_head_dim if isinstance(self.attention, SparseAttentionConfig) else 0
        copying = 0 if self.copy_head_dim is None else self.copy_head_dim * dtype_bytes + 8
        return batch * seq_len * (self.num_layers * (2 * self.kv_size + index) * dtype_bytes + copying)


def model_in(recipe: Mapping[str, Any], source: str) -> ModelConfig | None:
    """Return the shape of the model that a recipe makes, or a pipeline makes first; None if it only starts from other models."""
    sections = (part for part in (recipe, *recipe.values()) if isinstance(part, Mapping))
    shape = next((part["model"] for part in sections if "model" in part), None)
    if shape is None:
        return None
    model = decode(ModelConfig, shape, source=source)
    try:
        model.check_attention()
    except ValueError as error:
        raise UserError(f"{source}: model.{error}") from error
    return model


@config
class ContextConfig:
    """A longer context for the model that a run starts from, which the run then trains on rows of that length."""

    max_seq_len: Annotated[int, Ge(2)]  # tokens of context from here on
    # what RoPE becomes: keep leaves it as it is, base raises rope_theta, yarn slows its slow rotations
    rope: Literal["keep", "base", "yarn"] = "keep"
    # the new base for rope=base; null: one that slows the slowest rotation by as much as rows grow ("NTK-aware" scaling)
    rope_theta: PositiveFloat | None = None

    def __post_init__(self) -> None:
        if self.rope_theta is not None and self.rope != "base":
            raise ValueError(f"rope_theta is of rope=base, and rope is {self.rope}")

    def extend(self, model: ModelConfig, trained_seq_len: int) -> ModelConfig:
        """Return the shape of ``model`` with the longer context; it was trained on rows of ``trained_seq_len`` tokens.

        Raises UserError when the context or the base is not larger, or when another base is asked of a model that has YaRN.
        """
        if self.max_seq_len <= trained_seq_len:
            raise UserError(
                f"The model was trained on rows of {trained_seq_len} tokens, and context.max_seq_len {self.max_seq_len} is not "
                "more: leave context out."
            )
        if self.rope == "base" and model.rope_scaling is not None:
            raise UserError("The model has YaRN already, which another rope_theta would change: use context.rope=yarn or keep.")
        if self.rope_theta is not None and self.rope_theta <= model.rope_theta:
            raise UserError(
                f"context.rope_theta {self.rope_theta:g} is not larger than the {model.rope_theta:g} of the model, so it would "
                "make rotations faster: set a larger one, or leave it out."
            )
        longer, factor = replace(model, max_seq_len=self.max_seq_len), self.max_seq_len / trained_seq_len
        if self.rope == "base":
            slowed = model.rope_theta * factor ** (model.head_dim / max(model.head_dim - 2, 1))
            return replace(longer, rope_theta=self.rope_theta or slowed)
        if self.rope == "yarn":
            original = trained_seq_len if model.rope_scaling is None else model.rope_scaling.original_max_seq_len
            factor = self.max_seq_len / original
            return replace(longer, rope_scaling=YarnConfig(factor=factor, original_max_seq_len=original))
        return longer
