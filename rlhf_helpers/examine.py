"""What the numbers of a finished or running PPO run say of its health, without gold."""

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from numbers import Real
from statistics import fmean
from typing import NamedTuple

import torch

from rlhf_helpers.guards import shown
from rlhf_helpers.kinds import Whole
from rlhf_helpers.ppo import Experience, PPOStats
from rlhf_helpers.validation import checked

BROKEN, LOOK = "broken", "look"  # how bad an alarm is
EXACT = 1e-3  # how far rounding may move what is known exactly
WHITENED = 0.05  # how far from mean 0 and spread 1 advantages may be
PATIENCE = 3  # updates in a row before a number that scatters counts as having left its band
LONG = 10  # updates from which a run can be asked whether it learns
RISE = 0.1  # of the score that such a run must have reached, in its units
TINY = sys.float_info.min  # the smallest number above 0
# The healthy bands of lesson 04: rules of thumb for a run of its kind.
BANDS = {
    "kl": (0, 10),  # nats per response
    "entropy": (0.3, 1),  # nats per token
    "length": (3, 0.9 * 32),  # tokens; `examine` knows other limits
    "finished": (0.9, 1),
    "clip_fraction": (0.001, 0.2),
    "approx_kl": (0, 0.02),  # nats per token
    "explained_variance": (0, 1),
}


class Rule(NamedTuple):
    """A band, or a side of one, that a quantity must stay in, and what it can mean if it does not.

    Attributes:
        first, last: the updates in which it is asked.
        patience: how many of them in a row must be outside.
    """

    severity: str
    quantity: str
    low: float
    high: float
    meaning: str
    first: int = 1
    last: float = math.inf
    patience: int = 1


_RATIO = "the old log-probabilities are another policy's, or of another temperature, mask or pass"
_FIRST = "before the first step the policy is the reference: which weights are the reference's?"
_KL = (
    "once the policy has moved, KL is above 0 in the mean. At 0 the reference moves along, or "
    "nothing moves; below 0 the answers are not samples of the policy that is scored, or the "
    "difference is taken the other way round"
)
_LOST = (
    "no gradient reaches these weights: frozen, detached, an adapter was switched, or (without a "
    "critic) no group had answers with different scores"
)
_WHITE = "advantages are not whitened over the real tokens: is the padding among them?"
_RETURN = "the last return of an answer is not its last reward: are the critic's targets whitened?"
_RULES = (
    Rule(BROKEN, "first_ratio", 1 - EXACT, 1 + EXACT, _RATIO),
    Rule(BROKEN, "kl", -EXACT, EXACT, _FIRST, last=1),
    Rule(BROKEN, "kl", TINY, math.inf, _KL, first=2, patience=PATIENCE),
    Rule(BROKEN, "policy_grad_norm", TINY, math.inf, _LOST),
    Rule(BROKEN, "value_grad_norm", TINY, math.inf, _LOST),
    Rule(BROKEN, "advantage_mean", -WHITENED, WHITENED, _WHITE),
    Rule(BROKEN, "advantage_std", 1 - WHITENED, 1 + WHITENED, _WHITE),
    Rule(BROKEN, "return_gap", 0, EXACT, _RETURN),
    Rule(LOOK, "score", -1, 1, "a normalised score begins near 0: is this the right head?", last=1),
)
# What it can mean to stay below a band, and above; "" where a rule says it, or nothing is wrong.
_MEANINGS = {
    "kl": ("", "the policy has gone far: does it hack, and is KL paid for at all?"),
    "entropy": ("it says the same whatever the dice say", "are these the tokens that it chose?"),
    "length": ("it stops before it answers", "longer is paid for, or EOS is unlearnt"),
    "finished": ("EOS is unlearnt: masked out, or its penalty too small", ""),
    "clip_fraction": ("old and new policy are the same", "the steps are too large"),
    "approx_kl": ("", "the steps are too large, or there are too many on one batch"),
    "explained_variance": ("the critic is worse than a constant: what are its targets?", ""),
}
JUDGED = {"update", *_MEANINGS, *(rule.quantity for rule in _RULES)}
_SINCE = {"explained_variance": 5}  # its first updates are not asked


class Alarm(NamedTuple):
    """A quantity that has left its band.

    Attributes:
        quantity: its column in a log.
        severity: `broken` for what cannot be in a run that is as it should be; `look` for what can
            be, but is worth reading the answers and the code.
        updates: in which it is outside.
        value: the one farthest outside.
        meaning: what it can mean.
    """

    quantity: str
    severity: str
    updates: tuple[int, ...]
    value: float
    meaning: str

    def __str__(self) -> str:
        first, last, count = self.updates[0], self.updates[-1], len(self.updates)
        when = f"update {first}" if count == 1 else f"{count} updates from {first} to {last}"
        return f"{self.severity:6} {self.quantity:18} {self.value:9.4g}  {when}: {self.meaning}"


