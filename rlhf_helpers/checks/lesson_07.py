"""The checks of exercise 07: six patients to diagnose, and a trainer to mend."""

import csv
import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from unittest.mock import patch

from transformers import PreTrainedTokenizerBase

from rlhf_helpers import ppo, rollout
from rlhf_helpers.checks.diagnosis import facts, plain
from rlhf_helpers.checks.exercise import NOT_ATTEMPTED, wrapped
from rlhf_helpers.clinic import FAULTS
from rlhf_helpers.preflight import preflight
from rlhf_helpers.presets import ASSETS
from rlhf_helpers.roles import Roles
from rlhf_helpers.text import Prompt

SEED = "1"  # the lesson shows others
PATIENTS = {
    "A": "moving_reference",
    "B": "eos_masked_out",
    "C": "kl_sign",
    "D": "swapped_labels",
    "E": "another_temperature",
    "F": "lost_gradient",
}
# What a learner sees; gold, and what lesson 07 computes besides a usual log, are for the autopsy.
COLUMNS = (
    "update score kl entropy length finished first_ratio clip_fraction approx_kl "
    "policy_grad_norm explained_variance value_loss"
).split()
# By possible answer what would be seen then, and what is seen.
EVIDENCE = {
    "moving_reference": (
        "policy and reference would be equal to the last digit in every update, however much is "
        "learnt; in this log kl is {kl}"
    ),
    "eos_masked_out": (
        "nothing would teach the policy to end, and the last token of each answer would be "
        "missing from the first row on; in this log finished is {finished}, and length begins at "
        "{start_length}"
    ),
    "kl_sign": (
        "KL would be paid for, and grow to the end; in this log it is at most {max_kl}, and "
        "{end_kl} at the end"
    ),
    "swapped_labels": (
        "every number could be that of a healthy run, since the trainer does what it is told; here "
        "one is not. Which column has to have a certain value, and has another?"
    ),
    "another_temperature": (
        "the first batch, from which nothing has been learnt yet, would be of likelier tokens than "
        "the policy's own, and entropy would begin clearly below the healthy run's; in this log it "
        "begins at {start_entropy}"
    ),
    "lost_gradient": (
        "the policy would never move, its ratios be 1 and its gradient 0; in this log "
        "policy_grad_norm is {policy_grad_norm}"
    ),
    "one_token_off": (
        "the log-probabilities would be those of other tokens, and entropy, their mean, several "
        "nats; in this log it is {entropy}"
    ),
    "bare_reference": (
        "KL would not be 0 before the first step; in this log it begins at {start_kl}"
    ),
    "ratio_to_reference": (
        "the ratio in the first step would leave 1 as soon as the policy has left the reference; "
        "in this log first_ratio is {first_ratio}"
    ),
    "kl_without_gradient": (
        "nothing would hold the policy back, and KL would go on rising; in this log it is at most "
        "{max_kl}, and {end_kl} at the end"
    ),
}
# By check of preflight what to ask oneself if it fails.
QUESTIONS = {
    "an answer counts to its EOS": (
        "The policy has chosen EOS like any other token. If the mask ends before it, what rewards "
        "an ending, and at which token is the score?"
    ),
    "first ratio is 1": (
        "Before the first step nothing has been learnt from this batch, so new over old is 1 if "
        "the old numbers are those of the policy that sampled. Whose are yours?"
    ),
    "the price of KL calls it back": (
        "Take one token that the policy finds twice as likely as the reference does. What is its "
        "reward, by hand, with a score of 0? A price has to be below 0 there."
    ),
    "KL sees the policy move": (
        "After some steps policy and reference differ, and KL is above 0. If not, either the "
        "policy has learnt nothing, or it was compared with itself."
    ),
    "one prompt can be overfitted": (
        "On a single prompt the score must rise. Which way does the loss push a token with a "
        "positive advantage, and does its gradient arrive?"
    ),
}


def patient(name: str) -> tuple[list[dict[str, float]], list[dict[str, str]]]:
    """A recorded run with a fault: its log, and answers of its last batch.

    Args:
        name: "A" to "F".

    Returns:
        Rows with `COLUMNS`; and rows with `prompt`, `text` and `finished`.

    Raises:
        ValueError: for another name.
    """
    if name not in PATIENTS:
        raise ValueError(f"there is no patient {name!r}; choose one of {', '.join(PATIENTS)}")
    rows = [{c: float(row[c]) for c in COLUMNS} for row in _rows("updates", name)]
    texts = [{c: row[c] for c in ("prompt", "text", "finished")} for row in _rows("texts", name)]
    return rows, texts


def _rows(file: str, name: str) -> list[dict[str, str]]:
    with (ASSETS / "clinic" / f"{file}.csv").open(encoding="utf-8", newline="") as opened:
        rows = csv.DictReader(opened)
        return [row for row in rows if (row["fault"], row["seed"]) == (PATIENTS[name], SEED)]


def illnesses() -> dict[str, str]:
    """The faults to choose from, each with what was done."""
    return {name: inspect.getdoc(FAULTS[name]).splitlines()[0] for name in EVIDENCE}


def check_patients(answers: Mapping[str, str]) -> None:
    """Check the diagnosis of six patients, and say what speaks against a wrong one.

    Args:
        answers: for each of "A" to "F" a key of `illnesses()`, or `...` for not yet; only letters
            and digits count, and not their case.

    Raises:
        ValueError: for a patient that is missing.

    Example:
        >>> check_patients(dict.fromkeys("ABCDEF", ...))  # doctest: +ELLIPSIS
        A: not attempted yet.
        ...
    """
    if missing := [name for name in PATIENTS if name not in answers]:
        raise ValueError(
            f"there is no answer for patient {missing[0]!r}, only for {list(answers)}; give ..."
        )
    known = {plain(name): name for name in EVIDENCE}
    for name, right in PATIENTS.items():
        answer = known.get(plain(answers[name]))
        if answers[name] is ...:
            text = NOT_ATTEMPTED
        elif answer is None:
            text = f"{answers[name]!r} is not on the list; choose from {', '.join(EVIDENCE)}."
        elif answer == right:
            text = f"correct, {right}."
        else:
            evidence = EVIDENCE[answer].format_map(facts(patient(name)[0]))
            text = f"it is not {answer}. Then {evidence}."
        print(wrapped(f"{name}: {text}"))


def check_mended(
    roles: Roles,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    mask_after_eos: Callable,
    shape_rewards: Callable,
    policy_objective: Callable,
) -> None:
    """Run `preflight` on a trainer with the learner's three functions, and ask what its checks ask.

    Args:
        mask_after_eos, shape_rewards, policy_objective: in the place of those of the package, and
            called as they are.

    Raises:
        What the learner's functions raise.
    """
    places = (
        (rollout, "mask_after_eos", mask_after_eos),
        (ppo, "shape_rewards", shape_rewards),
        (ppo, "policy_objective", policy_objective),
    )
    with ExitStack() as stack:
        for place in places:
            stack.enter_context(patch.object(*place))
        findings = preflight(roles, tokenizer, prompts)
    failed = [finding for finding in findings if not finding.passed]
    for finding in failed:
        question = QUESTIONS.get(finding.name, finding.meaning)
        print(wrapped(f"{finding.name}: no, {finding.seen}. {question}"))
    if not failed:
        print(f"check_mended: correct. All {len(findings)} checks of preflight hold.")
