"""The checks of exercise 07: six patients to diagnose, and a trainer to mend."""

import csv
import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from rlhf_helpers import ppo, rollout
from rlhf_helpers.checks import lesson_04
from rlhf_helpers.checks.diagnosis import judge
from rlhf_helpers.checks.exercise import NOT_ATTEMPTED, same, texts, verdict, wrapped
from rlhf_helpers.kl import KINDS, kl_estimate
from rlhf_helpers.losses import masked_mean, policy_loss
from rlhf_helpers.ppo import PPOConfig
from rlhf_helpers.preflight import CHECKS, preflight
from rlhf_helpers.presets import ASSETS
from rlhf_helpers.roles import Roles
from rlhf_helpers.text import Prompt

# --- lesson 07: six patients -----------------------------------------------------------------

HEALTHY = "healthy"
SEED = "1"  # the lesson shows another
PATIENTS = {
    "A": "one_token_off",
    "B": "eos_masked_out",
    "C": "kl_sign",
    "D": "swapped_labels",
    "E": "generate_defaults",
    "F": "lost_gradient",
}
# What a learner sees; gold, and what lesson 07 computes besides a usual log, are for the autopsy.
COLUMNS = (
    "update score kl entropy length finished first_ratio clip_fraction approx_kl policy_loss "
    "policy_grad_norm explained_variance value_loss"
).split()
ILLNESSES = {
    "one_token_off": "log-probabilities are read from the logits at a token's own place",
    "eos_masked_out": "EOS is left out of the response mask, as if it were padding",
    "kl_sign": "the KL penalty has the wrong sign",
    "swapped_labels": "the reward model learnt from pairs with chosen and rejected exchanged",
    "generate_defaults": "answers are sampled at temperature 0.7 with top-k 50, and scored without",
    "lost_gradient": "another adapter is active when the policy's loss goes backward",
    "ratio_to_reference": "the ratio is taken to the reference, not to the policy that sampled",
    "kl_without_gradient": "KL is added to the loss as a constant, and is not in the reward",
    HEALTHY: "nothing is wrong with it",
}
_EVIDENCE = {
    "one_token_off": (
        "the log-probabilities would be those of other tokens, and entropy, their mean, several "
        "nats from the first row on; in this log it begins at {start_entropy}"
    ),
    "eos_masked_out": (
        "one token of each answer, its EOS, would be missing before anything is learnt, and length "
        "begin one below the healthy run's; in this log it begins at {start_length}"
    ),
    "kl_sign": (
        "KL would be paid for, and grow to the end; in this log it is at most {max_kl}, and "
        "{end_kl} at the end"
    ),
    "swapped_labels": (
        "the trainer would do what it is told, and in the first row kl, entropy, length, finished "
        "and first_ratio be the healthy run's, and the sign of the score turned; in this log one "
        "of these is not so"
    ),
    "generate_defaults": (
        "the first batch, from which nothing is learnt yet, would be of likelier tokens, and "
        "entropy begin below the healthy run's; in this log it begins at {start_entropy}"
    ),
    "lost_gradient": (
        "the policy would never move, and its gradient be 0; in this log policy_grad_norm is "
        "{policy_grad_norm}"
    ),
    "ratio_to_reference": (
        "the policy would learn all the same, and the ratio in the first step leave 1 as soon as "
        "it has left the reference; in this log first_ratio is {first_ratio}, kl at most "
        "{max_kl}, and policy_grad_norm {policy_grad_norm}"
    ),
    "kl_without_gradient": (
        "nothing would keep the policy near the reference, and the loss would hold β times the KL "
        "of a token, 0.1 · {end_kl} / {end_length} in the last row, where the rest of it is near "
        "0; in this log kl is at most {max_kl}, and policy_loss ends at {end_policy_loss}"
    ),
    HEALTHY: (
        "every column would look like the healthy run's, and the answers be better than SFT's; in "
        "this log entropy is {entropy}, finished {finished}, kl at most {max_kl}. If you find "
        "nothing in the numbers, read the answers"
    ),
}


