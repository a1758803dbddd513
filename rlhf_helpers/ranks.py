"""Processes that compute together, called ranks: starting and ending them, sums over them."""

import importlib.util
import inspect
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_helpers.guards import check_softmax, refuse, shown, upcast
from rlhf_helpers.kinds import Above, Floating, Ids, OneOf, TensorKind, V, Whole
from rlhf_helpers.validation import checked

DEVICES = ("cpu", "cuda")
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
BY_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what it sets
PLAIN = "give numbers, texts, lists, tuples, dictionaries or tensors"
PAUSE = 0.02  # seconds between two looks at the processes
LOG = 2000  # characters of a failed rank's output that are shown
# What a process begins with: before the long imports it watches the pipe from its parent.
START = """
import os, sys, threading

def end_with_parent():
    sys.stdin.read()  # returns when the other end is closed
    os._exit(1)

threading.Thread(target=end_with_parent, daemon=True).start()
from rlhf_helpers.ranks import run_rank
run_rank(sys.argv[1], int(sys.argv[2]))
"""


# --- on this machine, from a notebook --------------------------------------------------------


@checked
def spawn(function: Callable, world_size: Whole[1], timeout: Above[0], *arguments: object) -> list:
    """Run a function in several new processes that form a gloo group; what each returned.

    Inside, `torch.distributed` is ready: `get_rank()` says which of them it is. However this call
    ends, by success, an error, Ctrl-C or a kill of this process, none of them is left: each also
    watches a pipe from here, and ends when that closes.

    Args:
        function: of an importable module or of a notebook. From a notebook it is its source that
            is run, so it must import what it needs and use nothing else from outside.
        world_size: how many processes, at least 1; each has one thread.
        timeout: seconds after which all are ended.
        arguments: the same for all: numbers, texts, lists, tuples, dictionaries or tensors.

    Returns:
        What the function returned on each rank, in order; of the same kinds.

    Raises:
        TypeError: for an argument of another kind.
        ValueError: for a function that stands in another one, or numbers out of range.
        RuntimeError: if a rank fails or is killed. It names the first, with its error; its output
            is a note of the exception.
        TimeoutError: after `timeout` seconds, with the ranks that were not done.

    Example:
        >>> def greet(name):
        ...     import torch.distributed as dist
        ...
        ...     return f"{name}, from rank {dist.get_rank()} of {dist.get_world_size()}"
        >>> spawn(greet, 2, 60, "hello")  # doctest: +SKIP
        ['hello, from rank 0 of 2', 'hello, from rank 1 of 2']

    Lesson 10 uses it.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        _write_job(folder, function, world_size, timeout, arguments)
        processes: list[subprocess.Popen] = []
        try:
            processes += (_start(folder, rank) for rank in range(world_size))
            _wait(processes, folder, timeout)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()
                process.stdin.close()
        return [torch.load(_result(folder, rank)) for rank in range(world_size)]


def _write_job(folder: Path, function: Callable, world_size: int, timeout: float, arguments):
    """What the processes read: how to find the function, and what to call it with."""
    for number, argument in enumerate(arguments):
        _save_plain(f"argument {number}", argument, folder / "argument.pt")
    name = getattr(function, "__qualname__", shown(function))
    if not name.isidentifier():
        raise ValueError(
            f"function {name!r} stands in another one or in a class, where no process finds it; "
            "define it at the top of a module or of a notebook's cell"
        )
    job = {"module": function.__module__, "name": name, "arguments": arguments}
    if function.__module__ == "__main__":
        source = textwrap.dedent(inspect.getsource(function))
        (folder / "cell.py").write_text(source, encoding="utf-8")
        job["module"] = None
    torch.save(job | {"world_size": world_size, "timeout": timeout}, folder / "job.pt")


def _save_plain(name: str, value: object, path: Path) -> None:
    """Save what `torch.load` reads without unpickling; TypeError for anything else."""
    try:
        torch.save(value, path)
        torch.load(path)
    except Exception as error:  # torch and pickle have many for what they do not take
        path.unlink(missing_ok=True)
        raise TypeError(f"{name} is {shown(value)}: {PLAIN}") from error


def _start(folder: Path, rank: int) -> subprocess.Popen:
    path = os.pathsep.join(filter(None, sys.path))
    with (folder / f"log-{rank}").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-c", START, str(folder), str(rank)],
            stdin=subprocess.PIPE,  # never written to; it closes when this process ends
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # a Ctrl-C comes here alone
        )


def _wait(processes: list[subprocess.Popen], folder: Path, timeout: float) -> None:
    """Return when all have ended well; raise as soon as one has not, or when time is up."""
    end = time.monotonic() + timeout
    while None in (codes := [process.poll() for process in processes]):
        if any(codes):
            time.sleep(10 * PAUSE)  # several may fall at once: look who was first
            break
        if time.monotonic() > end:
            running = [str(rank) for rank, code in enumerate(codes) if code is None]
            raise TimeoutError(
                f"after {timeout} seconds rank {' and '.join(running)} of {len(codes)} had not "
                "ended; all were stopped. Give more time, or look for a rank that waits for another"
            )
        time.sleep(PAUSE)
    left = [rank for rank in range(len(processes)) if not _result(folder, rank).exists()]
    failed = [rank for rank, process in enumerate(processes) if process.poll() or rank in left]
    if failed:
        raise _failure(folder, min(failed, key=lambda rank: _when(folder, rank)), processes)


def _when(folder: Path, rank: int) -> float:
    """When a rank wrote its error; one that was killed wrote none, and others fell after it."""
    error = folder / f"error-{rank}"
    return error.stat().st_mtime if error.exists() else 0.0


def _failure(folder: Path, rank: int, processes: list[subprocess.Popen]) -> RuntimeError:
    code, written = processes[rank].returncode, folder / f"error-{rank}"
    how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
    why = written.read_text(encoding="utf-8") if written.exists() else how
    error = RuntimeError(f"rank {rank} of {len(processes)} failed, the rest was stopped: {why}")
    log = (folder / f"log-{rank}").read_text(encoding="utf-8", errors="replace")
    error.add_note(f"The end of rank {rank}'s output:\n{log[-LOG:]}")
    return error


def _result(folder: Path, rank: int) -> Path:
    return folder / f"result-{rank}.pt"


def run_rank(folder: str, rank: int) -> None:
    """What a process that `spawn` has started does: the job that its folder describes."""
    folder = Path(folder)
    try:
        job = torch.load(folder / "job.pt")
        store = dist.FileStore(str(folder / "store"), job["world_size"])
        options = {"store": store, "rank": rank, "world_size": job["world_size"]}
        dist.init_process_group("gloo", timeout=timedelta(seconds=job["timeout"]), **options)
        result = _find(job["module"], job["name"], folder)(*job["arguments"])
        _save_plain("the result", result, _result(folder, rank))
        dist.barrier()  # none leaves while another still reads from it
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        (folder / f"error-{rank}").write_text(text, encoding="utf-8")
        raise
    dist.destroy_process_group()


def _find(module: str | None, name: str, folder: Path) -> Callable:
    if module is not None:
        return getattr(importlib.import_module(module), name)
    spec = importlib.util.spec_from_file_location("cell", folder / "cell.py")
    cell = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cell)
    return getattr(cell, name)


# --- on any machines, by torchrun ------------------------------------------------------------


@contextmanager
def join(device: OneOf[DEVICES] = "cpu", timeout: Above[0] = 600.0) -> Iterator[None]:
    """Inside, this process is one of the group that torchrun has started.

    Args:
        device: "cpu" (gloo) or "cuda" (nccl, one GPU to a process).
        timeout: seconds that one rank waits for the others.

    Raises:
        ValueError: for another device, "cuda" without as many GPUs, or a process that torchrun has
            not started.
        OSError: if the port through which the ranks meet is in use.

    Example:
        A script for `torchrun --nproc_per_node 2 script.py`; see `parallel.data_parallel`.

        >>> with join():  # doctest: +SKIP
        ...     print(dist.get_rank(), dist.get_world_size())
    """
    _check_join(device, timeout)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    try:
        dist.init_process_group(BACKENDS[device], timeout=timedelta(seconds=timeout))
    except dist.DistNetworkError as error:
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        raise OSError(
            f"the ranks cannot meet at port {port} of {address}, which may be in use; give "
            "torchrun another --master-port, or set MASTER_PORT"
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


@checked
def _check_join(device: OneOf[DEVICES], timeout: Above[0]) -> None:
    if missing := [name for name in BY_TORCHRUN if name not in os.environ]:
        raise ValueError(
            f"{missing[0]} is not set, so nobody has started this process as one of several; use "
            "torchrun --nproc_per_node 2 script.py, or ranks.spawn in a notebook"
        )
    local, found = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if device == "cuda" and local >= found:
        raise ValueError(
            f"device is 'cuda' for process {local} of this machine, and torch sees {found} CUDA "
            "devices; start no more processes than there are, or give device='cpu'"
        )


def require_group() -> None:
    """Raise RuntimeError unless this process is one of a group."""
    if not dist.is_initialized():
        raise RuntimeError(
            "this process is in no group; open ranks.join() under torchrun, or use ranks.spawn"
        )


# --- what they say to each other -------------------------------------------------------------


@checked
def all_sum(x: TensorKind[...]) -> Tensor:
    """The sum of a tensor over all ranks, on each of them.

    Its gradient goes through as it is: the ranks go on with the same sum to the same loss, which
    counts once. (Shoeybi et al., Megatron-LM, arXiv 1909.08053, section 3: the operator g.)

    Raises:
        TypeError: for what is no tensor.
        RuntimeError: in a process that is in no group.
    """
    require_group()
    return _AllSum.apply(x)


@torch.no_grad()
@checked
def all_max(x: TensorKind[...]) -> Tensor:
    """The greatest of each entry over all ranks; no gradient. Raises as `all_sum`."""
    require_group()
    result = x.clone()
    dist.all_reduce(result, dist.ReduceOp.MAX)
    return result


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        result = x.clone()
        dist.all_reduce(result)
        return result

    @staticmethod
    def backward(ctx, upstream: Tensor) -> Tensor:
        return upstream


@checked
def split_logprobs(
    logits: Floating[..., V], tokens: Ids[...], first: Whole[0], temperature: Above[0] = 1.0
) -> Tensor:
    """`logprobs.token_logprobs` where each rank has the logits of some tokens alone.

    With z_v = logits / temperature, m = max over all ranks of z, and S = Σ over all ranks of
    e^(z_v − m): log π(a) = z_a − m − log S. Two messages of the size of the tokens replace the
    logits: the maximum, then three sums, S, z_a, which one rank has, and how many have it.

    Args:
        logits: `[..., V]`, the columns of the V tokens from `first` on, floating point.
        tokens: `[...]`, int64, ids of the whole vocabulary; the same on all ranks.
        first: id of the first column; the ranks' columns must be the vocabulary, each once.
        temperature: divides the logits; positive.

    Returns:
        `[...]` log-probabilities in nats, the same on all ranks, float32 (float64 for such logits),
        differentiable with respect to this rank's logits.

    Raises:
        TypeError, ValueError: as `token_logprobs`; and for a token that no rank has, or several.
        RuntimeError: in a process that is in no group.

    Example:
        On two ranks, with probabilities 1/2, 1/4 on the first and 1/8, 1/8 on the second:

        >>> logits = torch.tensor([[0.5, 0.25], [0.125, 0.125]])[rank].log()    # doctest: +SKIP
        >>> split_logprobs(logits, torch.tensor(2), first=2 * rank)              # doctest: +SKIP
        tensor(-2.0794)

    Shoeybi et al., Megatron-LM (arXiv 1909.08053), section 3. Derived in lesson 10.
    """
    require_group()
    z, width = upcast(logits) / temperature, logits.shape[-1]
    top = all_max(z.detach().amax(-1))
    here = (tokens >= first) & (tokens < first + width)
    own = z.gather(-1, (tokens - first).clamp(0, width - 1)[..., None]).squeeze(-1)
    parts = [(z - top[..., None]).exp().sum(-1), own.masked_fill(~here, 0), here.to(z)]
    total, chosen, holders = all_sum(torch.stack(parts))
    why = "so many ranks have its logit, and it must be 1. Look at `first`, and at the token ids."
    refuse("the number of holders of a token", holders.detach(), holders != 1, why)
    result = chosen - top - total.log()
    check_softmax("logits", result)
    return result
