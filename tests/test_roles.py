"""The loader of the frozen 4-bit base, and the roles on it."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_helpers import roles
from rlhf_helpers.base import load_base
from rlhf_helpers.presets import load_preset
from rlhf_helpers.roles import CONFIG, WEIGHTS, Roles, ScalarHead
from rlhf_helpers.roles import HEAD as HEAD_FILE


def save_tiny(folder, seed=0, **sizes):
    config = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    } | sizes
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
    return load_preset("pocket", model=str(folder))


def test_the_base_is_frozen_quantized_and_silent(base):
    linear = [m for m in base.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(linear) == 4 * 7  # q, k, v, o, gate, up and down in each of four layers
    assert all(m.weight.quant_state.quant_type == "nf4" for m in linear)
    assert not base.training
    assert not any(p.requires_grad for p in base.parameters())
    assert base.get_output_embeddings().weight.dtype == torch.float32


def test_quantized_and_unquantized_agree_roughly(pocket, base, tokenizer):
    exact = load_base(pocket, quantized=False)
    ids = tokenizer("the duck says", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        p = exact(ids).logits[0, -1].log_softmax(-1)
        q = base(ids).logits[0, -1].log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum().item()
    assert 0 < divergence < 0.5  # close, and not the same


def lora_gradients(model, ids, forward_before):
    """Gradients of fresh LoRA adapters, optionally after a forward without gradients."""
    torch.manual_seed(0)
    names = ["q_proj", "v_proj", "up_proj", "down_proj"]
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=names))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    if forward_before:
        peft_model.eval()
        with torch.no_grad():
            peft_model(input_ids=ids)
    peft_model.train()
    peft_model(input_ids=ids, labels=ids).loss.backward()
    return [p.grad for p in peft_model.parameters() if p.requires_grad]


@pytest.mark.parametrize("rows", [1, 4])
def test_a_forward_without_gradients_leaves_later_gradients_right(tmp_path, rows):
    """Without the loader's guard, CPUs with AVX512-BF16 give LoRA gradients that are far off."""
    preset = save_tiny(tmp_path, hidden_size=128, intermediate_size=256)
    ids = torch.randint(0, 64, (rows, 12), generator=torch.Generator().manual_seed(0))
    clean, after = (lora_gradients(load_base(preset), ids, before) for before in (False, True))
    assert len(clean) == 2 * 2 * 4
    for a, b in zip(clean, after, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_guard_covers_every_4bit_layer(tmp_path, monkeypatch):
    """On any processor: what bitsandbytes would set on one with AVX512-BF16 is set back."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    assert bnb.nn.Linear4bit(64, 64).support_avx512bf16_for_cpu
    model = load_base(save_tiny(tmp_path))
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert layers
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_double_quantization_is_an_option(tmp_path):
    preset = save_tiny(tmp_path)
    for double in (False, True):
        model = load_base(load_preset("pocket", model=preset.model, double_quant=double))
        states = [m.weight.quant_state for m in model.modules() if hasattr(m, "compute_dtype")]
        assert states
        assert all(state.nested is double for state in states)


def test_a_width_that_is_no_multiple_of_the_block_is_named(tmp_path):
    preset = save_tiny(tmp_path, intermediate_size=96)
    with pytest.raises(
        ValueError, match="quantized=False .*down_proj has 96 inputs, no multiple of 64"
    ):
        load_base(preset)
    assert load_base(preset, quantized=False) is not None


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path, pocket, name):
    shutil.copytree(pocket.model, tmp_path / "base")
    (tmp_path / "base" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing; reinstall"):
        load_base(load_preset("pocket", model=str(tmp_path / "base")))


def test_a_truncated_config_is_named(tmp_path, pocket):
    shutil.copytree(pocket.model, tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text('{"archi', encoding="utf-8")
    with pytest.raises(ValueError, match="truncated or damaged.*reinstall"):
        load_base(load_preset("pocket", model=str(tmp_path / "base")))


def test_a_missing_folder_never_asks_the_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        load_base(load_preset("pocket", model=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.99])
def test_truncated_weights_are_named(tmp_path, pocket, keep):
    shutil.copytree(pocket.model, tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    data = weights.read_bytes()
    weights.chmod(0o644)
    weights.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_base(load_preset("pocket", model=str(tmp_path / "base")))


def test_the_single_gpu_preset_loads_a_local_folder_of_another_architecture(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    preset = load_preset("single_gpu", model=str(tmp_path), device="cpu", compute_dtype="float32")
    model = load_base(preset)
    assert any(isinstance(m, bnb.nn.Linear4bit) for m in model.modules())
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_pocket_never_opens_a_connection():
    """Load and sample in a process in which every connection raises."""
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = refuse\n"
        "socket.create_connection = refuse\n"
        "socket.getaddrinfo = refuse\n"
        "from rlhf_helpers.presets import load_preset\n"
        "from rlhf_helpers.sources import sft_dataset\n"
        "from rlhf_helpers.text import load_tokenizer\n"
        "from rlhf_helpers.base import load_base\n"
        "from rlhf_helpers.rollout import sample_responses\n"
        "p = load_preset('pocket')\n"
        "sft_dataset(p)\n"
        "r = sample_responses(load_base(p), load_tokenizer(p), ['what is hot?'], 4)\n"
        "print(len(r.texts))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE",)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1"


# --- roles ---------------------------------------------------------------------------------

RANK, ALPHA = 4, 8
NAMES = ["policy", "value", "reward"]
CHECKPOINTING = [None, "not reentrant", "reentrant"]  # the ways of activation checkpointing
IDS = torch.randint(2, 64, (3, 10), generator=torch.Generator().manual_seed(0))
HEAD = torch.randn(64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The preset of a base with two narrow layers; each test loads it afresh."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


def tiny_roles(preset, names=NAMES, rank=RANK, alpha=ALPHA, **options):
    """Roles whose B is not zero: a fresh adapter changes nothing and gives A no gradients."""
    made = Roles(load_base(preset), rank, alpha)
    for number, name in enumerate(names):
        made.add(name, seed=number, **options)
        fill(made.model, name, number)
    return made


def fill(model, name, seed):
    """Random B for one role."""
    generator = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(f"lora_B.{name}.weight"):
                parameter.normal_(std=0.05, generator=generator)


def alone(preset, weights):
    """Plain PEFT: a model of its own that holds these weights and nothing else."""
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(load_base(preset), config)
    set_peft_model_state_dict(model, weights)
    return model


def role_loss(model, name):
    """Three losses that reach the adapter in three ways."""
    if name == "policy":
        return model(input_ids=IDS, labels=IDS).loss
    hidden = model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    if name == "value":
        return ((hidden @ HEAD - 1.0) ** 2).mean()
    scores = hidden[:, -1] @ HEAD
    return -torch.nn.functional.logsigmoid(scores[0] - scores[1])


def gradients(model, name):
    """Gradients of one adapter, by the names that a file gives its weights."""
    return {
        key.replace(f".{name}.", "."): None if p.grad is None else p.grad.clone()
        for key, p in model.named_parameters()
        if key.endswith(f".{name}.weight")
    }


def assert_close(found, expected):
    """Every tensor is within 1e-5 of the expected one's largest entry, which is not 0."""
    assert found.keys() == expected.keys()
    assert len(found) == 2 * 2 * 7  # A and B of seven linear layers in each of two blocks
    for key, want in expected.items():
        assert want.abs().max() > 0, key
        assert (found[key] - want).abs().max() / want.abs().max() < 1e-5, key


def prepare(model, checkpointing):
    """Training mode, in which activation checkpointing works, or eval mode without it."""
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    if checkpointing == "reentrant":
        model.enable_input_require_grads()
    model.train(checkpointing is not None)


def same(first, second):
    """Bit for bit, names included."""
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def base_bits(model):
    """All that the base is made of: 4-bit weights, their scales, embeddings, norms."""
    bits = {}
    for name, module in model.named_modules():
        name = name.replace(".base_layer", "").removeprefix("base_model.model.")
        if "lora_" in name:
            continue
        bits |= {f"{name}:{n}": p.detach().clone() for n, p in module.named_parameters("", False)}
        bits |= {f"{name}:{n}": b.clone() for n, b in module.named_buffers("", False)}
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            bits |= {f"{name}:{n}": getattr(state, n).clone() for n in ("absmax", "code")}
    return bits


def snapshot(made):
    """What a refused call must not change."""
    return {
        "names": made.names,
        "active": made.active,
        "learns": [p.requires_grad for p in made.base.parameters()],
        "adapters": sorted(made.model.peft_config),
    }, {f"{name}/{key}": t for name in made.names for key, t in made.state(name).items()}


def assert_unchanged(made, before):
    facts, weights = snapshot(made)
    assert facts == before[0]
    assert same(weights, before[1])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def learning(made):
    """The roles that have a parameter which requires gradients."""
    names = [n for n, p in made.model.named_parameters() if p.requires_grad]
    assert all(".lora_" in name for name in names)
    return {name.split(".")[-2] for name in names}


# gradients


@pytest.mark.parametrize("forward_before", [False, True])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_each_roles_gradients_are_those_of_a_model_of_its_own(tiny, checkpointing, forward_before):
    made = tiny_roles(tiny)
    if forward_before:  # every role answers once in eval mode, as in a rollout
        for name in NAMES:
            logits(made.use(name))
    prepare(made.model, checkpointing)
    runs = []
    made.base.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    for name in NAMES:
        role_loss(made.use(name), name).backward()
    assert len(runs) == (6 if checkpointing else 3)  # each role's backward computes it once more
    for name in NAMES:
        model = alone(tiny, made.state(name))
        prepare(model, checkpointing)
        role_loss(model, name).backward()
        assert_close(gradients(made.model, name), gradients(model, "default"))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("joint", [False, True])
def test_backward_through_a_role_that_does_not_act_is_refused(tiny, checkpointing, joint):
    made = tiny_roles(tiny)
    prepare(made.model, checkpointing)
    loss = role_loss(made.use("policy"), "policy")
    other = role_loss(made.use("value"), "value")
    with pytest.raises(RuntimeError, match="through role 'policy' while 'value' is active"):
        (loss + other if joint else loss).backward()
    assert all(g is None for g in gradients(made.model, "policy").values())


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_a_value_head_on_the_hidden_states_is_guarded_too(tiny, checkpointing):
    made = tiny_roles(tiny)
    prepare(made.model, checkpointing)
    loss = role_loss(made.use("value"), "value")
    made.use("policy")
    with pytest.raises(RuntimeError, match="through role 'value' while 'policy' is active"):
        loss.backward()
    body = made.use("value").get_base_model().model(input_ids=IDS).last_hidden_state
    made.use("reward")
    with pytest.raises(RuntimeError, match="through role 'value' while 'reward' is active"):
        (body @ HEAD).sum().backward()


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_another_role_may_answer_between_forward_and_backward(tiny, checkpointing):
    made = tiny_roles(tiny)
    prepare(made.model, checkpointing)
    role_loss(made.use("policy"), "policy").backward()
    expected = gradients(made.model, "policy")
    made.model.zero_grad()
    loss = role_loss(made.use("policy"), "policy")
    logits(made.use("value"))
    made.use("policy")
    loss.backward()
    assert same(gradients(made.model, "policy"), expected)
    assert all(g is None for g in gradients(made.model, "value").values())


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_without_the_guard_gradients_are_lost_and_nothing_is_said(tiny, monkeypatch, checkpointing):
    """Why the guard is there; if this fails, PEFT has learnt better and the guard can go."""
    monkeypatch.setattr(Roles, "_guard", lambda *_: None)
    made = tiny_roles(tiny)
    prepare(made.model, checkpointing)
    role_loss(made.use("value"), "value").backward()
    right = gradients(made.model, "value")
    made.model.zero_grad()
    loss = role_loss(made.use("policy"), "policy")
    other = role_loss(made.use("value"), "value")
    (100 * loss + other).backward()
    assert all(g is None for g in gradients(made.model, "policy").values())
    found = gradients(made.model, "value")
    if checkpointing == "reentrant":  # the policy's loss goes into the value role
        off = max((found[key] - right[key]).abs().max() / right[key].abs().max() for key in right)
        assert off > 0.1
    else:
        assert_close(found, right)


def test_training_a_role_changes_nothing_else(tiny):
    made = tiny_roles(tiny)
    made.add("reference", copy_of="policy", trainable=False)
    base = base_bits(made.model)
    assert sum(":absmax" in name for name in base) == 14
    before = {name: made.state(name) for name in made.names}
    optimizer = torch.optim.AdamW(made.parameters("policy").values(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        role_loss(made.use("policy").train(), "policy").backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same(base_bits(made.model), base)
    for name in ("value", "reward", "reference"):
        assert same(made.state(name), before[name])
    after = made.state("policy")
    assert not any(torch.equal(after[key], before["policy"][key]) for key in after)


def test_roles_leave_the_base_as_it_was_loaded(tiny):
    assert same(base_bits(tiny_roles(tiny).model.get_base_model()), base_bits(load_base(tiny)))


# fresh roles and copies


def test_a_fresh_role_answers_exactly_as_the_base(tiny):
    plain = logits(load_base(tiny))
    made = tiny_roles(tiny, ["policy"])
    assert not torch.equal(logits(made.use("policy")), plain)
    made.add("fresh")
    assert torch.equal(logits(made.use("fresh")), plain)


def test_a_copy_is_exact_and_its_own(tiny):
    made = tiny_roles(tiny, ["sft", "other"])
    made.add("policy", copy_of="sft", seed=7)
    assert same(made.state("policy"), made.state("sft"))
    assert torch.equal(logits(made.use("policy")), logits(made.use("sft")))
    assert not torch.equal(logits(made.use("policy")), logits(made.use("other")))
    fill(made.model, "policy", 9)
    assert not same(made.state("policy"), made.state("sft"))


def test_a_state_is_a_copy(tiny):
    made = tiny_roles(tiny, ["policy"])
    before = made.state("policy")
    for tensor in made.state("policy").values():
        tensor.zero_()
    assert same(made.state("policy"), before)


def test_the_first_role_acts_until_another_is_used(tiny):
    made = Roles(load_base(tiny), RANK, ALPHA)
    assert made.active is None and made.names == []
    made.add("policy")
    made.add("value")
    assert made.active == "policy" and made.names == ["policy", "value"]
    assert not made.model.training
    assert made.use("value") is made.model and made.active == "value"
    made.add("reward", copy_of="policy")
    assert made.active == "value" and learning(made) == {"value"}


def test_the_seed_decides_a_and_torchs_generator_stays(tiny):
    made = Roles(load_base(tiny), RANK, ALPHA)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for name, seed in (("one", 1), ("two", 2), ("again", 1)):
        made.add(name, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(made.state("one"), made.state("again"))
    one, two = made.state("one"), made.state("two")
    for key in one:
        if "lora_A" in key:
            assert not torch.equal(one[key], two[key])
        else:
            assert not one[key].any()


# frozen roles


def test_a_frozen_role_never_learns(tiny):
    made = tiny_roles(tiny, ["policy"])
    made.add("reference", copy_of="policy", trainable=False)
    assert learning(made) == {"policy"}
    with pytest.raises(ValueError, match="role 'reference' is frozen; add a copy"):
        made.parameters("reference")
    assert not logits(made.use("reference")).requires_grad
    assert learning(made) == set()
    assert not made.model(input_ids=IDS).logits.requires_grad
    made.use("policy")
    assert learning(made) == {"policy"}
    assert len(made.parameters("policy")) == 28
    assert all(p.requires_grad for p in made.parameters("policy").values())


def test_a_digest_tells_weights_apart(tiny):
    made = tiny_roles(tiny, ["policy", "value"])
    made.add("reference", copy_of="policy", trainable=False)
    assert made.digest("reference") == made.digest("policy") != made.digest("value")
    with torch.no_grad():
        next(iter(made.parameters("policy").values()))[0, 0] += 1e-3
    assert made.digest("reference") != made.digest("policy")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"trainable": True}, "role 'reference' is frozen; add a copy of it with trainable=True"),
        ({"head": True}, r"role 'reference' has no head; call add_head\('reference'\) first"),
        ({"name": "policy", "trainable": False}, "'policy' is trainable; .* with trainable=False"),
        ({"name": "policy", "head": False}, "'policy' has a head already; .* without a head"),
        ({"name": "none"}, r"there is no role 'none'; there are \['policy', 'reference'\]"),
    ],
)
def test_what_a_role_must_be_is_asked_by_name(tiny, asked, message):
    made = tiny_roles(tiny, ["policy"])
    made.add("reference", copy_of="policy", trainable=False)
    made.add_head("policy")
    made.require("policy", trainable=True, head=True)
    made.require("reference", trainable=False, head=False)
    with pytest.raises(ValueError, match=message):
        made.require(**{"name": "reference"} | asked)


