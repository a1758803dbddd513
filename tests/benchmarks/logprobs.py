"""Log-probabilities of responses at a large vocabulary: seconds and peak memory of three ways.

python tests/benchmarks/logprobs.py [--vocab 151936] [--batch 8] [--repeats 3]

A model of one narrow layer with the output layer of Qwen2.5-0.5B (width 896): what is compared is
what happens behind the body. All three end in the gradient with respect to the body. Peak memory is
what torch's CPU allocator gave out, beyond what was there before.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import selective_log_softmax

from rlhf_helpers.logprobs import response_logprobs

PROMPT, RESPONSE, WIDTH = 64, 256, 896


def make_model(vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=14,
    )
    model = LlamaForCausalLM(config)
    model.lm_head.requires_grad_(False)  # as under LoRA
    model.model.embed_tokens.requires_grad_(False)
    return model


def naive(model: LlamaForCausalLM, ids: Tensor, mask: Tensor) -> Tensor:
    logprobs = model(ids, attention_mask=mask).logits[:, PROMPT - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, ids[:, PROMPT:, None])[..., 0]


def selective(model: LlamaForCausalLM, ids: Tensor, mask: Tensor) -> Tensor:
    """As TRL does: response positions only, and no second tensor of the logits' size kept."""
    logits = model(ids, attention_mask=mask, logits_to_keep=RESPONSE + 1).logits
    return selective_log_softmax(logits[:, :-1], ids[:, PROMPT:])


def ours(model: LlamaForCausalLM, ids: Tensor, mask: Tensor) -> Tensor:
    return response_logprobs(model, ids, mask, RESPONSE)


def peak_bytes(function: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]"]
    live = peak = 0
    for change in sorted(changes, key=lambda event: event["ts"]):
        live += change["args"]["Bytes"]
        peak = max(peak, live)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    options = parser.parse_args()
    model = make_model(options.vocab)
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, PROMPT + RESPONSE)
    ids = torch.randint(options.vocab, shape, generator=generator)
    mask, results, first = torch.ones_like(ids), {}, None
    for way in (naive, selective, ours):

        def with_gradient(way: Callable = way) -> Tensor:
            logprobs = way(model, ids, mask)
            torch.autograd.grad(logprobs.mean(), parameters)
            return logprobs.detach()

        seconds = []
        for _ in range(options.repeats):
            start = time.perf_counter()
            logprobs = with_gradient()
            seconds.append(time.perf_counter() - start)
        first = logprobs if first is None else first
        torch.testing.assert_close(logprobs, first, rtol=0, atol=1e-3)
        results[way.__name__] = (min(seconds), peak_bytes(with_gradient))
    print(f"[{options.batch}, {PROMPT} + {RESPONSE}], vocabulary {options.vocab:,}, with gradient")
    for name, (seconds, peak) in results.items():
        ratios = [x / y for x, y in zip((seconds, peak), results["naive"], strict=True)]
        print(f"{name:10}{seconds:8.2f} s{peak / 1e6:10.0f} MB", end="")
        print(f"{ratios[0]:8.2f} of the time, {ratios[1]:.3f} of the memory of naive")


if __name__ == "__main__":
    main()
