"""Alarms about a run's numbers: none on healthy runs, each rule on a run that breaks it."""

import csv
import doctest
import math
from importlib.resources import files

import pytest

from rlhf_helpers import checks, examine
from rlhf_helpers.examine import TRL_GROUPS, TRL_PPO, from_trl
from rlhf_helpers.presets import ASSETS

GOOD = {
    "score": 0.5,
    "kl": 2.0,
    "entropy": 0.6,
    "length": 12.0,
    "finished": 1.0,
    "first_ratio": 1.0,
    "ratio": 1.01,
    "clip_fraction": 0.02,
    "approx_kl": 0.005,
    "policy_grad_norm": 0.3,
    "value_grad_norm": 0.8,
    "explained_variance": 0.4,
    "value_loss": 0.2,
    "advantage_mean": 0.0,
    "advantage_std": 1.0,
    "return_gap": 0.0,
}


def good_run(updates=12, **changes):
    """A run with nothing wrong but what is given: by column its values from the first update on."""
    rows = [{"update": u, **GOOD, "score": 0.1 * u} for u in range(1, updates + 1)]
    rows[0]["kl"] = 0.0
    for name, values in changes.items():
        for row, value in zip(rows, values, strict=False):
            row[name] = value
    return rows


def recorded(beta):
    runs = {}
    with (ASSETS / "ppo" / "updates.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if float(row.pop("beta")) == beta:
                numbers = {name: float(value) for name, value in row.items()}
                runs.setdefault(numbers.pop("seed"), []).append(numbers)
    return list(runs.values())


def found(rows, **options):
    return {(a.quantity, a.severity, a.updates) for a in examine.examine(rows, **options)}


def test_doctests():
    results = doctest.testmod(examine)
    assert results.attempted > 0 and results.failed == 0


@pytest.mark.parametrize("beta", [0.1, 0.3, 1.0])
def test_no_false_alarm_on_ten_healthy_runs(beta):
    runs = recorded(beta)
    assert len(runs) == 10
    assert [alarm for run in runs for alarm in examine.examine(run)] == []


def test_runs_without_a_price_are_looked_at_and_not_called_broken():
    for run in recorded(0.0):
        alarms = examine.examine(run)
        assert {alarm.severity for alarm in alarms} == {"look"}
        assert {"kl", "length", "finished"} <= {alarm.quantity for alarm in alarms}


def test_the_logs_of_lesson_03():
    logs = {name: examine.examine(checks.training_log(name)) for name in ("healthy", "A", "B", "C")}
    assert logs["healthy"] == []
    assert {a.quantity for a in logs["A"]} >= {"kl", "length"}
    assert (logs["B"][0].quantity, logs["B"][0].severity) == ("first_ratio", "broken")
    assert [a.quantity for a in logs["C"]] == ["clip_fraction"]


def test_a_good_run_has_no_alarm():
    assert examine.examine(good_run()) == []


@pytest.mark.parametrize(
    ("name", "values", "severity", "updates"),
    [
        ("first_ratio", [1, 1.02], "broken", (2,)),
        ("first_ratio", [1, 0.9], "broken", (2,)),
        ("kl", [0.4], "broken", (1,)),
        ("kl", [0, 1, -0.1, -0.1, -0.1], "broken", (3, 4, 5)),
        ("kl", [0, -0.1, 0, -0.1], "broken", (2, 3, 4)),
        ("kl", [0, 0, 0, 0], "broken", (2, 3, 4)),
        ("policy_grad_norm", [0.2, 0], "broken", (2,)),
        ("value_grad_norm", [0], "broken", (1,)),
        ("advantage_mean", [-0.3], "broken", (1,)),
        ("advantage_std", [1.4], "broken", (1,)),
        ("return_gap", [0.2], "broken", (1,)),
        ("kl", [0, 11, 12, 13], "look", (2, 3, 4)),
        ("entropy", [0.1, 0.2, 0.1], "look", (1, 2, 3)),
        ("entropy", [5, 5, 5], "look", (1, 2, 3)),
        ("length", [30, 31, 32], "look", (1, 2, 3)),
        ("length", [1, 1, 2], "look", (1, 2, 3)),
        ("finished", [0.5, 0.5, 0.5], "look", (1, 2, 3)),
        ("clip_fraction", [0, 0, 0], "look", (1, 2, 3)),
        ("clip_fraction", [0.3, 0.3, 0.3], "look", (1, 2, 3)),
        ("approx_kl", [0.1, 0.1, 0.1], "look", (1, 2, 3)),
        ("explained_variance", [0, 0, 0, 0, -1, -1, -1], "look", (5, 6, 7)),
        ("score", [1.0] * 12, "look", (10, 11, 12)),
        ("score", [-3, -2, -1], "look", (1,)),
    ],
)
def test_each_rule_finds_what_breaks_it_and_nothing_else(name, values, severity, updates):
    assert found(good_run(**{name: values})) == {(name, severity, updates)}


@pytest.mark.parametrize(
    "changes",
    [
        {"kl": [0, 1, -0.1, -0.1, 0.1]},  # an estimate scatters
        {"kl": [0, 12, 12]},
        {"approx_kl": [0.1, 0.1]},
        {"explained_variance": [-1, -1, -1, -1, -1, -1]},  # the critic's first updates
        {"explained_variance": [math.nan] * 12},  # all returns are equal
    ],
)
def test_what_scatters_is_given_time(changes):
    assert examine.examine(good_run(**changes)) == []


def test_a_run_that_goes_on_from_a_later_update_has_no_first_kl():
    assert examine.examine(good_run()[1:]) == []


def test_a_column_that_a_log_lacks_is_not_judged():
    rows = [{"update": u, "kl": 2.0} for u in (2, 3, 4)]
    assert examine.examine(rows) == []


def test_the_limit_of_the_length_is_the_runs():
    rows = good_run(length=[60.0] * 12)
    assert found(rows) == {("length", "look", tuple(range(1, 13)))}
    assert examine.examine(rows, response_length=256) == []


def test_broken_comes_first_and_a_line_says_all():
    alarms = examine.examine(good_run(kl=[0, 11, 12, 13], first_ratio=[1, 1.25]))
    assert [alarm.severity for alarm in alarms] == ["broken", "look"]
    text = str(alarms[0])
    assert text.startswith("broken first_ratio") and "1.25" in text and "update 2:" in text
    assert "3 updates from 2 to 4" in str(alarms[1])


@pytest.mark.parametrize(
    ("history", "error", "message"),
    [
        ([], ValueError, "history has 0 of the 2 updates"),
        (good_run(1), ValueError, "history has 1 of the 2 updates"),
        (good_run(kl=[0, math.nan]), ValueError, r"history\[1\] has kl nan: the run has diverged"),
        (good_run(score=[math.inf]), ValueError, r"history\[0\] has score inf"),
        ([3, 4], TypeError, "history holds 3: give PPOStats, or rows"),
        ([{"kl": 1.0}, {"kl": 2.0}], ValueError, r"history\[0\] has the columns kl; needed"),
        ([{"update": 1}, {"update": 2}], ValueError, "needed are update and one of kl"),
        (good_run()[::-1], ValueError, "which do not rise"),
        (good_run() + good_run(), ValueError, "the rows of one run in order"),
    ],
)
def test_bad_histories(history, error, message):
    with pytest.raises(error, match=message):
        examine.examine(history)


# --- logs of TRL ---------------------------------------------------------------------------


def trl_log(names, **changes):
    """Twelve rows of a good run, but for some columns of all rows."""
    values = {theirs: float(GOOD[ours]) for ours, theirs in names.items()}
    if names is TRL_GROUPS:
        values[TRL_GROUPS["finished"]] = 0.0  # the share that was cut off
    return [{**values, names["score"]: 0.1 * i} | changes for i in range(12)]


def test_a_log_of_trl_ppo():
    log = trl_log(TRL_PPO)
    assert examine.examine(from_trl([*log, {"train_runtime": 12.0, "train_loss": 0.1}])) == []
    for row in log[1:4]:
        row["objective/kl"] = -1.0
    assert found(from_trl(log)) == {("kl", "broken", (3, 4, 5))}


def test_a_log_of_trl_grpo_or_rloo():
    assert examine.examine(from_trl(trl_log(TRL_GROUPS))) == []
    assert "kl" not in from_trl(trl_log(TRL_GROUPS))[0]  # by default it is not logged
    assert from_trl(trl_log(TRL_GROUPS, kl=0.25))[0]["kl"] == 3.0  # of 12 tokens
    cut = from_trl(trl_log(TRL_GROUPS, **{"completions/clipped_ratio": 0.75}))
    assert found(cut) == {("finished", "look", tuple(range(2, 14)))}


def test_trl_still_logs_under_these_names():
    for trainer in ("grpo", "rloo"):
        (path,) = files("trl").joinpath("trainer").glob(f"{trainer}_trainer.py")
        source = path.read_text(encoding="utf-8")
        names = set(TRL_GROUPS.values()) - {"grad_norm"}  # that one is transformers' own
        assert [name for name in names if f'["{name}"]' not in source] == []


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ([], "log is empty"),
        ([{"train_runtime": 3.0}], "log is empty"),
        ([{"loss": 0.1, "epoch": 1.0}], r"log\[0\] has no column 'reward', only loss, epoch"),
        ([{"objective/kl": 1.0}], r"log\[0\] has no column 'objective/scores', only objective/kl"),
        ([*trl_log(TRL_PPO)[:3], {"objective/kl": 1.0}], r"log\[3\] has no column"),
        ([{"reward": 1.0}], r"log\[0\] has no column 'entropy'"),
    ],
)
def test_bad_logs_of_trl(log, message):
    with pytest.raises(ValueError, match=message):
        from_trl(log)
