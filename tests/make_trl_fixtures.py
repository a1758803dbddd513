"""Record what TRL 1.12.0's own PPOTrainer computes: tests/golden/trl_ppo.safetensors.

python tests/make_trl_fixtures.py

Run it in an environment of its own that holds trl==1.12.0, the last release with a PPOTrainer. The
models are tiny and random, on the CPU; nothing is downloaded. The trainer's code runs as it is: two
functions that `train()` calls, and its `log`, are wrapped to copy what stands in its local
variables, and no formula of PPO is written here.
"""

import copy
import json
import os
import sys
import tempfile
from pathlib import Path
from types import FrameType

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # an accelerator would move the models

import safetensors.torch
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

TARGET = Path(__file__).parent / "golden" / "trl_ppo.safetensors"
TRL_VERSION = "1.12.0"
VOCABULARY, PAD, EOS = 32, 0, 1
UPDATES, ROWS, MICRO_BATCH, RESPONSE_LENGTH = 2, 16, 8, 10
PROMPTS = (UPDATES + 1) * ROWS  # accelerate accumulates no gradients on a loader's last batch

# A micro-batch is half of the batch; the optimizer steps once in each epoch over the batch.
COMMON = {
    "num_ppo_epochs": 3,
    "num_mini_batches": 1,
    "per_device_train_batch_size": MICRO_BATCH,
    "gradient_accumulation_steps": ROWS // MICRO_BATCH,
    "total_episodes": UPDATES * ROWS,
    "response_length": RESPONSE_LENGTH,
    "local_rollout_forward_batch_size": ROWS,
    "stop_token": "eos",
    "temperature": 0.9,
    "learning_rate": 0.001,
}
OTHER = {"gamma": 0.9, "lam": 0.8, "cliprange": 0.1, "cliprange_value": 0.3, "kl_coef": 0.2}
RUNS = {
    "k1": {"kl_estimator": "k1", "whiten_rewards": False},
    "k1_whiten": {"kl_estimator": "k1", "whiten_rewards": True},
    "k3": {"kl_estimator": "k3", "whiten_rewards": False} | OTHER,
    "k3_whiten": {"kl_estimator": "k3", "whiten_rewards": True} | OTHER,
}
RUNS |= {f"{name}_float64": RUNS[name] | {"dtype": "float64"} for name in ("k1", "k3_whiten")}

ROLLOUT = (
    "responses scores logprobs ref_logprobs values padding_mask padding_mask_p1 sequence_lengths "
    "kl rewards returns"
).split()
MICRO = "micro_batch_inds new_logprobs vpred ratio pg_loss vf_loss".split()
STATS = "pg_clipfrac_stats vf_clipfrac_stats approxkl_stats".split()


