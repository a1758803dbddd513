"""What the tests of the three training loops share: collecting reports, comparing runs, Ctrl-C."""

import os
import signal
from pathlib import Path

import torch


def reports_of(run, visit=None):
    """All reports of a run; `visit` is called with each as it comes."""
    reports = []
    for report in run:
        reports.append(report)
        if visit:
            visit(report)
    return reports


def facts(stats):
    """All that the steps of SFT or a reward model report, but for the time."""
    return [(s.step, s.loss, dict(s.held_out), s.grad_norm, s.learning_rate) for s in stats]


def role_weights(roles, role):
    """Adapter and, if the role has one, head."""
    head = roles.heads[role].state_dict() if role in roles.heads else {}
    return roles.state(role) | {f"head.{name}": tensor.clone() for name, tensor in head.items()}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def random_ids(generator, low, high, vocabulary):
    """Between `low` and `high` - 1 random tokens, none of them a special one."""
    length = int(torch.randint(low, high, (), generator=generator))
    return torch.randint(4, vocabulary, (length,), generator=generator).tolist()


def press():
    """A real Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)


def kept_in(folder: Path, role: str) -> Path:
    """Where a role's files are: in the newest save of an unfinished run, else in the folder."""
    saves = sorted(folder.glob("update-*"))
    return saves[-1] / role if saves else folder
