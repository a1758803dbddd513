"""The recorder of DPO runs: what is there is not made again, and each run is what its name says."""

from types import SimpleNamespace

import pytest
import record_dpo
import torch
from record_dpo import BETAS, RATE_SEEDS, RATES, read_csv, same_run, write_csv

ROW = {"step": 0, "loss": 0.69, "chosen_log_ratio": 0.0, "seconds": 1.0}
END = {"gold": 1.0, "example": 'it says "moo", twice.'}


@pytest.fixture
def calls(monkeypatch):
    """Runs that take no time; what they were asked for."""
    made = []

    def trained(roles, pairs, seed, config, reference="reference", **options):
        made.append((config.beta, config.learning_rate, seed, reference, options))
        return [ROW, ROW | {"step": config.steps, "seconds": 2.0}]

    roles = SimpleNamespace(
        add=lambda *x, **y: None, save=lambda *x: None, load=lambda *x, **y: None
    )
    monkeypatch.setattr(record_dpo, "fresh_roles", lambda: roles)
    monkeypatch.setattr(record_dpo, "first_pairs", lambda: (["a pair"] * 650, ["another"]))
    monkeypatch.setattr(record_dpo, "own_pairs", lambda roles, judge, seed: [judge] * 640)
    monkeypatch.setattr(record_dpo, "trained", trained)
    monkeypatch.setattr(record_dpo, "end_of", lambda roles, seed, role="policy": END)
    return made


def with_rates(out):
    """The pilot: at β = 0.1 the second rate is the best in the mean, elsewhere the last."""
    for beta in BETAS:
        rest = (0.9,) * (len(RATES[beta]) - 3)
        for rate, gold in zip(RATES[beta], (1.0, 1.2, 1.1 + (beta != 0.1), *rest), strict=True):
            for seed, more in zip(RATE_SEEDS, (0.3, -0.2, -0.1), strict=True):
                run = {"run": "rate", "beta": beta, "rate": rate, "seed": seed}
                noise = more * (1 + (rate == RATES[beta][0]))  # the first has the best single run
                record_dpo.record(out, run, [ROW], {"gold": gold + noise}, 650, 0.0)
    other = {"run": "rate", "beta": 0.1, "rate": 1e-3, "seed": RATE_SEEDS[0]}  # of one seed only
    record_dpo.record(out, other, [ROW], {"gold": 3.0}, 650, 0.0)


def test_the_pilot_tries_each_rate_on_seeds_of_its_own(tmp_path, calls):
    record_dpo.record_rates(tmp_path, [0.3])
    assert [call[:3] for call in calls] == [
        (0.3, r, seed) for seed in RATE_SEEDS for r in RATES[0.3]
    ]
    assert not (tmp_path / "held_out.csv").exists()
    record_dpo.record_rates(tmp_path, [0.3])
    assert len(calls) == 9 == len(read_csv(tmp_path / "rates.csv"))


def test_the_best_rate_is_that_of_the_highest_mean_gold(tmp_path):
    with_rates(tmp_path)
    assert record_dpo.best_rate(tmp_path, 0.1) == RATES[0.1][1]
    assert record_dpo.best_rate(tmp_path, 1.0) == RATES[1.0][2]
    rows = read_csv(tmp_path / "rates.csv")
    write_csv(tmp_path / "rates.csv", rows[1:])
    with pytest.raises(ValueError, match=r"runs missing at beta 0\.1: 1; record rates"):
        record_dpo.best_rate(tmp_path, 0.1)


def test_a_study_is_made_once(tmp_path, calls):
    with_rates(tmp_path)
    record_dpo.study(tmp_path, [0.1, 1.0], seeds=2)
    assert [call[:3] for call in calls] == [
        (beta, rate, seed)
        for seed in (0, 1)
        for beta, rate in ((0.1, RATES[0.1][1]), (1.0, RATES[1.0][2]))
    ]
    ends = read_csv(tmp_path / "held_out.csv")
    assert {row["run"] for row in ends} == {"dpo"} and ends[0]["example"] == END["example"]
    assert {row["pairs"] for row in ends} == {"650"} and ends[0]["seconds"] == "2.0"
    assert len(read_csv(tmp_path / "updates.csv")) == 8
    assert len(read_csv(tmp_path / "reference.csv")) == 2
    record_dpo.study(tmp_path, [0.1, 1.0], seeds=3)
    assert [call[2] for call in calls[4:]] == [2, 2]


def test_a_run_without_its_end_is_made_again(tmp_path, calls):
    with_rates(tmp_path)
    record_dpo.study(tmp_path, [0.1], seeds=2)
    write_csv(tmp_path / "held_out.csv", read_csv(tmp_path / "held_out.csv")[:1])
    record_dpo.study(tmp_path, [0.1], seeds=2)
    assert [call[2] for call in calls] == [0, 1, 1]
    assert [row["seed"] for row in read_csv(tmp_path / "updates.csv")] == ["0", "0", "1", "1"]


def test_a_run_goes_once_through_its_pairs(tmp_path, calls):
    assert record_dpo.config_of(0.3, 1e-4, ["pair"] * 650).steps == 20  # of 32, ten pairs left
    with_rates(tmp_path)
    record_dpo.wrong(tmp_path, seeds=1)
    options = {"any_reference": True}
    assert calls == [
        (0.1, RATES[0.1][1], 0, "base", options),
        (1.0, RATES[1.0][2], 0, "base", options),
    ]


