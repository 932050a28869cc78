"""A model with a copy head: training, likelihoods and decoding are the same function."""

import pytest
import torch

from osler.eval.likelihood import label_logprobs
from osler.inference.engine import InferenceEngine
from osler.inference.recompute import generate_by_recompute
from osler.model.config import DenseAttentionConfig, ModelConfig
from osler.model.transformer import SummedLoss, Transformer
from osler.monitor.model_stats import ProbeRows, prediction_stats
from osler.ops.sampling_params import SamplingParams


def build(window: int | None = None) -> Transformer:
    attention = DenseAttentionConfig(window=window)
    shape = ModelConfig(vocab_size=130, copy_head_dim=16, attention=attention, head_init="normal", residual_init="scaled")
    model = Transformer(shape)
    model.init_weights(3)
    with torch.no_grad():
        model.copy_head.k_proj.weight.mul_(4)  # type: ignore[union-attr]  # so that copies weigh as much as words
    return model


def test_loss_likelihood_and_logits_agree() -> None:
    model, draw = build(), torch.Generator().manual_seed(1)
    ids = torch.randint(20, (3, 24), generator=draw)
    ids, labels = ids[:, :-1], ids[:, 1:]
    for document in (None, (torch.arange(23) >= 9).long().expand(3, -1)):
        hidden = model(ids, document_BT=document)
        with pytest.raises(ValueError, match=r"model\.copies"):
            model.logits(hidden)
        log_BTV = model.logits(hidden, model.copies(hidden, ids, document)).log_softmax(-1)
        logp = log_BTV.gather(-1, labels[..., None]).squeeze(-1)
        features, weight = model.head(hidden)
        without = (features @ weight.T)[:, :130].log_softmax(-1).gather(1, labels.reshape(-1, 1)).squeeze(1)
        assert (logp.flatten() - without).abs().max() > 0.1
        torch.testing.assert_close(SummedLoss(model)(ids, labels, document), -logp.sum())
        torch.testing.assert_close(label_logprobs(model, ids, labels, document)[1], logp.flatten())
        rows = ProbeRows(ids, labels, document)
        right = prediction_stats(model, hidden, rows)["train/token_accuracy"]
        assert right.item() == pytest.approx((log_BTV.argmax(-1) == labels).float().mean().item())
        sure = prediction_stats(model, hidden, rows)["train/label_probability"]
        assert sure.item() == pytest.approx(logp.exp().mean().item(), rel=1e-4)


def test_documents_do_not_copy_from_each_other() -> None:
    model, ids = build(), torch.randint(20, (1, 24), generator=torch.Generator().manual_seed(2))
    document = (torch.arange(23) >= 9).long()[None]
    both = label_logprobs(model, ids[:, :-1], ids[:, 1:], document)[1]
    alone = label_logprobs(model, ids[:, 9:-1], ids[:, 10:])[1]
    torch.testing.assert_close(both[9:], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_decoding_equals_recomputation(temperature: float, window: int | None) -> None:
    model = build(window)
    prompts = [[5], [7, 8, 9, 7, 8], list(range(20)) * 2, [7, 8, 9, 7, 8, 9]]
    sampling = SamplingParams(max_new_tokens=12, temperature=temperature)
    found = InferenceEngine(model).generate(prompts, sampling, samples_per_prompt=2)
    expected = generate_by_recompute(model, prompts, sampling, samples_per_prompt=2)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.ids == theirs.ids
        torch.testing.assert_close(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), atol=1e-5, rtol=1e-4)
