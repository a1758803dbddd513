"""What the numbers of a finished or running PPO run say of its health, without gold."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import torch

from rlhf_helpers.ppo import Experience, PPOStats

BROKEN, LOOK = "broken", "look"  # how bad an alarm is
PATIENCE = 3  # updates in a row before a number that scatters counts as having left its band
TOLERANCE = 1e-3  # of what must be exact: rounding in half precision, and of logs
WHITENED = 0.05  # how far from mean 0 and spread 1 advantages may be
SETTLED = 4  # updates after which the critic must be better than a constant
LONG = 10  # updates from which a run can be asked whether it learns
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
# What a number outside of its band can mean: below it, and above.
MEANINGS = {
    "kl": ("", "the policy has gone far from the reference: does it hack, or is the price paid?"),
    "entropy": (
        "it says nearly the same whatever the dice say",
        "it grows random, or what is scored is not what was sampled",
    ),
    "length": ("it stops before it answers", "longer is paid for, or EOS is unlearnt"),
    "finished": ("EOS is unlearnt: masked out, or its penalty too small", ""),
    "clip_fraction": (
        "the clip does nothing: the old log-probabilities are the new ones, or nothing moves",
        "the steps are too large",
    ),
    "approx_kl": ("", "the steps are too large, or there are too many on one batch"),
    "explained_variance": ("the critic is worse than a constant: what are its targets?", ""),
}


@dataclass(frozen=True)
class Alarm:
    """A quantity that has left its band.

    Attributes:
        quantity: its column in a log.
        severity: `broken` for what cannot be in a run that is as it should be; `look` for what can
            be, but is worth reading the answers and the code.
        updates: in which it is outside.
        value: the one farthest outside, or what the alarm speaks of.
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


def log_row(stats: PPOStats) -> dict[str, float]:
    """One row of a log: what an update of `train_ppo` reports, and `sums` of its experience."""
    return {
        "update": stats.update,
        "score": stats.score,
        "kl": stats.kl,
        "beta": stats.beta,
        "entropy": stats.entropy,
        "length": stats.length,
        "finished": stats.finished,
        "first_ratio": stats.first_ratio,
        "ratio": stats.policy["ratio"],
        "clip_fraction": stats.policy["clip_fraction"],
        "approx_kl": stats.policy["approx_kl"],
        "policy_loss": stats.policy["loss"],
        "policy_grad_norm": stats.policy["grad_norm"],
        "explained_variance": stats.value["explained_variance"],
        "value_loss": stats.value["loss"],
        "value_grad_norm": stats.value["grad_norm"],
        **sums(stats.experience),
    }


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


