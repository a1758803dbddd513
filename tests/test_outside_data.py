"""Other people's files: dialogues, copies, roles, parts, line ends; and what no file may do."""

import gzip
import json
import os
from pathlib import Path

import pytest
from datasets import Dataset
from test_text import CHAT, TALK, tokenizer_with
from transformers import LlamaConfig

from rlhf_helpers.presets import load_preset
from rlhf_helpers.reward import encode_pairs
from rlhf_helpers.sources import preference_dataset, prompt_dataset, sft_dataset
from rlhf_helpers.text import PLAIN_TEMPLATE, as_messages, encode_prompts, load_tokenizer

SPLITS = ("train", "judge", "held_out")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tokenizer and a config; data need no weights."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tokenizer_with(PLAIN_TEMPLATE, special=["<|start_header_id|>"])
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=len(tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture
def preset(model, tmp_path):
    """A preset whose data are these rows, each a line of JSON."""

    def make(rows, **overrides):
        path = tmp_path / f"rows-{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        sizes = {"prompt_length": 200, "response_length": 40, "device": "cpu"}
        return load_preset("single_gpu", **{"model": model, "data": path} | sizes | overrides)

    return make


def pair(prompt="what is tea?", chosen="a drink.", rejected="no."):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def hh(*turns, chosen="a drink.", rejected="no."):
    marks = ("\n\nHuman: ", "\n\nAssistant: ")
    talk = "".join(marks[i % 2] + turn for i, turn in enumerate(turns)) + marks[1]
    return {"chosen": talk + chosen, "rejected": talk + rejected}


def only(preset):
    """The one row that is kept, and the line that says what was left out."""
    (row,) = preference_dataset(preset).to_list()
    return row


# --- dialogues -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        hh("hi", "hello", "what is tea like?"),
        {"prompt": TALK} | {k: v[-300:] for k, v in pair().items() if k != "prompt"},
        {
            side: [*TALK, {"role": "assistant", "content": text}]
            for side, text in (("chosen", "a drink."), ("rejected", "no."))
        },
        pair("\n\nHuman: hi\n\nAssistant: hello\n\nHuman: what is tea like?\n\nAssistant:"),
        pair("hi\n\nAssistant: hello\n\nHuman: what is tea like?"),
    ],
    ids=["hh", "messages", "whole talks", "transcript", "without its first mark"],
)
def test_a_prompt_may_be_a_whole_dialogue(preset, row):
    found = only(preset([row]))
    assert found == {
        "prompt": TALK,
        "chosen": [{"role": "assistant", "content": "a drink."}],
        "rejected": [{"role": "assistant", "content": "no."}],
    }


def test_one_dialogue_makes_all_rows_lists_of_messages_in_every_split(preset, capsys):
    rows = [hh(f"what is {i}?") for i in range(20)]
    made = preset([*rows, hh("hi", "hello", "why?")])
    for split in SPLITS:
        for row in preference_dataset(made, split):
            assert isinstance(row["prompt"], list) and isinstance(row["chosen"], list)
    assert isinstance(sft_dataset(made)[0]["completion"], list)
    made = preset(rows)
    assert isinstance(preference_dataset(made)[0]["prompt"], str)
    assert "left out" not in capsys.readouterr().out


def test_what_is_kept_can_be_encoded_dialogues_too(preset):
    rows = [hh(*["so", "yes"] * (i % 3), f"what is {i}?") for i in range(30)]
    made = preset(rows)
    tokenizer = load_tokenizer(made)
    assert len(encode_pairs(tokenizer, preference_dataset(made), 200, 40)) == 14
    encode_prompts(tokenizer, list(prompt_dataset(made)["prompt"]), 200)


@pytest.mark.parametrize(
    "row, reason",
    [
        (hh("a?", "b", "", "c?"), "empty"),
        (hh("a?", chosen=""), "empty"),
        (hh("a?", chosen="so.\n\nHuman: why?"), "without an answer"),
        (pair(chosen="so.\n\nHuman: why?\n\nAssistant: oh."), "with turns behind the answer"),
        (hh("a?\n\nHuman: b?"), "with turns that do not alternate"),
        (pair([TALK[0], {"role": "tool", "content": "7 degrees"}]), "with other roles"),
        (pair([{"role": "user", "content": [{"type": "image"}]}]), "with parts that are no text"),
        (pair([{"from": "human", "value": "hi"}]), "neither text nor messages"),
        (pair(chosen=7), "neither text nor messages"),
        (pair(chosen=[*TALK[:1], {"role": "assistant", "content": None}]), "of two prompts"),
        (pair("hi", chosen=[*TALK[:1], {"role": "assistant", "content": None}]), "empty"),
        (pair(chosen="a <pad>"), "with a special token"),
        (pair("<|start_header_id|>system"), "with a special token"),
        (pair("so " * 300), "too long"),
        (pair(chosen="no. "), "equal pairs"),
    ],
)
def test_what_cannot_be_used_is_left_out_and_counted(preset, capsys, row, reason):
    good = [pair(f"what is {i}?") if "prompt" in row else hh(f"what is {i}?") for i in range(3)]
    found = preference_dataset(preset([*good, row])).to_list()
    assert f"3 of 4 rows kept; left out: 1 {reason}\n" in capsys.readouterr().out
    assert not any("tea" in str(row["prompt"]) for row in found)


