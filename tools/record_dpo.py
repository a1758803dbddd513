"""Record the DPO runs that lesson 08 and its exercise show.

    python tools/record_dpo.py rates     # learning rates at each β, on seeds of their own
    python tools/record_dpo.py study     # ten seeds at each β, with its best rate
    python tools/record_dpo.py wrong     # three seeds whose reference is the bare base
    python tools/record_dpo.py rounds    # three seeds of a second round, on old and on new pairs
    python tools/record_dpo.py timing    # DPO, reward model and PPO on one machine
    python tools/record_dpo.py logs      # three logs for the exercise, from the study

The pairs are those that the shipped reward model was trained on (lesson 02, seed 0). A seed is the
order in which DPO takes them and the samples by which the policy is judged; in a second round also
the samples that make its pairs. A study that is stopped goes on where it was.
"""

import argparse
import random
import time
from collections import defaultdict
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
from record_ppo import fresh_roles, judged, on_held_out, read_csv, write_about, write_csv
from tqdm.auto import tqdm

from rlhf_helpers import dpo, ppo, reward
from rlhf_helpers.dpo import SIDES, DPOConfig
from rlhf_helpers.pocket import world
from rlhf_helpers.pocket.annotator import Annotator
from rlhf_helpers.pocket.preferences import collect_preferences
from rlhf_helpers.presets import ASSETS, load_preset
from rlhf_helpers.reward import RewardConfig
from rlhf_helpers.roles import Roles
from rlhf_helpers.text import load_tokenizer

STUDY = ASSETS / "dpo"
LOGS = ASSETS / "dpo_logs"
WORK = Path(__file__).parents[1] / "runs" / "assets"
BETAS = (0.1, 0.3, 0.03, 1.0)
RATES = dict.fromkeys(BETAS, (1.5e-4, 3e-4, 7.5e-5)) | {1.0: (1.5e-4, 3e-4, 7.5e-5, 6e-4)}
RATE_SEEDS = 100, 101, 102  # none of the ten
MAIN_BETA = 0.1
WRONG_BETAS = (0.1, 1.0)
JUDGES = ("reward", "annotator", "nobody")


# --- one run --------------------------------------------------------------------------------------


@cache
def first_pairs() -> tuple[list[dict], list[dict]]:
    """Encoded: the pairs that the shipped reward model was trained on, and those held out."""
    tokenizer, model = load_tokenizer(load_preset("pocket")), fresh_roles().use("reference")
    prompts, kept = world.prompts("train"), WORK / "preferences"
    pairs = collect_preferences(model, tokenizer, prompts, Annotator(), cache=kept)
    train, held_out = (encoded(rows) for rows in reward.split_by_prompt(pairs))
    return train, held_out


def encoded(rows) -> list[dict]:
    preset = load_preset("pocket")
    lengths = preset.prompt_length, preset.response_length
    return reward.encode_pairs(load_tokenizer(preset), rows, *lengths)


def config_of(beta: float, rate: float, pairs: list[dict]) -> DPOConfig:
    """Once through the pairs."""
    steps = len(pairs) // DPOConfig.batch_size
    return DPOConfig(steps=steps, beta=beta, learning_rate=rate, eval_every=37)


@cache
def reference_logprobs() -> dict[str, tuple[float, float]]:
    """The reference's log-probabilities of all first pairs, which no run changes.

    Those held out in batches of their own, as they are measured: else rounding would break ties.
    """
    known, tokenizer, roles = {}, load_tokenizer(load_preset("pocket")), fresh_roles()
    for pairs in first_pairs():
        sides = PAIR_LOGPROBS(roles, "reference", tokenizer, pairs)
        values = zip(*(side.tolist() for side in sides), strict=True)
        known |= zip(map(str, pairs), values, strict=True)
    return known


PAIR_LOGPROBS = dpo.pair_logprobs


def looked_up(roles: Roles, role: str, tokenizer, pairs: list[dict]):
    """`dpo.pair_logprobs`, without computing again what is known."""
    known = reference_logprobs()
    if role != "reference" or not all(str(pair) in known for pair in pairs):
        return PAIR_LOGPROBS(roles, role, tokenizer, pairs)
    return torch.tensor([known[str(pair)] for pair in pairs]).unbind(1)


def trained(
    roles: Roles,
    pairs: list[dict],
    seed: int,
    config: DPOConfig,
    reference: str = "reference",
    **options,
) -> list[dict]:
    """Train role `policy`; a row for each measurement on the held-out pairs."""
    tokenizer, rows = load_tokenizer(load_preset("pocket")), []
    data = random.Random(f"order-{seed}").sample(pairs, len(pairs)), first_pairs()[1]
    reference_logprobs()  # before the clock starts
    began = time.perf_counter()
    with patch.object(dpo, "pair_logprobs", looked_up):
        for stats in dpo.train_dpo(roles, "policy", reference, tokenizer, *data, config, **options):
            if stats.held_out:
                numbers = {name: round(value, 4) for name, value in stats.held_out.items()}
                seconds = round(time.perf_counter() - began, 1)
                rows.append({"step": stats.step} | numbers | {"seconds": seconds})
    return rows


