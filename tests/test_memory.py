"""What models cost: counts by hand, and against PEFT, bitsandbytes and real tensors."""

import copy
import doctest
from dataclasses import replace

import bitsandbytes.functional as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
)

from rlhf_helpers import memory
from rlhf_helpers.base import load_base
from rlhf_helpers.memory import (
    ModelSizes,
    RoleBytes,
    activation_bytes,
    logits_bytes,
    lora_parameters,
    measured_bytes,
    memory_table,
    model_sizes,
    nf4_bytes,
)
from rlhf_helpers.presets import load_preset
from rlhf_helpers.roles import Roles

FULL, SEPARATE = "4 full models", "LoRA on 4 bases"
SHARED, NF4 = "LoRA on 1 base", "LoRA on 1 NF4 base"


def config(family, vocabulary, width, inner, layers, heads, kv_heads, tied):
    return family(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
    )


KNOWN = {
    "Llama-2-7B": config(LlamaConfig, 32000, 4096, 11008, 32, 32, 32, False),
    "Qwen2.5-1.5B": config(Qwen2Config, 151936, 1536, 8960, 28, 12, 2, True),
    "Qwen2.5-0.5B": config(Qwen2Config, 151936, 896, 4864, 24, 14, 2, True),
    "SmolLM2-135M": config(LlamaConfig, 49152, 576, 1536, 30, 9, 3, True),
}


@pytest.fixture(scope="module")
def known():
    return {name: model_sizes(config) for name, config in KNOWN.items()}


def totals(table):
    return {way: sum(row.total for row in rows) for way, rows in table.items()}


def test_doctests():
    results = doctest.testmod(memory)
    assert results.attempted > 0
    assert results.failed == 0


# --- lora_parameters ---


def test_lora_parameters_by_hand():
    assert lora_parameters([(3, 4)], 2) == 2 * 4 + 3 * 2
    assert lora_parameters([(3, 4), (3, 4), (5, 2)], 1) == 7 + 7 + 7
    assert lora_parameters([torch.Size([3, 4])], 2) == 14


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_lora_parameters_are_those_that_peft_trains(rank):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    shapes = [tuple(layer.weight.shape) for layer in layers]
    assert len(set(shapes)) == 4  # key and value layers are narrower than query and output
    peft_model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
    trainable, _ = peft_model.get_nb_trainable_parameters()
    assert lora_parameters(shapes, rank) == trainable


@pytest.mark.parametrize(
    ("shapes", "rank", "message"),
    [
        ([(3, 4)], 0, "rank is 0: .* at least 1"),
        ([(3, 4)], 2.0, r"rank is 2\.0: it must be a whole number"),
        ([(3, 4), (0, 4)], 2, r"shapes\[1\] is \(0, 4\): give .* at least 1"),
        ([(3, -4)], 2, r"shapes\[0\] is \(3, -4\): give .* at least 1"),
        ([(3, 4, 5)], 2, r"shapes\[0\] is \(3, 4, 5\): give \(out, in\)"),
        ([], 2, "shapes is empty: give"),
    ],
)
def test_lora_parameters_refuses_nonsense(shapes, rank, message):
    with pytest.raises(ValueError, match=message):
        lora_parameters(shapes, rank)


# --- nf4_bytes ---


def test_nf4_bytes_by_hand():
    assert nf4_bytes(1, double_quant=False) == 1 + 4
    assert nf4_bytes(1) == 1 + 1 + 4
    assert nf4_bytes(65, double_quant=False) == 33 + 2 * 4
    assert nf4_bytes(65) == 33 + 2 + 4
    assert nf4_bytes(16384) == 8192 + 256 + 4
    assert nf4_bytes(16385) == 8193 + 257 + 2 * 4


@pytest.mark.parametrize("blocks", [1, 7])
def test_bits_per_weight(blocks):
    weights = blocks * 64 * 256
    assert 8 * nf4_bytes(weights) / weights == 4 + 8 / 64 + 32 / (64 * 256)
    assert 8 * nf4_bytes(weights, double_quant=False) / weights == 4.5


