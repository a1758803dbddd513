"""The functions of PPO against what TRL 1.12.0's PPOTrainer computed: golden/trl_ppo.safetensors.

The trainer puts things elsewhere than rlhf_helpers does, and the tests bridge that:

- The score. TRL's lands one slot *after* the last real token, at the last token only where the
  response fills the whole width; values, returns and the value loss count up to that slot
  (`padding_mask_p1`), log-probabilities, the whitening of advantages and the policy loss only up to
  the last token (`padding_mask`). In rlhf_helpers all of them end with the last real token. Here
  our functions get the mask that TRL uses at each place: `EXTENDED` or `TOKENS` below.
- Masks. TRL's are True at padding, ours are 1 at real tokens.
- Log-probabilities at padding. TRL sets those of both policies to 1.0, which `kl_estimate` refuses;
  the tests set both to 0. Either way the KL there is 0.
- Whitening of rewards keeps the mean in TRL (`shift_mean=False`): the tests add it back.

TRL's `approxkl` is another estimate than our `approx_kl`, half the mean square of the log-ratio
over all slots: it is not compared, only computed by hand from the record.

Each function gets the arrays that TRL's own step got, and one test runs the whole chain. In the
float64 runs all is float64 but `logprobs`, for generation hands out its scores in float32.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from rlhf_helpers.kl import kl_estimate
from rlhf_helpers.losses import gae, policy_loss, shape_rewards, value_loss, whiten

GOLDEN = Path(__file__).parent / "golden" / "trl_ppo.safetensors"
TOKENS, EXTENDED = "padding_mask", "padding_mask_p1"
# Absolute for what is below 1, relative to the largest entry of the array above it.
TOLERANCES = {"float32": 1e-6, "float64": 1e-12}


class Update:
    """One update of one run: what was recorded, and the settings that it ran under."""

    def __init__(self, run: str, update: int, settings: dict, arrays: dict[str, Tensor]):
        self.name, self.settings, self.arrays = f"{run}/update{update}", settings, arrays
        self.tolerance = TOLERANCES[settings["dtype"]]

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    def mask(self, name: str) -> Tensor:
        return ~self[name]

    def logprobs(self) -> tuple[Tensor, Tensor]:
        """Those of the policy and of the reference, with 0 for TRL's 1.0 at padding."""
        return tuple(self[x].masked_fill(self[TOKENS], 0) for x in ("logprobs", "ref_logprobs"))

    def micro_batches(self) -> list[tuple[int, Tensor]]:
        return list(enumerate(self["micro_batch_inds"].long()))

    def same(
        self,
        ours: Tensor | float,
        theirs: Tensor,
        tolerance: float | None = None,
        size: Tensor | float = 0.0,
    ) -> None:
        """`size`: of what was added up to this, if that was larger."""
        ours = torch.as_tensor(ours, dtype=theirs.dtype)
        assert ours.shape == theirs.shape
        error = (ours - theirs).abs().max().item()
        largest = max(x.abs().max().item() for x in (theirs, torch.as_tensor(size)))
        allowed = (tolerance or self.tolerance) * max(1, largest)
        assert error < allowed, f"{self.name}: off by {error:.2e}, allowed {allowed:.2e}"


def read() -> tuple[dict, list[Update]]:
    with safe_open(GOLDEN, "pt") as file:
        recorded = json.loads(file.metadata()["recorded"])
        arrays = {key: file.get_tensor(key) for key in file.keys()}
    updates = []
    for run, settings in recorded["settings"]["runs"].items():
        for update in (1, 2):
            prefix = f"{run}/update{update}/"
            own = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
            updates.append(Update(run, update, settings, own))
    return recorded, updates


RECORDED, UPDATES = read()
each_update = pytest.mark.parametrize("seen", UPDATES, ids=[x.name for x in UPDATES])


def whiten_rewards(rewards: Tensor, mask: Tensor) -> Tensor:
    """As TRL: to standard deviation 1, about the mean that the rewards have."""
    return torch.where(mask, whiten(rewards, mask) + rewards[mask].mean(), 0)


# --- the record itself ---


def test_record_covers_both_estimates_whitening_dtypes_and_discounts():
    assert RECORDED["trl"] == "1.12.0"
    runs = RECORDED["settings"]["runs"].values()
    for dtype in TOLERANCES:
        kinds = {(x["kl_estimator"], x["whiten_rewards"]) for x in runs if x["dtype"] == dtype}
        assert kinds >= {("k1", False), ("k3", True)}
    assert {(x["kl_estimator"], x["whiten_rewards"]) for x in runs} == {
        (kind, flag) for kind in ("k1", "k3") for flag in (False, True)
    }
    assert {(x["gamma"], x["lam"]) for x in runs} == {(1.0, 0.95), (0.9, 0.8)}
    assert len({x["cliprange"] for x in runs}) == len({x["cliprange_value"] for x in runs}) == 2
    assert GOLDEN.stat().st_size < 300_000


@each_update
def test_record_has_the_dtype_that_it_names(seen):
    dtype = getattr(torch, seen.settings["dtype"])
    for name in "ref_logprobs values rewards advantages returns new_logprobs vpred".split():
        assert seen[name].dtype == dtype
    assert seen["pg_loss"].dtype == seen["vf_loss"].dtype == dtype
    assert seen["logprobs"].dtype == torch.float32


@each_update
def test_record_has_responses_that_end_early_and_such_that_do_not(seen):
    width = seen["responses"].shape[1]
    lengths = seen["sequence_lengths"].long() + 1  # TRL's are the index of the last real token
    early = lengths < width
    assert width == seen.settings["response_length"]
    assert early.sum() >= 4
    assert (lengths == width).any()
    last = seen["responses"].long().gather(1, lengths[:, None] - 1)[:, 0]
    assert (last[early] == RECORDED["settings"]["eos"]).all()
    assert (seen.mask(TOKENS).sum(1) == lengths).all()
    assert (seen.mask(EXTENDED).sum(1) == (lengths + 1).clamp(max=width)).all()