@checked
def log_row(stats: PPOStats) -> dict[str, float]:
    """One row of a log: what an update of `train_ppo` reports, and `sums` of its experience.

    Without a critic the columns about it and its advantages are missing.
    """
    names = "update score kl beta entropy length finished first_ratio".split()
    row = {name: getattr(stats, name) for name in names}
    row |= {name: stats.policy[name] for name in ("ratio", "clip_fraction", "approx_kl")}
    for role, report in (("policy", stats.policy), ("value", stats.value)):
        row |= {f"{role}_{name}": report[name] for name in ("loss", "grad_norm") if report}
    if not stats.value:
        return row  # there is no critic
    row["explained_variance"] = stats.value["explained_variance"]
    return row | sums(stats.experience)


def sums(experience: Experience) -> dict[str, float]:
    """What must come out of advantages and returns, whatever the critic knows.

    - `advantage_mean`, `advantage_std`: over the real tokens; 0 and 1 if they were whitened there.
    - `return_gap`: mean |R − r| at the last real token of a response. There R = A + V = r − V + V
      whatever γ, λ and V are, so it is 0 but for rounding.
    """
    mask = experience.rollout.response_mask
    spread, mean = torch.std_mean(experience.advantages[mask.bool()].double())
    last = mask.sum(-1, keepdim=True) - 1
    gap = (experience.returns - experience.rewards).gather(1, last).abs().mean()
    numbers = {"advantage_mean": mean, "advantage_std": spread, "return_gap": gap}
    return {name: number.item() for name, number in numbers.items()}


@checked
def examine(
    history: Iterable[PPOStats | Mapping[str, float]], response_length: Whole[1] = 32
) -> list[Alarm]:
    """Say which quantities of a run have left their band, when, and what that can mean.

    A column that a log lacks is not judged, and nor is gold, which nobody has.

    Args:
        history: what `train_ppo` yielded, or rows of a log with the names that `log_row` gives,
            `update` among them; at least two updates.
        response_length: the most tokens of a response in that run.

    Returns:
        `Alarm`s, those that say "broken" first. None if all is in its band, which does not prove
        that all is well.

    Raises:
        TypeError: for what is no list, a row that is neither PPOStats nor a mapping, and a column
            with a band that holds no number.
        ValueError: for no updates or one alone, updates that do not rise, a row without `update` or
            without any column that has a band, or a number that is not finite.

    Example:
        >>> rows = [{"update": u, "kl": kl} for u, kl in ((1, 0.0), (2, -0.4), (3, -0.9), (4, -2))]
        >>> [(alarm.quantity, alarm.severity, alarm.updates) for alarm in examine(rows)]
        [('kl', 'broken', (2, 3, 4))]

    Lesson 07 reads the alarms of planted faults.
    """
    if isinstance(history, Mapping | str) or not isinstance(history, Iterable):
        raise TypeError(f"history is {shown(history)}: give a list of rows, one for each update")
    rows = [log_row(row) if isinstance(row, PPOStats) else row for row in history]
    _check_rows(rows)
    rules = [*_RULES, *_band_rules(BANDS | {"length": (3, 0.9 * response_length)})]
    alarms = [alarm for rule in rules for alarm in _alarms(rows, rule)]
    if len(rows) >= LONG and "score" in rows[0]:
        start, end = (fmean(row["score"] for row in part) for part in (rows[:3], rows[-3:]))
        if end - start < RISE:
            updates = tuple(int(row["update"]) for row in rows[-3:])
            why = "the score has hardly risen in all: nothing is learnt, or not this"
            alarms.append(Alarm("score", LOOK, updates, end - start, why))
    return sorted(alarms, key=lambda alarm: alarm.severity != BROKEN)


def _band_rules(bands: Mapping[str, tuple[float, float]]) -> Iterator[Rule]:
    """What lesson 04 reads from its figure: longer than a spike outside of the band."""
    for name, (low, high) in bands.items():
        sides = zip(((low, math.inf), (-math.inf, high)), _MEANINGS[name], strict=True)
        for side, meaning in sides:
            if meaning:
                since = _SINCE.get(name, 1)
                yield Rule(LOOK, name, *side, meaning, first=since, patience=PATIENCE)