@pytest.mark.parametrize("weights", [2, 62, 64, 100, 16384, 16386, 50002])
def test_nf4_bytes_are_those_that_bitsandbytes_keeps(weights):
    # Even numbers: version 0.49 fails on odd ones.
    x = torch.randn(weights, generator=torch.Generator().manual_seed(0))
    for double_quant in (False, True):
        codes, state = bnb.quantize_4bit(
            x, blocksize=64, quant_type="nf4", compress_statistics=double_quant
        )
        kept = [codes, state.absmax] + ([state.state2.absmax] if double_quant else [])
        assert nf4_bytes(weights, double_quant) == sum(t.numel() * t.element_size() for t in kept)


@pytest.mark.parametrize("weights", [0, -64, 64.0])
def test_nf4_bytes_refuses_nonsense(weights):
    with pytest.raises(ValueError, match=f"weights is {weights}: it must be a whole number"):
        nf4_bytes(weights)


# --- model_sizes ---


def test_sizes_of_known_models(known):
    # as their model cards and safetensors files give them
    assert known["Llama-2-7B"].parameters == 6_738_415_616
    assert known["Qwen2.5-1.5B"].parameters == 1_543_714_304
    assert known["Qwen2.5-0.5B"].parameters == 494_032_768
    assert known["SmolLM2-135M"].parameters == 134_515_008


def test_sizes_by_hand(known):
    llama, qwen = known["Llama-2-7B"], known["Qwen2.5-0.5B"]
    assert llama.output == 32000 * 4096
    assert llama.other == 32000 * 4096 + (2 * 32 + 1) * 4096  # embeddings; norms
    assert len(llama.shapes) == 32 * 7 and set(llama.shapes) == {
        (4096, 4096),
        (11008, 4096),
        (4096, 11008),
    }
    assert qwen.output == 0  # tied
    biases = 24 * (896 + 128 + 128)  # of query, key and value
    assert qwen.other == 151936 * 896 + (2 * 24 + 1) * 896 + biases
    assert qwen.width == 896 and qwen.head == 897


def test_sizes_of_the_base_are_those_of_the_real_one(pocket, base):
    sizes = model_sizes(base.config)
    real = load_base(pocket, quantized=False)
    assert sizes.parameters == sum(p.numel() for p in real.parameters())
    assert list(sizes.shapes) == list(Roles(real).shapes.values())


def test_counting_changes_neither_the_config_nor_the_generator():
    llama = config(LlamaConfig, 16, 64, 64, 1, 2, 2, False)
    before, state = copy.deepcopy(llama.to_dict()), torch.get_rng_state()
    model_sizes(llama)
    assert llama.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shapes": ()}, "shapes is empty"),
        ({"shapes": ((3, 0),)}, r"shapes\[0\] is \(3, 0\)"),
        ({"other": -1}, "other is -1: it must be a whole number, at least 0"),
        ({"output": 0.5}, "output is 0.5"),
        ({"width": 0}, "width is 0: .* at least 1"),
    ],
)
def test_sizes_that_no_model_has(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelSizes(**{"shapes": ((3, 4),), "other": 0, "output": 0, "width": 3} | changes)


# --- memory_table ---


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        # 36 bytes of each of 6.738e9 parameters are 242.6 GB. Reward and value models do without
        # the output layer, of 0.131e9: less (2 + 16) bytes of these, 2.4 GB.
        ("Llama-2-7B", ("240.2", "55.0", "15.1", "5.5")),
        ("Qwen2.5-1.5B", ("55.6", "13.1", "3.8", "1.9")),
        ("Qwen2.5-0.5B", ("17.8", "4.3", "1.3", "0.8")),
        ("SmolLM2-135M", ("4.8", "1.3", "0.5", "0.3")),
    ],
)
def test_table_of_known_models(known, name, gigabytes):
    computed = totals(memory_table(known[name])).values()
    assert tuple(f"{total / 1e9:.1f}" for total in computed) == gigabytes


def test_totals_are_what_the_formulas_give(known):
    for sizes in known.values():
        n, lora, head = sizes.parameters, lora_parameters(sizes.shapes, 16), sizes.head
        adapters = 40 * lora + 20 * head  # 16 + 4 + 4 + 16 of each role's, 4 + 16 of two heads
        computed = totals(memory_table(sizes))
        assert computed[FULL] == 36 * n + 18 * (head - sizes.output)
        assert computed[SEPARATE] == 8 * n - 4 * sizes.output + adapters
        assert computed[SHARED] == 2 * n + adapters
        linear = sum(outputs * inputs for outputs, inputs in sizes.shapes)
        nf4 = linear * 4.127 / 8 + 2 * (n - linear) + adapters
        assert computed[NF4] == pytest.approx(nf4, rel=1e-4)


