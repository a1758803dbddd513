"""The reward model for TRL's trainers, and for code that knows PEFT and transformers alone."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from rlhf_helpers.checkpoints import require_own_folder, whole_folder
from rlhf_helpers.guards import context_length, shown
from rlhf_helpers.kinds import From
from rlhf_helpers.reward import check_rewards, require_normalised, score_examples
from rlhf_helpers.roles import WEIGHTS, Roles, read_safetensors, readable
from rlhf_helpers.text import encode_prompts
from rlhf_helpers.validation import checked

USE = """# A reward model

One number for a prompt and a response that ends with EOS. The adapter belongs to the base `{base}`.
The head of a sequence classifier has no bias, this one has, hence the third line.

```python
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id={pad})
tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
model.score = torch.nn.Linear(model.config.hidden_size, 1)
model = PeftModel.from_pretrained(model, folder).eval()
reward = model(input_ids=ids, attention_mask=mask).logits[:, 0]
```
"""


@checked
def reward_function(
    roles: Roles,
    tokenizer: Tokenizer,
    policy: nn.Module,
    role: str = "reward",
    eos_penalty: From[0] = 1.0,
) -> Callable[..., list[float]]:
    """A role's scores as the reward function that GRPOTrainer and RLOOTrainer of TRL call.

    It scores token ids as `train_ppo` does: prompt in the chat template, then the response with its
    EOS or, where it was cut off, without one. A reward model that TRL is given as a model gets
    texts instead, without special tokens, and cannot see whether EOS came.

    Args:
        roles: on a base of its own, with a frozen role that has a normalised head.
        policy: the model that TRL trains; looked at here and not kept. It should begin as the SFT
            adapter: `PeftModel.from_pretrained(base, folder, is_trainable=True)`, which TRL copies
            for its reference.
        eos_penalty: taken off the score of a response that does not end by itself.

    Returns:
        A function of `prompts`, `completion_ids` and whatever else TRL gives; it returns one number
        for each response.

    Warns:
        UserWarning: if the policy has no adapter, or one that is still 0, so that it and its
            reference would be the bare base.

    Raises:
        ValueError: for a role that is missing, trainable or without a normalised head, or roles on
            the policy's base. Of the function: for prompts and completions that do not pair, and
            what `encode_prompts` refuses.
        TypeError: of the function, if it is not given `completion_ids`.
        FloatingPointError: of the function, for a score that is not finite.

    Example:
        >>> score = reward_function(roles, tokenizer, policy)        # doctest: +SKIP
        >>> trainer = GRPOTrainer(policy, reward_funcs=score, ...)   # doctest: +SKIP

    Lesson 09 uses it.
    """
    roles.require(role, trainable=False)
    require_normalised(roles, role)
    _check_policy(policy, roles)

    def reward_model(prompts, completion_ids, **others) -> list[float]:
        if len(prompts) != len(completion_ids):
            counts = f"{len(prompts)} prompts for {len(completion_ids)} responses"
            raise ValueError(f"{counts}; give each response its prompt")
        for i, ids in enumerate(completion_ids):
            if isinstance(ids, str | int) or len(ids) == 0:
                mend = "give the token ids of a response, one at least"
                raise ValueError(f"completion_ids[{i}] is {shown(ids)}: {mend}")
        longest = context_length(roles.base) - max(map(len, completion_ids), default=0)
        rows = encode_prompts(tokenizer, prompts, longest)
        triples = zip(rows["input_ids"], rows["attention_mask"], completion_ids, strict=True)
        examples = [
            {"prompt": ids[mask.bool()].tolist(), "response": [int(x) for x in response]}
            for ids, mask, response in triples
        ]
        scores = score_examples(roles, role, tokenizer, examples)
        cut_off = [example["response"][-1] != tokenizer.eos_token_id for example in examples]
        scores = scores - eos_penalty * torch.tensor(cut_off)
        return check_rewards(scores, len(prompts)).tolist()

    return reward_model


def _check_policy(policy: nn.Module, roles: Roles) -> None:
    """Refuse one on the same base as the roles; warn of one that begins as a bare base."""
    named = dict(policy.named_parameters())
    own = {parameter.data_ptr() for parameter in roles.base.parameters()}
    if any(parameter.data_ptr() in own for parameter in named.values()):
        raise ValueError(
            "the policy and the reward model are on one base; call load_base again for one of them"
        )
    if not any(p.any() for name, p in named.items() if ".lora_B." in name):
        warnings.warn(
            "the policy has no adapter that changes anything: it, and TRL's reference with it, "
            "answers as the bare base. Give PeftModel.from_pretrained(base, SFT's folder, "
            "is_trainable=True), and no peft_config; ignore this if SFT is merged in",
            stacklevel=4,
        )


@checked
def keep_float32(policy: nn.Module, folder: Path) -> None:
    """Give a policy in TRL's hands the adapter of a folder in float32; call it after the trainer.

    On a 4-bit base TRL rounds what is trained to bfloat16, whose steps are 1/256 of a weight:
    most updates of a small learning rate would round to nothing.

    Args:
        policy: `trainer.model`, whose adapter is called "default", as PEFT and TRL do.
        folder: the adapter that the policy began as.

    Raises:
        ValueError: for a policy without such an adapter, or a folder from which none can be read;
            nothing has changed then.
    """
    trained = [p for n, p in policy.named_parameters() if ".default." in n and p.requires_grad]
    if not trained:
        raise ValueError(
            "the policy trains no adapter 'default'; give PeftModel.from_pretrained(base, folder, "
            "is_trainable=True) to the trainer"
        )
    with readable(f"the adapter in '{folder}'"):
        weights, _ = read_safetensors(Path(folder) / WEIGHTS)
    for parameter in trained:
        parameter.data = parameter.data.float()
    set_peft_model_state_dict(policy, weights, adapter_name="default")


@checked
def export_reward_model(roles: Roles, role: str, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a reward model as a folder that plain transformers and PEFT load, head included.

    The adapter goes on `AutoModelForSequenceClassification`, whose head `score` it replaces. The
    folder's README has the five lines that load it. What they score must end with EOS, as the
    responses here do: the text alone does not say whether a response ended.

    Args:
        folder: replaced as a whole, or not at all.

    Raises:
        ValueError: for a role that is missing or has no normalised head, or a folder that holds
            something else than a role.

    Lesson 09 loads it.
    """
    require_normalised(roles, role)
    require_own_folder(folder)
    head = {
        f"base_model.model.score.{n}": p.cpu() for n, p in roles.heads[role].state_dict().items()
    }
    with whole_folder(folder) as new:
        roles.write(role, new)
        (new / "head.safetensors").unlink()
        settings = LoraConfig.from_pretrained(str(new))
        settings.task_type, settings.modules_to_save = "SEQ_CLS", ["score"]
        settings.target_modules = sorted({name.rpartition(".")[2] for name in roles.shapes})
        settings.save_pretrained(new)
        weights, metadata = read_safetensors(new / WEIGHTS)
        save_file(weights | head, new / WEIGHTS, metadata=metadata)
        tokenizer.save_pretrained(new)
        base = json.loads((new / "adapter_config.json").read_text(encoding="utf-8"))
        use = USE.format(base=base["base_model_name_or_path"], pad=tokenizer.pad_token_id)
        (new / "README.md").write_text(use, encoding="utf-8")
