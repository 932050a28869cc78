"""A tiny policy with a tokenizer, and a reward that an untrained one can earn."""

from __future__ import annotations

import pytest
import torch

from osler.model.config import ModelConfig
from osler.model.transformer import Transformer
from osler.rl.config import AlgorithmConfig
from osler.rl.rollout import Group, Prompt, RewardTerm, RlTask, score
from osler.tasks.item import ExamItem
from osler.tasks.rewards import correct
from osler.tokenizer.bpe import ANSWER, Tokenizer


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


ITEM = ExamItem(id="q", question="Which drug?", options=("ant", "bee", "cat", "dog"), answer_index=2)
DEFAULTS, CORRECT = AlgorithmConfig(), (RewardTerm("correct", correct),)


@pytest.fixture(scope="session")
def group_of(tokenizer):
    """A function that scores completions of one question: ``|`` is the answer's marker, a final ``$`` the end of the text."""

    def build(*texts, item=ITEM, algorithm=DEFAULTS, rewards=CORRECT):
        prompt, samples = Prompt(RlTask("exam", (item,), rewards), item), []
        for text in texts:
            ids = []
            for number, part in enumerate(text.removesuffix("$").split("|")):
                ids += [tokenizer.special_id(ANSWER)] * (number > 0) + tokenizer.encode(part)
            ids += [tokenizer.eos_id] * text.endswith("$")
            samples.append(score(tokenizer, prompt, ids, [-1.0] * len(ids), algorithm))
        return Group(prompt, [1, 2], samples)

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