def test_a_frozen_role_may_come_first(tiny):
    made = Roles(load_base(tiny), RANK, ALPHA)
    made.add("reference", trainable=False)
    assert learning(made) == set()
    made.add("policy", copy_of="reference")
    assert learning(made) == set()
    made.use("policy")
    assert learning(made) == {"policy"}


# what is refused


@pytest.mark.parametrize("name", ["policy", "a.b", "", "a b", "1st", "a/b", "values", "train"])
def test_a_name_that_is_taken_or_none_is_refused(tiny, name):
    made = tiny_roles(tiny, ["policy"])
    before = snapshot(made)
    with pytest.raises(
        ValueError, match=r"is there already or is no name that can be used; .* \['policy'\]"
    ):
        made.add(name)
    assert_unchanged(made, before)


@pytest.mark.parametrize("name", ["model", "mlp", "q_proj", "lora_A"])
def test_a_role_may_have_the_name_of_a_module(tiny, name):
    made = tiny_roles(tiny, ["policy", name])
    found = made.parameters(name)
    assert len(found) == 28
    assert all(key.endswith(f".{name}.weight") for key in found)


def test_an_unknown_role_is_named(tiny):
    made = tiny_roles(tiny, ["policy"])
    before = snapshot(made)
    calls = [
        lambda: made.add("value", copy_of="none"),
        lambda: made.use("none"),
        lambda: made.parameters("none"),
        lambda: made.state("none"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"no role 'none'; there are \['policy'\]"):
            call()
        assert_unchanged(made, before)


def test_a_base_with_adapters_is_refused(tiny):
    made = tiny_roles(tiny, ["policy"])
    before = snapshot(made)
    with pytest.raises(ValueError, match="carries adapters already"):
        Roles(made.base, RANK, ALPHA)
    assert_unchanged(made, before)
    with pytest.raises(ValueError, match="carries adapters already"):
        Roles(alone(tiny, made.state("policy")).get_base_model())


@pytest.mark.parametrize("rank, alpha", [(0, 8), (-1, 8), (4, 0), (4, -8)])
def test_a_rank_or_alpha_that_makes_no_adapter_is_refused(tiny, rank, alpha):
    base = load_base(tiny)
    with pytest.raises(ValueError, match=f"rank is {rank}" if rank < 1 else f"alpha is {alpha}"):
        Roles(base, rank, alpha)
    assert len(base.base_model._forward_hooks) == len(load_base(tiny).base_model._forward_hooks)


# on disk


def test_a_saved_role_comes_back_bit_for_bit(tiny, tmp_path):
    made = tiny_roles(tiny)
    made.save("value", tmp_path / "adapter")
    other = Roles(load_base(tiny), RANK, ALPHA)
    other.load("critic", tmp_path / "adapter", trainable=True)
    assert same(other.state("critic"), made.state("value"))
    assert torch.equal(logits(other.use("critic")), logits(made.use("value")))
    assert learning(other) == {"critic"}


def test_plain_peft_reads_a_saved_role(tiny, tmp_path):
    made = tiny_roles(tiny)
    made.save("value", tmp_path / "adapter")
    model = PeftModel.from_pretrained(load_base(tiny), str(tmp_path / "adapter"))
    assert torch.equal(logits(model), logits(made.use("value")))


def test_roles_read_what_plain_peft_wrote(tiny, tmp_path):
    weights = tiny_roles(tiny, ["policy"]).state("policy")
    model = alone(tiny, weights)
    model.save_pretrained(tmp_path)
    made = Roles(load_base(tiny), RANK, ALPHA)
    made.load("policy", tmp_path)
    assert same(made.state("policy"), weights)
    assert torch.equal(logits(made.use("policy")), logits(model))


def texts_in(value):
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in texts_in(part)]
    if isinstance(value, list):
        return [text for part in value for text in texts_in(part)]
    return [value] if isinstance(value, str) else []


