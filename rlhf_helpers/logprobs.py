"""Log-probabilities and entropies of tokens, without a log-softmax the size of the logits.

Logits for `B` sequences of `T` tokens over a vocabulary of `V` are the largest tensor of RLHF:
2.49 GB in float32 for B=8, T=512, V=151,936. `torch.log_softmax` makes a second one and autograd
keeps it, only to read one number in `V`. Here the log-softmax exists for `CHUNK_LOGITS` numbers at
a time. `response_logprobs` does the same with the output layer, so that the logits never exist in
full. Behind a frozen output layer the gradient of each chunk is taken at once, else the chunk is
computed again in the backward pass.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rlhf_helpers.guards import check_ids, check_part, check_softmax, context_length, refuse, upcast
from rlhf_helpers.kinds import Above, B, Floating, Ids, L, Mask, V, Whole
from rlhf_helpers.validation import checked

CHUNK_LOGITS = 2**24  # at a time: 67 MB in float32, or 110 positions of a vocabulary of 151,936
# What the configs of some models call a change of the logits behind the output layer.
RESCALED = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@checked
def token_logprobs(
    logits: Floating[..., V], tokens: Ids[...], temperature: Above[0] = 1.0
) -> Tensor:
    """Log-probability of each given token under the softmax of its logits.

    log π(a) = z_a − logsumexp(z), with z = logits / temperature. It equals
    `torch.log_softmax(logits / temperature, -1).gather(-1, tokens[..., None])[..., 0]`, which makes
    two more tensors of the logits' size and keeps one for the backward pass; this makes a few of
    `CHUNK_LOGITS` numbers and keeps none.

    Args:
        logits: `[..., V]`, floating point; float16 and bfloat16 are computed in float32. An entry
            of −inf is a token of probability 0.
        tokens: `[...]`, int64, ids in 0..V−1.
        temperature: divides the logits; positive. Score with the temperature used for sampling.

    Returns:
        `[...]` log-probabilities in nats, float32 (float64 for float64 logits), differentiable with
        respect to `logits`.

    Raises:
        TypeError: `logits` not floating point, or `tokens` not int64.
        ValueError: shapes that do not match, a token id out of range, a temperature that is not
            positive and finite, or logits without a softmax (NaN, +inf, or −inf only).

    Example:
        Probabilities 1/2, 1/4, 1/4; the tokens chosen are 0 and 2.

        >>> logits = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]).log()
        >>> token_logprobs(logits, torch.tensor([0, 2]))  # log 1/2 and log 1/4
        tensor([-0.6931, -1.3863])

        Temperature 1/2 squares them: 1/4, 1/16, 1/16, which normalise to 2/3, 1/6, 1/6.

        >>> token_logprobs(logits, torch.tensor([0, 2]), temperature=0.5).exp()
        tensor([0.6667, 0.1667])

    log π(a_t | s_t) of Schulman et al., "Proximal Policy Optimization Algorithms"
    (arXiv 1707.06347), equation 1. Derived in lesson 03.
    """
    check_ids("tokens", tokens, logits.shape[-1])
    return _reduce_vocabulary(_pick, logits, temperature, tokens)


@checked
def token_entropy(logits: Floating[..., V], temperature: Above[0] = 1.0) -> Tensor:
    """Entropy of the next-token distribution at each position.

    H = −Σ_a π(a) log π(a) = logsumexp(z) − Σ_a softmax(z)_a z_a, with z = logits / temperature.
    A token of probability 0 contributes 0. Computed in chunks, like `token_logprobs`.

    Args:
        logits: `[..., V]`, floating point; float16 and bfloat16 are computed in float32. An entry
            of −inf is a token of probability 0.
        temperature: divides the logits; positive.

    Returns:
        `[...]` entropies in nats, between 0 and log V, float32 (float64 for float64 logits),
        differentiable with respect to `logits`.

    Raises:
        TypeError: `logits` not floating point.
        ValueError: a temperature that is not positive and finite, or logits without a softmax
            (NaN, +inf, or −inf only).

    Example:
        A certain token, a fair coin (log 2) and four equal tokens (log 4).

        >>> impossible = -torch.inf
        >>> token_entropy(
        ...     torch.tensor([[7.0] + 3 * [impossible], 2 * [1.0] + 2 * [impossible], 4 * [3.0]])
        ... )
        tensor([0.0000, 0.6931, 1.3863])

    Shannon, "A Mathematical Theory of Communication" (1948), section 6; the bonus S of Schulman
    et al. (arXiv 1707.06347), equation 9. Derived in lesson 03.
    """
    return _reduce_vocabulary(_entropy, logits, temperature)


@checked
def response_logprobs(
    model: nn.Module,
    input_ids: Ids[B, L],
    attention_mask: Mask[B, L],
    response_length: Whole[1],
    temperature: Above[0] = 1.0,
) -> Tensor:
    """Log-probability of each response token given the prompt and the response before it.

    Entry t is log π(y_t | x, y_<t). The logits at one position are the distribution of the *next*
    token, so they are taken from the last prompt token to the last but one response token, and
    only those positions (and one more) are projected to the vocabulary, `CHUNK_LOGITS` numbers at
    a time if there are more. Position ids count the real tokens, so the amount of left padding does
    not matter.

    Args:
        model: a causal language model with transformers' interface, including `logits_to_keep`.
        input_ids: `[B, P + T]`, int64: prompts padded on the left, responses on the right.
        attention_mask: `[B, P + T]`, 1 for a real token, 0 for padding.
        response_length: T, at least 1 and less than P + T.
        temperature: divides the logits; positive. Score with the temperature used for sampling.

    Returns:
        `[B, T]` log-probabilities in nats, float32 (float64 for a float64 model), differentiable
        with respect to the model's parameters. Where a response is padding they mean nothing:
        use them under `response_mask`.

    Raises:
        TypeError: `input_ids` not int64.
        ValueError: shapes that do not match, a `response_length` that leaves no prompt or no
            response, an id outside the vocabulary, a row without any token or with padding right
            before its response, more tokens in a row than the model has positions, or what
            `token_logprobs` refuses.

    Example:
        A model whose output layer is 0 finds all of its 4 tokens equally likely: log 1/4.

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=4, hidden_size=8, intermediate_size=8)
        >>> layers = dict(num_hidden_layers=1, num_attention_heads=1)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, **layers))
        >>> _ = nn.init.zeros_(model.lm_head.weight)
        >>> prompt_and_response = torch.tensor([[0, 1, 2, 3]])
        >>> mask = torch.tensor([[0, 1, 1, 1]])  # one padding token, one prompt token
        >>> response_logprobs(model, prompt_and_response, mask, response_length=2).detach()
        tensor([[-1.3863, -1.3863]])

    log π(y | x) of Ziegler et al., "Fine-Tuning Language Models from Human Preferences"
    (arXiv 1909.08593), equation 2, token by token. Derived in lesson 03.
    """
    check_sequences(model, input_ids, attention_mask)
    _check_response(attention_mask, response_length)
    return last_logprobs(model, input_ids, attention_mask, response_length, temperature)


def model_inputs(input_ids: Tensor, attention_mask: Tensor) -> dict[str, object]:
    """What a model is called with; positions count the real tokens, whichever side is padded."""
    positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    given = {"input_ids": input_ids, "attention_mask": attention_mask}
    return given | {"position_ids": positions, "use_cache": False}


def last_logprobs(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, count: int, temperature: float = 1
) -> Tensor:
    """`[B, count]`: what `response_logprobs` computes, of the last columns, whatever they hold."""
    inputs = model_inputs(input_ids, attention_mask)
    tokens, vocab_size = input_ids[:, -count:], model.config.vocab_size
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    if tokens.numel() * vocab_size <= CHUNK_LOGITS or not _has_plain_head(causal):
        logits = model(**inputs, logits_to_keep=count + 1).logits
        return token_logprobs(logits[:, :-1], tokens, temperature)
    hidden = causal.base_model(**inputs).last_hidden_state[:, -count - 1 : -1]
    head = causal.get_output_embeddings()
    return _reduce_vocabulary(_pick, hidden, temperature, tokens, head=head)


def _has_plain_head(model: nn.Module) -> bool:
    """Whether the logits are the output layer of the body's last hidden state, and no more."""
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        return False
    return not any(getattr(model.config, name, None) for name in RESCALED)