def examine(
    history: Iterable[PPOStats | Mapping[str, float]], response_length: int = 32
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
        TypeError: for a row that is neither PPOStats nor a mapping.
        ValueError: for no updates or one alone, updates that do not rise, a row without `update` or
            without any column that has a band, or a number that is not finite.

    Example:
        >>> rows = [{"update": u, "kl": kl} for u, kl in ((1, 0.0), (2, -0.4), (3, -0.9), (4, -2))]
        >>> [(alarm.quantity, alarm.severity, alarm.updates) for alarm in examine(rows)]
        [('kl', 'broken', (2, 3, 4))]

    Lesson 07 reads the alarms of planted faults.
    """
    rows = [_as_row(row) for row in history]
    _check_rows(rows)
    bands = BANDS | {"length": (BANDS["length"][0], 0.9 * response_length)}
    alarms = [
        *_exact_alarms(rows),
        *(alarm for name, band in bands.items() for alarm in _band_alarms(rows, name, band)),
        *_trend_alarms(rows),
    ]
    return sorted(alarms, key=lambda alarm: alarm.severity != BROKEN)


def _exact_alarms(rows: list[dict]) -> Iterable[Alarm]:
    """What must hold in every run, whatever it learns."""

    def rule(name: str, bad: Callable[[float], bool], meaning: str, patience=1, rows=rows):
        return _alarms(rows, name, bad, BROKEN, meaning, patience)

    start, later = rows[:1], [row for row in rows if row["update"] > 1]
    yield from rule(
        "first_ratio",
        lambda x: abs(x - 1) > TOLERANCE,
        "the policy that is trained does not give the log-probabilities taken as its old ones: "
        "another model, temperature, mask, or dropout",
    )
    if start[0]["update"] == 1:
        yield from rule(
            "kl",
            lambda x: abs(x) > TOLERANCE,
            "before the first step the policy should be the reference: which weights are the "
            "reference's?",
            rows=start,
        )
    yield from rule(
        "kl",
        lambda x: x < 0,
        "in the mean KL cannot be negative: the answers were not sampled from the policy that is "
        "scored (temperature, top-k, top-p), or the difference is taken the other way round",
        PATIENCE,
    )
    yield from rule(
        "kl",
        lambda x: x == 0,
        "policy and reference stay equal: the reference moves along, or the policy never moves",
        PATIENCE,
        later,
    )
    yield from rule(
        "policy_grad_norm", lambda x: x == 0, "no gradient reaches the policy's weights"
    )
    yield from rule("value_grad_norm", lambda x: x == 0, "no gradient reaches the critic's weights")
    yield from rule(
        "advantage_mean",
        lambda x: abs(x) > WHITENED,
        "advantages are not whitened over the real tokens: is the padding among them?",
    )
    yield from rule(
        "advantage_std",
        lambda x: abs(x - 1) > WHITENED,
        "advantages are not whitened over the real tokens: is the padding among them?",
    )
    yield from rule(
        "return_gap",
        lambda x: x > TOLERANCE,
        "the last return of an answer is not its last reward: the critic's targets were changed "
        "after gae, by whitening for example",
    )


def _band_alarms(rows: list[dict], name: str, band: tuple[float, float]) -> Iterable[Alarm]:
    """What lesson 04 reads from its figure: longer than a spike outside of the band."""
    rows = [row for row in rows if name != "explained_variance" or row["update"] > SETTLED]
    (low, high), (below, above) = band, MEANINGS[name]
    if below:
        yield from _alarms(rows, name, lambda x: x < low, LOOK, below, PATIENCE)
    if above:
        yield from _alarms(rows, name, lambda x: x > high, LOOK, above, PATIENCE)


def _trend_alarms(rows: list[dict]) -> Iterable[Alarm]:
    """What a run should have done by its end, if it is long enough."""
    if len(rows) < LONG:
        return
    last = tuple(row["update"] for row in rows[-PATIENCE:])
    if "score" in rows[0]:
        first, end = (fmean(row["score"] for row in part) for part in (rows[:3], rows[-3:]))
        if end - first < 0.1:
            why = "the score has not risen by a tenth of a unit: nothing is learnt, or not this"
            yield Alarm("score", LOOK, last, end - first, why)
        if rows[0]["update"] == 1 and abs(rows[0]["score"]) > 1:
            why = "a normalised score begins near 0: is this the head that was normalised?"
            yield Alarm("score", LOOK, (1,), rows[0]["score"], why)
    if "kl" in rows[0] and 0 < (end := fmean(row["kl"] for row in rows[-3:])) < 0.05:
        why = "the policy has hardly moved: gradients, learning rate, precision of its weights"
        yield Alarm("kl", LOOK, last, end, why)


def _alarms(
    rows: list[dict],
    name: str,
    bad: Callable[[float], bool],
    severity: str,
    meaning: str,
    patience: int,
) -> Iterable[Alarm]:
    """An alarm, if a quantity is bad in so many updates in a row, about all in which it is."""
    flags = [name in row and bad(row[name]) for row in rows]
    if any(all(flags[i : i + patience]) for i in range(len(flags) - patience + 1)):
        outside = [row for row, flag in zip(rows, flags, strict=True) if flag]
        middle = sum(BANDS.get(name, (0, 0))) / 2
        worst = max((row[name] for row in outside), key=lambda x: abs(x - middle))
        yield Alarm(name, severity, tuple(row["update"] for row in outside), worst, meaning)


def _as_row(row: PPOStats | Mapping[str, float]) -> dict[str, float]:
    if isinstance(row, PPOStats):
        return log_row(row)
    if not isinstance(row, Mapping):
        raise TypeError(f"history holds {row!r:.99}: give PPOStats, or rows as dictionaries.")
    return dict(row) | {"update": int(row["update"])} if "update" in row else dict(row)


def _check_rows(rows: list[dict]) -> None:
    if len(rows) < 2:
        raise ValueError(
            f"history has {len(rows)} of the 2 updates that it needs at least: a band is about "
            "several; preflight checks what one can tell"
        )
    for i, row in enumerate(rows):
        if "update" not in row or not row.keys() & BANDS.keys():
            raise ValueError(
                f"history[{i}] has the columns {', '.join(row)}; needed are update and one of "
                f"{', '.join(BANDS)}; for a log of TRL's use from_trl"
            )
        for name, value in row.items():
            undefined = name == "explained_variance" and math.isnan(value)  # all returns are equal
            if isinstance(value, float) and not math.isfinite(value) and not undefined:
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
    "ratio": "val/ratio",
    "clip_fraction": "policy/clipfrac_avg",
    "approx_kl": "policy/approxkl_avg",
    "value_loss": "loss/value_avg",
}
TRL_GRPO = {
    "score": "reward",
    "entropy": "entropy",
    "length": "completions/mean_length",
    "clip_fraction": "clip_ratio/region_mean",
    "policy_grad_norm": "grad_norm",
}
CUT_OFF = "completions/clipped_ratio"


def from_trl(log: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Rows for `examine` from a trainer's `state.log_history`: TRL 1.12's PPO, or 1.16's GRPO.

    PPO's columns map one to one. GRPO has no critic, logs the share of answers that were cut off in
    place of those that ended, and its `kl`, if β is not 0, is the mean of k3 over tokens: times the
    mean length it is about what ours is, nats per response. With one step for each batch, its
    default, the clip has nothing to do, so its column is left out where it is 0 throughout. A first
    KL of 0 cannot be asked of either, since neither says that its first row is the first update.

    Args:
        log: the trainer's rows; those at the end that sum up the run are left out.

    Returns:
        Rows with the names that `log_row` gives, and `update`, counted from 2 so that nothing is
        taken for the first update.

    Raises:
        ValueError: for a log that is empty or of another trainer, or a row that lacks a column.

    Example:
        >>> row = dict.fromkeys(TRL_PPO.values(), 0.5)
        >>> from_trl([row])[0]["kl"]
        0.5
    """
    rows = [row for row in log if "train_runtime" not in row]
    if not rows:
        raise ValueError("log is empty: give trainer.state.log_history of a run that has logged")
    if any("objective/kl" in row or "objective/scores" in row for row in rows):
        return [{"update": i} | _renamed(row, TRL_PPO, i - 2) for i, row in enumerate(rows, 2)]
    if not any("reward" in row for row in rows):
        raise ValueError(
            f"log has the columns {', '.join(rows[0])}: neither objective/scores of TRL's PPO nor "
            "reward of its GRPO; give trainer.state.log_history of one of them"
        )
    found = []
    for i, row in enumerate(rows):
        new = {"update": i + 2} | _renamed(row, TRL_GRPO, i)
        if CUT_OFF in row:
            new["finished"] = 1 - row[CUT_OFF]
        if "kl" in row:
            new["kl"] = row["kl"] * new["length"]
        found.append(new)
    if all(row["clip_fraction"] == 0 for row in found):
        found = [{k: v for k, v in row.items() if k != "clip_fraction"} for row in found]
    return found


def _renamed(row: Mapping[str, float], names: Mapping[str, str], i: int) -> dict[str, float]:
    if missing := [theirs for theirs in names.values() if theirs not in row]:
        raise ValueError(
            f"log[{i}] has no column {missing[0]!r}, only {', '.join(row)}; needed are "
            f"{', '.join(names.values())}; is it a log of TRL's PPO 1.12 or GRPO 1.16?"
        )
    return {ours: float(row[theirs]) for ours, theirs in names.items()}