def test_an_adapters_folder_can_be_moved_and_published(tiny, tmp_path):
    tiny_roles(tiny).save("policy", tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [CONFIG, WEIGHTS]
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (RANK, ALPHA)
    assert config["base_model_name_or_path"] == "tiny"
    assert [text for text in texts_in(config) if os.path.isabs(text)] == []
    data = (tmp_path / "adapter" / WEIGHTS).read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")].decode()
    assert [text for text in texts_in(json.loads(header)) if "/" in text or "\\" in text] == []


def test_loading_over_a_role_replaces_it(tiny, tmp_path):
    made = tiny_roles(tiny)
    made.save("value", tmp_path / "adapter")
    value, reward = made.state("value"), made.state("reward")
    made.use("policy")
    made.load("policy", tmp_path / "adapter")
    assert same(made.state("policy"), value) and same(made.state("reward"), reward)
    assert made.names == NAMES and made.active == "policy"
    assert learning(made) == set()  # loaded as frozen
    made.load("policy", tmp_path / "adapter", trainable=True)
    assert learning(made) == {"policy"}


def refuse(made, folder, error, message):
    """Loading is refused as a new role and over an old one; the roles are as they were."""
    before = snapshot(made)
    for name in ("new", "value"):
        with pytest.raises(error, match=message):
            made.load(name, folder, trainable=True)
        assert_unchanged(made, before)


@pytest.fixture
def saved(tiny, tmp_path):
    """Roles, and the folder of one of them."""
    made = tiny_roles(tiny)
    made.save("policy", tmp_path / "adapter")
    return made, tmp_path / "adapter"


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_half_an_adapter_is_refused(saved, name):
    made, folder = saved
    (folder / name).unlink()
    refuse(made, folder, FileNotFoundError, f"{name} is missing: no adapter, or half of one")


def test_what_is_no_adapters_folder_is_refused(saved, tmp_path):
    made, _ = saved
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("hello", encoding="utf-8")
    for name in ("empty", "file", "nowhere"):
        refuse(made, tmp_path / name, FileNotFoundError, f"{name}.* is missing: no adapter")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_truncated_adapter_weights_are_refused(saved, keep):
    made, folder = saved
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: int(len(data) * keep) if keep == 0.5 else keep])
    refuse(made, folder, ValueError, "cannot be read .* it is truncated or damaged")


