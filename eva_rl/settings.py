"""All settings and their defaults: what commands, the Python API and the engines take, as frozen dataclasses.

This module imports neither torch nor Hydra. A file in configs/ holds a command's settings, with a line on each. Where
the two differ, the file overrides this module.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from eva_rl.errors import UserError

if TYPE_CHECKING:
    from eva_rl.interface import Interface

TOKENS = ("return", "state", "action", "reward")
"""The kinds of tokens that a step may have."""
NOISE = (0.0, 0.1, 0.3)
"""Of the episodes that are collected where nothing else is said, see `PretrainConfig.noise`."""
FILM_STEPS = 500
"""Steps of a film that nobody asked for."""
FILM_EVERY = 10
"""Steps from one of its frames to the next."""


@dataclass(frozen=True)
class ModelConfig:
    """The trunk's size.

    `context` is in environment steps. Each step has one token of every kind in `tokens`, in that order.
    """

    layers: int = 4
    heads: int = 4
    width: int = 256
    context: int = 20
    dropout: float = 0.1
    tokens: tuple[str, ...] = ("return", "state", "action")

    def __post_init__(self) -> None:
        if min(self.layers, self.heads, self.width, self.context) < 1 or self.width % self.heads:
            raise UserError(
                f"A trunk of layers={self.layers}, heads={self.heads}, width={self.width}, context={self.context} was "
                "asked for; all must be positive and the width a multiple of the heads."
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be a number in [0, 1), got {self.dropout}.")
        unknown = set(self.tokens) - set(TOKENS)
        if unknown or "state" not in self.tokens or len(set(self.tokens)) < len(self.tokens):
            raise UserError(
                f"tokens={list(self.tokens)} was given: name each of {list(TOKENS)} once at most, and 'state'."
            )
        after = [
            t for t in ("action", "reward") if t in self.tokens and self.tokens.index(t) < self.tokens.index("state")
        ]
        if after:
            raise UserError(
                f"tokens={list(self.tokens)} shows the {after[0]} before the state: the head that predicts the action "
                "would see it. Put 'state' first."
            )

    def tokens_of(self, interface: Interface) -> tuple[str, ...]:
        """Those of the model's tokens that the interface reads.

        Raises:
            UserError: if they are not some of the model's in the model's order, `state` among them.
        """
        tokens = interface.tokens or self.tokens
        if tokens != tuple(kind for kind in self.tokens if kind in tokens) or "state" not in tokens:
            raise UserError(
                f"tokens of the interface '{interface.name}' must be some of the model's {list(self.tokens)}, in that order and with "
                f"'state', got {list(tokens)}."
            )
        return tokens


def check_precision(precision: str) -> None:
    """Raise a `UserError` unless `autocast` knows this precision."""
    if precision not in ("auto", "float32", "bfloat16"):
        raise UserError(f"precision must be auto, float32 or bfloat16, got {precision}.")


def checked_filter(filter: str | float) -> str:
    """A filter as `Trajectories.chosen` takes it: `successful`, `all`, or a share in one way of writing it.

    Raises:
        UserError: if it is none of those.
    """
    if filter in ("successful", "all"):
        return str(filter)
    try:
        share = float(filter)
    except (TypeError, ValueError):
        share = math.nan
    if not 0 < share <= 1:
        raise UserError(
            f"filter must be successful, all, or a share of the demonstrations above 0 and at most 1, got {filter}."
        )
    return "all" if share == 1 else repr(share)


@dataclass(frozen=True)
class TrainingConfig:
    """The settings of training: linear warm-up, cosine decay, clipping by the global norm."""

    batch_size: int = 32
    """Windows in a batch."""
    learning_rate: float | None = 1e-3
    """None: the adapter's own, where there is one."""
    final_learning_rate: float = 0.0
    """The learning rate at the last step, reached along half a cosine."""
    warmup: int = 20
    """Optimiser steps over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.01
    """Applied to matrices, but not to biases and norms."""
    gradient_clip: float = 0.25
    """The global norm above which gradients are scaled down. With inf, none is."""
    precision: str = "auto"
    """`auto`, `float32` or `bfloat16`."""
    checkpoint_every: int = 200
    """Optimiser steps between checkpoints. One more is written at the end."""
    evaluate_every: int = 0
    """Optimiser steps between evaluations while training. With 0, there are none."""
    log_every: int = 10
    """Optimiser steps between logs."""
    accumulate: int = 1
    """Parts that a batch goes through the model in, one after the other, where it does not fit into memory whole."""

    def __post_init__(self) -> None:
        check_precision(self.precision)
        for name, least in (
            ("batch_size", 1),
            ("warmup", 0),
            ("checkpoint_every", 1),
            ("evaluate_every", 0),
            ("log_every", 1),
            ("accumulate", 1),
        ):
            if getattr(self, name) < least:
                raise UserError(f"training.{name} must be at least {least}, got {getattr(self, name)}.")
        for name in ("learning_rate", "final_learning_rate", "weight_decay"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise UserError(f"training.{name} must be at least 0, got {getattr(self, name)}.")
        if not self.gradient_clip > 0:
            raise UserError(f"training.gradient_clip must be more than 0, got {self.gradient_clip}; inf clips nothing.")


EVA_CHOICES = {
    "convergence": ("subspace", "components"),
    "method": ("streaming", "covariance"),
    "weighting": ("none", "gradient"),
    "ranking": ("ratio", "paper"),
    "budget": ("ranks", "weights"),
    "components": ("leading", "minor", "random"),
}


@dataclass(frozen=True)
class EvaChoices:
    """How long EVA looks at activations, what it makes of them, and how it chooses among their components."""

    rho: float = 2.0
    """A layer may get up to rho times its nominal rank. With 1, all ranks stay equal."""
    tau: float = 0.99
    """A layer has converged when its `convergence` measure is at least this."""
    convergence: str = "subspace"
    """`subspace` is the variance that the layer's subspace is expected to capture, as a share of what the best one
    would, for the data the batches are drawn from. The share is estimated from how much the last batch improved on the
    subspace of the batch before. Nearly equal singular values do not disturb it. The estimate holds for data like the
    batches seen, so draw the first of them from all parts of the data. `components` is the least cosine between a
    component and its predecessor a batch ago, which is peft's rule. Both look at as many components as the layer's
    present rank."""
    max_batches: int = 64
    method: str = "streaming"
    """`streaming` or `covariance`, see `StreamingSvd` and `Covariance`. Measurements made streaming the default
    (`benchmarks/results/`). After the same number of batches, its worst layer captures what exact covariances do to
    within 0.0002, in half the time. Most of that time is then spent in the forward passes. The memory it needs does not
    grow with the square of the width."""
    center: bool = True
    """Components about the mean, as published. With False, about zero, the `Sigma = E[x x^T]` of theorem 3.2."""
    weighting: str = "none"
    """With `gradient`, a row counts by the squared norm of the gradient that arrives at the layer's output for it. For
    one row, dL/dB = g (A x)^T. With center=False the components therefore maximise
    `Tr(A E[|g|^2 x x^T] A^T) = E|dL/dB|_F^2`, without the independence of g and x that theorem 3.2 assumes."""
    ranking: str = "ratio"
    """What components are worth when ranks are shared out: `ratio` or `paper`, see `explained`."""
    budget: str = "ranks"
    """What stays the same when ranks are shared out: their sum (`ranks`, as published), or the number of weights in A and B
    (`weights`), of which a rank costs wide layers more."""
    components: str = "leading"
    """`minor` and `random` are the paper's ablations, which take other directions at the ranks that the leading ones
    would get. `minor` takes those of least variance and needs method=covariance. `random` takes orthonormal ones."""
    rotation: bool = False
    """Mix A's rows by a random rotation: the same subspace, no component on its own axis."""
    permutation: bool = False
    """Shuffle the entries of each of A's rows: the same norms and values, no direction left."""
    whiten: bool = False
    """Divide each row by the standard deviation along it, so that A x has unit variance in every direction."""

    def __post_init__(self) -> None:
        if not self.rho >= 1 or not 0 < self.tau <= 1 or self.max_batches < 1:
            raise UserError(
                f"EVA needs rho >= 1, 0 < tau <= 1 and max_batches >= 1, got rho={self.rho}, tau={self.tau}, "
                f"max_batches={self.max_batches}."
            )
        for name, choices in EVA_CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"eva.{name} must be one of {choices}, got {getattr(self, name)}.")
        if self.components == "minor" and self.method == "streaming":
            raise UserError(
                "components=minor was given with method=streaming, which follows the leading components only: add "
                "method=covariance."
            )
        if self.whiten and (self.components != "leading" or self.rotation or self.permutation):
            raise UserError(
                "whiten=true divides leading components by their own deviations: leave out the other choices."
            )