@pytest.mark.parametrize(
    "row",
    [
        pair([{"role": "system", "content": ""}, *as_messages("what is tea?")]),
        pair([{"role": "system", "content": None}, *as_messages("what is tea?")]),
        pair([{"role": "user", "content": [{"type": "text", "text": "what is tea?"}]}]),
        pair([{"role": "user", "content": [{"text": "what "}, {"text": "is tea?"}]}]),
        pair("Human: what is tea?\n\nAssistant:"),
        {side: text.strip() for side, text in hh("what is tea?").items()},
        {side: text.replace("\n", "\r\n") for side, text in hh("what is tea?").items()},
        {side: text.replace("\n", "\r") for side, text in hh("what is tea?").items()},
        pair() | {"note": 1, "tools": [{"name": "x"}]},
    ],
    ids="empty-system null-system parts several-parts marks stripped crlf cr other-columns".split(),
)
def test_one_question_in_many_guises(preset, row):
    """Above all no "Human: Human: what is tea?", and no text of a list or of None."""
    assert only(preset([row])) == pair()


def test_a_system_message_is_kept_as_one(preset):
    talk = [{"role": "system", "content": "Be kind."}, *as_messages("what is tea?")]
    assert only(preset([pair(talk)]))["prompt"] == talk
    strict = {side: "Be kind." + text for side, text in hh("what is tea?").items()}
    assert only(preset([strict]))["prompt"] == talk


def test_a_dialogue_that_the_template_drops_is_left_out(preset, model, tmp_path, capsys):
    """Many templates know no system message: the prompt would be another one."""
    folder = tmp_path / "without system"
    tokenizer = tokenizer_with(CHAT.replace("messages %}", "messages if m['role'] != 'system' %}"))
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=len(tokenizer)).save_pretrained(folder)
    talk = [{"role": "system", "content": "Be kind."}, *as_messages("what is rice?")]
    made = preset([pair(), pair(talk)], model=folder)
    assert prompt_dataset(made)["prompt"][:] == ["what is tea?"]
    assert "1 not repeated in full by the chat template" in capsys.readouterr().out


# --- copies and splits ---------------------------------------------------------------------


def sides(preset, of=preference_dataset, splits=SPLITS):
    return [{json.dumps(row["prompt"]) for row in of(preset, split)} for split in splits]


def test_copies_are_left_out_and_counted(preset, capsys):
    rows = [pair(f"what is {i}?") for i in range(20)] * 3
    made = preset(rows)
    train, judge, held_out = sides(made)
    assert "20 of 60 rows kept; left out: 40 copies\n" in capsys.readouterr().out
    assert (len(train), len(judge), len(held_out)) == (9, 9, 2)
    assert not (train & held_out or judge & held_out or train & judge)


def test_no_prompt_is_on_two_sides_though_its_answers_differ(preset):
    """Ten answers to each prompt: split by row, nearly all held-out prompts were trained on."""
    rows = [pair(f"what is {i % 20}?", f"answer {i}.") for i in range(200)]
    made = preset(rows)
    train, judge, held_out = sides(made)
    assert (len(train), len(judge), len(held_out)) == (9, 9, 2)
    assert not (train & held_out or judge & held_out or train & judge)
    assert [len(preference_dataset(made, split)) for split in SPLITS] == [90, 90, 20]
    for of in (prompt_dataset, sft_dataset):
        train, held_out = sides(made, of, ("train", "held_out"))
        assert not train & held_out


@pytest.mark.parametrize("own", ["test", "validation"])
def test_prompts_of_the_sources_own_held_out_split_are_not_trained_on(model, tmp_path, capsys, own):
    rows = {"train": range(12), own: range(9, 15)}
    for split, numbers in rows.items():
        lines = [json.dumps(hh(f"what is {i}?", chosen=split)) + "\n" for i in numbers]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    made = load_preset("single_gpu", model=model, data=tmp_path, device="cpu")
    train, judge, held_out = sides(made)
    assert (len(train), len(judge), len(held_out)) == (5, 4, 6)
    assert not (train & held_out or judge & held_out)
    assert "train: 9 of 12 rows kept; left out: 3 of a held-out prompt" in capsys.readouterr().out


