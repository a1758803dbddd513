"""How long one PPO update takes and how much its models weigh, here and in TRL 1.12.0.

python tests/benchmarks/ppo_update.py [PYTHON_WITH_TRL_1_12] [--updates N] [--batch N] [--profile]

Compared are `train_ppo`, with four adapters on one NF4 base, and TRL's own PPOTrainer, with an NF4
policy whose reference is its base, and a reward and a value model of their own in float32; the
latter is trained in full. The interpreter given is that of an environment which holds trl==1.12.0,
the last release with a PPOTrainer, and otherwise this package's requirements; without one only
`train_ppo` is measured.

Both run on the CPU, one after the other, each in a fresh process: the pocket base's architecture
with the same random weights, so that EOS hardly ever comes, the same prompts, LoRA on all linear
layers, one optimizer step in each epoch over the batch. The first update is dropped. `--profile`
adds what the parts of an update take, and how near that is to the rate at which this machine
multiplies large float32 matrices; the operations are counted in one more update, by torch.
"""

import argparse
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import bitsandbytes  # noqa: F401  registers its operations
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula
from transformers import AutoConfig, AutoModelForSequenceClassification, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from rlhf_helpers import ppo
from rlhf_helpers.base import load_base
from rlhf_helpers.memory import measured_bytes
from rlhf_helpers.presets import PRESETS, Preset
from rlhf_helpers.roles import Roles
from rlhf_helpers.sources import prompt_dataset
from rlhf_helpers.text import encode_prompts, load_tokenizer

TRL_VERSION = "1.12.0"
EPOCHS, RESPONSE_LENGTH, RANK, ALPHA = 4, 32, 16, 32
LEARNING_RATE = 3e-6  # so low that the policy stays random and its responses long
BETA, TEMPERATURE = 0.05, 1.0
HERE = Path(__file__).resolve()


class Timers:
    """What functions cost, without other such functions inside them: seconds, or operations."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.operations: dict[str, float] = defaultdict(float)
        self.counting, self.inner = False, 0.0

    def cost(self, function: Callable, *arguments, **options) -> tuple[object, float]:
        """What the function returns, and its seconds, or, while counting, its operations."""
        start = time.perf_counter()
        with FlopCounterMode(display=False) if self.counting else nullcontext() as counter:
            done = function(*arguments, **options)
        return done, counter.get_total_flops() if counter else time.perf_counter() - start

    def wrap(self, owner: object, name: str, label: Callable[..., str]) -> None:
        """Replace a function; `label` names the row, given the function's arguments."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def measured(*arguments, **options):
            rows = self.operations if self.counting else self.seconds
            key, outer, self.inner = label(*arguments), self.inner, 0.0
            rows[key] += 0.0  # rows stand in the order in which they begin
            done, cost = self.cost(function, *arguments, **options)
            rows[key] += cost - self.inner
            self.inner = outer + cost
            return done

        setattr(owner, name, measured)


@register_flop_formula(torch.ops.bitsandbytes.gemm_4bit)
def _operations_of_a_4_bit_layer(x: tuple, codes: tuple, shape: list, *_, **__) -> int:
    """torch counts its own products only."""
    return 2 * math.prod(x) * shape[0]


def matmul_rate(size: int = 1024, repeats: int = 30) -> float:
    """Operations a second of the fastest of some products of float32 matrices."""
    a, b = torch.randn(2, size, size)
    seconds = [Timers().cost(torch.mm, a, b)[1] for _ in range(repeats)]
    return 2 * size**3 / min(seconds)


def profile(roles: Roles) -> Timers:
    """Time the parts of `train_ppo`."""
    timers = Timers()

    def asked(roles: Roles, role: str, *_) -> str:
        return f"{role}: {'forward' if torch.is_grad_enabled() else 'pass without gradients'}"

    for name in ("_logprobs", "response_values", "score_tokens"):
        timers.wrap(ppo, name, asked)
    timers.wrap(ppo, "sample_responses", lambda *_: "sampling")
    timers.wrap(ppo, "policy_objective", lambda *_: "policy: forward")
    timers.wrap(ppo, "value_objective", lambda *_: "value: forward")
    timers.wrap(torch.Tensor, "backward", lambda *_: f"{roles.active}: backward")
    timers.wrap(torch.optim.AdamW, "step", lambda *_: "optimizer")
    timers.wrap(torch.optim.AdamW, "zero_grad", lambda *_: "optimizer")
    timers.wrap(ppo, "clip_grad_norm_", lambda *_: "clipping of gradients")
    timers.wrap(Roles, "_activate", lambda *_: "switching roles")
    return timers


