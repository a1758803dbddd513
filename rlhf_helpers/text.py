"""From texts to token ids: tokenizer, chat template, prompts and demonstrations, padding."""

from collections.abc import Iterable
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.tokenization_utils_base import BatchEncoding

from rlhf_helpers.hub import from_hub, require_files
from rlhf_helpers.presets import Preset
from rlhf_helpers.validation import require_columns

# Reserved tokens that no text holds, by which vocabularies have one to pad with.
PADS = (
    "<|fim_pad|>",
    "<|padding|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<pad>",
    "[PAD]",
    "<unk>",
)
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ 'Human: ' + message['content'] + '\n\nAssistant:' }}{% endif %}"
    "{% endfor %}"
)


def load_tokenizer(preset: Preset) -> PreTrainedTokenizerBase:
    """The tokenizer of the preset's model, padding on the left.

    Many base models have no pad token, or EOS in its place, and no chat template. They get a
    reserved token of their vocabulary, so that no embedding is added, and a plain template.

    Raises:
        FileNotFoundError: if a shipped file is missing.
        ConnectionError: if the model is a hub id and the hub cannot be reached.
        ValueError: if pad and eos are the same token and no other is to be had, or the pocket
            model has no chat template.
    """
    tokenizer = bare_tokenizer(preset)
    if tokenizer.chat_template == PLAIN_TEMPLATE:
        print(f"{preset.model!r} has no chat template; prompts are 'Human: …\\n\\nAssistant:'")
    return tokenizer


def bare_tokenizer(preset: Preset) -> PreTrainedTokenizerBase:
    if preset.name == "pocket":
        require_files(Path(preset.model), "tokenizer.json", "tokenizer_config.json")
        # AutoTokenizer guesses the class from the model's config and can guess wrong.
        tokenizer = from_hub(preset.model, PreTrainedTokenizerFast.from_pretrained, preset.model)
    else:
        with_hub = {"revision": preset.revision, "local_files_only": preset.offline}
        tokenizer = from_hub(preset.model, AutoTokenizer.from_pretrained, preset.model, **with_hub)
        _complete(tokenizer)
    tokenizer.padding_side = "left"
    _check_tokenizer(tokenizer)
    return tokenizer


def _complete(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a base model's tokenizer what it lacks: a pad token that is not EOS, a template."""
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        vocabulary = tokenizer.get_vocab()
        reserved = (name for name in PADS if name in vocabulary and name != tokenizer.eos_token)
        tokenizer.pad_token = next(reserved, tokenizer.pad_token)
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if None in (pad, eos) or pad == eos:
        raise ValueError(
            f"pad token {tokenizer.pad_token!r} and eos token {tokenizer.eos_token!r} must be "
            "two tokens, else a response's end looks like padding; set tokenizer.pad_token"
        )
    if not tokenizer.chat_template:
        source = tokenizer.name_or_path
        raise ValueError(f"the tokenizer of {source!r} has no chat template; set one")


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], prompt_length: int
) -> BatchEncoding:
    """Apply the chat template and left-pad to the longest prompt of the batch.

    Args:
        prompts: B questions as plain text.
        prompt_length: the most tokens that a prompt may have with its template.

    Returns:
        `input_ids` and `attention_mask`, int64 [B, P] with P ≤ prompt_length.

    Raises:
        TypeError: if `prompts` is not a list of texts.
        ValueError: for a tokenizer without a chat template or a pad token of its own, no prompts,
            an empty one, one that contains a special token, or one that is too long: it is never
            cut.
    """
    rows = _prompt_tokens(tokenizer, prompts, prompt_length)
    return tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")


def encode_examples(
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    prompt_length: int,
    response_length: int,
) -> list[dict[str, list[int]]]:
    """Token ids of demonstrations: prompts in the chat template, completions closed by EOS.

    Args:
        dataset: columns `prompt` and `completion`.
        prompt_length, response_length: the most tokens of each, template and EOS included.

    Returns:
        For each row its token ids, as `{"prompt": [...], "response": [...]}`.

    Raises:
        TypeError: if a column holds something else than texts.
        ValueError: for a missing column, columns of different lengths, no rows, a text that is
            empty or contains a token of the template, or one that is too long: nothing is cut,
            since a cut response would have lost its EOS.

    Example: for the pocket tokenizer "what is hot?" and "fire." become the tokens of
    "<|user|> what is hot?<|assistant|>" and of " fire.<|eos|>".
    """
    require_columns(dataset, "dataset", ("prompt", "completion"))
    prompts, completions = (
        texts if isinstance(texts, str) else list(texts)
        for texts in (dataset["prompt"], dataset["completion"])
    )
    prompt_rows = _prompt_tokens(tokenizer, prompts, prompt_length)
    _check_texts(tokenizer, "completion", completions)
    if len(prompts) != len(completions):
        raise ValueError(
            f"there are {len(prompts)} prompts and {len(completions)} completions; give one of "
            "each for every example"
        )
    rows = tokenizer(completions, add_special_tokens=False)["input_ids"]
    response_rows = [[*row, tokenizer.eos_token_id] for row in rows]
    _check_lengths("completion", completions, response_rows, "response_length", response_length)
    pairs = zip(prompt_rows, response_rows, strict=True)
    return [{"prompt": prompt, "response": response} for prompt, response in pairs]


