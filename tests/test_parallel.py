"""Several processes compute what one does: losses, gradients, weights; and how they end.

What needs two ranks and the package's imports is done in one go, by torchrun, in `helpers_ranks`.
"""

import doctest
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import helpers_ranks as work
import helpers_spawn as small
import pytest
import torch
from helpers_ranks import CONFIG, ENGINES, LOOPS, UPDATES, WORLD, tiny_of
from test_train_ppo import new_roles, save_talker

from rlhf_helpers import memory, parallel, ranks
from rlhf_helpers.logprobs import token_logprobs
from rlhf_helpers.losses import whiten
from rlhf_helpers.memory import ModelSizes, parallel_table
from rlhf_helpers.ranks import join, spawn
from rlhf_helpers.rollout import Rollout

HERE = Path(__file__).parent
EXACT, CLOSE = 1e-6, 1e-5  # of weights for each update (as root mean square); of all else, relative
LIMIT = 300  # seconds, on a machine that has other work


# --- two ranks and one process, all in one go ------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("ranks")
    save_talker(folder / "tiny", tokenizer)
    run = work.train_ppo(
        new_roles(tiny_of(folder)), tokenizer, work.PROMPTS, CONFIG, folder / "alone"
    )
    next(run)
    run.close()  # an unfinished run of one process
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """What each of two ranks found."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(WORLD)]
    command = [*torchrun, "--standalone", str(HERE / "helpers_ranks.py"), str(folder)]
    path = os.pathsep.join(map(str, (HERE.parent, HERE)))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "USE_LIBUV": "0"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"found-{rank}.pt") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone(folder):
    """What one process finds, by loop; made when it is first asked for."""
    made = {}

    def find(name):
        if name not in made:
            made[name] = work.one_process() if name == "model" else work.loop(name, folder)
        return made[name]

    return find


def assert_close(found, expected, tolerance, share=1.0):
    """Tensors by name: no entry differs by more than that share."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        most = (tensor - expected[name]).abs().max().item()
        assert most <= tolerance * share, f"{name} differs by {most}"


def apart(found, expected):
    """Root mean square of the differences, over all entries of all tensors."""
    assert found.keys() == expected.keys()
    both = [torch.cat([x[name].flatten() for name in expected]) for x in (found, expected)]
    return (both[0] - both[1]).square().mean().sqrt().item()


def size_of(tensors):
    return max(tensor.abs().max().item() for tensor in tensors.values())


@pytest.mark.parametrize("name", LOOPS)
def test_two_ranks_learn_what_one_process_does(found, alone, name):
    expected = alone(name)
    for rank in found:
        got = rank[name]
        for report, other in zip(got["reports"], expected["reports"], strict=True):
            assert report == pytest.approx(other, rel=CLOSE, abs=CLOSE, nan_ok=True)
        gradients, weights = expected["gradients"], expected["weights"]
        assert_close(got["gradients"], gradients, CLOSE, size_of(gradients))
        assert apart(got["weights"], weights) <= EXACT * UPDATES


def test_in_float64_they_are_equal(found, alone):
    """So what float32 leaves is rounding: Adam takes a step even on a gradient that is no more."""
    expected = alone("double")
    for rank in found:
        for report, other in zip(rank["double"]["reports"], expected["reports"], strict=True):
            assert report == pytest.approx(other, rel=1e-9, abs=1e-9)
        for what in ("gradients", "weights"):
            assert all(x.dtype == torch.float64 for x in expected[what].values())
            assert_close(rank["double"][what], expected[what], 1e-9)


def test_weights_differ_where_rounding_is_a_part_of_the_gradient(found, alone):
    """Adam's first step is η g/(|g| + 1e-8): the same for any g that is far above 1e-8."""
    expected, got = alone("one_step"), found[0]["one_step"]
    gradients = {
        key.replace(".policy.", "."): gradient
        for key, gradient in expected["gradients"].items()
        if key.startswith("policy/")
    }
    one, two, gradient = (
        torch.cat([tensors[key].flatten() for key in gradients])
        for tensors in (expected["weights"], got["weights"], gradients)
    )
    worst = (one - two).abs().topk(6)
    assert worst.values[0] > EXACT  # more than rounding of a weight
    assert gradient[worst.indices].abs().max() < 1e-7
    assert gradient.abs().median() > 1e-5


