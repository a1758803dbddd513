"""Whole folders, whole steps, Adam's state."""

import os
import shutil
import signal
import threading

import pytest
import torch

from rlhf_helpers import checkpoints
from rlhf_helpers.checkpoints import (
    adam_state,
    find_adapter,
    finish_first,
    restore_adam,
    whole_folder,
)
from rlhf_helpers.presets import load_preset


def write(folder, **files):
    with whole_folder(folder) as new:
        for name, text in files.items():
            (new / name).write_text(text, encoding="utf-8")


def read(folder):
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- whole_folder --------------------------------------------------------------------------


def test_a_folder_appears_when_all_is_written(tmp_path):
    target = tmp_path / "deep" / "adapter"
    with whole_folder(target) as new:
        (new / "a").write_text("1", encoding="utf-8")
        assert not target.exists()
    assert read(target) == {"a": "1"}
    assert names(target.parent) == ["adapter"]


def test_a_second_write_replaces_the_whole_folder(tmp_path):
    target = tmp_path / "adapter"
    write(target, a="1", b="1")
    with whole_folder(target) as new:
        (new / "a").write_text("2", encoding="utf-8")
        assert read(target) == {"a": "1", "b": "1"}
    assert read(target) == {"a": "2"}
    assert names(tmp_path) == ["adapter"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_folder(tmp_path, error):
    target = tmp_path / "adapter"
    write(target, a="1", b="1")
    with pytest.raises(error), whole_folder(target) as new:
        (new / "a").write_text("2", encoding="utf-8")
        raise error
    assert read(target) == {"a": "1", "b": "1"}
    write(target, b="3")
    assert read(target) == {"b": "3"}
    assert names(tmp_path) == ["adapter"]


def test_an_interrupted_first_write_leaves_no_folder(tmp_path):
    with pytest.raises(OSError), whole_folder(tmp_path / "adapter") as new:
        (new / "a").write_text("1", encoding="utf-8")
        raise OSError
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("left", [[".part"], [".old"], [".part", ".old"]])
@pytest.mark.parametrize("existing", [True, False])
def test_what_a_kill_left_behind_does_no_harm(tmp_path, left, existing):
    target = tmp_path / "adapter"
    if existing:
        write(target, a="1")
    for end in left:
        (tmp_path / f"adapter{end}").mkdir()
        (tmp_path / f"adapter{end}" / "stale").write_text("0", encoding="utf-8")
    write(target, a="2")
    assert read(target) == {"a": "2"}
    assert names(tmp_path) == ["adapter"]


def test_at_any_rename_one_folder_is_whole(tmp_path, monkeypatch):
    """Stop before each rename and each removal in turn: the old or the new is there, complete."""
    real = {"replace": os.replace, "rmtree": shutil.rmtree}
    seen = set()
    for stop in range(6):
        target = tmp_path / str(stop) / "adapter"
        write(target, a="old", b="old")
        calls = []

        def guarded(name, calls=calls, stop=stop):
            def call(*arguments, **options):
                if len(calls) == stop:
                    raise SystemExit
                calls.append(name)
                return real[name](*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", guarded("replace"))
            patch.setattr(shutil, "rmtree", guarded("rmtree"))
            try:
                write(target, a="new", b="new")
            except SystemExit:
                seen.add(stop)
        kept = target if target.exists() else target.with_name("adapter.old")
        assert len(set(read(kept).values())) == 1 and names(kept) == ["a", "b"]
        write(target, a="next")
        assert read(target) == {"a": "next"} and names(target.parent) == ["adapter"]
    assert seen == {0, 1, 2, 3, 4}  # remove .part, remove .old, rename, rename, remove .old


# --- finish_first --------------------------------------------------------------------------


def press():
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_waits_for_the_end_of_the_block():
    before = signal.getsignal(signal.SIGINT)
    done = []
    with pytest.raises(KeyboardInterrupt):
        with finish_first():
            press()
            press()
            done.append("block")
        done.append("after")
    assert done == ["block"]
    assert signal.getsignal(signal.SIGINT) is before


def test_without_ctrl_c_nothing_happens():
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(1))
    try:
        mine = signal.getsignal(signal.SIGINT)
        with finish_first():
            assert signal.getsignal(signal.SIGINT) is not mine
        assert signal.getsignal(signal.SIGINT) is mine
        press()
        assert pressed == [1]
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("pressed", [False, True])
def test_an_error_in_the_block_comes_out(pressed):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), finish_first():
        if pressed:
            press()
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before