def end_of(roles: Roles, seed: int, role: str = "policy") -> dict:
    """How a role does on the held-out prompts, judged just as the ends of PPO's runs are."""
    return answered(on_held_out(roles, ppo.PPOConfig(seed=seed), role))


def answered(experience: ppo.Experience) -> dict:
    """What the rubric says of answers, how long they are, and the first of them."""
    rollout = experience.rollout
    return judged(experience) | {
        "finished": round(rollout.finished.double().mean().item(), 4),
        "tokens": round(rollout.response_mask.sum(-1).double().mean().item(), 4),
        "example": rollout.texts[0],
    }


# --- what is recorded -----------------------------------------------------------------------------


def same_run(row: dict, run: dict) -> bool:
    return all(row[name] == str(value) for name, value in run.items())


def recorded(out: Path, run: dict) -> bool:
    return any(same_run(row, run) for row in read_csv(out / ends_of(run)))


def ends_of(run: dict) -> str:
    return "rates.csv" if run["run"] == "rate" else "held_out.csv"


def record(out: Path, run: dict, rows: list[dict], end: dict, pairs: int, before: float) -> None:
    """Add a run to the files; its end is written last, a run without it is made again.

    Args:
        run: `run`, `beta`, `rate` and `seed`, by which it is known.
        pairs: that were trained on.
        before: seconds that making them took.
    """
    out.mkdir(parents=True, exist_ok=True)
    if run["run"] != "rate":
        kept = [row for row in read_csv(out / "updates.csv") if not same_run(row, run)]
        write_csv(out / "updates.csv", kept + [run | row for row in rows])
    last = {name: value for name, value in rows[-1].items() if name != "step"}
    made = {"pairs": pairs, "pair_seconds": round(before, 1)}
    ends = read_csv(out / ends_of(run))
    write_csv(out / ends_of(run), [*ends, run | made | last | end])


def one_run(out: Path, name: str, beta: float, rate: float, seed: int, **options) -> None:
    """A run from the SFT adapter on the first pairs, unless it is recorded."""
    run = {"run": name, "beta": beta, "rate": rate, "seed": seed}
    if recorded(out, run):
        return
    roles, pairs = fresh_roles(), first_pairs()[0]
    if options.get("reference") == "base":
        roles.add("base", trainable=False)
    config = config_of(beta, rate, pairs)
    rows = trained(roles, pairs, seed, config, **options)
    if name == "dpo":
        roles.save("policy", policy_folder(beta, seed))
    record(out, run, rows, end_of(roles, seed), len(pairs), 0.0)
    write_about(out / "about.json", config)


def policy_folder(beta: float, seed: int) -> Path:
    return WORK / "dpo" / f"{beta:g}-{seed}"


def record_rates(out: Path, betas) -> None:
    wanted = [(beta, seed, rate) for beta in betas for seed in RATE_SEEDS for rate in RATES[beta]]
    for beta, seed, rate in tqdm(wanted, desc="rates"):
        one_run(out, "rate", beta, rate, seed)


def best_rate(out: Path, beta: float) -> float:
    """The rate of the highest mean gold at this β, on seeds that are none of the ten."""
    tried = defaultdict(list)
    for row in read_csv(out / "rates.csv"):
        if float(row["beta"]) == beta:
            tried[float(row["rate"])].append(float(row["gold"]))
    missing = sum(len(RATE_SEEDS) - len(tried[rate]) for rate in RATES[beta])
    if missing:
        raise ValueError(f"runs missing at beta {beta}: {missing}; record rates first")
    return max(RATES[beta], key=lambda rate: sum(tried[rate]))


def record_sft(out: Path, seeds: int) -> None:
    """What every run began from, in `reference.csv`."""
    if len(read_csv(out / "reference.csv")) < seeds:
        roles = fresh_roles()
        rows = [{"seed": seed} | end_of(roles, seed, "reference") for seed in range(seeds)]
        write_csv(out / "reference.csv", rows)


def study(out: Path, betas, seeds: int) -> None:
    record_sft(out, seeds)
    wanted = [(beta, seed) for seed in range(seeds) for beta in betas]
    for beta, seed in tqdm(wanted, desc="runs"):
        one_run(out, "dpo", beta, best_rate(out, beta), seed)


def wrong(out: Path, betas=WRONG_BETAS, seeds: int = 3) -> None:
    """The bare base as the reference: no role that the policy started from, so it must be asked."""
    options = {"reference": "base", "any_reference": True}
    wanted = [(beta, seed) for beta in betas for seed in range(seeds)]
    for beta, seed in tqdm(wanted, desc="wrong references"):
        one_run(out, "wrong_reference", beta, best_rate(out, beta), seed, **options)


# --- a second round -------------------------------------------------------------------------------