def patient(name: str) -> tuple[list[dict[str, float]], list[dict[str, str]]]:
    """A recorded run with a fault, or without: its log, and answers of its last batch.

    Args:
        name: "A" to "F", or "healthy".

    Returns:
        Rows with `COLUMNS`; and rows with `prompt`, `text` and `finished`.

    Raises:
        ValueError: for another name.
    """
    known = PATIENTS | {HEALTHY: HEALTHY}
    if name not in [*known]:
        raise ValueError(f"there is no patient {name!r}; choose one of {', '.join(known)}")
    rows = [{c: float(row[c]) for c in COLUMNS} for row in _recorded("updates", known[name])]
    texts = _recorded("texts", known[name])
    return rows, [{c: row[c] for c in ("prompt", "text", "finished")} for row in texts]


def _recorded(table: str, fault: str) -> list[dict[str, str]]:
    with (ASSETS / "clinic" / f"{table}.csv").open(encoding="utf-8", newline="") as file:
        return [r for r in csv.DictReader(file) if (r["fault"], r["seed"]) == (fault, SEED)]


def check_patients(answers: Mapping[str, str]) -> None:
    """Check the diagnosis of six patients, and say what speaks against a wrong one.

    Args:
        answers: for each of "A" to "F" a key of `ILLNESSES` or what it stands for, or `...` for not
            yet; only letters and digits count, and not their case.

    Raises:
        ValueError: for a patient that is missing.

    Example:
        >>> check_patients(dict.fromkeys("ABCDEF", ...))  # doctest: +ELLIPSIS
        A: not attempted yet.
        ...
    """
    judge(answers, PATIENTS, ILLNESSES, _EVIDENCE, lambda name: patient(name)[0])


# --- lesson 07: a trainer to mend ------------------------------------------------------------

SAY = texts("""
mask_kind: it returned {}; return a tensor of shape [{}, {}], as the tokens have.
mask_type: the values are right, but the mask is {}; its sum is used as an index, and 1 less the
    mask as its opposite, which takes whole numbers, here int64.
mask_in_place: it changes its argument tokens in place, and those are still to be scored. Use
    operations that make a new tensor.
mask_reversed: It is the wrong way round, 1 for 0.
before: Every token before the EOS was chosen as well, and all of an answer without one, which was
    cut off. Which of them are left out, and what teaches them then?
behind: What stands behind the first EOS the policy has not chosen for its answer: it fills the row
    until the longest answer ends. What would be learnt from it, if it counted?
by_batch: A row also comes out otherwise where it stands alone. Along which dimension is it counted?
not_a_pair: it returned {}; return two, the loss and what it reports, as policy_loss does.
no_gradient: the loss has no gradient with respect to the log-probabilities of the policy as it is
    now, so that nothing can be learnt. Look for a detach, no_grad or item, for the wrong role, and
    for new and old exchanged: the old ones are data, to which no gradient goes.
objective: the loss {}. Asked for is that of policy_loss, given for the rows in part the
    log-probabilities as they are now, those of the policy that sampled, the advantages and the
    mask, and config.clip.
fresh_old (objective): takes the policy as it is now for the one that sampled, so that every ratio
    is 1, and nothing is ever clipped
swapped (objective): has new and old exchanged, so that the ratio stands upside down
opposite (objective): has the opposite sign, so that what turned out well becomes less likely
returns (objective): weighs with the returns, the critic's targets, not with the advantages
values (objective): weighs with the critic's values, not with the advantages
scores (objective): weighs with scores or rewards, not with the advantages
padding (objective): counts padding
unclipped (objective): is clipped nowhere
other_clip (objective): is clipped at 0.2, whatever config says
value_clip (objective): is clipped by value_clip, which is the critic's
larger (objective): takes the larger of the two where the smaller counts, plain or clipped
log_ratio (objective): is made of the logarithm of the ratio, or of new log-probabilities alone,
    which have no old ones to stay near to
kl_twice (objective): has a KL penalty added, which is in the rewards already
times (objective): and its gradient come out times {:.3g}, as where a mean is a sum or is divided
    by another number than that of real tokens
first_rows (objective): takes the batch's first rows for those in part
unlike (objective): or its gradient is another one
""")

