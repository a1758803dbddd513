"""Folders of models as people have them: what would be wrong in silence is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from rlhf_helpers.base import load_base
from rlhf_helpers.presets import load_preset
from rlhf_helpers.roles import Roles
from rlhf_helpers.text import load_tokenizer

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 96}
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(num_attention_heads=2, tie_word_embeddings=False, **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder, **options):
    return load_base(load_preset("single_gpu", model=folder, device="cpu"), **options)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "fp8"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "exl2"},
    ],
)
def test_a_model_that_is_quantized_already_is_refused(folder, settings, quantized):
    edit(folder / "config.json", quantization_config=settings)
    method = settings["quant_method"]
    with pytest.raises(ValueError, match=rf"is quantized already \({method}\); give the model as"):
        load(folder, quantized=quantized)


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize(
    "rename",
    [
        lambda key: "_orig_mod." + key,  # as torch.compile names them
        lambda key: "module." + key,  # as data parallelism does
        lambda key: key.replace("q_proj.", "q_proj.base_layer."),  # as PEFT does, unmerged
        lambda key: key if "layers.1." not in key else "",  # a layer is missing
        lambda key: key if "lm_head" not in key else "",
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused(folder, rename, quantized):
    weights = load_file(folder / "model.safetensors")
    renamed = {name: tensor for key, tensor in weights.items() if (name := rename(key))}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="do not fit its config.json: .*all files of one"):
        load(folder, quantized=quantized)


def test_a_config_with_too_few_layers_is_refused(folder):
    edit(folder / "config.json", num_hidden_layers=1)
    with pytest.raises(ValueError, match="layers.1.* has no place"):
        load(folder)


def test_weights_saved_over_others_in_another_form_are_refused(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}', encoding="utf-8")
    with pytest.raises(ValueError, match="weights of two models, perhaps.*delete those that are"):
        load(folder)


def test_an_adapter_in_the_place_of_a_model_is_named(folder, tmp_path):
    roles = Roles(load(folder), 4, 8)
    roles.add("sft")
    roles.save("sft", tmp_path / "adapter")
    shutil.copy(tmp_path / "adapter" / "adapter_config.json", folder)
    for place in (folder, tmp_path / "adapter"):
        with pytest.raises(ValueError, match="holds an adapter .*; give the folder of its base"):
            load(place)


@pytest.mark.parametrize("of", [load_base, load_tokenizer])
def test_no_code_of_an_author_is_run_and_nobody_is_asked(folder, monkeypatch, of):
    code = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
    (folder / "own.py").write_text(code + "class Own: pass\n", encoding="utf-8")
    own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    edit(folder / "config.json", model_type="own", auto_map=own)
    tokenizer = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    with pytest.raises(ValueError):
        of(load_preset("single_gpu", model=folder, device="cpu"))
    assert not list(folder.rglob("ran"))


@pytest.mark.parametrize("quantized", [True, False])
def test_a_merged_model_is_right_where_the_config_calls_other_weights_tied(folder, quantized):
    edit(folder / "config.json", tie_word_embeddings=True)
    roles = Roles(load(folder, quantized=quantized), 4, 8)
    roles.add("policy")
    with torch.no_grad():
        for name, parameter in roles.parameters("policy").items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        expected = roles.use("policy")(IDS).logits
        merged = roles.merged("policy")
        assert torch.allclose(merged(IDS).logits, expected, atol=1e-4)
    assert merged.config.tie_word_embeddings is False


def test_a_merged_model_keeps_the_generation_settings(folder, tmp_path):
    GenerationConfig(eos_token_id=[2, 7], temperature=0.7, do_sample=True).save_pretrained(folder)
    roles = Roles(load(folder), 4, 8)
    roles.add("policy")
    roles.merged("policy").save_pretrained(tmp_path / "merged")
    kept = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert (kept.eos_token_id, kept.temperature) == ([2, 7], 0.7)