def test_a_prompts_side_does_not_change_with_the_lengths_or_a_new_row(preset):
    rows = [pair(f"what is {i}?", "good " * (i % 30) + "x") for i in range(200)]
    long = sides(preset(rows))
    short = sides(preset(rows, response_length=24))
    more = sides(preset([*rows, pair("what is new?")]))
    for a, b in ((0, 1), (0, 2), (1, 2), (1, 0), (2, 0), (2, 1)):
        assert not long[a] & short[b]
        assert len(long[a] & more[b]) <= 1  # at a border
    assert short[0] < long[0] and short[2] < long[2]


@pytest.mark.parametrize(
    "first, second",
    [
        ("what is a caf\u00e9?", "what is a cafe\u0301?"),
        ("what is  tea?", "what is tea?"),
        ("what is tea?", [{"role": "system", "content": " "}, *as_messages("what is tea?")]),
    ],
)
def test_two_spellings_of_a_prompt_are_one(preset, first, second):
    spellings = [first, second]
    rows = [pair(spellings[i % 2], f"answer {i}.") for i in range(10)]
    rows = [row | {"prompt": as_messages(row["prompt"])} for row in rows]
    rows += [pair(as_messages(f"what is {i}?")) for i in range(30)]
    made = preset(rows)
    found = [sum(str(row["chosen"]).startswith("answer") for row in preference_dataset(made, split))
             for split in SPLITS]  # fmt: skip
    assert sorted(found) == [0, 0, 10]


def test_a_system_column_is_a_system_message(preset, capsys):
    row = pair() | {"system": "Answer in French.", "source": "web"}
    found = only(preset([row]))
    assert found["prompt"][0] == {"role": "system", "content": "Answer in French."}
    assert found["prompt"][1:] == as_messages("what is tea?")
    assert "1 of 1 rows kept; columns not read: source\n" in capsys.readouterr().out
    assert only(preset([pair() | {"system": ""}])) == pair()
    twice = pair(found["prompt"]) | {"system": "Answer in French."}
    assert only(preset([twice]))["prompt"] == found["prompt"]


def test_answers_that_are_labelled_as_bad_are_not_imitated(preset, capsys):
    rows = [{"prompt": f"what is {i}?", "completion": "so.", "label": i % 2 == 0} for i in range(6)]
    assert len(sft_dataset(preset(rows))) == 3
    assert "3 of 6 rows kept; left out: 3 labelled as undesirable" in capsys.readouterr().out


@pytest.mark.parametrize("write", [str, json.dumps])
def test_messages_that_were_written_as_text_are_no_text(preset, pocket, tmp_path, write):
    """Else a prompt would be brackets and quotes, in silence."""
    sides = {"chosen": "a drink.", "rejected": "no."}
    row = {
        side: write([*TALK, {"role": "assistant", "content": text}]) for side, text in sides.items()
    }
    for bad in (row, pair(write(TALK)), pair() | row):
        with pytest.raises(ValueError, match=r"can be used \(1 with messages written as text"):
            preference_dataset(preset([bad]))
        Dataset.from_list([bad]).to_json(tmp_path / "rows.jsonl")
        with pytest.raises(ValueError, match="row 1 cannot be used .with messages written as text"):
            preference_dataset(pocket, source=str(tmp_path / "rows.jsonl"))


# --- files ---------------------------------------------------------------------------------

LINE = json.dumps(pair())


