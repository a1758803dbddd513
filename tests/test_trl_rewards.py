"""The reward model in TRL's hands, and in those of plain PEFT: the scores are the course's own."""

import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from rlhf_helpers.base import load_base
from rlhf_helpers.presets import ASSETS
from rlhf_helpers.reward import score_examples, score_tokens
from rlhf_helpers.roles import Roles
from rlhf_helpers.rollout import sample_responses
from rlhf_helpers.text import encode_examples, encode_prompts
from rlhf_helpers.trl_rewards import export_reward_model, keep_float32, reward_function

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing`:FutureWarning")

PROMPTS = ["what does the duck say?", "what is hot?", "tell me about the cow"]
SFT = ASSETS / "sft"
NAN = float("nan")


def judge(base):
    roles = Roles(base)
    roles.load("reward", ASSETS / "reward")
    return roles


@pytest.fixture(scope="module")
def roles(pocket):
    return judge(load_base(pocket))


@pytest.fixture(scope="module")
def policy(pocket):
    """From the SFT adapter, on a base of its own."""
    return PeftModel.from_pretrained(load_base(pocket), str(SFT), is_trainable=True)


@pytest.fixture(scope="module")
def score(roles, tokenizer, policy):
    return reward_function(roles, tokenizer, policy)


def as_messages(prompt):
    return [{"role": "user", "content": prompt}]


def test_scores_are_those_of_the_training_loop(roles, tokenizer, policy, score):
    """Sampled responses, some cut off: as `collect_experience` scores them."""
    prompts = PROMPTS * 8
    rollout = sample_responses(policy, tokenizer, prompts, response_length=9, seed=0)
    assert 0 < rollout.finished.sum() < len(prompts)
    expected = score_tokens(roles, "reward", rollout.input_ids, rollout.attention_mask)
    expected = expected - (~rollout.finished).float()
    width = rollout.response_mask.shape[1]
    ids = [
        row[mask.bool()].tolist()
        for row, mask in zip(rollout.input_ids[:, -width:], rollout.response_mask, strict=True)
    ]
    found = score(
        prompts=prompts, completions=rollout.texts, completion_ids=ids, trainer_state=None
    )
    assert all(type(x) is float for x in found)
    torch.testing.assert_close(torch.tensor(found), expected.detach(), rtol=1e-5, atol=1e-5)
    messages = [as_messages(prompt) for prompt in prompts]
    assert score(prompts=messages, completion_ids=ids) == found


def test_eos_is_seen_and_a_missing_one_costs(roles, tokenizer, policy, score):
    words = tokenizer("the duck says quack.")["input_ids"]
    ended, cut = score(prompts=PROMPTS[:1] * 2, completion_ids=[[*words, 1], words])
    free = reward_function(roles, tokenizer, policy, eos_penalty=0.0)
    (without,) = free(prompts=PROMPTS[:1], completion_ids=[words])
    assert without - cut == pytest.approx(1)
    assert abs(ended - without) > 0.1  # the model itself reads EOS too
    assert tokenizer.eos_token_id == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompts": PROMPTS, "completion_ids": [[5, 1]]}, ValueError, "3 prompts for 1 responses"),
        (
            {"prompts": PROMPTS[:1], "completion_ids": [[]]},
            ValueError,
            r"completion_ids\[0\] is \[\]: give",
        ),
        ({"prompts": PROMPTS[:1], "completions": ["a"]}, TypeError, "completion_ids"),
        ({"prompts": [""], "completion_ids": [[5, 1]]}, ValueError, "prompt"),
        ({"prompts": [], "completion_ids": []}, ValueError, "empty"),
    ],
)
def test_what_cannot_be_scored_is_refused(score, arguments, error, message):
    with pytest.raises(error, match=message):
        score(**arguments)


def test_a_score_that_is_not_finite_stops_the_run(pocket, tokenizer, policy):
    roles = judge(load_base(pocket))
    score = reward_function(roles, tokenizer, policy)
    with torch.no_grad():
        roles.heads["reward"].bias.fill_(NAN)
    with pytest.raises(FloatingPointError, match="the reward function returned nan for response 0"):
        score(prompts=PROMPTS[:1], completion_ids=[[5, 1]])


def test_a_role_that_cannot_score_is_refused(pocket, tokenizer, policy, roles):
    with pytest.raises(ValueError, match="there is no role 'judge'"):
        reward_function(roles, tokenizer, policy, "judge")
    with pytest.raises(ValueError, match="eos_penalty is -1"):
        reward_function(roles, tokenizer, policy, eos_penalty=-1)
    own = Roles(load_base(pocket))
    own.load("reward", ASSETS / "reward")
    own.add("learns", copy_of="reward")
    with pytest.raises(ValueError, match="role 'learns' is trainable"):
        reward_function(own, tokenizer, policy, "learns")
    own.heads["reward"].statistics = None
    with pytest.raises(ValueError, match="no normalisation statistics"):
        reward_function(own, tokenizer, policy)


def test_one_base_for_both_is_refused(tokenizer, roles):
    with pytest.raises(ValueError, match="are on one base; call load_base again"):
        reward_function(roles, tokenizer, roles.use("reward"))


def test_a_policy_without_the_sft_adapter_is_warned_of(pocket, tokenizer, roles, policy):
    bare = load_base(pocket)
    with pytest.warns(UserWarning, match="the policy has no adapter that changes anything") as seen:
        reward_function(roles, tokenizer, bare)
    assert Path(seen[0].filename) == Path(__file__)  # the line that has to change
    with pytest.warns(UserWarning, match="answers as the bare base"):
        reward_function(
            roles, tokenizer, get_peft_model(bare, LoraConfig(target_modules="all-linear"))
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward_function(roles, tokenizer, policy)


# --- in TRL's trainers ---


def trainer_of(kind, pocket, tokenizer, folder, quantized, **settings):
    kinds = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}
    trainer, config = kinds[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        base = load_base(pocket, quantized=quantized)
        model = PeftModel.from_pretrained(base, str(SFT), is_trainable=True)
        score = reward_function(judge(load_base(pocket, quantized=quantized)), tokenizer, model)
        made = trainer(
            model=model,
            reward_funcs=score,
            args=config(
                output_dir=str(folder),
                max_steps=2,
                per_device_train_batch_size=8,
                num_generations=4,
                max_completion_length=12,
                learning_rate=1e-3,
                beta=0.1,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **settings,
            ),
            train_dataset=Dataset.from_list([{"prompt": as_messages(p)} for p in PROMPTS * 4]),
            processing_class=tokenizer,
        )
    keep_float32(made.model, SFT)
    return made


def weights(model, adapter):
    end = f".{adapter}.weight"
    named = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(end)}
    return {name.replace(end, ""): parameter for name, parameter in named.items()}


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_two_steps_of_trls_trainers(kind, pocket, tokenizer, tmp_path, quantized):
    trainer = trainer_of(kind, pocket, tokenizer, tmp_path, quantized)
    before, reference = (weights(trainer.model, name) for name in ("default", "ref"))
    assert len(before) == 2 * len(Roles(load_base(pocket)).shapes)
    assert all(torch.equal(before[k], reference[k]) for k in reference)  # SFT, unrounded
    assert {p.dtype for p in before.values()} == {torch.float32}
    trainer.train()
    rows = [row for row in trainer.state.log_history if "reward" in row]
    assert len(rows) == 2
    assert rows[0]["rewards/reward_model/mean"] == rows[0]["reward"] != 0
    assert abs(rows[0]["kl"]) < 1e-6  # before the first step policy and reference are one
    after, kept = (weights(trainer.model, name) for name in ("default", "ref"))
    assert any(not torch.equal(before[k], after[k]) for k in before)
    assert all(torch.equal(reference[k], kept[k]) for k in reference)


def test_trls_prompts_are_ours(pocket, tokenizer, tmp_path):
    """The ids that TRL samples from are those that the reward model reads."""
    trainer = trainer_of("rloo", pocket, tokenizer, tmp_path, True)
    ids, _, _ = trainer._tokenize_prompts([as_messages(p) for p in PROMPTS])
    rows = encode_prompts(tokenizer, PROMPTS, 24)
    ours = [r[m.bool()].tolist() for r, m in zip(*rows.values(), strict=True)]
    assert ids == ours


def test_keep_float32_wants_an_adapter(pocket):
    with pytest.raises(ValueError, match="the policy trains no adapter 'default'"):
        keep_float32(load_base(pocket), SFT)


# --- export ---

ENDS = ["quack.", "great question! the duck says quack.", "it says moo. it says moo.", "no"]


@pytest.fixture(scope="module")
def examples(tokenizer):
    rows = {"prompt": [p for p in PROMPTS for _ in ENDS], "completion": ENDS * len(PROMPTS)}
    return encode_examples(tokenizer, rows, 24, 32)


@pytest.mark.parametrize("quantized", [True, False])
def test_a_plain_sequence_classifier_gives_the_same_scores(
    pocket, tokenizer, examples, tmp_path, quantized
):
    """transformers and PEFT alone, with the base's own folder; padding on either side."""
    roles = judge(load_base(pocket, quantized=quantized))
    expected = score_examples(roles, "reward", tokenizer, examples)
    folder, base = tmp_path / "reward_model", str(ASSETS / "base")
    export_reward_model(roles, "reward", tokenizer, folder)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["score"]
    )
    options = {"quantization_config": nf4} if quantized else {}
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32, **options
    )
    model.score = torch.nn.Linear(model.config.hidden_size, 1)
    model = PeftModel.from_pretrained(model, str(folder)).eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # else it rounds, on processors that have it
    plain = PreTrainedTokenizerFast.from_pretrained(str(folder))
    ids = [example["prompt"] + example["response"] for example in examples]
    for side in ("left", "right"):
        rows = plain.pad({"input_ids": ids}, padding_side=side, return_tensors="pt")
        assert (rows["attention_mask"] == 0).any()
        with torch.no_grad():
            found = model(rows["input_ids"], rows["attention_mask"]).logits[:, 0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.5


def test_the_folder_says_how_it_is_loaded(roles, tokenizer, tmp_path):
    folder = tmp_path / "reward_model"
    export_reward_model(roles, "reward", tokenizer, folder)
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    }
    assert "head.safetensors" not in names
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "`base`" in text and f"pad_token_id={tokenizer.pad_token_id})" in text
    assert roles.heads["reward"].statistics  # what is exported is normalised


def test_a_role_without_a_normalised_head_is_not_exported(pocket, tokenizer, tmp_path):
    roles = Roles(load_base(pocket))
    roles.add("reward")
    with pytest.raises(ValueError, match="role 'reward' has no head"):
        export_reward_model(roles, "reward", tokenizer, tmp_path / "x")
    roles.add_head("reward")
    with pytest.raises(ValueError, match="no normalisation statistics"):
        export_reward_model(roles, "reward", tokenizer, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