@pytest.mark.parametrize("text", ["", '{"r": 4,', "[4, 8]", "null", '{"peft_type": "NONE"}'])
def test_a_damaged_adapter_config_is_refused(saved, text):
    made, folder = saved
    (folder / CONFIG).write_text(text, encoding="utf-8")
    refuse(made, folder, ValueError, "cannot be read .* it is truncated or damaged")


@pytest.mark.parametrize("rank, alpha", [(8, 8), (4, 16), (8, 16)])
def test_an_adapter_of_another_rank_or_alpha_is_refused(saved, tiny, rank, alpha):
    _, folder = saved
    field, theirs, ours = ("r", 4, rank) if rank != 4 else ("lora_alpha", 8, alpha)
    message = f"has {field} {theirs}, these roles {ours}; build Roles with the adapter's rank"
    refuse(tiny_roles(tiny, rank=rank, alpha=alpha), folder, ValueError, message)


@pytest.mark.parametrize(
    "sizes", [{"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"intermediate_size": 192}]
)
def test_an_adapter_of_a_base_with_other_sizes_is_refused(saved, tmp_path, sizes):
    _, folder = saved
    made = tiny_roles(save_tiny(tmp_path / "other", **sizes))
    refuse(made, folder, ValueError, "does not fit this base: base_model.model.model.layers")


def test_an_adapter_of_another_base_of_the_same_sizes_is_refused(saved, tmp_path):
    _, folder = saved
    made = tiny_roles(save_tiny(tmp_path / "other", seed=1))
    refuse(made, folder, ValueError, "trained on another base of the same sizes")


def test_the_same_base_in_another_precision_is_accepted(saved, tiny):
    made, folder = saved
    preset = load_preset("pocket", model=tiny.model, compute_dtype="bfloat16")
    other = Roles(load_base(preset), RANK, ALPHA)
    assert other.base.get_input_embeddings().weight.dtype == torch.bfloat16
    other.load("policy", folder)
    assert same(other.state("policy"), made.state("policy"))


@pytest.mark.parametrize("change", ["lack", "add", "reshape"])
def test_an_adapter_with_other_layers_is_refused(saved, change):
    made, folder = saved
    weights = made.state("policy")
    first = next(iter(weights))
    if change == "lack":
        del weights[first]
    elif change == "add":
        weights["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 64)
    else:
        weights[first] = weights[first].T.contiguous()
    roles.save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    refuse(made, folder, ValueError, "does not fit this base")


# Every setting that changes what an adapter computes, or the base under it.
OTHER_LORA = {
    "peft_type": "ADALORA",
    "r": 8,
    "lora_alpha": 99,
    "use_rslora": True,
    "use_dora": True,
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 99},
    "fan_in_fan_out": True,
    "bias": "lora_only",
    "lora_bias": True,
    "modules_to_save": ["lm_head"],
    "layer_replication": [[0, 1], [0, 2]],
    "trainable_token_indices": [3],
    "target_parameters": ["mlp.experts"],
    "alora_invocation_tokens": [3, 4],
    "use_qalora": True,
    "qalora_group_size": 4,
    "use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2},
    "arrow_config": {"top_k": 1},
    "ensure_weight_tying": True,
    "init_lora_weights": "pissa",
    "eva_config": {"rho": 3.0},
    "corda_config": {"corda_method": "kpm"},
    "lora_ga_config": {"direction": "ArB2r"},
    "velora_config": {"rank": 1},
    "monteclora_config": {"num_samples": 2},
    "kasa_config": {"beta": 1.0},
    "megatron_config": {"hidden": 1},
    "a_setting_of_a_later_peft": {"scale": 2},
}
SAME_LORA = {
    "lora_dropout": 0.1,
    "init_lora_weights": "gaussian",
    "inference_mode": True,
    "task_type": None,
    "revision": "main",
    "target_modules": ["q_proj"],  # the shapes of the weights say which layers
    "peft_version": "0.1",
    "modules_to_save": [],
    "loftq_config": {"loftq_bits": 4},
    "a_setting_of_a_later_peft": None,
}


def with_settings(folder, settings):
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps(config | settings), encoding="utf-8")


def test_every_setting_of_lora_is_harmless_or_tried_below():
    """A new version of peft may know more."""
    known = {field.name for field in fields(LoraConfig)}
    assert known <= set(OTHER_LORA) | roles.HARMLESS
    assert not set(OTHER_LORA) & roles.HARMLESS and roles.HARMLESS <= known


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHER_LORA)
def test_an_adapter_that_computes_something_else_is_refused(saved, name):
    made, folder = saved
    with_settings(folder, {name: OTHER_LORA[name]})
    refuse(made, folder, ValueError, "adapter")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAME_LORA)