def _alarms(rows: list[dict], rule: Rule) -> Iterator[Alarm]:
    """An alarm, if a quantity is outside in so many updates in a row, about all in which it is."""
    asked = [row for row in rows if rule.first <= row["update"] <= rule.last]
    values = [row.get(rule.quantity, math.nan) for row in asked]
    beyond = [max(rule.low - x, x - rule.high) for x in values]  # NaN is not outside
    flags = [distance > 0 for distance in beyond]
    if any(all(flags[i : i + rule.patience]) for i in range(len(flags) - rule.patience + 1)):
        updates = tuple(int(row["update"]) for row, bad in zip(asked, flags, strict=True) if bad)
        worst = max((d, x) for d, x in zip(beyond, values, strict=True) if d > 0)[1]
        yield Alarm(rule.quantity, rule.severity, updates, worst, rule.meaning)


def _check_rows(rows: list[dict]) -> None:
    if len(rows) < 2:
        raise ValueError(
            f"history has {len(rows)} of the 2 updates that it needs at least: a band is about "
            "several; preflight checks what one can tell"
        )
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"history holds {shown(row)}: give PPOStats, or rows as dictionaries.")
        if "update" not in row or not row.keys() & BANDS.keys():
            raise ValueError(
                f"history[{i}] has the columns {', '.join(row)}; needed are update and one of "
                f"{', '.join(BANDS)}; for a log of TRL's use from_trl"
            )
        for name, value in row.items():
            if name in JUDGED and not isinstance(value, Real):
                raise TypeError(
                    f"history[{i}] has {name} {shown(value)}, which is no number; convert it with "
                    "float(...)"
                )
            undefined = name == "explained_variance" and math.isnan(value)  # all returns are equal
            if isinstance(value, Real) and not math.isfinite(value) and not undefined:
                raise ValueError(
                    f"history[{i}] has {name} {value}: the run has diverged there; give the "
                    "updates before it, and look at the last of them"
                )
    numbers = [row["update"] for row in rows]
    if any(later <= earlier for earlier, later in pairwise(numbers)):
        raise ValueError(
            f"history has updates {numbers}, which do not rise; give the rows of one run in order"
        )


# --- logs of TRL ---------------------------------------------------------------------------

# By our name theirs. TRL's approximate KL of PPO is ½(log ρ)², which is ours to second order.
TRL_PPO = {
    "score": "objective/scores",
    "kl": "objective/kl",
    "entropy": "policy/entropy_avg",
    "clip_fraction": "policy/clipfrac_avg",
    "approx_kl": "policy/approxkl_avg",
}
TRL_GROUPS = {
    "score": "reward",
    "entropy": "entropy",
    "length": "completions/mean_length",
    "finished": "completions/clipped_ratio",  # the share that was cut off
    "policy_grad_norm": "grad_norm",
}


def from_trl(log: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Rows for `examine` of a trainer's `state.log_history`: TRL's PPO (1.12), GRPO, RLOO (1.16).

    GRPO and RLOO have no critic, and by default one step for each batch, where the clip has nothing
    to do. They log `kl` only if β is not 0, as a mean over tokens: times the mean length it is,
    about, in nats per response.

    Args:
        log: the trainer's rows; those that sum up the run are left out.

    Returns:
        Rows with the names that `log_row` gives, and `update`, counted from 2: no log says that its
        first row is the first update, where KL would have to be 0.

    Raises:
        TypeError: for what is no list of rows.
        ValueError: for a log that is empty or of another trainer, or a row that lacks a column or
            has no number there.

    Example:
        >>> from_trl([dict.fromkeys(TRL_PPO.values(), 0.5)])[0]["kl"]
        0.5
    """
    whole = isinstance(log, Sequence) and all(isinstance(row, Mapping) for row in log)
    if not whole or isinstance(log, str):
        raise TypeError(f"log is {shown(log)}: give trainer.state.log_history, a list of rows")
    rows = [row for row in log if "train_runtime" not in row]
    if not rows:
        raise ValueError("log is empty: give trainer.state.log_history of a run that has logged")
    names = TRL_PPO if any("objective/kl" in row for row in rows) else TRL_GROUPS
    found = []
    for i, row in enumerate(rows):
        wanted = [*names.values(), *({"kl"} & row.keys())]
        if missing := [theirs for theirs in wanted if not isinstance(row.get(theirs), Real)]:
            lacks = "number in" if missing[0] in row else "column"
            raise ValueError(
                f"log[{i}] has no {lacks} {missing[0]!r}, only {', '.join(row)}; give "
                "trainer.state.log_history of TRL's PPO 1.12, or GRPO or RLOO 1.16"
            )
        new = {"update": i + 2} | {ours: float(row[theirs]) for ours, theirs in names.items()}
        if names is TRL_GROUPS:
            new["finished"] = 1 - new["finished"]
            new |= {"kl": row["kl"] * new["length"]} if "kl" in row else {}
        found.append(new)
    return found