def make_model(folder: str) -> None:
    """Write the pocket base's architecture with random weights, and its tokenizer."""
    pocket = PRESETS["pocket"]
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(pocket.model)
    config.dtype = "float32"
    LlamaForCausalLM(config).float().save_pretrained(folder)
    load_tokenizer(pocket).save_pretrained(folder)


def preset(folder: str) -> Preset:
    return replace(PRESETS["pocket"], model=folder)


def questions(batch: int) -> list[str]:
    """As many prompts as a batch has, so that every update has them all, and the same padding."""
    return prompt_dataset(PRESETS["pocket"])["prompt"][:batch]


def token_ids(folder: str, batch: int) -> list[list[int]]:
    encoded = encode_prompts(load_tokenizer(preset(folder)), questions(batch), 128)
    pairs = zip(encoded["input_ids"], encoded["attention_mask"].bool(), strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]


def count_steps() -> list:
    """A list that grows by one entry at each step of an optimizer."""
    steps = []
    register_optimizer_step_post_hook(lambda *_: steps.append(1))
    return steps


def make_roles(folder: str) -> Roles:
    roles = Roles(load_base(preset(folder)), RANK, ALPHA)
    roles.add("policy")
    roles.add("reference", copy_of="policy", trainable=False)
    roles.add("reward", trainable=False)
    roles.add_head("reward")
    roles.heads["reward"].rescale(0.0, 1.0)
    roles.add("value", copy_of="reward")
    return roles


def measure_ours(folder: str, updates: int, batch: int, parts: bool) -> None:
    roles, steps = make_roles(folder), count_steps()
    timers = profile(roles) if parts else Timers()
    config = ppo.PPOConfig(
        updates=1 + updates + parts,
        batch_size=batch,
        minibatch_size=batch,
        epochs=EPOCHS,
        learning_rate=LEARNING_RATE,
        beta=BETA,
        eos_penalty=0.0,
        temperature=TEMPERATURE,
        response_length=RESPONSE_LENGTH,
    )
    ends, lengths = [], []
    for stats in ppo.train_ppo(roles, load_tokenizer(preset(folder)), questions(batch), config):
        ends.append(stats.seconds)
        lengths.append(stats.length)
        if stats.update == 1:
            timers.seconds.clear()
        timers.counting = parts and stats.update == updates + 1
    weights = sum(sum(tensors.values()) for tensors in measured_bytes(roles).values())
    measured = {
        "parts": {name: total / updates for name, total in timers.seconds.items()},
        "operations": timers.operations,
        "rate": matmul_rate(),
    }
    made = len(steps) / len(ppo.TRAINED) * (1 + updates) / len(ends)
    ends, lengths = ends[: updates + 1], lengths[: updates + 1]
    report(folder, "ours", ends, lengths, made, weights, **measured)


