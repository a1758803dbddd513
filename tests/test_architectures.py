"""Causal architectures of transformers: what works on all of them, and which are refused.

All are tiny and random, saved as the hub has them, and loaded in NF4 by `load_base`. A change of
transformers, peft or the package that moves one from a list to the other is seen here.
"""

import copy

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from rlhf_helpers import base as base_module
from rlhf_helpers import logprobs as logprobs_module
from rlhf_helpers.base import fingerprint, hidden_width, linear_shapes, load_base, same_base
from rlhf_helpers.logprobs import response_logprobs
from rlhf_helpers.memory import measured_bytes, memory_table, model_sizes
from rlhf_helpers.presets import load_preset
from rlhf_helpers.roles import Roles
from rlhf_helpers.rollout import sample_responses

RANK, ALPHA = 4, 8
SMALL = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
ONE_KEY = {"num_key_value_heads": 1}
WIDE = ONE_KEY | {"head_dim": 64}
WINDOW = {"sliding_window": 8}
LATENT = {
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
DEEP = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 64}
XGLM = {"d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 2}
MPT = {"d_model": 64, "n_heads": 2, "n_layers": 2, "max_seq_len": 128}
NEO = {"attention_types": [[["global", "local"], 1]], "window_size": 8, "intermediate_size": None}

WORK = {
    "apertus": ONE_KEY,
    "arcee": ONE_KEY,
    "biogpt": {},
    "bloom": {},
    "codegen": {"rotary_dim": 16, "num_attention_heads": 4},
    "cohere": ONE_KEY,
    "cohere2": ONE_KEY | WINDOW,
    "ctrl": {"n_embd": 64, "dff": 128, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "cwm": ONE_KEY | WINDOW | {"head_dim": 32, "bos_token_id": 2},
    "ernie4_5": ONE_KEY,
    "exaone4": WIDE | WINDOW,
    "gemma": WIDE,
    "gemma2": WIDE | WINDOW,
    "gemma3_text": WIDE | WINDOW,
    "gemma4_text": WIDE | {"global_head_dim": 64, "hidden_size_per_layer_input": 0},
    "glm": WIDE,
    "glm4": WIDE,
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"num_layers": 2, "num_heads": 2} | NEO,
    "gpt_neox": {},
    "gptj": {"rotary_dim": 16},
    "granite": ONE_KEY | {"logits_scaling": 3.0},
    "granite_swa": ONE_KEY | WINDOW,
    "helium": ONE_KEY | {"head_dim": 32},
    "internlm3": ONE_KEY,
    "jais2": ONE_KEY,
    "llama": ONE_KEY,
    "minicpm3": LATENT,
    "ministral3": WIDE,
    "mistral": ONE_KEY | WINDOW,
    "mpt": MPT,
    "nanochat": ONE_KEY,
    "nemotron": ONE_KEY,
    "olmo": {},
    "olmo2": ONE_KEY,
    "olmo3": ONE_KEY | WINDOW,
    "openai-gpt": {"n_positions": 128},
    "opt": {"ffn_dim": 128},
    "opt, projected": {"ffn_dim": 128, "word_embed_proj_dim": 128, "do_layer_norm_before": False},
    "persimmon": {},
    "phi": {},
    "phi3": ONE_KEY,
    "qwen2": ONE_KEY,
    "qwen3": WIDE,
    "seed_oss": WIDE,
    "smollm3": WIDE,
    "stablelm": ONE_KEY,
    "starcoder2": ONE_KEY,
    "vaultgemma": WIDE | WINDOW,
    "xglm": XGLM,
    "youtu": LATENT,
}

NO_TEXT = "is no causal model of text alone"
AHEAD = "sees the tokens that it is to predict"
STATE = "keeps a recurrent state, into which left padding would go"
OUTSIDE = "has weights that neither NF4 nor adapters reach"
REFUSED = {
    "bamba": ({}, STATE),
    "bart": ({}, NO_TEXT),
    "bert": ({}, AHEAD),
    "deepseek_v3": (LATENT | DEEP | {"first_k_dense_replace": 1}, OUTSIDE),
    "falcon": ({}, "FalconLinear, that stays out of NF4"),
    "falcon_h1": ({}, STATE),
    "falcon_mamba": ({}, STATE),
    "gemma3": (None, NO_TEXT),
    "gpt_oss": (EXPERTS, OUTSIDE),
    "granitemoe": (EXPERTS, OUTSIDE),
    "hrm_text": ({}, AHEAD),
    "jamba": ({}, STATE),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, OUTSIDE),
    "mamba": ({}, STATE),
    "megatron-bert": ({}, AHEAD),
    "mixtral": (EXPERTS, OUTSIDE),
    "olmo_hybrid": ({}, STATE),
    "qwen2_moe": (EXPERTS, OUTSIDE),
    "qwen3_moe": (EXPERTS, OUTSIDE),
    "qwen3_next": ({}, STATE),
    "recurrent_gemma": ({}, STATE),
    "roberta": ({}, AHEAD),
    "roformer": ({}, AHEAD),
    "rwkv": ({}, STATE),
    "t5": (None, NO_TEXT),
    "trocr": ({}, "gives no logits of the response alone"),
    "xlm": ({}, AHEAD),
    "xlstm": ({}, STATE),
}
PROMPTS = ["what does the duck say?", "what is hot?"]


