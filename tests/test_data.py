"""Data sets, tokenizers and encoded prompts."""

import json
import shutil

import pytest
import torch
from datasets import Dataset

from rlhf_helpers.pocket import corpus, world
from rlhf_helpers.pocket.annotator import Annotator
from rlhf_helpers.pocket.rubric import answer_in, look_up
from rlhf_helpers.presets import load_preset
from rlhf_helpers.sources import preference_dataset, prompt_dataset, sft_dataset
from rlhf_helpers.text import (
    encode_examples,
    encode_prompts,
    load_tokenizer,
    pad_examples,
    render,
)

PAIR = {"prompt": "what is hot?", "chosen": "the sun.", "rejected": "the snow."}


def write_jsonl(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return str(path)


# --- the tokenizer -------------------------------------------------------------------------


def test_special_tokens_are_four_different_tokens(tokenizer):
    names = [corpus.PAD, corpus.EOS, corpus.USER, corpus.ASSISTANT]
    ids = tokenizer.convert_tokens_to_ids(names)
    assert len(set(ids)) == 4
    assert tokenizer.pad_token_id == ids[0]
    assert tokenizer.eos_token_id == ids[1]


def test_every_word_of_the_world_is_one_token(tokenizer):
    sentences = [*world.questions(), *world.claims()]
    words = sorted({word.strip(".,!?") for s in sentences for word in s.split()})
    assert len(words) > 400
    assert [w for w in words if len(tokenizer(w)["input_ids"]) != 1] == []


@pytest.mark.parametrize("text", ["what does the zebra say?", "¿Qué? 12×3 = 36 🦆", "A\tb\nc"])
def test_any_text_survives_a_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]).strip() == text


def test_prompt_and_response_tokenize_separately_as_together(tokenizer):
    prompt, response = "what does the duck say?", "it says quack."
    talk = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    whole = tokenizer.apply_chat_template(talk, tokenize=False)
    assert whole == f"<|user|> {prompt}<|assistant|> {response}<|eos|>"
    parts = [render(tokenizer, prompt), f"{response}<|eos|>"]
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
    assert ids[0] + ids[1] == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_prompts_are_padded_on_the_left(tokenizer):
    batch = encode_prompts(tokenizer, ["what is hot?", "what does the duck say?"], 24)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"][0].tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    assert batch["input_ids"][0, :2].tolist() == [tokenizer.pad_token_id] * 2
    assert batch["attention_mask"][1].all()


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([], "prompts is empty"),
        (["what is hot?", ""], "prompt 1 is ''"),
        (
            ["hi<|assistant|> moo.<|eos|>"],
            r"prompt 0 is .* with '<\|assistant\|>', a special token",
        ),
        (["  \n"], r"prompt 0 is '  \\n'"),
        (
            [" ".join(["hot"] * 30)],
            "prompt 0 .*has 32 tokens .*, and the limit is 24; .* raise prompt_length$",
        ),
    ],
)
def test_bad_prompts_are_named(tokenizer, prompts, message):
    with pytest.raises(ValueError, match=message):
        encode_prompts(tokenizer, prompts, 24)


