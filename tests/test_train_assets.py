"""Pretraining: repeatable, and resumable to the same weights."""

import pytest
import torch
import train_assets
from safetensors.torch import load_file

from rlhf_helpers.pocket import corpus


@pytest.fixture(scope="module")
def new_tokenizer():
    return train_assets.train_tokenizer(corpus.documents("tokenizer", 2000))


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(train_assets, "WARMUP", 1)
    monkeypatch.setattr(train_assets, "SAVE_EVERY", 2)
    monkeypatch.setattr(train_assets, "ROWS", 2)


def test_an_interrupted_run_ends_in_the_same_weights(tmp_path, monkeypatch, short, new_tokenizer):
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole, _ = train_assets.pretrain(new_tokenizer, tmp_path / "whole", steps=5)

    real_batch = train_assets.batch

    def stopping_batch(tokenizer, name, rows):
        if name.endswith("-3"):
            raise KeyboardInterrupt
        return real_batch(tokenizer, name, rows)

    monkeypatch.setattr(train_assets, "batch", stopping_batch)
    with pytest.raises(KeyboardInterrupt):
        train_assets.pretrain(new_tokenizer, tmp_path / "cut", steps=5)
    monkeypatch.setattr(train_assets, "batch", real_batch)
    resumed, _ = train_assets.pretrain(new_tokenizer, tmp_path / "cut", steps=5)
    first = train_assets.new_model(new_tokenizer)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    assert not torch.equal(whole.lm_head.weight, first.lm_head.weight)
    assert not list(tmp_path.rglob("*.part"))


def test_a_state_of_another_run_is_refused(tmp_path, short, new_tokenizer):
    train_assets.pretrain(new_tokenizer, tmp_path, steps=2)
    with pytest.raises(ValueError, match="is of a run of other length"):
        train_assets.pretrain(new_tokenizer, tmp_path, steps=3)
    with pytest.raises(ValueError, match="steps is 1; give more than the 1 of the warm-up"):
        train_assets.pretrain(new_tokenizer, tmp_path / "new", steps=1)


def test_rows_start_with_a_document_and_repeat(new_tokenizer):
    rows = train_assets.batch(new_tokenizer, "name", 4)
    assert rows.shape == (4, train_assets.CONTEXT)
    assert torch.equal(rows, train_assets.batch(new_tokenizer, "name", 4))
    assert not torch.equal(rows, train_assets.batch(new_tokenizer, "other", 4))
    first = corpus.documents("name", 40)[0]
    assert new_tokenizer.decode(rows[0]).startswith(
        new_tokenizer.decode(new_tokenizer(first)["input_ids"])
    )


def test_the_learning_rate_rises_and_falls_to_zero():
    rates = [train_assets.learning_rate(step, 1000) for step in range(1001)]
    assert max(rates) == pytest.approx(train_assets.PEAK_LR, rel=0.01)
    assert rates.index(max(rates)) == pytest.approx(train_assets.WARMUP, abs=1)
    assert rates[-1] == 0.0


def test_saving_replaces_the_file_as_a_whole(tmp_path):
    path = tmp_path / "state.safetensors"
    train_assets.save_atomically({"a": torch.zeros(2)}, path, {"step": "1"})
    train_assets.save_atomically({"a": torch.ones(2)}, path, {"step": "2"})
    assert load_file(path)["a"].tolist() == [1.0, 1.0]
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_the_shipped_tokenizer_is_what_the_script_makes(tokenizer):
    """It changes with the world's text; if this fails, the base model must be trained again."""
    made = train_assets.train_tokenizer(corpus.documents("tokenizer", 30_000))
    assert made.get_vocab() == tokenizer.get_vocab()
    assert made.chat_template == tokenizer.chat_template
