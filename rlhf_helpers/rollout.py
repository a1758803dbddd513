"""Sampling responses from the distribution that is scored later: no top-k, no top-p."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from rlhf_helpers.guards import context_length
from rlhf_helpers.kinds import Above, Whole
from rlhf_helpers.logprobs import check_sequences
from rlhf_helpers.text import Prompt, encode_prompts
from rlhf_helpers.validation import checked


@dataclass(frozen=True)
class Rollout:
    """Prompts with sampled responses.

    Attributes:
        input_ids: int64 [B, P + T], prompts left-padded, responses right-padded.
        attention_mask: int64 [B, P + T], 1 on real tokens.
        response_mask: int64 [B, T], 1 up to and including EOS.
        texts: B strings, the responses without special tokens.
        finished: bool [B], whether a response ended with EOS.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    response_mask: torch.Tensor
    texts: list[str]
    finished: torch.Tensor


def mask_after_eos(tokens: torch.Tensor, eos: int) -> torch.Tensor:
    """1 on every token up to and including the first EOS, 0 behind it.

    Example:
        >>> mask_after_eos(torch.tensor([[7, 2, 2], [7, 8, 9]]), eos=2).tolist()
        [[1, 1, 0], [1, 1, 1]]
    """
    is_eos = (tokens == eos).long()
    return (is_eos.cumsum(-1) - is_eos == 0).long()


@torch.no_grad()
@checked
def sample_responses(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    response_length: Whole[1] = 32,
    prompt_length: Whole[1] | None = None,
    temperature: Above[0] = 1.0,
    seed: Whole[0] | None = None,
) -> Rollout:
    """Sample one response to each prompt from softmax(logits / temperature).

    Nothing of a model's own generation settings takes part, whatever its folder says: no top-k, no
    penalty, no beams. Only the tokenizer's EOS ends a response; further ids that a model's settings
    call EOS are tokens as all others, since masks, scores and rewards know one EOS.

    Args:
        prompts: questions as plain text, or dialogues as messages; the tokenizer's chat template is
            applied.
        response_length: the most tokens of a response, T.
        prompt_length: the most tokens of a prompt, P; None for what the model's context leaves.
        temperature: 1 samples from the model itself; > 0.
        seed: if given, the draw is repeatable and torch's own generator is left as it was.

    Raises:
        TypeError: for what is no model or no tokenizer.
        ValueError: for a temperature that is not above 0, and what `encode_prompts` raises.

    Lesson 00 meets it; lesson 04 trains on what it returns.
    """
    context = context_length(model)
    room = context - response_length
    prompt_length = room if prompt_length is None else prompt_length
    if prompt_length > room or room < 1:
        raise ValueError(
            f"prompts of up to {prompt_length} tokens and responses of {response_length} do not "
            f"fit the model's context of {context}; shorten one"
        )
    batch = encode_prompts(tokenizer, prompts, prompt_length).to(model.device)
    check_sequences(model, batch["input_ids"], batch["attention_mask"])
    settings = GenerationConfig(
        max_new_tokens=response_length,
        do_sample=True,
        temperature=temperature,
        top_k=0,  # generate's own default is 50, and would make KL estimates wrong
        top_p=1.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.random.fork_rng(enabled=seed is not None), _no_settings_of_its_own(causal):
        if seed is not None:
            torch.manual_seed(seed)
        input_ids = causal.generate(**batch, generation_config=settings)
    tokens = input_ids[:, batch["input_ids"].shape[1] :]
    response_mask = mask_after_eos(tokens, tokenizer.eos_token_id)
    return Rollout(
        input_ids=input_ids,
        attention_mask=torch.cat([batch["attention_mask"], response_mask], dim=1),
        response_mask=response_mask,
        texts=[t.strip() for t in tokenizer.batch_decode(tokens, skip_special_tokens=True)],
        finished=(tokens == tokenizer.eos_token_id).any(-1),
    )


@contextmanager
def _no_settings_of_its_own(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `generate` finds no settings of the model's to fill those in that ours leave open."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
