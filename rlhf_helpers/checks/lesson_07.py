"""The checks of exercise 07: six patients to diagnose, and a trainer to mend."""

import csv
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from rlhf_helpers import ppo, rollout
from rlhf_helpers.checks.diagnosis import judge
from rlhf_helpers.checks.exercise import NOT_ATTEMPTED, wrapped
from rlhf_helpers.preflight import CHECKS, preflight
from rlhf_helpers.presets import ASSETS
from rlhf_helpers.roles import Roles
from rlhf_helpers.text import Prompt

# --- lesson 07: six patients -----------------------------------------------------------------

HEALTHY = "healthy"
SEED = "1"  # the lesson shows another
PATIENTS = {
    "A": "one_token_off",
    "B": "eos_masked_out",
    "C": "kl_sign",
    "D": "swapped_labels",
    "E": "generate_defaults",
    "F": "lost_gradient",
}
# What a learner sees; gold, and what lesson 07 computes besides a usual log, are for the autopsy.
COLUMNS = (
    "update score kl entropy length finished first_ratio clip_fraction approx_kl policy_loss "
    "policy_grad_norm explained_variance value_loss"
).split()
ILLNESSES = {
    "one_token_off": "log-probabilities are read from the logits at a token's own place",
    "eos_masked_out": "EOS is left out of the response mask, as if it were padding",
    "kl_sign": "the KL penalty has the wrong sign",
    "swapped_labels": "the reward model learnt from pairs with chosen and rejected exchanged",
    "generate_defaults": "answers are sampled at temperature 0.7 with top-k 50, and scored without",
    "lost_gradient": "another adapter is active when the policy's loss goes backward",
    "ratio_to_reference": "the ratio is taken to the reference, not to the policy that sampled",
    "kl_without_gradient": "KL is added to the loss as a constant, and is not in the reward",
    HEALTHY: "nothing is wrong with it",
}
_EVIDENCE = {
    "one_token_off": (
        "the log-probabilities would be those of other tokens, and entropy, their mean, several "
        "nats from the first row on; in this log it begins at {start_entropy}"
    ),
    "eos_masked_out": (
        "one token of each answer, its EOS, would be missing before anything is learnt, and length "
        "begin one below the healthy run's; in this log it begins at {start_length}"
    ),
    "kl_sign": (
        "KL would be paid for, and grow to the end; in this log it is at most {max_kl}, and "
        "{end_kl} at the end"
    ),
    "swapped_labels": (
        "the trainer would do what it is told, and in the first row kl, entropy, length, finished "
        "and first_ratio be the healthy run's, and the sign of the score turned; in this log one "
        "of these is not so"
    ),
    "generate_defaults": (
        "the first batch, from which nothing is learnt yet, would be of likelier tokens, and "
        "entropy begin below the healthy run's; in this log it begins at {start_entropy}"
    ),
    "lost_gradient": (
        "the policy would never move, and its gradient be 0; in this log policy_grad_norm is "
        "{policy_grad_norm}"
    ),
    "ratio_to_reference": (
        "the ratio in the first step would leave 1 as soon as the policy has left the reference; "
        "in this log first_ratio is {first_ratio}"
    ),
    "kl_without_gradient": (
        "the loss would hold β times the KL of a token, 0.1 · {end_kl} / {end_length} in the last "
        "row, and the rest of it is near 0; in this log policy_loss ends at {end_policy_loss}"
    ),
    HEALTHY: (
        "every column would look like the healthy run's, and the answers be better than SFT's; in "
        "this log entropy is {entropy}, finished {finished}, kl at most {max_kl}. If you find "
        "nothing in the numbers, read the answers"
    ),
}


def patient(name: str) -> tuple[list[dict[str, float]], list[dict[str, str]]]:
    """A recorded run with a fault, or without: its log, and answers of its last batch.

    Args:
        name: "A" to "F", or "healthy".

    Returns:
        Rows with `COLUMNS`; and rows with `prompt`, `text` and `finished`.

    Raises:
        ValueError: for another name.
    """
    known = PATIENTS | {HEALTHY: HEALTHY}
    if name not in [*known]:
        raise ValueError(f"there is no patient {name!r}; choose one of {', '.join(known)}")
    rows = [{c: float(row[c]) for c in COLUMNS} for row in _recorded("updates", known[name])]
    texts = _recorded("texts", known[name])
    return rows, [{c: row[c] for c in ("prompt", "text", "finished")} for row in texts]


