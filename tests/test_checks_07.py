"""The checks of exercise 07: what speaks against a wrong diagnosis, and a trainer that is asked.

They get answers by name and a trainer, no function with cases: the rules of the others do not fit.
"""

import csv
import doctest

import pytest
import torch
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


@pytest.mark.parametrize("illness", ["ratio_to_reference", "kl_without_gradient"])
def test_a_policy_that_does_not_move_speaks_against_faults_that_let_it(capsys, illness):
    """On the recorded runs: of patient F neither first_ratio nor policy_loss says anything."""
    check_patients(PATIENTS | {"F": illness})
    assert "kl at most 0" in (said := capsys.readouterr().out) or "kl is at most 0" in said
    rows, _ = patient("F")
    assert not any(row["kl"] or row["policy_grad_norm"] for row in rows)


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


def said_before_anything_runs(monkeypatch, capsys, **functions):
    monkeypatch.setattr(lesson_07, "preflight", lambda *arguments: 1 / 0)
    check_mended(None, None, [], **RIGHT | functions)
    return in_lines(capsys)


def first_eos(tokens, eos):
    """Without a look at whether there is one."""
    return (torch.arange(tokens.shape[1]) <= (tokens == eos).int().argmax(-1)[:, None]).long()


def down_the_batch(tokens, eos):
    ends = (tokens == eos).long()
    return (ends.cumsum(0) - ends == 0).long()


LEFT_OUT, OF_ANY, BEFORE, BEHIND = (
    "[5, 6, 1, 0]",
    "[5, 6, 7, 8]",
    lesson_07.SAY.before,
    lesson_07.SAY.behind,
)
ENDING = lesson_07._MASK_QUESTION


@pytest.mark.parametrize(
    ("wrong", "row", "asked"),
    [
        (lambda t, eos: ((t == eos).cumsum(-1) == 0).long(), LEFT_OUT, [ENDING]),
        (lambda t, eos: 0 * t + 1, LEFT_OUT, [BEHIND]),
        # an answer of EOS alone keeps a token, so that nothing raises
        (lambda t, eos: (t != eos).long(), LEFT_OUT, [ENDING, BEHIND]),
        (lambda t, eos: ((t == eos).long().cumsum(-1) < 2).long(), LEFT_OUT, [BEHIND]),
        (lambda t, eos: (t == eos).long(), LEFT_OUT, [BEFORE]),
        (lambda t, eos: ((t == eos).cumsum(-1) == 1).long(), LEFT_OUT, [BEFORE, BEHIND]),
        (
            lambda t, eos: 1 - rollout.mask_after_eos(t, eos),
            LEFT_OUT,
            [lesson_07.SAY.mask_reversed],
        ),
        (first_eos, OF_ANY, [BEFORE]),
        (down_the_batch, LEFT_OUT, [BEHIND, lesson_07.SAY.by_batch]),
    ],
)
def test_a_wrong_mask_is_named_before_anything_runs(monkeypatch, capsys, wrong, row, asked):
    said = said_before_anything_runs(monkeypatch, capsys, mask_after_eos=wrong)
    assert said.startswith(f"mask_after_eos: for the tokens {row}, where 1 is EOS, it is [")
    assert said.endswith(". " + " ".join(asked))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda tokens, eos: None, "it returned None; return a tensor of shape [4, 4]"),
        (lambda tokens, eos: tokens[0], "it returned shape [4]; return a tensor of shape [4, 4]"),
        (lambda *x: rollout.mask_after_eos(*x).bool(), "but the mask is torch.bool"),
        (lambda *x: rollout.mask_after_eos(*x).float(), "but the mask is torch.float32"),
        (
            lambda t, eos: rollout.mask_after_eos(t, eos) * t.fill_(1),
            "its argument tokens in place",
        ),
    ],
)
def test_what_is_no_mask_is_named(monkeypatch, capsys, wrong, message):
    assert message in said_before_anything_runs(monkeypatch, capsys, mask_after_eos=wrong)