@dataclass(frozen=True)
class EvaSettings(EvaChoices):
    """`EvaChoices` as the engine takes them."""

    seed: int = 0
    """Of the random choices: components, rotation, permutation, and the first vectors of the iteration."""


@dataclass(frozen=True)
class EvaOptions(EvaChoices):
    """`EvaChoices` as a run's settings hold them: the seed is the run's."""

    tokens: str = "all"
    """Of the model's tokens, those that count: all, or one kind such as `state`."""


@dataclass(frozen=True)
class TaskListConfig:
    domain: str | None = None


@dataclass(frozen=True)
class CollectConfig:
    task: str
    episodes: int
    noise: tuple[float, ...]
    quality: str
    seed: int
    workers: int


@dataclass(frozen=True)
class OptimizerSettings:
    """One optimiser of `configs/optimizer/`."""

    name: str
    rate: float
    """Times the adapter's own learning rate, where the run names none."""
    constant: bool
    pairs: bool
    freezes: tuple[str, ...]
    matrices: dict[str, Any]
    others: dict[str, Any]
    extra: str | None
    config: dict[str, Any]
    """What makes the optimiser and its `_target_`, but for its parameters and their rate."""

    def recipe(self) -> dict[str, Any]:
        """The fields of `eva_rl.training.Recipe`.

        Raises:
            UserError: if the package it comes from is not installed, or its settings make no sense.
        """
        package = str(self.config.get("_target_")).partition(".")[0]
        if self.extra and importlib.util.find_spec(package) is None:
            raise UserError(
                f"optimizer={self.name} needs the package {package}: install it with `pip install 'eva_rl[{self.extra}]'`."
            )
        from eva_rl.config import instantiate

        make = instantiate(self.config | {"_partial_": True})
        own = {name: getattr(self, name) for name in ("name", "pairs", "constant", "matrices", "others")}
        return {"make": make, **own}


