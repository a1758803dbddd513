"""From texts to token ids: tokenizer, chat template, BOS and EOS, dialogues, padding."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from unicodedata import normalize

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.tokenization_utils_base import BatchEncoding

from rlhf_helpers.guards import context_length, require_columns, shown
from rlhf_helpers.hub import from_hub, load_pretrained, require_files
from rlhf_helpers.presets import Preset
from rlhf_helpers.validation import checked

Message = dict[str, str]  # {"role": "user", "content": "what is hot?"}
Example = dict[str, list[int]]  # token ids: {"prompt": [5, 6], "response": [8, 1]}
Prompt = str | list[Message]  # a question, or a dialogue that ends with the user's turn
ROLES = ("system", "user", "assistant")
# For templates that write today's date: prompts must not change over night.
FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
MARKER = "Xq7"  # a text that no template writes
HALF = re.compile("[\ud800-\udfff]")  # a lone surrogate, which has no UTF-8

# Reserved tokens that no text holds, by which vocabularies have one to pad with.
_RESERVED = "<|fim_pad|> <|padding|> <|finetune_right_pad_id|> <|reserved_special_token_0|>"
PADS = [*_RESERVED.split(), "<pad>", "[PAD]", "<unk>"]
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + (eos_token if loop.last else '') }}"
    "{% else %}{{ '' if loop.first else '\n\n' }}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% else %}{{ 'Human: ' + message['content'] + '\n\nAssistant:' }}{% endif %}{% endif %}"
    "{% endfor %}"
)


class Unfit(ValueError):
    """A text or dialogue that cannot be used; the message is the reason, to be counted or shown."""


# --- the tokenizer -------------------------------------------------------------------------


@checked
def load_tokenizer(preset: Preset, report: bool = True) -> Tokenizer:
    """The tokenizer of the preset's model, padding on the left.

    Many base models have no pad token, or EOS in its place, and no chat template. They get a
    reserved token of their vocabulary, so that no embedding is added, and a plain template.

    Args:
        report: whether to print that the template is the plain one.

    Raises:
        FileNotFoundError: if a shipped file is missing.
        ConnectionError: if the model is a hub id and the hub cannot be reached.
        ValueError: if pad and eos are the same token, or pad has no embedding, and no other is to
            be had; or the pocket model has no chat template.
    """
    if preset.name == "pocket":
        require_files(Path(preset.model), "tokenizer.json", "tokenizer_config.json")
        # AutoTokenizer guesses the class from the model's config and can guess wrong.
        tokenizer = from_hub(preset.model, PreTrainedTokenizerFast.from_pretrained, preset.model)
    else:
        tokenizer = load_pretrained(preset, AutoTokenizer.from_pretrained)
        config = load_pretrained(preset, AutoConfig.from_pretrained)
        _complete(tokenizer, config.get_text_config().vocab_size)
    tokenizer.padding_side = "left"
    _check_tokenizer(tokenizer)
    if report and tokenizer.chat_template == PLAIN_TEMPLATE:
        print(f"{preset.model!r} has no chat template; prompts are 'Human: …\\n\\nAssistant:'")
    return tokenizer


@checked
def _check_tokenizer(tokenizer: Tokenizer) -> None:
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if None in (pad, eos) or pad == eos:
        both = f"pad token {tokenizer.pad_token!r} and eos token {tokenizer.eos_token!r}"
        raise ValueError(f"{both} must be two tokens; set tokenizer.pad_token")
    if not tokenizer.chat_template:
        name = tokenizer.name_or_path
        raise ValueError(f"the tokenizer of {name!r} has no chat template; set one")


def _complete(tokenizer: Tokenizer, embeddings: int) -> None:
    """Give a base model's tokenizer what it lacks: a pad token that is not EOS, a template."""
    ids, pad, eos = tokenizer.get_vocab(), tokenizer.pad_token_id, tokenizer.eos_token
    if pad in (None, tokenizer.eos_token_id) or pad >= embeddings:
        spare = (p for p in PADS if ids.get(p, embeddings) < embeddings and p != eos)
        tokenizer.pad_token = next(spare, tokenizer.pad_token)
    for name, token in (("pad", tokenizer.pad_token), ("eos", eos)):
        if ids.get(token, 0) >= embeddings:
            raise ValueError(
                f"{name} token {token!r} has id {ids[token]}, and the model has embeddings for "
                f"{embeddings} tokens; set tokenizer.{name}_token to one of those, and save it"
            )
    template = tokenizer.get_chat_template() if tokenizer.chat_template else PLAIN_TEMPLATE
    tokenizer.chat_template = FIXED_DATE + template if "strftime_now" in template else template


