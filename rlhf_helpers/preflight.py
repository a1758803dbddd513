"""First-aid checks of a PPO run that has not begun: seconds, and nothing is changed."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase as Tokenizer

from rlhf_helpers import ppo
from rlhf_helpers.examine import EXACT, WHITENED, sums
from rlhf_helpers.guards import context_length
from rlhf_helpers.ppo import Experience, PPOConfig
from rlhf_helpers.roles import Roles
from rlhf_helpers.rollout import mask_after_eos
from rlhf_helpers.text import Prompt, encode_prompts
from rlhf_helpers.training import Run
from rlhf_helpers.validation import checked

ROWS = 8  # least responses in a minibatch, of which a batch has two
THERE, BACK = 4, 3  # updates of the overfit, and of the way back
HEAVY = 10.0  # β on the way back: the score hardly counts beside it
SPREADS = (0.45, 2.0)  # of the scores of SFT's answers, whose unit is 1
RISE = 0.3  # least rise of the score on one prompt, in standard deviations of SFT's scores
# Each check, and where to look if it fails.
CHECKS = {
    "prompts in their template": "at chat template, BOS, and the side that padding is on",
    "an answer counts to its EOS": "at the response mask (pad = eos?); has SFT learnt to end?",
    "scored as it was sampled": "at temperature, top-k, top-p, mask, and the shift by one token",
    "first KL is 0": "at the weights of the reference: is the policy a copy of them?",
    "score without regard to padding": "at the token that is scored: is it the last?",
    "scores in their unit": "at the reward's head: was it trained, saved, normalised?",
    "advantages and returns come out": "at what is whitened, and under which mask",
    "first ratio is 1": "at the old log-probabilities: are they of the policy that sampled?",
    "gradients reach each its own role": "for a switched adapter, or frozen weights",
    "a step moves every weight": "at the weights' precision: such steps round to nothing in it",
    "one prompt can be overfitted": "at signs, masks and shifts, and the optimizer's weights",
    "the price of KL calls it back": "at the penalty's sign and gradient: does the reference stay?",
}


class Finding(NamedTuple):
    """What one check has seen.

    Attributes:
        name: of `CHECKS`, which says where to look if it fails.
        passed: whether it is as it should be.
        seen: the numbers.
    """

    name: str
    passed: bool
    seen: str

    def __str__(self) -> str:
        line = f"{'ok' if self.passed else 'FAILED':7}{self.name:34}{self.seen}"
        return line if self.passed else f"{line}\n{'':7}look {CHECKS[self.name]}"


@checked
def preflight(
    roles: Roles, tokenizer: Tokenizer, prompts: list[Prompt], config: PPOConfig | None = None
) -> list[Finding]:
    """Check roles, tokenizer and trainer before a run, with the functions that the run will call.

    Sixteen answers, or whole groups of them, are sampled and asked about, one step is taken, one
    prompt is overfitted, and then the policy is called back by a heavy price of KL. All weights are
    then as they were, bit for bit. While it samples it keeps the scores of all tokens, 64·T·V
    bytes; at a large vocabulary give a shorter `response_length`.

    Args:
        roles, tokenizer, prompts, config: as `train_ppo` takes them; of the prompts some are used,
            and of the settings sizes, β and seed are replaced.

    Returns:
        A `Finding` for each check; `print(*findings, sep="\\n")` shows them as a table.

    Raises:
        TypeError, ValueError: as `train_ppo`, for roles, prompts and settings that cannot be
            trained.
        FloatingPointError: if a loss or gradient is not finite.

    Lesson 07 shows which planted faults it finds, and which not.
    """
    config = config or PPOConfig()
    ppo.train_ppo(roles, tokenizer, prompts, config)  # raises for what it cannot train
    rows = math.ceil(ROWS / config.group_size) * config.group_size
    sizes = {"batch_size": 2 * rows, "minibatch_size": rows, "epochs": 2, "updates": THERE}
    small = replace(config, **sizes, target_kl=None, stop_kl=None)
    step = max(1, len(prompts) // small.groups)
    drawn = [prompts[i * step % len(prompts)] for i in range(small.groups)]
    asked = [prompt for prompt in drawn for _ in range(small.group_size)]
    with _untouched(roles), torch.random.fork_rng():
        with _watched_sampler(roles) as seen:
            experience = ppo.collect_experience(roles, tokenizer, asked, small, small.beta, seed=0)
        checks = _of_samples(roles, tokenizer, experience, seen, small)
        return [*checks, *_of_steps(roles, tokenizer, experience, small)]


def _of_samples(
    roles: Roles,
    tokenizer: Tokenizer,
    experience: Experience,
    drawn: list[Tensor],
    config: PPOConfig,
) -> Iterator[Finding]:
    """Checks of one batch, from which nothing is learnt."""
    rollout, exact = experience.rollout, _exact(roles)
    ids, seen, mask = rollout.input_ids, rollout.attention_mask, rollout.response_mask
    T, room = mask.shape[1], context_length(roles.base)
    wanted = encode_prompts(tokenizer, experience.prompts, room).to(ids.device)
    same = torch.equal(ids[:, :-T], wanted["input_ids"])
    same = same and torch.equal(seen[:, :-T], wanted["attention_mask"])
    first = tokenizer.decode(ids[0, :-T][seen[0, :-T].bool()])
    yield Finding("prompts in their template", same, f"{first!r:.50}")

    until = mask_after_eos(ids[:, -T:], tokenizer.eos_token_id)
    right = int(((mask == until) & (seen[:, -T:] == until)).all(-1).sum())
    ends = int(rollout.finished.sum())
    text = f"{right} of {len(mask)} do; {ends} end by themselves"
    yield Finding("an answer counts to its EOS", right == len(mask) and ends > 0, text)

    real = mask.bool()
    watched = drawn and drawn[-1].shape == mask.shape  # else nobody knows, which is no pass
    off = (drawn[-1] - experience.logprobs).abs()[real].max().item() if watched else math.inf
    yield Finding("scored as it was sampled", off < exact, f"log-probabilities within {off:.1e}")
    off = (experience.logprobs - experience.ref_logprobs).abs()[real].max().item()
    yield Finding("first KL is 0", off < exact, f"{experience.kl.mean():.3g} nats per answer")

    off = _moved_by_padding(roles, tokenizer, ids, seen)
    yield Finding("score without regard to padding", off < exact, f"scores within {off:.1e}")
    spread, mean = torch.std_mean(experience.scores + config.eos_penalty * ~rollout.finished)
    unit = abs(mean) < 1 and SPREADS[0] < spread < SPREADS[1]
    yield Finding("scores in their unit", bool(unit), f"{mean:.2f} ± {spread:.2f}")

    if experience.returns is None:
        off = experience.advantages[:, 0].view(-1, config.group_size).sum(-1).abs().max().item()
        passed, text = off < EXACT, f"each group's advantages sum to 0 within {off:.1e}"
    else:
        mean, spread, gap = sums(experience).values()
        passed = abs(mean) < WHITENED and abs(spread - 1) < WHITENED and gap < EXACT
        text = f"advantages {mean:.2f} ± {spread:.2f}, last return off by {gap:.2g}"
    yield Finding("advantages and returns come out", passed, text)


@torch.no_grad()
def _moved_by_padding(roles: Roles, tokenizer: Tokenizer, ids: Tensor, seen: Tensor) -> float:
    """How far scores move with more padding on either side, and with none."""

    def scores(left: int, right: int) -> Tensor:
        wide = pad(ids, (left, right), value=tokenizer.pad_token_id)
        return ppo.score_tokens(roles, "reward", wide, pad(seen, (left, right)))

    rows = [row[real.bool()][None] for row, real in zip(ids, seen, strict=True)]
    alone = [ppo.score_tokens(roles, "reward", row, torch.ones_like(row)) for row in rows]
    others = torch.stack([scores(3, 0), scores(0, 3), torch.cat(alone)])
    return (others - scores(0, 0)).abs().max().item()


def _of_steps(
    roles: Roles, tokenizer: Tokenizer, experience: Experience, config: PPOConfig
) -> Iterator[Finding]:
    """Checks that take steps: one, then some on one prompt, then some back."""
    ratio, reached, still = _one_step(roles, experience, config)
    prompt = experience.prompts[int(experience.scores.argmin())]
    there, back = (
        list(ppo.train_ppo(roles, tokenizer, [prompt] * config.groups, replace(config, **changes)))
        for changes in ({"beta": 0.0}, {"beta": HEAVY, "updates": BACK, "seed": 1})
    )
    ratios = [ratio, *(stats.first_ratio for stats in there)]
    off = max(abs(x - 1) for x in ratios)
    text = f"off by at most {off:.1e} in {len(ratios)} updates"
    yield Finding("first ratio is 1", off < _exact(roles), text)
    text = "; ".join(f"{role}'s: {', '.join(to) or 'none'}" for role, to in reached.items())
    own = all(to == [role] for role, to in reached.items())
    yield Finding("gradients reach each its own role", own, text)
    yield Finding("a step moves every weight", still < 0.01, f"{still:.1%} of the policy's stay")
    rise, far, near = there[-1].score - there[0].score, back[0].kl, back[-1].kl
    text = f"score {there[0].score:.2f} to {there[-1].score:.2f} in {THERE} updates"
    yield Finding("one prompt can be overfitted", rise > RISE, text)
    text = f"{far:.2f} to {near:.2f} nats in {BACK} updates at β = {HEAVY:g}"
    yield Finding("the price of KL calls it back", far > 10 * EXACT and near < 0.7 * far, text)


def _one_step(
    roles: Roles, experience: Experience, config: PPOConfig
) -> tuple[float, dict[str, list[str]], float]:
    """First ratio, the roles that each loss's gradients reach, how many weights do not move."""
    run, reached = Run(roles, config.trained, config, None, {}), {}
    part = slice(config.minibatch_size)
    objectives = {"policy": ppo.policy_objective, "value": ppo.value_objective}
    for role in config.trained:
        for _, weight in _weights(roles):
            weight.grad = None
        roles.use(role).train()
        loss, report = objectives[role](roles, experience, part, config, config.beta)
        run.gradients(role, loss)
        pushed = {owner for owner, w in _weights(roles) if w.grad is not None and w.grad.any()}
        reached[role] = sorted(pushed)
        if role == "policy":
            before = [(w, w.detach().clone()) for owner, w in _weights(roles) if owner == role]
            run.apply(role)
            stays = [(w == old) & (w.grad is None or w.grad != 0) for w, old in before]
            ratio, still = report["ratio"], torch.cat([x.flatten() for x in stays]).double().mean()
    return ratio, reached, still.item()


