"""Passes without padding: the same numbers and gradients, in fewer rows."""

import pytest
import torch
from test_roles import save_tiny

from rlhf_helpers import packing
from rlhf_helpers.base import load_base
from rlhf_helpers.packing import hidden_states
from rlhf_helpers.roles import Roles

LENGTHS = [9, 4, 5, 1, 3, 9]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def model(tiny):
    return load_base(tiny)


@pytest.fixture
def shapes(model):
    """Of all batches that go through the body."""
    seen = []
    model.base_model.register_forward_pre_hook(
        lambda _, arguments, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    assert packing._packs(model)
    seen.clear()
    return seen


def batch(side="both", width=12):
    """Random tokens; on both sides is padding, or on one."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 64, (len(LENGTHS), width), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        start = {"left": width - length, "right": 0, "both": (width - length) // 2}[side]
        mask[row, start : start + length] = 1
    return ids, mask


def test_the_layout_by_hand():
    """Longest first: 9; 9; 5 and 4; 3 and 1 would fit no row before them."""
    starts, shape = packing._layout(batch()[1])
    assert shape == (4, 9)
    assert starts == [0, 18 + 5, 18, 27 + 3, 27, 9]


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_packed_is_each_sequence_alone(model, shapes, side):
    ids, mask = batch(side)
    with torch.no_grad():
        found = hidden_states(model, ids, mask)
        assert shapes == [(4, 9)]
        assert found.shape == (*ids.shape, 64)
        for row, real in enumerate(mask.bool()):
            alone = model.base_model(input_ids=ids[row : row + 1, real]).last_hidden_state[0]
            torch.testing.assert_close(found[row, real], alone, rtol=0, atol=1e-5)


def test_what_padding_holds_changes_no_bit(model, shapes):
    ids, mask = batch()
    with torch.no_grad():
        found = hidden_states(model, ids, mask)
        other = hidden_states(model, torch.where(mask == 1, ids, 7), mask)
    assert torch.equal(found, other)


def test_gradients_are_those_of_a_padded_batch(tiny):
    ids, mask = batch()
    weight = (
        torch.randn(*ids.shape, 64, generator=torch.Generator().manual_seed(1)) * mask[..., None]
    )
    found = []
    for way in (hidden_states, packing._plain):
        roles = Roles(load_base(tiny), rank=4, alpha=8)
        roles.add("policy")
        for parameter in roles.parameters("policy").values():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
        (way(roles.base, ids, mask) * weight)[mask == 1].sum().backward()
        found.append([p.grad for p in roles.parameters("policy").values()])
    for packed, plain in zip(*found, strict=True):
        assert plain.abs().max() > 0
        assert (packed - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_where_no_row_is_saved_the_batch_goes_through_as_it_is(model, shapes):
    ids = torch.randint(2, 64, (3, 4), generator=torch.Generator().manual_seed(0))
    for mask in (torch.ones_like(ids), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0]])):
        with torch.no_grad():
            assert torch.equal(hidden_states(model, ids, mask), packing._plain(model, ids, mask))
    assert set(shapes) == {(3, 4)}


def test_a_model_that_takes_no_positions_is_not_packed(model):
    def blind(module, arguments, given):
        return arguments, given | {"position_ids": None}

    model.base_model.register_forward_pre_hook(blind, with_kwargs=True)
    ids, mask = batch("right")
    with torch.no_grad():
        assert not packing._packs(model)
        assert torch.equal(hidden_states(model, ids, mask), packing._plain(model, ids, mask))