ADAMW: Any = OptimizerSettings(
    name="adamw",
    rate=1.0,
    constant=False,
    pairs=False,
    freezes=(),
    matrices={},
    others={},
    extra=None,
    config={"_target_": "torch.optim.AdamW", "fused": True},
)
"""configs/optimizer/adamw.yaml, the optimiser of runs whose settings name none."""


@dataclass(frozen=True)
class AllocatorSettings:
    """One way of `configs/allocator/` to decide LoRA's ranks."""

    name: str
    config: dict[str, Any] | None
    """The settings that make the allocator, with its `_target_`. With None, the ranks stay the adapter's."""

    def allocator(self) -> Any:
        """The `eva_rl.adapter.allocators.Allocator`, or None if there is none.

        Raises:
            UserError: if its settings make no sense.
        """
        if self.config is None:
            return None
        from eva_rl.config import instantiate

        return instantiate(self.config)


NO_ALLOCATOR: Any = AllocatorSettings(name="none", config=None)
"""configs/allocator/none.yaml, the allocator of runs whose settings name none."""


T = TypeVar("T")

if TYPE_CHECKING:

    class Chosen(Generic[T]):
        """A group of settings.

        In Python it may be given as a file's name, or as a mapping of those settings that differ from its file.
        """

        def __get__(self, instance: object, owner: Any = None) -> T: ...

        def __set__(self, instance: object, value: T | str | Mapping[str, Any]) -> None: ...

else:

    class Chosen:
        """What its settings are: see above, which type checkers read."""

        def __class_getitem__(cls, kind: type) -> type:
            return kind


