"""Text streaming: what is shown piece by piece is what the whole completion says."""

from __future__ import annotations

import pytest
import torch

from osler.inference.engine import InferenceEngine
from osler.inference.generate import stream_answer
from osler.model.config import ModelConfig
from osler.model.transformer import Transformer
from osler.ops.sampling_params import SamplingParams
from osler.tokenizer.bpe import Tokenizer
from osler.tokenizer.chat import encode_prompt, parse_completion

TEXTS = ["Fever of 38 °C, cough — naïve café 発熱 咳 и кашель.", "What is the likeliest cause? Pneumonia (A)."] * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=300)


@pytest.fixture(scope="module")
def engine(tokenizer: Tokenizer) -> InferenceEngine:
    config = ModelConfig(num_layers=1, hidden_size=32, intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=16,
                         vocab_size=tokenizer.vocab_size, max_seq_len=128)  # fmt: skip
    model = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return InferenceEngine(model)


@pytest.mark.parametrize("reasoning", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_pieces_add_up_to_the_completion(engine: InferenceEngine, tokenizer: Tokenizer, seed: int, reasoning: bool) -> None:
    prompt = encode_prompt(tokenizer, "What is it?", reasoning=reasoning)
    sampling = SamplingParams(max_new_tokens=100, temperature=1.5, stop_ids=(tokenizer.eos_id,), seed=seed)
    ids = engine.generate([prompt], sampling).completions[0]
    pieces = list(stream_answer(engine, tokenizer, "What is it?", sampling, reasoning=reasoning))
    assert all(text for _, text in pieces)
    completion = parse_completion(tokenizer, ids, reasoning=reasoning)
    shown = {part: "".join(text for its, text in pieces if its == part) for part in ("thinking", "answer")}
    if completion.well_formed or not (reasoning or set(ids[:-1]) & tokenizer.special_ids):
        assert shown["thinking"].strip() == completion.thinking
        assert shown["answer"].strip() == (completion.answer or "")
    plain = [token for token in ids if token not in tokenizer.special_ids]
    # Random bytes make broken characters; whole ones must all arrive, in order.
    whole = [c for c in tokenizer.decode(plain) if c.isascii()]
    assert [c for _, text in pieces for c in text if c.isascii()] == whole