def shaped(penalty, place=None):
    """Rewards as in the exercise, with another penalty, or the score elsewhere."""

    def shape_rewards(scores, logprobs, ref_logprobs, mask, beta, kind="k1"):
        rewards = -beta * penalty(logprobs, ref_logprobs) * mask
        last = mask.sum(-1, keepdim=True) - 1
        return rewards.scatter_add(1, place(mask) if place else last, scores[:, None])

    return shape_rewards


def log_ratio(logprobs, ref_logprobs):
    return logprobs - ref_logprobs


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (shaped(lambda a, b: (a - b).abs()), "all is right up to one thing: "),
        (shaped(lambda a, b: a.exp() - b.exp()), "the log-ratio is taken as a difference of prob"),
        (
            shaped(log_ratio, lambda mask: 0 * mask[:, :1] + mask.shape[1] - 1),
            "the score stands in the last column",
        ),
        (shaped(log_ratio, lambda mask: 0 * mask[:, :1]), "the score stands at the first token"),
        (lambda s, *x: losses.shape_rewards(0 * s, *x), "scores is used as 0"),
        (lambda *x: None, "it returned None"),
    ],
)
def test_rewards_are_looked_at_by_themselves(monkeypatch, capsys, wrong, message):
    said = said_before_anything_runs(monkeypatch, capsys, shape_rewards=wrong)
    assert said.startswith("shape_rewards: ") and message in said


def objective(loss_of):
    """A policy's objective as in the exercise, with a loss of new and old, the batch, the rows."""

    def policy_objective(roles, experience, part, config, beta):
        new = ppo.role_logprobs(roles, "policy", experience.rollout, part, config)
        mask = experience.rollout.response_mask[part]
        arguments = new, experience.logprobs[part], experience.advantages[part], mask, config.clip
        return loss_of(*arguments, experience, part)

    return policy_objective


def with_kl(new, old, advantages, mask, clip, experience, part):
    loss, report = losses.policy_loss(new, old, advantages, mask, clip)
    kl = (new - experience.ref_logprobs[part])[mask.bool()].mean()
    return loss + 0.5 * kl, report


