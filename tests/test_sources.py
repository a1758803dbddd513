"""Who tells how good answers really are."""

import pytest
import torch

from rlhf_helpers.base import load_base
from rlhf_helpers.pocket.rubric import gold_reward
from rlhf_helpers.presets import ASSETS, load_preset
from rlhf_helpers.reward import score_tokens
from rlhf_helpers.roles import Roles
from rlhf_helpers.rollout import sample_responses
from rlhf_helpers.sources import Judge, Rubric, load_gold

PROMPTS = ["what does the duck say?", "where does the duck live?", "tell me about the duck."] * 30


@pytest.fixture(scope="module")
def roles(pocket):
    roles = Roles(load_base(pocket))
    roles.load("sft", ASSETS / "sft")
    roles.load("judge", ASSETS / "reward")
    return roles


@pytest.fixture(scope="module")
def rollout(roles, tokenizer):
    return sample_responses(roles.use("sft"), tokenizer, PROMPTS, 6, seed=1)


def test_in_the_pocket_world_gold_is_the_rubric(pocket, rollout):
    gold = load_gold(pocket)
    assert isinstance(gold, Rubric) and gold.name == "gold"
    assert 0 < rollout.finished.sum() < len(PROMPTS)  # cut-off responses lose points
    rows = zip(PROMPTS, rollout.texts, rollout.finished.tolist(), strict=True)
    expected = [gold_reward(*row).total for row in rows]
    torch.testing.assert_close(gold(PROMPTS, rollout), torch.tensor(expected))


def test_the_judge_scores_what_was_sampled_and_leaves_the_active_role(roles, rollout):
    judge = Judge(roles)
    roles.use("sft")
    scores = judge(PROMPTS, rollout)
    assert roles.active == "sft" and scores.shape == (len(PROMPTS),) and not scores.requires_grad
    with torch.no_grad():
        expected = score_tokens(roles, "judge", rollout.input_ids, rollout.attention_mask)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_without_a_rubric_the_learners_own_judge_is_loaded(pocket, tmp_path, roles, rollout):
    settings = {"model": pocket.model, "device": "cpu", "compute_dtype": "float32"}
    preset = load_preset("single_gpu", **settings, double_quant=False, runs=tmp_path)
    with pytest.raises(FileNotFoundError, match="no adapter .judge.*02 for reward and judge"):
        load_gold(preset)
    roles.save("judge", tmp_path / "single_gpu" / "judge")
    gold = load_gold(preset)
    assert gold.name == "judge"
    torch.testing.assert_close(gold(PROMPTS, rollout), Judge(roles)(PROMPTS, rollout))
