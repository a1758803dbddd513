"""Small work for the tests of `ranks.spawn`; it imports no more than that needs."""

import os
import signal
import time
from fractions import Fraction

import torch.distributed as dist

from rlhf_helpers.ranks import all_sum


def greet(word, tensor):
    return {"said": f"{word} from {dist.get_rank()}", "sum": all_sum(tensor).tolist()}


def fraction():
    return Fraction(1, 2)


def fail(how):
    """Rank 1 does; rank 0 waits for it."""
    if dist.get_rank() == 1:
        if how == "raise":
            raise KeyError("lost")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    dist.barrier()
