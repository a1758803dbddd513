"""The recorder of lesson 07: what is there is not made again, and a real run leaves its log."""

import json

import pytest
import record_clinic
from record_ppo import read_csv

from rlhf_helpers.examine import BANDS, examine
from rlhf_helpers.preflight import Finding


@pytest.fixture
def calls(monkeypatch):
    """Runs that take no time; what they were asked for."""
    made = []

    def one_run(fault, config):
        made.append((fault, config.seed))
        rows = [{"update": u, "kl": 0.5 * u} for u in (1, 2)]
        texts = [{"prompt": "what is hot?", "text": 'it is "fire", I say.', "finished": 1}]
        return {"updates": rows, "texts": texts, "held_out": [{"gold": 1.0, "warnings": 0}]}

    monkeypatch.setattr(record_clinic, "one_run", one_run)
    return made


def test_the_first_seed_of_every_fault_comes_first(tmp_path, calls):
    record_clinic.record_runs(tmp_path / "work", ["healthy", "kl_sign"], seeds=2)
    assert calls == [("healthy", 0), ("kl_sign", 0), ("healthy", 1), ("kl_sign", 1)]


def test_two_processes_share_a_study(tmp_path, calls):
    work, out = tmp_path / "work", tmp_path / "out"
    record_clinic.record_runs(work, ["kl_sign"], seeds=2)
    record_clinic.record_runs(work, ["healthy"], seeds=1)
    record_clinic.gather(work, out)
    ends = read_csv(out / "held_out.csv")
    runs = [("healthy", "0"), ("kl_sign", "0"), ("kl_sign", "1")]
    assert [(row["fault"], row["seed"]) for row in ends] == runs
    assert len(read_csv(out / "updates.csv")) == 6
    assert read_csv(out / "texts.csv")[0]["text"] == 'it is "fire", I say.'
    about = json.loads((out / "about.json").read_text(encoding="utf-8"))
    assert about["config"]["updates"] == 30 and "torch" in about["versions"]


def test_a_stopped_study_goes_on(tmp_path, calls):
    record_clinic.record_runs(tmp_path, ["healthy", "kl_sign"], seeds=1)
    (tmp_path / "kl_sign-0.json").rename(tmp_path / "kl_sign-0.4711")  # as after a kill
    calls.clear()
    record_clinic.record_runs(tmp_path, ["healthy", "kl_sign"], seeds=2)
    assert calls == [("kl_sign", 0), ("healthy", 1), ("kl_sign", 1)]
    record_clinic.gather(tmp_path, tmp_path / "out")
    assert len(read_csv(tmp_path / "out" / "updates.csv")) == 8


def test_what_preflight_found_is_kept_and_not_asked_again(tmp_path, monkeypatch):
    asked = []

    def preflight(*arguments):
        asked.append(arguments)
        return [Finding("first KL is 0", True, "0 nats")]

    monkeypatch.setattr(record_clinic, "preflight", preflight)
    monkeypatch.setattr(record_clinic.record_ppo, "fresh_roles", lambda: None)
    for _ in range(2):
        record_clinic.record_preflight(tmp_path, ["healthy"])
    assert len(asked) == 1
    record_clinic.gather(tmp_path, tmp_path / "out")
    (row,) = read_csv(tmp_path / "out" / "preflight.csv")
    assert (row["fault"], row["check"], row["passed"]) == ("healthy", "first KL is 0", "1")
    assert "seed" not in row


def test_a_real_run(tmp_path, monkeypatch):
    """Two tiny updates: the log has every column that has a band, and nothing has warned."""
    monkeypatch.setattr(record_clinic.record_ppo, "held_out", lambda *arguments: {"gold": 0.0})
    sizes = {"updates": 2, "batch_size": 4, "minibatch_size": 2, "response_length": 8}
    record_clinic.record_runs(tmp_path, ["eos_masked_out"], seeds=1, **sizes)
    record_clinic.gather(tmp_path, tmp_path)
    rows = read_csv(tmp_path / "updates.csv")
    assert [row["update"] for row in rows] == ["1", "2"]
    assert BANDS.keys() <= rows[0].keys() and rows[0]["fault"] == "eos_masked_out"
    numbers = [{k: float(v) for k, v in row.items() if k != "fault"} for row in rows]
    assert all(alarm.severity == "look" for alarm in examine(numbers))
    assert len(read_csv(tmp_path / "texts.csv")) == 4
    assert read_csv(tmp_path / "held_out.csv")[0]["warnings"] == "0"
