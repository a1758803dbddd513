"""The recorder of a real run, on a tiny model: whole, stopped, and what it may not write."""

import json
import shutil

import pytest
import record_real
from record_ppo import read_csv
from test_text import tokenizer_with
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_helpers import ppo
from rlhf_helpers.presets import load_preset
from rlhf_helpers.text import PLAIN_TEMPLATE

SECRET = "zebra crossing"
STEPS = {"batch_size": 4, "steps": 3, "warmup_steps": 1, "eval_every": 3, "save_every": 1}


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tokenizer_with(PLAIN_TEMPLATE)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    data = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"prompt": f"what is a {SECRET} {i}?", "chosen": f"good {i}.", "rejected": f"bad {i}."}
        for i in range(60)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = {"batch_size": 4, "minibatch_size": 4, "updates": 2, "epochs": 1, "response_length": 8}
    return load_preset(
        "single_gpu", model=folder, data=data, device="cpu", sft=STEPS, reward=STEPS, ppo=run
    )


def numbers(folder):
    """All but what depends on the clock and on the machine."""
    rows = read_csv(folder / "numbers.csv")
    changing = ("minutes", "peak memory, GB")
    return {
        (row["stage"], row["number"]): (row["value"], row["low"], row["high"], row["n"])
        for row in rows
        if row["number"] not in changing
    }


def logs(folder):
    return [
        {k: v for k, v in row.items() if k != "seconds"} for row in read_csv(folder / "updates.csv")
    ]


@pytest.fixture(scope="module")
def whole(preset, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    record_real.record(preset, out, [0.0, 0.1], prompts=5)
    return out


def test_every_stage_has_its_numbers(whole):
    found = numbers(whole)
    assert {stage for stage, _ in found} == {
        "sft", "reward", "judge", "answers of SFT", "answers at beta 0.0", "answers at beta 0.1"
    }  # fmt: skip
    assert float(found["sft", "held-out loss"][0]) < float(found["sft", "held-out loss before"][0])
    share, low, high, n = map(float, found["reward", "held-out accuracy"])
    assert 0 <= low <= share <= high <= 1 and n == 6
    assert found["reward", "pairs"][0] == found["judge", "pairs"][0] == "27"
    assert float(found["answers of SFT", "KL"][0]) == 0
    assert found["answers at beta 0.1", "proxy"][3] == "5"
    assert [(row["beta"], row["update"]) for row in logs(whole)] == [
        ("0.0", "1"), ("0.0", "2"), ("0.1", "1"), ("0.1", "2")
    ]  # fmt: skip
    assert all(float(row["first_ratio"]) == 1 for row in logs(whole))
    for row in read_csv(whole / "numbers.csv"):
        assert row["number"] != "peak memory, GB" or 0.1 < float(row["value"]) < 100


def test_only_numbers_are_written(whole):
    for path in (whole / "numbers.csv", whole / "updates.csv", whole / "about.json"):
        assert SECRET not in path.read_text(encoding="utf-8")
    about = json.loads((whole / "about.json").read_text(encoding="utf-8"))
    assert "/" not in about["settings"]["model"] + about["settings"]["data"]


def test_what_is_done_is_not_done_again(preset, whole, monkeypatch):
    before = (whole / "numbers.csv").read_bytes(), (whole / "updates.csv").read_bytes()
    monkeypatch.setattr(record_real, "load_base", lambda *_: pytest.fail("nothing is left to do"))
    record_real.record(preset, whole, [0.0, 0.1], prompts=5)
    assert ((whole / "numbers.csv").read_bytes(), (whole / "updates.csv").read_bytes()) == before


@pytest.mark.parametrize("stage", ["train_sft", "train_reward_model", "train_ppo"])
def test_a_stopped_run_goes_on_to_the_same_numbers(preset, whole, tmp_path, monkeypatch, stage):
    out = tmp_path / "run"
    for done in ("sft", "reward", "judge") if stage == "train_ppo" else ():
        shutil.copytree(whole / done, out / done)
    if stage == "train_ppo":
        shutil.copy(whole / "numbers.csv", out)
        rows = [r for r in read_csv(out / "numbers.csv") if not r["stage"].startswith("answers at")]
        record_real.write_csv(out / "numbers.csv", rows)
    where = ppo if stage == "train_ppo" else record_real
    train = getattr(where, stage)

    def stopped(*args, **kwargs):
        run = train(*args, **kwargs)
        yield next(run)
        if stage != "train_ppo":
            yield next(run)
        run.close()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(where, stage, stopped)
        with pytest.raises(KeyboardInterrupt):
            record_real.record(preset, out, [0.0, 0.1], prompts=5)
    record_real.record(preset, out, [0.0, 0.1], prompts=5)
    assert numbers(out) == numbers(whole)
    assert logs(out) == logs(whole)
