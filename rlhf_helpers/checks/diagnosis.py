"""Logs to be read: which fault made which, in exercise 03, part 4; `judge` serves others too."""

import csv
from collections.abc import Callable, Mapping

from rlhf_helpers.checks.exercise import NOT_ATTEMPTED
from rlhf_helpers.presets import ASSETS
from rlhf_helpers.validation import checked

FAULTS = {
    "reference ratio": "the ratio is taken against the reference, not against the old policy",
    "fresh old": "the old log-probabilities are computed anew before each step",
    "penalty sign": "the KL penalty has the wrong sign: it pays for leaving the reference",
    "whitened returns": "the critic is trained on whitened returns",
    "idle critic": "the critic is never trained",
    "no EOS": "EOS is left out of the response mask, so it is never learnt",
}
_ANSWERS = {"A": "penalty sign", "B": "reference ratio", "C": "fresh old"}
_EVIDENCE = {
    "reference ratio": (
        "the ratio in the first step would leave 1 as soon as the policy has left the reference; "
        "in this log first_ratio is {first_ratio}"
    ),
    "fresh old": (
        "every ratio would be 1, and nothing would ever be clipped; in this log clip_fraction is "
        "{clip_fraction}"
    ),
    "penalty sign": (
        "KL would be paid for, and grow to the end; in this log kl is at most {max_kl}, and "
        "{end_kl} at the end"
    ),
    "whitened returns": (
        "the critic would learn other numbers from the first update on; in this log the first row "
        "is that of the healthy run, explained_variance included"
    ),
    "idle critic": (
        "explained_variance would stay near where it began; in this log it goes from "
        "{start_explained_variance} to {end_explained_variance}"
    ),
    "no EOS": (
        "one token of each response would be missing from the first update on; in this log the "
        "first row's length and explained_variance are those of the healthy run. Look for a fault "
        "that does nothing while the policy is still the reference"
    ),
}


def training_log(name: str) -> list[dict[str, float]]:
    """A recorded training log of exercise 03, one row for each update.

    Args:
        name: "healthy", or "A", "B" or "C", which have a fault each.

    Raises:
        ValueError: for another name.
    """
    if name not in ("healthy", *_ANSWERS):
        raise ValueError(f"there is no log {name!r}; choose healthy, A, B or C")
    return read_log("ppo_logs", name)


def read_log(folder: str, name: str) -> list[dict[str, float]]:
    """The rows of a log among the assets."""
    with (ASSETS / folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def check_diagnosis(answers: Mapping[str, str]) -> None:
    """Check the learner's diagnosis of the three logs, and say what speaks against a wrong one.

    Args:
        answers: for each of the logs "A", "B" and "C" a key of `FAULTS` or what it stands for, or
            `...` for not yet; only letters and digits count, and not their case.

    Raises:
        ValueError: for a log that is missing.

    Example:
        >>> check_diagnosis({"A": ..., "B": ..., "C": ...})
        A: not attempted yet.
        B: not attempted yet.
        C: not attempted yet.
    """
    judge(answers, _ANSWERS, FAULTS, _EVIDENCE, training_log)


@checked
def judge(
    answers: Mapping[str, str],
    right: Mapping[str, str],
    causes: Mapping[str, str],
    evidence: Mapping[str, str],
    log_of: Callable[[str], list[dict[str, float]]],
) -> None:
    """Say for each log whether the answer is right, or what in the log speaks against it.

    Args:
        answers: for each log a key of `causes` or its text, or `...` for not yet.
        right: for each log the key.
        evidence: against each cause, with facts of the log in braces.
        log_of: the rows of a log.
    """
    for log in right:
        if log not in answers:
            raise ValueError(
                f"there is no answer for log {log!r}, only for {list(answers)}; give ..."
            )
    for log, cause in right.items():
        plain = _plain(answers[log])
        answer = next((key for key in causes if plain in map(_plain, (key, causes[key]))), None)
        if answers[log] is ...:
            print(f"{log}: {NOT_ATTEMPTED}")
        elif answer is None:
            print(f"{log}: {answers[log]!r} is none of the list; choose from {list(causes)}.")
        elif answer == cause:
            print(f"{log}: correct, {causes[cause]}.")
        else:
            against = evidence[answer].format_map(_facts(log_of(log)))
            print(f"{log}: it is not that {causes[answer]}. Then {against}.")


def _plain(answer: object) -> str:
    return "".join(filter(str.isalnum, str(answer).lower()))


def _facts(rows: list[dict[str, float]]) -> dict[str, str]:
    facts = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        low, high = f"{min(values):.3g}", f"{max(values):.3g}"
        facts[name] = f"{low} throughout" if low == high else f"between {low} and {high}"
        facts[f"max_{name}"] = high
        facts[f"start_{name}"], facts[f"end_{name}"] = f"{values[0]:.3g}", f"{values[-1]:.3g}"
    return facts