def opening(tokenizer: Tokenizer) -> list[int]:
    """The ids that a tokenizer puts before plain text, which its model was trained to see: BOS.

    Example: `[2]` for Gemma's, `[]` for Qwen's and for the pocket tokenizer.
    """
    plain, whole = (tokenizer("a", add_special_tokens=own)["input_ids"] for own in (False, True))
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return whole[:start]


def reserved(tokenizer: Tokenizer) -> re.Pattern:
    """Matches what must not stand in a text: half of a character, or what is a special token.

    The latter are the tokens marked as special, those of the form <|…|>, and others that the chat
    template is made with.
    """
    added = tokenizer.added_tokens_decoder.values()
    marks = {token.content for token in added if token.special}
    plain = {token.content for token in added if token.content.strip()} - marks
    marks |= {m for m in plain if m in tokenizer.chat_template or re.fullmatch(r"<\|.*\|>", m)}
    marks |= set(tokenizer.all_special_tokens) - {""}
    longest_first = "|".join(map(re.escape, sorted(marks, key=len, reverse=True)))
    starts = "".join(re.escape(char) for char in sorted({mark[0] for mark in marks}))
    return re.compile(f"{HALF.pattern}|(?=[{starts}])(?:{longest_first})")  # Gemma has 6,000 marks


# --- dialogues -----------------------------------------------------------------------------


def content_text(content: object) -> str:
    """A message's content as one text: itself, or the text parts of a list, joined.

    Raises:
        Unfit: for a part that is no text, such as an image.

    Example:
        >>> content_text([{"type": "text", "text": "what is "}, {"type": "text", "text": "tea?"}])
        'what is tea?'
    """
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [None]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise Unfit("with parts that are no text")
    return "".join(texts)


def messages_of(value: Prompt) -> list[Message]:
    """A text, which is what the user says, or a list of messages, as role and text of each.

    Raises:
        Unfit: for what is neither, and as `content_text`.
    """
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    turns = value if isinstance(value, list) else [None]
    if not all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns):
        raise Unfit("neither text nor messages")
    return [{"role": turn["role"], "content": content_text(turn["content"])} for turn in value]


def as_messages(prompt: Prompt) -> list[Message]:
    """A prompt as the messages of a dialogue; an empty system message is left out.

    Raises:
        Unfit: as `messages_of`; for an empty message; a role that is not system, user or assistant;
            or turns that do not alternate, from the user's first to the user's last, behind one
            system message at most.

    Example:
        >>> as_messages("what is tea?")
        [{'role': 'user', 'content': 'what is tea?'}]
    """
    talk = messages_of(prompt)
    if talk and talk[0]["role"] == "system" and not talk[0]["content"].strip():
        talk = talk[1:]
    if any(turn["role"] not in ROLES for turn in talk):
        raise Unfit("with other roles")
    if not talk or not all(turn["content"].strip() for turn in talk):
        raise Unfit("empty")
    turns = [turn["role"] for turn in talk[talk[0]["role"] == "system" :]]
    if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise Unfit("with turns that do not alternate")
    return talk


def answer_text(answer: Prompt) -> str:
    """An answer as text; in TRL's conversational format it is a list of one assistant message.

    Raises:
        Unfit: for anything else.

    Example:
        >>> answer_text([{"role": "assistant", "content": "a drink."}])
        'a drink.'
    """
    match answer:
        case str():
            return answer
        case [{"role": "assistant", "content": content}]:
            return content_text(content)
    raise Unfit("neither a text nor one message of the assistant")