@each_update
def test_record_has_a_kl_and_clips(seen):
    tokens = seen.mask(TOKENS)
    assert seen["kl"][tokens].abs().mean() > 0.01
    assert seen["kl"][~tokens].abs().max() == 0
    for name in ("pg_clipfrac", "vf_clipfrac"):
        assert seen[name][0] == 0  # nothing has moved before the first step
        assert 0.2 < seen[name].max() < 1
    assert (seen["ratio"] > 1.1).any() and (seen["ratio"] < 0.9).any()
    assert (seen["advantages_whitened"][tokens] > 0).any()
    assert (seen["advantages_whitened"][tokens] < 0).any()


# --- rewards ---


@each_update
def test_kl_estimate(seen):
    kl = kl_estimate(*seen.logprobs(), seen.settings["kl_estimator"])
    seen.same(kl, seen["kl"])


@each_update
def test_shape_rewards(seen):
    rewards = shape_rewards(
        seen["scores"],
        *seen.logprobs(),
        seen.mask(EXTENDED),
        beta=seen.settings["kl_coef"],
        kind=seen.settings["kl_estimator"],
    )
    seen.same(rewards, seen["rewards"])


@pytest.mark.parametrize(
    "seen",
    [x for x in UPDATES if x.settings["whiten_rewards"]],
    ids=[x.name for x in UPDATES if x.settings["whiten_rewards"]],
)
def test_whitened_rewards(seen):
    ours = whiten_rewards(seen["rewards"], seen.mask(EXTENDED))
    seen.same(ours, seen["rewards_whitened"])
    assert (seen["rewards_whitened"] - seen["rewards"]).abs().max() > 0.1


# --- advantages ---


@each_update
def test_gae(seen):
    rewards = seen["rewards_whitened" if seen.settings["whiten_rewards"] else "rewards"]
    gamma, lam = seen.settings["gamma"], seen.settings["lam"]
    advantages, returns = gae(rewards, seen["values"], seen.mask(EXTENDED), gamma, lam)
    seen.same(advantages, seen["advantages"])
    seen.same(returns, seen["returns"], size=seen["advantages"])


@each_update
def test_whiten(seen):
    """The slot after the last token has an advantage too, but TRL whitens without it."""
    seen.same(whiten(seen["advantages"], seen.mask(TOKENS)), seen["advantages_whitened"])


@each_update
def test_chain_from_scores_to_whitened_advantages(seen):
    settings, extended = seen.settings, seen.mask(EXTENDED)
    rewards = shape_rewards(
        seen["scores"],
        *seen.logprobs(),
        extended,
        beta=settings["kl_coef"],
        kind=settings["kl_estimator"],
    )
    if settings["whiten_rewards"]:
        rewards = whiten_rewards(rewards, extended)
    advantages, returns = gae(rewards, seen["values"], extended, settings["gamma"], settings["lam"])
    seen.same(returns, seen["returns"], size=seen["advantages"])
    seen.same(whiten(advantages, seen.mask(TOKENS)), seen["advantages_whitened"])


# --- losses, their gradients and statistics ---


@each_update
def test_policy_loss(seen):
    for i, rows in seen.micro_batches():
        new = seen["new_logprobs"][i].clone().requires_grad_()
        tokens = seen.mask(TOKENS)[rows]
        loss, stats = policy_loss(
            new,
            seen["logprobs"][rows],
            seen["advantages_whitened"][rows],
            tokens,
            clip=seen.settings["cliprange"],
        )
        seen.same(loss.detach(), seen["pg_loss"][i])
        seen.same(torch.autograd.grad(loss, new)[0], seen["pg_gradient"][i])
        seen.same(stats["ratio"], seen["ratio"][i][tokens].mean())
        # A count over a count, which TRL divides in float32 in any case.
        seen.same(stats["clip_fraction"], seen["pg_clipfrac"][i], TOLERANCES["float32"])


@each_update
def test_value_loss(seen):
    for i, rows in seen.micro_batches():
        new = seen["vpred"][i].clone().requires_grad_()
        loss, stats = value_loss(
            new,
            seen["values"][rows],
            seen["returns"][rows],
            seen.mask(EXTENDED)[rows],
            clip=seen.settings["cliprange_value"],
        )
        seen.same(loss.detach(), seen["vf_loss"][i])
        seen.same(torch.autograd.grad(loss, new)[0], seen["vf_gradient"][i])
        # Inside the clip the two squares must be equal to the last bit, or rounding is counted.
        seen.same(stats["clip_fraction"], seen["vf_clipfrac"][i], TOLERANCES["float32"])


@each_update
def test_approximate_kl_is_another_estimate_of_the_same(seen):
    for i, rows in seen.micro_batches():
        tokens = seen.mask(TOKENS)[rows]
        log_ratio = (seen["new_logprobs"][i] - seen["logprobs"][rows]).double()
        theirs = log_ratio.square().mean() / 2  # with the zeros at padding
        seen.same(theirs.float(), seen["approxkl"][i], TOLERANCES["float32"])
        arguments = (seen["new_logprobs"][i], seen["logprobs"][rows])
        _, stats = policy_loss(*arguments, seen["advantages_whitened"][rows], tokens)
        ours = (log_ratio.exp() - 1 - log_ratio)[tokens].mean()
        seen.same(stats["approx_kl"], ours, TOLERANCES["float32"])
