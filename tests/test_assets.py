"""What is promised about the shipped models, measured on the shipped files."""

import json
from statistics import fmean

import league
import pytest
import record_clicks
import record_dpo
import record_ppo
import train_assets

from rlhf_helpers import reward
from rlhf_helpers.base import load_base
from rlhf_helpers.clinic import FAULTS
from rlhf_helpers.examine import examine
from rlhf_helpers.pocket import exam, rubric, world
from rlhf_helpers.presets import ASSETS
from rlhf_helpers.roles import Roles
from rlhf_helpers.rollout import sample_responses
from rlhf_helpers.sft import held_out_loss
from rlhf_helpers.sources import sft_dataset
from rlhf_helpers.text import encode_examples

DUCK = "what does the duck say?"
REWARD_RUNS = json.loads((ASSETS / "reward" / "runs.json").read_text(encoding="utf-8"))
SFT_RUNS = json.loads((ASSETS / "sft" / "runs.json").read_text(encoding="utf-8"))


def test_the_assets_are_small_and_hold_no_pickle():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8e6
    assert {path.suffix for path in files} <= {
        ".safetensors",
        ".json",
        ".jinja",
        ".md",
        ".csv",
    }


def test_the_base_is_fluent(base, tokenizer):
    assert world.fluency(exam.sampled_pages(base, tokenizer)) >= 0.98


def test_the_base_knows_the_facts(base, tokenizer):
    known = exam.known_facts(base, tokenizer)
    assert known.keys() == world.TOPICS.keys()
    assert exam.known_share(known) >= 0.95


def test_known_share_weighs_topics_by_their_facts():
    counts = [len(world.TOPICS[name].facts) for name in ("sound", "sum")]
    assert exam.known_share({"sound": 1.0, "sum": 0.0}) == counts[0] / sum(counts)


def test_the_base_tells_right_from_wrong(base, tokenizer):
    judged = exam.verdicts(base, tokenizer)
    assert min(judged.values()) >= 0.95


def test_the_base_is_no_assistant(base, tokenizer):
    prompts = world.prompts("held_out")
    r = sample_responses(base, tokenizer, prompts, seed=1)
    styles = [exam.style(*row) for row in zip(prompts, r.texts, r.finished.tolist(), strict=True)]
    assert styles.count("right, nothing more") / len(styles) < 0.5
    for name in ("wrong", "asks back", "rude", "vague or rambling", "answers, but goes on"):
        assert styles.count(name) / len(styles) > 0.01, name


def test_the_card_states_how_the_model_was_made():
    card = (ASSETS / "base" / "README.md").read_text(encoding="utf-8")
    training = json.loads((ASSETS / "base" / "training.json").read_text(encoding="utf-8"))
    for key in ("steps", "minutes", "held_out_loss"):
        assert str(training[key]) in card


def test_known_facts_notices_a_model_that_knows_nothing(base, tokenizer):
    """The exam itself: with its output rows shuffled, the model fails it."""
    import copy

    import torch

    ignorant = copy.deepcopy(base)
    weight = ignorant.get_output_embeddings().weight
    with torch.no_grad():
        weight.copy_(
            weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))]
        )
    known = exam.known_facts(ignorant, tokenizer)
    assert sum(known.values()) / len(known) < 0.5
    judged = exam.verdicts(ignorant, tokenizer)
    assert min(judged.values()) < 0.8