def measure_trl(folder: str, updates: int, batch: int, parts: bool) -> None:
    import trl

    if trl.__version__ != TRL_VERSION:
        raise SystemExit(f"trl is {trl.__version__}: give an interpreter that has {TRL_VERSION}.")
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    ends, lengths, steps = [], [], count_steps()

    class Timed(PPOTrainer):
        def log(self, logs: dict, start_time: float | None = None) -> None:
            """Called at the end of each update; its local variable is the last real token's."""
            ends.append(time.perf_counter())
            last = sys._getframe(1).f_locals["sequence_lengths"]
            lengths.append((last + 1).double().mean().item())

    def scalar_model():
        load = AutoModelForSequenceClassification.from_pretrained
        return load(folder, num_labels=1, dtype=torch.float32)

    trainer = Timed(
        args=PPOConfig(
            output_dir=f"{folder}/trl",
            total_episodes=(updates + 1) * batch,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=EPOCHS,
            local_rollout_forward_batch_size=batch,
            response_length=RESPONSE_LENGTH,
            stop_token="eos",
            temperature=TEMPERATURE,
            learning_rate=LEARNING_RATE,
            kl_coef=BETA,
            num_sample_generations=0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            seed=0,
        ),
        processing_class=load_tokenizer(preset(folder)),
        model=load_base(preset(folder)),
        ref_model=None,  # the policy without its adapter
        reward_model=scalar_model(),
        value_model=scalar_model(),
        train_dataset=Dataset.from_dict({"input_ids": token_ids(folder, batch)}),
        peft_config=LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    weights = tensor_bytes(trainer.policy_model, trainer.reward_model, trainer.value_model)
    start = time.perf_counter()
    trainer.train()
    report(folder, "trl", [end - start for end in ends], lengths, len(steps), weights)


def tensor_bytes(*models: torch.nn.Module) -> int:
    """Bytes of parameters, buffers, and what bitsandbytes keeps to decode 4-bit weights."""
    tensors = []
    for model in models:
        tensors += [*model.parameters(), *model.buffers()]
        states = [vars(p.quant_state) for p in model.parameters() if hasattr(p, "quant_state")]
        tensors += [x for state in states for x in state.values() if isinstance(x, torch.Tensor)]
    return sum({x.data_ptr(): x.numel() * x.element_size() for x in tensors}.values())


def report(
    folder: str,
    side: str,
    ends: list[float],
    lengths: list[float],
    steps: float,
    weights: int,
    **more,
) -> None:
    """Write a side's results; of seconds those of each update but the first."""
    result = {
        "seconds": [end - start for start, end in pairwise(ends)],
        "length": statistics.mean(lengths),
        "steps": steps / len(ends),
        "bytes": weights,
        "threads": torch.get_num_threads(),
    }
    Path(folder, f"{side}.json").write_text(json.dumps(result | more))


def run(side: str, python: str, folder: str, options: argparse.Namespace) -> dict:
    """Measure a side with an interpreter, in a process of its own."""
    arguments = (folder, options.updates, options.batch, options.profile)
    code = f"import ppo_update; ppo_update.measure_{side}{arguments!r}"
    path = os.pathsep.join([str(HERE.parent), str(HERE.parents[2])])
    settings = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [python, "-c", code], env=os.environ | settings, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{python} failed:\n{done.stderr}")
    return json.loads(Path(folder, f"{side}.json").read_text())


def print_sides(sides: dict[str, dict]) -> None:
    heads = ("median s", "least s", "most s", "tokens", "steps", "weights MB", "threads")
    print(f"{'one update':14}" + "".join(f"{head:>11}" for head in heads))
    for name, side in sides.items():
        seconds = side["seconds"]
        columns = [statistics.median(seconds), min(seconds), max(seconds), side["length"]]
        columns += [side["steps"], side["bytes"] / 1e6, side["threads"]]
        formats = ("11.3f", "11.3f", "11.3f", "11.2f", "11g", "11.3f", "11d")
        cells = [format(x, form) for x, form in zip(columns, formats, strict=True)]
        print(f"{name:14}" + "".join(cells))


def print_ratio(ours: dict, theirs: dict) -> None:
    slower = statistics.median(theirs["seconds"]) / statistics.median(ours["seconds"])
    print(f"TRL / rlhf_helpers: time {slower:.2f}, weights {theirs['bytes'] / ours['bytes']:.2f}")


def print_parts(ours: dict) -> None:
    """Where the time goes, and which part of each row the counted products alone would take."""
    total = statistics.mean(ours["seconds"])
    rest = total - sum(ours["parts"].values())
    operations = ours["operations"] | {"all": sum(ours["operations"].values())}
    print(f"\nlarge products of matrices: {ours['rate'] / 1e9:.0f} GFLOP/s")
    heads = f"{'s':>8}{'share':>8}{'GFLOP':>8}{'of that rate':>14}"
    print(f"{'rlhf_helpers, mean of an update':36}{heads}")
    for name, seconds in (ours["parts"] | {"rest": rest, "all": total}).items():
        count = operations.get(name, 0)
        print(f"{name:36}{seconds:8.3f}{seconds / total:8.1%}{count / 1e9:8.1f}", end="")
        print(f"{count / seconds / ours['rate']:14.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = f"interpreter of an environment with trl=={TRL_VERSION}"
    parser.add_argument("python", nargs="?", help=what)
    parser.add_argument("--updates", type=int, default=5, help="measured, after one for warm-up")
    parser.add_argument("--batch", type=int, default=64, help="responses in an update")
    parser.add_argument("--profile", action="store_true", help="where our update's time goes")
    options = parser.parse_args()
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder)
        lengths = [len(ids) for ids in token_ids(folder, options.batch)]
        sides = {"rlhf_helpers": run("ours", sys.executable, folder, options)}
        if options.python:
            sides[f"TRL {TRL_VERSION}"] = run("trl", options.python, folder, options)
    print(
        f"{options.batch} prompts of {min(lengths)} to {max(lengths)} tokens, responses of up to "
        f"{RESPONSE_LENGTH}, {EPOCHS} epochs; {options.updates} updates after one for warm-up"
    )
    print_sides(sides)
    if options.python:
        print_ratio(*sides.values())
    else:
        print(f"TRL skipped: give the {what}")
    if options.profile:
        print_parts(sides["rlhf_helpers"])


if __name__ == "__main__":
    main()
