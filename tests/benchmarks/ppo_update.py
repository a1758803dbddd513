"""How long one PPO update takes and how much its models weigh, here and in TRL 1.12.0.

python tests/benchmarks/ppo_update.py [PYTHON_WITH_TRL_1_12] [--work lesson|random]
    [--against REF] [--updates N] [--rounds N] [--profile]

Two kinds of work. `lesson`, the headline, is lesson 04's: the pocket base, the shipped SFT and
reward adapters, its prompts, batches and minibatches, and answers that end. The learning rate is so
small that both sides keep SFT's lengths, which are reported. `random` has the same architecture
with random weights, whose answers never end, the same prompts in every update, and one optimizer
step in each epoch over the batch.

Compared are `train_ppo`, with four adapters on one NF4 base; with `--against`, that of another
commit of this package; and TRL's own PPOTrainer, with an NF4 policy that has the same adapter and
the same adapter or its base as reference, and a reward and a value model of their own in float32,
the latter trained in full. The interpreter given is that of an environment which holds trl==1.12.0,
the last release with a PPOTrainer, and otherwise this package's requirements.

All run on the CPU, each in a fresh process, one after the other, and again in each round. The first
update of a process is dropped. Other processes on the machine disturb seconds more than processor
seconds (of all threads). `--profile` adds what the parts of an update take, and how near that is to
the rate at which this machine multiplies large float32 matrices; the operations are counted in one
more update, by torch.
"""

import argparse
import functools
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import bitsandbytes  # noqa: F401  registers its operations
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula
from transformers import AutoConfig, AutoModelForSequenceClassification, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from rlhf_helpers import ppo, training
from rlhf_helpers.base import load_base
from rlhf_helpers.memory import measured_bytes
from rlhf_helpers.presets import ASSETS, PRESETS, Preset
from rlhf_helpers.roles import Roles
from rlhf_helpers.sources import prompt_dataset
from rlhf_helpers.text import encode_prompts, load_tokenizer

TRL_VERSION = "1.12.0"
BATCH, RESPONSE_LENGTH, RANK, ALPHA = 64, 32, 16, 32
LEARNING_RATE = 3e-6  # so low that the policy, and with it the lengths, stays what it is
BETA, TEMPERATURE = 0.05, 1.0


@dataclass(frozen=True)
class Work:
    """What is asked of each side in an update of `BATCH` responses."""

    prompts: int | None
    minibatches: int
    epochs: int
    adapters: bool  # the shipped ones, on the shipped base; else fresh ones on random weights


WORK = {"lesson": Work(None, 2, 2, True), "random": Work(BATCH, 1, 4, False)}
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

    for name in ("role_logprobs", "response_values", "score_tokens"):
        timers.wrap(ppo, name, asked)
    timers.wrap(ppo, "sample_responses", lambda *_: "sampling")
    timers.wrap(ppo, "policy_objective", lambda *_: "policy: forward")
    timers.wrap(ppo, "value_objective", lambda *_: "value: forward")
    timers.wrap(torch.Tensor, "backward", lambda *_: f"{roles.active}: backward")
    timers.wrap(torch.optim.AdamW, "step", lambda *_: "optimizer")
    timers.wrap(torch.optim.AdamW, "zero_grad", lambda *_: "optimizer")
    timers.wrap(training, "clip_grad_norm_", lambda *_: "clipping of gradients")
    timers.wrap(Roles, "_activate", lambda *_: "switching roles")
    return timers


def make_model(work: Work, folder: str) -> None:
    """Write the model to measure: the pocket base, or its architecture with random weights."""
    pocket = PRESETS["pocket"]
    if work.adapters:
        shutil.copytree(pocket.model, folder, dirs_exist_ok=True)
        return
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(pocket.model)
    config.dtype = "float32"
    LlamaForCausalLM(config).float().save_pretrained(folder)
    load_tokenizer(pocket).save_pretrained(folder)


def preset(folder: str) -> Preset:
    return replace(PRESETS["pocket"], model=folder)


def questions(work: Work) -> list[str]:
    """As many as a batch has, so that every update has the same ones, or many to draw from."""
    return list(prompt_dataset(PRESETS["pocket"])["prompt"])[: work.prompts]


def token_ids(work: Work) -> list[list[int]]:
    encoded = encode_prompts(load_tokenizer(PRESETS["pocket"]), questions(work), 128)
    pairs = zip(encoded["input_ids"], encoded["attention_mask"].bool(), strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]


