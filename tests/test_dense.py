"""`Roles.dense`: the same role in fewer operations, never stale, and gone afterwards."""

import weakref

import pytest
import torch
from safetensors.torch import load_file
from test_roles import same
from test_train_ppo import PROMPTS, SETTINGS, new_roles, save_talker

from rlhf_helpers import ppo
from rlhf_helpers import roles as roles_module
from rlhf_helpers.base import load_base
from rlhf_helpers.clinic import plant
from rlhf_helpers.memory import measured_bytes
from rlhf_helpers.presets import load_preset
from rlhf_helpers.reward import score_examples
from rlhf_helpers.roles import WEIGHTS, Roles
from rlhf_helpers.rollout import sample_responses

IDS = torch.randint(4, 60, (3, 10), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
NAMES = ["policy", "reference", "reward", "value"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer):
    return save_talker(tmp_path_factory.mktemp("models") / "tiny", tokenizer)


@pytest.fixture
def roles(tiny):
    return new_roles(tiny)


def logits(roles, name):
    """As the role answers with its adapter."""
    with torch.no_grad():
        return roles.use(name)(input_ids=IDS).logits


def dense_logits(roles, name):
    with roles.dense(name) as model:
        assert roles._dense
        return model(input_ids=IDS).logits


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def moved(roles, name="policy"):
    """A step of Adam."""
    optimizer = torch.optim.Adam(roles.parameters(name).values(), lr=0.05)
    roles.use(name)(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_a_role_answers_as_with_its_adapter(roles, tokenizer, name):
    expected = logits(roles, name)
    close(dense_logits(roles, name), expected)
    plain = sample_responses(roles.model, tokenizer, PROMPTS * 4, 6, seed=0)
    with roles.dense(name) as model:
        drawn = sample_responses(model, tokenizer, PROMPTS * 4, 6, seed=0)
    assert torch.equal(drawn.input_ids, plain.input_ids) and drawn.texts == plain.texts
    assert torch.equal(logits(roles, name), expected)  # the adapter's path is as it was


def test_values_are_those_of_the_head(roles):
    expected = roles.values("reward", IDS, MASK)
    with roles.dense("reward"):
        found = roles.values("reward", IDS, MASK)
    assert not torch.equal(found, expected)  # another path, rounded otherwise
    close(found, expected)


def test_after_a_step_it_is_the_new_role(roles):
    before = dense_logits(roles, "policy")
    moved(roles)
    after = dense_logits(roles, "policy")
    close(after, logits(roles, "policy"))
    assert (after - before).abs().max() > 0.01
    for weight in roles._adapter("policy").values():
        weight.data *= 1.5  # past autograd's counter of versions
    close(dense_logits(roles, "policy"), logits(roles, "policy"))


def test_another_role_inside_answers_exactly(roles, tmp_path):
    expected = {name: logits(roles, name) for name in NAMES}
    roles.save("reward", tmp_path / "reward")
    with roles.dense("policy"):
        for name in ("value", "policy"):
            assert torch.equal(logits(roles, name), expected[name])
        with roles.dense("reward") as model:
            close(model(input_ids=IDS).logits, expected["reward"])
    with roles.dense("policy"):
        roles.load("policy", tmp_path / "reward", trainable=True)
        assert torch.equal(logits(roles, "policy"), expected["reward"])


def test_nothing_is_learnt_inside(roles):
    with roles.dense("policy") as model:
        loss = model(input_ids=IDS, labels=IDS).loss
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()
    assert torch.is_grad_enabled()
    roles.model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(weight.grad is not None for weight in roles.parameters("policy").values())


def test_an_unknown_role_is_refused(roles):
    with pytest.raises(ValueError, match="there is no role 'judge'"), roles.dense("judge"):
        pass


# --- where it is not used ------------------------------------------------------------------


def assert_as_ever(roles, name="policy"):
    expected = logits(roles, name)
    with roles.dense(name) as model:
        assert not roles._dense and not torch.is_grad_enabled()
        assert torch.equal(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_not_in_half_precision(tiny, dtype):
    settings = {"model": tiny.model, "device": "cpu", "double_quant": False}
    roles = Roles(load_base(load_preset("single_gpu", compute_dtype=dtype, **settings)), 4, 8)
    roles.add("policy")
    assert_as_ever(roles)


def test_not_with_an_adapter_in_half_precision(roles):
    with plant("adapter_in_bfloat16", roles):
        assert_as_ever(roles)


def test_not_if_the_weights_are_too_many(roles, monkeypatch):
    numbers = sum(outputs * inputs for outputs, inputs in roles.shapes.values())
    monkeypatch.setattr(roles_module, "DENSE_BYTES", 4 * numbers - 1)
    assert_as_ever(roles)
    monkeypatch.setattr(roles_module, "DENSE_BYTES", 4 * numbers)
    dense_logits(roles, "policy")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_not_on_a_gpu(tiny):
    settings = {"model": tiny.model, "compute_dtype": "float32"}
    roles = Roles(load_base(load_preset("single_gpu", **settings)), 4, 8)
    roles.add("policy")
    with roles.dense("policy"):
        assert not roles._dense


# --- what stays ----------------------------------------------------------------------------


def test_files_and_counts_know_nothing_of_it(roles, tmp_path):
    states = {name: roles.state(name) for name in NAMES}
    counted, tensors = measured_bytes(roles), list(roles.base.state_dict())
    roles.save("policy", tmp_path / "before")
    with roles.dense("policy"):
        roles.save("policy", tmp_path / "inside")
        assert all(same(roles.state(name), states[name]) for name in NAMES)
        assert measured_bytes(roles) == counted and list(roles.base.state_dict()) == tensors
    sizes = [{f.name: f.stat().st_size for f in x.iterdir()} for x in tmp_path.iterdir()]
    assert len(sizes) == 2 and sizes[0] == sizes[1]
    assert same(*(load_file(folder / WEIGHTS) for folder in tmp_path.iterdir()))


@pytest.mark.parametrize("end", [None, KeyboardInterrupt, "another role"])
def test_the_decoded_weights_are_freed(roles, end):
    def use():
        with roles.dense("policy"):
            kept = [layer.forward.keywords["weight"] for layer in roles._dense]
            weights.extend(map(weakref.ref, kept))
            del kept
            if end == "another role":
                roles.use("value")
                assert not any(weight() is not None for weight in weights)
            elif end:
                raise end

    weights, layers = [], list(roles._layers().values())
    try:
        use()
    except KeyboardInterrupt:
        pass
    assert len(weights) == len(layers) == len(roles.shapes)
    assert all(weight() is None for weight in weights) and not roles._dense
    assert not any("forward" in vars(layer) for layer in layers)


# --- who uses it ---------------------------------------------------------------------------


@pytest.fixture
def answered(roles, monkeypatch):
    """The dense roles, in the order in which they have answered."""
    seen, head = [], roles.base.base_model
    head.register_forward_hook(lambda *_: seen.append(roles.active) if roles._dense else None)
    return seen


def test_an_update_uses_it_for_all_but_the_exact(roles, tokenizer, answered):
    config = ppo.PPOConfig(**vars(SETTINGS) | {"updates": 1})
    (stats,) = ppo.train_ppo(roles, tokenizer, PROMPTS, config)
    assert stats.first_ratio == 1 and stats.kl == 0
    assert answered[0] == "policy"
    assert list(dict.fromkeys(answered)) == ["policy", "value", "reward"]
    assert answered.count("value") == answered.count("reward") == 2  # minibatches


def test_old_logprobs_and_the_references_are_those_of_learning(roles, tokenizer):
    moved(roles)
    found = ppo.collect_experience(roles, tokenizer, PROMPTS, SETTINGS, 0.1, seed=3)
    for start in range(0, len(PROMPTS), SETTINGS.minibatch_size):
        part = slice(start, start + SETTINGS.minibatch_size)
        for name, kept in (("policy", found.logprobs), ("reference", found.ref_logprobs)):
            expected = ppo.role_logprobs(roles, name, found.rollout, part, SETTINGS)
            assert torch.equal(kept[part], expected)


def test_scores_of_examples_come_from_it(roles, tokenizer, answered):
    examples = [{"prompt": [5, 6], "response": [7 + i, 1]} for i in range(3)]
    scores = score_examples(roles, "reward", tokenizer, examples)
    assert answered == ["reward"] and not scores.requires_grad
    ids = torch.tensor([row["prompt"] + row["response"] for row in examples])
    close(scores, roles.values("reward", ids, torch.ones_like(ids)).detach()[:, -1])
