"""A tiny policy with a tokenizer, and a reward that an untrained one can earn."""

from __future__ import annotations

import pytest
import torch

from osler.model.config import ModelConfig
from osler.model.transformer import Transformer
from osler.rl.rollout import RewardTerm, RlTask
from osler.tasks.item import ExamItem
from osler.tokenizer.bpe import Tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train(["aspirin relieves pain (A) (B) (C) (D) which drug?"] * 4, vocab_size=300)


@pytest.fixture
def make_policy(tokenizer):
    """A function that builds the same untrained policy each time; it ends about one completion in five."""

    def build():
        config = ModelConfig(
            num_layers=1, hidden_size=16, intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
            vocab_size=tokenizer.vocab_size, max_seq_len=96, head_init="normal",
        )  # fmt: skip
        model = Transformer(config)
        model.init_weights(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lm_head" in name:
                    parameter.mul_(4.0)
        return model

    return build


def short(item, completion):
    """A reward that varies between untrained samples: few letters of thinking."""
    return 1.0 / (1.0 + len(completion.thinking))


@pytest.fixture
def short_task():
    items = tuple(
        ExamItem(id=f"q{n}", question=f"Which drug is number {n}?", options=("ant", "bee", "cat", "dog"), answer_index=n % 4)
        for n in range(6)
    )
    return RlTask("short", items, (RewardTerm("short", short),))