_EOS = 1
_TOKENS = ((5, 6, _EOS, 0), (_EOS, 0, 0, 0), (5, 6, 7, 8), (7, _EOS, 4, _EOS))
_MASK = ((1, 1, 1, 0), (1, 0, 0, 0), (1, 1, 1, 1), (1, 1, 0, 0))
_MASK_QUESTION = (
    "The policy has chosen EOS like any other token. If the mask ends before it, what rewards an "
    "ending, at which token is the score, and what is left of an answer that begins with EOS?"
)
# By check of preflight what to ask oneself if it fails.
_QUESTIONS = {
    "first ratio is 1": (
        "Before the first step nothing has been learnt from a batch, so new over old is 1 if the "
        "old numbers are those of the policy that sampled. Whose are yours?"
    ),
    "the price of KL calls it back": (
        "Take one token that the policy finds twice as likely as the reference does. What is its "
        "reward, by hand, with a score of 0? A price has to be below 0 there. (KL cannot be "
        "negative in the mean; a price that is paid out makes it grow.)"
    ),
    "one prompt can be overfitted": (
        "On a single prompt the score must rise. Which way does the loss push a token with a "
        "positive advantage, and does its gradient arrive?"
    ),
}


def check_mended(
    roles: Roles,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    mask_after_eos: Callable[[Tensor, int], Tensor],
    shape_rewards: Callable[..., Tensor],
    policy_objective: Callable[..., tuple[Tensor, dict[str, float]]],
) -> None:
    """Run `preflight` on a trainer with the learner's three functions, and ask what its checks ask.

    The functions are looked at by themselves first: where the mask is wrong the other checks could
    not even run, and some mistakes in rewards and loss no check of `preflight` would notice.

    Args:
        mask_after_eos, shape_rewards, policy_objective: take the place of those of the package, and
            are called as they are.

    Raises:
        Exception: what the learner's functions raise, except where they are not written yet.
    """
    places = (
        (rollout, "mask_after_eos", mask_after_eos),
        (ppo, "shape_rewards", shape_rewards),
        (ppo, "policy_objective", policy_objective),
    )
    try:
        for (_, name, function), fault_of in zip(places, _FAULTS, strict=True):
            if fault := fault_of(function):
                print(wrapped(f"{name}: {fault}"))
                return
        with ExitStack() as stack:
            for place in places:
                stack.enter_context(patch.object(*place))
            findings = preflight(roles, tokenizer, prompts)
    except NotImplementedError:
        print(f"check_mended: {NOT_ATTEMPTED}")
        return
    failed = [finding for finding in findings if not finding.passed]
    for finding in failed:
        question = _QUESTIONS.get(finding.name, f"Look {CHECKS[finding.name]}.")
        print(wrapped(f"{finding.name}: no, {finding.seen}. {question}"))
    if not failed:
        print(f"check_mended: correct. All {len(findings)} checks of preflight hold.")


def _mask_fault(mask_after_eos: Callable[[Tensor, int], Tensor]) -> str:
    tokens = torch.tensor(_TOKENS)
    mask = mask_after_eos(tokens, _EOS)
    if not isinstance(mask, Tensor) or mask.shape != tokens.shape:
        found = f"shape {list(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        return SAY.mask_kind.format(found, *tokens.shape)
    if not torch.equal(tokens, torch.tensor(_TOKENS)):
        return SAY.mask_in_place
    for tokens, got, wanted in zip(_TOKENS, mask.tolist(), _MASK, strict=True):
        if got != list(wanted):
            rows = f"for the tokens {list(tokens)}, where {_EOS} is EOS, it is {got}"
            return f"{rows}, expected {list(wanted)}. {_mask_questions(mask_after_eos, mask)}"
    return "" if mask.dtype == torch.int64 else SAY.mask_type.format(mask.dtype)