def readable(prompt: Prompt) -> str:
    """A prompt to print: the question, or of a dialogue each turn behind who speaks.

    Example:
        >>> print(readable([{"role": "user", "content": "hi"}, {"role": "assistant", "content":
        ...     "hello"}, {"role": "user", "content": "why?"}]))
        user: hi
        assistant: hello
        user: why?
    """
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn['role']}: {content_text(turn['content'])}" for turn in prompt)


def same_prompt(prompt: Prompt) -> str:
    """A key that is equal for prompts which differ only in blanks or in how accents are coded."""
    turns = ((turn["role"], turn["content"]) for turn in as_messages(prompt))
    words = ((role, *normalize("NFC", content).split()) for role, content in turns)
    return "\n".join(map(" ".join, words))


def render(tokenizer: Tokenizer, prompt: Prompt) -> str:
    """A prompt in the chat template, up to where the assistant's response begins.

    That is what the template itself puts before an answer, also where its generation prompt is
    another: with none at all, or with a thought begun that the answer would become a part of.

    Raises:
        Unfit: as `as_messages`, and for a dialogue that the template refuses or leaves out a
            message of; many know no system message.

    Example: "what is hot?" becomes "<|user|> what is hot?<|assistant|>" for the pocket tokenizer.
    """
    messages = as_messages(prompt)
    marked = [turn | {"content": f"{MARKER}{i}."} for i, turn in enumerate(messages)]
    text = _apply(tokenizer, marked, add_generation_prompt=True)
    if not all(turn["content"] in text for turn in marked):
        raise Unfit("not repeated in full by the chat template")
    return _before_answer(tokenizer, messages)[0]


def _before_answer(tokenizer: Tokenizer, messages: list[Message]) -> tuple[str, str]:
    """What the template puts before an answer, and the blanks that belong to the answer's side."""
    text = _apply(tokenizer, messages, add_generation_prompt=True)
    try:
        whole = _apply(tokenizer, [*messages, {"role": "assistant", "content": MARKER}])
    except Unfit:  # a template for prompts only
        return text, ""
    before, found, _ = whole.rpartition(MARKER)
    behind = before.removeprefix(text)
    if not found or (before.startswith(text) and not behind.strip()):
        return text, behind if found else ""
    return before, ""


def _apply(tokenizer: Tokenizer, messages: list[Message], **options) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program, and may fail in any way
        raise Unfit("refused by the chat template") from error


# --- token ids -----------------------------------------------------------------------------


def prompt_tokens(tokenizer: Tokenizer, rendered: list[str]) -> list[list[int]]:
    """Token ids of rendered prompts, with BOS once where the tokenizer puts it before plain text.

    Without it many models are lost: Gemma 3 270M needs 4.9 nats per token of a human answer, 2.7
    with it. A template may have written it already.
    """
    first = opening(tokenizer)
    rows = _ids(tokenizer, rendered)
    return [row if row[: len(first)] == first else [*first, *row] for row in rows]


def response_tokens(
    tokenizer: Tokenizer, rendered: list[str], answers: list[str]
) -> list[list[int]]:
    """Token ids of answers as they stand in the dialogue, behind the prompt, closed by one EOS.

    Some templates put a blank before the answer, and some tokenizers one before every text. So the
    ids are those that the whole dialogue has behind its prompt's; where the two cannot be told
    apart, since a token spans both, those of the answer alone.
    """
    _, blank = _before_answer(tokenizer, [{"role": "user", "content": "a"}])
    texts = [blank + answer for answer in answers]
    wholes = [prompt + text for prompt, text in zip(rendered, texts, strict=True)]
    encoded = (_ids(tokenizer, part) for part in (rendered, wholes, texts))
    rows = []
    for before, whole, alone in zip(*encoded, strict=True):
        joined = whole[len(before) :] if whole[: len(before)] == before else alone
        rows.append([*joined, tokenizer.eos_token_id])
    return rows


