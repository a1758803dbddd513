"""The league's recorder: what is there is not made again, and each row is what its name says."""

import argparse
import csv
import doctest
from dataclasses import replace

import league
import pytest
import torch

from rlhf_helpers.ppo import Experience, PPOConfig
from rlhf_helpers.rollout import Rollout

ROW = {"gold": 1.2, "kl": 0.5, "proxy": 0.8, "correct": 0.7, "samples": 64, "example": 'a "moo", b'}


def rollout_of(texts, finished):
    """Prompts of two tokens, responses of three; those that did not finish fill the width."""
    count = len(texts)
    tail = torch.tensor([[7, 1, 0] if done else [7, 8, 9] for done in finished])
    mask = torch.tensor([[1, 1, 0] if done else [1, 1, 1] for done in finished])
    head = torch.tensor([[0, 5]] * count)
    attention = torch.cat([torch.tensor([[0, 1]] * count), mask], 1)
    return Rollout(torch.cat([head, tail], 1), attention, mask, texts, torch.tensor(finished))


def test_doctests():
    results = doctest.testmod(league)
    assert results.attempted > 0 and results.failed == 0


def test_two_processes_share_the_plan():
    whole = league.plan(list(league.METHODS), 10)
    parts = [league.plan(list(league.METHODS), 10, (i, 2)) for i in (1, 2)]
    assert len(whole) == 150 and sorted(parts[0] + parts[1]) == sorted(whole)
    assert not set(parts[0]) & set(parts[1])
    assert {seed for _, seed in whole[:15]} == {0}  # every method early
    long = [sum(method in league.LOOPS for method, _ in part) for part in parts]
    assert sum(long) == 50 and abs(long[0] - long[1]) <= 10  # both get a part of what takes long


@pytest.fixture
def made(monkeypatch):
    calls = []

    def make(out, method, seed, **sizes):
        calls.append((method, seed, sizes))
        return ROW if method != "DPO" else None

    methods = {name: (make, roles) for name, (_, roles) in league.METHODS.items()}
    monkeypatch.setattr(league, "METHODS", methods)
    return calls


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_is_made_once(tmp_path, made):
    runs = [("RLOO", 0), ("GRPO", 0), ("RLOO", 1)]
    league.record(tmp_path, runs[:2], make={"updates": 2})
    league.record(tmp_path, runs)
    assert [call[:2] for call in made] == runs and made[0][2] == {"updates": 2}
    rows = rows_of(tmp_path / "league.csv")
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("RLOO", "0"),
        ("GRPO", "0"),
        ("RLOO", "1"),
    ]
    assert list(rows[0]) == league.COLUMNS and rows[0]["example"] == ROW["example"]
    assert rows[0]["gold"] == "1.2" and rows[0]["seconds"] == ""


def test_a_run_that_two_processes_made_counts_once(tmp_path):
    for gold in (1.1, 1.2):
        league.add_row(
            tmp_path / "league.csv",
            ROW | {"method": "SFT", "seed": 0, "gold": gold},
            league.COLUMNS,
        )
    assert [row["gold"] for row in league.rows_by_method(tmp_path)["SFT"]] == [1.2]


def test_what_its_lesson_has_not_recorded_is_left_out(tmp_path, made, capsys):
    league.record(tmp_path, [("DPO", 3), ("PPO", 3)])
    assert [row["method"] for row in rows_of(tmp_path / "league.csv")] == ["PPO"]
    league.record(tmp_path, [("DPO", 3)])
    assert [call[0] for call in made] == ["DPO", "PPO", "DPO"]  # asked again the next time


def test_rows_of_other_lessons_are_read(tmp_path):
    ppo, _ = league.METHODS["PPO"]
    row = ppo(tmp_path, "PPO", 0)
    assert float(row["gold"]) > 1.3 and row["samples"] == 1920
    assert ppo(tmp_path, "PPO", 99) is None
    recorded = {x["seed"] for x in rows_of(league.PPO_STUDY / "held_out.csv") if x["beta"] == "0.1"}
    assert recorded == {str(seed) for seed in range(10)}


def test_the_groups_of_all_loops_are_settings_of_ppo():
    for settings, scorer in league.LOOPS.values():
        config = PPOConfig(**settings)
        assert config.trained == ("policy",) and config.beta == PPOConfig.beta
        assert config.batch_size * config.updates == league.SAMPLES
        assert (scorer is None) == (config.eos_penalty == 1)


@pytest.mark.parametrize("method", ["RLOO by TRL", "GRPO by TRL"])
def test_trls_settings_are_those_of_our_run(method, tmp_path):
    config = PPOConfig(updates=30, seed=7, **league.GROUPS)
    args = league.trl_settings(method, config, str(tmp_path))
    assert args.generation_batch_size == config.batch_size
    assert args.max_steps == 30 * 2 * 2  # updates, epochs, minibatches
    found = (args.beta, args.num_generations, args.epsilon, args.learning_rate, args.seed)
    assert found == (config.beta, config.group_size, config.clip, config.learning_rate, 7)
    assert (args.temperature, args.top_k, args.top_p) == (1.0, 0, 1.0)
    assert method[:4] == "RLOO" or (args.loss_type, args.scale_rewards) == ("grpo", "group")


