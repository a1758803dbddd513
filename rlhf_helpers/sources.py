"""Which data and which gold a preset means: the pocket world's, or the learner's own."""

from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor

from rlhf_helpers.base import load_base
from rlhf_helpers.checkpoints import find_adapter
from rlhf_helpers.data import read_dataset
from rlhf_helpers.pocket import corpus, rubric, world
from rlhf_helpers.pocket.annotator import Annotator
from rlhf_helpers.pocket.preferences import written_preferences
from rlhf_helpers.presets import Preset
from rlhf_helpers.reward import score_tokens
from rlhf_helpers.roles import Roles
from rlhf_helpers.rollout import Rollout
from rlhf_helpers.text import Prompt
from rlhf_helpers.validation import checked

ROWS = 64  # responses that the judge reads at a time


@checked
def prompt_dataset(
    preset: Preset, split: str = "train", source: str | Path | None = None
) -> Dataset:
    """Prompts to respond to; column `prompt`.

    Args:
        split: `train`, `held_out`, and in the generated world its parts `held_out_phrasing` and
            `held_out_fact`; for other sources also the name of a split of theirs.
        source: a hub id, a folder or a file, as `data.read_dataset` takes it; None for the
            preset's data, which is the generated world where `preset.data` is None.

    Raises:
        ValueError: for an unknown split, and as `data.read_dataset`.
    """
    if source := source or preset.data:
        return read_dataset(str(source), split, ("prompt",), preset)
    return Dataset.from_dict({"prompt": world.prompts(split)})


@checked
def sft_dataset(
    preset: Preset, split: str = "train", source: str | Path | None = None, copies: int = 5
) -> Dataset:
    """Demonstrations to imitate; columns `prompt`, `completion`.

    Args:
        split, source: as for `prompt_dataset`.
        copies: how many demonstrations are written for each generated prompt.

    Raises:
        ValueError: as for `prompt_dataset`.
    """
    if source := source or preset.data:
        return read_dataset(str(source), split, ("prompt", "completion"), preset)
    return Dataset.from_list(corpus.demonstrations(split, copies, preset.seed))


@checked
def preference_dataset(
    preset: Preset,
    split: str = "train",
    source: str | Path | None = None,
    annotator: Annotator | None = None,
) -> Dataset:
    """Pairs of responses; columns `prompt`, `chosen`, `rejected`, and `probability` if generated.

    Generated pairs are two answers in the style of the base text, labelled by the annotator;
    `probability` is the chance with which the annotator chooses the one in `chosen`.

    Args:
        split, source: as for `prompt_dataset`. Where `preset.drop_unfit`, the pairs of a source to
            train on are halved by prompt: `train` is for the reward model, `judge` for another.
        annotator: who labels generated pairs; None for `Annotator()`.

    Raises:
        ValueError: as for `prompt_dataset`, and for a pair whose two responses are equal.
    """
    if source := source or preset.data:
        return read_dataset(str(source), split, ("prompt", "chosen", "rejected"), preset)
    annotator = annotator or Annotator()
    return Dataset.from_list(written_preferences(split, annotator, preset.seed))


class Rubric:
    """The gold reward of the generated world, by its rubric."""

    name = "gold"

    def __call__(self, prompts: list[str], rollout: Rollout) -> Tensor:
        """Points `[B]` of sampled responses, float32, at best 1.9 each."""
        if len(prompts) != len(rollout.texts):
            counts = f"{len(prompts)} prompts for {len(rollout.texts)} responses"
            raise ValueError(f"{counts}; give those of the rollout")
        rows = zip(prompts, rollout.texts, rollout.finished.tolist(), strict=True)
        return torch.tensor([rubric.gold_reward(*row).total for row in rows])


class Judge:
    """A second reward model, trained on comparisons that the first has not seen.

    It stands in for gold where nobody knows the truth: PPO is not trained on it, so a policy that
    exploits the first reward model's own mistakes does not please the judge as well. A mistake that
    both have learnt from the same people it does not show.

    Args:
        roles: with a role `judge` that has a head.
    """

    name = "judge"

    @checked
    def __init__(self, roles: Roles) -> None:
        roles.require_head("judge")
        self.roles = roles

    def __call__(self, prompts: list[Prompt], rollout: Rollout) -> Tensor:
        """Rewards `[B]` of sampled responses, in standard deviations, on the CPU."""
        device, active = self.roles.base.device, self.roles.active
        parts = zip(rollout.input_ids.split(ROWS), rollout.attention_mask.split(ROWS), strict=True)
        with self.roles.dense("judge"):
            scores = [
                score_tokens(self.roles, "judge", ids.to(device), mask.to(device)).cpu()
                for ids, mask in parts
            ]
        self.roles.use(active)
        return torch.cat(scores)


@checked
def load_gold(preset: Preset) -> Rubric | Judge:
    """Who tells how good answers really are: the rubric in the generated world, else the judge.

    The judge is loaded on a base of its own.

    Raises:
        FileNotFoundError: if there is no judge yet; lesson 02 trains it.

    Example:
        >>> load_gold(load_preset("pocket")).name  # doctest: +SKIP
        'gold'

    Source: Gao et al. (arXiv 2210.10760) judge by a second reward model, the larger one, in just
    this way.
    """
    if preset.name == "pocket":
        return Rubric()
    roles = Roles(load_base(preset))
    roles.load("judge", find_adapter(preset, "judge"))
    return Judge(roles)