@pytest.mark.parametrize("prompts", ["what is hot?", [3], [None]])
def test_what_is_no_list_of_texts_is_refused(tokenizer, prompts):
    with pytest.raises(TypeError, match="give a list of texts"):
        encode_prompts(tokenizer, prompts, 24)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_truncated_tokenizer_file_is_named(tmp_path, pocket, name):
    shutil.copytree(pocket.model, tmp_path / "base")
    path = tmp_path / "base" / name
    path.write_text(path.read_text(encoding="utf-8")[:100], encoding="utf-8")
    with pytest.raises(ValueError, match="truncated or damaged.*reinstall"):
        load_tokenizer(load_preset("pocket", model=str(tmp_path / "base")))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_missing_tokenizer_file_is_named(tmp_path, pocket, name):
    shutil.copytree(pocket.model, tmp_path / "base")
    (tmp_path / "base" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing; reinstall"):
        load_tokenizer(load_preset("pocket", model=str(tmp_path / "base")))


# --- generated data ------------------------------------------------------------------------


def test_generated_data_has_trls_columns(pocket):
    assert prompt_dataset(pocket).column_names == ["prompt"]
    assert sft_dataset(pocket).column_names == ["prompt", "completion"]
    pairs = preference_dataset(pocket)
    assert pairs.column_names == ["prompt", "chosen", "rejected", "probability"]
    assert all(isinstance(d, Dataset) for d in (prompt_dataset(pocket), pairs))


def test_generated_data_follow_the_seed(pocket):
    assert sft_dataset(pocket)[:] == sft_dataset(pocket)[:]
    assert sft_dataset(pocket)[:] != sft_dataset(load_preset("pocket", seed=1))[:]


def test_training_data_never_hold_a_held_out_prompt(pocket):
    held_out = set(prompt_dataset(pocket, "held_out")["prompt"])
    for dataset in (prompt_dataset(pocket), sft_dataset(pocket), preference_dataset(pocket)):
        assert not held_out & set(dataset["prompt"])


def test_training_data_never_state_a_held_out_fact(pocket):
    """Not even by the way, in an answer to an open request."""
    columns = [sft_dataset(pocket)["completion"]]
    columns += [preference_dataset(pocket)[name] for name in ("chosen", "rejected")]
    prompts = sft_dataset(pocket)["prompt"], *[preference_dataset(pocket)["prompt"]] * 2
    answers = [
        answer_in(look_up(prompt), sentence)
        for texts, asked in zip(columns, prompts, strict=True)
        for prompt, text in zip(asked, texts, strict=True)
        for sentence in world.split_sentences(text)
    ]
    stated = {(a.topic, a.subject) for a in answers if a and world.is_true(a)}
    assert len(stated) > 250
    assert [fact for fact in stated if world.held_out_subject(*fact)] == []


def test_preferences_follow_the_annotator(pocket):
    pairs = preference_dataset(pocket)
    assert all(row["chosen"] != row["rejected"] for row in pairs)
    mean = sum(pairs["probability"]) / len(pairs)
    # E[p of the chosen side] = E[p² + (1 − p)²], for these pairs well above a coin's 1/2
    assert 0.75 < mean < 1
    row = pairs[0]
    assert row["probability"] == Annotator().probability(
        row["prompt"], row["chosen"], row["rejected"]
    )
    fair = preference_dataset(pocket, annotator=Annotator().unbiased())
    assert fair["chosen"] != pairs["chosen"]


# --- files and folders ---------------------------------------------------------------------


def test_the_same_pairs_from_jsonl_csv_parquet_and_a_folder(tmp_path, pocket):
    rows = [PAIR, PAIR | {"prompt": 'say "a, b"'}]
    jsonl = write_jsonl(tmp_path / "pairs.jsonl", rows)
    Dataset.from_list(rows).to_csv(tmp_path / "pairs.csv")
    Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", rows)
    for source in (jsonl, tmp_path / "pairs.csv", tmp_path / "pairs.parquet", folder):
        assert preference_dataset(pocket, source=str(source)).to_list() == rows
        assert prompt_dataset(pocket, source=str(source)).to_list() == [
            {"prompt": row["prompt"]} for row in rows
        ]


def test_chosen_responses_serve_as_demonstrations(tmp_path, pocket):
    source = write_jsonl(tmp_path / "pairs.jsonl", [PAIR])
    expected = [{"prompt": PAIR["prompt"], "completion": PAIR["chosen"]}]
    assert sft_dataset(pocket, source=source).to_list() == expected


def turns(*contents):
    return [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]


def test_transcripts_are_split_at_the_last_answer(tmp_path, pocket):
    talk = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant: "
    rows = [{"chosen": talk + "because.", "rejected": talk + "go away."}]
    source = write_jsonl(tmp_path / "hh.jsonl", rows)
    (row,) = preference_dataset(pocket, source=source).to_list()
    assert row["prompt"] == turns("hi", "hello", "why?")
    assert row["chosen"] == [{"role": "assistant", "content": "because."}]
    assert row["rejected"] == [{"role": "assistant", "content": "go away."}]


def test_odd_but_valid_files_are_read(tmp_path, pocket):
    path = tmp_path / "pairs.jsonl"
    line = json.dumps(PAIR | {"chosen": "a\u2028b"}, ensure_ascii=False)
    path.write_text(f"\ufeff{line}\n\n", encoding="utf-8")
    assert preference_dataset(pocket, source=str(path))[0]["chosen"] == "a\u2028b"
    path = tmp_path / "pairs.csv"
    path.write_text("\ufeffprompt,chosen,rejected\na,b,c\n\n", encoding="utf-8")
    assert len(preference_dataset(pocket, source=str(path))) == 1


def test_a_csv_text_may_run_over_lines(tmp_path, pocket):
    path = tmp_path / "pairs.csv"
    path.write_text('prompt,chosen,rejected\n"a\nb",c,d\n', encoding="utf-8")
    assert preference_dataset(pocket, source=str(path))[0]["prompt"] == "a\nb"


# --- encoded demonstrations ----------------------------------------------------------------


def demonstrations(*pairs):
    return Dataset.from_list([{"prompt": prompt, "completion": end} for prompt, end in pairs])


HOT = ("what is hot?", "fire.")


def test_demonstrations_are_encoded_as_the_templates_parts(tokenizer):
    (example,) = encode_examples(tokenizer, demonstrations(HOT), 24, 32)
    assert tokenizer.decode(example["prompt"]) == "<|user|> what is hot?<|assistant|>"
    assert tokenizer.convert_ids_to_tokens(example["prompt"])[::6] == ["<|user|>"]
    assert tokenizer.decode(example["response"]) == " fire.<|eos|>"
    assert all(type(token) is int for part in example.values() for token in part)


def test_demonstrations_have_the_tokens_of_the_whole_chat(pocket, tokenizer):
    """What the chat template itself makes of both messages; and EOS is last, and only there."""
    dataset = sft_dataset(pocket).select(range(200))
    examples = encode_examples(tokenizer, dataset, 24, 40)
    assert len(examples) == 200
    for row, example in zip(dataset, examples, strict=True):
        talk = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        whole = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False)
        assert example["prompt"] + example["response"] == whole
        asked = tokenizer.apply_chat_template(
            talk[:1], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert example["prompt"] == asked
        assert whole.index(tokenizer.eos_token_id) == len(whole) - 1


def test_prompts_are_encoded_as_for_sampling(pocket, tokenizer):
    dataset = sft_dataset(pocket).select(range(50))
    batch = encode_prompts(tokenizer, dataset["prompt"][:], 24)
    examples = encode_examples(tokenizer, dataset, 24, 40)
    masks = batch["attention_mask"].bool()
    sampled = [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], masks, strict=True)]
    assert [example["prompt"] for example in examples] == sampled