# What Python's callers leave open, `eva_rl.execute` reads in configs/, as the commands do.
SMALL: Any = "small"
"""`configs/model/small.yaml`"""
EVA: Any = "eva"
"""`configs/adapter/eva.yaml`"""
OWN: Any = None
"""As the command's file says, which may leave it to the adapter's."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A run of pretraining: datasets of many tasks -> a checkpoint. `configs/pretrain.yaml` has a line on each setting."""

    task: tuple[str, ...]
    """Tasks and splits, such as `metaworld/mt40`."""
    weights: dict[str, float] | None = None
    temperature: float = 3.0
    demonstrations: int = 40
    noise: tuple[float, ...] = NOISE
    """Standard deviations of the action noise of the collected episodes, taken in turn, in units of half the action range."""
    labels: str = "actions"
    std_floor: float = 1.5
    tokens: dict[str, Any] | None = None
    task_vectors: bool = False
    """Learn a vector for each task, added to its state tokens: fine-tuning begins with the one that fits the demonstrations best."""
    model: Chosen[ModelConfig] = SMALL
    """In Python also the name of a file of `configs/model/`, or some of its settings in a dict."""
    training: Chosen[TrainingConfig] = OWN
    """In Python also a dict of those that differ from `configs/pretrain.yaml`."""
    steps: int = 4000
    seed: int = 0
    device: str = "auto"
    tracker: str = "tensorboard"
    run_dir: str | None = None
    resume: bool = False
    output: str | None = None
    optimizer: Chosen[OptimizerSettings] = ADAMW
    """In Python also the name of a file of `configs/optimizer/`."""


