"""Sampling responses."""

import doctest

import pytest
import torch

from rlhf_helpers import rollout
from rlhf_helpers.logprobs import response_logprobs
from rlhf_helpers.rollout import mask_after_eos, sample_responses

PROMPTS = ["what does the duck say?", "what is hot?", "name something red."]


def test_docstring_examples():
    result = doctest.testmod(rollout)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_mask_ends_with_the_first_eos():
    tokens = torch.tensor([[2, 2, 2], [7, 2, 7], [7, 7, 2], [7, 7, 7]])
    expected = [[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]]
    assert mask_after_eos(tokens, eos=2).tolist() == expected


def test_shapes_masks_and_texts(base, tokenizer):
    r = sample_responses(base, tokenizer, PROMPTS, response_length=12, seed=0)
    width = r.response_mask.shape[1]
    assert width <= 12
    assert r.input_ids.shape == r.attention_mask.shape
    assert torch.equal(r.attention_mask[:, -width:], r.response_mask)
    tokens = r.input_ids[:, -width:]
    for row, mask, text, finished in zip(tokens, r.response_mask, r.texts, r.finished, strict=True):
        real = row[mask.bool()]
        assert finished == (real[-1] == tokenizer.eos_token_id)
        assert tokenizer.decode(real, skip_special_tokens=True).strip() == text
        assert "<|" not in text


def test_a_seed_repeats_the_draw_and_leaves_the_generator_alone(base, tokenizer):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = sample_responses(base, tokenizer, PROMPTS, 8, seed=3)
    assert torch.equal(torch.rand(1), expected)
    second = sample_responses(base, tokenizer, PROMPTS, 8, seed=3)
    other = sample_responses(base, tokenizer, PROMPTS, 8, seed=4)
    assert torch.equal(first.input_ids, second.input_ids)
    assert first.texts != other.texts


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_scored_distribution(base, tokenizer, temperature):
    """Frequencies of first tokens against the probabilities that `response_logprobs` gives.

    With generate's default top_k of 50 the rare tokens would never come, and this fails.
    """
    count = 2000
    r = sample_responses(base, tokenizer, [PROMPTS[0]] * count, 2, temperature=temperature, seed=0)
    logprobs = response_logprobs(base, r.input_ids, r.attention_mask, 2, temperature)[:, 0]
    first = r.input_ids[:, -2]
    for token in first.unique():
        p = logprobs[first == token][0].exp().item()
        share = (first == token).float().mean().item()
        assert abs(share - p) < 5 * (p * (1 - p) / count) ** 0.5 + 1e-3
    # −log p of a sample is the entropy on average, if and only if both are the same distribution
    with torch.no_grad():
        logits = base(r.input_ids[:1, :-2]).logits[0, -1] / temperature
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    error = logprobs.std() / count**0.5
    assert abs(-logprobs.mean() - entropy) < 4 * error


def test_a_models_own_generation_settings_do_not_bend_the_samples(base, tokenizer, monkeypatch):
    plain = sample_responses(base, tokenizer, PROMPTS * 10, 8, seed=0)
    for name, value in (("repetition_penalty", 5.0), ("top_k", 2), ("top_p", 0.1)):
        monkeypatch.setattr(base.generation_config, name, value)
    bent = sample_responses(base, tokenizer, PROMPTS * 10, 8, seed=0)
    assert torch.equal(plain.input_ids, bent.input_ids)


def test_left_padding_does_not_change_what_is_sampled_from(base, tokenizer):
    alone = sample_responses(base, tokenizer, ["what is hot?"], 4, temperature=1e-3, seed=0)
    padded = sample_responses(base, tokenizer, PROMPTS, 4, temperature=1e-3, seed=0)
    assert padded.texts[1] == alone.texts[0]