@pytest.mark.parametrize("name", LOOPS)
def test_ranks_hold_the_same_weights_bit_for_bit(found, name):
    first, second = (rank[name]["weights"] for rank in found)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_ranks_sample_for_themselves(found, alone):
    texts = [rank["ppo"]["texts"] for rank in found]
    assert [text for part in zip(*texts, strict=True) for text in part] == alone("ppo")["texts"]
    assert texts[0] != texts[1]


def test_rollouts_in_one_are_padded_as_a_batch_is():
    """One prompt of two tokens with an answer of one, then one of one with an answer of two."""
    parts = [
        Rollout(torch.tensor([ids]), torch.ones(1, 3).long(), torch.ones(1, n).long(), [text], done)
        for ids, n, text, done in (
            ([5, 6, 7], 1, "a", torch.tensor([True])),
            ([5, 6, 7], 2, "b", torch.tensor([False])),
        )
    ]
    found = parallel._joined(parts, torch.tensor([1, 0]), padding=9)
    assert found.input_ids.tolist() == [[9, 5, 6, 7], [5, 6, 7, 9]]
    assert found.attention_mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 0]]
    assert found.response_mask.tolist() == [[1, 1], [1, 0]]
    assert found.texts == ["b", "a"] and found.finished.tolist() == [False, True]


def test_a_stopped_run_goes_on_from_the_save_of_rank_0(found):
    for rank in found:
        assert rank["resumed"]["files"] == ["update-00000", "update-00001"]
        expected = rank["ppo"]["weights"]
        assert all(torch.equal(x, expected[n]) for n, x in rank["resumed"]["weights"].items())


@pytest.mark.parametrize("name", ["fsdp", "tensor"])
def test_an_engine_gives_the_losses_gradients_and_weights_of_one_process(found, alone, name):
    expected = alone("model")
    for rank in found:
        assert rank[name]["losses"] == pytest.approx(expected["losses"], rel=CLOSE)
        for what in ("gradients", "weights"):
            assert_close(rank[name][what], expected[what], CLOSE, size_of(expected[what]))


def test_stages_together_have_the_gradients_and_weights_of_one_process(found, alone):
    expected, stages = alone("model"), [rank["pipeline"] for rank in found]
    assert stages[-1]["losses"] == pytest.approx(expected["losses"], rel=CLOSE)
    for what in ("gradients", "weights"):
        got = stages[0][what] | stages[1][what]
        assert not stages[0][what].keys() & stages[1][what].keys()
        assert_close(got, expected[what], CLOSE, size_of(expected[what]))


def test_the_engines_are_all_tried(found):
    assert set(ENGINES) < set(found[0]) and UPDATES >= 3


