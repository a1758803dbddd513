"""The recorder of PPO runs: what is there is not made again."""

import json

import pytest
import record_ppo


@pytest.fixture(autouse=True)
def no_reference(monkeypatch):
    """What the runs began from is of no interest to most tests here, and takes a model."""
    monkeypatch.setattr(record_ppo, "record_reference", lambda *arguments: None)


def stub(calls):
    def one_run(config, reward):
        calls.append((config.beta, config.seed))
        rows = [{"update": u, "gold": 0.5 * u} for u in (1, 2)]
        return rows, {"gold": 1.0, "seconds": 0.1, "example": 'it says "moo", twice.'}

    return one_run


def test_a_study_writes_logs_and_ends(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(record_ppo, "one_run", stub(calls))
    record_ppo.study(tmp_path, [0.0, 0.1], seeds=2)
    assert calls == [(0.0, 0), (0.1, 0), (0.0, 1), (0.1, 1)]
    ends = record_ppo.read_csv(tmp_path / "held_out.csv")
    assert [(row["beta"], row["seed"]) for row in ends] == [
        ("0.0", "0"), ("0.1", "0"), ("0.0", "1"), ("0.1", "1")
    ]  # fmt: skip
    assert ends[0]["example"] == 'it says "moo", twice.'
    assert len(record_ppo.read_csv(tmp_path / "updates.csv")) == 8
    about = json.loads((tmp_path / "about.json").read_text(encoding="utf-8"))
    assert about["config"]["batch_size"] == 64 and "torch" in about["versions"]


def test_a_stopped_study_goes_on(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(record_ppo, "one_run", stub(calls))
    record_ppo.study(tmp_path, [0.1], seeds=2)
    # as after a kill between the two files: the log of seed 1 is there, its end is not
    ends = record_ppo.read_csv(tmp_path / "held_out.csv")
    record_ppo.write_csv(tmp_path / "held_out.csv", ends[:1])
    calls.clear()
    record_ppo.study(tmp_path, [0.1], seeds=3)
    assert calls == [(0.1, 1), (0.1, 2)]
    updates = record_ppo.read_csv(tmp_path / "updates.csv")
    assert [(row["seed"], row["update"]) for row in updates] == [
        (str(seed), str(update)) for seed in range(3) for update in (1, 2)
    ]
    assert [row["seed"] for row in record_ppo.read_csv(tmp_path / "held_out.csv")] == list("012")


def test_a_file_that_is_not_there_holds_no_rows(tmp_path):
    assert record_ppo.read_csv(tmp_path / "none.csv") == []


def test_the_reference_is_measured_once_for_each_seed(tmp_path, monkeypatch):
    monkeypatch.undo()
    calls = []

    def held_out(roles, config, role):
        calls.append((roles, config.seed, role))
        return {"gold": 1.0}

    monkeypatch.setattr(record_ppo, "fresh_roles", lambda reward: reward)
    monkeypatch.setattr(record_ppo, "held_out", held_out)
    for _ in range(2):
        record_ppo.record_reference(tmp_path, "a reward model", seeds=2)
    assert calls == [("a reward model", 0, "reference"), ("a reward model", 1, "reference")]
    rows = record_ppo.read_csv(tmp_path / "reference.csv")
    assert rows == [{"seed": "0", "gold": "1.0"}, {"seed": "1", "gold": "1.0"}]
