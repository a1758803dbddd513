"""Log-probabilities of tokens: values, gradients, memory, padding, bad input."""

import doctest
import json
from collections.abc import Callable
from math import inf, log, nan
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutput
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from rlhf_helpers import logprobs as module
from rlhf_helpers.logprobs import response_logprobs, token_entropy, token_logprobs

# Probabilities that are easy to add up: rows (1/2, 1/4, 1/4), (1/8, 1/8, 3/4), (1/3, 1/3, 1/3).
ROWS = torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 6.0], [5.0, 5.0, 5.0]]).log()


def rounding(numbers: Tensor, roundings: int) -> dict[str, float]:
    """Tolerances for what was computed from numbers of this size, rounded so many times."""
    unit = torch.finfo(numbers.dtype).eps * numbers.abs().max().item()
    return {"rtol": 0, "atol": roundings * unit}


def naive_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    return logprobs.gather(-1, tokens[..., None])[..., 0]


def random_logits(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def random_tokens(*shape: int, vocab_size: int, seed: int = 1) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def test_doctests():
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


# --- token_logprobs ---


def test_logprobs_by_hand():
    logprobs = token_logprobs(ROWS, torch.tensor([0, 2, 1]))
    torch.testing.assert_close(logprobs, torch.tensor([log(1 / 2), log(3 / 4), log(1 / 3)]))


def test_logprobs_with_temperature_by_hand():
    # T = 1/2 squares the weights: (4, 1, 1) / 6, (1, 1, 36) / 38, thirds.
    logprobs = token_logprobs(ROWS, torch.tensor([0, 2, 1]), temperature=0.5)
    torch.testing.assert_close(logprobs, torch.tensor([log(4 / 6), log(36 / 38), log(1 / 3)]))


def test_logprob_of_an_impossible_token_is_minus_infinity():
    logits = torch.tensor([[0.0, 0.0, -inf]]).expand(2, 3)
    torch.testing.assert_close(
        token_logprobs(logits, torch.tensor([0, 2])), torch.tensor([log(1 / 2), -inf])
    )


@pytest.mark.parametrize("shape", [(), (1,), (300,), (5, 7), (3, 300), (2, 3, 5), (2, 3, 200)])
def test_logprobs_of_any_shape_match_naive(shape):
    logits, tokens = random_logits(*shape, 11), random_tokens(*shape, vocab_size=11)
    torch.testing.assert_close(
        token_logprobs(logits, tokens, 0.7), naive_logprobs(logits, tokens, 0.7)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_match_trl(dtype, temperature):
    logits, tokens = random_logits(4, 9, 97, dtype=dtype), random_tokens(4, 9, vocab_size=97)
    logprobs = token_logprobs(logits, tokens, temperature)
    expected = selective_log_softmax(logits / temperature, tokens)
    assert logprobs.dtype == dtype
    torch.testing.assert_close(logprobs, expected, **rounding(logits / temperature, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_computed_in_float32(dtype):
    logits, tokens = random_logits(2, 9, 97).to(dtype), random_tokens(2, 9, vocab_size=97)
    for result, exact in [
        (token_logprobs(logits, tokens, 0.7), token_logprobs(logits.float(), tokens, 0.7)),
        (token_entropy(logits, 0.7), token_entropy(logits.float(), 0.7)),
    ]:
        assert result.dtype == torch.float32
        assert torch.equal(result, exact)
    # What computing in the input's dtype would give is visibly different.
    low = naive_logprobs(logits, tokens, 0.7).float()
    assert (low - naive_logprobs(logits.float(), tokens, 0.7)).abs().max() > 1e-4


def test_large_logits_neither_overflow_nor_lose_precision():
    logits = ROWS + 1e4
    expected = naive_logprobs(logits.double(), torch.tensor([0, 2, 1])).float()
    torch.testing.assert_close(token_logprobs(logits, torch.tensor([0, 2, 1])), expected)
    torch.testing.assert_close(token_entropy(logits)[2], torch.tensor(log(3)))


# --- token_entropy ---


def test_entropy_by_hand():
    expected = [
        0.5 * log(2) + 0.5 * log(4),
        0.25 * log(8) + 0.75 * log(4 / 3),
        log(3),
    ]
    torch.testing.assert_close(token_entropy(ROWS), torch.tensor(expected))


def test_entropy_with_temperature_by_hand():
    expected = 2 / 3 * log(3 / 2) + 1 / 3 * log(6)  # (4, 1, 1) / 6
    torch.testing.assert_close(token_entropy(ROWS, temperature=0.5)[0], torch.tensor(expected))


def test_entropy_and_its_gradient_with_impossible_tokens():
    logits = torch.tensor([[0.0, 0.0, -inf], [7.0, -inf, -inf]], requires_grad=True)
    entropy = token_entropy(logits)
    torch.testing.assert_close(entropy, torch.tensor([log(2), 0.0]))
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros_like(logits))  # both are extremes of H


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entropy_matches_trl(dtype):
    logits = random_logits(4, 150, 97, dtype=dtype)
    expected = entropy_from_logits(logits)
    torch.testing.assert_close(token_entropy(logits), expected, **rounding(logits, 8))


# --- gradients ---


def test_gradient_by_hand():
    # d log pi(a) / d z = (onehot(a) - pi) / T, with pi = (4, 1, 1) / 6 at T = 1/2.
    logits = ROWS[:1].clone().requires_grad_()
    token_logprobs(logits, torch.tensor([1]), temperature=0.5).sum().backward()
    expected = torch.tensor([[-4 / 6, 5 / 6, -1 / 6]]) / 0.5
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("positions", [1, 2, 4, 128])  # a chunk within and across sequences
def test_gradcheck(monkeypatch, temperature, positions):
    monkeypatch.setattr(module, "CHUNK_LOGITS", 5 * positions)
    logits = random_logits(3, 3, 5, dtype=torch.float64)[:, :-1].detach().requires_grad_()
    tokens = random_tokens(3, 2, vocab_size=5)
    assert torch.autograd.gradcheck(lambda z: token_logprobs(z, tokens, temperature), logits)
    assert torch.autograd.gradcheck(lambda z: token_entropy(z, temperature), logits)


# --- memory ---


def peak_and_kept_bytes(function: Callable[[], object], folder: Path) -> tuple[int, int]:
    """Peak memory allocated by `function`, and what its result keeps alive, in bytes.

    The profiler sees every allocation of the CPU allocator, also those inside an operator, such as
    the temporary that `torch.logsumexp` makes.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]"]
    live = peak = 0
    for change in sorted(changes, key=lambda event: event["ts"]):
        live += change["args"]["Bytes"]
        peak = max(peak, live)
    assert result is not None  # still alive here, and so is what autograd saved for it
    return peak, live


B, T, V = 16, 64, 4096
LOGITS_BYTES = 4 * B * T * V
CHUNK_BYTES = LOGITS_BYTES // 8


@pytest.fixture
def eight_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS", CHUNK_BYTES // 4)


@pytest.fixture(scope="module")
def big_logits() -> Tensor:
    return random_logits(B, T + 1, V)[:, :-1]  # a view that cannot be flattened in place


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("grad", [False, True])
def test_memory_detector_flags_full_size_versions(big_logits, grad, temperature, tmp_path):
    tokens = random_tokens(B, T, vocab_size=V)
    logits = big_logits.detach().requires_grad_(grad)
    peak, kept = peak_and_kept_bytes(lambda: naive_logprobs(logits, tokens, temperature), tmp_path)
    assert peak >= LOGITS_BYTES
    assert kept >= LOGITS_BYTES * grad  # autograd keeps the log-softmax
    hidden_peak, _ = peak_and_kept_bytes(lambda: logits.logsumexp(-1), tmp_path)
    assert hidden_peak >= LOGITS_BYTES


def test_memory_detector_flags_a_copy_saved_chunk_by_chunk(big_logits, tmp_path):
    logits = big_logits.detach().requires_grad_()
    _, kept = peak_and_kept_bytes(
        lambda: torch.stack([(row / 0.7).logsumexp(-1) for row in logits]), tmp_path
    )
    assert kept >= LOGITS_BYTES


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("grad", [False, True])
def test_no_second_tensor_of_the_size_of_the_logits(
    eight_chunks, big_logits, grad, temperature, tmp_path
):
    tokens = random_tokens(B, T, vocab_size=V)
    logits = big_logits.detach().requires_grad_(grad)
    for function, chunks in [
        (lambda: token_logprobs(logits, tokens, temperature), 2.1),
        (lambda: token_entropy(logits, temperature), 4.1),
    ]:
        peak, kept = peak_and_kept_bytes(function, tmp_path)
        assert peak < chunks * CHUNK_BYTES  # a chunk is 1/8 of the logits
        assert kept < 0.01 * LOGITS_BYTES


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_low_precision_logits_are_not_upcast_in_full(
    eight_chunks, big_logits, temperature, tmp_path
):
    tokens = random_tokens(B, T, vocab_size=V)
    logits = big_logits.bfloat16().requires_grad_()
    peak, kept = peak_and_kept_bytes(lambda: token_logprobs(logits, tokens, temperature), tmp_path)
    assert peak < 3.1 * CHUNK_BYTES
    assert kept < 0.01 * LOGITS_BYTES


def test_backward_makes_no_more_than_the_gradient_and_its_parts(eight_chunks, big_logits, tmp_path):
    tokens = random_tokens(B, T, vocab_size=V)
    logits = big_logits.detach().requires_grad_()
    logprobs = token_logprobs(logits, tokens, 0.7)
    peak, _ = peak_and_kept_bytes(lambda: torch.autograd.grad(logprobs.sum(), logits), tmp_path)
    assert peak < 2.1 * LOGITS_BYTES


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_response_logprobs_never_have_the_logits_in_full(
    eight_chunks, grad, temperature, adapted, tmp_path
):
    model = tiny_llama(vocab_size=V)
    asked = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if adapted else model
    input_ids = random_tokens(B, 4 + T, vocab_size=V)
    mask = torch.ones_like(input_ids)
    logits_bytes = 4 * B * (T + 1) * V

    def peak_of(function: Callable[[], object]) -> int:
        with torch.set_grad_enabled(grad):
            return peak_and_kept_bytes(function, tmp_path)[0]

    def model_logits(kept_positions: int) -> Tensor:
        return model(input_ids, attention_mask=mask, logits_to_keep=kept_positions).logits

    def naive() -> Tensor:
        return naive_logprobs(model_logits(T + 1)[:, :-1], input_ids[:, -T:], temperature)

    body_alone = peak_of(lambda: model.model(input_ids, attention_mask=mask).last_hidden_state)
    assert peak_of(naive) > body_alone + 1.5 * logits_bytes  # flagged
    peak = peak_of(lambda: response_logprobs(asked, input_ids, mask, T, temperature))
    assert peak < body_alone + 3.5 * CHUNK_BYTES


def test_temperature_1_is_the_default():
    model, input_ids = tiny_llama(), random_tokens(2, 6, vocab_size=97)
    arguments = (model, input_ids, torch.ones_like(input_ids), 3)
    assert torch.equal(response_logprobs(*arguments), response_logprobs(*arguments, 1.0))


# --- response_logprobs ---


def tiny_llama(vocab_size: int = 97, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.2,  # wide, so that a changed token changes the output visibly
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2
    )
    return GPT2LMHeadModel(config).eval()


# Llama's rotary positions are relative: only GPT-2's absolute ones show a wrong offset.
@pytest.fixture(scope="module", params=[tiny_llama, tiny_gpt2])
def model(request) -> torch.nn.Module:
    return request.param()


PROMPTS, RESPONSES = [3, 5, 1], [4, 2, 3]  # real tokens in each row
P, R = max(PROMPTS), max(RESPONSES)
LAYERS = 64  # roundings: two blocks of sums of 64 products, and sums of another length or order


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Three rows: prompts padded on the left, responses on the right, with random padding ids."""
    columns = torch.arange(P + R)
    start = P - torch.tensor(PROMPTS)[:, None]
    end = P + torch.tensor(RESPONSES)[:, None]
    mask = ((columns >= start) & (columns < end)).long()
    return random_tokens(3, P + R, vocab_size=97), mask


def test_response_logprobs_match_each_row_alone(model, batch):
    input_ids, mask = batch
    for temperature in (1.0, 0.7):
        logprobs = response_logprobs(model, input_ids, mask, R, temperature)
        assert logprobs.shape == (3, R)
        for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            alone = input_ids[row, P - prompt : P + response][None]  # no padding at all
            full = naive_logprobs(model(alone).logits[:, :-1], alone[:, 1:], temperature)
            torch.testing.assert_close(
                logprobs[row, :response], full[0, prompt - 1 :], **rounding(full, LAYERS)
            )


def test_what_the_model_is_given():
    class Recorder(torch.nn.Module):
        config = LlamaConfig(vocab_size=97)

        def forward(self, **inputs):
            self.inputs = inputs
            return CausalLMOutput(logits=torch.zeros(2, inputs["logits_to_keep"], 97))

    recorder = Recorder()
    input_ids = torch.tensor([[9, 9, 5, 6, 7, 9], [1, 2, 3, 4, 5, 6]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    response_logprobs(recorder, input_ids, mask, response_length=3)
    assert recorder.inputs["position_ids"].tolist() == [[0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5]]
    assert torch.equal(recorder.inputs["input_ids"], input_ids)
    assert torch.equal(recorder.inputs["attention_mask"], mask)
    assert recorder.inputs["logits_to_keep"] == 4
    assert recorder.inputs["use_cache"] is False


def test_response_logprobs_are_log_probabilities_of_a_whole_vocabulary(model):
    # Every possible last token: the probabilities add up to 1.
    input_ids = torch.tensor([[5, 6, 7, 0]]).repeat(97, 1)
    input_ids[:, -1] = torch.arange(97)
    logprobs = response_logprobs(model, input_ids, torch.ones_like(input_ids), 1)
    torch.testing.assert_close(logprobs.exp().sum(), torch.tensor(1.0))


def test_more_left_padding_changes_nothing(model, batch):
    input_ids, mask = batch
    more_ids = torch.cat([torch.full((3, 6), 13), input_ids], dim=1)
    more_mask = torch.cat([torch.zeros(3, 6, dtype=torch.long), mask], dim=1)
    expected = response_logprobs(model, input_ids, mask, R)
    logprobs = response_logprobs(model, more_ids, more_mask, R)
    real = mask[:, -R:].bool()
    torch.testing.assert_close(logprobs[real], expected[real], **rounding(expected, LAYERS))


def test_flipping_masked_tokens_changes_nothing(model, batch):
    input_ids, mask = batch
    flipped = torch.where(mask.bool(), input_ids, (input_ids + 1) % 97)
    assert not torch.equal(flipped, input_ids)
    real = mask[:, -R:].bool()
    expected = response_logprobs(model, input_ids, mask, R)[real]
    torch.testing.assert_close(
        response_logprobs(model, flipped, mask, R)[real], expected, rtol=0, atol=1e-6
    )
    # The test can fail: a real token does change its row.
    flipped[0, P - 1] = (flipped[0, P - 1] + 1) % 97
    changed = response_logprobs(model, flipped, mask, R)[real]
    assert (changed - expected).abs().max() > 1e-2


def test_a_boolean_mask_is_the_same_mask(model, batch):
    input_ids, mask = batch
    real = mask[:, -R:].bool()
    torch.testing.assert_close(
        response_logprobs(model, input_ids, mask.bool(), R)[real],
        response_logprobs(model, input_ids, mask, R)[real],
    )


def tiny_gemma() -> Gemma2ForCausalLM:
    """Its logits are bent after the output layer: chunks of that layer would be wrong."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.2}
    config = Gemma2Config(vocab_size=97, final_logit_softcapping=2.0, **sizes, **heads)
    return Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("positions", [2, 3, 1000])  # at a time
@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_gemma])
def test_gradients_reach_every_parameter_and_are_those_of_the_naive_version(
    monkeypatch, make, positions, temperature, trained_head
):
    monkeypatch.setattr(module, "CHUNK_LOGITS", 97 * positions)
    model = make().double()
    input_ids = random_tokens(2, 7, vocab_size=97)

    model.get_output_embeddings().requires_grad_(trained_head)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = torch.randn(2, 4, dtype=torch.float64)

    def gradients(logprobs: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((weights * logprobs).sum(), parameters))

    mask = torch.ones_like(input_ids)
    ours = gradients(response_logprobs(model, input_ids, mask, 4, temperature))
    logits = model(input_ids).logits[:, 2:-1]
    naive = gradients(naive_logprobs(logits, input_ids[:, 3:], temperature))
    for gradient, expected in zip(ours, naive, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-11)


def test_an_adapter_counts_in_pieces_of_the_output_layer_too(monkeypatch):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    input_ids = random_tokens(3, 9, vocab_size=97)
    mask = torch.ones_like(input_ids)
    whole = response_logprobs(model, input_ids, mask, 5)
    monkeypatch.setattr(module, "CHUNK_LOGITS", 97 * 4)
    pieces = response_logprobs(model, input_ids, mask, 5)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-5)
    with model.disable_adapter():
        assert (response_logprobs(model, input_ids, mask, 5) - whole).abs().max() > 0.1


# --- bad input ---


@pytest.mark.parametrize(
    ("logits", "tokens", "error", "message"),
    [
        (torch.zeros(2, 3, 5), torch.zeros(2, 4).long(), ValueError, r"\[2, 4\].*\[2, 3, 5\]"),
        (torch.zeros(2, 3, 5), torch.zeros(3).long(), ValueError, r"\[3\].*\[2, 3, 5\]"),
        (
            torch.zeros(2, 5),
            torch.tensor([0, 5]),
            ValueError,
            r"tokens is 5 at \[1\]: ids go from 0 to 4",
        ),
        (torch.zeros(2, 5), torch.tensor([-100, 0]), ValueError, r"tokens is -100 at \[0\]"),
        (torch.zeros(2, 5), torch.zeros(2), TypeError, r"tokens must be int64.*float32"),
        (torch.zeros(2, 5), torch.zeros(2).int(), TypeError, r"tokens must be int64.*int32"),
        (torch.zeros(2, 5).long(), torch.zeros(2).long(), TypeError, r"logits.*int64"),
        (torch.zeros(0, 5), torch.zeros(0).long(), ValueError, r"logits has shape \[0, 5\]"),
        (torch.zeros(()), torch.zeros(()).long(), ValueError, r"logits has shape \[\]"),
    ],
)
def test_bad_tokens_are_named(logits, tokens, error, message):
    with pytest.raises(error, match=message):
        token_logprobs(logits, tokens)


@pytest.mark.parametrize("temperature", [0.0, -0.5, nan, inf])
def test_bad_temperature_is_named(model, temperature):
    logits, tokens = torch.zeros(1, 3), torch.tensor([0])
    ids = torch.tensor([[1, 2]])
    for call in (
        lambda: token_logprobs(logits, tokens, temperature),
        lambda: token_entropy(logits, temperature),
        lambda: response_logprobs(model, ids, torch.ones_like(ids), 1, temperature),
    ):
        with pytest.raises(ValueError, match=f"temperature is {temperature}"):
            call()


@pytest.mark.parametrize("bad", [nan, inf])
@pytest.mark.parametrize("entry", [0, 4, 10])
def test_bad_logits_are_found_wherever_they_are(bad, entry):
    logits, tokens = random_logits(3, 200, 11), torch.zeros(3, 200).long()
    logits[1, 150, entry] = bad
    for call in (lambda: token_logprobs(logits, tokens), lambda: token_entropy(logits)):
        with pytest.raises(ValueError, match=r"logits at position \[1, 150\] .* NaN or \+inf"):
            call()


@pytest.mark.parametrize("response_length", [0, -1, 4, 5])
def test_bad_response_length_is_named(model, response_length):
    ids = torch.ones(2, 4).long()
    with pytest.raises(ValueError, match=f"response_length is {response_length}(:| .* 4 tokens)"):
        response_logprobs(model, ids, torch.ones_like(ids), response_length)


@pytest.mark.parametrize(
    ("input_ids", "mask", "error", "message"),
    [
        (
            [[1, 2, 3]],
            [[1, 1]],
            ValueError,
            r"attention_mask has shape \[1, 2\], input_ids \[1, 3\]",
        ),
        ([1, 2, 3], [1, 1, 1], ValueError, r"input_ids has shape \[3\]"),
        ([[1, 2], [1, 2]], [[1, 1], [0, 0]], ValueError, "attention_mask row 1 is all zeros"),
        ([[1, 2, 3]], [[1, 0, 1]], ValueError, r"column 1 is 0 at \[0\].*on the left"),
        (
            [[1, 2, 97]],
            [[1, 1, 1]],
            ValueError,
            r"input_ids is 97 at \[0, 2\]: ids go from 0 to 96",
        ),
        ([[1.0, 2.0, 3.0]], [[1, 1, 1]], TypeError, "input_ids must be int64"),
    ],
)
def test_bad_sequences_are_named(model, input_ids, mask, error, message):
    with pytest.raises(error, match=message):
        response_logprobs(model, torch.tensor(input_ids), torch.tensor(mask), 1)


def test_a_row_longer_than_the_context_is_named(model):
    ids = torch.ones(2, 129).long()
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # 128 tokens: as many as the model has positions
    assert response_logprobs(model, ids[:1], mask[:1], 2).shape == (1, 2)
    with pytest.raises(ValueError, match=r"in a row is 129 at \[1\].*context is 128"):
        response_logprobs(model, ids, mask, 2)


def test_bad_input_is_refused_before_the_model_runs():
    class NeverRuns(torch.nn.Module):
        config = LlamaConfig(vocab_size=97)

        def forward(self, **inputs):
            raise AssertionError("the model ran")

    ids = torch.tensor([[1, 2, 3]])
    mask = torch.ones_like(ids)
    with pytest.raises(AssertionError, match="the model ran"):
        response_logprobs(NeverRuns(), ids, mask, 1)
    for bad_call in [(ids + 96, mask, 1), (ids, mask * 0, 1), (ids, mask, 3), (ids, mask, 1, 0.0)]:
        with pytest.raises(ValueError, match=r"is 97|all zeros|response_length|temperature"):
            response_logprobs(NeverRuns(), *bad_call)