def _pick(logprobs: Tensor, tokens: Tensor) -> Tensor:
    return logprobs.gather(-1, tokens[..., None]).squeeze(-1)


def _entropy(logprobs: Tensor) -> Tensor:
    # p log p tends to 0 with p, but 0 * -inf is NaN.
    finite = logprobs.masked_fill(logprobs == -torch.inf, 0.0)
    return 0.0 - (logprobs.exp() * finite).sum(-1)  # a plain minus makes a certain token's -0.0


def _reduce_vocabulary(
    statistic: Callable[..., Tensor],
    inputs: Tensor,
    temperature: float,
    *tokens: Tensor,
    head: nn.Module | None = None,
) -> Tensor:
    """Apply `statistic(logprobs, *tokens)` chunk by chunk: `[..., V]` becomes `[...]`.

    Args:
        inputs: the logits, or what `head` makes them from.
    """

    def reduce_chunk(*tokens_and_chunk: Tensor) -> Tensor:
        *chunk_tokens, chunk = tokens_and_chunk
        logits = head(chunk) if head else chunk
        logprobs = torch.log_softmax(upcast(logits) / temperature, dim=-1)
        return statistic(logprobs, *chunk_tokens).flatten()

    def part_of(chunk: Tensor, *chunk_tokens: Tensor) -> Tensor:
        # Without either, autograd would keep every chunk's log-softmax: together, what we avoid.
        if head and not any(parameter.requires_grad for parameter in head.parameters()):
            flat = [x.flatten() for x in chunk_tokens]
            return _RowwiseGradient.apply(partial(reduce_chunk, *flat), chunk.flatten(0, -2))
        options = {"use_reentrant": False, "preserve_rng_state": False}
        return checkpoint(reduce_chunk, *chunk_tokens, chunk, **options)

    vocab_size = head.weight.shape[0] if head else inputs.shape[-1]
    limit = max(1, CHUNK_LOGITS // vocab_size)
    parts = [part_of(*chunk) for chunk in _chunks(limit, inputs, *tokens)]
    result = torch.cat(parts).reshape(inputs.shape[:-1])
    check_softmax("logits", result)
    return result


class _RowwiseGradient(torch.autograd.Function):
    """A function from rows to one number each, whose gradient is computed at once.

    Nothing else has to be kept, or computed a second time. It is right only if no parameter inside
    is trained, and each number depends on its own row: then the gradient of their sum has in each
    row the gradient of that row's number.
    """

    @staticmethod
    def forward(ctx, function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        if not ctx.needs_input_grad[1]:
            return function(rows)
        with torch.enable_grad():
            rows = rows.detach().requires_grad_()
            numbers = function(rows)
        (gradient,) = torch.autograd.grad(numbers, rows, torch.ones_like(numbers))
        ctx.save_for_backward(gradient)
        return numbers.detach()

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[None, Tensor]:
        (gradient,) = ctx.saved_tensors
        return None, (gradient * upstream[:, None]).to(gradient.dtype)


def _chunks(limit: int, inputs: Tensor, *tokens: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield matching views of at most `limit` positions: some sequences, or part of one."""
    positions = inputs.shape[:-1].numel()
    if positions <= limit:
        yield inputs, *tokens
        return
    # Views, not a flattened copy: a slice such as logits[:, :-1] cannot be flattened in place.
    each = positions // len(inputs)
    if each > limit:
        for entry in zip(inputs, *tokens, strict=True):
            yield from _chunks(limit, *entry)
    else:
        yield from zip(*(x.split(limit // each) for x in (inputs, *tokens)), strict=True)


@checked
def check_sequences(model: nn.Module, input_ids: Ids[B, L], attention_mask: Mask[B, L]) -> None:
    """Raise unless these are token ids of the model's and their mask, and fit its context."""
    check_ids("input_ids", input_ids, model.config.vocab_size)
    tokens, context = attention_mask.sum(-1), context_length(model)
    why = f"the model's context is {context} tokens; shorten the prompt or the response."
    refuse("the number of tokens in a row", tokens, tokens > context, why)


def _check_response(attention_mask: Tensor, response_length: int) -> None:
    length = attention_mask.shape[1]
    check_part("response_length", response_length, length, "a prompt")
    column = length - response_length - 1
    before = attention_mask[:, column]
    why = "the first response token is predicted there. Pad prompts on the left."
    refuse(f"attention_mask column {column}", before, before == 0, why)
