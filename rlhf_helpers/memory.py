"""What models cost, from first principles and measured: parameters, and bytes of each role."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig

from rlhf_helpers.base import NF4_BLOCK, hidden_width, linear_shapes, on_meta
from rlhf_helpers.guards import shown
from rlhf_helpers.kinds import Whole
from rlhf_helpers.roles import Roles
from rlhf_helpers.validation import check_fields, checked

NF4_SUPERBLOCK = 256  # scales that share one float32 under double quantization
FLOAT32 = 4  # bytes
TRAINED = 16  # bytes of a trained parameter: its weights, gradient and Adam's two moments
TRAINS = {"policy": True, "reference": False, "reward": False, "value": True}
SCORES = ("reward", "value")  # roles with a scalar head


@dataclass(frozen=True)
class ModelSizes:
    """How many parameters a causal language model has, and of which kind.

    Args:
        shapes: `(out, in)` of each linear layer but the output layer: what gets adapters and NF4.
        other: parameters of all else, embeddings, norms and biases; they stay unquantized.
        output: parameters of the output layer; 0 if it has the embeddings' weights (is tied).
        width: of the last hidden state, which a scalar head reads.

    Raises:
        ValueError: a number that is no whole number or too small, or no layer at all.

    Example:
        3 · 4 + 10 + 20.

        >>> ModelSizes(shapes=((3, 4),), other=10, output=20, width=4).parameters
        42
    """

    shapes: tuple[tuple[int, int], ...]
    other: Whole[0]
    output: Whole[0]
    width: Whole[1]

    def __post_init__(self) -> None:
        _check_shapes(self.shapes)
        check_fields(self)

    @property
    def parameters(self) -> int:
        """All parameters of the language model, tied ones once."""
        return sum(outputs * inputs for outputs, inputs in self.shapes) + self.other + self.output

    @property
    def head(self) -> int:
        """Parameters of a scalar head: one weight for each hidden number, and a bias."""
        return self.width + 1


@dataclass(frozen=True)
class RoleBytes:
    """A row of `memory_table`: what one role, or the base that all share, takes, in bytes.

    Args:
        role: "policy", "reference", "reward", "value", or "base" for shared weights.
        weights: of the model, with the quantization's scales.
        adapters: LoRA and scalar head.
        gradients: of what the role trains.
        optimizer: Adam's two moments; with 16-bit weights also the float32 copy that is updated.

    Example:
        >>> RoleBytes("policy", adapters=4, gradients=4, optimizer=8).total
        16
    """

    role: str
    weights: int = 0
    adapters: int = 0
    gradients: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapters + self.gradients + self.optimizer


@checked
def model_sizes(config: PreTrainedConfig) -> ModelSizes:
    """Parameters of a model, counted from its configuration alone.

    The model is built on torch's "meta" device, where tensors have shapes and no memory: a model
    of any size takes about a second, and no weights are needed.

    Args:
        config: of a causal language model; it stays as it is.

    Returns:
        The counts that `memory_table` takes.

    Raises:
        TypeError: `config` is no configuration.

    Example:
        Embeddings 10 · 64, tied; a layer of four 64 · 64 and three 64 · 128; three norms of 64.

        >>> from transformers import LlamaConfig
        >>> sizes = model_sizes(LlamaConfig(
        ...     vocab_size=10, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True))
        >>> len(sizes.shapes), sizes.other, sizes.output, sizes.parameters
        (7, 832, 0, 41792)

    Derived in lesson 04.
    """
    model = on_meta(config)
    shapes = tuple(linear_shapes(model).values())
    linear = sum(outputs * inputs for outputs, inputs in shapes)
    embeddings, last = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    output = 0 if last is embeddings else last.numel()
    total = sum(parameter.numel() for parameter in model.parameters())
    return ModelSizes(shapes, total - linear - output, output, hidden_width(model))


@checked
def memory_table(
    sizes: ModelSizes,
    rank: Whole[1] = 16,
    double_quant: bool = True,
    weight_bytes: int = 2,
    critic: bool = True,
) -> dict[str, list[RoleBytes]]:
    """What PPO's four roles take, in four ways to hold them; without a critic three roles.

    Policy and value train, reference and reward do not. With N parameters of a model, L of a LoRA
    adapter on all linear layers but the output layer (`lora_parameters`), and w bytes of a weight:

    - "4 full models": a trained model 16 N, a frozen one w N. 16 is w for the weight, w for the
      gradient, and 16 − 2w for Adam: two moments in float32, 8, and with 16-bit weights a float32
      copy of them, 4.
    - "LoRA on 4 bases": each w N, plus 16 L if trained (float32 weight, gradient and two moments,
      4 each), 4 L if not.
    - "LoRA on 1 base": w N once, and the four adapters.
    - "LoRA on 1 NF4 base": the base's linear layers as `nf4_bytes`; all else, the output layer too,
      stays at w.

    Reward and value have a scalar head, width + 1. In a model of their own it replaces the output
    layer, which is counted only if it is not tied; on a base it counts with the adapter. Left out
    is what grows with the batch: activations, logits (`logits_bytes`), the cache
    (`cache_bytes`).

    Args:
        sizes: of the model that all four roles have, from `model_sizes`.
        rank: of all adapters.
        double_quant: whether the NF4 scales are quantized as well.
        weight_bytes: w, of every weight that is neither NF4 nor an adapter: 2 (bfloat16) or 4
            (float32).
        critic: whether there is a role "value". Where responses to one prompt are compared with
            each other, as in RLOO and GRPO, there is none; then "3 full models" and so on.

    Returns:
        For each way its rows: the roles, before them "base" where they share one. In bytes; a GB is
        1e9.

    Raises:
        ValueError: a rank that is no whole number of at least 1, or weight bytes other than 2, 4.

    Example:
        One layer of 64 × 64, and 100 others: N is 4196; L is 128, a head 65. NF4 takes 2048 bytes
        of codes, 64 scales and 4, and 200 for the others.

        >>> sizes = ModelSizes(shapes=((64, 64),), other=100, output=0, width=64)
        >>> table = memory_table(sizes, rank=1)
        >>> for row in table["LoRA on 1 NF4 base"]:
        ...     print(row.role, row.weights, row.adapters, row.gradients, row.optimizer, row.total)
        base 2316 0 0 0 2316
        policy 0 512 512 1024 2048
        reference 0 512 0 0 512
        reward 0 772 0 0 772
        value 0 772 772 1544 3088
        >>> for way, rows in table.items():
        ...     print(way, sum(row.total for row in rows))
        4 full models 152226
        LoRA on 4 bases 39988
        LoRA on 1 base 14812
        LoRA on 1 NF4 base 8736
        >>> for way, rows in memory_table(sizes, rank=1, critic=False).items():
        ...     print(way, sum(row.total for row in rows))
        3 full models 84050
        LoRA on 3 bases 28508
        LoRA on 1 base 11724
        LoRA on 1 NF4 base 5648

    16 bytes: Rajbhandari et al., ZeRO (arXiv 1910.02054), section 3.1; one base for all roles:
    Santacroce et al., Hydra-RLHF (arXiv 2309.00754). Derived in lesson 04.
    """
    if weight_bytes not in (2, 4):
        raise ValueError(f"weight_bytes is {weight_bytes!r}: give 2 (bfloat16) or 4 (float32).")
    whole = weight_bytes * sizes.parameters
    scoring = sizes.parameters - sizes.output  # a model of its own with a head in place of it
    adapter = lora_parameters(sizes.shapes, rank)
    nf4 = sum(nf4_bytes(outputs * inputs, double_quant) for outputs, inputs in sizes.shapes)
    nf4 += weight_bytes * (sizes.other + sizes.output)
    full, separate = [], []
    kept = {role: trains for role, trains in TRAINS.items() if critic or role != "value"}
    for role, trains in kept.items():
        body, head = (scoring, sizes.head) if role in SCORES else (sizes.parameters, 0)
        trained = _training(body + head, weight_bytes, trains)
        full.append(RoleBytes(role, weight_bytes * (body + head), 0, *trained))
        trained = _training(adapter + head, FLOAT32, trains)
        separate.append(RoleBytes(role, weight_bytes * body, FLOAT32 * (adapter + head), *trained))
    shared = [replace(row, weights=0) for row in separate]
    return {
        f"{len(kept)} full models": full,
        f"LoRA on {len(kept)} bases": separate,
        "LoRA on 1 base": [RoleBytes("base", whole), *shared],
        "LoRA on 1 NF4 base": [RoleBytes("base", nf4), *shared],
    }


@dataclass(frozen=True)
class RankBytes:
    """A row of `parallel_table`: what one rank of several holds and sends, in bytes.

    Args:
        way: how the work is shared.
        weights: of the model, as long as nothing runs.
        gradients: of all that is trained, after a step.
        optimizer: Adam's two moments; with 16-bit weights also the float32 copy that is updated.
        messages: in one step; an all-reduce counts as one.
        sent: bytes that a rank sends in one step.

    Example:
        >>> RankBytes("DDP", weights=2, gradients=2, optimizer=12, messages=1, sent=2).total
        16
    """

    way: str
    weights: int
    gradients: int
    optimizer: int
    messages: int
    sent: int

    @property
    def total(self) -> int:
        """What a rank holds."""
        return self.weights + self.gradients + self.optimizer


@checked
def parallel_table(
    sizes: ModelSizes,
    layers: Whole[1],
    world_size: Whole[1],
    tokens: Whole[1],
    microbatches: Whole[1] = 8,
    weight_bytes: Whole[1] = 2,
) -> list[RankBytes]:
    """What each of several ranks holds and sends where one model, all of it trained, is shared.

    N parameters of w bytes, M of them in the linear layers of l blocks and R = N − M elsewhere; W
    ranks; t tokens of width d in a batch; k microbatches. Adam takes 16 − 2w (`memory_table`). An
    all-reduce of x bytes makes each rank send 2x(W − 1)/W, the gathering of a whole from its parts,
    or its summing into parts, half of that: those are the least, and rings need no more.

    - DDP: all on each rank; one all-reduce of the gradients, w N.
    - ZeRO-2: gradients and optimizer are cut by W; gradients are summed into parts, the new weights
      gathered.
    - FSDP: weights too. A block's are gathered before its forward and again before its backward
      pass, and its gradients summed into parts: 3 messages; what is outside of the blocks stays
      whole in between: 2.
    - TP: every matrix and the vocabulary are cut. Each block has 2 all-reduces of t · d numbers in
      each direction, embeddings and output layer have one, and the log-probabilities two small
      ones (1 and 3 float32 numbers for a token). Norms, which all ranks have, count as if cut.
    - PP: each rank has ⌈l/W⌉ blocks; the row is the largest rank, which has the embeddings or the
      output layer (tied ones: either has them). An inner stage sends each microbatch's hidden
      states forward and their gradients back.

    Left out are activations, and the layer that FSDP has whole while it runs.

    Args:
        sizes: from `model_sizes`.
        layers: l, `config.num_hidden_layers`.
        world_size: W.
        tokens: t, of a batch that passes through the model in one step.
        microbatches: k, of a pipeline.
        weight_bytes: w, 2 (bfloat16) or 4 (float32).

    Returns:
        A row for each way.

    Raises:
        ValueError: a number that is no whole number of at least 1, weight bytes other than 2 and 4,
            or fewer layers than ranks.

    Example:
        A layer of 64 × 64 in each of two blocks, 100 others, two ranks, ten tokens: N is 8292. DDP
        sends 2 · 2 N/2.

        >>> sizes = ModelSizes(shapes=((64, 64),) * 2, other=100, output=0, width=64)
        >>> for row in parallel_table(sizes, layers=2, world_size=2, tokens=10, microbatches=4):
        ...     print(f"{row.way:7}{row.total:7}{row.messages:4}{row.sent:6}")
        DDP     132672   1 16584
        ZeRO-2   74628   2 16584
        FSDP     66336   8 24776
        TP       66336  12 12960
        PP       67136   8  2560

    Rajbhandari et al., ZeRO (arXiv 1910.02054), sections 3 and 7; Shoeybi et al., Megatron-LM
    (arXiv 1909.08053), section 3; Narayanan et al. (arXiv 2104.04473), section 3. Lesson 10.
    """
    if weight_bytes not in (2, 4):
        raise ValueError(f"weight_bytes is {weight_bytes!r}: give 2 (bfloat16) or 4 (float32).")
    if layers < world_size:
        raise ValueError(f"layers is {layers}: {world_size} ranks need a layer each in a pipeline.")
    whole, w = sizes.parameters, weight_bytes
    blocks = sum(outputs * inputs for outputs, inputs in sizes.shapes)
    rest, part, hidden = whole - blocks, (world_size - 1) / world_size, tokens * sizes.width * w
    stage = ceil(blocks / layers) * ceil(layers / world_size) + max(sizes.other, sizes.output)
    cut, adam, small = ceil(whole / world_size), TRAINED - 2 * w, 4 * FLOAT32 * tokens
    rows = (
        ("DDP", whole, whole, whole, 1, 2 * part * w * whole),
        ("ZeRO-2", whole, cut, cut, 2, 2 * part * w * whole),
        ("FSDP", cut, cut, cut, 3 * layers + 2, part * w * (3 * blocks + 2 * rest)),
        ("TP", cut, cut, cut, 4 * layers + 4, 2 * part * ((4 * layers + 2) * hidden + small)),
        ("PP", stage, stage, stage, 2 * microbatches, 2 * hidden),
    )
    return [
        RankBytes(way, w * weights, w * gradients, adam * moments, messages, ceil(sent))
        for way, weights, gradients, moments, messages, sent in rows
    ]


@checked
def lora_parameters(shapes: Sequence[tuple[int, int]], rank: Whole[1]) -> int:
    """Trainable parameters of LoRA adapters on linear layers.

    The layer y = x Wᵀ with W `[out, in]` gets A `[rank, in]` and B `[out, rank]`, so
    Σ rank · (in + out) over all adapted layers. W itself is frozen, and the adapters have no bias.

    Args:
        shapes: `(out, in)` of each adapted layer, the shape of its weight; equal ones as often as
            they occur.
        rank: r, at least 1.

    Returns:
        The number of parameters.

    Raises:
        ValueError: a rank or a size that is no whole number of at least 1, or no layer at all.

    Example:
        A is 2 × 4 and B is 3 × 2, so 8 + 6.

        >>> lora_parameters([(3, 4)], rank=2)
        14

    Hu et al., LoRA (arXiv 2106.09685), section 4. Derived in lesson 01.
    """
    _check_shapes(shapes)
    return sum(rank * (outputs + inputs) for outputs, inputs in shapes)


@checked
def nf4_bytes(weights: Whole[1], double_quant: bool = True) -> int:
    """Bytes of one weight tensor in NF4, its scales included.

    Each weight is a 4-bit code, two to a byte; each block of 64 weights has one scale. Plain, a
    scale is a float32. Double quantization stores it in 8 bits, plus one float32 for every 256
    scales. What is left over at the end makes a byte or a block of its own:

        codes  = ⌈weights / 2⌉,  scales = ⌈weights / 64⌉
        plain:   codes + 4 · scales                   (4.5 bits per weight)
        double:  codes + scales + 4 · ⌈scales / 256⌉  (4 + 8/64 + 32/(64 · 256) = 4.127 bits)

    Left out is what does not grow with the tensor: bitsandbytes keeps a codebook of 16 float32
    values for the codes and, under double quantization, one of 256 for the scales and their mean.

    Args:
        weights: entries of the tensor, at least 1. Tensors are quantized one by one: add their
            bytes, do not give their total.
        double_quant: whether the scales are quantized as well.

    Returns:
        The number of bytes.

    Raises:
        ValueError: `weights` is no whole number of at least 1.

    Example:
        128 weights take 64 bytes of codes. They have two scales: 8 bytes plain; 2 bytes and a
        float32 under double quantization.

        >>> nf4_bytes(128, double_quant=False), nf4_bytes(128)
        (72, 70)

    Dettmers et al., QLoRA (arXiv 2305.14314), section 3. Derived in lesson 01.
    """
    codes, scales = ceil(weights / 2), ceil(weights / NF4_BLOCK)
    if not double_quant:
        return codes + FLOAT32 * scales
    return codes + scales + FLOAT32 * ceil(scales / NF4_SUPERBLOCK)


@checked
def logits_bytes(
    batch: Whole[1], tokens: Whole[1], vocabulary: Whole[1], entry_bytes: Whole[1] = FLOAT32
) -> int:
    """Bytes of the logits of a batch: B · T · V entries.

    Args:
        batch: sequences, B.
        tokens: positions that get logits, of each sequence, T.
        vocabulary: V.
        entry_bytes: of one number; losses take float32. A log-softmax makes another such tensor,
            its gradient a third.

    Returns:
        The number of bytes.

    Raises:
        ValueError: a number that is no whole number of at least 1.

    Example:
        Eight sequences of 512, with Qwen2.5's vocabulary: 2.5 GB.

        >>> logits_bytes(8, 512, 151_936)
        2489319424

    Derived in lesson 04.
    """
    return batch * tokens * vocabulary * entry_bytes


@checked
def cache_bytes(
    config: PreTrainedConfig, batch: Whole[1], tokens: Whole[1], entry_bytes: Whole[1] = 2
) -> int:
    """Bytes of the cache that generation keeps: a key and a value of every token so far.

    2 · layers · kv_heads · head_dim · B · T entries, but for three things that configurations know:
    a head may have another width than hidden/heads; layers with a sliding window keep no more
    tokens than it has; and multi-head latent attention (DeepSeek) keeps one short vector in place
    of all heads. Under grouped-query attention there are fewer kv_heads than the query has.

    Args:
        config: of a causal language model.
        batch: sequences, B.
        tokens: of each, prompt and response, T.
        entry_bytes: of one number; 2 in bfloat16.

    Returns:
        The number of bytes.

    Raises:
        ValueError: a number that is no whole number of at least 1.

    Example:
        Gemma 3's heads are wider than 640/4, and five of six layers see 512 tokens only.

        >>> from transformers import Gemma3TextConfig
        >>> config = Gemma3TextConfig(hidden_size=640, num_hidden_layers=6, num_attention_heads=4,
        ...     num_key_value_heads=1, head_dim=256, sliding_window=512)
        >>> cache_bytes(config, batch=1, tokens=1000)  # 2 · 256 · (5 · 512 + 1000) numbers
        3645440

    Lesson 04 uses it.
    """
    heads, own = config.num_attention_heads, lambda name: getattr(config, name, None)
    width = own("head_dim") or config.hidden_size // heads
    shared = own("multi_query") and not own("new_decoder_architecture")
    kv_heads = own("num_key_value_heads") or (1 if shared else heads)
    latent = own("kv_lora_rank")
    numbers = latent + config.qk_rope_head_dim if latent else 2 * kv_heads * width
    layers = DynamicCache(config=config).layers
    kept = (min(tokens, getattr(layer, "sliding_window", tokens)) for layer in layers)
    return numbers * batch * sum(kept) * entry_bytes


@checked
def activation_bytes(forward: Callable[[], object], model: nn.Module) -> int:
    """Bytes of what autograd keeps of a forward pass until the backward pass: the activations.

    Measured by running it. They grow with the number of tokens; parameters, which are there anyway,
    do not count, and what several layers keep together counts once.

    Args:
        forward: runs the pass and returns what depends on it.
        model: whose parameters are left out.

    Example:
        For the gradient of w, a layer w x keeps x: 6 numbers in float32.

        >>> layer = nn.Linear(3, 1)
        >>> activation_bytes(lambda: layer(torch.zeros(2, 3)), layer)
        24
    """
    there = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result  # until here nothing was freed, so that no address came twice
    return sum(kept.values())


@checked
def measured_bytes(roles: Roles) -> dict[str, dict[str, int]]:
    """Bytes of the tensors that roles really hold, to lay beside `memory_table`.

    Parameters of the base, tied ones once, with what bitsandbytes keeps to decode them; of each
    role its LoRA matrices and its head. Gradients and the optimizer's state are not counted.

    Args:
        roles: on any base, quantized or not.

    Returns:
        "base": `weights` (4-bit codes and all unquantized parameters) and `scales` (scales and
        codebooks, 0 without NF4). Under each role's name: `adapter`, and `head`, 0 if it has none.

    Example:
        >>> roles = Roles(load_base(load_preset("pocket")))  # doctest: +SKIP
        >>> roles.add("policy")                               # doctest: +SKIP
        >>> measured_bytes(roles)                             # doctest: +SKIP
        {'base': {'weights': 1857792, 'scales': 112384}, 'policy': {'adapter': 933888, 'head': 0}}

    Derived in lesson 04.
    """
    named = dict(roles.base.named_parameters())
    base = [parameter for name, parameter in named.items() if ".lora_" not in name]
    states = [parameter.quant_state for parameter in base if hasattr(parameter, "quant_state")]
    measured = {
        "base": {
            "weights": _tensor_bytes(base),
            "scales": _tensor_bytes(tensor for state in states for tensor in _scales(state)),
        }
    }
    for role in roles.names:
        end = f".{role}.weight"
        adapter = [p for name, p in named.items() if ".lora_" in name and name.endswith(end)]
        head = roles.heads[role].parameters() if role in roles.heads else ()
        measured[role] = {"adapter": _tensor_bytes(adapter), "head": _tensor_bytes(head)}
    return measured


def _scales(state) -> list[Tensor]:
    tensors = [state.absmax, state.code]
    if state.nested:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    return tensors


def _tensor_bytes(tensors: Iterable[Tensor]) -> int:
    sizes = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}
    return sum(sizes.values())  # a tensor that several share, once


def _training(number: int, each: int, trains: bool) -> tuple[int, int]:
    """Bytes of gradients and optimizer for as many parameters of `each` bytes."""
    return (each * number, (TRAINED - 2 * each) * number) if trains else (0, 0)


def _check_shapes(shapes: Sequence[tuple[int, int]]) -> None:
    if shapes is None or len(shapes) == 0:
        raise ValueError("shapes is empty: give (out, in) of at least one adapted layer.")
    for index, shape in enumerate(shapes):
        sizes = shape if isinstance(shape, Sequence) else ()
        if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
            mend = "give (out, in) of a linear layer, two whole numbers of at least 1."
            raise ValueError(f"shapes[{index}] is {shown(shape)}: {mend}")
