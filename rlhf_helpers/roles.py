"""The roles of RLHF as adapters on one frozen base."""

import copy
import hashlib
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_helpers.base import LINEAR, fingerprint, hidden_width, linear_shapes, same_base
from rlhf_helpers.checkpoints import require_own_folder, whole_folder
from rlhf_helpers.kinds import Above, Whole
from rlhf_helpers.logprobs import check_sequences, model_inputs
from rlhf_helpers.validation import checked

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
HEAD = "head.safetensors"
BASE = "base_weights"  # under which the weights' file has the fingerprint of the adapter's base
# Settings of LoRA that leave open what a trained adapter computes: names and training, and which
# layers it is on, which the shapes of its weights say. All others must be those of `Roles`.
HARMLESS = set(
    "auto_mapping base_model_name_or_path exclude_modules inference_mode layers_pattern "
    "layers_to_transform loftq_config lora_dropout megatron_core peft_version revision "
    "runtime_config target_modules task_type".split()  # loftq_config is for one way to start alone
)
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # others change the base's weights
AGAIN = "train it again, or copy the whole folder"
# The most that `Roles.dense` decodes. Fixed, so that a run that goes on computes as the one that
# was stopped, however much memory is free by then.
DENSE_BYTES = 2**29


class Roles:
    """One frozen base and one LoRA adapter for each role; a single role acts at a time.

    A LoRA layer computes W x + (α/r) B A x: W is the base's, shared and frozen; A and B are the
    role's. B starts at 0, so that a new role answers exactly as the base.

    PEFT lets you run a forward pass as one role, switch, and call backward: gradients are then
    dropped, or, with activation checkpointing, computed through the other role, and nothing is
    said. Here that backward raises RuntimeError. The safe order is use, forward, backward, and
    only then the next role.

    A method that trains one role (SFT, the reward model, DPO) takes its name, since you may train
    several of a kind, such as two reward models. PPO lets four roles act together, and finds them
    by what they do: `policy`, `reference`, `reward`, `value`.

    Args:
        base: from `load_base`; it gets the adapters built in.
        rank: r, the inner width of every adapter.
        alpha: α; the update is scaled by α/r.

    Raises:
        ValueError: for a base that carries adapters already, or a rank or alpha below 1.

    Example:
        >>> roles = Roles(load_base(load_preset("pocket")))  # doctest: +SKIP
        >>> roles.add("sft")                                  # doctest: +SKIP
        >>> roles.add("policy", copy_of="sft")                # doctest: +SKIP
        >>> logits = roles.use("policy")(input_ids).logits    # doctest: +SKIP

    Sources: Hu et al., LoRA (arXiv 2106.09685), equation 3; Dettmers et al., QLoRA (arXiv
    2305.14314), section 3; one base for all roles: Hydra-RLHF (arXiv 2309.00754). Lesson 01 derives
    the layer, lesson 04 uses four roles.
    """

    @checked
    def __init__(self, base: PreTrainedModel, rank: Whole[1] = 16, alpha: Above[0] = 32) -> None:
        if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
            raise ValueError("the base carries adapters already; load another base for new roles")
        self.base = base
        self.rank, self.alpha = rank, alpha
        self.shapes = linear_shapes(base)
        self.model: PeftModel | None = None
        self.heads: dict[str, ScalarHead] = {}
        self._trainable: dict[str, bool] = {}
        self._dense: list[LoraLayer] = []  # layers that compute with decoded weights now
        base.base_model.register_forward_hook(self._guard)

    @cached_property
    def fingerprint(self) -> dict[str, object]:
        """Of the base, to tell it from others; computed once, when it is first needed."""
        return fingerprint(self.base)

    @property
    def names(self) -> list[str]:
        """The roles, in the order in which they came."""
        return list(self._trainable)

    @property
    def active(self) -> str | None:
        """The role that acts now; None before the first is added."""
        return self.model.active_adapter if self.model else None

    @checked
    def add(
        self, name: str, copy_of: str | None = None, trainable: bool = True, seed: Whole[0] = 0
    ) -> None:
        """Add a role; the active role stays the same, unless this is the first.

        Args:
            name: letters, digits and underscores.
            copy_of: a role whose weights, and head if it has one, the new one starts from, bit for
                bit; None for a fresh adapter, A random and B zero.
            trainable: False for a role that never learns, such as the reference.
            seed: of A; torch's own generator is left as it was.

        Raises:
            ValueError: for a name that is taken or cannot be used, or an unknown `copy_of`.
        """
        known = isinstance(name, str) and name.isidentifier()
        if not known or name in self.names or hasattr(nn.ModuleDict, name):
            raise ValueError(
                f"role {name!r} is there already or is no name that can be used; there are "
                f"{self.names}; give another one, of letters, digits and underscores"
            )
        weights = self.state(copy_of) if copy_of is not None else None
        active = self.active
        with torch.random.fork_rng(), warnings.catch_warnings():
            torch.manual_seed(seed)
            # peft asks by an older name of transformers, and says how it takes Conv1D
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            warnings.filterwarnings("ignore", "fan_in_fan_out")
            if self.model is None:
                self.model = get_peft_model(self.base, self._config(), adapter_name=name)
            else:
                self.model.add_adapter(name, self._config())
        self._trainable[name] = trainable
        if weights is not None:
            set_peft_model_state_dict(self.model, weights, adapter_name=name)
        if copy_of in self.heads:
            self.heads[name] = copy.deepcopy(self.heads[copy_of]).requires_grad_(trainable)
        self._activate(active or name)
        self.model.eval()

    @checked
    def add_head(self, name: str, seed: Whole[0] = 0) -> None:
        """Give a role a scalar head: one number at every position, in float32.

        Its weights start normal with standard deviation 1/√(width + 1), its bias at 0.

        Raises:
            ValueError: for an unknown role, or one that has a head.
        """
        self.require(name, head=False)
        with torch.random.fork_rng():
            head = ScalarHead(hidden_width(self.base), seed)
        self.heads[name] = head.to(self.base.device).requires_grad_(self._trainable[name])

    def require(self, name: str, trainable: bool | None = None, head: bool | None = None) -> None:
        """Raise ValueError unless a role is there, and as it must be.

        Args:
            trainable: True for one that learns, False for a frozen one, None for either.
            head: True for one with a head, False for one without, None for either.
        """
        if name not in self.names:
            raise ValueError(
                f"there is no role {name!r}; there are {self.names}; load or add it first"
            )
        if trainable not in (None, self._trainable[name]):
            kind, mend = ("frozen", True) if trainable else ("trainable", False)
            raise ValueError(f"role {name!r} is {kind}; add a copy of it with trainable={mend}")
        if head and name not in self.heads:
            raise ValueError(f"role {name!r} has no head; call add_head({name!r}) first")
        if head is False and name in self.heads:
            raise ValueError(f"role {name!r} has a head already; add another role, without a head")

    def require_head(self, name: str) -> "ScalarHead":
        """A role's head; ValueError if it has none."""
        self.require(name, head=True)
        return self.heads[name]

    def values(self, name: str, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The head's number at every position, as that role.

        Args:
            input_ids: `[B, L]`, int64.
            attention_mask: `[B, L]`, 1 for a real token; padding may stand on either side.

        Returns:
            `[B, L]`, float32; what stands at padding means nothing.

        Raises:
            ValueError: for a role without a head, and what `check_sequences` refuses.
        """
        head = self.require_head(name)
        check_sequences(self.base, input_ids, attention_mask)
        self.use(name)
        inputs = model_inputs(input_ids, attention_mask)
        hidden = self.base.base_model(**inputs).last_hidden_state
        return head(hidden.float()).squeeze(-1)

    def use(self, name: str) -> PeftModel:
        """Make a role the active one and return the model, which now acts as that role."""
        self.require(name)
        if name != self.active:
            self._activate(name)
        return self.model

    @contextmanager
    def dense(self, name: str) -> Iterator[PeftModel]:
        """A role that only answers: without gradients, each layer one product with W + (α/r) B A.

        It computes what `use` gives, but for rounding, in about two thirds of the time: W is
        decoded once and not in every pass, and one product takes the place of three. The decoded
        weights are made when the context opens, so that they are never older than the role, and go
        when it closes or another role is used. All else is shared: embeddings, norms, heads, hooks.

        On a GPU, in half precision, where a small BA would be rounded away, beside layers of other
        kinds and above `DENSE_BYTES` the role answers as ever. What must equal a pass that learns
        bit for bit, as the log-probabilities in PPO's ratio, is not for here.

        Yields:
            The model, which acts as that role.

        Raises:
            ValueError: for an unknown role.

        Example:
            >>> with roles.dense("policy") as model:                         # doctest: +SKIP
            ...     rollout = sample_responses(model, tokenizer, prompts)
        """
        model = self.use(name)
        with torch.no_grad():
            try:
                self._begin_dense(name)
                yield model
            finally:
                self._end_dense()

    def parameters(self, name: str) -> dict[str, Parameter]:
        """A trainable role's parameters by name, for an optimizer.

        Raises:
            ValueError: for an unknown role, or one that was added as frozen.
        """
        self.require(name, trainable=True)
        head = self.heads[name].named_parameters() if name in self.heads else ()
        return self._adapter(name) | {f"head.{n}": p for n, p in head}

    def state(self, name: str) -> dict[str, Tensor]:
        """A copy of a role's weights under the names that PEFT gives them in a file."""
        self.require(name)
        found = get_peft_model_state_dict(self.model, None, name, save_embedding_layers=False)
        return {key: tensor.detach().cpu().clone() for key, tensor in found.items()}

    def digest(self, name: str) -> str:
        """A role's adapter in a word: equal for equal weights, and for those alone."""
        return hashlib.sha256(save(self.state(name))).hexdigest()[:16]

    @checked
    def save(self, name: str, folder: Path) -> None:
        """Write a role as PEFT does, so that `PeftModel.from_pretrained(base, folder)` reads it.

        Args:
            folder: replaced as a whole, or not at all.

        Raises:
            ValueError: for an unknown role, or a folder that holds something else than a role.
            NotADirectoryError: for a file.
        """
        self.require(name)
        require_own_folder(folder)
        with whole_folder(folder) as new:
            self.write(name, new)

    def write(self, name: str, folder: Path) -> None:
        """Write a role's files into an existing folder; `save` does it safely.

        A head goes to a file of its own, `head.safetensors`, which PEFT ignores.
        """
        config = self._config()
        config.base_model_name_or_path = _portable(self.base.name_or_path)
        config.save_pretrained(folder)
        metadata = {"format": "pt", BASE: json.dumps(self.fingerprint)}
        save_file(self.state(name), folder / WEIGHTS, metadata=metadata)
        if name in self.heads:
            self.heads[name].write(folder / HEAD)

    @checked
    def load(self, name: str, folder: Path, trainable: bool = False) -> None:
        """Read a saved adapter as a role; one of that name is overwritten.

        Raises:
            FileNotFoundError: if a file of the adapter is missing.
            ValueError: for a damaged file, another rank or alpha, layers of other sizes, or an
                adapter that was trained on another base; nothing has changed then.
        """
        weights, head = self._read(Path(folder))
        if name not in self._trainable:
            self.add(name, trainable=trainable)
        if head is None:
            self.heads.pop(name, None)
        else:  # an optimizer may hold the parameters of a head that is there: change them in place
            kept = self.heads.setdefault(name, head.to(self.base.device))
            kept.load_state_dict(head.state_dict())
            kept.requires_grad_(trainable).statistics = head.statistics
        set_peft_model_state_dict(self.model, weights, adapter_name=name)
        self._trainable[name] = trainable
        self._activate(self.active)

    @torch.no_grad()
    def merged(self, name: str) -> PreTrainedModel:
        """A plain model in float32 that answers as a role does: W + (α/r) B A in place of W, A, B.

        W is what this base computes with: in NF4 the decoded weights, so that the copy is the model
        that was trained, within rounding. (PEFT's own merge would round the sum to NF4 again.) On a
        base loaded unquantized W are the original weights, to which the adapter was not fitted. In
        half precision a small BA would be rounded away.

        Returns:
            A model of its own, without adapters or head, in eval mode, 4 bytes a parameter; its
            `save_pretrained` writes what plain transformers loads.

        Raises:
            ValueError: for an unknown role.

        Lesson 04 compares both ways.
        """
        self.require(name)
        config = copy.deepcopy(self.base.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        last, first = self.base.get_output_embeddings(), self.base.get_input_embeddings()
        config.tie_word_embeddings = last.weight is first.weight  # whatever the folder says
        with torch.device(self.base.device):
            model = type(self.base)(config).float()
        own = {k.replace(".base_layer.", "."): v for k, v in self.base.state_dict().items()}
        for layer, module in self._layers().items():
            weight = _merged_weight(module, name)
            turned = isinstance(model.get_submodule(layer), Conv1D)  # NF4 has it as [out, in]
            turned = turned and not isinstance(module.base_layer, Conv1D)
            own[f"{layer}.weight"] = weight.T if turned else weight
        model.load_state_dict({key: own[key].float() for key in model.state_dict()})
        model.generation_config = copy.deepcopy(self.base.generation_config)
        return model.requires_grad_(False).eval()

    def check_folder(self, folder: Path, head: bool = False) -> None:
        """Raise what `load` would raise for a saved role, and if a head is wanted and missing."""
        if self._read(folder)[1] is None and head:
            raise FileNotFoundError(f"{folder / HEAD} is missing: {AGAIN}")

    def _config(self) -> LoraConfig:
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=0.0,  # dropout would make the policy differ from itself
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )

    def _adapter(self, name: str) -> dict[str, Parameter]:
        named, end = self.model.named_parameters(), f".{name}.weight"
        return {n: p for n, p in named if ".lora_" in n and n.endswith(end)}

    def _layers(self) -> dict[str, LoraLayer]:
        """The layers with adapters."""
        return {n: m for n, m in self.base.named_modules() if isinstance(m, LoraLayer)}

    def _can_be_dense(self, name: str) -> bool:
        layers = [layer.base_layer for layer in self._layers().values()]
        weights = [self.base.get_input_embeddings().weight, *self._adapter(name).values()]
        plain = all(type(layer) in (Linear4bit, *LINEAR) for layer in layers)
        exact = all(w.device.type == "cpu" and w.dtype == torch.float32 for w in weights)
        return plain and exact and 4 * sum(map(math.prod, self.shapes.values())) <= DENSE_BYTES

    def _begin_dense(self, name: str) -> None:
        self._dense = [*self._layers().values()] if self._can_be_dense(name) else []
        for layer in self._dense:
            weight, inner = _merged_weight(layer, name), layer.base_layer
            weight = weight.T if isinstance(inner, Conv1D) else weight
            layer.forward = partial(linear, weight=weight, bias=inner.bias)

    def _end_dense(self) -> None:
        for layer in self._dense:
            vars(layer).pop("forward", None)
        self._dense = []

    def _activate(self, name: str) -> None:
        self._end_dense()
        self.model.set_adapter(name)  # which makes it trainable, and all others not
        if not self._trainable[name]:
            for parameter in self._adapter(name).values():
                parameter.requires_grad_(False)

    def _guard(self, module, arguments, output) -> None:
        """After each forward of the body: let backward run only while the same role acts."""
        role, hidden = self.active, output[0]

        def check(gradient: Tensor) -> None:
            if self.active != role:
                raise RuntimeError(
                    f"backward through role {role!r} while {self.active!r} is active would lose or "
                    "corrupt gradients: use a role, go forward and backward, and only then use the "
                    "next one"
                )

        if hidden.requires_grad:
            hidden.register_hook(check)

    def _read(self, folder: Path) -> tuple[dict[str, Tensor], "ScalarHead | None"]:
        """Adapter and head of a folder; raises what `load` says."""
        for path in (folder / CONFIG, folder / WEIGHTS):
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: no adapter, or half of one; {AGAIN}")
        with readable(f"the adapter in '{folder}'"):
            config = LoraConfig.from_pretrained(str(folder))
            settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            weights, metadata = read_safetensors(folder / WEIGHTS)
            trained_on = json.loads(metadata.get(BASE, "null"))
        self._check_settings(folder, vars(config) | settings | vars(config))
        if bad := [key for key, tensor in weights.items() if not tensor.isfinite().all()]:
            why = f"has NaN or infinity in {bad[0]}; train it again, with a lower learning_rate"
            raise ValueError(f"the adapter in '{folder}' {why}")
        self._check_shapes(folder, weights)
        if trained_on and not same_base(trained_on, self.fingerprint):
            raise ValueError(
                f"the adapter in '{folder}' was trained on another base of the same sizes, perhaps "
                "one with an adapter merged in; load that base, or train it again on this one"
            )
        path, width = folder / HEAD, hidden_width(self.base)
        return weights, ScalarHead.read(path, width) if path.is_file() else None

    def _check_settings(self, folder: Path, settings: dict[str, object]) -> None:
        """Raise unless an adapter's settings make it compute W x + (α/r) B A x, as these roles."""
        ours = vars(self._config()) | {"init_lora_weights": True}
        if settings["init_lora_weights"] in PLAIN_STARTS:
            settings = settings | {"init_lora_weights": True}
        for field in [name for name in settings if name not in HARMLESS]:
            theirs, wanted = settings[field], ours.get(field)
            if (theirs or None) != (wanted or None):
                raise ValueError(
                    f"the adapter in '{folder}' has {field} {theirs}, these roles {wanted}; build "
                    "Roles with the adapter's rank (r) and alpha; only plain LoRA can be loaded"
                )

    def _check_shapes(self, folder: Path, weights: dict[str, Tensor]) -> None:
        expected = {}
        for name, (outputs, inputs) in self.shapes.items():
            key = f"base_model.model.{name}.lora_"
            expected[f"{key}A.weight"] = (self.rank, inputs)
            expected[f"{key}B.weight"] = (outputs, self.rank)
        found = {key: tuple(tensor.shape) for key, tensor in weights.items()}
        for key in expected | found:
            if expected.get(key) != found.get(key):
                raise ValueError(
                    f"the adapter in '{folder}' does not fit this base: {key} is {found.get(key)} "
                    f"there and {expected.get(key)} here; load the base that it was trained on"
                )


def _merged_weight(layer: LoraLayer, name: str) -> Tensor:
    """W + (α/r) B A in float32, W decoded; as the layer has it: `[in, out]` in a plain Conv1D."""
    weight = layer.base_layer.weight
    if isinstance(weight, Params4bit):
        weight = dequantize_4bit(weight.data, weight.quant_state)
    return weight.float() + layer.get_delta_weight(name).float()


class ScalarHead(nn.Linear):
    """A linear layer to one number, in float32.

    Attributes:
        statistics: mean and standard deviation of the scores that `rescale` made 0 and 1; None
            before.
    """

    def __init__(self, width: int, seed: int = 0) -> None:
        super().__init__(width, 1, dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.weight, std=(width + 1) ** -0.5, generator=generator)
        nn.init.zeros_(self.bias)
        self.statistics: tuple[float, float] | None = None

    def rescale(self, mean: float, std: float) -> None:
        """Change the output from r to (r − mean)/std: w ← w/std, b ← (b − mean)/std."""
        with torch.no_grad():
            self.weight /= std
            self.bias.sub_(mean).div_(std)
        self.statistics = (mean, std)

    def write(self, path: Path) -> None:
        """Save as safetensors, the statistics in its metadata."""
        tensors = {name: tensor.cpu() for name, tensor in self.state_dict().items()}
        numbers = zip(("mean", "std"), map(repr, self.statistics or ()), strict=False)
        save_file(tensors, path, metadata={"format": "pt", **dict(numbers)})

    @classmethod
    def read(cls, path: Path, width: int) -> "ScalarHead":
        """Load a saved head.

        Raises:
            ValueError: for a damaged file, or a head of another width.
        """
        with readable(f"the head in '{path}'"):
            tensors, facts = read_safetensors(path)
            head = cls(tensors["weight"].shape[1])
            head.load_state_dict(tensors)
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                raise ValueError("it holds NaN or infinity")
            if "std" in facts:
                head.statistics = (float(facts["mean"]), float(facts["std"]))
        if head.in_features != width:
            raise ValueError(
                f"the head in '{path}' has width {head.in_features}, this base {width}; load the "
                "base that it was trained on"
            )
        return head


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Let whatever fails inside become a ValueError that says what cannot be read."""
    try:
        yield
    except Exception as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"{what} cannot be read ({cause}); it is truncated or damaged: {AGAIN}"
        ) from error


def _portable(source: str) -> str:
    """A hub id as it is; of a folder its name, since the path holds on one machine only."""
    return Path(source).name if Path(source).is_dir() else source
