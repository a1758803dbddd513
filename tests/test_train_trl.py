"""TRL's trainers on two CPU processes, and what accelerate makes of the configuration files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import train_trl
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from safetensors.torch import load_file

from rlhf_helpers.presets import ASSETS, load_preset
from rlhf_helpers.roles import WEIGHTS

ROOT = Path(__file__).parents[1]
FILES = ROOT / "tools" / "accelerate"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]


def test_two_cpu_processes_train_one_adapter(tmp_path):
    script = [str(ROOT / "tools/train_trl.py"), "--steps", "1", "--rows", "8"]
    command = [*LAUNCH, str(FILES / "two_cpus.yaml"), *script, "--out", str(tmp_path / "adapter")]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "USE_LIBUV": "0"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stdout.splitlines() if "processes" in line]
    assert said == [f"2 processes, 1 steps; adapter in {tmp_path / 'adapter'}"]
    before, after = (load_file(f / WEIGHTS) for f in (ASSETS / "sft", tmp_path / "adapter"))
    assert before.keys() == after.keys()
    moved = max((after[name] - before[name]).abs().max().item() for name in before)
    assert 0 < moved < 0.01  # a step of Adam at 1e-3


@pytest.mark.parametrize(
    ("name", "processes", "launcher"),
    [
        ("two_cpus", 2, "multi_gpu"),
        ("fsdp", 4, "use_fsdp"),
        ("deepspeed_zero2", 4, "use_deepspeed"),
    ],
)
def test_accelerate_takes_each_file(name, processes, launcher):
    path = str(FILES / f"{name}.yaml")
    assert load_config_from_file(path).num_processes == processes  # refuses unknown keys
    given = ["--config_file", path, str(ROOT / "tools/train_trl.py")]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    assert getattr(args, launcher) and args.num_processes == processes
    options = vars(args)
    known = {"two_cpus": {"use_cpu": True}, "fsdp": {"fsdp_version": 2}}
    known |= {"deepspeed_zero2": {"zero_stage": 2, "zero3_init_flag": False}}
    assert {key: options[key] for key in known[name]} == known[name]


def test_no_file_is_forgotten():
    assert sorted(path.stem for path in FILES.iterdir()) == ["deepspeed_zero2", "fsdp", "two_cpus"]


def test_rows_that_are_no_equal_shares_of_whole_groups(tmp_path):
    with pytest.raises(ValueError, match="12 rows are no equal shares .* give a multiple of 8"):
        train_trl.settings("RLOO", load_preset("pocket"), tmp_path, 1, 12, processes=2)


@pytest.mark.parametrize("method", train_trl.METHODS)
def test_the_batch_is_of_all_processes(method, tmp_path):
    for processes in (1, 2):
        preset = load_preset("pocket")
        args = train_trl.settings(method, preset, tmp_path, 1, 16, processes)
        assert args.per_device_train_batch_size * processes == 16
        assert args.beta == 0.1 and args.use_cpu
