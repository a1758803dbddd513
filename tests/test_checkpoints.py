"""Whole folders, whole steps, Adam's state."""

import os
import shutil
import signal
import threading

import pytest
import torch
from safetensors import SafetensorError

from rlhf_helpers import checkpoints
from rlhf_helpers.checkpoints import (
    find_adapter,
    finish_first,
    keep_two,
    newest_readable,
    optimizer_tensors,
    restore_optimizers,
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


def test_an_exercise_takes_what_the_lessons_have_trained(tmp_path, monkeypatch):
    (tmp_path / "exercises").mkdir()
    monkeypatch.chdir(tmp_path / "exercises")
    put(tmp_path / "notebooks" / "runs" / "single_gpu" / "sft")
    preset = load_preset("single_gpu", device="cpu")
    assert find_adapter(preset, "sft") == preset.runs.parent / "../notebooks/runs/single_gpu/sft"
    put(tmp_path / "exercises" / "runs" / "single_gpu" / "sft")
    assert find_adapter(preset, "sft") == preset.runs / "single_gpu" / "sft"


def test_no_adapter_names_the_lesson(shelves):
    preset, own, shipped = shelves
    with pytest.raises(FileNotFoundError, match=r"no adapter 'sft' .*01 for sft") as caught:
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
    tensors = {k: t.clone() for k, t in optimizer_tensors({"policy": two}).items()}
    entries = ("exp_avg", "exp_avg_sq", "step")
    assert sorted(tensors) == [f"policy/{i}/{entry}" for i in (0, 1) for entry in entries]
    resumed = {name: torch.nn.Parameter(p.detach().clone()) for name, p in stopped.items()}
    three = adam(resumed)
    restore_optimizers({"policy": three}, tensors)
    take(resumed, three, 5, first=3)
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    take(stopped, two, 5, first=3)  # and the first goes on undisturbed
    assert all(torch.equal(stopped[name], straight[name]) for name in straight)


def test_each_optimizer_gets_its_own_state_and_keeps_its_settings():
    weights, others = parameters(), parameters()
    optimizers = {"policy": adam(weights), "value": adam(others)}
    take(weights, optimizers["policy"], 2)
    take(others, optimizers["value"], 3)
    tensors = {k: t.clone() for k, t in optimizer_tensors(optimizers).items()}
    again = {"policy": adam(weights), "value": adam(others)}
    restore_optimizers(again, tensors)
    found = optimizer_tensors(again)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    steps = [again[n].state[p]["step"].item() for n, w in (("policy", weights), ("value", others))
             for p in w.values()]  # fmt: skip
    assert steps == [2, 2, 3, 3]
    assert again["policy"].param_groups[0]["lr"] == 0.1


def test_an_optimizer_that_never_stepped_has_no_state():
    assert optimizer_tensors({"policy": adam(parameters())}) == {}


# --- keep_two and newest_readable ----------------------------------------------------------


def writer(text, *errors):
    def put(folder):
        (folder / "a").write_text(text, encoding="utf-8")
        for error in errors:
            raise error
        (folder / "b").write_text(text, encoding="utf-8")

    return put


def keep(folder, *numbers):
    for number in numbers:
        keep_two(folder, number, writer(str(number)))


def reader(*damaged, error=OSError):
    """Reads a save; of the damaged ones it raises."""

    def get(folder):
        if folder.name in damaged:
            raise error(f"{folder.name} is damaged")
        return read(folder)

    return get


def test_the_two_newest_saves_are_kept(tmp_path):
    folder = tmp_path / "deep" / "run"
    kept = []
    for number in (1, 2, 4, 9, 10, 99999):
        keep(folder, number)
        kept.append([int(name.removeprefix("update-")) for name in names(folder)])
    assert kept == [[1], [1, 2], [2, 4], [4, 9], [9, 10], [10, 99999]]
    assert names(folder) == ["update-00010", "update-99999"]
    assert read(folder / "update-99999") == {"a": "99999", "b": "99999"}


def test_a_save_is_there_when_all_is_written_and_the_old_ones_until_then(tmp_path):
    keep(tmp_path, 1, 2)

    def look(folder):
        writer("3")(folder)
        assert names(tmp_path) == ["update-00001", "update-00002", "update-00003.part"]

    keep_two(tmp_path, 3, look)
    assert names(tmp_path) == ["update-00002", "update-00003"]


def test_a_save_that_is_made_again_replaces_the_first(tmp_path):
    keep(tmp_path, 1, 2)
    keep_two(tmp_path, 2, writer("again"))
    assert names(tmp_path) == ["update-00001", "update-00002"]
    assert read(tmp_path / "update-00002") == {"a": "again", "b": "again"}


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error, os error 28")]
)
def test_a_save_that_fails_warns_and_keeps_the_earlier_ones(tmp_path, error):
    folder = tmp_path / "run"
    failing = writer("x", error)
    text = str(error).replace("[", r"\[").replace("]", r"\]")
    message = (
        rf"update 1 could not be saved in '{folder}' \({text}\); the newest save is none; make"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        keep_two(folder, 1, failing)
    assert caught[0].filename == __file__
    assert names(folder) == []
    keep(folder, 2, 3)
    with pytest.warns(UserWarning, match="the newest save is update-00003; make room, the run"):
        keep_two(folder, 4, failing)
    assert names(folder) == ["update-00002", "update-00003"]
    assert read(folder / "update-00003") == {"a": "3", "b": "3"}
    keep(folder, 5)
    assert names(folder) == ["update-00003", "update-00005"]


def test_a_save_that_is_made_again_and_fails_leaves_the_first(tmp_path):
    keep(tmp_path, 1, 2)
    with pytest.warns(UserWarning, match="the newest save is update-00002"):
        keep_two(tmp_path, 2, writer("x", OSError()))
    assert read(tmp_path / "update-00002") == {"a": "2", "b": "2"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_other_errors_in_a_save_come_out(tmp_path, error):
    keep(tmp_path, 1)
    with pytest.raises(error):
        keep_two(tmp_path, 2, writer("x", error))
    assert newest_readable(tmp_path, read) == (tmp_path / "update-00001", {"a": "1", "b": "1"})
    keep(tmp_path, 2, 3)
    assert names(tmp_path) == ["update-00002", "update-00003"]


def test_the_newest_save_is_read(tmp_path, capsys):
    assert newest_readable(tmp_path / "none", read) is None
    assert newest_readable(tmp_path, read) is None
    keep(tmp_path, 9, 10)
    assert newest_readable(tmp_path, read) == (tmp_path / "update-00010", {"a": "10", "b": "10"})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("left", ["update-00011.part", "update-00011.old", "notes.txt", "update-1"])
def test_what_is_no_save_is_not_read(tmp_path, left):
    keep(tmp_path, 9, 10)
    (tmp_path / left).mkdir()
    assert newest_readable(tmp_path, read)[0].name == "update-00010"
    keep(tmp_path, 11)
    assert newest_readable(tmp_path, read)[0].name == "update-00011"


@pytest.mark.parametrize("error", [OSError, FileNotFoundError, SafetensorError, ValueError])
def test_a_save_that_cannot_be_read_is_passed_over_and_named(tmp_path, capsys, error):
    keep(tmp_path, 1, 2)
    found = newest_readable(tmp_path, reader("update-00002", error=error))
    assert found == (tmp_path / "update-00001", {"a": "1", "b": "1"})
    assert capsys.readouterr().out == (
        f"'{tmp_path / 'update-00002'}' cannot be read (update-00002 is damaged); going on from "
        "the save before it\n"
    )
    assert names(tmp_path) == ["update-00001", "update-00002"]


def test_if_no_save_can_be_read_the_run_is_not_begun_anew_unasked(tmp_path):
    keep(tmp_path, 1, 2)
    message = f"no save in '{tmp_path}' can be read; delete the folder to begin anew"
    with pytest.raises(ValueError, match=message):
        newest_readable(tmp_path, reader("update-00001", "update-00002"))
    assert names(tmp_path) == ["update-00001", "update-00002"]


def test_other_errors_of_the_reader_come_out(tmp_path):
    keep(tmp_path, 1, 2)
    with pytest.raises(ZeroDivisionError, match="update-00002 is damaged"):
        newest_readable(tmp_path, reader("update-00002", error=ZeroDivisionError))
