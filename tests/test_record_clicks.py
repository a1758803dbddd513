"""The recorder of the study of lesson 06: its pieces, and that what is there is not made again."""

import json

import pytest
import record_clicks as rc

from rlhf_helpers.clicks import simulated
from rlhf_helpers.pocket.annotator import Annotator
from rlhf_helpers.presets import ASSETS

DUCK = "what does the duck say?"
RIGHT, WRONG, POLITE = "it says quack.", "it says moo.", "it says quack. you are very welcome!"


@pytest.fixture
def calls(monkeypatch):
    """Runs that cost nothing, noted."""
    made = []

    def one_run(name, seed, cache, out):
        made.append((name, seed))
        return {"asked": 62, "used": 60, "gold": 1.4, "example": 'it says "moo", twice.'}

    monkeypatch.setattr(rc, "one_run", one_run)
    return made


def keys(rows):
    return [(row["row"], int(row["seed"])) for row in rows]


def test_a_study_makes_one_row_after_the_other_for_all_its_seeds(tmp_path, calls):
    rc.study(tmp_path / "out", tmp_path / "cache", ["honest-60", "second-round-60"], seeds=4)
    wanted = [("honest-60", seed) for seed in range(4)]
    wanted += [("second-round-60", seed) for seed in range(3)]  # three at most
    assert calls == wanted
    rows = rc.read_csv(tmp_path / "out" / "after.csv")
    assert keys(rows) == wanted
    settings = {"clicks": "60", "pairs": "policy", "clicker": "honest", "replay": "0.5"}
    assert settings.items() <= rows[0].items() and rows[0]["example"] == 'it says "moo", twice.'
    about = json.loads((tmp_path / "out" / "about.json").read_text(encoding="utf-8"))
    assert (about["config"]["updates"], about["config"]["batch_size"]) == (rc.MENDING, 64)


def test_a_stopped_study_goes_on(tmp_path, calls):
    rc.study(tmp_path, tmp_path, ["honest-60", "sft-60"], seeds=2)
    rows = rc.read_csv(tmp_path / "after.csv")
    rc.write_csv(tmp_path / "after.csv", rows[:3])
    calls.clear()
    rc.study(tmp_path, tmp_path, ["honest-60", "sft-60"], seeds=3)
    assert calls == [("honest-60", 2), ("sft-60", 1), ("sft-60", 2)]


def test_the_rows_are_those_of_the_lesson_and_what_matters_most_comes_first():
    ten = [name for name, row in rc.ROWS.items() if row.seeds == 10]
    assert ten == [
        "honest-60", "sft-60", "honest-12", "honest-24", "honest-120", "careless-60", "biased-60",
        "careless-120",
    ]  # fmt: skip
    assert {name: row.seeds for name, row in rc.ROWS.items() if name not in ten} == {
        "no-replay-60": 3,
        "second-round-60": 3,
    }
    assert rc.ROWS["no-replay-60"].replay == 0 and rc.ROWS["sft-60"].pairs == "sft"


def test_the_clickers():
    honest, careless, biased = (rc.clicker_of(kind, 0) for kind in ("honest", "careless", "biased"))
    assert honest(DUCK, WRONG, RIGHT) == "second" and honest(DUCK, RIGHT, RIGHT) is None
    prompts = [p for p in rc.world.prompts("train") if p.startswith("what does the")]
    wrong = [careless(p, "it says moo.", "go away.") == "second" for p in prompts]
    assert 0.1 < sum(wrong) / len(wrong) < 0.35 and len(wrong) > 10
    more = "it says quack. you are very welcome! please ask me more!"
    assert honest(DUCK, more, POLITE) == "second"  # gold takes something off for a second courtesy
    assert Annotator().utility(DUCK, more) > Annotator().utility(DUCK, POLITE)
    assert sum(rc.clicker_of("biased", s)(DUCK, more, POLITE) == "first" for s in range(40)) > 20
    assert biased(DUCK, more, POLITE) in ("first", "second")