def test_table_by_hand():
    # N = 64 · 64 + 10 + 20; L = 2 · (64 + 64); a head has 9
    sizes = ModelSizes(shapes=((64, 64),), other=10, output=20, width=8)
    table = memory_table(sizes, rank=2, double_quant=False)
    n, lora = 4126, 256
    assert table[FULL] == [
        RoleBytes("policy", 2 * n, 0, 2 * n, 12 * n),
        RoleBytes("reference", 2 * n),
        RoleBytes("reward", 2 * (n - 20 + 9)),
        RoleBytes("value", 2 * (n - 11), 0, 2 * (n - 11), 12 * (n - 11)),
    ]
    adapters = [
        RoleBytes("policy", 0, 4 * lora, 4 * lora, 8 * lora),
        RoleBytes("reference", 0, 4 * lora),
        RoleBytes("reward", 0, 4 * (lora + 9)),
        RoleBytes("value", 0, 4 * (lora + 9), 4 * (lora + 9), 8 * (lora + 9)),
    ]
    assert table[SHARED] == [RoleBytes("base", 2 * n), *adapters]
    nf4 = 4096 // 2 + 4 * 64
    assert table[NF4] == [RoleBytes("base", nf4 + 2 * 30), *adapters]
    bases = [2 * n, 2 * n, 2 * (n - 20), 2 * (n - 20)]
    assert [row.weights for row in table[SEPARATE]] == bases
    assert totals(table)[SEPARATE] == sum(bases) + sum(row.total for row in adapters)


@pytest.mark.parametrize("weight_bytes", [2, 4])
def test_a_trained_parameter_takes_16_bytes(known, weight_bytes):
    sizes = known["SmolLM2-135M"]  # tied: no output layer to lose
    rows = {r.role: r for r in memory_table(sizes, weight_bytes=weight_bytes)[FULL]}
    assert rows["policy"].total == 16 * sizes.parameters
    assert rows["reference"].total == weight_bytes * sizes.parameters
    assert rows["value"].total - rows["policy"].total == 16 * 577


def test_what_the_options_change(known):
    sizes = known["SmolLM2-135M"]
    plain, double = (memory_table(sizes, double_quant=d) for d in (False, True))
    changed = [way for way in plain if plain[way] != double[way]]
    assert changed == [NF4]
    linear = sum(outputs * inputs for outputs, inputs in sizes.shapes)
    saved = plain[NF4][0].weights - double[NF4][0].weights
    assert saved == pytest.approx(linear * (4.5 - 4.127) / 8, rel=0.001)
    wider = memory_table(sizes, rank=32)
    assert wider[FULL] == double[FULL]
    assert wider[NF4][1].total == 2 * double[NF4][1].total


# --- logits and cache ---


def test_logits_and_cache_by_hand():
    assert logits_bytes(2, 3, 5) == 2 * 3 * 5 * 4
    assert logits_bytes(2, 3, 5, entry_bytes=2) == 60
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6}
    small = LlamaConfig(num_hidden_layers=2, **heads)
    assert memory.cache_bytes(small, 7, 11) == 2 * 2 * 4 * 6 * 7 * 11 * 2
    assert memory.cache_bytes(KNOWN["Llama-2-7B"], 1, 1) == 524_288  # half a MiB per token
    with pytest.raises(ValueError, match="tokens is 0: it must be"):
        logits_bytes(1, 0, 5)
    with pytest.raises(ValueError, match="batch is 2.0: it must be"):
        memory.cache_bytes(small, 2.0, 1)


def test_cache_is_what_transformers_keeps(base):
    c = base.config
    cache = base(torch.ones(2, 5, dtype=torch.int64), use_cache=True).past_key_values
    kept = sum(t.numel() * t.element_size() for k in cache.layers for t in (k.keys, k.values))
    assert memory.cache_bytes(c, 2, 5, entry_bytes=4) == kept


SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}
WIDE = {"head_dim": 128, "num_key_value_heads": 1}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
EXPERTS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
CACHES = {
    "llama": ("llama", {"num_key_value_heads": 1}),
    "wide heads": ("llama", {"num_key_value_heads": 1, "head_dim": 128}),
    "qwen2": ("qwen2", {"num_key_value_heads": 1}),
    "gemma 3, short window": ("gemma3_text", WIDE | {"sliding_window": 8}),
    "gemma 3, long window": ("gemma3_text", WIDE | {"sliding_window": 512}),
    "mistral": ("mistral", {"num_key_value_heads": 1, "sliding_window": 8}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "bloom": ("bloom", {}),
    "one head": ("gpt_bigcode", {}),
    "falcon": ("falcon", {}),
    "falcon, new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 1}),
    "latent": ("deepseek_v3", LATENT | EXPERTS | {"v_head_dim": 16, "moe_intermediate_size": 64}),
}


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_is_counted_from_the_config(name):
    """Against what transformers holds after generation; the last token gets into no cache."""
    kind, own = CACHES[name]
    made = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SMALL, **own)).eval()
    prompt = torch.ones(2, 20, dtype=torch.int64)
    ends = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
    found = made.generate(prompt, return_dict_in_generate=True, **ends).past_key_values
    held = [t for layer in found.layers for t in (layer.keys, layer.values)]
    expected = sum(tensor.untyped_storage().nbytes() for tensor in held)
    assert memory.cache_bytes(made.config, 2, 25, entry_bytes=4) == expected


def test_of_a_plain_model_the_formula_gives_the_cache(base):
    c = base.config
    sizes = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    assert memory.cache_bytes(c, 3, 40) == sizes * 3 * 40 * 2
    with pytest.raises(ValueError, match="tokens is 0"):
        memory.cache_bytes(c, 3, 0)


# --- measured_bytes ---


@pytest.mark.parametrize("double_quant", [False, True])
def test_computed_and_measured_agree(double_quant):
    roles = Roles(load_base(load_preset("pocket", double_quant=double_quant)))
    roles.add("reference", trainable=False)
    roles.add("policy", copy_of="reference")
    roles.add("reward", trainable=False)
    roles.add_head("reward")
    roles.add("value", copy_of="reward")
    sizes = model_sizes(roles.base.config)
    table = memory_table(sizes, roles.rank, double_quant, weight_bytes=4)
    measured = measured_bytes(roles)
    assert list(measured) == ["base", "reference", "policy", "reward", "value"]
    for row in table[NF4]:
        got = sum(measured[row.role].values())
        if row.role == "base":
            # nf4_bytes leaves out what a layer has once: two codebooks, and a mean of the scales
            constants = len(sizes.shapes) * 4 * (16 + (256 + 1) * double_quant)
            assert got == row.weights + constants
            assert row.weights == pytest.approx(got, rel=0.02)
        else:
            assert row.adapters == got
    assert measured["value"]["head"] == 4 * sizes.head and measured["policy"]["head"] == 0


def test_measured_without_quantization(pocket):
    roles = Roles(load_base(pocket, quantized=False))
    sizes = model_sizes(roles.base.config)
    only_base = {"base": {"weights": 4 * sizes.parameters, "scales": 0}}
    assert measured_bytes(roles) == only_base
    roles.add("policy")
    roles.add("a_policy")  # a name that ends in another
    adapter = {"adapter": 4 * lora_parameters(sizes.shapes, 16), "head": 0}
    assert measured_bytes(roles) == only_base | {"policy": adapter, "a_policy": adapter}


def test_activations_are_what_autograd_keeps():
    x = torch.zeros(5, 3)
    layer = torch.nn.Linear(3, 2)
    assert activation_bytes(lambda: layer(x), layer) == 4 * x.numel()
    assert activation_bytes(lambda: layer(x) + layer(x), layer) == 4 * x.numel()  # kept once
    assert activation_bytes(lambda: layer(x).exp(), layer) == 4 * (x.numel() + 10)
    with torch.no_grad():
        assert activation_bytes(lambda: layer(x), layer) == 0


def test_checkpointing_keeps_fewer_activations(pocket):
    ids = torch.randint(3, 1000, (4, 32), generator=torch.Generator().manual_seed(0))
    kept = []
    for checkpointing in (False, True):
        roles = Roles(load_base(replace(pocket, checkpointing=checkpointing)))
        roles.add("policy")
        model = roles.use("policy").train()
        kept.append(activation_bytes(lambda model=model: model(ids).logits, roles.base))
    assert 0 < kept[1] < kept[0] / 2
