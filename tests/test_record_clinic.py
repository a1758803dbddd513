"""The recorder of lesson 07: what is there is not made again, and a real run leaves its log."""

import json

import pytest
import record_clinic
from record_ppo import read_csv, write_csv

from rlhf_helpers.examine import BANDS
from rlhf_helpers.preflight import Finding


def stub(calls):
    def one_run(fault, config):
        calls.append((fault, config.seed))
        rows = [{"update": u, "kl": 0.5 * u} for u in (1, 2)]
        texts = [{"prompt": "what is hot?", "text": 'it is "fire", I say.', "finished": 1}]
        return rows, texts, {"gold": 1.0, "seconds": 0.1, "warnings": 0}

    return one_run


def test_the_first_seed_of_every_fault_comes_first(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(record_clinic, "one_run", stub(calls))
    record_clinic.record_runs(tmp_path, ["healthy", "kl_sign"], seeds=2)
    assert calls == [("healthy", 0), ("kl_sign", 0), ("healthy", 1), ("kl_sign", 1)]
    ends = read_csv(tmp_path / "held_out.csv")
    assert [(row["fault"], row["seed"]) for row in ends] == [(f, str(s)) for f, s in calls]
    assert len(read_csv(tmp_path / "updates.csv")) == 8
    assert read_csv(tmp_path / "texts.csv")[0]["text"] == 'it is "fire", I say.'
    about = json.loads((tmp_path / "about.json").read_text(encoding="utf-8"))
    assert about["config"]["updates"] == 30 and "torch" in about["versions"]


def test_a_stopped_study_goes_on(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(record_clinic, "one_run", stub(calls))
    record_clinic.record_runs(tmp_path, ["healthy", "kl_sign"], seeds=1)
    # as after a kill between the files: the log of the second is there, its end is not
    write_csv(tmp_path / "held_out.csv", read_csv(tmp_path / "held_out.csv")[:1])
    calls.clear()
    record_clinic.record_runs(tmp_path, ["healthy", "kl_sign"], seeds=2)
    assert calls == [("kl_sign", 0), ("healthy", 1), ("kl_sign", 1)]
    keys = [
        (row["fault"], row["seed"], row["update"]) for row in read_csv(tmp_path / "updates.csv")
    ]
    assert len(keys) == len(set(keys)) == 8


def test_what_preflight_found_is_kept_and_not_asked_again(tmp_path, monkeypatch):
    calls = []

    def preflight(*arguments):
        calls.append(arguments)
        return [Finding("first KL is 0", True, "0 nats", "")]

    monkeypatch.setattr(record_clinic, "preflight", preflight)
    monkeypatch.setattr(record_clinic.record_ppo, "fresh_roles", lambda: None)
    for faults in (["healthy"], ["healthy", "kl_sign"]):
        record_clinic.record_preflight(tmp_path, faults)
    assert len(calls) == 2
    rows = read_csv(tmp_path / "preflight.csv")
    assert [(row["fault"], row["check"], row["passed"]) for row in rows] == [
        ("healthy", "first KL is 0", "1"), ("kl_sign", "first KL is 0", "1")
    ]  # fmt: skip


@pytest.mark.parametrize("fault", ["healthy", "eos_masked_out"])
def test_a_real_run(tmp_path, monkeypatch, fault):
    """Two tiny updates: the log has every column that has a band, and nothing has warned."""
    monkeypatch.setattr(record_clinic.record_ppo, "held_out", lambda *arguments: {"gold": 0.0})
    sizes = {"updates": 2, "batch_size": 4, "minibatch_size": 2, "response_length": 8}
    record_clinic.record_runs(tmp_path, [fault], seeds=1, **sizes)
    rows = read_csv(tmp_path / "updates.csv")
    assert [row["update"] for row in rows] == ["1", "2"]
    assert BANDS.keys() <= rows[0].keys() and rows[0]["fault"] == fault
    assert len(read_csv(tmp_path / "texts.csv")) == 4
    assert read_csv(tmp_path / "held_out.csv")[0]["warnings"] == "0"