def test_the_verifier_is_the_rubrics_correct_and_the_coin_knows_nothing():
    prompts = ["what does the duck say?"] * 4
    texts = ["the duck says quack.", "it says moo.", "great question!", "great question! quack."]
    rollout = rollout_of(texts, [True, True, True, False])
    assert league.verifier(prompts, rollout).tolist() == [1, 0, 0, 1]
    many = [f"answer {i}" for i in range(400)]
    coins = league.coin(["what is hot?"] * 400, replace(rollout, texts=many))
    assert set(coins.tolist()) == {0.0, 1.0} and 0.4 < coins.mean() < 0.6
    assert torch.equal(coins, league.coin(["what is hot?"] * 400, replace(rollout, texts=many)))


def test_the_best_answer_of_each_prompt_is_picked():
    texts = [f"t{i}" for i in range(6)]
    rollout = rollout_of(texts, [True, False, True, True, True, False])
    numbers = torch.arange(6.0)
    whole = [numbers[:, None].expand(6, 3) for _ in range(4)]
    one = Experience(
        ["p"] * 3 + ["q"] * 3, rollout, numbers, whole[0], whole[1], None, *whole[2:], None
    )
    best = league.picked(one, torch.tensor([1, 2]))
    assert best.rollout.texts == ["t1", "t5"] and best.prompts == ["p", "q"]
    assert best.scores.tolist() == [1, 5] and best.values is None
    assert best.rollout.finished.tolist() == [False, False]
    kept = league.encoded(league.picked(one, torch.tensor([1, 0])))
    assert kept == [{"prompt": [5], "response": [7, 1]}]  # the one that was cut off is left out


def test_parts_of_other_widths_are_joined():
    def part(prompt, finished, score):
        count, size = len(finished), len(prompt) + 3
        one = rollout_of([f"{score}"] * count, finished)
        ids = torch.cat([torch.tensor([prompt] * count), one.input_ids[:, 2:]], 1)
        mask = torch.cat([torch.ones(count, size - 3).long(), one.response_mask], 1)
        numbers = torch.full((count, 3), float(score))
        rollout = replace(one, input_ids=ids, attention_mask=mask)
        scores = torch.full((count,), float(score))
        return Experience(
            ["p"] * count, rollout, scores, *[numbers] * 2, None, *[numbers] * 2, None
        )

    short, long = part([4, 5], [True], 1), part([4, 4, 5], [False, True], 2)
    tail = slice(0, 2)  # as if nobody had needed a third token
    short = replace(
        short,
        rollout=replace(
            short.rollout,
            input_ids=short.rollout.input_ids[:, :4],
            attention_mask=short.rollout.attention_mask[:, :4],
            response_mask=short.rollout.response_mask[:, tail],
        ),
        **{
            k: vars(short)[k][:, tail]
            for k in ("logprobs", "ref_logprobs", "rewards", "advantages")
        },
    )
    both = league.joined([short, long])
    assert both.rollout.input_ids.tolist() == [
        [0, 4, 5, 7, 1, 0], [4, 4, 5, 7, 8, 9], [4, 4, 5, 7, 1, 0]
    ]  # fmt: skip
    assert both.rollout.attention_mask[0].tolist() == [0, 1, 1, 1, 1, 0]
    assert both.rollout.response_mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 0]]
    assert both.scores.tolist() == [1, 2, 2] and both.rollout.texts == ["1", "2", "2"]
    assert both.values is None and both.logprobs.shape == (3, 3)
    assert league.encoded(both)[0] == {"prompt": [4, 5], "response": [7, 1]}


def test_the_table_shows_every_method_and_counts_seeds_above_sft(tmp_path, made):
    for seed, gain in ((0, 0.4), (1, 0.1)):
        for method, gold in (("SFT", 1.0), ("RLOO", 1.0 + gain)):
            row = ROW | {"method": method, "seed": seed, "gold": gold}
            league.add_row(tmp_path / "league.csv", row, league.COLUMNS)
    lines = league.table(tmp_path).splitlines()
    assert len(lines) == 3 and lines[2].startswith("RLOO                2        1.25")
    assert lines[2].endswith("1.10 to  1.40   1 of 2")
    league.draw(tmp_path, tmp_path / "figures" / "league.png")
    assert (tmp_path / "figures" / "league.png").stat().st_size > 1000


def test_three_roles_take_less_than_four():
    sizes = {method: league.gigabytes(method) for method in league.METHODS}
    assert sizes["SFT"] < sizes["DPO"] < sizes["RLOO"] == sizes["GRPO"] < sizes["PPO"]
    assert sizes["PPO"] == pytest.approx(5.5, abs=0.1)  # as lesson 04 computes it
    assert sizes["GRPO, verifier"] == sizes["DPO"]


@pytest.mark.parametrize("text", ["3/2", "0/2", "1", "a/b"])
def test_a_part_must_be_one_of_its_parts(text):
    with pytest.raises((ValueError, argparse.ArgumentTypeError)):  # argparse says either
        league.part_of(text)
    assert league.part_of("2/2") == (2, 2)