def test_fsdp_holds_half_and_sends_what_the_table_says(found):
    model = work.model_of()
    total = sum(p.numel() for p in model.parameters())
    assert [rank["fsdp"]["local"] for rank in found] == [total // 2, total // 2]
    messages = found[0]["fsdp"]["messages"]
    sizes = memory.model_sizes(model.config)
    table = {row.way: row for row in parallel_table(sizes, 2, WORLD, tokens=32)}
    engine = {name: n for name, n in messages.items() if name != "allreduce_"}
    assert sum(engine.values()) == table["FSDP"].messages == 8


# --- sums over ranks -------------------------------------------------------------------------


def test_whitening_is_over_the_entries_of_all_ranks(found):
    values, mask = work.parts()
    expected = whiten(values, mask)  # of 1, 2, 6, 5 and 4
    for rank in range(WORLD):
        shares = found[rank]["shares"]
        torch.testing.assert_close(shares["whitened"], expected[rank])
    assert not torch.allclose(found[0]["shares"]["alone"], expected[0], atol=0.1)


def test_equal_numbers_on_all_ranks_are_0_and_explain_nothing(found):
    for rank in found:
        assert (rank["shares"]["level"] == 0).all()
        assert math.isnan(rank["shares"]["explained"])


def test_a_mean_over_ranks_counts_each_token_once(found):
    for rank in found:
        assert rank["shares"]["mean"] == pytest.approx((1 + 4 + 36 + 25 + 16) / 5)


def test_split_logprobs_are_those_of_whole_logits(found):
    logits, tokens = work.vocabulary()
    whole = logits.clone().requires_grad_()
    expected = token_logprobs(whole, tokens, temperature=0.7)
    (expected * torch.arange(6.0).view(2, 3)).sum().backward()
    for rank, gradient in enumerate(whole.grad.split([3, 5], -1)):
        shares = found[rank]["shares"]
        torch.testing.assert_close(shares["logprobs"], expected.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(shares["gradient"], gradient, rtol=1e-4, atol=1e-5)
        assert "ValueError: the number of holders of a token is" in shares["refused"]
        assert "it must be 1. Look at `first`" in shares["refused"]


# --- what is refused -------------------------------------------------------------------------

BAD = {
    "odd": ("minibatch_size is 1, which 2 ranks cannot share equally", "give a multiple of 2"),
    "groups": ("2 ranks would have 1 rows of a minibatch each", "splits groups of 2", "of 4"),
    "weights": ("rank 1 has other weights of role 'value' than rank 0", "from the same files"),
    "nf4": ("are in NF4, packed bytes that cannot be cut", "quantized=False"),
    "ranks": ("belongs to a run with other settings (ranks: None there, 2 here)", "to begin anew"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_on_all_ranks(found, name):
    for rank in found:
        said = rank["bad"][name]
        assert said.startswith("ValueError: ") and len(said) < 500
        assert [words for words in BAD[name] if words not in said] == []


def test_a_run_of_two_ranks_is_not_gone_on_with_by_one(found, folder):
    del found  # its ranks have left an unfinished run behind
    with pytest.raises(FileNotFoundError):
        (folder / "run.unfinished").stat()  # it was finished
    assert (folder / "run" / "adapter_model.safetensors").is_file()


def test_without_a_group_it_says_what_to_do():
    message = r"this process is in no group; open ranks.join\(\) under torchrun, or use ranks.spawn"
    for call in (
        lambda: parallel.data_parallel().__enter__(),
        lambda: parallel.whiten_over_ranks(torch.ones(3), torch.ones(3)),
        lambda: ranks.split_logprobs(torch.ones(2, 3), torch.zeros(2, dtype=torch.long), first=0),
        lambda: parallel.shard(work.model_of()),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_a_stage_refuses_tied_weights():
    model = work.model_of()
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ValueError, match="the output layer is tied to the embeddings"):
        parallel.Stage(model, 0, 2)


def joined(monkeypatch, device="cpu", **environment):
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in (alone | environment).items():
        monkeypatch.setenv(name, value)
    with join(device, timeout=5):
        pass


def test_cuda_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="device is 'cuda' for process 0 .* sees 0 CUDA devices"):
        joined(monkeypatch, "cuda")
    with pytest.raises(ValueError, match="device is 'tpu': it must be one of 'cpu', 'cuda'"):
        joined(monkeypatch, "tpu")


def test_join_without_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="RANK is not set, .* torchrun --nproc_per_node 2"):
        join().__enter__()


def test_a_port_in_use(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        message = (
            f"cannot meet at port {port} of 127.0.0.1, .*; give torchrun another --master-port"
        )
        with pytest.raises(OSError, match=message):
            joined(monkeypatch, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


# --- spawn: what it returns, and that nothing is left ----------------------------------------


def children():
    """Processes of this machine that `spawn` started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"import run_rank" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it has just ended
            continue
    return found


@pytest.fixture
def nothing_left():
    if not Path("/proc/self/cmdline").exists():
        pytest.skip("this system does not list processes in /proc")
    before = set(children())
    yield
    for _ in range(100):
        if not (left := set(children()) - before):
            return
        time.sleep(0.1)
    pytest.fail(f"{left} are left")


def test_ranks_compute_together_and_end(nothing_left):
    found = spawn(small.greet, 2, LIMIT, "hello", torch.tensor([1.0, 2.0]))
    assert found == [{"said": f"hello from {rank}", "sum": [2.0, 4.0]} for rank in range(2)]


def test_a_rank_that_raises_is_named_with_its_error(nothing_left):
    with pytest.raises(RuntimeError, match="rank 1 of 2 failed, .*: KeyError: 'lost'") as caught:
        spawn(small.fail, 2, LIMIT, "raise")
    assert "helpers_spawn.py" in caught.value.__notes__[0]


def test_a_rank_that_is_killed_is_named(nothing_left):
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 failed, .*: signal 9 \(SIGKILL\)"):
        spawn(small.fail, 2, LIMIT, "kill")


def test_after_the_time_limit_all_are_stopped(nothing_left):
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match="after 0.3 seconds rank 0 and 1 of 2 had not ended"):
        spawn(small.fail, 2, 0.3, "wait")
    assert time.monotonic() - begin < 60


def test_ctrl_c_stops_them(nothing_left):
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        spawn(small.fail, 2, LIMIT, "wait")


def test_a_kill_of_the_parent_stops_them(nothing_left, tmp_path):
    code = "from helpers_spawn import fail; from rlhf_helpers.ranks import spawn; "
    code += f"spawn(fail, 2, {LIMIT}, 'wait')"
    path = os.pathsep.join(map(str, (HERE.parent, HERE)))
    before = set(children())
    parent = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
    while len(set(children()) - before) < 2:
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()


def test_a_result_that_is_not_plain_is_named(nothing_left):
    with pytest.raises(RuntimeError, match="TypeError: the result is Fraction.*: give numbers"):
        spawn(small.fraction, 1, LIMIT)


def test_what_no_process_could_be_given():
    with pytest.raises(TypeError, match="argument 1 is <function .*: give numbers, texts, lists"):
        spawn(small.fail, 2, LIMIT, 1, lambda: 0)
    with pytest.raises(ValueError, match="<locals>.inner' stands in another one"):

        def inner(): ...

        spawn(inner, 2, LIMIT)
    with pytest.raises(ValueError, match="world_size is 0: it must be a whole number, at least 1"):
        spawn(small.fail, 0, LIMIT)
    with pytest.raises(ValueError, match="timeout is -1: it must be a finite number above 0"):
        spawn(small.fail, 2, -1)


# --- the table -------------------------------------------------------------------------------


def test_doctests():
    for module in (parallel, ranks):
        assert doctest.testmod(module).failed == 0


def test_the_table_of_a_model_counted_by_hand():
    sizes = ModelSizes(shapes=((4, 4),) * 4, other=20, output=12, width=4)  # 64 + 32
    table = {row.way: row for row in parallel_table(sizes, 4, 4, tokens=10, microbatches=2)}
    assert table["DDP"].total == 16 * 96
    assert table["ZeRO-2"].total == 2 * 96 + 14 * 24
    assert table["FSDP"].total == table["TP"].total == 16 * 24
    assert table["PP"].total == 16 * (16 + 20)
    assert [row.sent for row in table.values()] == [
        288,
        288,
        (3 * 128 + 2 * 64) * 3 // 4,
        (18 * 80 + 160) * 6 // 4,
        160,
    ]


def test_the_table_refuses():
    sizes = ModelSizes(shapes=((4, 4),), other=0, output=0, width=4)
    with pytest.raises(ValueError, match="layers is 1: 2 ranks need a layer each"):
        parallel_table(sizes, 1, 2, tokens=8)
    with pytest.raises(ValueError, match="weight_bytes is 3: give 2"):
        parallel_table(sizes, 1, 1, tokens=8, weight_bytes=3)
