"""Preset single_gpu on the CPU: tiny models and data files of the layouts that the hub has."""

import gzip
import json
import shutil
from dataclasses import replace

import bitsandbytes as bnb
import httpx
import pytest
import torch
from build_notebooks import ROOT, execute, read_source
from helpers_models import THINGS, trained
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from nbformat.v4 import new_code_cell
from safetensors.torch import load_file
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
)

from rlhf_helpers import base as base_module
from rlhf_helpers import files as files_module
from rlhf_helpers import text as text_module
from rlhf_helpers.base import linear_shapes, load_base
from rlhf_helpers.ppo import PPOConfig, train_ppo
from rlhf_helpers.presets import load_preset
from rlhf_helpers.reward import (
    RewardConfig,
    encode_pairs,
    normalise,
    score_examples,
    train_reward_model,
)
from rlhf_helpers.roles import Roles
from rlhf_helpers.sft import SFTConfig, train_sft
from rlhf_helpers.sources import preference_dataset, prompt_dataset, sft_dataset
from rlhf_helpers.text import (
    answer_text,
    encode_examples,
    encode_prompts,
    load_tokenizer,
    readable,
    render,
)
from rlhf_helpers.training import backward

NAMES = ["qwen2", "llama", "gpt_neox"]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}
QWEN_TEMPLATE = (
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def _no_sources_from_environment(monkeypatch):
    for name in ("RLHF_MODEL", "RLHF_DATA", "RLHF_DEVICE"):
        monkeypatch.delenv(name, raising=False)


# --- models --------------------------------------------------------------------------------


def qwen2_tokenizer():
    """As Qwen2.5's base: pad is EOS, and <|fim_pad|> a token that is not marked as special."""
    own = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    model = json.loads(trained(own).to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Qwen2Tokenizer(model["vocab"], merges, extra_special_tokens=own[1:])
    tokenizer.add_tokens([AddedToken("<|fim_pad|>", normalized=False)])
    tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


def llama_tokenizer():
    """As Llama's base: no pad token, no chat template."""
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=trained(list(named.values())), **named)


def gpt_neox_tokenizer():
    """As Pythia: one token for begin, end and unknown, another that only pads."""
    end = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>")
    bpe = trained(["<|endoftext|>", "<|padding|>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **end)


KINDS = {
    "qwen2": (Qwen2Config, qwen2_tokenizer, {"num_key_value_heads": 1}),
    "llama": (LlamaConfig, llama_tokenizer, {"num_key_value_heads": 2}),
    # dropout in the config, which the course must not have
    "gpt_neox": (GPTNeoXConfig, gpt_neox_tokenizer, {"hidden_dropout": 0.1}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each architecture, as a download from the hub leaves it."""
    made = {}
    for name, (config, tokenizer, own) in KINDS.items():
        made[name] = tmp_path_factory.mktemp("models") / name
        tokenizer = tokenizer()
        torch.manual_seed(0)
        ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        config = config(vocab_size=len(tokenizer) + 8, **SIZES, **own, **ends)
        AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


# --- data ----------------------------------------------------------------------------------


def pairs():
    """50 that can be used, and others, as (prompt, chosen, rejected)."""
    fit = [(f"what is {THINGS[i % 10]} like {i}?", f"good {i}.", f"bad {i}.") for i in range(50)]
    return [
        *fit,
        *[(f"hi {i}\n\nAssistant: hello\n\nHuman: why?", "so.", "no.") for i in range(5)],
        *[(f"what is it {i}?", "the same.", "the same. ") for i in range(3)],
        ("what is it?", "", "no."),
        (" ", "yes.", "no."),
        ("what is <|endoftext|>?", "the end", "no."),
        ("what is </s>?", "the end", "no."),
        *[("what is it " * 40 + f"{i}?", "yes.", "no.") for i in range(2)],
        *[(f"what is it {i}?", "good " * 30, "no.") for i in range(2)],
    ]


def in_hh(prompt, chosen, rejected):
    talk = f"\n\nHuman: {prompt}\n\nAssistant: "
    return {"chosen": talk + chosen, "rejected": talk + rejected}


def in_tldr(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected}


def in_ultrafeedback(prompt, chosen, rejected):
    """The prompt is also the first message, with earlier turns between if there are any."""
    first, *later = prompt.replace("\n\nAssistant: ", "\n\nHuman: ").split("\n\nHuman: ")
    roles = ["user", "assistant"]
    talk = [{"role": roles[i % 2], "content": text} for i, text in enumerate([first, *later])]
    sides = {"chosen": chosen, "rejected": rejected}
    return {"prompt": prompt} | {
        side: [*talk, {"role": "assistant", "content": text}] for side, text in sides.items()
    }


def in_messages(prompt, chosen, rejected):
    """TRL's way: the prompt as messages, the answers as a message each."""
    row = in_ultrafeedback(prompt, chosen, rejected)
    return {"prompt": row["chosen"][:-1]} | {s: row[s][-1:] for s in ("chosen", "rejected")}


def in_whole_talks(prompt, chosen, rejected):
    """TRL's other way: no prompt column, two whole dialogues as messages."""
    row = in_ultrafeedback(prompt, chosen, rejected)
    return {side: row[side] for side in ("chosen", "rejected")}


FORMATS = {
    "hh": in_hh,
    "tldr": in_tldr,
    "ultrafeedback": in_ultrafeedback,
    "messages": in_messages,
    "whole_talks": in_whole_talks,
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same pairs in a file of each format."""
    folder = tmp_path_factory.mktemp("data")
    return {
        name: write(folder / f"{name}.jsonl", [form(*pair) for pair in pairs()])
        for name, form in FORMATS.items()
    }


@pytest.fixture(scope="module")
def preset(folders, files):
    """A preset for an architecture, short enough for a CPU."""

    def make(model="qwen2", data="hh", **overrides):
        sizes = {"prompt_length": 64, "response_length": 16, "device": "cpu"}
        sources = {"model": str(folders[model]), "data": files.get(data, data)}
        return load_preset("single_gpu", **sources | sizes | overrides)

    return make


# --- tokenizers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, pad", [("qwen2", "<|fim_pad|>"), ("llama", "<unk>"), ("gpt_neox", "<|padding|>")]
)
def test_a_base_models_tokenizer_is_completed_and_never_grows(preset, folders, name, pad):
    plain = AutoTokenizer.from_pretrained(folders[name])
    assert plain("what is tea?")["input_ids"], "the fixture's tokenizer must work"
    tokenizer = load_tokenizer(preset(name))
    assert tokenizer.pad_token == pad
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == len(plain)
    assert tokenizer.pad_token_id < len(plain)
    assert tokenizer.eos_token_id == plain.eos_token_id
    assert tokenizer.padding_side == "left"
    assert pad in tokenizer.all_special_tokens


def test_qwen_keeps_its_chat_template(preset, capsys):
    tokenizer = load_tokenizer(preset("qwen2"))
    text = render(tokenizer, "what is tea?")
    assert text.endswith("<|im_start|>user\nwhat is tea?<|im_end|>\n<|im_start|>assistant\n")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_a_model_without_chat_template_gets_a_plain_one(preset, capsys, name):
    tokenizer = load_tokenizer(preset(name))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "has no chat template" in lines[0]
    assert render(tokenizer, "what is tea?") == "Human: what is tea?\n\nAssistant:"
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    whole = tokenizer.apply_chat_template(talk, tokenize=False)
    assert whole == f"Human: hi\n\nAssistant: hello{tokenizer.eos_token}"


@pytest.mark.parametrize("name", NAMES)
def test_responses_end_with_the_tokenizers_eos(preset, name):
    made = preset(name)
    tokenizer = load_tokenizer(made)
    examples = encode_examples(tokenizer, sft_dataset(made), 64, 16)
    assert all(example["response"][-1] == tokenizer.eos_token_id for example in examples)
    assert all(example["response"].count(tokenizer.eos_token_id) == 1 for example in examples)
    assert not any(tokenizer.pad_token_id in e["prompt"] + e["response"] for e in examples)


def test_without_a_reserved_token_pad_equal_to_eos_is_refused(folders, tmp_path):
    bpe = trained(["<|endoftext|>"])
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ).save_pretrained(tmp_path)
    shutil.copy(folders["llama"] / "config.json", tmp_path)
    made = load_preset("single_gpu", model=str(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="pad token .* and eos token .* must be two tokens"):
        load_tokenizer(made)


# --- data sets -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_pairs_are_kept_from_every_format(preset, capsys, form):
    made = preset(data=form)
    expected = preference_dataset(preset(data="hh")).to_list()
    capsys.readouterr()
    found = preference_dataset(made)
    lines = capsys.readouterr().out.splitlines()
    assert found.column_names == ["prompt", "chosen", "rejected"]
    assert found.to_list() == expected
    # <|endoftext|> is a token of Qwen's, </s> is none and stays
    assert lines == [
        f"{form}.jsonl, train: 56 of 66 rows kept; left out: 4 too long, 3 equal pairs, 2 empty, "
        "1 with a special token"
    ]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_can_be_encoded(preset, name):
    """The filter counts as `encode_pairs` does: nothing that it keeps is refused later."""
    made = preset(name)
    tokenizer = load_tokenizer(made)
    for split in ("train", "judge", "held_out"):
        encode_pairs(tokenizer, preference_dataset(made, split), 64, 16)
        if split != "judge":
            encode_examples(tokenizer, sft_dataset(made, split), 64, 16)
            encode_prompts(tokenizer, list(prompt_dataset(made, split)["prompt"]), 64)


def test_the_limits_are_exact(preset, tmp_path):
    tokenizer = load_tokenizer(preset())
    row = ("what is tea like?", "very good.", "bad.")
    prompt = len(tokenizer(render(tokenizer, row[0]))["input_ids"])
    response = len(tokenizer(row[1])["input_ids"]) + 1  # EOS
    source = write(tmp_path / "one.jsonl", [in_hh(*row)])
    lengths = {"prompt_length": prompt, "response_length": response}
    assert len(preference_dataset(preset(data=source, **lengths))) == 1
    for name in lengths:
        shorter = lengths | {name: lengths[name] - 1}
        with pytest.raises(ValueError, match=r"no row that can be used \(1 too long\)"):
            preference_dataset(preset(data=source, **shorter))


def test_nothing_left_names_the_limits(preset, tmp_path):
    source = write(tmp_path / "hh.jsonl", [in_hh("hi " * 300, "a", "b"), in_hh("", "a", "b")])
    message = (
        r"hh.jsonl', split 'train', has no row that can be used \(1 empty, 1 too long\); "
        "give others, or raise prompt_length 64 or response_length 16"
    )
    with pytest.raises(ValueError, match=message):
        preference_dataset(preset(data=source))


def test_answers_to_two_prompts_are_left_out(preset, tmp_path, capsys):
    row = {"chosen": in_hh("a?", "b", "")["chosen"], "rejected": in_hh("c?", "", "d")["rejected"]}
    source = write(tmp_path / "hh.jsonl", [row, in_hh("a?", "b", "c")])
    assert len(preference_dataset(preset(data=source))) == 1
    assert "left out: 1 of two prompts" in capsys.readouterr().out


def test_order_and_rows_follow_the_preset(preset, capsys):
    first, again, other = (prompt_dataset(preset(seed=seed))["prompt"][:] for seed in (1, 1, 2))
    assert first == again
    assert first != other
    capsys.readouterr()
    few = preset(rows=20)
    parts = [prompt_dataset(few, split)["prompt"][:] for split in ("train", "held_out")]
    assert sum(len(part) for part in parts) == 20 and all(parts)
    assert capsys.readouterr().out.splitlines()[0].endswith("; 20 of them are used")


def test_splits_of_one_file_share_no_row(preset):
    made = preset()
    train, judge, held_out = (
        {
            (readable(row["prompt"]), *map(answer_text, (row["chosen"], row["rejected"])))
            for row in preference_dataset(made, split)
        }
        for split in ("train", "judge", "held_out")
    )
    assert (len(train), len(judge), len(held_out)) == (24, 26, 6)
    assert not (train & judge or train & held_out or judge & held_out)
    prompts, demonstrations = prompt_dataset(made)["prompt"], sft_dataset(made)
    assert sorted(map(readable, prompts)) == sorted(row[0] for row in train | judge)
    answers = map(answer_text, demonstrations["completion"])
    assert sorted(answers) == sorted(row[1] for row in train | judge)
    assert sft_dataset(made, "held_out").column_names == ["prompt", "completion"]
    for split in ("held_out_phrasing", "held_out_fact"):
        assert prompt_dataset(made, split)[:] == prompt_dataset(made, "held_out")[:]


@pytest.mark.parametrize("name", ["test", "validation"])
def test_a_split_of_the_source_is_held_out(preset, tmp_path, name):
    rows = [in_hh(*pair) for pair in pairs()[:30]]
    write(tmp_path / "train.jsonl", rows[:20])
    write(tmp_path / f"{name}.jsonl", rows[20:])
    made = preset(data=str(tmp_path))
    assert len(preference_dataset(made, "train")) == len(preference_dataset(made, "judge")) == 10
    assert len(prompt_dataset(made, "train")) == 20
    held_out = preference_dataset(made, "held_out")
    assert len(held_out) == 10
    assert preference_dataset(made, name)[:] == held_out[:]
    message = f"no split 'dev'; it has train, {name}; choose one of those"
    with pytest.raises(ValueError, match=message):
        preference_dataset(made, "dev")


def test_a_copy_of_hh_rlhf_is_read(preset, tmp_path):
    """Its layout: compressed files of both splits, in a folder for each kind of talk."""
    rows = [in_hh(*pair) for pair in pairs()[:20]]
    (tmp_path / "helpful-base").mkdir()
    for split, part in (("train", rows[:12]), ("test", rows[12:])):
        lines = "".join(json.dumps(row) + "\n" for row in part).encode()
        (tmp_path / "helpful-base" / f"{split}.jsonl.gz").write_bytes(gzip.compress(lines))
    made = preset(data=str(tmp_path), data_dir="helpful-base")
    assert (len(prompt_dataset(made)), len(prompt_dataset(made, "held_out"))) == (12, 8)


def test_splits_that_are_not_there_are_named(preset, tmp_path):
    source = write(tmp_path / "hh.jsonl", [in_hh(*pair) for pair in pairs()[:9]])
    made = preset(data=source)
    assert len(prompt_dataset(made)) == 9
    with pytest.raises(ValueError, match="too few rows .* split 'held_out'; .*held_out needs 10"):
        prompt_dataset(made, "held_out")
    with pytest.raises(ValueError, match="no split 'test'; it has train"):
        prompt_dataset(made, "test")
    for of in (prompt_dataset, sft_dataset):
        with pytest.raises(ValueError, match="'judge', which holds pairs: only preference_dataset"):
            of(made, "judge")
    one = preset(data=write(tmp_path / "one.jsonl", [in_hh(*pairs()[0])]))
    assert len(preference_dataset(one)) == 1
    with pytest.raises(ValueError, match="too few rows .* split 'judge'; .*judge needs 2"):
        preference_dataset(one, "judge")


def test_demonstrations_need_no_pairs(preset, tmp_path):
    """TL;DR's SFT split has a prompt and one completion."""
    rows = [{"prompt": prompt, "completion": chosen} for prompt, chosen, _ in pairs()[:20]]
    made = preset(data=write(tmp_path / "sft.jsonl", rows))
    assert len(sft_dataset(made)) == len(prompt_dataset(made)) == 18
    with pytest.raises(ValueError, match="no column 'chosen', only prompt, completion"):
        preference_dataset(made)


def test_prompts_alone_are_enough_to_sample(preset, tmp_path):
    made = preset(data=write(tmp_path / "p.jsonl", [{"prompt": p[0]} for p in pairs()[:20]]))
    assert len(prompt_dataset(made)) == 18
    with pytest.raises(ValueError, match="no column 'completion', only prompt"):
        sft_dataset(made)


def test_one_side_of_the_pairs_is_no_pair(preset, tmp_path):
    rows = [{"prompt": prompt, "rejected": rejected} for prompt, _, rejected in pairs()[:20]]
    made = preset(data=write(tmp_path / "half.jsonl", rows))
    assert len(prompt_dataset(made)) == 18
    for of, column in ((preference_dataset, "chosen"), (sft_dataset, "completion")):
        with pytest.raises(ValueError, match=f"no column '{column}', only prompt, rejected"):
            of(made)


def test_lists_that_are_no_messages_are_named(preset, tmp_path):
    row = {"prompt": "a?", "chosen": ["b"], "rejected": ["c"]}
    source = write(tmp_path / "lists.jsonl", [row])
    with pytest.raises(ValueError, match=r"no row that can be used \(1 neither text nor messages"):
        preference_dataset(preset(data=source))


def test_pocket_is_strict_and_reads_messages_too(tmp_path):
    pocket = load_preset("pocket")
    rows = [FORMATS[form](*pairs()[0]) for form in ("ultrafeedback", "messages", "whole_talks")]
    for number, row in enumerate(rows):
        source = write(tmp_path / f"{number}.jsonl", [row])
        (found,) = preference_dataset(pocket, source=source).to_list()
        assert tuple(found.values()) == pairs()[0]
        (found,) = sft_dataset(pocket, source=source).to_list()
        assert tuple(found.values()) == pairs()[0][:2]
    source = write(tmp_path / "equal.jsonl", [in_messages("a?", "b", "b")])
    with pytest.raises(ValueError, match=r"row 1 cannot be used \(equal pairs\).*'b'"):
        preference_dataset(pocket, source=source)


def test_thousands_of_rows_take_seconds(preset, tmp_path):
    import time

    rows = [in_hh(f"what is {i} like?", f"good {i}.", f"bad {i}.") for i in range(6000)]
    made = preset(data=write(tmp_path / "many.jsonl", rows))
    start = time.perf_counter()
    assert 3500 < len(prompt_dataset(made)) < 3700  # of the 4000 that the preset takes
    assert time.perf_counter() - start < 20


# --- loading a base ------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_all_linear_layers_but_the_last_are_quantized(preset, name):
    base = load_base(preset(name))
    quantized = [n for n, m in base.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert quantized and sorted(quantized) == sorted(linear_shapes(base))
    assert not any(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_what_learns_is_float32_whatever_the_base_computes_in(preset, tmp_path, name, dtype):
    made = Roles(load_base(preset(name, compute_dtype=dtype)), rank=4)
    made.add("policy")
    made.add("copy", copy_of="policy")
    made.add_head("copy")
    made.save("copy", tmp_path / "adapter")
    made.load("loaded", tmp_path / "adapter", trainable=True)
    for role in made.names:
        assert {p.dtype for p in made.parameters(role).values()} == {torch.float32}
    others = {
        p.dtype
        for n, p in made.base.named_parameters()
        if "lora_" not in n and p.dtype != torch.uint8
    }
    assert others == {getattr(torch, dtype)}


def test_sharded_weights_are_read(preset, folders, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(folders["qwen2"])
    folder = tmp_path / "sharded"
    shutil.copytree(folders["qwen2"], folder)
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="50KB")
    assert (folder / "model.safetensors.index.json").is_file()
    assert not (folder / "model.safetensors").exists()
    made = load_preset("single_gpu", model=str(folder), device="cpu")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(load_base(made)(ids).logits, load_base(preset())(ids).logits)
    part = sorted(folder.glob("model-0*.safetensors"))[1]
    part.unlink()
    with pytest.raises(ValueError, match=f"cannot be loaded .*{part.name}.*missing, truncated or"):
        load_base(made)
    (folder / "model.safetensors.index.json").write_text('{"weight', encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be loaded .JSON.*truncated or damaged"):
        load_base(made)


def test_weights_that_must_be_unpickled_are_refused(folders, tmp_path, monkeypatch):
    folder = tmp_path / "pickled"
    shutil.copytree(folders["llama"], folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    made = load_preset("single_gpu", model=str(folder), device="cpu")
    with pytest.raises(ValueError, match="pytorch_model.bin, which only unpickling can read"):
        load_base(made)
    monkeypatch.setattr(base_module, "_require_weights", lambda folder: None)  # as for a hub id
    with pytest.raises(ValueError, match="cannot be loaded .*safetensors"):
        load_base(made)


def test_the_bytes_that_are_asked_for_are_those_of_the_model(preset):
    made = preset()
    base = load_base(made)
    loaded = sum(p.numel() * p.element_size() for p in base.parameters())
    config = base.config
    del config.quantization_config
    estimate = base_module._weight_bytes(config, made, quantized=True)
    layers = linear_shapes(base).values()
    scales = sum(outputs * inputs for outputs, inputs in layers) / 64 * (1 + 4 / 256)
    assert estimate == pytest.approx(loaded + scales)
    plain = load_base(made, quantized=False)
    expected = sum(p.numel() * p.element_size() for p in plain.parameters())
    assert base_module._weight_bytes(config, made, quantized=False) == expected


@pytest.mark.parametrize("free", [10_000, 5_000_000])
def test_too_little_gpu_memory_is_said_before_any_weights_are_read(preset, monkeypatch, free):
    made = load_preset("single_gpu", model=preset().model, device="cuda", compute_dtype="float16")
    read = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 16 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(
        base_module, "_load_weights", lambda *_: read.append(1) or torch.nn.Linear(1, 1)
    )
    if free > 10**6:
        load_base(made)
        assert read
        return
    message = (
        r"needs \d+\.\d GB, its weights and a fifth more, and the GPU has 0.0 GB free; "
        "choose a smaller model .*'pocket'.*response_length or batch"
    )
    with pytest.raises(ValueError, match=message):
        load_base(made)
    assert not read


def hub_error(kind):
    request = httpx.Request("GET", "https://huggingface.co/api/models/my/model")
    return kind("no", response=httpx.Response(403, request=request))


@pytest.mark.parametrize(
    "kind, message",
    [
        (GatedRepoError, "accept its licence on its page and log in with .*local folder"),
        (RepositoryNotFoundError, "check the name and the network.*local folder"),
    ],
)
def test_a_hub_that_refuses_says_what_to_do(monkeypatch, kind, message):
    def refuse(*_, **__):
        raise OSError("You are trying to access a gated repo.") from hub_error(kind)

    monkeypatch.setattr(base_module.AutoConfig, "from_pretrained", refuse)
    monkeypatch.setattr(text_module.AutoTokenizer, "from_pretrained", refuse)
    made = load_preset("single_gpu", model="my/model", device="cpu")
    for load in (load_base, load_tokenizer):
        with pytest.raises(ConnectionError, match="'my/model' is no local path.*" + message):
            load(made)


@pytest.mark.parametrize("source", ["nobody/nothing", "/no/such/folder", "a b"])
def test_a_name_that_is_nowhere_names_the_local_folder(monkeypatch, source):
    monkeypatch.setenv("RLHF_MODEL", source)
    made = load_preset("single_gpu", device="cpu")
    for load in (load_base, load_tokenizer):
        with pytest.raises(ConnectionError, match="is no local path.*pass the local folder"):
            load(made)
    with pytest.raises(ConnectionError, match="is no local path.*pass the local folder"):
        preference_dataset(made, source=source)


def test_the_pinned_revision_is_asked_for(preset, monkeypatch):
    asked = []

    def load(source, **options):
        asked.append((source, options))
        raise OSError("enough")

    monkeypatch.setattr(files_module, "load_dataset", load)
    made = replace(load_preset("single_gpu", device="cpu"), model=preset().model, revision=None)
    with pytest.raises(ConnectionError):
        preference_dataset(made)
    with pytest.raises(ConnectionError):
        preference_dataset(made, source="some/other")
    (_, own), (_, other) = asked
    assert own["revision"] == made.data_revision and own["data_dir"] == "helpful-base"
    assert "revision" not in other and "data_dir" not in other


# --- the whole course ----------------------------------------------------------------------


def pipeline(made):
    """SFT, a reward model and its normalisation, and four roles ready for PPO."""
    tokenizer = load_tokenizer(made)
    lengths = (made.prompt_length, made.response_length)
    trained = Roles(load_base(made), rank=4)
    trained.add("reference")
    examples, held_out = (
        encode_examples(tokenizer, sft_dataset(made, split), *lengths)
        for split in ("train", "held_out")
    )
    steps = {"steps": 2, "batch_size": 4, "warmup_steps": 1, "eval_every": 1}
    sft = list(train_sft(trained, "reference", tokenizer, examples, held_out, SFTConfig(**steps)))
    trained.add("reward", copy_of="reference")
    trained.add_head("reward")
    pairs, held_out = (
        encode_pairs(tokenizer, preference_dataset(made, split), *lengths)
        for split in ("train", "held_out")
    )
    reward = list(
        train_reward_model(trained, "reward", tokenizer, pairs, held_out, RewardConfig(**steps))
    )
    scores = score_examples(trained, "reward", tokenizer, [pair["chosen"] for pair in pairs])
    normalise(trained, "reward", scores)
    return tokenizer, trained, [s.loss for s in (*sft, *reward) if s.loss is not None]


def for_ppo(made, trained, folder):
    ready = Roles(load_base(made), rank=4)
    for name in ("reference", "reward"):
        trained.save(name, folder / name)
        ready.load(name, folder / name)
    ready.add("policy", copy_of="reference")
    ready.add("value", copy_of="reward")
    return ready


PPO = PPOConfig(updates=2, batch_size=4, minibatch_size=2, epochs=1, response_length=8)


@pytest.mark.parametrize(
    "name, dtype",
    [*[(name, "float32") for name in NAMES], ("qwen2", "bfloat16"), ("qwen2", "float16")],
)
def test_the_course_runs_on_a_model_of_the_hubs(preset, tmp_path, name, dtype):
    made = preset(name, compute_dtype=dtype)
    tokenizer, trained, losses = pipeline(made)
    assert len(losses) == 4 and all(torch.tensor(losses).isfinite())
    ready = for_ppo(made, trained, tmp_path)
    prompts = list(prompt_dataset(made)["prompt"])
    first, second = train_ppo(ready, tokenizer, prompts, PPO, tmp_path / "policy")
    assert first.first_ratio == 1.0 and first.kl == 0.0
    assert torch.equal(first.experience.logprobs, first.experience.ref_logprobs)
    for stats in (first, second):
        assert all(torch.tensor([stats.policy["loss"], stats.value["loss"]]).isfinite())
        assert stats.policy["grad_norm"] > 0 and stats.value["grad_norm"] > 0
    assert (tmp_path / "policy" / "adapter_model.safetensors").is_file()
    again = Roles(load_base(made), rank=4)
    again.load("policy", tmp_path / "policy")
    kept = ready.state("policy")
    assert all(torch.equal(tensor, kept[key]) for key, tensor in again.state("policy").items())


def test_a_judge_is_trained_on_pairs_that_the_reward_model_never_saw(preset):
    made = preset()
    tokenizer = load_tokenizer(made)
    judges = Roles(load_base(made), rank=4)
    judges.add("judge")
    judges.add_head("judge")
    pairs, held_out = (
        encode_pairs(tokenizer, preference_dataset(made, split), 64, 16)
        for split in ("judge", "held_out")
    )
    config = RewardConfig(steps=2, batch_size=4, warmup_steps=1)
    stats = list(train_reward_model(judges, "judge", tokenizer, pairs, held_out, config))
    assert torch.tensor(stats[-1].loss).isfinite()


@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing_changes_no_gradient(preset, name):
    made = preset(name)
    tokenizer = load_tokenizer(made)
    examples = encode_examples(tokenizer, sft_dataset(made), 64, 16)
    states, runs = [], []

    def count(*_):
        runs[-1] += 1

    for checkpointing in (False, True):
        learner = Roles(load_base(replace(made, checkpointing=checkpointing)), rank=4)
        learner.add("policy")
        config = SFTConfig(steps=2, batch_size=4, warmup_steps=1)
        runs.append(0)
        learner.base.base_model.layers[0].mlp.register_forward_pre_hook(count)
        list(train_sft(learner, "policy", tokenizer, examples, examples[:4], config))
        states.append(learner.state("policy"))
    assert runs[1] == runs[0] + 2  # once more for each backward
    for key, tensor in states[0].items():
        torch.testing.assert_close(states[1][key], tensor, rtol=0, atol=1e-6)


# --- float16 -------------------------------------------------------------------------------


def gradients(made, call, size=1e-5):
    """Gradients of a loss of some size, small like a mean over very many tokens."""
    learner = Roles(load_base(made), rank=4)
    learner.add("policy")
    parameters = learner.parameters("policy")
    with torch.no_grad():
        for number, (name, parameter) in enumerate(parameters.items()):
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(number))
    ids = torch.arange(20, 60).view(2, 20)
    loss = size * learner.use("policy")(input_ids=ids, labels=ids).loss.float()
    call(loss, parameters.values(), learner)
    return torch.cat([p.grad.flatten() for p in parameters.values()])


def plainly(loss, parameters, learner):
    loss.backward()


def test_small_gradients_survive_a_float16_base(preset):
    exact = gradients(preset(), plainly)
    half = preset(compute_dtype="float16")
    lost, kept = (gradients(half, call) for call in (plainly, backward))
    assert kept.dtype == torch.float32
    errors = [((found - exact).norm() / exact.norm()).item() for found in (lost, kept)]
    assert errors[0] > 0.2 > 0.05 > errors[1], errors


def test_large_gradients_do_not_overflow_a_float16_base(preset):
    exact, half = (gradients(preset(compute_dtype=d), backward, 1e3) for d in ("auto", "float16"))
    assert ((half - exact).norm() / exact.norm()).item() < 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_bases_get_the_plain_backward_bit_for_bit(preset, dtype):
    made = preset(compute_dtype=dtype)
    assert torch.equal(gradients(made, plainly), gradients(made, backward))


# --- lessons -------------------------------------------------------------------------------


SMALL = """
from dataclasses import replace
from pathlib import Path
from rlhf_helpers import presets

sizes = {{"batch_size": 8, "minibatch_size": 4, "updates": 2, "response_length": 8}}
steps = {{"batch_size": 4, "steps": 4, "warmup_steps": 1, "eval_every": 2}}
presets.PRESETS["single_gpu"] = replace(
    presets.PRESETS["single_gpu"], model={model!r}, data={data!r}, data_dir=None, device="cpu",
    prompt_length=64, response_length=8, sft=steps, reward=steps, dpo=steps, ppo=sizes,
    runs=Path({runs!r}),
)
"""


@pytest.mark.parametrize("name", NAMES)
def test_the_lessons_run_on_a_real_architecture(folders, name, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_PRESET", "single_gpu")
    asked = [f"what is {THINGS[i % 10]} like {i}?" for i in range(1300)]
    asked[::3] = [f"hi\n\nAssistant: yes\n\nHuman: {question}" for question in asked[::3]]
    rows = [in_hh(question, "good.", "bad.") for question in asked]
    data = write(tmp_path / "pairs.jsonl", rows)
    words = {"model": str(folders[name]), "data": data, "runs": str(tmp_path)}
    lessons = [f"notebooks/src/{n}.py" for n in ("01_sft", "02_reward_model", "04_ppo_qlora")]
    if name == "qwen2":  # the others need nothing new
        names = ("05_kl_penalty", "08_dpo")
        lessons += [f"{place}/src/{n}.py" for n in names for place in ("notebooks", "solutions")]
    for lesson in lessons:
        nb = read_source(ROOT / lesson)
        nb.cells.insert(0, new_code_cell(SMALL.format(**words)))
        execute(nb, tmp_path, timeout=300)
        printed = "".join(o.get("text", "") for cell in nb.cells for o in cell.get("outputs", []))
        assert "preset single_gpu, on CPU" in printed
        assert "nothing with the preset 'single_gpu'" in printed
    made = {path.name for path in (tmp_path / "single_gpu").iterdir()}
    assert {"sft", "reward", "judge", "policy"} <= made