def by_hand(new, old, advantages, mask, clip, *rest, of=torch.minimum):
    ratio = (new - old).exp()
    worth = of(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -(worth * mask).sum() / mask.sum(), {"ratio": 1.0}


LOSS = losses.policy_loss
OBJECTIVES = [
    (lambda n, o, a, m, c, *x: LOSS(n, n.detach(), a, m, c), "takes the policy as it is now"),
    (lambda n, o, a, m, c, *x: LOSS(n, n, a, m, c), "takes the policy as it is now"),
    (lambda n, o, a, m, c, *x: by_hand(2 * o - n, o, a, m, c), "has new and old exchanged"),
    (lambda n, o, a, m, c, *x: LOSS(o, n, a, m, c), "has no gradient with respect to"),
    (lambda n, o, a, m, c, *x: LOSS(n.detach(), o, a, m, c), "has no gradient with respect to"),
    (lambda n, o, a, m, c, *x: LOSS(n, o, -a, m, c), "has the opposite sign"),
    (lambda n, o, a, m, c, e, p: LOSS(n, o, e.returns[p], m, c), "weighs with the returns"),
    (lambda n, o, a, m, c, e, p: LOSS(n, o, e.values[p], m, c), "weighs with the critic's"),
    (lambda n, o, a, m, c, e, p: LOSS(n, o, e.rewards[p], m, c), "weighs with scores or"),
    (
        lambda n, o, a, m, c, e, p: LOSS(n, o, e.scores[p, None].expand_as(n), m, c),
        "weighs with scores or rewards",
    ),
    (lambda n, o, a, m, c, *x: LOSS(n, o, a, 0 * m + 1, c), "counts padding"),
    (lambda n, o, a, m, c, *x: by_hand(n, o, a, m, 1e6), "is clipped nowhere"),
    (lambda n, o, a, m, c, *x: LOSS(n, o, a, m), "is clipped at 0.2, whatever config says"),
    (with_kl, "has a KL penalty added"),
    (lambda n, o, a, m, c, e, p: LOSS(n, e.logprobs[:2], a, m, c), "takes the batch's first rows"),
    (lambda n, o, a, m, c, e, p: LOSS(n, o, e.advantages[:2], m, c), "takes the batch's first"),
    (lambda n, o, a, m, c, *x: LOSS(n, o, 5 * a, m, c), "and its gradient come out times 5,"),
    (lambda n, o, a, m, c, *x: LOSS(n, o, a + 1, m, c), "or its gradient is another one"),
    (lambda n, o, a, m, c, *x: LOSS(n, o, a, m, 1.0), "is clipped by value_clip"),
    (lambda n, o, a, m, c, *x: by_hand(n, o, a, m, c, of=torch.maximum), "takes the larger"),
    (lambda n, o, a, m, *x: (-((n - o) * a)[m == 1].mean(), {}), "of the logarithm of the ratio"),
    (lambda n, o, a, m, *x: (-(n * a)[m == 1].mean(), {}), "made of the logarithm of the ratio"),
    (lambda n, o, a, m, c, *x: LOSS(n, o, a, m, c)[::-1], "it returned first dict; return two"),
    (lambda n, o, a, m, c, *x: LOSS(n, o, a, m, c)[0], "it returned Tensor; return two"),
    (lambda *x: None, "it returned NoneType; return two"),
]


@pytest.mark.parametrize(("wrong", "message"), OBJECTIVES)
def test_the_objective_is_looked_at_by_itself(monkeypatch, capsys, wrong, message):
    said = said_before_anything_runs(monkeypatch, capsys, policy_objective=objective(wrong))
    assert said.startswith("policy_objective: ") and message in said


def test_no_two_objectives_are_taken_for_each_other():
    batches = [lesson_07._batch(moved, seed) for moved, seed in lesson_07._STATES]
    plain = lesson_07._PLAIN, lesson_07._TO_REFERENCE
    made = [
        torch.cat([lesson_07._made_by(f, batch) for batch in batches])
        for f in (*plain, *(lesson_07._of(f) for f, _ in lesson_07._OBJECTIVES))
    ]
    messages = ["", " ", *(message for _, message in lesson_07._OBJECTIVES)]
    for i, one in enumerate(made):
        for j, other in enumerate(made[:i]):
            assert not torch.allclose(one, other) or messages[i] == messages[j]


FAULTS_OF_THE_EXERCISE = {
    "shape_rewards": shaped(lambda a, b: b - a),
    "policy_objective": objective(lambda n, o, a, m, c, e, p: LOSS(n, e.ref_logprobs[p], a, m, c)),
}
IN_OTHER_WORDS = {
    "shape_rewards": shaped(log_ratio),
    "policy_objective": objective(by_hand),
}


def asks_the_roles(roles, experience, part, config, beta):
    return roles.use("policy")


@pytest.mark.parametrize(
    "functions",
    [
        *({name: f} for name, f in FAULTS_OF_THE_EXERCISE.items()),
        *({name: f} for name, f in IN_OTHER_WORDS.items()),
        {"policy_objective": asks_the_roles},
    ],
)
def test_what_is_left_to_preflight(monkeypatch, capsys, functions):
    monkeypatch.setattr(lesson_07, "preflight", lambda *arguments: [])
    check_mended(None, None, [], **RIGHT | functions)
    assert in_lines(capsys).startswith("check_mended: correct.")


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
    monkeypatch.setattr(lesson_07, "preflight", lambda *arguments: [])
    check_mended(None, None, [], **RIGHT | {name: not_yet})
    assert in_lines(capsys) == "check_mended: not attempted yet."


def test_an_error_of_the_learner_is_raised(monkeypatch):
    monkeypatch.setattr(lesson_07, "preflight", lambda *arguments: [])
    with pytest.raises(ZeroDivisionError):
        check_mended(None, None, [], **RIGHT | {"shape_rewards": lambda *arguments: 1 / 0})
    assert ppo.shape_rewards is RIGHT["shape_rewards"]