class Recorder(PPOTrainer):
    """The trainer, with a copy of its local variables taken at three places in `train()`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.record: dict[str, Tensor] = {}
        self.rollout: dict[str, Tensor] = {}
        self.micro: list[dict[str, Tensor]] = []
        self.run_backward = self.accelerator.backward
        self.accelerator.backward = self.backward

    def whiten(self, values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        """Stands for `masked_whiten`: called for the rewards, if they are whitened, then for A."""
        result = WHITEN(values, mask, shift_mean)
        if shift_mean:
            seen = caller(sys._getframe(1), ROLLOUT)
            if "rewards" in self.rollout:
                seen["rewards_whitened"] = seen.pop("rewards")  # what train() went on with
            self.rollout = seen | self.rollout | {"advantages": values.clone()}
        else:
            self.rollout["rewards"] = values.clone()
        return result

    def backward(self, loss: Tensor, **kwargs) -> None:
        """Stands for `accelerator.backward`, called for each micro-batch."""
        frame = sys._getframe(1)
        self.rollout |= {"advantages_whitened": caller(frame, ["advantages"])["advantages"]}
        seen = frame.f_locals
        gradients = {
            name: torch.autograd.grad(seen[loss_name], seen[argument], retain_graph=True)[0]
            for name, loss_name, argument in (
                ("pg_gradient", "pg_loss", "new_logprobs"),
                ("vf_gradient", "vf_loss", "vpred"),
            )
        }
        self.micro.append(caller(frame, MICRO) | gradients)
        self.run_backward(loss, **kwargs)

    def log(self, logs: dict, start_time: float | None = None) -> None:
        """Called at the end of each update."""
        stats = {
            name.removesuffix("_stats"): values.flatten()
            for name, values in caller(sys._getframe(1), STATS).items()
        }
        micro = {name: torch.stack([x[name] for x in self.micro]) for name in self.micro[0]}
        for name, values in (self.rollout | micro | stats).items():
            self.record[f"update{self.state.global_step}/{name}"] = values.contiguous()
        self.rollout, self.micro = {}, []


WHITEN = ppo_trainer.masked_whiten


def caller(frame: FrameType, names: list[str]) -> dict[str, Tensor]:
    values = {name: frame.f_locals[name] for name in names}
    copies = {name: torch.as_tensor(value).detach().clone() for name, value in values.items()}
    return {k: v.to(torch.int16) if v.dtype == torch.int64 else v for k, v in copies.items()}


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, VOCABULARY))]
    model = WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model),
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def make_models() -> dict[str, nn.Module]:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.15,  # large, so that scores, values and log-probabilities vary
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        tie_word_embeddings=False,
        num_labels=1,
    )
    reference = LlamaForCausalLM(config)
    head = nn.Linear(config.hidden_size, VOCABULARY)  # with a bias: EOS early, padding never
    head.weight.data = reference.lm_head.weight.data.clone()
    head.bias.data = torch.zeros(VOCABULARY)
    head.bias.data[PAD], head.bias.data[EOS] = -1e4, 1.5
    reference.lm_head = head
    policy = copy.deepcopy(reference)
    for name, parameter in policy.named_parameters():
        if "norm" not in name and "bias" not in name:
            parameter.data += 0.03 * torch.randn_like(parameter)
    return {
        "model": policy,
        "ref_model": reference,
        "reward_model": LlamaForSequenceClassification(config),
        "value_model": LlamaForSequenceClassification(config),
    }


def run(settings: dict, folder: str) -> dict[str, Tensor]:
    """Train for a few updates and return the record, by key."""
    transformers.set_seed(0)
    settings = dict(settings)
    # The default too: the quotient of two counts takes it, as in the trainer's unbiased variance.
    torch.set_default_dtype(getattr(torch, settings.pop("dtype", "float32")))
    lengths = torch.randint(2, 6, (PROMPTS,)).tolist()
    prompts = [torch.randint(3, VOCABULARY, (length,)).tolist() for length in lengths]
    trainer = Recorder(
        args=PPOConfig(
            **(COMMON | settings),
            output_dir=folder,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            num_sample_generations=0,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            seed=0,
        ),
        processing_class=make_tokenizer(),
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        **make_models(),
    )
    ppo_trainer.masked_whiten = trainer.whiten
    trainer.train()
    return trainer.record


def main() -> None:
    if trl.__version__ != TRL_VERSION:
        raise SystemExit(f"trl is {trl.__version__}: install {TRL_VERSION}.")
    tensors = {}
    for name, settings in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            tensors |= {f"{name}/{key}": value for key, value in run(settings, folder).items()}
    defaults = {
        name: PPOConfig.__dataclass_fields__[name].default
        for name in ("kl_coef", "cliprange", "cliprange_value", "vf_coef", "gamma", "lam")
    }
    runs = {
        name: {"dtype": "float32"} | defaults | COMMON | settings for name, settings in RUNS.items()
    }
    recorded = {
        "trl": trl.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "settings": {"vocabulary": VOCABULARY, "pad": PAD, "eos": EOS, "runs": runs},
    }
    metadata = {"recorded": json.dumps(recorded)}  # one entry: safetensors keeps no order of them
    TARGET.parent.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, TARGET, metadata)
    print(f"{TARGET}: {len(tensors)} tensors, {TARGET.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