def rounds(out: Path, judges, seeds: int = 3) -> None:
    """From the policy of the study on, with SFT as the reference still, on pairs of three kinds."""
    rate = best_rate(out, MAIN_BETA)
    for seed in tqdm(range(seeds), desc="second rounds"):
        for judge in judges:
            run = {"run": f"second_{judge}", "beta": MAIN_BETA, "rate": rate, "seed": seed}
            if not recorded(out, run):
                second_round(out, run, judge)


def second_round(out: Path, run: dict, judge: str) -> None:
    seed, roles = run["seed"], fresh_roles()
    first = policy_folder(run["beta"], seed)
    if not first.is_dir():  # a study goes on elsewhere: the same run gives the same policy
        pairs = first_pairs()[0]
        trained(roles, pairs, seed, config_of(run["beta"], run["rate"], pairs))
        roles.save("policy", first)
    roles.load("policy", first, trainable=True)
    began = time.perf_counter()
    pairs = first_pairs()[0] if judge == "nobody" else own_pairs(roles, judge, seed)
    before = time.perf_counter() - began
    config = config_of(run["beta"], run["rate"], pairs)
    order = seed + 1000 if judge == "nobody" else seed  # the old pairs in another order
    rows = trained(roles, pairs, order, config, any_reference=True)
    record(out, run, rows, end_of(roles, seed), len(pairs), before)


def own_pairs(roles: Roles, judge: str, seed: int) -> list[dict]:
    """Pairs of the policy's own responses, made as in lesson 02, labelled by either judge.

    None to a prompt of the pairs that are held out.
    """
    tokenizer, prompts = load_tokenizer(load_preset("pocket")), world.prompts("train")
    model = roles.use("policy")
    rows = collect_preferences(model, tokenizer, prompts, Annotator(), seed=RATE_SEEDS[0] + seed)
    held_out = {tuple(pair["chosen"]["prompt"]) for pair in first_pairs()[1]}
    pairs = [pair for pair in encoded(rows) if tuple(pair["chosen"]["prompt"]) not in held_out]
    if judge == "annotator":
        return pairs
    scores = reward.pair_scores(roles, "reward", tokenizer, pairs)
    agree = (scores[0] >= scores[1]).tolist()
    return [
        pair if kept else dict(zip(SIDES, (pair["rejected"], pair["chosen"]), strict=True))
        for pair, kept in zip(pairs, agree, strict=True)
    ]


# --- minutes, and the exercise --------------------------------------------------------------------


def timing(out: Path, times: int = 1) -> None:
    """DPO, the reward model and PPO in turns, nothing measured on the way, in `timing.csv`.

    `cpu_seconds` are those of this process, whatever else the machine had to do.
    """
    tokenizer, pairs = load_tokenizer(load_preset("pocket")), first_pairs()[0]
    few, steps = pairs[:1], len(pairs) // DPOConfig.batch_size
    dpo_config = DPOConfig(steps=steps, eval_every=steps)
    reward_config = RewardConfig(eval_every=RewardConfig.steps)
    rows = read_csv(out / "timing.csv")
    for turn in range(len(rows) // 3, times):
        roles = fresh_roles()
        roles.add("judge", copy_of="reference")
        roles.add_head("judge")
        runs = {
            "dpo": dpo.train_dpo(roles, "policy", "reference", tokenizer, pairs, few, dpo_config),
            "reward": reward.train_reward_model(
                roles, "judge", tokenizer, pairs, few, reward_config
            ),
            "ppo": ppo.train_ppo(fresh_roles(), tokenizer, world.prompts("train")),
        }
        for method, run in runs.items():
            began, cpu = time.perf_counter(), time.process_time()
            list(tqdm(run, desc=method))
            taken = {
                "seconds": round(time.perf_counter() - began, 1),
                "cpu_seconds": round(time.process_time() - cpu, 1),
            }
            rows.append({"method": method, "turn": turn} | taken)
        write_csv(out / "timing.csv", rows)


def record_logs(study: Path, out: Path) -> None:
    """What three runs of the study measured on held-out pairs, under names that tell nothing."""
    out.mkdir(parents=True, exist_ok=True)
    names = {"A": "second_reward", "B": "wrong_reference", "C": "dpo"}
    for name, run in names.items():
        rows = [
            {k: v for k, v in row.items() if k not in ("run", "beta", "rate", "seed", "seconds")}
            for row in read_csv(study / "updates.csv")
            if same_run(row, {"run": run, "beta": MAIN_BETA, "seed": 0})
        ]
        write_csv(out / f"{name}.csv", rows)


KINDS = {
    "rates": lambda args: record_rates(args.out, args.betas),
    "study": lambda args: study(args.out, args.betas, args.seeds),
    "wrong": lambda args: wrong(args.out),
    "rounds": lambda args: rounds(args.out, args.judges),
    "timing": lambda args: timing(args.out),
    "logs": lambda args: record_logs(args.out, LOGS),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=list(KINDS), nargs="+")
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--judges", choices=JUDGES, nargs="+", default=JUDGES)
    parser.add_argument("--out", type=Path, default=STUDY, help="the package's assets if not given")
    args = parser.parse_args()
    for what in args.what:
        KINDS[what](args)


if __name__ == "__main__":
    main()