def check_examples(
    name: str,
    examples: list[dict[str, list[int]]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Raise ValueError unless encoded examples have a prompt and an EOS, and fit the model.

    Args:
        name: of `examples`, for the message.
    """
    if not examples:
        raise ValueError(f"{name} is empty: give at least one example")
    eos, context = tokenizer.eos_token_id, model.config.max_position_embeddings
    for i, example in enumerate(examples):
        if not {"prompt", "response"} <= set(example) or isinstance(example["prompt"], str):
            raise ValueError(
                f"{name}[{i}] is {example!s:.99}, without the token ids of a prompt and a "
                "response; give what encode_examples returns"
            )
        prompt, response = example["prompt"], example["response"]
        if not prompt or not response or response[-1] != eos:
            raise ValueError(
                f"{name}[{i}] has no prompt, or a response that does not end with EOS ({eos}): "
                f"{tokenizer.decode(prompt + response)!r}. Without EOS the model never learns to "
                "stop; encode_examples appends it"
            )
        if (largest := max(*prompt, *response)) >= model.config.vocab_size:
            raise ValueError(
                f"{name}[{i}] holds token id {largest}, and the model has "
                f"{model.config.vocab_size} tokens; use the model's own tokenizer"
            )
        if len(prompt) + len(response) > context:
            raise ValueError(
                f"{name}[{i}] has {len(prompt) + len(response)} tokens, more than the model's "
                f"context of {context}; leave it out or shorten it"
            )


def pad_examples(
    tokenizer: PreTrainedTokenizerBase, examples: list[dict[str, list[int]]]
) -> tuple[Tensor, Tensor, int]:
    """One batch of encoded examples: prompts padded on the left, responses on the right.

    Returns:
        `input_ids` and `attention_mask`, int64 [B, P + T], and P, the length of the longest prompt.

    Example: with prompts [5, 6] and [7], responses [8, 1] and [9, 9, 1], and 0 for padding,
    input_ids is [[5, 6, 8, 1, 0], [0, 7, 9, 9, 1]] and P is 2.
    """
    if not examples:
        raise ValueError("examples is empty: give at least one example")
    sides = {"prompt": "left", "response": "right"}
    prompts, responses = (
        tokenizer.pad(
            {"input_ids": [example[part] for example in examples]},
            padding_side=side,
            return_tensors="pt",
        )
        for part, side in sides.items()
    )
    names = ("input_ids", "attention_mask")
    input_ids, mask = (torch.cat([prompts[name], responses[name]], dim=1) for name in names)
    return input_ids, mask, prompts["input_ids"].shape[1]


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt in the chat template, up to where the assistant's response begins.

    Example: "what is hot?" becomes "<|user|> what is hot?<|assistant|>" for the pocket tokenizer.
    """
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def _prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], prompt_length: int
) -> list[list[int]]:
    _check_tokenizer(tokenizer)
    _check_texts(tokenizer, "prompt", prompts)
    texts = [render_prompt(tokenizer, prompt) for prompt in prompts]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    _check_lengths("prompt", prompts, rows, "prompt_length", prompt_length)
    return rows


def _check_texts(tokenizer: PreTrainedTokenizerBase, name: str, texts: list[str]) -> None:
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise TypeError(f"{name}s is {texts!r:.99}: give a list of texts")
    if bad := [i for i, text in enumerate(texts) if not isinstance(text, str)]:
        raise TypeError(f"{name} {bad[0]} is {texts[bad[0]]!r:.99}: give a list of texts")
    if not texts:
        raise ValueError(f"{name}s is empty: give at least one text")
    for i, text in enumerate(texts):
        if not text.strip():
            raise ValueError(f"{name} {i} is {text!r}: give it some text")
        if marks := [mark for mark in tokenizer.all_special_tokens if mark in text]:
            raise ValueError(
                f"{name} {i} contains {marks[0]!r}, a token of the template: remove it"
            )


def _check_lengths(name: str, texts: list[str], rows: list, limit_name: str, limit: int) -> None:
    if long := [i for i, row in enumerate(rows) if len(row) > limit]:
        i = long[0]
        raise ValueError(
            f"{name} {i} ({texts[i][:60]!r}) has {len(rows[i])} tokens with its template, and the "
            f"limit is {limit}; shorten it or raise {limit_name}"
        )
