"""The check of exercise 03, part 4: which fault made which training log."""

import csv
from collections.abc import Mapping

from rlhf_helpers.checks.exercise import NOT_ATTEMPTED
from rlhf_helpers.presets import ASSETS

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
    path = ASSETS / "ppo_logs" / f"{name}.csv"
    with path.open(encoding="utf-8", newline="") as file:
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
    for log in _ANSWERS:
        if log not in answers:
            raise ValueError(
                f"there is no answer for log {log!r}, only for {list(answers)}; give ..."
            )
    for log, right in _ANSWERS.items():
        given = plain(answers[log])
        answer = next((key for key in FAULTS if given in map(plain, (key, FAULTS[key]))), None)
        if answers[log] is ...:
            print(f"{log}: {NOT_ATTEMPTED}")
        elif answer is None:
            print(f"{log}: {answers[log]!r} is no fault of the list; choose from {list(FAULTS)}.")
        elif answer == right:
            print(f"{log}: correct, {FAULTS[right]}.")
        else:
            evidence = _EVIDENCE[answer].format_map(facts(training_log(log)))
            print(f"{log}: it is not that {FAULTS[answer]}. Then {evidence}.")


def plain(answer: object) -> str:
    """An answer without all that does not count in it: blanks, marks and capitals."""
    return "".join(filter(str.isalnum, str(answer).lower()))


def facts(rows: list[dict[str, float]]) -> dict[str, str]:
    """What evidence can quote of a log: each column's range, most, start and end."""
    facts = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        low, high = f"{min(values):.3g}", f"{max(values):.3g}"
        facts[name] = f"{low} throughout" if low == high else f"between {low} and {high}"
        facts[f"max_{name}"] = high
        facts[f"start_{name}"], facts[f"end_{name}"] = f"{values[0]:.3g}", f"{values[-1]:.3g}"
    return facts
