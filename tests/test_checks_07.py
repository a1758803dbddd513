"""The checks of exercise 07: what speaks against a wrong diagnosis, and a trainer that is asked."""

import csv
import doctest

import pytest
from rlhf_helpers.checks.lesson_07 import (
    COLUMNS,
    EVIDENCE,
    PATIENTS,
    QUESTIONS,
    check_mended,
    check_patients,
    illnesses,
    patient,
)
from test_train_ppo import PROMPTS, new_roles, save_talker

from rlhf_helpers import losses, ppo, rollout
from rlhf_helpers.checks import lesson_07
from rlhf_helpers.clinic import FAULTS
from rlhf_helpers.preflight import Finding, preflight


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Logs and answers of the patients, and of another seed that is not to be shown."""
    folder = tmp_path / "clinic"
    folder.mkdir()
    rows, texts = [], []
    for fault in PATIENTS.values():
        for seed, kl in (("0", 99.0), ("1", 3.5)):
            key = {"fault": fault, "seed": seed}
            for update in (1, 2):
                numbers = dict.fromkeys(COLUMNS, 1.0) | {"update": update, "gold": 7.0}
                rows.append(key | numbers | {"kl": 0.0 if update == 1 else kl})
            texts.append(key | {"prompt": "what is hot?", "text": "fire.", "finished": 1})
    for name, found in (("updates", rows), ("texts", texts)):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(found[0]))
            writer.writeheader()
            writer.writerows(found)
    monkeypatch.setattr(lesson_07, "ASSETS", tmp_path)


def test_doctests():
    results = doctest.testmod(lesson_07)
    assert results.attempted > 0 and results.failed == 0


def test_a_patient_shows_no_gold_and_no_other_seed(recorded):
    rows, texts = patient("A")
    assert [row["kl"] for row in rows] == [0.0, 3.5]
    assert set(rows[0]) == set(COLUMNS) and "gold" not in COLUMNS
    assert texts == [{"prompt": "what is hot?", "text": "fire.", "finished": "1"}]


def test_every_answer_is_a_fault_of_the_clinic():
    assert set(PATIENTS.values()) < EVIDENCE.keys() <= FAULTS.keys()
    assert illnesses()["kl_sign"].startswith("The difference of the log-probabilities")


def test_right_answers(recorded, capsys):
    check_patients(PATIENTS)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{name}: correct, {fault}." for name, fault in PATIENTS.items()]


@pytest.mark.parametrize("fault", EVIDENCE)
def test_a_wrong_answer_hears_what_speaks_against_it(recorded, capsys, fault):
    wrong = {name: fault for name in PATIENTS}
    check_patients(wrong)
    lines = capsys.readouterr().out
    assert lines.count("it is not") == len(PATIENTS) - (fault in PATIENTS.values())
    assert "{" not in lines and "99" not in lines


def test_the_numbers_are_those_of_the_log(recorded, capsys):
    check_patients(PATIENTS | {"A": "kl sign"})
    printed = " ".join(capsys.readouterr().out.split())
    assert "in this log it is at most 3.5, and 3.5 at the end" in printed


def test_other_answers(recorded, capsys):
    check_patients(dict.fromkeys("ABCDEF", ...) | {"B": "gremlins", "C": " KL-sign "})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "A: not attempted yet."
    assert lines[1].startswith("B: 'gremlins' is not on the list; choose from moving_reference")
    assert "C: correct, kl_sign." in lines


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="there is no answer for patient 'B'"):
        check_patients({"A": ...})
    with pytest.raises(ValueError, match="there is no patient 'G'"):
        patient("G")


# --- a trainer to mend ---------------------------------------------------------------------

RIGHT = {
    "mask_after_eos": rollout.mask_after_eos,
    "shape_rewards": losses.shape_rewards,
    "policy_objective": ppo.policy_objective,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer):
    return save_talker(tmp_path_factory.mktemp("models") / "tiny", tokenizer)


def to_reference(roles, experience, part, config, beta):
    logprobs = ppo.role_logprobs(roles, "policy", experience.rollout, part, config)
    mask = experience.rollout.response_mask[part]
    old, advantages = experience.ref_logprobs[part], experience.advantages[part]
    return losses.policy_loss(logprobs, old, advantages, mask, config.clip)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"mask_after_eos": lambda tokens, eos: 0 * tokens + 1}, "an answer counts to its EOS"),
        ({"policy_objective": to_reference}, "first ratio is 1"),
    ],
)
def test_a_trainer_that_is_not_mended_is_asked(tiny, tokenizer, capsys, change, name):
    check_mended(new_roles(tiny), tokenizer, PROMPTS * 10, **RIGHT | change)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{name}: no, " in printed and QUESTIONS[name] in printed
    assert rollout.mask_after_eos is RIGHT["mask_after_eos"]


def test_a_trainer_that_is_mended(monkeypatch, capsys):
    held = [Finding("first KL is 0", True, "0 nats", "")]
    monkeypatch.setattr(lesson_07, "preflight", lambda *arguments: held)
    check_mended(None, None, [], **RIGHT)
    assert capsys.readouterr().out == "check_mended: correct. All 1 checks of preflight hold.\n"


def test_a_check_without_a_question_says_what_it_can_mean(monkeypatch, capsys):
    finding = Finding("scores in their unit", False, "3 ± 1", "is this the head?")
    monkeypatch.setattr(lesson_07, "preflight", lambda *arguments: [finding])
    check_mended(None, None, [], **RIGHT)
    assert "scores in their unit: no, 3 ± 1. is this the head?" in capsys.readouterr().out


def test_an_error_of_the_learner_is_raised(tiny, tokenizer):
    with pytest.raises(ZeroDivisionError):
        check_mended(
            new_roles(tiny),
            tokenizer,
            PROMPTS * 10,
            **RIGHT | {"shape_rewards": lambda *arguments: 1 / 0},
        )
    assert ppo.shape_rewards is RIGHT["shape_rewards"]


def test_every_question_is_about_a_check(tiny, tokenizer):
    names = {finding.name for finding in preflight(new_roles(tiny), tokenizer, PROMPTS * 10)}
    assert QUESTIONS.keys() <= names
