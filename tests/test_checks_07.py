"""The checks of exercise 07: what speaks against a wrong diagnosis, and a trainer that is asked."""

import csv
import doctest

import pytest
from test_train_ppo import PROMPTS, new_roles, save_talker

from rlhf_helpers import losses, ppo, rollout
from rlhf_helpers.checks import check_mended, check_patients, lesson_07, patient
from rlhf_helpers.checks.lesson_07 import COLUMNS, HEALTHY, ILLNESSES, PATIENTS
from rlhf_helpers.clinic import FAULTS
from rlhf_helpers.preflight import CHECKS, Finding


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Logs and answers of the patients, and of another seed that is not to be shown."""
    folder = tmp_path / "clinic"
    folder.mkdir()
    rows, texts = [], []
    for fault in (*PATIENTS.values(), HEALTHY):
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


@pytest.mark.parametrize("name", ["A", HEALTHY])
def test_a_patient_shows_no_gold_and_no_other_seed(recorded, name):
    rows, texts = patient(name)
    assert [row["kl"] for row in rows] == [0.0, 3.5]
    assert set(rows[0]) == set(COLUMNS) and "gold" not in COLUMNS
    assert texts == [{"prompt": "what is hot?", "text": "fire.", "finished": "1"}]


def test_every_illness_is_a_fault_of_the_clinic_or_none():
    assert set(PATIENTS.values()) < ILLNESSES.keys() <= {*FAULTS, HEALTHY}
    assert lesson_07._EVIDENCE.keys() == ILLNESSES.keys()
    assert lesson_07._QUESTIONS.keys() <= CHECKS.keys()


def test_right_answers(recorded, capsys):
    check_patients(PATIENTS)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{name}: correct, {ILLNESSES[ill]}." for name, ill in PATIENTS.items()]


@pytest.mark.parametrize("illness", ILLNESSES)
def test_a_wrong_answer_hears_what_speaks_against_it(recorded, capsys, illness):
    check_patients(dict.fromkeys(PATIENTS, illness))
    said = capsys.readouterr().out
    assert said.count("it is not that") == len(PATIENTS) - (illness in PATIENTS.values())
    assert "{" not in said and "99" not in said


def test_the_numbers_are_those_of_the_log(recorded, capsys):
    check_patients(PATIENTS | {"A": "kl sign"})
    assert "in this log it is at most 3.5, and 3.5 at the end" in capsys.readouterr().out


def test_other_answers(recorded, capsys):
    check_patients(dict.fromkeys("ABCDEF", ...) | {"B": "gremlins", "C": " KL-sign "})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "A: not attempted yet."
    assert lines[1].startswith("B: 'gremlins' is none of the list")
    assert lines[2] == f"C: correct, {ILLNESSES['kl_sign']}."


# --- a trainer to mend ---------------------------------------------------------------------

RIGHT = {
    "mask_after_eos": rollout.mask_after_eos,
    "shape_rewards": losses.shape_rewards,
    "policy_objective": ppo.policy_objective,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer):
    return save_talker(tmp_path_factory.mktemp("models") / "tiny", tokenizer)


def in_lines(capsys):
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("wrong", "row"),
    [
        (lambda tokens, eos: ((tokens == eos).cumsum(-1) == 0).long(), "[5, 6, 1, 0]"),
        (lambda tokens, eos: 0 * tokens + 1, "[5, 6, 1, 0]"),
        # as the exercise's, but an answer of EOS alone keeps a token, so that nothing raises
        (lambda tokens, eos: (tokens != eos).long(), "[5, 6, 1, 0]"),
        (lambda tokens, eos: ((tokens == eos).long().cumsum(-1) < 2).long(), "[5, 6, 1, 0]"),
    ],
)
def test_a_wrong_mask_is_named_before_anything_runs(monkeypatch, capsys, wrong, row):
    monkeypatch.setattr(lesson_07, "preflight", lambda *arguments: 1 / 0)
    check_mended(None, None, [], **RIGHT | {"mask_after_eos": wrong})
    said = in_lines(capsys)
    assert said.startswith(f"mask_after_eos: for the tokens {row}, where 1 is EOS, it is [")
    assert "an answer that begins with EOS?" in said


def test_a_mask_that_is_right_but_for_answers_that_begin_with_eos(capsys):
    def wrong(tokens, eos):
        mask = rollout.mask_after_eos(tokens, eos)
        mask[:, 0] = (tokens[:, 0] != eos).long()
        return mask

    check_mended(None, None, [], **RIGHT | {"mask_after_eos": wrong})
    assert "[1, 0, 0, 0], where 1 is EOS, it is [0, 0, 0, 0], expected [1, 0" in in_lines(capsys)


def test_a_trainer_that_is_not_mended_is_asked(tiny, tokenizer, capsys):
    def to_reference(roles, experience, part, config, beta):
        logprobs = ppo.role_logprobs(roles, "policy", experience.rollout, part, config)
        mask = experience.rollout.response_mask[part]
        old, advantages = experience.ref_logprobs[part], experience.advantages[part]
        return losses.policy_loss(logprobs, old, advantages, mask, config.clip)

    changes = {"policy_objective": to_reference}
    check_mended(new_roles(tiny), tokenizer, PROMPTS * 10, **RIGHT | changes)
    said = in_lines(capsys)
    name = "first ratio is 1"
    assert f"{name}: no, off by at most" in said and lesson_07._QUESTIONS[name] in said
    assert ppo.policy_objective is RIGHT["policy_objective"]


def test_a_trainer_that_is_mended(monkeypatch, capsys):
    held = [Finding("first KL is 0", True, "0 nats")]
    monkeypatch.setattr(lesson_07, "preflight", lambda *arguments: held)
    check_mended(None, None, [], **RIGHT)
    assert in_lines(capsys) == "check_mended: correct. All 1 checks of preflight hold."


def test_a_check_without_a_question_says_where_to_look(monkeypatch, capsys):
    finding = Finding("scores in their unit", False, "3 ± 1")
    monkeypatch.setattr(lesson_07, "preflight", lambda *arguments: [finding])
    check_mended(None, None, [], **RIGHT)
    assert "scores in their unit: no, 3 ± 1. Look at the reward's head" in in_lines(capsys)


def not_yet(*arguments):
    raise NotImplementedError


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_not_written_yet(monkeypatch, capsys, name):
    def preflight(*arguments):
        ppo.shape_rewards(None)
        ppo.policy_objective(None)

    for other in ("shape_rewards", "policy_objective"):
        monkeypatch.setattr(ppo, other, lambda *arguments: None)
    monkeypatch.setattr(lesson_07, "preflight", preflight)
    given = RIGHT | dict.fromkeys(("shape_rewards", "policy_objective"), lambda *arguments: None)
    check_mended(None, None, [], **given | {name: not_yet})
    assert in_lines(capsys) == "check_mended: not attempted yet."


def test_an_error_of_the_learner_is_raised(monkeypatch):
    monkeypatch.setattr(lesson_07, "preflight", lambda *arguments: ppo.shape_rewards())
    with pytest.raises(ZeroDivisionError):
        check_mended(None, None, [], **RIGHT | {"shape_rewards": lambda *arguments: 1 / 0})
    assert ppo.shape_rewards is RIGHT["shape_rewards"]