def _ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def encode_prompts(
    tokenizer: Tokenizer, prompts: list[Prompt], prompt_length: int
) -> BatchEncoding:
    """Apply the chat template and left-pad to the longest prompt of the batch.

    Args:
        prompts: B questions as plain text, or dialogues as messages, the user's last.
        prompt_length: the most tokens that a prompt may have with its template.

    Returns:
        `input_ids` and `attention_mask`, int64 [B, P] with P ≤ prompt_length.

    Raises:
        TypeError: if `prompts` is not a list of texts or dialogues.
        ValueError: for a tokenizer without a chat template or a pad token of its own, no prompts,
            an empty one, a dialogue that `as_messages` or the template refuses, one that contains a
            special token, or one that is too long: it is never cut.
    """
    rows = prompt_tokens(tokenizer, _render_all(tokenizer, prompts))
    _check_lengths("prompt", prompts, rows, "prompt_length", prompt_length)
    return tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")


def encode_examples(
    tokenizer: Tokenizer, dataset: Dataset, prompt_length: int, response_length: int
) -> list[Example]:
    """Token ids of demonstrations: prompts in the chat template, completions closed by EOS.

    Args:
        dataset: columns `prompt` and `completion`, texts or TRL's lists of messages.
        prompt_length, response_length: the most tokens of each, template and EOS included.

    Returns:
        For each row its token ids, as `{"prompt": [...], "response": [...]}`.

    Raises:
        TypeError: if a column holds something else than texts or messages.
        ValueError: for a missing column, columns of different lengths, no rows, a text that is
            empty or contains a special token, a dialogue that cannot be used, or one that is too
            long: nothing is cut, since a cut response would have lost its EOS.

    Example: for the pocket tokenizer "what is hot?" and "fire." become the tokens of
    "<|user|> what is hot?<|assistant|>" and of " fire.<|eos|>".
    """
    require_columns(dataset, "dataset", ("prompt", "completion"))
    prompts = dataset["prompt"]
    rendered = _render_all(tokenizer, prompts)
    answers = _texts(tokenizer, "completion", dataset["completion"], _answer)
    if (given := len(rendered)) != (there := len(answers)):
        raise ValueError(f"{given} prompts and {there} completions; give one of each")
    prompt_rows = prompt_tokens(tokenizer, rendered)
    _check_lengths("prompt", prompts, prompt_rows, "prompt_length", prompt_length)
    rows = response_tokens(tokenizer, rendered, answers)
    _check_lengths("completion", answers, rows, "response_length", response_length)
    pairs = zip(prompt_rows, rows, strict=True)
    return [{"prompt": prompt, "response": response} for prompt, response in pairs]


def _render_all(tokenizer: Tokenizer, prompts: list[Prompt]) -> list[str]:
    _check_tokenizer(tokenizer)

    def rendered(prompt: Prompt, marks: re.Pattern) -> str:
        _check_words("\n".join(turn["content"] for turn in as_messages(prompt)), marks)
        return render(tokenizer, prompt)

    return _texts(tokenizer, "prompt", prompts, rendered)


def _answer(answer: Prompt, marks: re.Pattern) -> str:
    return _check_words(answer_text(answer), marks)


def _check_words(text: str, marks: re.Pattern) -> str:
    """The text; Unfit if it is empty or holds what `reserved` matches."""
    if not text.strip():
        raise Unfit("empty")
    if mark := marks.search(text):
        raise Unfit(f"with {mark[0]!r}, a special token or half of a character: remove it")
    return text


def _texts(
    tokenizer: Tokenizer, name: str, values: Iterable[Prompt], text_of: Callable
) -> list[str]:
    """The text of every value; an error for the first that has none or cannot be used."""
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise TypeError(f"{name}s is {values!r:.99}: give a list of texts")
    marks, texts = reserved(tokenizer), []
    for i, value in enumerate(values):
        if not isinstance(value, str | list):
            raise TypeError(f"{name} {i} is {value!r:.99}: give a list of texts")
        try:
            texts.append(text_of(value, marks))
        except Unfit as reason:
            mend = "give a text, or messages: a system's at most, then user and assistant in turn"
            raise ValueError(f"{name} {i} is {value!r:.99}, {reason}; {mend}") from None
    if not texts:
        raise ValueError(f"{name}s is empty: give at least one text")
    return texts