def test_pairs_are_asked_about_until_enough_are_decided():
    pairs = [(DUCK, RIGHT, "quack."), (DUCK, WRONG, RIGHT)] * 6  # the first: equal in gold
    rows, asked = rc.clicked(pairs, simulated(rc.gold), 4)
    assert (len(rows), asked) == (4, 8)
    assert set(rows["chosen"]) == {RIGHT} and set(rows["rejected"]) == {WRONG}
    with pytest.raises(ValueError, match="12 pairs are too few for 7 decided clicks"):
        rc.clicked(pairs, simulated(rc.gold), 7)


@pytest.mark.parametrize(("replay", "old_in_batch"), [(0.5, 8), (0.0, 0), (1.0, 16)])
def test_a_mixture_has_the_same_share_of_old_pairs_in_each_batch(replay, old_in_batch):
    new, old = [{"new": i} for i in range(12)], [{"old": i} for i in range(400)]
    rows = rc.mixed(new, old, replay, seed=0)
    assert len(rows) == rc.STEPS * rc.BATCH
    for start in range(0, len(rows), rc.BATCH):
        assert sum("old" in row for row in rows[start : start + rc.BATCH]) == old_in_batch
    counts = [sum(row == pair for row in rows) for pair in new]
    assert max(counts) - min(counts) <= 1  # all equally often
    assert rows == rc.mixed(new, old, replay, seed=0)


def test_a_pair_is_asked_of_other_prompts_with_each_seed():
    first, second = rc.asked_prompts(0), rc.asked_prompts(1)
    assert sorted(first) == sorted(second) and first[:20] != second[:20]
    assert first == rc.asked_prompts(0)
    # those of the clicks, of a second round too, and those of the replay are apart
    assert len(first) > 2 * 3 * 60 + rc.OLD_PROMPTS and len(first) > 3 * 120 + rc.OLD_PROMPTS


def test_agreement_is_the_share_ranked_as_gold_does(monkeypatch):
    values = {RIGHT: 1.0, WRONG: 2.0, POLITE: 3.0, "go away.": 0.0}

    def score_responses(roles, role, tokenizer, prompts, responses, *lengths):
        return rc.torch.tensor([values[text] for text in responses])

    monkeypatch.setattr(rc.reward, "score_responses", score_responses)
    first, second = [RIGHT, POLITE, "go away.", RIGHT], [WRONG, RIGHT, RIGHT, RIGHT]
    # wrong; right; right; equal in gold, so left out
    assert rc.agreement(None, [DUCK] * 4, first, second) == pytest.approx(2 / 3, abs=1e-4)


def test_the_hacked_policy_of_a_seed_is_made_once(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(rc, "fresh_roles", lambda: "roles")
    monkeypatch.setattr(
        rc,
        "train",
        lambda roles, seed, updates, folder: (
            made.append((seed, updates)) or folder.mkdir(exist_ok=True)
        ),
    )
    monkeypatch.setattr(
        rc, "measured", lambda roles, seed, role: {"gold": 1.0, "texts": [role, str(seed)]}
    )
    monkeypatch.setattr(rc, "answers", lambda roles, role, prompts, seed: ["again"])
    monkeypatch.setattr(rc, "agreements_of", lambda roles, texts: {"agreement": 0.9})
    first = rc.hacked(3, tmp_path, tmp_path)
    assert rc.hacked(3, tmp_path, tmp_path) == first
    assert first == {"SFT": ["reference", "3"], "hacked": ["policy", "3"], "SFT again": ["again"]}
    assert made == [(3, rc.HACKING)]
    rows = rc.read_csv(tmp_path / "before.csv")
    assert [(row["policy"], row["seed"]) for row in rows] == [("SFT", "3"), ("hacked", "3")]
    assert "texts" not in rows[0]
    (tmp_path / "hacked-3.json").unlink()  # as after a kill
    rc.hacked(3, tmp_path, tmp_path)
    assert rc.read_csv(tmp_path / "before.csv") == rows
    other = tmp_path / "other"  # the cache is there, the record is not
    other.mkdir()
    rc.hacked(3, tmp_path, other)
    assert rc.read_csv(other / "before.csv") == rows


def test_it_writes_where_the_lesson_reads():
    assert rc.STUDY == ASSETS / "clicks"
