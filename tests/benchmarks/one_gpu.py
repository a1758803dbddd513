"""What PPO takes on one GPU with a model of true size: memory, seconds, tokens per second.

python tests/benchmarks/one_gpu.py 0.5B|7B [--limit GB] [--updates N] [--device cpu]

The weights are random, of the architecture and size of Qwen2.5-0.5B or Llama-2-7B, so that nothing
is downloaded and nothing is learnt; memory and speed do not depend on what the weights are. With
--limit the process may use no more of the GPU's memory, as on a smaller one. Size `tiny` and the
device `cpu` are to try the script itself.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from rlhf_helpers import ppo
from rlhf_helpers.base import load_base
from rlhf_helpers.memory import measured_bytes, memory_table, model_sizes
from rlhf_helpers.presets import PRESETS, Preset, load_preset
from rlhf_helpers.roles import Roles
from rlhf_helpers.text import load_tokenizer

RANK = 16
QWEN = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Case:
    """A model, and the batch that PPO is measured with."""

    config: PreTrainedConfig
    prompt_length: int
    response_length: int
    batch: int
    minibatch: int
    checkpointing: bool


CASES = {
    "0.5B": Case(Qwen2Config(**QWEN), 128, 64, 64, 16, False),
    "7B": Case(LlamaConfig(), 448, 64, 4, 4, True),
    "tiny": Case(
        Qwen2Config(
            **QWEN | {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128}
            | {"num_hidden_layers": 2, "num_attention_heads": 2}
        ),
        24, 8, 4, 2, True,
    ),
}  # fmt: skip


def make_model(case: Case, folder: str) -> None:
    """Write the model with random weights in bfloat16, and the pocket's tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(case.config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    load_tokenizer(PRESETS["pocket"]).save_pretrained(folder)


def make_roles(preset: Preset) -> Roles:
    roles = Roles(load_base(preset), RANK)
    roles.add("reference", trainable=False)
    roles.add("policy", copy_of="reference")
    roles.add("reward", trainable=False)
    roles.add_head("reward")
    roles.heads["reward"].rescale(0.0, 1.0)
    roles.add("value", copy_of="reward")
    return roles


def timed(owner: object, name: str, seconds: dict[str, float], device: str) -> None:
    """Add what a function takes to `seconds[name]`, from now on."""
    function: Callable = getattr(owner, name)

    def wrapped(*arguments, **options):
        start = time.perf_counter()
        result = function(*arguments, **options)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
        return result

    setattr(owner, name, wrapped)


def print_memory(roles: Roles, case: Case, preset: Preset) -> None:
    there = sum(sum(kinds.values()) for kinds in measured_bytes(roles).values())
    weight_bytes = getattr(torch, preset.compute_dtype).itemsize
    table = memory_table(model_sizes(case.config), RANK, preset.double_quant, weight_bytes)
    rows = table["LoRA on 1 NF4 base"]
    computed = sum(row.weights + row.adapters for row in rows)
    print(f"four roles: {there / 1e9:.3f} GB of weights, computed {computed / 1e9:.3f}", end=" ")
    print(f"({there / computed - 1:+.1%}); with gradients and optimizer", end=" ")
    print(f"{sum(row.total for row in rows) / 1e9:.2f} GB, computed")


def measure(case: Case, preset: Preset, updates: int) -> None:
    roles, tokenizer, seconds = make_roles(preset), load_tokenizer(preset), {}
    print_memory(roles, case, preset)
    timed(ppo, "sample_responses", seconds, preset.device)
    timed(ppo, "collect_experience", seconds, preset.device)
    prompts = ["duck " * (case.prompt_length - 4)] * case.batch
    config = ppo.PPOConfig(
        updates=updates + 1,
        batch_size=case.batch,
        minibatch_size=case.minibatch,
        response_length=case.response_length,
        learning_rate=1e-6,
        eos_penalty=0.0,
    )
    begun = 0.0
    for stats in ppo.train_ppo(roles, tokenizer, prompts, config):
        if stats.update == 1:  # warm-up
            begun = stats.seconds
            seconds.clear()
    update = (stats.seconds - begun) / updates
    sampling, experience = (
        seconds[name] / updates for name in ("sample_responses", "collect_experience")
    )
    learning = update - experience
    tokens = case.batch * case.response_length
    print(f"an update of {case.batch} responses takes {update:.2f} s: sampling", end=" ")
    print(f"{sampling / update:.0%}, scoring {(experience - sampling) / update:.0%},", end=" ")
    print(f"learning {learning / update:.0%}; response tokens per second: sampled", end=" ")
    print(f"{tokens / sampling:,.0f}, learnt from {tokens * config.epochs / learning:,.0f}")
    if preset.device == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=CASES)
    parser.add_argument("--limit", type=float, help="GB of the GPU's memory that may be used")
    parser.add_argument("--updates", type=int, default=3, help="measured, after one for warm-up")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    if options.device == "cuda":
        device = torch.cuda.get_device_properties(0)
        print(f"{device.name}, {device.total_memory / 1e9:.0f} GB, torch {torch.__version__}")
        if options.limit:
            share = min(1.0, options.limit * 1e9 / device.total_memory)
            torch.cuda.set_per_process_memory_fraction(share)
    case = CASES[options.size]
    with tempfile.TemporaryDirectory() as folder:
        make_model(case, folder)
        sizes = {"prompt_length": case.prompt_length, "response_length": case.response_length}
        preset = load_preset(
            "single_gpu",
            model=folder,
            device=options.device,
            checkpointing=case.checkpointing,
            **sizes,
        )
        measure(case, preset, options.updates)


if __name__ == "__main__":
    main()
