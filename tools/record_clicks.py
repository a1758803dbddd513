"""Record the study of lesson 06: a hacked policy, some clicks, and what PPO makes of them.

    python tools/record_clicks.py                     # all rows; ten seeds, or as many as a row has
    python tools/record_clicks.py --rows honest-60    # one row

For each seed a policy is hacked once, by twelve updates of PPO at β = 0.01 against the shipped
reward model; policy and answers are kept in `runs/clicks`. Each row then has its pairs, its clicker
and its number of clicks; the reward model is trained on with them and a replay of old pairs, and
PPO begins again from SFT, at the same β and seed. Rows that are in the file are not made again.

Simplifications: a click compares texts, so that an answer that was cut off counts as ended, in the
clicker's eyes and in the reward model's training; and every row has as many *decided* clicks as it
says: where the clicker cannot tell, another pair is asked about (`asked` counts both).
"""

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import record_ppo
import torch
from datasets import Dataset
from record_ppo import fresh_roles, judged, on_held_out, read_csv, write_about, write_csv
from tqdm.auto import tqdm

from rlhf_helpers import ppo, reward
from rlhf_helpers.checkpoints import whole_folder
from rlhf_helpers.clicks import Clicker, Clicks, simulated
from rlhf_helpers.pocket import rubric, world
from rlhf_helpers.pocket.annotator import Annotator
from rlhf_helpers.pocket.preferences import collect_preferences
from rlhf_helpers.ppo import PPOConfig
from rlhf_helpers.presets import ASSETS, load_preset
from rlhf_helpers.roles import Roles
from rlhf_helpers.rollout import sample_responses
from rlhf_helpers.text import load_tokenizer

STUDY = ASSETS / "clicks"
CACHE = Path(__file__).parents[1] / "runs" / "clicks"
BETA, HACKING, MENDING = 0.01, 12, 15  # price of a nat; updates before and after the clicks
STEPS, BATCH, RATE = 40, 16, 3e-4  # of the reward model
LENGTHS = 32, 64  # tokens of a prompt and an answer in a pair
OLD_PROMPTS = 120  # whose pairs are replayed


@dataclass(frozen=True)
class Row:
    """One row of the study: who clicks how often on what.

    Args:
        clicks: decided ones.
        pairs: "policy": one answer of the hacked policy, one of SFT; "sft": both of SFT.
        clicker: "honest", "biased" as the annotator of lesson 02, or "careless": one in five wrong.
        replay: share of old pairs in what the reward model is trained on.
        seeds: at most so many.
    """

    clicks: int = 60
    pairs: str = "policy"
    clicker: str = "honest"
    replay: float = 0.5
    seeds: int = 10


ROWS = {
    "honest-60": Row(),
    "sft-60": Row(pairs="sft"),
    "honest-12": Row(12),
    "honest-24": Row(24),
    "honest-120": Row(120),
    "careless-60": Row(clicker="careless"),
    "biased-60": Row(clicker="biased"),
    "no-replay-60": Row(replay=0.0, seeds=3),
    "second-round-60": Row(seeds=3),  # after honest-60, on the policy that it has mended
    "careless-120": Row(120, clicker="careless"),
}


def gold(prompt: str, answer: str) -> float:
    """Points of an answer's text."""
    return rubric.gold_reward(prompt, answer).total


def clicker_of(kind: str, seed: int) -> Clicker:
    if kind == "biased":
        return simulated(Annotator().utility, Annotator().temperature, seed=seed)
    return simulated(gold, wrong={"honest": 0.0, "careless": 0.2}[kind], seed=seed)


# --- the pieces of a run --------------------------------------------------------------------------


def train(roles: Roles, seed: int, updates: int, folder: Path | None = None) -> list[ppo.PPOStats]:
    """PPO from the roles that are there, at the one β of the study."""
    config = PPOConfig(updates=updates, beta=BETA, seed=seed)
    return list(ppo.train_ppo(roles, tokenizer(), world.prompts("train"), config, folder))


def tokenizer():
    return load_tokenizer(load_preset("pocket"))


def measured(roles: Roles, seed: int, role: str) -> dict:
    """How a role does on the held-out prompts: `record_ppo.judged`, and the share that ends."""
    experience = on_held_out(roles, PPOConfig(beta=BETA, seed=seed), role)
    finished = round(experience.rollout.finished.float().mean().item(), 4)
    texts = experience.rollout.texts
    return judged(experience) | {"finished": finished, "example": texts[0], "texts": texts}