def test_settings_that_leave_what_it_computes_are_accepted(saved, name):
    made, folder = saved
    with_settings(folder, {name: SAME_LORA[name]})
    made.load("new", folder)
    assert same(made.state("new"), made.state("policy"))


def test_an_interrupted_save_leaves_the_old_adapter(saved, monkeypatch):
    made, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def interrupt(weights, path, **_):
        assert (path.parent / CONFIG).is_file() and path.parent != folder
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(roles, "save_file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            made.save("value", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    made.save("value", folder)  # what the interrupted one left behind does no harm
    made.load("copy", folder)
    assert same(made.state("copy"), made.state("value"))
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


# scalar heads

LENGTHS = [10, 7, 4]


def rows_of(side):
    """IDS cut to uneven lengths and padded on one side: ids, mask."""
    ids, mask = torch.zeros_like(IDS), torch.zeros_like(IDS)
    for i, length in enumerate(LENGTHS):
        place = slice(10 - length, None) if side == "left" else slice(length)
        ids[i, place], mask[i, place] = IDS[i, :length], 1
    return ids, mask


def with_heads(preset, names=NAMES, **options):
    """Roles as after training: B and heads are random."""
    made = tiny_roles(preset, names, **options)
    for number, name in enumerate(names):
        made.add_head(name, seed=50 + number)
        with torch.no_grad():
            made.heads[name].bias.fill_(0.25 * (number + 1))
    return made


def head_state(made, name):
    return {key: tensor.clone() for key, tensor in made.heads[name].state_dict().items()}


def values_alone(model, head):
    """Values of each row by itself, without padding: plain PEFT and a plain linear layer."""
    found = []
    for i, length in enumerate(LENGTHS):
        out = model(input_ids=IDS[i : i + 1, :length], output_hidden_states=True)
        found.append(head(out.hidden_states[-1])[0, :, 0])
    return torch.cat(found)


def plain_head(made, name):
    head = torch.nn.Linear(64, 1)
    head.load_state_dict(made.heads[name].state_dict())
    return head


@pytest.mark.parametrize("side", ["left", "right"])
def test_values_are_those_of_each_sequence_alone(tiny, side):
    made = with_heads(tiny)
    ids, mask = rows_of(side)
    for name in NAMES:
        expected = values_alone(alone(tiny, made.state(name)), plain_head(made, name))
        assert expected.std() > 0.1
        found = made.values(name, ids, mask)
        assert found.shape == ids.shape and found.dtype == torch.float32
        torch.testing.assert_close(found[mask == 1], expected, rtol=0, atol=1e-5)
        assert made.active == name
        for i in range(3):
            one = made.values(name, ids[i : i + 1], mask[i : i + 1])[0]
            torch.testing.assert_close(one[mask[i] == 1], found[i][mask[i] == 1], rtol=0, atol=1e-5)


def test_the_body_is_told_where_the_padding_is(tiny):
    """Positions count from the first real token: it matters for models with absolute positions."""
    made, given = with_heads(tiny, ["value"]), {}
    made.base.base_model.register_forward_pre_hook(
        lambda module, arguments, named: given.update(named), with_kwargs=True
    )
    ids = torch.tensor([[0, 0, 5, 6], [5, 6, 7, 0]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    made.values("value", ids, mask)
    assert torch.equal(given["input_ids"], ids) and torch.equal(given["attention_mask"], mask)
    assert given["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]


def test_values_are_float32_on_a_base_in_half_precision(tiny):
    preset = load_preset("pocket", model=tiny.model, compute_dtype="bfloat16")
    made = with_heads(preset, ["value"])
    assert made.values("value", *rows_of("left")).dtype == torch.float32


@pytest.mark.parametrize("forward_before", [False, True])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_gradients_with_a_head_are_those_of_a_model_of_its_own(tiny, checkpointing, forward_before):
    made = with_heads(tiny)
    ids, mask = rows_of("left")
    if forward_before:
        with torch.no_grad():
            for name in NAMES:
                made.values(name, ids, mask)
    prepare(made.model, checkpointing)
    runs = []
    made.base.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    for name in NAMES:
        made.use(name)
        ((made.values(name, ids, mask)[mask == 1] - 1.0) ** 2).mean().backward()
    assert len(runs) == (6 if checkpointing else 3)
    for name in NAMES:
        model, head = alone(tiny, made.state(name)), plain_head(made, name)
        ((values_alone(model, head) - 1.0) ** 2).mean().backward()
        assert_close(gradients(made.model, name), gradients(model, "default"))
        for key, want in head.named_parameters():
            found = dict(made.heads[name].named_parameters())[key].grad
            assert (found - want.grad).abs().max() / want.grad.abs().max() < 1e-5


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_backward_through_values_of_a_role_that_does_not_act_is_refused(tiny, checkpointing):
    made = with_heads(tiny)
    prepare(made.model, checkpointing)
    loss = made.values("value", *rows_of("left")).square().mean()
    made.values("reward", *rows_of("left"))
    with pytest.raises(RuntimeError, match="through role 'value' while 'reward' is active"):
        loss.backward()
    assert all(g is None for g in gradients(made.model, "value").values())


def test_a_new_head_is_random_by_its_seed():
    head, again, other = (ScalarHead(4095, seed) for seed in (1, 1, 2))
    assert head.weight.shape == (1, 4095) and head.weight.dtype == torch.float32
    assert head.weight.std().item() == pytest.approx(1 / 64, rel=0.05)
    assert abs(head.weight.mean().item()) < 4 / 64 / 64
    assert head.bias.tolist() == [0.0] and head.statistics is None
    assert same(head.state_dict(), again.state_dict())
    assert not torch.equal(head.weight, other.weight)
    small = torch.cat([ScalarHead(8, seed).weight for seed in range(500)])
    assert small.std().item() == pytest.approx(1 / 3, rel=0.04)  # 1/√8 would be 6% more


def test_rescaling_makes_scores_mean_0_and_standard_deviation_1():
    head = ScalarHead(64)
    hidden = 5 + 3 * torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    parameters = list(head.parameters())
    with torch.no_grad():
        head.bias.fill_(2.5)
        scores = head(hidden).squeeze()
        std, mean = torch.std_mean(scores)
        head.rescale(mean.item(), std.item())
        after = head(hidden).squeeze()
    assert after.mean().item() == pytest.approx(0, abs=1e-5)
    assert after.std().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(after, (scores - mean) / std, rtol=0, atol=1e-5)
    assert head.statistics == (mean.item(), std.item())
    assert all(a is b for a, b in zip(parameters, head.parameters(), strict=True))


def test_add_head_follows_the_role(tiny):
    made = tiny_roles(tiny, ["value"])
    made.add("frozen", copy_of="value", trainable=False)
    for name in made.names:
        made.add_head(name, seed=3)
    assert all(p.requires_grad for p in made.heads["value"].parameters())
    assert not any(p.requires_grad for p in made.heads["frozen"].parameters())
    found = made.parameters("value")
    assert len(found) == 28 + 2
    assert found["head.weight"] is made.heads["value"].weight
    assert found["head.bias"] is made.heads["value"].bias
    assert same(made.heads["value"].state_dict(), ScalarHead(64, 3).state_dict())
    assert not made.values("frozen", *rows_of("left")).requires_grad
    assert made.values("value", *rows_of("left")).requires_grad


def test_a_head_is_given_once_and_asked_for_by_name(tiny):
    made = tiny_roles(tiny, ["value"])
    with pytest.raises(ValueError, match=r"role 'value' has no head; call add_head\('value'\)"):
        made.values("value", *rows_of("left"))
    made.add_head("value")
    before = head_state(made, "value")
    with pytest.raises(ValueError, match="role 'value' has a head already"):
        made.add_head("value", seed=9)
    assert same(head_state(made, "value"), before)
    for call in (made.add_head, made.require_head):
        with pytest.raises(ValueError, match=r"no role 'none'; there are \['value'\]"):
            call("none")
    assert made.require_head("value") is made.heads["value"] and list(made.heads) == ["value"]


def test_a_copy_has_its_own_head(tiny):
    made = with_heads(tiny, ["reward", "other"])
    made.heads["reward"].rescale(0.5, 2.0)
    made.add("value", copy_of="reward")
    made.add("frozen", copy_of="reward", trainable=False)
    made.add("fresh")
    assert sorted(made.heads) == ["frozen", "other", "reward", "value"]
    before = head_state(made, "reward")
    for name in ("value", "frozen"):
        assert same(head_state(made, name), before)
        assert made.heads[name].statistics == (0.5, 2.0)
    assert all(p.requires_grad for p in made.heads["value"].parameters())
    assert not any(p.requires_grad for p in made.heads["frozen"].parameters())
    batch = rows_of("left")
    assert torch.equal(made.values("value", *batch), made.values("reward", *batch))
    made.heads["value"].rescale(1.0, 3.0)
    assert same(head_state(made, "reward"), before)
    assert made.heads["reward"].statistics == (0.5, 2.0)


@pytest.mark.parametrize("statistics", [None, (1 / 3, 0.1), (-1e-17, 12345678.9)])
def test_a_saved_head_comes_back_bit_for_bit(tiny, tmp_path, statistics):
    made = with_heads(tiny)
    made.heads["value"].statistics = statistics
    made.save("value", tmp_path / "adapter")
    files = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert files == sorted([CONFIG, WEIGHTS, HEAD_FILE])
    other = Roles(load_base(tiny), RANK, ALPHA)
    other.load("critic", tmp_path / "adapter", trainable=True)
    other.load("judge", tmp_path / "adapter")
    batch = rows_of("left")
    for name in ("critic", "judge"):
        assert same(other.state(name), made.state("value"))
        assert same(head_state(other, name), head_state(made, "value"))
        assert other.heads[name].statistics == statistics
        assert torch.equal(other.values(name, *batch), made.values("value", *batch))
        learns = [p.requires_grad for p in other.heads[name].parameters()]
        assert learns == [name == "critic"] * 2


def test_plain_peft_ignores_a_head_in_the_folder(tiny, tmp_path):
    made = with_heads(tiny)
    made.save("value", tmp_path / "adapter")
    assert (tmp_path / "adapter" / HEAD_FILE).is_file()
    model = PeftModel.from_pretrained(load_base(tiny), str(tmp_path / "adapter"))
    assert torch.equal(logits(model), logits(made.use("value")))


def test_loading_over_a_role_with_a_head_keeps_the_parameters(tiny, tmp_path):
    """An optimizer that holds them goes on with the loaded numbers."""
    made = with_heads(tiny)
    made.heads["value"].rescale(0.5, 2.0)
    made.save("value", tmp_path / "adapter")
    held, other = made.parameters("policy"), head_state(made, "reward")
    made.load("policy", tmp_path / "adapter", trainable=True)
    now = made.parameters("policy")
    assert held.keys() == now.keys() and all(held[key] is now[key] for key in held)
    assert same(head_state(made, "policy"), head_state(made, "value"))
    assert made.heads["policy"].statistics == (0.5, 2.0)
    assert same(head_state(made, "reward"), other)
    made.load("policy", tmp_path / "adapter")  # as frozen
    assert not any(p.requires_grad for p in made.heads["policy"].parameters())
    made.load("policy", tmp_path / "adapter", trainable=True)
    assert all(p.requires_grad for p in made.heads["policy"].parameters())


def test_loading_a_role_without_a_head_takes_the_head_away(tiny, tmp_path):
    made = with_heads(tiny, ["value"])
    tiny_roles(tiny, ["plain"]).save("plain", tmp_path / "adapter")
    made.load("value", tmp_path / "adapter", trainable=True)
    assert made.heads == {} and len(made.parameters("value")) == 28


@pytest.fixture
def saved_head(tiny, tmp_path):
    """Roles with heads, and the folder of one of them."""
    made = with_heads(tiny)
    made.heads["policy"].rescale(0.5, 2.0)
    made.save("policy", tmp_path / "adapter")
    return made, tmp_path / "adapter"


def refuse_head(made, folder, message):
    before = {name: head_state(made, name) for name in made.heads}
    statistics = {name: head.statistics for name, head in made.heads.items()}
    refuse(made, folder, ValueError, message)
    assert made.heads.keys() == before.keys()
    assert all(same(head_state(made, name), before[name]) for name in before)
    assert {name: head.statistics for name, head in made.heads.items()} == statistics


@pytest.mark.parametrize("keep", [0, 4, 8, 60, 0.5, -1])
def test_a_truncated_head_is_refused(saved_head, keep):
    made, folder = saved_head
    data = (folder / HEAD_FILE).read_bytes()
    (folder / HEAD_FILE).write_bytes(data[: int(len(data) * keep) if keep == 0.5 else keep])
    refuse_head(made, folder, "the head in .* cannot be read .*truncated or damaged")


@pytest.mark.parametrize("tensors", [{}, {"bias": torch.zeros(1)}, {"weight": torch.zeros(64)}])
def test_a_head_without_its_weights_is_refused(saved_head, tensors):
    made, folder = saved_head
    roles.save_file(tensors, folder / HEAD_FILE)
    refuse_head(made, folder, "the head in .* cannot be read .*truncated or damaged")


def test_a_head_of_another_width_is_refused(saved_head):
    made, folder = saved_head
    ScalarHead(128).write(folder / HEAD_FILE)
    refuse_head(made, folder, "has width 128, this base 64; load the base that it was trained on")