# --- what the checks stand on --------------------------------------------------------------


def _exact(roles: Roles) -> float:
    """In half precision two ways to the same number differ in its third digit."""
    return EXACT if roles.base.get_input_embeddings().weight.dtype == torch.float32 else 0.1


def _weights(roles: Roles) -> list[tuple[str, Parameter]]:
    """All adapters' and heads' parameters, each with its role."""
    named = roles.model.named_parameters()
    adapters = [(n.split(".")[-2], p) for n, p in named if ".lora_" in n]
    return adapters + [(role, p) for role, head in roles.heads.items() for p in head.parameters()]


@contextmanager
def _untouched(roles: Roles) -> Iterator[None]:
    """Afterwards weights, gradients and flags are as before, and the same role acts."""
    kept = [(w, w.detach().clone(), w.grad, w.requires_grad) for _, w in _weights(roles)]
    active, training = roles.active, roles.model.training
    try:
        yield
    finally:
        roles.use(active).train(training)
        for weight, value, gradient, flag in kept:
            weight.data.copy_(value)
            weight.grad = gradient
            weight.requires_grad_(flag)


@contextmanager
def _watched_sampler(roles: Roles) -> Iterator[list[Tensor]]:
    """Collects `[B, T]` log-probabilities under the distributions that `generate` drew from."""
    drawn, generate = [], roles.base.generate

    def watched(*arguments, generation_config, **inputs):
        generation_config.return_dict_in_generate = generation_config.output_scores = True
        out = generate(*arguments, generation_config=generation_config, **inputs)
        steps = zip(out.scores, out.sequences[:, -len(out.scores) :].T, strict=True)
        picked = [s.float().log_softmax(-1).gather(-1, t[:, None]) for s, t in steps]
        drawn.append(torch.cat(picked, dim=1))
        return out.sequences

    with patch.object(roles.base, "generate", watched):
        yield drawn