def _mask_questions(mask_after_eos: Callable[[Tensor, int], Tensor], mask: Tensor) -> str:
    """What to ask oneself about a wrong mask, of the first row that is wrong."""
    right, tokens = torch.tensor(_MASK), torch.tensor(_TOKENS)
    if torch.equal(mask.long(), 1 - right):
        return SAY.mask_reversed
    row = int((mask != right).any(1).nonzero()[0])
    off, real, eos = (x[row].bool() for x in (mask != right, right, right * (tokens == _EOS)))
    asked = (_MASK_QUESTION, off & eos), (SAY.before, off & real & ~eos), (SAY.behind, off & ~real)
    alone = torch.cat([mask_after_eos(one[None], _EOS) for one in tokens])
    questions = [question for question, where in asked if where.any()]
    return " ".join([*questions, *([] if torch.equal(alone, mask) else [SAY.by_batch])])


def _rewards_fault(shape_rewards: Callable[..., Tensor]) -> str:
    """What exercise 04 says of them, but for the sign, about which `preflight` asks."""

    @functools.wraps(shape_rewards)  # so that an exception names the learner's line
    def with_k1(*arguments: Tensor | float) -> Tensor:
        return shape_rewards(*arguments, "k1")

    told = verdict(lesson_04.SHAPE_REWARDS, with_k1)
    if told == NOT_ATTEMPTED:
        raise NotImplementedError
    return "" if told.startswith(("correct", lesson_04.SAY.wrong_sign)) else told


# --- the policy's objective on a batch of made-up numbers ---

_PART, _CLIP, _PRICE = slice(1, 3), 0.3, 0.5
_STATES = (
    (0.0, 0),
    (0.8, 4),
    (0.8, 7),
)  # how far it has moved, and a seed: ratios on all sides of clips


def _batch(moved: float, seed: int) -> SimpleNamespace:
    """An experience of four answers, and a policy that has moved on since by so much."""
    drawn = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    old = -2 - drawn(4, 3).abs()
    numbers = {x: drawn(4, 3) for x in ("values", "rewards", "advantages", "returns")}
    return SimpleNamespace(
        new=old + moved * drawn(4, 3).clamp(-1.5, 1.5),
        logprobs=old,
        ref_logprobs=old - drawn(4, 3).abs(),
        scores=drawn(4),
        rollout=SimpleNamespace(
            response_mask=torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
        ),
        **numbers,
    )


def _made_by(objective: Callable, batch: SimpleNamespace) -> Tensor | str:
    """Loss and gradient of an objective on the batch, or what is wrong whatever they are."""
    new = batch.new.clone().requires_grad_()
    others = {"reference": batch.ref_logprobs}

    def role_logprobs(roles, role: str, rollout, part: slice, config: PPOConfig) -> Tensor:
        return (new if role == "policy" else others.get(role, batch.values))[part]

    with torch.enable_grad(), patch.object(ppo, "role_logprobs", role_logprobs):
        result = objective(None, batch, _PART, PPOConfig(clip=_CLIP), _PRICE)
    if not isinstance(result, tuple | list) or len(result) != 2:
        return SAY.not_a_pair.format(type(result).__name__)
    loss = result[0]
    if not isinstance(loss, Tensor):
        return SAY.not_a_pair.format(f"first {type(loss).__name__}")
    if not loss.requires_grad:
        return SAY.no_gradient
    (gradient,) = torch.autograd.grad(loss.sum(), new, allow_unused=True)
    if gradient is None or not gradient.any():
        return SAY.no_gradient
    return torch.cat([loss.detach().reshape(-1), gradient.flatten()])


def _of(loss_of: Callable[[Tensor, SimpleNamespace], Tensor]) -> Callable:
    """An objective from the new log-probabilities and the batch, both cut to the part."""

    def objective(roles, batch: SimpleNamespace, part: slice, config: PPOConfig, beta: float):
        new = ppo.role_logprobs(roles, "policy", batch.rollout, part, config)
        rows = {k: x[part] for k, x in vars(batch).items() if isinstance(x, Tensor)}
        mask = batch.rollout.response_mask[part]
        return loss_of(new, SimpleNamespace(mask=mask, whole=batch, **rows)), {}

    return objective


def _loss(new: Tensor, old: Tensor, weights: Tensor, mask: Tensor, clip: float = _CLIP) -> Tensor:
    return policy_loss(new, old, weights.expand(new.shape), mask, clip)[0]


