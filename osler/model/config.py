"""The shape of a model and what follows from it: parameters, FLOPs per token, bytes of KV cache. Torch-free.

One family covers every recipe: decoder-only, pre-norm RMSNorm, RoPE, QK-norm before RoPE, grouped-query attention, SwiGLU,
no biases. The standard class with the same mathematics is Hugging Face's Qwen3; parameters carry its names.
"""

from typing import Annotated, Literal

from osler.config.schema import Ge, PositiveFloat, PositiveInt, config

MODEL_FILE = "model.json"  # in every checkpoint: the config of its model
VOCAB_MULTIPLE = 64  # matmuls over the vocabulary run at full speed only at multiples of the tile size


@config
class DenseAttentionConfig:
    """Every token attends to all tokens before it."""

    type: Literal["dense"] = "dense"


@config
class ModelConfig:
    """A decoder-only transformer. The defaults are the quickstart's one-million-parameter model."""

    num_layers: PositiveInt = 4  # transformer blocks
    hidden_size: PositiveInt = 128  # width of the residual stream
    intermediate_size: PositiveInt = 384  # width inside the feed-forward layers
    num_heads: PositiveInt = 4  # query heads
    num_kv_heads: PositiveInt = 2  # key/value heads; each serves num_heads / num_kv_heads query heads
    head_dim: PositiveInt = 32  # width of a head; even
    attention: DenseAttentionConfig = DenseAttentionConfig()  # which of the tokens before it a token attends to
    vocab_size: PositiveInt = 2048  # tokens; no fewer than the tokenizer's
    max_seq_len: Annotated[int, Ge(2)] = 2048  # tokens of context at most
    rope_theta: PositiveFloat = 10_000.0  # base of the rotary position embedding
    norm_eps: PositiveFloat = 1e-6  # added to the mean square in every RMSNorm
    norm_weight: bool = False  # false: every RMSNorm, QK-norm included, is parameter-free
    qk_norm_weight: bool = False  # whether QK-norm has weights; needs norm_weight
    tie_embeddings: bool = False  # whether the head is the input embedding
    embed_rank: PositiveInt | None = None  # factorized embedding, [vocab_size, rank] then [rank, hidden_size]; null: one matrix
    residual_init: Literal["zero", "scaled"] = "zero"  # what the output projections of a block start as (model/init.py)
    head_init: Literal["zero", "normal"] = "zero"  # what the head starts as
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
        ):  # fmt: skip
            if is_wrong:
                raise ValueError(message)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the head; those past ``vocab_size`` are never trained, sampled or counted."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def _matrix_parameters(self) -> int:
        attention = self.hidden_size * (2 * self.query_size + 2 * self.kv_size)
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
        return self._matrix_parameters + self._embedding_parameters + head + norms + qk_norms

    def flops_per_token(self, seq_len: int) -> int:
        """Return the training FLOPs per token by the PaLM convention (non-causal).

        6 x (matrices and head) + 12 x num_layers x num_heads x head_dim x seq_len.
        """
        head = self._embedding_parameters if self.tie_embeddings else self.vocab_size * self.hidden_size
        return 6 * (self._matrix_parameters + head) + 12 * self.num_layers * self.query_size * seq_len

    def kv_cache_bytes(self, batch: int, seq_len: int, dtype_bytes: int = 2) -> int:
        """Return the bytes of the keys and values of ``batch`` rows of ``seq_len`` tokens."""
        return 2 * self.num_layers * batch * seq_len * self.kv_size * dtype_bytes