def asked_prompts(seed: int) -> list[str]:
    """The training prompts in the order in which pairs are made of them."""
    return random.Random(f"clicks-{seed}").sample(prompts := world.prompts("train"), len(prompts))


def answers(roles: Roles, role: str, prompts: list[str], seed: int) -> list[str]:
    return sample_responses(roles.use(role), tokenizer(), prompts, seed=seed).texts


def clicked(pairs: list[tuple], clicker: Clicker, count: int) -> tuple[Dataset, int]:
    """Choices on the first pairs, until so many are decided; and how many were asked."""
    clicks = Clicks(pairs, repeats=0)
    while sum(row["side"] is not None for row in clicks.rows) < count:
        if clicks.show_next() is None:
            raise ValueError(f"{len(pairs)} pairs are too few for {count} decided clicks")
        clicks.click_through(clicker, limit=1)
    return clicks.preferences(), len(clicks.rows)


def mixed(new: list[dict], old: list[dict], replay: float, seed: int) -> list[dict]:
    """Pairs for all steps: each batch has the same share of old ones, the new ones come again."""
    rng, rows = random.Random(f"mix-{seed}"), []
    old_in_batch = round(replay * BATCH)
    sources = [_again_and_again(new, rng), _again_and_again(old, rng)]
    for _ in range(STEPS):
        counts = (BATCH - old_in_batch, old_in_batch)
        rows += [next(of) for of, n in zip(sources, counts, strict=True) for _ in range(n)]
    return rows


def _again_and_again(pairs: list[dict], rng: random.Random) -> Iterator[dict]:
    """All pairs in random order, then all again in another."""
    while True:
        yield from rng.sample(pairs, len(pairs))


def mend(
    start: Path,
    new: Dataset,
    old: Dataset,
    earlier: list[dict],
    replay: float,
    seed: int,
    folder: Path,
) -> None:
    """Train a reward model on, normalise it again on SFT's answers, those of the old pairs.

    Args:
        old: SFT's answers, as people have judged them.
        earlier: clicked pairs of the round before, replayed as well.
    """
    roles = Roles(record_ppo.load_base(load_preset("pocket")))
    roles.load("reward", start, trainable=True)
    before = [Dataset.from_list(earlier)] if earlier else []
    pairs, of_sft, *clicked_before = (
        reward.encode_pairs(tokenizer(), rows, *LENGTHS) for rows in (new, old, *before)
    )
    config = reward.RewardConfig(
        steps=STEPS, batch_size=BATCH, learning_rate=RATE, eval_every=STEPS
    )
    mixture = mixed(pairs, sum(clicked_before, of_sft), replay, seed)
    list(reward.train_reward_model(roles, "reward", tokenizer(), mixture, pairs, config))
    scores = torch.cat(reward.pair_scores(roles, "reward", tokenizer(), of_sft))
    reward.normalise(roles, "reward", scores)
    roles.save("reward", folder)


def agreement(roles: Roles, prompts: list[str], first: list[str], second: list[str]) -> float:
    """Share of pairs of answers, of different gold, that the reward model ranks as gold does."""
    pairs = [
        (p, *sorted((a, b), key=lambda answer: gold(p, answer)))
        for p, a, b in zip(prompts, first, second, strict=True)
        if a and b and gold(p, a) != gold(p, b)
    ]
    asked, worse, better = map(list, zip(*pairs, strict=True))
    scores = [
        reward.score_responses(roles, "reward", tokenizer(), asked, side, *LENGTHS)
        for side in (better, worse)
    ]
    return round(reward.pair_accuracy(*scores), 4)


# --- a seed, and a row of it ----------------------------------------------------------------------


def hacked(seed: int, cache: Path, out: Path) -> dict:
    """The hacked policy of a seed and what is measured of it and of SFT: made once, then read.

    `before.csv` gets two rows of the seed, SFT and the hacked policy; the cache the policy, the
    pairs to replay and the answers to held-out prompts.
    """
    folder, known = cache / f"hacked-{seed}", cache / f"hacked-{seed}.json"
    written = any(row["seed"] == str(seed) for row in read_csv(out / "before.csv"))
    if written and known.is_file() and folder.is_dir():
        return json.loads(known.read_text(encoding="utf-8"))
    begun, roles = time.perf_counter(), fresh_roles()
    train(roles, seed, HACKING, folder)
    seconds = round(time.perf_counter() - begun, 1)
    held_out = world.prompts("held_out")
    rows = {
        name: measured(roles, seed, role)
        for name, role in (("SFT", "reference"), ("hacked", "policy"))
    }
    texts = {name: row.pop("texts") for name, row in rows.items()}
    texts["SFT again"] = answers(roles, "reference", held_out, seed + 1000)
    agreements = agreements_of(roles, texts)
    kept = [row for row in read_csv(out / "before.csv") if row["seed"] != str(seed)]
    lines = [
        {"policy": name, "seed": seed, **row, **agreements, "seconds": seconds}
        for name, row in rows.items()
    ]
    write_csv(out / "before.csv", kept + lines)
    _write_json(known, texts)
    return texts