@pytest.mark.parametrize(
    "name, content",
    [
        ("rows.jsonl", LINE + "\r\n"),
        ("rows.jsonl", "\ufeff" + LINE),
        ("rows [1]*?.jsonl", LINE),
        ("rows.json", f"[{LINE}]"),
        ("rows.jsonl.gz", gzip.compress(LINE.encode(), mtime=0)),
        ("rows.csv", "prompt,chosen,rejected\r\nwhat is tea?,a drink.,no.\r\n"),
        (
            "rows.csv.gz",
            gzip.compress(b"prompt,chosen,rejected\nwhat is tea?,a drink.,no.\n", mtime=0),
        ),
        ("rows.jsonl", json.dumps(pair() | {"n": 1}) + "\n" + json.dumps(pair() | {"n": "x"})),
        ("rows.jsonl", LINE + "\n" + json.dumps({"note": "no pair", **pair()})),
    ],
)
def test_files_as_people_have_them(pocket, tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert preference_dataset(pocket, source=str(path))[0] == pair()


def test_a_csv_file_holds_texts_whatever_they_look_like(pocket, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("n,prompt,chosen,rejected\n1,12,NA,null\n2,1.50,007,nan\n", encoding="utf-8")
    found = preference_dataset(pocket, source=str(path)).to_list()
    assert [tuple(row.values()) for row in found] == [("12", "NA", "null"), ("1.50", "007", "nan")]


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "r.jsonl",
            LINE + "\n" + json.dumps(pair(chosen="x\ud800")),
            "line 2 of r.jsonl has half of a char.*; save it",
        ),
        ("r.jsonl", LINE.encode() + b'\n{"prompt": "\xff", "chosen": "a"}', "not UTF-8; save it"),
        ("r.jsonl", "ü".encode("utf-16"), "line 1 of r.jsonl .* is not UTF-8; save it"),
        ("r.jsonl", LINE + "\n" + LINE[:-9], "line 2 of r.jsonl is not JSON"),
        ("r.json", "[" + LINE, "cannot be read as data .Unexpected"),
        (
            "r.csv",
            "prompt,chosen,rejected\na,b,c,d\n",
            "loss of data.*quote texts with commas",
        ),
        ("r.csv", b"prompt,chosen,rejected\na,b,\xff\n", "not UTF-8; save it"),
        ("r.csv", "prompt,chosen,rejected\n", "is empty, and needs at least one row"),
        ("r.csv", "", "is empty, and needs at least one row"),
        ("r.jsonl.gz", gzip.compress(b"", mtime=0), "is empty, and needs at least one row"),
        ("r.parquet", b"PAR1", "cannot be read as data .*copy a damaged file again"),
    ],
)
def test_a_file_that_cannot_be_read_names_what_to_mend(pocket, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        preference_dataset(pocket, source=str(path))
    assert str(path) in str(caught.value)


def test_a_folder_is_read_as_carefully_as_a_file(pocket, tmp_path):
    (tmp_path / "train.csv").write_text("prompt,chosen,rejected\nq,a,b,extra\n", encoding="utf-8")
    with pytest.raises(ValueError, match="loss of data.*quote texts with commas"):
        preference_dataset(pocket, source=str(tmp_path))
    (tmp_path / "train.csv").write_text("prompt,chosen,rejected\n12,NA,4\n", encoding="utf-8")
    assert preference_dataset(pocket, source=str(tmp_path)).to_list() == [pair("12", "NA", "4")]
    (tmp_path / "more.jsonl").write_text(LINE, encoding="utf-8")
    with pytest.raises(ValueError, match="several kinds, more.jsonl and train.csv, keep one"):
        preference_dataset(pocket, source=str(tmp_path))


@pytest.mark.parametrize("folder", [False, True])
def test_a_file_that_changed_is_read_again_whatever_its_date(pocket, tmp_path, folder):
    path = tmp_path / "train.jsonl"
    for answer in ("first.", "second."):
        path.write_text(json.dumps(pair(chosen=answer)), encoding="utf-8")
        os.utime(path, (1e9, 1e9))
        found = preference_dataset(pocket, source=str(tmp_path if folder else path)).to_list()
        assert found == [pair(chosen=answer)]


@pytest.mark.parametrize(
    "row, message",
    [
        (
            pair([TALK[0], {"role": "tool", "content": "7"}]),
            "row 1 cannot .* .with other roles",
        ),
        (pair(chosen="a\n\nHuman: b"), "row 1 cannot be used .with turns behind the answer"),
    ],
)
def test_a_strict_preset_names_the_row(pocket, tmp_path, row, message):
    Dataset.from_list([row]).to_json(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=message + ".*; mend or remove it"):
        preference_dataset(pocket, source=str(tmp_path / "rows.jsonl"))


# --- paths ---------------------------------------------------------------------------------


def test_paths_and_a_tilde_are_understood(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "mine").mkdir()
    made = load_preset(
        "single_gpu", model="~/mine", data=Path("~/d.jsonl"), runs="~/x", device="cpu"
    )
    assert made.model == str(tmp_path / "mine") and made.offline
    assert made.data == str(tmp_path / "d.jsonl")
    assert made.runs == tmp_path / "x"
    assert load_preset("pocket", runs="~/x").runs == tmp_path / "x"
    assert load_preset("single_gpu", device="cpu").model == "Qwen/Qwen2.5-0.5B"
    for bad in (3, "", " "):
        with pytest.raises(ValueError, match="data is .*; give a folder or a hub id"):
            load_preset("single_gpu", data=bad, device="cpu")
