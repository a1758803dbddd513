"""Sampling responses."""

import copy
import doctest
import json
import logging
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import CompileConfig, GenerationConfig, WatermarkingConfig

from rlhf_helpers import rollout
from rlhf_helpers.base import load_base
from rlhf_helpers.guards import context_length
from rlhf_helpers.logprobs import response_logprobs
from rlhf_helpers.presets import load_preset
from rlhf_helpers.roles import Roles
from rlhf_helpers.rollout import mask_after_eos, sample_responses
from rlhf_helpers.text import encode_prompts

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


# One value for each setting that could bend, cut or multiply samples, as a model's folder may hold.
PLANTED = {
    "max_length": 3,
    "max_new_tokens": 1,
    "min_length": 60,
    "min_new_tokens": 8,
    "early_stopping": True,
    "max_time": 1e-9,
    "stop_strings": ["e"],
    "do_sample": False,
    "num_beams": 3,
    "use_mtp": True,
    "use_cache": False,
    "cache_implementation": "static",
    "cache_config": {"backend": "quanto"},
    "max_cache_len": 4,
    "temperature": 0.1,
    "top_k": 2,
    "top_p": 0.1,
    "min_p": 0.5,
    "top_h": 0.1,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.2,
    "eta_cutoff": 0.2,
    "repetition_penalty": 5.0,
    "encoder_repetition_penalty": 5.0,
    "length_penalty": -3.0,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[i] for i in range(20, 400)],
    "renormalize_logits": True,
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 7,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (0, 5.0),
    "suppress_tokens": list(range(20, 400)),
    "begin_suppress_tokens": list(range(20, 400)),
    "sequence_bias": [[[i], -9.0] for i in range(20, 400)],
    "token_healing": True,
    "guidance_scale": 3.0,
    "watermarking_config": WatermarkingConfig(bias=9.0),
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "pad_token_id": 9,
    "bos_token_id": 9,
    "eos_token_id": list(range(3, 200)),
    "encoder_no_repeat_ngram_size": 1,
    "decoder_start_token_id": 9,
    "is_assistant": True,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.1,
    "prompt_lookup_num_tokens": 3,
    "max_matching_ngram_size": 1,
    "assistant_early_exit": 1,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "assistant_ensemble_weight": 0.9,
    "speculation_type": "dflash",
    "compile_config": CompileConfig(),
    "disable_compile": True,
    "continuous_batching_config": {"page_size": 4},
    "low_memory": True,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "diversity_penalty": 5.0,
    "num_beam_groups": 3,
    "constraints": [7],
    "force_words_ids": [[7]],
    "prefill_chunk_size": 2,
}
BENDING = ("min_p", "no_repeat_ngram_size", "suppress_tokens", "num_beams", "eos_token_id")


def test_every_setting_that_generate_knows_is_planted_below():
    """A new version of transformers may know more."""
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert known - {"transformers_version"} <= set(PLANTED)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", PLANTED)
def test_a_models_own_setting_does_not_bend_the_samples(base, tokenizer, monkeypatch, caplog, name):
    plain = sample_responses(base, tokenizer, PROMPTS, 8, seed=0)
    own = copy.deepcopy(base.generation_config)
    setattr(own, name, PLANTED[name])
    monkeypatch.setattr(base, "generation_config", own)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    bent = sample_responses(base, tokenizer, PROMPTS, 8, seed=0)
    assert torch.equal(plain.input_ids, bent.input_ids)
    assert torch.equal(plain.response_mask, bent.response_mask)
    assert base.generation_config is own and getattr(own, name) == PLANTED[name]
    assert not caplog.records


@pytest.mark.parametrize("name", BENDING)
def test_plain_generate_is_bent_by_them(base, tokenizer, monkeypatch, name):
    """Else the test above could not fail."""
    batch = encode_prompts(tokenizer, PROMPTS, 24)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 8, "pad_token_id": 0}

    def draw():
        torch.manual_seed(0)
        return base.generate(**batch, **settings)

    plain = draw()
    monkeypatch.setattr(base, "generation_config", copy.deepcopy(base.generation_config))
    setattr(base.generation_config, name, PLANTED[name])
    bent = draw()
    assert plain.shape != bent.shape or not torch.equal(plain, bent)


def test_settings_in_a_models_folder_do_not_bend_the_frequencies(tokenizer, tmp_path):
    """As many as a generation_config.json may hold at once; through a role, as PPO samples."""
    folder = tmp_path / "model"
    shutil.copytree(load_preset("pocket").model, folder)
    bent = {"min_p": 0.3, "typical_p": 0.5, "no_repeat_ngram_size": 1, "suppress_tokens": [20, 21]}
    bent |= {"do_sample": True, "repetition_penalty": 1.5, "eos_token_id": [1, 2, 3, 50]}
    (folder / "generation_config.json").write_text(json.dumps(bent))
    roles = Roles(load_base(load_preset("pocket", model=str(folder))))
    roles.add("policy")
    assert roles.base.generation_config.min_p == 0.3
    count, model = 2000, roles.use("policy")
    r = sample_responses(model, tokenizer, [PROMPTS[0]] * count, 2, seed=0)
    logprobs = response_logprobs(model, r.input_ids, r.attention_mask, 2)[:, 0]
    first = r.input_ids[:, -2]
    for token in first.unique():
        p = logprobs[first == token][0].exp().item()
        share = (first == token).float().mean().item()
        assert abs(share - p) < 5 * (p * (1 - p) / count) ** 0.5 + 1e-3
    assert roles.base.generation_config.min_p == 0.3


def test_a_draw_that_fails_leaves_the_models_settings(base, tokenizer, monkeypatch):
    own = base.generation_config

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(base, "forward", fail)
    with pytest.raises(KeyboardInterrupt):
        sample_responses(base, tokenizer, PROMPTS, 8)
    assert base.generation_config is own


@pytest.mark.parametrize(
    "config, length",
    [
        ({"max_position_embeddings": 64}, 64),
        ({"max_position_embeddings": None, "max_seq_len": 32}, 32),
        ({"max_position_embeddings": None}, sys.maxsize),
        ({}, sys.maxsize),
    ],
)
def test_a_context_length_may_be_missing(config, length):
    assert context_length(SimpleNamespace(config=SimpleNamespace(**config))) == length