def config_of(kind, own):
    return CONFIG_MAPPING[kind.split(",")[0]](**SMALL | own)


def plant_randomness(config):
    """Every setting that draws at random in training mode, at 0.3."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            plant_randomness(value)
        elif isinstance(value, float) and ("drop" in name or "noise" in name):
            setattr(config, name, 0.3)


@pytest.fixture(scope="module", params=WORK)
def preset(request, tmp_path_factory):
    """Of a random model of one architecture."""
    config = config_of(request.param, WORK[request.param])
    plant_randomness(config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(folder)
    return load_preset("single_gpu", model=str(folder), device="cpu", double_quant=False)


IDS = torch.randint(2, 1024, (2, 12), generator=torch.Generator().manual_seed(0))
ONES = torch.ones_like(IDS)


def padded(left):
    zeros = torch.zeros(2, left, dtype=torch.int64)
    return torch.cat([zeros, IDS], 1), torch.cat([zeros, ONES], 1)


def made_roles(preset, *names):
    """Roles whose B is not zero, in the shape that `load_base` gives them."""
    roles = Roles(load_base(preset), RANK, ALPHA)
    for number, name in enumerate(names):
        roles.add(name, seed=number)
        generator = torch.Generator().manual_seed(number)
        for key, parameter in roles.parameters(name).items():
            if "lora_B" in key:
                parameter.data.normal_(std=0.05, generator=generator)
    return roles


def naive(model):
    """Log-probabilities of the last four tokens, without padding, cache or pieces."""
    logits = model(input_ids=IDS, attention_mask=ONES, use_cache=False).logits[:, -5:-1]
    return logits.log_softmax(-1).gather(-1, IDS[:, -4:, None]).squeeze(-1)


def test_all_linear_layers_are_in_nf4_and_get_adapters(preset):
    roles = made_roles(preset, "policy")
    layers = {n for n, m in roles.base.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert {name.removesuffix(".base_layer") for name in layers} == set(roles.shapes)
    adapters = {key.split(".lora_")[0] for key in roles.state("policy")}
    assert adapters == {f"base_model.model.{name}" for name in roles.shapes}
    assert linear_shapes(base_module.on_meta(roles.base.config)) == roles.shapes


def test_gradients_are_those_of_a_model_of_its_own(preset):
    roles = made_roles(preset, "policy", "value")
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    alone = get_peft_model(load_base(preset), config)
    set_peft_model_state_dict(alone, roles.state("policy"))
    roles.use("value")
    roles.use("policy")
    response_logprobs(roles.model, *padded(3), 4).sum().backward()
    naive(alone).sum().backward()
    expected = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
    found = {
        n.replace(".policy.", ".default."): p.grad for n, p in roles.parameters("policy").items()
    }
    assert {name for name, gradient in found.items() if gradient is not None} == set(expected)
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        assert torch.allclose(found[name], gradient, atol=1e-3 * scale + 1e-7), name
    assert sum(gradient.abs().sum() for gradient in expected.values()) > 0


@pytest.mark.parametrize("pieces", [False, True])
def test_logprobs_are_those_of_the_full_softmax(preset, monkeypatch, pieces):
    if pieces:
        monkeypatch.setattr(logprobs_module, "CHUNK_LOGITS", 1024)
    model = made_roles(preset, "policy").use("policy")
    for left in (0, 3):
        found = response_logprobs(model, *padded(left), 4)
        assert torch.allclose(found, naive(model), atol=1e-4)


def test_sampling_with_cache_and_padding_follows_the_full_forward(preset, tokenizer):
    """At temperature 0, nearly: each token is the likeliest under a pass without either."""
    model = made_roles(preset, "policy").use("policy")
    drawn = sample_responses(model, tokenizer, PROMPTS, 8, temperature=1e-6, seed=0)
    for ids, mask, kept in zip(
        drawn.input_ids, drawn.attention_mask, drawn.response_mask, strict=True
    ):
        real, tokens = ids[mask.bool()], int(kept.sum())
        with torch.no_grad():
            logits = model(input_ids=real[None], use_cache=False).logits[0, -tokens - 1 : -1]
        best = logits.gather(-1, real[-tokens:, None]).squeeze(-1)
        assert torch.allclose(best, logits.max(-1).values, atol=1e-4)


def test_values_do_not_depend_on_padding(preset):
    roles = made_roles(preset, "value")
    roles.add_head("value")
    expected = roles.values("value", IDS, ONES)
    assert torch.allclose(roles.values("value", *padded(3))[:, 3:], expected, atol=1e-4)
    assert expected.std() > 0
    assert roles.heads["value"].weight.shape == (1, hidden_width(roles.base))


def test_a_role_is_saved_and_loaded(preset, tmp_path):
    roles = made_roles(preset, "policy")
    roles.add_head("policy")
    roles.save("policy", tmp_path / "adapter")
    other = Roles(load_base(preset), RANK, ALPHA)
    other.load("read", tmp_path / "adapter")
    peft = PeftModel.from_pretrained(load_base(preset), str(tmp_path / "adapter"))
    state = roles.state("policy")
    assert all(torch.equal(t, state[name]) for name, t in other.state("read").items())
    assert torch.equal(other.values("read", IDS, ONES), roles.values("policy", IDS, ONES))
    expected = naive(roles.use("policy"))
    assert torch.equal(naive(other.use("read")), expected)
    assert torch.equal(naive(peft.eval()), expected)


@pytest.mark.parametrize("quantized", [True, False])
def test_bytes_from_the_config_are_those_of_the_model(preset, quantized):
    config = AutoConfig.from_pretrained(preset.model)
    roles = Roles(load_base(preset, quantized=quantized), RANK, ALPHA)
    measured = sum(measured_bytes(roles)["base"].values())
    assert base_module._weight_bytes(config, preset, quantized) == pytest.approx(measured, rel=0.05)
    table = memory_table(model_sizes(config), RANK, double_quant=False, weight_bytes=4)
    row = table["LoRA on 1 NF4 base" if quantized else "LoRA on 1 base"][0]
    assert row.weights == pytest.approx(measured, rel=0.05)


def test_two_passes_in_training_mode_are_equal(preset):
    roles = made_roles(preset, "policy")
    model = roles.use("policy").train()
    with torch.no_grad():
        assert torch.equal(naive(model), naive(model))


def test_an_adapter_moves_to_the_unquantized_base(preset, tmp_path):
    roles = made_roles(preset, "policy")
    roles.save("policy", tmp_path / "adapter")
    other = Roles(load_base(preset, quantized=False), RANK, ALPHA)
    other.load("policy", tmp_path / "adapter")
    state = roles.state("policy")
    assert all(torch.equal(t, state[name]) for name, t in other.state("policy").items())
    found = response_logprobs(other.use("policy"), *padded(3), 4)
    assert torch.allclose(found, naive(other.model), atol=1e-4)


@pytest.mark.parametrize("quantized", [True, False])
def test_a_merged_role_is_a_plain_model_that_answers_alike(preset, tmp_path, quantized):
    roles = Roles(load_base(preset, quantized=quantized), RANK, ALPHA)
    roles.add("other")
    made_roles(preset, "policy").save("policy", tmp_path / "adapter")
    roles.load("policy", tmp_path / "adapter")
    roles.use("other")
    roles.merged("policy").save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert type(plain) is type(roles.base) and roles.active == "other"
    with torch.no_grad():
        found, expected = naive(plain), naive(roles.use("policy"))
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, naive(roles.use("other")), atol=1e-2)


@pytest.mark.parametrize("quantized", [True, False])
def test_a_dense_role_answers_alike_and_samples_the_same(preset, tokenizer, quantized):
    roles = Roles(load_base(preset, quantized=quantized), RANK, ALPHA)
    roles.add("policy")
    roles.add("other")
    for weight in [w for name, w in roles.parameters("policy").items() if "lora_B" in name]:
        weight.data.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = naive(roles.use("policy"))
    drawn = sample_responses(roles.model, tokenizer, PROMPTS, 4, seed=0)
    roles.use("other")
    with roles.dense("policy") as model:
        assert len(roles._dense) == len(roles.shapes)
        torch.testing.assert_close(naive(model), expected, rtol=0, atol=1e-5)
        same = sample_responses(model, tokenizer, PROMPTS, 4, seed=0)
    assert torch.equal(same.input_ids, drawn.input_ids)
    with torch.no_grad():
        assert torch.equal(naive(roles.model), expected)
        assert not torch.allclose(naive(roles.use("other")), expected, atol=1e-2)


# --- refused ---


def save_config(kind, own, folder):
    """With an empty file of weights: to read them would fail otherwise."""
    config = CONFIG_MAPPING[kind]() if own is None else config_of(kind, own)
    config.save_pretrained(folder)
    (folder / "model.safetensors").touch()
    return load_preset("single_gpu", model=str(folder), device="cpu")


@pytest.mark.parametrize("kind", REFUSED)
def test_what_roles_would_be_wrong_on_is_refused_before_any_weights(tmp_path, kind):
    own, reason = REFUSED[kind]
    with pytest.raises(ValueError, match=f"is of type '{kind}', wh.* {reason}.*; choose "):
        load_base(save_config(kind, own, tmp_path))


def test_falcon_works_without_nf4(tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_of("falcon", {})).save_pretrained(tmp_path)
    preset = load_preset("single_gpu", model=str(tmp_path), device="cpu", quantized=False)
    roles = made_roles(preset, "policy")
    model = roles.use("policy")
    expected = response_logprobs(model, *padded(3), 4)
    assert torch.allclose(expected, naive(model), atol=1e-4)
    with roles.dense("policy"):  # its layers are of a kind of its own, which may compute otherwise
        assert not roles._dense
        assert torch.equal(response_logprobs(model, *padded(3), 4), expected)


def test_a_transposed_layer_is_known_again_in_nf4(tmp_path):
    """GPT-2 keeps weights as [in, out], NF4 as [out, in]; of 2048 rows a fingerprint reads half."""
    config = config_of("gpt2", {"hidden_size": 512, "num_hidden_layers": 1})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    preset = load_preset("single_gpu", model=str(tmp_path), device="cpu")
    plain, nf4 = (fingerprint(load_base(preset, quantized=q)) for q in (False, True))
    assert same_base(plain, nf4) and same_base(nf4, plain)
    for numbers, others in zip(plain["linear"], nf4["linear"], strict=True):
        assert numbers == pytest.approx(others, abs=0.5 * numbers[0])


def test_a_pad_token_that_the_model_has_not_is_no_matter(tmp_path):
    config = config_of("llama", ONE_KEY)
    AutoModelForCausalLM.from_config(copy.deepcopy(config)).save_pretrained(tmp_path)
    config.pad_token_id = 4096
    config.save_pretrained(tmp_path)
    preset = load_preset("single_gpu", model=str(tmp_path), device="cpu")
    assert load_base(preset).config.pad_token_id is None


def test_the_lists_are_disjoint_and_long():
    assert not set(WORK) & set(REFUSED)
    assert (len(WORK), len(REFUSED)) == (52, 28)
