"""RLOO or GRPO by TRL's trainers on one process or many, against the course's reward model.

On one GPU or CPU it needs no launcher; on several processes `accelerate launch` starts it with one
of the files in tools/accelerate:

    python tools/train_trl.py
    accelerate launch --config_file tools/accelerate/two_cpus.yaml tools/train_trl.py
    accelerate launch --config_file tools/accelerate/fsdp.yaml tools/train_trl.py --unquantized

`--preset single_gpu` starts from the adapters that lessons 01 and 02 have trained with it. Process
0 writes the adapter to --out; plain PEFT loads it. The files for GPUs have not been run.
"""

import argparse
import os
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from rlhf_helpers.base import load_base
from rlhf_helpers.checkpoints import find_adapter
from rlhf_helpers.presets import Preset, load_preset
from rlhf_helpers.roles import Roles
from rlhf_helpers.sources import prompt_dataset
from rlhf_helpers.text import load_tokenizer
from rlhf_helpers.trl_rewards import keep_float32, reward_function

METHODS = {"RLOO": (RLOOTrainer, RLOOConfig), "GRPO": (GRPOTrainer, GRPOConfig)}
GROUP = 4  # answers to a prompt


def settings(method: str, preset: Preset, out: Path, steps: int, rows: int, processes: int):
    """TRL's settings: lesson 09's, with `rows` answers in an optimizer step over all processes."""
    if rows % (processes * GROUP):
        raise ValueError(
            f"{rows} rows are no equal shares of whole groups of {GROUP} for {processes} "
            f"processes; give a multiple of {processes * GROUP}"
        )
    own = {"loss_type": "grpo", "use_bias_correction_kl": False} if method == "GRPO" else {}
    return METHODS[method][1](
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=rows // processes,
        num_generations=GROUP,
        max_completion_length=preset.response_length,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        beta=0.1,
        seed=preset.seed,
        use_cpu=preset.device == "cpu",
        bf16=preset.device == "cuda" and torch.cuda.is_bf16_supported(),
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **own,
    )


def train(method: str, preset: Preset, out: Path, steps: int, rows: int, quantized: bool) -> None:
    """Train the SFT adapter of a preset, and save it."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    args = settings(method, preset, out, steps, rows, processes)
    tokenizer, sft = load_tokenizer(preset), find_adapter(preset, "sft")
    base = load_base(preset, quantized=quantized)
    policy = PeftModel.from_pretrained(base, str(sft), is_trainable=True)
    judge = Roles(load_base(preset))  # on each process, whole: it is never cut
    judge.load("reward", find_adapter(preset, "reward"))
    prompts = prompt_dataset(preset)["prompt"]
    messages = [[{"role": "user", "content": x}] if isinstance(x, str) else x for x in prompts]
    trainer = METHODS[method][0](
        policy,
        reward_funcs=reward_function(judge, tokenizer, policy),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": x} for x in messages]),
        processing_class=tokenizer,
    )
    if quantized:
        keep_float32(trainer.model, sft)
    trainer.train()
    trainer.save_model(str(out))
    accelerator = trainer.accelerator
    accelerator.print(f"{processes} processes, {steps} steps; adapter in {out}")
    del trainer  # what shares the gradients must be gone before its group of processes, or the
    accelerator.free_memory()  # two can wait for each other for ever at the end
    accelerator.end_training()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=METHODS, default="RLOO")
    parser.add_argument("--preset", default="pocket")
    parser.add_argument("--out", type=Path, default=Path("runs/trl"))
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps")
    parser.add_argument("--rows", type=int, default=32, help="answers in a step, of all processes")
    parser.add_argument(
        "--unquantized", action="store_true", help="16 or 32 bits; what FSDP needs to cut a base"
    )
    given = parser.parse_args()
    quantized = not given.unquantized
    sizes = given.method, load_preset(given.preset), given.out, given.steps, given.rows
    train(*sizes, quantized)


if __name__ == "__main__":
    main()