def agreements_of(roles: Roles, texts: dict[str, list[str]]) -> dict[str, float]:
    """With gold on held-out prompts: of two answers of SFT; of SFT's and the hacked policy's."""
    prompts = world.prompts("held_out")
    return {
        "agreement": agreement(roles, prompts, texts["SFT"], texts["SFT again"]),
        "agreement_hacked": agreement(roles, prompts, texts["SFT"], texts["hacked"]),
    }


def _write_json(path: Path, content: object) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content), encoding="utf-8")
    os.replace(part, path)


def one_run(name: str, seed: int, cache: Path, out: Path) -> dict:
    """A row of one seed: clicks, reward model, PPO, held-out prompts."""
    row, again, texts = ROWS[name], name.startswith("second"), hacked(seed, cache, out)
    begun = time.perf_counter()
    first = cache / f"honest-60-{seed}"
    if again and not first.is_dir():
        one_run("honest-60", seed, cache, out)
    start = first / "reward" if again else ASSETS / "reward"
    roles = fresh_roles(start)
    roles.load("policy_now", first / "policy" if again else cache / f"hacked-{seed}")
    prompts = asked_prompts(seed)
    skip = 3 * ROWS["honest-60"].clicks if again else 0  # the prompts of the first round
    prompts = prompts[skip : skip + 3 * row.clicks]
    other = "reference" if row.pairs == "sft" else "policy_now"
    sides = answers(roles, "reference", prompts, seed + 1), answers(roles, other, prompts, seed + 2)
    new, asked = clicked(
        list(zip(prompts, *sides, strict=True)), clicker_of(row.clicker, seed), row.clicks
    )
    old = collect_preferences(
        roles.use("reference"),
        tokenizer(),
        asked_prompts(seed)[-OLD_PROMPTS:],
        Annotator(),
        seed=seed,
        cache=cache,
    ).select_columns(["prompt", "chosen", "rejected"])
    with whole_folder(cache / f"{name}-{seed}") as folder:
        earlier = _read(first)["pairs"] if again else []
        mend(start, new, old, earlier, row.replay, seed, folder / "reward")
        mended = fresh_roles(folder / "reward")
        train(mended, seed, MENDING, folder / "policy")
        seconds = round(time.perf_counter() - begun, 1)
        _write_json(folder / "clicks.json", {"asked": asked, "pairs": list(new)})
    end = measured(mended, seed, "policy")
    end.pop("texts")
    counts = {"asked": asked, "used": len(new)}
    return {**counts, **end, **agreements_of(mended, texts), "seconds": seconds}


def _read(folder: Path) -> dict:
    return json.loads((folder / "clicks.json").read_text(encoding="utf-8"))


def study(out: Path, cache: Path, names: list[str], seeds: int) -> None:
    """All rows that are wanted and not there: in the order of the rows, each for all its seeds."""
    for folder in (out, cache):
        folder.mkdir(parents=True, exist_ok=True)
    path = out / "after.csv"
    rows = read_csv(path)
    made = {(row["row"], int(row["seed"])) for row in rows}
    wanted = [(name, seed) for name in names for seed in range(min(seeds, ROWS[name].seeds))]
    for name, seed in tqdm([run for run in wanted if run not in made], desc="runs"):
        settings = {k: v for k, v in asdict(ROWS[name]).items() if k != "seeds"}
        rows.append({"row": name, "seed": seed, **settings, **one_run(name, seed, cache, out)})
        write_csv(path, rows)
        write_about(out / "about.json", PPOConfig(updates=MENDING, beta=BETA))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=STUDY)
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="of policies, reward models, pairs"
    )
    args = parser.parse_args()
    study(args.out, args.cache, args.rows, args.seeds)


if __name__ == "__main__":
    main()