@dataclass(frozen=True)
class AdapterSettings:
    """One method of `configs/adapter/`."""

    name: str
    trainable: str
    """`adapter`, `interface`, `all` weights or `none`."""
    layers: tuple[str, ...]
    rank: int
    budget: str | None
    """`params`, a number of weights, or None."""
    tolerance: float
    size: dict[str, float] | None
    """The peft config's settings that the budget decides, by how much each grows with the size."""
    sizes: tuple[int, ...] | None
    learning_rate: float
    ratios: dict[str, float]
    start: str | None
    """The name of a function of `eva_rl.adapter.starts`, or like those."""
    start_batches: int
    config: dict[str, Any] | None
    """The peft config and its `_target_`."""
    eva: EvaOptions | None
    steps: int
    """Optimiser steps, where the run does not say."""
    batch_size: int
    """Windows in a batch, where the run does not say."""
    network: str
    """`base` has the weights it was pretrained to. `fresh` is the same with fresh weights. `mlp` is a perceptron."""

    def __post_init__(self) -> None:
        if self.network not in ("base", "fresh", "mlp") or (self.network != "base" and self.trainable != "all"):
            raise UserError(
                "adapter.network must be base, or fresh or mlp with adapter.trainable=all, got "
                f"adapter.network={self.network} with adapter.trainable={self.trainable}."
            )
        if self.trainable not in ("adapter", "interface", "all", "none"):
            raise UserError(f"adapter.trainable must be adapter, interface, all or none, got {self.trainable}.")
        if (self.config is None) == (self.trainable == "adapter"):
            raise UserError(
                f"adapter.trainable={self.trainable} does not go with {'no' if self.config is None else 'an'} "
                "adapter.config: a peft config trains the adapter, and nothing else does."
            )
        for name in ("rank", "start_batches"):
            if getattr(self, name) < 1:
                raise UserError(f"adapter.{name} must be at least 1, got {getattr(self, name)}.")
        if self.budget not in (None, "params") and not (self.budget.isdecimal() and int(self.budget)):
            raise UserError(f"adapter.budget must be params, a number of weights or null, got {self.budget}.")
        if self.config is not None and self.budget is not None and not self.size:
            raise UserError(
                f"adapter.budget={self.budget} can't be met without adapter.size, the settings of adapter.config that "
                "grow with it, such as {r: 1}: set one, or adapter.budget=null."
            )

    @property
    def is_lora(self) -> bool:
        """Whether it is made of LoRA's two factors, and nothing else is between them."""
        config = self.config or {}
        return str(config.get("_target_")).rpartition(".")[2] == "LoraConfig" and not config.get("kasa_config")

    def peft_config(self, size: int | None = None) -> Any:
        """The peft config, of this size or as it stands.

        Raises:
            UserError: if it can't be made of these settings.
        """
        from eva_rl.config import instantiate

        grown = {} if size is None else {key: max(1, round(size * by)) for key, by in (self.size or {}).items()}
        return instantiate((self.config or {}) | grown)

    def start_function(self) -> Callable[..., Any] | None:
        """The function that initialises the adapter, or None where its peft config says how.

        Raises:
            UserError: if there is no such function.
        """
        if self.start is None:
            return None
        from eva_rl.config.targets import start_function

        return start_function(self.start)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """A run of fine-tuning: base + trajectories -> adapter + score. `configs/finetune.yaml` has a line on each setting."""

    task: str
    """Such as `metaworld/hammer-v3`, or `minari/<dataset id>`."""
    dataset: str | None = None
    demonstrations: int | None = None
    filter: str = "successful"
    """Which demonstrations are learned from. The choices are `successful`, `all`, and a share such as `0.1`.
    `successful` takes those that solved the task, where that is known of any. A share takes those of the highest
    return.
    """
    mirror: bool = True
    """Show half of the windows as in a mirror, where the task's domain knows its mirror image."""
    base: str = "mt40-small"
    adapter: Chosen[AdapterSettings] = EVA
    """In Python also the name of a file of `configs/adapter/`."""
    training: Chosen[TrainingConfig] = OWN
    """In Python also a dict of those that differ from `configs/finetune.yaml`."""
    fresh_learning_rate: float = 3e-3
    """Of an embedder and head that the base does not have, whatever the method."""
    steps: int = OWN
    """Optimiser steps, by default the adapter's own."""
    seed: int = 0
    episodes: int = 20
    zero_shot: bool | None = None
    """Score the base as it is, too. With None, only where it has an embedder and a head for the task."""
    target_return: str | None = "auto"
    video: bool | None = None
    """Film an episode of the fine-tuned policy. With None, only its first steps, where it can be rendered."""
    max_episode_steps: int | None = None
    trust_environment: bool = False
    workers: int | None = None
    device: str = "auto"
    tracker: str = "tensorboard"
    run_dir: str | None = None
    resume: bool | None = None
    optimizer: Chosen[OptimizerSettings] = ADAMW
    """In Python also the name of a file of `configs/optimizer/`."""
    allocator: Chosen[AllocatorSettings] = NO_ALLOCATOR
    """In Python also the name of a file of `configs/allocator/`."""
    start_from: str | None = None
    """A library of adapters: LoRA begins as the nearest one, where that has the lower loss on the demonstrations."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "filter", checked_filter(self.filter))
        if not 0 <= self.fresh_learning_rate < math.inf:
            raise UserError(f"fresh_learning_rate must be a number of at least 0, got {self.fresh_learning_rate}.")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """An evaluation: checkpoint (+ adapter) + task -> score. `configs/evaluate/evaluate.yaml` has a line on each setting."""

    checkpoint: str | None = None
    adapter: str | None = None
    library: str | None = None
    task: str
    """A task, a split such as `metaworld/mt40`, or `minari/<dataset id>`."""
    episodes: int = 100
    seed: int = 0
    target_return: str | None = "auto"
    video: bool = False
    max_episode_steps: int | None = None
    trust_environment: bool = False
    workers: int | None = None
    precision: str = "auto"
    device: str = "auto"
    tracker: str = "tensorboard"
    run_dir: str | None = None


@dataclass(frozen=True)
class MergeConfig:
    run: str
    base: str | None
    output: str | None


@dataclass(frozen=True)
class ExportConfig:
    run: str
    format: str
    task: str | None
    base: str | None
    output: str | None


@dataclass(frozen=True)
class PublishConfig:
    run: str
    repo: str
    base: str | None
    private: bool


@dataclass(frozen=True)
class ColumnSettings:
    """The fields of `eva_rl.convert.Columns`."""

    observations: tuple[str, ...] | None
    actions: tuple[str, ...] | None
    rewards: tuple[str, ...] | None
    terminations: tuple[str, ...] | None
    truncations: tuple[str, ...] | None
    success: tuple[str, ...] | None
    episode: tuple[str, ...] | None


@dataclass(frozen=True)
class ConvertConfig:
    source: str
    dataset: str
    format: str | None
    columns: ColumnSettings
    mapping: str | None
    actions: str | None
    environment: str | None
    skip_bad: bool
    overwrite: bool