def count_steps() -> list:
    """A list that grows by one entry at each step of an optimizer."""
    steps = []
    register_optimizer_step_post_hook(lambda *_: steps.append(1))
    return steps


def make_roles(work: Work, folder: str) -> Roles:
    roles = Roles(load_base(preset(folder)), RANK, ALPHA)
    if work.adapters:
        roles.load("reference", ASSETS / "sft")
        roles.load("reward", ASSETS / "reward")
        roles.add("policy", copy_of="reference")
    else:
        roles.add("policy")
        roles.add("reference", copy_of="policy", trainable=False)
        roles.add("reward", trainable=False)
        roles.add_head("reward")
        roles.heads["reward"].rescale(0.0, 1.0)
    roles.add("value", copy_of="reward")
    return roles


def now() -> tuple[float, float]:
    """Seconds on the clock, and of all processors in this process."""
    return time.perf_counter(), time.process_time()


def measure_ours(name: str, folder: str, file: str, updates: int, parts: bool) -> None:
    work = WORK[name]
    roles, steps = make_roles(work, folder), count_steps()
    timers = profile(roles) if parts else Timers()
    config = ppo.PPOConfig(
        updates=1 + updates + parts,
        batch_size=BATCH,
        minibatch_size=BATCH // work.minibatches,
        epochs=work.epochs,
        learning_rate=LEARNING_RATE,
        beta=BETA,
        eos_penalty=0.0,
        temperature=TEMPERATURE,
        response_length=RESPONSE_LENGTH,
    )
    ends, lengths = [], []
    for stats in ppo.train_ppo(roles, load_tokenizer(preset(folder)), questions(work), config):
        ends.append(now())
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
    report(file, ends, lengths, made, weights, **measured)


def measure_trl(name: str, folder: str, file: str, updates: int, parts: bool) -> None:
    import trl

    if trl.__version__ != TRL_VERSION:
        raise SystemExit(f"trl is {trl.__version__}: give an interpreter that has {TRL_VERSION}.")
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    work, ends, lengths, steps = WORK[name], [], [], count_steps()

    class Timed(PPOTrainer):
        def log(self, logs: dict, start_time: float | None = None) -> None:
            """Called at the end of each update; its local variable is the last real token's."""
            ends.append(now())
            last = sys._getframe(1).f_locals["sequence_lengths"]
            lengths.append((last + 1).double().mean().item())

    def scalar_model():
        load = AutoModelForSequenceClassification.from_pretrained
        return load(folder, num_labels=1, dtype=torch.float32)

    policy = load_base(preset(folder))
    names = {}  # else the reference is the policy without its adapter
    if work.adapters:
        policy = PeftModel.from_pretrained(policy, ASSETS / "sft", is_trainable=True)
        policy.load_adapter(ASSETS / "sft", "reference")
        names = {"model_adapter_name": "default", "ref_adapter_name": "reference"}
    fresh = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    trainer = Timed(
        args=PPOConfig(
            output_dir=f"{folder}/trl",
            total_episodes=(updates + 1) * BATCH,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=1,
            num_mini_batches=work.minibatches,
            num_ppo_epochs=work.epochs,
            local_rollout_forward_batch_size=BATCH // work.minibatches,
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
            **names,
        ),
        processing_class=load_tokenizer(preset(folder)),
        model=policy,
        ref_model=None,
        reward_model=scalar_model(),
        value_model=scalar_model(),
        train_dataset=Dataset.from_dict({"input_ids": token_ids(work)}),
        peft_config=None if work.adapters else fresh,
    )
    weights = tensor_bytes(trainer.policy_model, trainer.reward_model, trainer.value_model)
    trainer.train()
    report(file, ends, lengths, len(steps), weights)


def tensor_bytes(*models: torch.nn.Module) -> int:
    """Bytes of parameters, buffers, and what bitsandbytes keeps to decode 4-bit weights."""
    tensors = []
    for model in models:
        tensors += [*model.parameters(), *model.buffers()]
        states = [vars(p.quant_state) for p in model.parameters() if hasattr(p, "quant_state")]
        tensors += [x for state in states for x in state.values() if isinstance(x, torch.Tensor)]
    return sum({x.data_ptr(): x.numel() * x.element_size() for x in tensors}.values())