def _recorded(table: str, fault: str) -> list[dict[str, str]]:
    with (ASSETS / "clinic" / f"{table}.csv").open(encoding="utf-8", newline="") as file:
        return [r for r in csv.DictReader(file) if (r["fault"], r["seed"]) == (fault, SEED)]


def check_patients(answers: Mapping[str, str]) -> None:
    """Check the diagnosis of six patients, and say what speaks against a wrong one.

    Args:
        answers: for each of "A" to "F" a key of `ILLNESSES` or what it stands for, or `...` for not
            yet; only letters and digits count, and not their case.

    Raises:
        ValueError: for a patient that is missing.

    Example:
        >>> check_patients(dict.fromkeys("ABCDEF", ...))  # doctest: +ELLIPSIS
        A: not attempted yet.
        ...
    """
    judge(answers, PATIENTS, ILLNESSES, _EVIDENCE, lambda name: patient(name)[0])


# --- lesson 07: a trainer to mend ------------------------------------------------------------

_EOS = 1
_TOKENS = ((5, 6, _EOS, 0), (_EOS, 0, 0, 0), (5, 6, 7, 8), (7, _EOS, 4, _EOS))
_MASK = ((1, 1, 1, 0), (1, 0, 0, 0), (1, 1, 1, 1), (1, 1, 0, 0))
_MASK_QUESTION = (
    "The policy has chosen EOS like any other token. If the mask ends before it, what rewards an "
    "ending, at which token is the score, and what is left of an answer that begins with EOS?"
)
# By check of preflight what to ask oneself if it fails.
_QUESTIONS = {
    "first ratio is 1": (
        "Before the first step nothing has been learnt from a batch, so new over old is 1 if the "
        "old numbers are those of the policy that sampled. Whose are yours?"
    ),
    "the price of KL calls it back": (
        "Take one token that the policy finds twice as likely as the reference does. What is its "
        "reward, by hand, with a score of 0? A price has to be below 0 there. (KL cannot be "
        "negative in the mean; a price that is paid out makes it grow.)"
    ),
    "one prompt can be overfitted": (
        "On a single prompt the score must rise. Which way does the loss push a token with a "
        "positive advantage, and does its gradient arrive?"
    ),
}


def check_mended(
    roles: Roles,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    mask_after_eos: Callable[[Tensor, int], Tensor],
    shape_rewards: Callable[..., Tensor],
    policy_objective: Callable[..., tuple[Tensor, dict[str, float]]],
) -> None:
    """Run `preflight` on a trainer with the learner's three functions, and ask what its checks ask.

    The mask is looked at by itself first: where it is wrong the other checks could not even run.

    Args:
        mask_after_eos, shape_rewards, policy_objective: take the place of those of the package, and
            are called as they are.

    Raises:
        Exception: what the learner's functions raise, except where they are not written yet.
    """
    places = (
        (rollout, "mask_after_eos", mask_after_eos),
        (ppo, "shape_rewards", shape_rewards),
        (ppo, "policy_objective", policy_objective),
    )
    try:
        if fault := _mask_fault(mask_after_eos):
            print(wrapped(f"mask_after_eos: {fault}"))
            return
        with ExitStack() as stack:
            for place in places:
                stack.enter_context(patch.object(*place))
            findings = preflight(roles, tokenizer, prompts)
    except NotImplementedError:
        print(f"check_mended: {NOT_ATTEMPTED}")
        return
    failed = [finding for finding in findings if not finding.passed]
    for finding in failed:
        question = _QUESTIONS.get(finding.name, f"Look {CHECKS[finding.name]}.")
        print(wrapped(f"{finding.name}: no, {finding.seen}. {question}"))
    if not failed:
        print(f"check_mended: correct. All {len(findings)} checks of preflight hold.")


def _mask_fault(mask_after_eos: Callable[[Tensor, int], Tensor]) -> str:
    mask = mask_after_eos(torch.tensor(_TOKENS), _EOS)
    for tokens, got, wanted in zip(_TOKENS, mask.tolist(), _MASK, strict=True):
        if got != list(wanted):
            rows = f"for the tokens {list(tokens)}, where {_EOS} is EOS, it is {got}"
            return f"{rows}, expected {list(wanted)}. {_MASK_QUESTION}"
    return ""