def _check_lengths(name: str, texts: list[Prompt], rows: list, limit_name: str, limit: int) -> None:
    if not isinstance(limit, int):
        raise ValueError(f"{limit_name} is {limit!r}: it must be a whole number")
    if long := [i for i, row in enumerate(rows) if len(row) > limit]:
        i = long[0]
        raise ValueError(
            f"{name} {i} ({readable(texts[i])[:60]!r}) has {len(rows[i])} tokens with its template,"
            f" and the limit is {limit}; shorten it or raise {limit_name}"
        )


def check_examples(
    name: str, examples: list[Example], model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    """Raise ValueError unless encoded examples have a prompt and an EOS, and fit the model.

    Args:
        name: of `examples`, for the message.
    """
    check_encoded(name, examples)
    eos, vocabulary = tokenizer.eos_token_id, model.config.vocab_size
    for i, example in enumerate(examples):
        if fault := _fault(example, eos, vocabulary, context_length(model)):
            raise ValueError(f"{name}[{i}] {fault}")


def check_encoded(name: str, examples: list[Example]) -> None:
    """Raise ValueError unless there are examples, each with a list of ids for both its parts."""
    if not examples:
        raise ValueError(f"{name} is empty: give at least one example")
    for i, example in enumerate(examples):
        parts = example if isinstance(example, Mapping) else {}
        if not all(isinstance(parts.get(part), list) for part in ("prompt", "response")):
            given = f"{name}[{i}] is {shown(example)}, without the token ids of a prompt and a"
            raise ValueError(f"{given} response; give what encode_examples returns")


def _fault(example: Example, eos: int, vocabulary: int, context: int) -> str | None:
    tokens = [*example["prompt"], *example["response"]]
    if not example["prompt"] or example["response"][-1:] != [eos]:
        fault = f"has no prompt, or a response that does not end with EOS ({eos}): {example!s:.99}"
        return f"{fault}. Without it the model never learns to stop; encode_examples appends it"
    if wrong := [t for t in tokens if not (isinstance(t, int) and 0 <= t < vocabulary)]:
        return f"holds token id {wrong[0]!r} of {vocabulary}; use the model's own tokenizer"
    if len(tokens) > context:
        fault = f"has {len(tokens)} tokens, more than the model's context of {context}"
        return f"{fault}; leave it out or shorten it"
    return None


def pad_examples(tokenizer: Tokenizer, examples: list[Example]) -> tuple[Tensor, Tensor, int]:
    """One batch of encoded examples: prompts padded on the left, responses on the right.

    Returns:
        `input_ids` and `attention_mask`, int64 [B, P + T], and P, the length of the longest prompt.

    Example: with prompts [5, 6] and [7], responses [8, 1] and [9, 9, 1], and 0 for padding,
    input_ids is [[5, 6, 8, 1, 0], [0, 7, 9, 9, 1]] and P is 2.
    """
    check_encoded("examples", examples)

    def padded(part: str, side: str) -> BatchEncoding:
        rows = {"input_ids": [example[part] for example in examples]}
        return tokenizer.pad(rows, padding_side=side, return_tensors="pt")

    prompts, responses = padded("prompt", "left"), padded("response", "right")
    names = ("input_ids", "attention_mask")
    input_ids, mask = (torch.cat([prompts[name], responses[name]], dim=1) for name in names)
    return input_ids, mask, prompts["input_ids"].shape[1]


def like_length_batches(examples: list[dict[str, list[int]]], rows: int) -> list[list[int]]:
    """Indices of encoded examples in batches of like length, which need little padding.

    Args:
        rows: examples in a batch; the last may have fewer.

    Example:
        >>> examples = [{"prompt": [5] * n, "response": [1]} for n in (9, 2, 8, 3)]
        >>> like_length_batches(examples, rows=2)
        [[1, 3], [0, 2]]
    """
    order = sorted(range(len(examples)), key=lambda i: sum(map(len, examples[i].values())))
    return [sorted(order[start : start + rows]) for start in range(0, len(order), rows)]