def _mean(tokens: Tensor, x: SimpleNamespace) -> Tensor:
    return masked_mean(tokens, x.mask.bool())


def _by_hand(which: Callable, new: Tensor, x: SimpleNamespace) -> Tensor:
    ratio = (new - x.logprobs).exp()
    return -_mean(which(ratio * x.advantages, ratio.clamp(1 - _CLIP, 1 + _CLIP) * x.advantages), x)


_PLAIN = _of(lambda new, x: _loss(new, x.logprobs, x.advantages, x.mask))
_TO_REFERENCE = _of(lambda new, x: _loss(new, x.ref_logprobs, x.advantages, x.mask))
_OBJECTIVES = (
    (lambda new, x: _loss(new, new.detach(), x.advantages, x.mask), SAY.fresh_old),
    (lambda new, x: _loss(2 * x.logprobs - new, x.logprobs, x.advantages, x.mask), SAY.swapped),
    (lambda new, x: _loss(new, x.logprobs, -x.advantages, x.mask), SAY.opposite),
    (lambda new, x: -_loss(new, x.logprobs, x.advantages, x.mask), SAY.opposite),
    (lambda new, x: _loss(new, x.logprobs, x.returns, x.mask), SAY.returns),
    (lambda new, x: _loss(new, x.logprobs, x.values, x.mask), SAY.values),
    (lambda new, x: _loss(new, x.logprobs, x.rewards, x.mask), SAY.scores),
    (lambda new, x: _loss(new, x.logprobs, x.scores[:, None], x.mask), SAY.scores),
    (
        lambda new, x: _loss(new, x.logprobs, x.advantages, torch.ones_like(x.mask)),
        SAY.padding,
    ),
    (lambda new, x: _loss(new, x.logprobs, x.advantages, x.mask, 1e6), SAY.unclipped),
    (lambda new, x: _loss(new, x.logprobs, x.advantages, x.mask, 0.2), SAY.other_clip),
    (lambda new, x: _loss(new, x.logprobs, x.advantages, x.mask, 1.0), SAY.value_clip),
    (lambda new, x: _by_hand(torch.maximum, new, x), SAY.larger),
    (lambda new, x: -_mean((new - x.logprobs) * x.advantages, x), SAY.log_ratio),
    (lambda new, x: -_mean(new * x.advantages, x), SAY.log_ratio),
    *(
        (
            lambda new, x, kind=kind, price=price: (
                _loss(new, x.logprobs, x.advantages, x.mask)
                + price * _mean(kl_estimate(new, x.ref_logprobs, kind), x)
            ),
            SAY.kl_twice,
        )
        for kind in KINDS
        for price in (_PRICE, PPOConfig().beta)
    ),
    (
        lambda new, x: _loss(new, x.whole.logprobs[: len(new)], x.advantages, x.mask),
        SAY.first_rows,
    ),
    (
        lambda new, x: _loss(new, x.logprobs, x.whole.advantages[: len(new)], x.mask),
        SAY.first_rows,
    ),
)


def _objective_fault(policy_objective: Callable[..., tuple[Tensor, dict[str, float]]]) -> str:
    """What is wrong but for the ratio to the reference, about which `preflight` asks."""
    batches = [_batch(moved, seed) for moved, seed in _STATES]
    try:
        made = [_made_by(policy_objective, batch) for batch in batches]
    except NotImplementedError:
        raise
    except Exception:  # it asks the roles themselves, or has a mistake that the trainer will raise
        return ""
    if faults := [x for x in made if isinstance(x, str)]:
        return faults[0]
    others = ((_PLAIN, ""), (_TO_REFERENCE, ""), *((_of(f), m) for f, m in _OBJECTIVES))
    for other, message in others:
        if all(same(x, _made_by(other, batch)) for x, batch in zip(made, batches, strict=True)):
            return message
    plain = [_made_by(_PLAIN, batch) for batch in batches]
    factor = float(made[0][0] / plain[0][0])
    if all(same(x, factor * y) for x, y in zip(made, plain, strict=True)):
        return SAY.times.format(factor)
    return SAY.unlike


_FAULTS = _mask_fault, _rewards_fault, _objective_fault