def report(
    file: str,
    ends: list[tuple[float, float]],
    lengths: list[float],
    steps: float,
    weights: int,
    **more,
) -> None:
    """Write a side's results; of seconds those of each update but the first."""
    passed = [[end[i] - start[i] for start, end in pairwise(ends)] for i in (0, 1)]
    result = {
        "seconds": passed[0],
        "processor": passed[1],
        "length": statistics.mean(lengths),
        "steps": steps / len(ends),
        "bytes": weights,
        "threads": torch.get_num_threads(),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    Path(file).write_text(json.dumps(result | more))


def run(side: str, python: str, package: Path, folder: str, options: argparse.Namespace) -> dict:
    """Measure a side with an interpreter and a copy of the package, in a process of its own."""
    file = str(Path(folder, "report.json"))
    arguments = (options.work, folder, file, options.updates, options.profile)
    code = f"import ppo_update; ppo_update.measure_{side}{arguments!r}"
    path = os.pathsep.join([str(HERE.parent), str(package)])
    settings = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [python, "-c", code], env=os.environ | settings, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{python} failed:\n{done.stderr}")
    return json.loads(Path(file).read_text())


def checkout(ref: str, folder: str) -> Path:
    """The package as a commit has it, in a folder of its own."""
    packed = ["git", "-C", HERE.parents[2], "archive", "--format=tar", f"{ref}:rlhf_helpers"]
    package = Path(folder, "other", "rlhf_helpers")
    package.mkdir(parents=True)
    archive = subprocess.run(packed, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", package], check=True, input=archive)
    return package.parent


def add_up(rounds: list[dict]) -> dict:
    """A side's rounds as one: all updates' seconds, the largest peak."""
    lists = {key: [x for one in rounds for x in one[key]] for key in ("seconds", "processor")}
    means = {key: statistics.mean(one[key] for one in rounds) for key in ("length", "steps")}
    return rounds[0] | lists | means | {"peak": max(one["peak"] for one in rounds)}


def print_sides(sides: dict[str, dict]) -> None:
    heads = ("median s", "quartiles", "processor s", "quartiles", "tokens", "steps", "threads")
    print(f"{'one update':20}" + "".join(f"{x:>13}" for x in (*heads, "weights MB", "peak MB")))
    for name, side in sides.items():
        cells = []
        for key in ("seconds", "processor"):
            low, median, high = statistics.quantiles(side[key], method="inclusive")
            cells += [f"{median:.3f}", f"{low:.2f}-{high:.2f}"]
        cells += [f"{side['length']:.2f}", f"{side['steps']:g}", side["threads"]]
        cells += [f"{side['bytes'] / 1e6:.1f}", f"{side['peak'] / 1e6:.0f}"]
        print(f"{name:20}" + "".join(f"{cell:>13}" for cell in cells))


def print_ratios(sides: dict[str, dict]) -> None:
    ours, *others = sides
    for other in others:
        ratios = [
            statistics.median(sides[other][key]) / statistics.median(sides[ours][key])
            for key in ("seconds", "processor")
        ]
        print(f"{other} / {ours}: seconds {ratios[0]:.2f}, processor seconds {ratios[1]:.2f}")


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
    parser.add_argument("--work", choices=WORK, default="lesson")
    parser.add_argument("--against", metavar="REF", help="another commit, to measure beside")
    parser.add_argument("--updates", type=int, default=5, help="measured, after one for warm-up")
    parser.add_argument("--rounds", type=int, default=1, help="fresh processes of each side")
    parser.add_argument("--profile", action="store_true", help="where our update's time goes")
    options = parser.parse_args()
    disable_progress_bar()
    work, own = WORK[options.work], HERE.parents[2]
    with tempfile.TemporaryDirectory() as folder:
        make_model(work, folder)
        lengths = [len(ids) for ids in token_ids(work)]
        sides = {"rlhf_helpers": ("ours", sys.executable, own)}
        if options.against:
            package = checkout(options.against, folder)
            sides[options.against] = ("ours", sys.executable, package)
        if options.python:
            sides[f"TRL {TRL_VERSION}"] = ("trl", options.python, own)
        rounds = [
            {name: run(*side, folder, options) for name, side in sides.items()}
            for _ in range(options.rounds)
        ]
        measured = {name: add_up([one[name] for one in rounds]) for name in sides}
    print(
        f"{options.work}: {BATCH} of {len(lengths)} prompts of {min(lengths)} to {max(lengths)} "
        f"tokens, responses of up to {RESPONSE_LENGTH}, {work.epochs} epochs of {work.minibatches} "
        f"minibatches; {options.rounds} x {options.updates} updates, each after one for warm-up"
    )
    print_sides(measured)
    print_ratios(measured)
    if not options.python:
        print(f"TRL skipped: give the {what}")
    if options.profile:
        print_parts(measured["rlhf_helpers"])


if __name__ == "__main__":
    main()
