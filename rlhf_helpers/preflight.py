"""First-aid checks of a PPO run that has not begun: seconds, and nothing is changed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedTokenizerBase

from rlhf_helpers import ppo
from rlhf_helpers.examine import TOLERANCE, WHITENED, sums
from rlhf_helpers.ppo import Experience, PPOConfig
from rlhf_helpers.roles import Roles
from rlhf_helpers.text import Prompt, opening, render
from rlhf_helpers.training import Run

ROWS = 16  # responses in a batch
THERE, BACK = 4, 3  # updates of the overfit, and of the way back
HEAVY = 10.0  # β on the way back: the score hardly counts beside it
SPREADS = (0.45, 2.0)  # of the scores of SFT's answers, whose unit is 1
RISE = 0.3  # least rise of the score on one prompt, in standard deviations of SFT's scores


@dataclass(frozen=True)
class Finding:
    """What one check has seen.

    Attributes:
        name: of the check.
        passed: whether it is as it should be.
        seen: the numbers.
        meaning: what it can mean if not.
    """

    name: str
    passed: bool
    seen: str
    meaning: str

    def __str__(self) -> str:
        line = f"{'ok' if self.passed else 'FAILED':7}{self.name:34}{self.seen}"
        return line if self.passed else f"{line}\n{'':7}{self.meaning}"


def preflight(
    roles: Roles,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    config: PPOConfig | None = None,
) -> list[Finding]:
    """Check roles, tokenizer and trainer before a run, with the functions that the run will call.

    Sixteen answers are sampled and asked about, one step is taken, one prompt is overfitted, and
    then the policy is called back by a heavy price of KL. All weights are then as they were, bit
    for bit.

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
    prompts = prompts if isinstance(prompts, str) else list(prompts)
    ppo.train_ppo(roles, tokenizer, prompts, config)  # raises for what it cannot train
    sizes = {"batch_size": ROWS, "minibatch_size": ROWS // 2, "epochs": 2, "updates": THERE}
    small = replace(config, **sizes, target_kl=None, stop_kl=None)
    step = max(1, len(prompts) // ROWS)
    asked = [prompts[i * step % len(prompts)] for i in range(ROWS)]
    with _untouched(roles), torch.random.fork_rng():
        with _watched_sampler(roles) as drawn:
            experience = ppo.collect_experience(roles, tokenizer, asked, small, small.beta, seed=0)
        still = _of_samples(roles, tokenizer, experience, drawn, small)
        return still + _of_steps(roles, tokenizer, experience, small)


# --- checks of one batch of samples --------------------------------------------------------


def _of_samples(
    roles: Roles,
    tokenizer: PreTrainedTokenizerBase,
    experience: Experience,
    drawn: list[Tensor],
    config: PPOConfig,
) -> list[Finding]:
    return [
        _prompts_rendered(tokenizer, experience),
        _eos_counts(tokenizer, experience),
        _sampled_as_scored(roles, experience, drawn),
        _first_kl(roles, experience),
        _score_unmoved(roles, tokenizer, experience),
        _score_unit(experience, config.eos_penalty),
        _sums_come_out(experience),
    ]


def _prompts_rendered(tokenizer: PreTrainedTokenizerBase, experience: Experience) -> Finding:
    rollout, wrong = experience.rollout, []
    P = rollout.input_ids.shape[1] - rollout.response_mask.shape[1]
    start = opening(tokenizer)
    for prompt, ids, mask in zip(
        experience.prompts, rollout.input_ids[:, :P], rollout.attention_mask[:, :P], strict=True
    ):
        row = tokenizer(render(tokenizer, prompt), add_special_tokens=False)["input_ids"]
        row = row if row[: len(start)] == start else [*start, *row]
        if ids[mask.bool()].tolist() != row:
            wrong.append(ids[mask.bool()])
    text = f", such as {tokenizer.decode(wrong[0])!r:.60}" if wrong else ""
    return Finding(
        "prompts in their template, with BOS",
        not wrong,
        f"{len(wrong)} of {len(experience.prompts)} differ{text}",
        "the model is not asked in the way that it was trained to answer: chat template, BOS, or "
        "padding on the wrong side",
    )


def _eos_counts(tokenizer: PreTrainedTokenizerBase, experience: Experience) -> Finding:
    rollout = experience.rollout
    mask = rollout.response_mask
    tokens = rollout.input_ids[:, -mask.shape[1] :]
    is_eos = (tokens == tokenizer.eos_token_id).long()
    until = (is_eos.cumsum(-1) - is_eos == 0).long()
    seen = rollout.attention_mask[:, -mask.shape[1] :]
    right = ((mask == until) & (seen == until)).all(-1)
    ends = int(is_eos.any(-1).sum())
    return Finding(
        "an answer counts to its EOS",
        bool(right.all()) and ends > 0,
        f"{int(right.sum())} of {len(right)} do; {ends} end by themselves",
        "EOS is masked out (pad = eos?), so that ending is neither rewarded nor learnt; or the "
        "model does not end its answers",
    )


def _sampled_as_scored(roles: Roles, experience: Experience, drawn: list[Tensor]) -> Finding:
    mask = experience.rollout.response_mask.bool()
    name = "scored as it was sampled"
    meaning = (
        "answers come from another distribution than the one that is scored: temperature, top-k, "
        "top-p, attention mask, positions, or log-probabilities one token off"
    )
    if not drawn or drawn[-1].shape != mask.shape:
        return Finding(name, False, "the sampler could not be watched", meaning)
    difference = (drawn[-1].to(mask.device) - experience.logprobs).abs()[mask].max().item()
    return Finding(
        name, difference < _tolerance(roles), f"log-probabilities within {difference:.1e}", meaning
    )


def _first_kl(roles: Roles, experience: Experience) -> Finding:
    difference = (experience.logprobs - experience.ref_logprobs)[
        experience.rollout.response_mask.bool()
    ]
    return Finding(
        "first KL is 0",
        difference.abs().max().item() < _tolerance(roles),
        f"{experience.kl.mean().item():.3g} nats per answer",
        "the policy does not begin as the reference: which weights are the reference's?",
    )


def _score_unmoved(
    roles: Roles, tokenizer: PreTrainedTokenizerBase, experience: Experience
) -> Finding:
    rollout = experience.rollout
    ids, mask = rollout.input_ids, rollout.attention_mask

    def padded(left: int, right: int) -> Tensor:
        wide = torch.nn.functional.pad(ids, (left, right), value=tokenizer.pad_token_id)
        seen = torch.nn.functional.pad(mask, (left, right))
        return ppo.score_tokens(roles, "reward", wide, seen)

    with torch.no_grad():
        together = padded(0, 0)
        others = [padded(3, 0), padded(0, 3)]
        alone = [
            ppo.score_tokens(roles, "reward", row[real.bool()][None], real[real.bool()][None])
            for row, real in zip(ids, mask, strict=True)
        ]
    farthest = max((scores - together).abs().max().item() for scores in (*others, torch.cat(alone)))
    return Finding(
        "score without regard to padding",
        farthest < _tolerance(roles),
        f"scores within {farthest:.1e}",
        "the score of an answer depends on what it is batched with: is it read at its last token?",
    )


def _score_unit(experience: Experience, penalty: float) -> Finding:
    scores = experience.scores + penalty * ~experience.rollout.finished
    spread, mean = (number.item() for number in torch.std_mean(scores))
    return Finding(
        "scores in their unit",
        abs(mean) < 1 and SPREADS[0] < spread < SPREADS[1],
        f"{mean:.2f} ± {spread:.2f} on {len(scores)} answers",
        "on answers of the SFT model a normalised reward has about mean 0 and spread 1: is this "
        "the head that was trained and normalised, and are these such answers?",
    )


def _sums_come_out(experience: Experience) -> Finding:
    found = sums(experience)
    mean, spread, gap = (found[k] for k in ("advantage_mean", "advantage_std", "return_gap"))
    right = abs(mean) < WHITENED and abs(spread - 1) < WHITENED and gap < TOLERANCE
    return Finding(
        "advantages and returns come out",
        right,
        f"advantages {mean:.2f} ± {spread:.2f}, last return off by {gap:.2g}",
        "advantages should have mean 0 and spread 1 over the real tokens, and the last return be "
        "the last reward: what is whitened, and under which mask?",
    )


# --- checks that take steps ----------------------------------------------------------------


def _of_steps(
    roles: Roles, tokenizer: PreTrainedTokenizerBase, experience: Experience, config: PPOConfig
) -> list[Finding]:
    ratio, reached, unmoved = _one_step(roles, experience, config)
    prompt = experience.prompts[int(experience.scores.argmin())]
    there, back = (
        list(ppo.train_ppo(roles, tokenizer, [prompt] * ROWS, replace(config, **changes)))
        for changes in ({"beta": 0.0}, {"beta": HEAVY, "updates": BACK, "seed": 1})
    )
    ratios = [ratio, *(stats.first_ratio for stats in there)]
    farthest = max(ratios, key=lambda x: abs(x - 1))
    rise = there[-1].score - there[0].score
    far, near = back[0].kl, back[-1].kl
    return [
        Finding(
            "first ratio is 1",
            abs(farthest - 1) < _tolerance(roles),
            f"{ratio:.6g} at first, {farthest:.6g} at most in {len(there)} updates",
            "the old log-probabilities are not those of the policy that sampled: the reference's, "
            "or of another pass, temperature or mask",
        ),
        Finding(
            "gradients reach each its own role",
            reached == {role: {role} for role in ppo.TRAINED},
            "; ".join(
                f"{role}'s reach {', '.join(sorted(to)) or 'none'}" for role, to in reached.items()
            ),
            "an adapter was switched between forward and backward, or weights are shared or frozen",
        ),
        Finding(
            "a step moves every weight",
            unmoved < 0.01,
            f"{unmoved:.1%} of the policy's stay where they were",
            "steps of this learning rate round to nothing in the weights' precision: train them in "
            "float32",
        ),
        Finding(
            "one prompt can be overfitted",
            rise > RISE,
            f"score {there[0].score:.2f} to {there[-1].score:.2f} in {len(there)} updates",
            "what is learnt is not what is scored: signs, masks, shifts, the optimizer's weights",
        ),
        Finding(
            "KL sees the policy move",
            far > 10 * TOLERANCE,
            f"{far:.2f} nats after it",
            "the reference moves along, the policy does not move, or its samples are not its own",
        ),
        Finding(
            "the price of KL calls it back",
            near < 0.7 * far,
            f"{far:.2f} to {near:.2f} nats in {len(back)} updates at β = {HEAVY:g}",
            "the penalty has the wrong sign, no gradient, or another reference",
        ),
    ]


def _one_step(
    roles: Roles, experience: Experience, config: PPOConfig
) -> tuple[float, dict[str, set[str]], float]:
    """First ratio, which roles the gradients of each loss reach, and how much did not move."""
    run, part, reached = Run(roles, ppo.TRAINED, config, None, {}), slice(0, ROWS // 2), {}
    for role in ppo.TRAINED:
        for _, weight in _weights(roles):
            weight.grad = None
        roles.use(role).train()
        objective = ppo.policy_objective if role == "policy" else ppo.value_objective
        loss, report = objective(roles, experience, part, config, config.beta)
        run.gradients(role, loss)
        reached[role] = {
            owner
            for owner, weight in _weights(roles)
            if weight.grad is not None and weight.grad.any()
        }
        if role == "policy":
            ratio = report["ratio"]
            before = [(w, w.detach().clone()) for owner, w in _weights(roles) if owner == role]
            run.apply(role)
            pushed = [(w, old) for w, old in before if w.grad is not None]
            still = [((w == old) & (w.grad != 0)).sum().item() for w, old in pushed]
            total = sum(w.numel() for w, _ in before)
            unmoved = (sum(still) + sum(w.numel() for w, _ in before if w.grad is None)) / total
    return ratio, reached, unmoved


# --- what the checks stand on --------------------------------------------------------------


def _tolerance(roles: Roles) -> float:
    """In half precision two ways to the same number differ in its third digit."""
    return TOLERANCE if roles.base.get_input_embeddings().weight.dtype == torch.float32 else 0.1


def _weights(roles: Roles) -> list[tuple[str, Parameter]]:
    """All adapters' and heads' parameters, each with its role."""
    named = roles.model.named_parameters()
    adapters = [(n.split(".")[-2], p) for n, p in named if ".lora_" in n]
    return adapters + [(role, p) for role, head in roles.heads.items() for p in head.parameters()]


@contextmanager
def _untouched(roles: Roles) -> Iterator[None]:
    """Afterwards weights, gradients and flags are as before, and the same role acts."""
    kept = [
        (weight, weight.detach().clone(), weight.grad, weight.requires_grad)
        for _, weight in _weights(roles)
    ]
    active, training = roles.active, roles.model.training
    try:
        yield
    finally:
        roles.use(active).train(training)
        with torch.no_grad():
            for weight, value, gradient, flag in kept:
                weight.copy_(value)
                weight.grad = gradient
                weight.requires_grad_(flag)


@contextmanager
def _watched_sampler(roles: Roles) -> Iterator[list[Tensor]]:
    """Collects `[B, T]` log-probabilities under the distributions that `generate` drew from."""
    drawn, generate = [], roles.base.generate

    def watched(*arguments, generation_config, **inputs):
        generation_config.return_dict_in_generate = generation_config.output_scores = True
        out = generate(*arguments, generation_config=generation_config, **inputs)
        tokens = out.sequences[:, -len(out.scores) :].T
        steps = zip(out.scores, tokens, strict=True)
        picked = [s.float().log_softmax(-1).gather(-1, t[:, None]) for s, t in steps]
        drawn.append(torch.cat(picked, dim=1))
        return out.sequences

    with patch.object(roles.base, "generate", watched):
        yield drawn
