"""Tokens a second of `sample_responses`, and of plain `generate` for the same prompts.

python tests/benchmarks/rollout.py [--prompts 256] [--repeats 5]

The pocket model with the shipped SFT adapter. Tokens are those of responses, up to and including
EOS; both sample at temperature 1 without filters, up to 32 tokens.
"""

import argparse
import time
from collections.abc import Callable

import torch
from transformers.utils.logging import disable_progress_bar

from rlhf_helpers.base import load_base
from rlhf_helpers.checkpoints import find_adapter
from rlhf_helpers.presets import PRESETS
from rlhf_helpers.roles import Roles
from rlhf_helpers.rollout import sample_responses
from rlhf_helpers.sources import prompt_dataset
from rlhf_helpers.text import encode_prompts, load_tokenizer

LENGTH = 32


def tokens_per_second(sample: Callable[[], torch.Tensor], repeats: int) -> float:
    """Of the fastest of some repeats; `sample` returns the mask of response tokens."""
    rates = []
    for seed in range(repeats):
        torch.manual_seed(seed)
        start = time.perf_counter()
        mask = sample()
        rates.append(mask.sum().item() / (time.perf_counter() - start))
    return max(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    disable_progress_bar()
    preset = PRESETS["pocket"]
    tokenizer, roles = load_tokenizer(preset), Roles(load_base(preset))
    roles.load("sft", find_adapter(preset, "sft"))
    model = roles.use("sft")
    prompts = prompt_dataset(preset)["prompt"][: options.prompts]
    encoded = encode_prompts(tokenizer, prompts, 64)

    def ours() -> torch.Tensor:
        return sample_responses(model, tokenizer, prompts, LENGTH).response_mask

    def plain() -> torch.Tensor:
        ids = model.generate(
            **encoded, max_new_tokens=LENGTH, do_sample=True, top_k=0, pad_token_id=0
        )
        ended = ids[:, encoded["input_ids"].shape[1] :] == tokenizer.eos_token_id
        return ended.cumsum(-1) - ended.int() == 0

    rates = {way.__name__: tokens_per_second(way, options.repeats) for way in (ours, plain)}
    print(f"{len(prompts)} prompts, {torch.get_num_threads()} threads: sample_responses", end=" ")
    print(f"{rates['ours']:,.0f} tokens a second, plain generate {rates['plain']:,.0f}", end=" ")
    print(f"({rates['ours'] / rates['plain']:.2f} of it)")


if __name__ == "__main__":
    main()