def test_a_second_round_differs_in_its_pairs_alone(tmp_path, calls, monkeypatch):
    with_rates(tmp_path)
    monkeypatch.setattr(record_dpo, "policy_folder", lambda beta, seed: tmp_path)
    record_dpo.rounds(tmp_path, record_dpo.JUDGES, seeds=2)
    record_dpo.rounds(tmp_path, record_dpo.JUDGES, seeds=2)
    assert len(calls) == 6 and {call[3] for call in calls} == {"reference"}
    rows = read_csv(tmp_path / "held_out.csv")
    assert [(row["run"], row["pairs"]) for row in rows[:3]] == [
        ("second_reward", "640"), ("second_annotator", "640"), ("second_nobody", "650")
    ]  # fmt: skip
    assert [call[2] for call in calls] == [0, 0, 1000, 1, 1, 1001]  # the old pairs in a new order


def test_a_second_round_makes_a_first_one_that_is_not_there(tmp_path, calls, monkeypatch):
    with_rates(tmp_path)
    monkeypatch.setattr(record_dpo, "policy_folder", lambda beta, seed: tmp_path / "none")
    record_dpo.rounds(tmp_path, ["reward"], seeds=1)
    assert calls[0] == (0.1, RATES[0.1][1], 0, "reference", {})
    assert calls[1] == (0.1, RATES[0.1][1], 0, "reference", {"any_reference": True})


def test_the_reward_model_swaps_the_pairs_that_it_ranks_otherwise(monkeypatch):
    def pair(prompt):
        return {s: {"prompt": [prompt], "response": [s]} for s in ("chosen", "rejected")}

    pairs, never = [pair(1), pair(2)], pair(3)  # a prompt of the held-out pairs
    monkeypatch.setattr(record_dpo, "collect_preferences", lambda *x, **y: [*pairs, never])
    monkeypatch.setattr(record_dpo, "first_pairs", lambda: ([], [never]))
    monkeypatch.setattr(record_dpo, "encoded", lambda rows: rows)
    scores = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
    monkeypatch.setattr(record_dpo.reward, "pair_scores", lambda *x: scores)
    roles = SimpleNamespace(use=lambda role: role)
    assert record_dpo.own_pairs(roles, "annotator", 0) == pairs
    swapped = [pairs[0], {"chosen": pairs[1]["rejected"], "rejected": pairs[1]["chosen"]}]
    assert record_dpo.own_pairs(roles, "reward", 0) == swapped


def test_known_log_probabilities_are_looked_up(monkeypatch):
    pairs, computed = [{"chosen": i} for i in range(3)], []

    def pair_logprobs(roles, role, tokenizer, pairs):
        computed.append((role, len(pairs)))
        numbers = torch.tensor([float(-pair["chosen"]) for pair in pairs])
        return numbers - 1, numbers - 2

    record_dpo.reference_logprobs.cache_clear()
    monkeypatch.setattr(record_dpo, "PAIR_LOGPROBS", pair_logprobs)
    monkeypatch.setattr(record_dpo, "first_pairs", lambda: (pairs[:2], pairs[2:]))
    monkeypatch.setattr(record_dpo, "fresh_roles", lambda: None)
    chosen, rejected = record_dpo.looked_up(None, "reference", None, pairs[::-1])
    assert chosen.tolist() == [-3.0, -2.0, -1.0] and rejected.tolist() == [-4.0, -3.0, -2.0]
    assert computed == [("reference", 2), ("reference", 1)]
    record_dpo.looked_up(None, "policy", None, pairs)
    record_dpo.looked_up(None, "reference", None, [{"chosen": 7}])
    assert computed[2:] == [("policy", 3), ("reference", 1)]
    record_dpo.reference_logprobs.cache_clear()


def test_the_logs_tell_no_names(tmp_path):
    study, out = tmp_path / "study", tmp_path / "logs"
    for name, beta in (
        ("dpo", 0.1),
        ("dpo", 1.0),
        ("wrong_reference", 0.1),
        ("second_reward", 0.1),
    ):
        for seed in (0, 1):
            run = {"run": name, "beta": beta, "rate": 1e-4, "seed": seed}
            loss = len(name) + beta + seed
            record_dpo.record(study, run, [ROW | {"loss": loss}], END, 650, 0.0)
    record_dpo.record_logs(study, out)
    logs = {path.stem: read_csv(path) for path in out.glob("*.csv")}
    assert {name: [row["loss"] for row in rows] for name, rows in logs.items()} == {
        "A": ["13.1"], "B": ["15.1"], "C": ["3.1"]
    }  # fmt: skip
    assert set(logs["A"][0]) == set(ROW) - {"seconds"}


def test_runs_are_told_apart_by_what_is_asked():
    row = {"run": "dpo", "beta": "0.1", "seed": "3", "gold": "1.2"}
    assert same_run(row, {"run": "dpo", "beta": 0.1})
    assert not same_run(row, {"run": "dpo", "beta": 0.1, "seed": 2})