def test_in_a_thread_it_does_nothing():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work():
        with finish_first():
            seen.append(signal.getsignal(signal.SIGINT))
        seen.append("done")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, "done"]


# --- find_adapter --------------------------------------------------------------------------


@pytest.fixture
def shelves(tmp_path, monkeypatch):
    """A preset with its own `runs`, and a place for shipped adapters."""
    monkeypatch.setattr(checkpoints, "ASSETS", tmp_path / "assets")
    preset = load_preset("pocket", runs=tmp_path / "runs")
    return preset, tmp_path / "runs" / "pocket" / "sft", tmp_path / "assets" / "sft"


def put(folder):
    write(folder, **{"adapter_config.json": "{}", "adapter_model.safetensors": ""})


def test_the_learners_own_adapter_comes_first(shelves, capsys):
    preset, own, shipped = shelves
    put(shipped)
    assert find_adapter(preset, "sft") == shipped
    assert capsys.readouterr().out == "adapter 'sft': the reference that the course ships\n"
    put(own)
    assert find_adapter(preset, "sft") == own
    assert capsys.readouterr().out == f"adapter 'sft': your own, from {own}\n"


def test_no_adapter_names_the_lesson(shelves):
    preset, own, shipped = shelves
    with pytest.raises(FileNotFoundError, match=r"no adapter 'sft' .*lesson 01 for sft") as caught:
        find_adapter(preset, "sft")
    assert str(own) in str(caught.value)
    put(shipped.with_name("reward"))
    with pytest.raises(FileNotFoundError, match="no adapter 'sft'"):
        find_adapter(preset, "sft")


def test_what_an_interrupted_run_left_is_not_taken_for_an_adapter(shelves):
    preset, own, shipped = shelves
    put(shipped)
    put(own.with_name("sft.unfinished"))
    put(own.with_name("sft.part"))
    own.mkdir()
    (own / "notes.txt").write_text("mine", encoding="utf-8")
    assert find_adapter(preset, "sft") == shipped


def test_shipped_adapters_are_the_pocket_bases_alone(shelves):
    _, _, shipped = shelves
    put(shipped)
    other = load_preset("single_gpu", runs=shipped.parent.parent / "runs")
    with pytest.raises(FileNotFoundError, match="of preset 'single_gpu'"):
        find_adapter(other, "sft")
    put(other.runs / "single_gpu" / "sft")
    assert find_adapter(other, "sft") == other.runs / "single_gpu" / "sft"


# --- Adam's state --------------------------------------------------------------------------


def parameters():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(3, 4, generator=generator)) for name in ("a", "b")}


def take(weights, optimizer, steps, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        sum(((p - step) ** 2 * (i + 1)).sum() for i, p in enumerate(weights.values())).backward()
        optimizer.step()


def adam(weights):
    return torch.optim.AdamW(weights.values(), lr=0.1, weight_decay=0.01)


def test_a_restored_optimizer_goes_on_as_if_never_stopped():
    straight, stopped = parameters(), parameters()
    one, two = adam(straight), adam(stopped)
    take(straight, one, 8)
    take(stopped, two, 3)
    tensors = {key: tensor.clone() for key, tensor in adam_state(stopped, two).items()}
    assert sorted(tensors) == ["exp_avg/a", "exp_avg/b", "exp_avg_sq/a", "exp_avg_sq/b"]
    resumed = {name: torch.nn.Parameter(p.detach().clone()) for name, p in stopped.items()}
    three = adam(resumed)
    restore_adam(resumed, three, tensors, step=3)
    take(resumed, three, 5, first=3)
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    take(stopped, two, 5, first=3)  # and the first goes on undisturbed
    assert all(torch.equal(stopped[name], straight[name]) for name in straight)


def test_moments_are_saved_by_name_and_put_back_by_name():
    weights = parameters()
    optimizer = adam(weights)
    take(weights, optimizer, 2)
    tensors = {key: tensor.clone() for key, tensor in adam_state(weights, optimizer).items()}
    backwards = dict(reversed(weights.items()))
    other = adam(backwards)
    restore_adam(backwards, other, tensors, step=2)
    again = adam_state(weights, other)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    assert all(other.state[p]["step"].item() == 2 for p in weights.values())


def test_an_optimizer_that_never_stepped_has_no_state():
    weights = parameters()
    assert adam_state(weights, adam(weights)) == {}