@pytest.mark.parametrize(
    "pairs, message",
    [
        ([HOT, ("", "fire.")], "prompt 1 is ''"),
        ([HOT, ("what is hot?", " ")], "completion 1 is ' '"),
        ([HOT, ("what is hot?", "")], "completion 1 is ''"),
        ([HOT, ("hi<|assistant|>", "fire.")], r"prompt 1 is .* with '<\|assistant\|>'"),
        ([HOT, ("what is hot?", "fire.<|eos|>")], r"completion 1 is .* with '<\|eos\|>'"),
        ([HOT, ("what is hot?", "fire.<|user|> why?")], r"completion 1 is .* with '<\|user\|>'"),
    ],
)
def test_a_bad_demonstration_is_named(tokenizer, pairs, message):
    with pytest.raises(ValueError, match=message):
        encode_examples(tokenizer, demonstrations(*pairs), 24, 32)


def test_no_demonstrations_are_refused(tokenizer):
    empty = Dataset.from_dict({"prompt": [], "completion": []})
    with pytest.raises(ValueError, match="is empty: give at least one text"):
        encode_examples(tokenizer, empty, 24, 32)


@pytest.mark.parametrize("pair", [("what is hot?", 3), (3, "fire."), ("what is hot?", None)])
def test_a_demonstration_that_is_no_text_is_refused(tokenizer, pair):
    with pytest.raises(TypeError, match="give a list of texts"):
        encode_examples(tokenizer, demonstrations(pair), 24, 32)


def test_a_demonstration_is_never_cut(tokenizer):
    """The limits count the template and EOS; one token more is refused, and the limit named."""
    prompt, response = " ".join(["hot"] * 10), " ".join(["hot"] * 10)
    dataset = demonstrations(HOT, (prompt, response))
    example = encode_examples(tokenizer, dataset, 12, 11)[1]
    assert (len(example["prompt"]), len(example["response"])) == (12, 11)
    message = r"prompt 1 \('hot hot .*\) has 12 tokens with its template, and the limit is 11; .*"
    with pytest.raises(ValueError, match=message + "raise prompt_length"):
        encode_examples(tokenizer, dataset, 11, 11)
    message = r"completion 1 \('hot hot .*\) has 11 tokens .* and the limit is 10; .*"
    with pytest.raises(ValueError, match=message + "raise response_length"):
        encode_examples(tokenizer, dataset, 12, 10)


def test_examples_are_padded_to_the_middle(tokenizer):
    examples = [{"prompt": [5, 6], "response": [8, 1]}, {"prompt": [7], "response": [9, 9, 1]}]
    ids, mask, prompt_length = pad_examples(tokenizer, examples)
    pad = tokenizer.pad_token_id
    assert ids.tolist() == [[5, 6, 8, 1, pad], [pad, 7, 9, 9, 1]]
    assert mask.tolist() == [[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]
    assert prompt_length == 2
    assert ids.dtype == mask.dtype == torch.int64
    assert examples[1] == {"prompt": [7], "response": [9, 9, 1]}


def test_one_example_is_not_padded(tokenizer):
    ids, mask, prompt_length = pad_examples(tokenizer, [{"prompt": [5, 6], "response": [8, 1]}])
    assert ids.tolist() == [[5, 6, 8, 1]] and mask.all() and prompt_length == 2


def test_padding_leaves_the_tokenizer_as_it_was(tokenizer):
    pad_examples(tokenizer, [{"prompt": [5], "response": [1]}])
    assert tokenizer.padding_side == "left"