def test_continuation_logprobs_are_those_of_a_plain_forward(base, tokenizer):
    import torch

    context, continuation = "<|eos|>the duck", "says quack."
    scores = exam.continuation_logprobs(
        base, tokenizer, [context, "<|eos|>"], [continuation, "the cow says moo."]
    )
    ids = tokenizer(context + " " + continuation, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logprobs = base(ids).logits[0].log_softmax(-1)
    expected = sum(logprobs[i - 1, ids[0, i]] for i in range(3, ids.shape[1]))
    assert scores[0].item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize(
    "response, finished, expected",
    [
        ("quack.", True, "right, nothing more"),
        ("quack.", False, "answers, but goes on"),
        ("quack. yes, that is right.", True, "answers, but goes on"),
        ("moo.", True, "wrong"),
        ("what is the opposite of hot?", True, "asks back"),
        ("go away. quack.", True, "rude"),
        ("i do not know.", True, "vague or rambling"),
        ("quack the duck the", True, "other"),
    ],
)
def test_style(response, finished, expected):
    assert exam.style(DUCK, response, finished) == expected
    assert expected in exam.STYLES


def test_answers_question():
    assert exam.answers_question(DUCK, "well, let me think. moo.")
    assert not exam.answers_question(DUCK, "the cow says moo.")
    assert rubric.gold_reward(DUCK, "the cow says moo.").answers == 0


# --- the reference SFT adapter ------------------------------------------------------------------


def test_the_sft_adapter_is_that_of_its_record(pocket, tokenizer):
    """Measured again, with other samples: within four standard errors of their difference.

    Where numbers are rounded or drawn in another way, the same seed gives other samples.
    """
    roles = Roles(load_base(pocket))
    roles.load("sft", ASSETS / "sft")
    measured = train_assets.judge(roles.use("sft"), tokenizer, seed=100)
    recorded = next(row for row in SFT_RUNS if (row["run"], row["seed"]) == ("sft", 0))
    error = (2 / len(world.prompts("held_out"))) ** 0.5  # of two means, for a deviation of 1
    # A share's deviation is at most 0.5; gold's was 0.75 to 0.8 with every one of 13 seeds.
    for name, deviation in {"answers": 0.5, "right": 0.5, "finished": 0.5, "gold": 0.8}.items():
        allowed = 4 * deviation * error
        assert measured[name] == pytest.approx(recorded[name], abs=allowed), name
    written = sft_dataset(pocket, "held_out", copies=1)
    rows = encode_examples(tokenizer, written, pocket.prompt_length, pocket.response_length)
    loss = held_out_loss(roles.use("sft"), tokenizer, rows)
    assert loss == pytest.approx(recorded["held_out_loss"]["150"], abs=1e-3)


def test_sft_does_its_job_on_every_recorded_seed():
    runs = [row for row in SFT_RUNS if row["run"] == "sft"]
    assert [row["seed"] for row in runs] == list(range(10))
    for row in runs:
        assert row["answers"] > 0.9 > row["answers before"]
        assert row["gold"] > row["gold before"] + 0.3
        assert row["held_out_loss"]["150"] < row["held_out_loss"]["0"] - 0.1
        assert row["right"] < 0.7  # the demonstrations are right in 65% of cases


def test_what_the_failures_of_lesson_01_cost_on_the_recorded_seeds():
    gold = {(row["run"], row["seed"]): row["gold"] for row in SFT_RUNS}
    costs = {
        run: [gold["right labels", seed] - gold[run, seed] for seed in range(10)]
        for run in ("prompt too", "no EOS")
    }
    assert min(costs["no EOS"]) > 0.5
    assert sum(cost > 0 for cost in costs["prompt too"]) == 9
    assert sum(costs["prompt too"]) < sum(costs["no EOS"]) / 100


def test_the_card_of_the_sft_adapter_says_what_its_record_says():
    rows = [
        row | {"held_out_loss": {int(k): v for k, v in row["held_out_loss"].items()}}
        for row in SFT_RUNS
    ]
    assert (ASSETS / "sft" / "README.md").read_text(encoding="utf-8") == train_assets.sft_card(rows)


# --- the reference reward model -----------------------------------------------------------------


def test_the_reward_model_is_that_of_its_record(pocket, tokenizer):
    """The politeness probe again: it depends on nothing but adapter, head and base."""
    roles = Roles(load_base(pocket))
    roles.load("reward", ASSETS / "reward")
    recorded = next(row for row in REWARD_RUNS if (row["run"], row["seed"]) == ("reward", 0))
    for (prompts, responses), proxy in zip(
        exam.polite_probe(), recorded["polite_proxy"], strict=True
    ):
        scores = reward.score_responses(roles, "reward", tokenizer, prompts, responses, 32, 64)
        assert scores.mean().item() == pytest.approx(proxy, abs=0.01)


def test_the_reward_model_comes_close_to_the_ceiling_on_every_recorded_seed():
    runs = [row for row in REWARD_RUNS if row["run"] == "reward"]
    assert [row["seed"] for row in runs] == list(range(10))
    assert all(row["accuracy"] > 0.9 * row["ceiling"] for row in runs)
    assert all(row["gold_agreement"] > 0.87 for row in runs)


def test_the_blind_spot_is_there_on_every_seed_and_not_without_the_bias():
    for row in REWARD_RUNS:
        if row["run"] in ("reward", "unbiased"):
            proxy, gold = row["polite_proxy"], row["polite_gold"]
            assert gold[1] > gold[2] > gold[4]
            assert (proxy[4] > proxy[1]) == (row["run"] == "reward")


def test_few_pairs_are_learnt_by_heart():
    sizes = [row for row in REWARD_RUNS if row["run"] == "size"]
    gap = {n: [] for n in (64, 256, 1024, 3072)}
    for row in sizes:
        gap[row["pairs"]].append(row["train_accuracy"] - row["accuracy"])
    means = [sum(values) / len(values) for values in gap.values()]
    assert all(len(values) == 3 for values in gap.values())
    assert means == sorted(means, reverse=True) and means[0] > 0.2


def test_the_card_of_the_reward_model_says_what_its_record_says():
    card = (ASSETS / "reward" / "README.md").read_text(encoding="utf-8")
    assert card == train_assets.reward_card(REWARD_RUNS)


# --- the recorded PPO runs ----------------------------------------------------------------------


def test_ppo_at_the_usual_price_answers_better_on_every_recorded_seed():
    ends = [row for row in record_ppo.read_csv(ASSETS / "ppo" / "held_out.csv")]
    ends = [row for row in ends if float(row["beta"]) == 0.1]
    sft = next(row for row in SFT_RUNS if (row["run"], row["seed"]) == ("sft", 0))
    assert [int(row["seed"]) for row in ends] == list(range(10))
    for row in ends:
        assert float(row["correct"]) > sft["right"] + 0.15
        assert float(row["gold"]) > sft["gold"] + 0.25
        assert float(row["kl"]) < 10


def recorded(path):
    rows = record_ppo.read_csv(ASSETS / path)
    return [{k: v if k == "example" else float(v) for k, v in row.items()} for row in rows]


def ends_by_seed():
    rows = recorded("ppo/held_out.csv")
    return [
        {row["beta"]: row for row in rows if row["seed"] == seed}
        | {"sft": next(row for row in recorded("ppo/reference.csv") if row["seed"] == seed)}
        for seed in range(10)
    ]


def test_the_study_has_every_price_and_seed():
    rows = recorded("ppo/held_out.csv")
    pairs = [(row["beta"], row["seed"]) for row in rows]
    assert sorted(pairs) == [(b, s) for b in record_ppo.BETAS for s in range(10)]


def in_order(name, *betas, falling=False):
    def holds(rows):
        values = [rows[beta][name] for beta in betas]
        return values == sorted(values, reverse=falling)

    return holds


@pytest.mark.parametrize(
    ("seeds", "holds"),
    [
        (8, lambda r: r[0]["proxy"] > r["sft"]["proxy"] + 2),
        (10, lambda r: r[0]["gold"] < r["sft"]["gold"]),
        (10, lambda r: r[0.1]["gold"] > r[0.01]["gold"]),
        (8, lambda r: r[0.1]["gold"] > r[1]["gold"]),
        (10, in_order("kl", *record_ppo.BETAS, falling=True)),
        (10, in_order("entropy", 0.01, 0.1, 1)),
        (10, in_order("distinct_2", 0.01, 0.1, 1)),
        (10, in_order("self_bleu", 0.01, 0.1, 1, falling=True)),
    ],
)
def test_on_how_many_of_ten_seeds_the_price_does_what_lesson_05_says(seeds, holds):
    assert sum(map(holds, ends_by_seed())) == seeds


def test_without_the_bias_the_same_run_does_not_hack():
    biased = [rows[0.0] for rows in ends_by_seed()]
    unbiased = recorded("ppo_unbiased/held_out.csv")
    assert [row["seed"] for row in unbiased] == list(range(10))
    for hacked, fair in zip(biased, unbiased, strict=True):
        assert fair["gold"] > hacked["gold"] + 1


def test_if_cutting_off_costs_more_the_same_run_does_not_hack():
    """So what the policy exploits at β = 0 is above all that it need not stop."""
    both, dear = ([rows[0.0] for rows in ends_by_seed()], recorded("ppo_must_stop/held_out.csv"))
    assert [row["seed"] for row in dear] == list(range(10))
    for hacked, stopping in zip(both, dear, strict=True):
        assert stopping["gold"] > hacked["gold"] + 0.8 and stopping["length"] < 20
    about = json.loads((ASSETS / "ppo_must_stop" / "about.json").read_text(encoding="utf-8"))
    assert about["config"]["eos_penalty"] == 4
    updates = recorded("ppo/updates.csv")
    last = {
        beta: [r["finished"] for r in updates if (r["beta"], r["update"]) == (beta, 30)]
        for beta in (0, 0.1)
    }
    assert max(last[0]) < 0.1 and min(last[0.1]) > 0.9


def test_the_controller_brings_a_run_back():
    rows = recorded("ppo/adaptive.csv")
    for seed in range(3):
        run = [row for row in rows if row["seed"] == seed]
        assert [row["update"] for row in run] == list(range(1, 61))
        assert run[0]["price"] == 0.01
        worst = max(row["kl"] for row in run)
        assert worst > 10 and sum(row["kl"] for row in run[-5:]) / 5 < worst / 2


def test_every_recorded_ppo_run_is_whole_and_began_at_the_reference():
    updates = record_ppo.read_csv(ASSETS / "ppo" / "updates.csv")
    about = json.loads((ASSETS / "ppo" / "about.json").read_text(encoding="utf-8"))
    runs = {}
    for row in updates:
        runs.setdefault((row["beta"], row["seed"]), []).append(row)
    ends = record_ppo.read_csv(ASSETS / "ppo" / "held_out.csv")
    assert runs.keys() == {(row["beta"], row["seed"]) for row in ends}
    for rows in runs.values():
        assert [int(row["update"]) for row in rows] == list(
            range(1, about["config"]["updates"] + 1)
        )
        assert float(rows[0]["kl"]) == 0
        assert all(float(row["first_ratio"]) == 1 for row in rows)


# --- the recorded clicks ------------------------------------------------------------------------


def clicks_by_seed(row):
    """SFT, the hacked policy and the one after these clicks, of each seed that is recorded."""
    texts = ("policy", "row", "pairs", "clicker", "example")
    tables = [
        [{k: v if k in texts else float(v) for k, v in line.items()} for line in lines]
        for lines in (
            record_ppo.read_csv(ASSETS / "clicks" / f"{n}.csv") for n in ("before", "after")
        )
    ]
    before = {(line["policy"], line["seed"]): line for line in tables[0]}
    after = {line["seed"]: line for line in tables[1] if line["row"] == row}
    return [(before["SFT", s], before["hacked", s], line) for s, line in after.items()]


def test_sixty_honest_clicks_mend_the_hacked_model_on_every_recorded_seed():
    seeds = clicks_by_seed("honest-60")
    assert len(seeds) == record_clicks.ROWS["honest-60"].seeds
    for sft, hacked, cured in seeds:
        assert hacked["gold"] < 0 < sft["gold"] < cured["gold"]
        assert cured["correct"] >= sft["correct"] + 0.1
        assert hacked["finished"] < 0.1 and cured["finished"] > 0.95
        assert cured["agreement"] >= sft["agreement"] - 0.05
        assert cured["agreement_hacked"] > sft["agreement_hacked"] + 0.3
        assert cured["used"] == 60


def test_every_row_of_clicks_is_one_that_the_recorder_makes_and_stands_once():
    lines = record_ppo.read_csv(ASSETS / "clicks" / "after.csv")
    keys = [(line["row"], int(line["seed"])) for line in lines]
    assert len(set(keys)) == len(keys)
    for line in lines:
        row = record_clicks.ROWS[line["row"]]
        assert int(line["seed"]) < row.seeds
        assert (int(line["clicks"]), line["pairs"], line["clicker"], float(line["replay"])) == (
            row.clicks, row.pairs, row.clicker, row.replay
        )  # fmt: skip


def above_sft(row):
    """On how many seeds gold is above SFT's, of how many."""
    better = [cured["gold"] > sft["gold"] for sft, _, cured in clicks_by_seed(row)]
    return sum(better), len(better)


def test_clicks_on_pairs_of_sft_do_not_mend_the_hacked_model():
    assert above_sft("sft-60") == (2, 10)
    for sft, _, cured in clicks_by_seed("sft-60"):
        assert cured["agreement_hacked"] < sft["agreement_hacked"] + 0.15
        assert cured["finished"] > 0.97 and cured["kl"] > 3.5


def test_few_honest_clicks_are_enough():
    for row in ("honest-12", "honest-24", "honest-120"):
        assert above_sft(row) == (10, 10)


def test_biased_clicks_are_not_enough_and_careless_ones_are_a_risk():
    assert above_sft("biased-60") == (0, 10)
    assert above_sft("careless-60") == (9, 10)
    lengths = {
        row: sum(cured["length"] for *_, cured in clicks_by_seed(row)) / 10
        for row in ("biased-60", "honest-60")
    }
    assert lengths["biased-60"] > 1.7 * lengths["honest-60"]
    golds = [cured["gold"] for *_, cured in clicks_by_seed("careless-120")]
    assert len(golds) == 10 and min(golds) < 0 < 1 < sorted(golds)[1]


def test_a_second_round_of_clicks_and_the_missing_replay_change_little():
    first = {cured["seed"]: cured for *_, cured in clicks_by_seed("honest-60")}
    again = {cured["seed"]: cured for *_, cured in clicks_by_seed("second-round-60")}
    assert len(again) == 3
    assert sum(row["gold"] > first[seed]["gold"] for seed, row in again.items()) == 2
    assert all(row["asked"] >= 65 > 62 >= first[seed]["asked"] for seed, row in again.items())
    alone = {cured["seed"]: cured for *_, cured in clicks_by_seed("no-replay-60")}
    assert len(alone) == 3
    for seed, row in alone.items():
        assert row["kl"] < first[seed]["kl"] and row["gold"] < first[seed]["gold"]
        assert row["agreement"] > first[seed]["agreement"] - 0.03


# --- the recorded DPO runs ----------------------------------------------------------------------


def dpo_rows(path):
    rows = record_ppo.read_csv(ASSETS / "dpo" / path)
    words = ("run", "example")
    return [{k: v if k in words else float(v) for k, v in row.items()} for row in rows]


def dpo_ends(run, beta=0.1):
    ends = [row for row in dpo_rows("held_out.csv") if (row["run"], row["beta"]) == (run, beta)]
    return {row["seed"]: row for row in ends}


def test_each_dpo_run_has_the_best_rate_of_its_price_and_all_pairs():
    for row in dpo_rows("held_out.csv"):
        assert row["rate"] == record_dpo.best_rate(ASSETS / "dpo", row["beta"])
        assert row["pairs"] == 3572 or row["run"].startswith("second_")
    assert {row["seed"] for row in dpo_rows("rates.csv")} == set(record_dpo.RATE_SEEDS)
    for beta in record_dpo.BETAS:
        assert len(dpo_ends("dpo", beta)) == 10


def test_every_recorded_dpo_run_is_whole_and_began_where_it_should():
    runs = {}
    for row in dpo_rows("updates.csv"):
        runs.setdefault((row["run"], row["beta"], row["seed"]), []).append(row)
    ends = {(r["run"], r["beta"], r["seed"]): r for r in dpo_rows("held_out.csv")}
    assert runs.keys() >= ends.keys()
    for key, end in ends.items():
        first, last = runs[key][0], runs[key][-1]
        sides = first["chosen_log_ratio"], first["rejected_log_ratio"]
        assert first["step"] == 0 and last["step"] == end["pairs"] // 32
        assert last["loss"] == end["loss"] < first["loss"]
        if key[0] == "dpo":
            assert sides == (0, 0) and first["accuracy"] == 0.5
        elif key[0] == "wrong_reference":
            assert min(sides) > 1
        else:
            start = ends["dpo", *key[1:]]
            assert sides == (start["chosen_log_ratio"], start["rejected_log_ratio"])


def test_far_from_sft_dpo_judges_well_and_answers_badly():
    far = [r for r in dpo_rows("rates.csv") if r["rate"] == 5e-4 and r["beta"] in (0.1, 0.3)]
    near = [r for r in dpo_rows("rates.csv") if r["rate"] == 1.5e-4 and r["beta"] in (0.1, 0.3)]
    near = [row for row in near if row["seed"] == far[0]["seed"]]
    sft = sum(row["gold"] for row in dpo_rows("reference.csv")) / len(dpo_rows("reference.csv"))
    assert len(far) == len(near) == 2
    assert max(row["gold"] for row in far) < sft < min(row["gold"] for row in near)
    assert min(row["accuracy"] for row in far) > 0.79 > max(row["accuracy"] for row in near)
    assert min(row["kl"] for row in far) > 5 > 1 > max(row["kl"] for row in near)


@pytest.mark.parametrize("beta", record_dpo.BETAS)
def test_dpo_gains_and_stays_behind_ppo_on_every_recorded_seed(beta):
    ends = dpo_ends("dpo", beta)
    sft = {row["seed"]: row["gold"] for row in recorded("ppo/reference.csv")}
    ppo = [row for row in recorded("ppo/held_out.csv") if row["beta"] == 1]
    for seed, row in ends.items():
        assert sft[seed] < row["gold"] < min(end["gold"] for end in ppo)
        assert (row["chosen_log_ratio"] < 0) == (beta < 1) and row["rejected_log_ratio"] < -0.3


@pytest.mark.parametrize("beta", [0.03, 0.1, 0.3])
def test_dpo_is_best_at_the_highest_price(beta):
    best, other = dpo_ends("dpo", 1.0), dpo_ends("dpo", beta)
    gains = [best[seed]["gold"] - other[seed]["gold"] for seed in best.keys() & other.keys()]
    assert len(gains) == 10 and sum(gains) / len(gains) > 0.03


@pytest.mark.parametrize(("beta", "least", "most"), [(0.1, -0.01, 0.01), (1.0, 0.03, 0.06)])
def test_what_the_wrong_reference_costs_in_a_short_run(beta, least, most):
    wrong, right = dpo_ends("wrong_reference", beta), dpo_ends("dpo", beta)
    assert len(wrong) == 3
    for seed, row in wrong.items():
        assert least < right[seed]["gold"] - row["gold"] < most


@pytest.mark.parametrize("judge", ["reward", "annotator"])
def test_a_second_round_goes_far_and_loses_gold(judge):
    later, first = dpo_ends(f"second_{judge}"), dpo_ends("dpo")
    assert len(later) == 3
    for seed, row in later.items():
        assert row["gold"] < first[seed]["gold"] and row["kl"] > first[seed]["kl"] + 1
        assert row["correct"] > first[seed]["correct"] and row["proxy"] > first[seed]["proxy"]


def test_the_logs_of_exercise_08_are_those_of_the_study(tmp_path):
    record_dpo.record_logs(ASSETS / "dpo", tmp_path)
    for name in "ABC":
        log = (ASSETS / "dpo_logs" / f"{name}.csv").read_bytes()
        assert log == (tmp_path / f"{name}.csv").read_bytes()


# --- the clinic -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clinic_runs():
    runs = {}
    for row in record_ppo.read_csv(ASSETS / "clinic" / "updates.csv"):
        numbers = {k: float(v) for k, v in row.items() if k not in ("fault", "seed")}
        runs.setdefault((row["fault"], row["seed"]), []).append(numbers)
    return runs


def clinic_ends(name):
    """A number of each fault's three runs at their end."""
    found = {}
    for row in record_ppo.read_csv(ASSETS / "clinic" / "held_out.csv"):
        found.setdefault(row["fault"], []).append(float(row[name]))
    return found


def test_every_run_of_the_clinic_is_whole_and_silent(clinic_runs):
    keys = {(fault, str(seed)) for fault in ("healthy", *FAULTS) for seed in range(3)}
    assert clinic_runs.keys() == keys
    assert {tuple(row["update"] for row in rows) for rows in clinic_runs.values()} == {
        tuple(range(1, 31))
    }
    ends, texts = (
        record_ppo.read_csv(ASSETS / "clinic" / f"{x}.csv") for x in ("held_out", "texts")
    )
    assert {row["warnings"] for row in ends} == {"0"} and len(ends) == 45
    assert len(texts) == 450


def test_ten_healthy_runs_trip_no_alarm(clinic_runs):
    for seed in "012":
        assert examine(clinic_runs["healthy", seed]) == []
    studies = {}
    for row in recorded("ppo/updates.csv"):
        if row["beta"] == 0.1:
            studies.setdefault(row["seed"], []).append(row)
    assert len(studies) == 10
    assert not [alarm for rows in studies.values() for alarm in examine(rows)]


def test_what_is_found_of_each_fault_without_gold(clinic_runs):
    before = {
        row["fault"]
        for row in record_ppo.read_csv(ASSETS / "clinic" / "preflight.csv")
        if row["passed"] == "0"
    }
    assert before == FAULTS.keys() - {"swapped_labels", "adapter_in_bfloat16"}
    during = {fault for fault in FAULTS if all(examine(clinic_runs[fault, s]) for s in "012")}
    late = {"swapped_labels", "adapter_in_bfloat16", "generate_defaults"}
    assert during == FAULTS.keys() - late


def test_under_ten_faults_the_score_rises_on_every_seed(clinic_runs):
    def rise(rows):
        start, end = (fmean(row["score"] for row in part) for part in (rows[:3], rows[-3:]))
        return end - start

    rises = {fault: min(rise(clinic_runs[fault, seed]) for seed in "012") for fault in FAULTS}
    still = {"lost_gradient", "lost_head", "one_token_off", "ratio_to_reference"}
    assert {fault for fault in FAULTS if rises[fault] > 0.3} == FAULTS.keys() - still


def test_what_faults_cost_and_what_they_do_not():
    gold, kl = clinic_ends("gold"), clinic_ends("kl")
    healthy = gold["healthy"]
    for fault in ("kl_sign", "kl_without_gradient"):
        assert max(gold[fault]) < 0 and min(kl[fault]) > 25
    for fault in ("lost_gradient", "one_token_off", "lost_head", "swapped_labels"):
        assert max(gold[fault]) < 1.1
    assert max(gold["swapped_labels"]) < 0.3
    for fault in ("padding_whitened", "whitened_returns", "score_at_padding"):
        assert min(gold[fault]) > min(healthy)
    assert min(gold["score_at_padding"]) > max(healthy)
    for fault in ("bare_prompt", "generate_defaults", "adapter_in_bfloat16"):
        assert 0.02 < fmean(healthy) - fmean(gold[fault]) < 0.1


# --- the league -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def standings():
    """Rows of a method by seed."""
    found = {}
    for row in record_ppo.read_csv(ASSETS / "league" / "league.csv"):
        numbers = {k: float(v) for k, v in row.items() if v and k not in ("method", "example")}
        assert int(row["seed"]) not in found.setdefault(row["method"], {})
        found[row["method"]][int(row["seed"])] = numbers
    return found


def column(rows, name):
    return [row[name] for row in rows.values()]


def test_the_league_has_every_method_and_whole_curves(standings):
    assert standings.keys() == league.METHODS.keys()
    updates = {}
    for row in record_ppo.read_csv(ASSETS / "league" / "curves.csv"):
        updates.setdefault((row["method"], int(row["seed"])), []).append(int(row["update"]))
    runs = {(method, seed) for method in league.LOOPS for seed in standings[method]}
    assert updates == {key: [*range(1, 31)] for key in runs}
    samples = {method: set(column(standings[method], "samples")) for method in standings}
    asked = ("PPO", *league.LOOPS, "RLOO by TRL", "GRPO by TRL", "SFT on the best")
    assert {method: samples[method] for method in asked} == {key: {1920} for key in asked}


def test_the_order_of_the_league_is_as_lesson_09_tells_it(standings):
    gold = {method: column(rows, "gold") for method, rows in standings.items()}
    trained = [x for method in gold for x in gold[method] if "best-" not in method]
    assert min(gold["best-of-4"]) > max(trained) and min(gold["best-of-16"]) > max(trained)
    assert abs(fmean(gold["RLOO"]) - fmean(gold["PPO"])) < 0.05
    assert fmean(gold["RLOO"]) - 0.1 > fmean(gold["GRPO"]) > fmean(gold["SFT"]) + 0.15
    assert fmean(column(standings["GRPO"], "kl")) > fmean(column(standings["RLOO"], "kl")) + 0.3
    copied, start = standings["SFT on the best"], standings["SFT"]
    assert min(column(copied, "polite")) > 0.6 > 2 * max(column(start, "polite"))
    assert fmean(column(copied, "correct")) - fmean(column(start, "correct")) < 0.08
    assert fmean(gold["online DPO"]) < fmean(gold["DPO"]) < fmean(gold["SFT"]) + 0.12


def test_without_a_critic_gold_rises_by_a_third_of_a_point(standings):
    gains = [
        row["gold"] - standings["SFT"][seed]["gold"] for seed, row in standings["RLOO"].items()
    ]
    assert min(gains) > 0.3 and len(gains) == 10


@pytest.mark.parametrize("method", ["RLOO", "GRPO"])
def test_trl_ends_where_our_loop_does(standings, method):
    ours, theirs = (column(standings[name], "gold") for name in (method, f"{method} by TRL"))
    assert min(ours) - 0.05 < fmean(theirs) < max(ours) + 0.05
    assert abs(fmean(ours) - fmean(theirs)) < max(ours) - min(ours)


def test_by_tokens_rloo_is_lower_on_eight_of_ten_seeds(standings):
    whole, tokens = standings["RLOO"], standings["RLOO, tokens"]
    gaps = [whole[seed]["gold"] - tokens[seed]["gold"] for seed in whole.keys() & tokens.keys()]
    assert sum(gap > 0 for gap in gaps) == 8 and len(gaps) == 10
    assert fmean(gaps) == pytest.approx(0.07, abs=0.005)


def test_a_program_raises_what_it_asks_for_and_a_coin_nothing(standings):
    start, program, coin = (standings[x] for x in ("SFT", "GRPO, verifier", "GRPO, coin"))
    assert min(column(program, "correct")) > 0.75
    assert abs(fmean(column(program, "tokens")) - fmean(column(start, "tokens"))) < 1
    assert fmean(column(program, "polite")) < fmean(column(start, "polite"))
    assert 0.2 < fmean(column(program, "flat_groups")) < 0.5
    for number in ("correct", "gold"):
        assert sum(coin[seed][number] < start[seed][number] for seed in start) == 8
    assert fmean(column(coin, "kl")) > 0.2


def test_an_update_without_a_critic_takes_less_time():
    seconds = {}
    for row in record_ppo.read_csv(ASSETS / "league" / "timing.csv"):
        seconds.setdefault(row["method"], []).append(float(row["cpu_seconds"]))
    assert max(seconds["RLOO"] + seconds["GRPO"]) < 0.75 * min(seconds["PPO"])


# --- the real run ---------------------------------------------------------------------------------


def test_the_real_run_is_as_lesson_05_tells_it():
    numbers = {
        (row["stage"], row["number"]): row
        for row in record_ppo.read_csv(ASSETS / "real" / "numbers.csv")
    }
    for role in ("reward", "judge"):
        accuracy = numbers[role, "held-out accuracy"]
        assert float(accuracy["low"]) < 0.5 < float(accuracy["high"])
    before, after = (numbers["sft", name] for name in ("held-out loss before", "held-out loss"))
    assert float(after["value"]) < float(before["value"]) - 0.4
    updates = recorded("real/updates.csv")
    free, priced = ([row for row in updates if row["beta"] == beta] for beta in (0, 0.1))
    for rows in (free, priced):
        assert rows[0]["first_ratio"] == 1 and rows[0]["kl"] == 0
        assert max(row["proxy"] - row["judge"] for row in rows[:4]) < 0.25
    assert min(row["proxy"] for row in free[-5:]) > 2.6 and free[-1]["kl"] > 29
    assert max(row["judge"] for row in free[10:]) < max(row["judge"] for row in free[:10]) < 1.25
    assert max(row["finished"] for row in free[-5:]) < 0.05
    assert max(row["kl"] for row in priced) < 10.5 and priced[-1]["finished"] > 0.5
