"""A frozen model and a peft config -> a peft model with its adapter initialised.

Adapters are also written to their folders here, and read back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eva_rl.adapter.adalora import Pruning
from eva_rl.adapter.allocators import Allocator
from eva_rl.adapter.eva import LayerResult
from eva_rl.adapter.eva.kinds import reader
from eva_rl.adapter.eva.load import by_pattern
from eva_rl.adapter.kasa import Kasa
from eva_rl.adapter.restore import restored, tensors_of
from eva_rl.adapter.safe import check_adapter_config
from eva_rl.adapter.starts import LEAVE_THE_BASE, Start, TaskData, eva, lora_layers, start_of
from eva_rl.errors import UserError, in_one_line
from eva_rl.files import not_finite, replacing, write_json

WEIGHTS = "adapter_model.safetensors"
"""peft's file of an adapter's tensors."""

DAMAGE = (
    SafetensorError, OSError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError,
    ImportError,
)  # fmt: skip
"""What peft and safetensors raise for files that are not as they write them."""

if TYPE_CHECKING:  # importing peft takes seconds
    from peft import LoraConfig, PeftConfig, PeftModel

    from eva_rl.adapter.eva.typed import AdapterConfig


@dataclass(frozen=True)
class Adapter:
    """A model and its adapter."""

    model: PeftModel
    eva: dict[str, LayerResult]
    """What EVA found for each layer. Empty for other methods."""
    initial: dict[str, tuple[Tensor, Tensor]]
    """A and B, as they were at the start, of the layers whose base weight lost their product then."""
    companion: Any = None
    """What else takes part in training (see `eva_rl.training.Companion`), or None if nothing does."""
    own_form: bool = False
    """Whether LoRA's factors may be none of peft's, so that they are saved multiplied out."""

    def frozen(self) -> dict[str, Tensor]:
        """What the start decided and training does not change: a resumed run needs it as it was, to the sign of every
        singular vector."""
        tensors = {n: p.data for n, p in self.model.named_parameters() if "lora_" in n and not p.requires_grad}
        layers = dict(lora_layers(self.model.get_base_model()))
        for name, (a, b) in self.initial.items():
            tensors |= {f"{name}.a": a, f"{name}.b": b, f"{name}.weight": layers[name].get_base_layer().weight.data}
        return tensors

    def merged(self) -> nn.Module:
        """A copy of the base with the adapter in its weights: it acts at the base's speed, and training goes on untouched."""
        return _merged(copy.deepcopy(self.model))


def attach(
    model: nn.Module,
    config: PeftConfig,
    batches: Iterable[Any] | TaskData = (),
    token_mask: Callable[[Any], Tensor | Sequence[Tensor]] | None = None,
    fresh_modules: Sequence[str] = (),
    start: Start | None = None,
    allocator: Allocator | None = None,
    **more: Any,
) -> Adapter:
    """Wrap `model` in place with the adapter that `config` describes, and leave only the adapter trainable.

    Args:
        batches: the new task's data, each batch as `forward` takes it, or a whole `TaskData`. Initialisations that need
            data read them.
        token_mask: see `eva_init`. None: a Hugging Face batch's attention masks and labels say which tokens count.
        fresh_modules: names of modules that the base never trained. They are trained in full and saved with the
            adapter.
        start: how the adapter is initialised, one of `eva_rl.adapter.starts`. None: what the config's
            `init_lora_weights` asks for.
        allocator: decides LoRA's ranks from outside, see `eva_rl.adapter.allocators`.
        **more: what else `TaskData` holds. `loss` gives the loss of a batch, for initialisations that look at
            gradients. `few` is how many batches an initialisation without a rule of its own takes. `progress` says
            whether to show a bar. `forward` runs the model on a batch. It should send through each layer the rows that
            training will, as EVA's directions are those of these rows. By default, a mapping is given by its keys, a
            tuple or list by position, and anything else as one argument. `strict` says whether to raise an error where
            EVA has no directions for a layer. Otherwise the layer keeps peft's usual initialisation, and a warning
            names it.

    Raises:
        UserError: if the model has an adapter, the config does not fit the model, or the data do not fit the
            initialisation. What the model, the batches or a function given here raise is raised as it is. The model is
            then as it was.
    """
    _check_free(model)
    data = batches if isinstance(batches, TaskData) else TaskData(batches, token_mask, **more)
    config = copy.deepcopy(config)
    if allocator is not None and allocator.ranks is not None:
        config = allocator.ranks(model, cast("LoraConfig", config))
    asked = cast("AdapterConfig", config)
    own = start is not None or isinstance(getattr(config, "init_lora_weights", None), str)
    start = start or start_of(config)
    if (
        getattr(start, "func", start) is not eva
    ):  # which knows more kinds of layers, and tells by itself what it can't do
        if own:
            _check_targets(model, config)
        _check_ranks(model, config)
    _check_steps(asked)
    asked.modules_to_save = [*(asked.modules_to_save or []), *fresh_modules] or None
    weights = {name: weight.detach().clone() for name, weight in _at_risk(model, config, start)} if own else {}
    with _undone_on_failure(model, weights):
        peft_model, found = start(model, config, data)
        freeze = getattr(config, "freeze", None)
        if freeze is not None:  # peft makes all of an adapter trainable whenever it turns it on
            freeze(peft_model)
        initial = _taken_out(model, weights)
        if initial and asked.use_dora:
            raise UserError("DoRA was asked for with an initialisation that changes the base's weights: choose one.")
        put_on = None if allocator is None else allocator.put_on
        companion = _companion(peft_model, config) if put_on is None else put_on(peft_model)
        _check_biases(model)
    _leave_casts_to_autocast(model)
    return Adapter(peft_model, found, initial, companion, put_on is not None or hasattr(config, "put_on"))


def _check_steps(config: AdapterConfig) -> None:
    """Raise a `UserError` if AdaLoRA has no steps to prune in."""
    if getattr(config, "total_step", None) is not None and config.total_step - config.tfinal < 2:
        raise UserError(
            f"AdaLoRA prunes while it trains: {config.total_step} steps are too few for it, take at least 3."
        )


def _check_biases(model: nn.Module) -> None:
    """Raise a `UserError` if a bias was asked for beside B, and a form of LoRA that is not peft's dropped it."""
    for name, layer in lora_layers(model):
        if layer.lora_bias.get("default") and getattr(layer.lora_B["default"], "bias", None) is None:
            raise UserError(
                f"lora_bias=true was given, but the method has no bias beside its factors (layer '{name}'): leave it out."
            )


def _leave_casts_to_autocast(model: nn.Module) -> None:
    """In a model of float32 inputs of another type are autocast's, which would only turn peft's copies of them back."""
    if all(p.dtype == torch.float32 for p in model.parameters()):
        for module in model.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                # torch's stub has modules hold modules and tensors alone.
                module.cast_input_dtype_enabled = False  # pyright: ignore[reportArgumentType]


def _companion(peft_model: PeftModel, config: PeftConfig) -> Any:
    """What the method brings along for training, see `Adapter.companion`."""
    if hasattr(peft_model.base_model, "rankallocator"):
        return Pruning(peft_model)
    if getattr(config, "kasa_config", None) is not None:
        return Kasa(peft_model)
    companion = getattr(config, "companion", None)
    return None if companion is None else companion(peft_model)


@torch.no_grad()
def _taken_out(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every layer, if the base's weights are no longer these.

    Raises:
        UserError: if what was taken out of a weight is not what its A and B put in.
    """
    layers = [(name, layer) for name, layer in lora_layers(model) if name in weights]
    if all(torch.equal(layer.get_base_layer().weight, weights[name]) for name, layer in layers):
        return {}
    initial = {}
    for name, layer in layers:
        a, b = (p["default"].weight.detach().clone() for p in (layer.lora_A, layer.lora_B))
        put_in = layer.get_delta_weight("default").float()
        now = layer.get_base_layer().weight.float() + put_in
        before = weights[name].float()
        rounding = 64 * torch.finfo(weights[name].dtype).eps * (before.norm() + put_in.norm())
        if (now - before).norm() > rounding:
            raise UserError(f"The initialisation changed what layer '{name}' computes: choose another for this model.")
        initial[name] = (a, b)
    return initial


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            yield name, cast("nn.Linear", module)  # GPT-2's Conv1D has a weight, too


def targets(model: nn.Module, config: PeftConfig) -> dict[str, Tensor]:
    """The weights, by their modules' names, that the adapter is for."""
    from peft.tuners.tuners_utils import check_target_module_exists

    chosen = cast("AdapterConfig", config).target_modules
    if chosen == "all-linear":
        return {name: layer.weight for name, layer in _linear_layers(model)}
    return {
        name: weight
        for name, module in model.named_modules()
        if chosen
        and check_target_module_exists(config, name)
        and isinstance(weight := getattr(module, "weight", None), nn.Parameter)
    }


def _at_risk(model: nn.Module, config: PeftConfig, start: Start) -> Iterator[tuple[str, Tensor]]:
    """The weights that this start may change: those of its targets, and none for one that sets nothing but A and B."""
    if getattr(start, "func", start) in LEAVE_THE_BASE:  # a partial's function
        return
    if cast("AdapterConfig", config).target_modules is None:  # then peft chooses them by the kind of model
        yield from ((name, layer.weight) for name, layer in _linear_layers(model))
    else:
        yield from targets(model, config).items()


def _check_free(model: nn.Module) -> None:
    """Raise a `UserError` if there is an adapter: peft would put the new one in the place of its weights, or train both."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    taken = next((name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)), None)
    if taken is not None:
        raise UserError(
            f"The model has an adapter already, on layer '{taken}': merge it with peft's `merge_and_unload()`, or add a second one with "
            "`add_adapter` and `initialize_lora_eva_weights(..., adapter_name=...)`."
        )


def _check_targets(model: nn.Module, config: PeftConfig) -> None:
    """Raise a `UserError` that names the first target that is no linear layer: peft's message would not."""
    for name in targets(model, config):
        reader(model, name)


def _check_ranks(model: nn.Module, config: PeftConfig) -> None:
    """Raise a `UserError` that names the first layer whose rank exceeds its width."""
    if not hasattr(config, "lora_alpha"):
        return
    of_lora = cast("AdapterConfig", config)
    for name, weight in targets(model, config).items():
        usual = getattr(config, "init_r", of_lora.r)
        rank = usual if hasattr(config, "init_r") else by_pattern(of_lora.rank_pattern, name, usual)
        dimensions = min(len(weight), weight[0].numel()) if weight.ndim > 1 else len(weight)
        if not 1 <= rank <= dimensions:
            raise UserError(f"Rank {rank} was asked for layer '{name}', which has {dimensions} dimensions.")


@contextmanager
def _undone_on_failure(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """If the block raises, the model's submodules, these weights and what was trainable are again what they were."""
    children = [(module, name, child) for module in model.modules() for name, child in module.named_children()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    attributes = set(vars(model))
    try:
        yield
    except BaseException:
        for name in vars(model).keys() - attributes:  # peft's config
            delattr(model, name)
        for module, name, child in children:
            setattr(module, name, child)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
        for name, weight in weights.items():
            model.get_submodule(name).weight.data = weight
        raise


def save_adapter(adapter: Adapter, folder: Path, base: str, notes: Mapping[str, Any] | None = None) -> None:
    """Write the adapter in peft's own format, atomically, to be loaded on the base as it was before `attach`.

    `base`: which model it belongs to. `notes`: JSON files by name, written beside peft's.
    """
    config = adapter.model.peft_config["default"]
    config.base_model_name_or_path = base
    with replacing(folder) as temporary:
        if adapter.initial or adapter.own_form:
            restored_config, tensors = restored(adapter.model, adapter.initial)
            restored_config.save_pretrained(str(temporary))
            save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        else:
            # Else peft asks the Hugging Face Hub for the base's vocabulary.
            adapter.model.save_pretrained(str(temporary), save_embedding_layers=False)
        (temporary / "README.md").unlink(missing_ok=True)  # peft's empty template
        for name, content in (notes or {}).items():
            write_json(temporary / name, content)


def load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """`model` with the adapter of `folder` merged into its weights: it runs as fast as the base.

    Raises:
        UserError: if the folder holds no whole adapter, or one of another model. It names a tensor that is missing,
            unknown or not finite.
    """
    from peft import PeftModel

    if not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"'{folder}' holds no adapter (there is no adapter_config.json in it): name a run's adapter/ folder."
        )
    if not (folder / WEIGHTS).is_file():  # peft would go on to a pickle, and to the Hub
        raise UserError(f"'{folder}' holds no {WEIGHTS}: an adapter is read from safetensors alone.")
    check_adapter_config(folder)
    try:
        found = load_file(folder / WEIGHTS)
        peft_model = PeftModel.from_pretrained(model, str(folder))
        expected = tensors_of(peft_model)
        for what, names in (
            ("lacks", expected.keys() - found.keys()),
            ("holds, beyond this model's adapter,", found.keys() - expected.keys()),
        ):
            if names:
                raise UserError(
                    f"The adapter in '{folder}' {what} {len(names)} tensors, such as '{min(names)}': get it again."
                )
        if broken := not_finite(found):
            raise UserError(f"The adapter in '{folder}' holds NaN or infinite numbers in '{broken}': train it again.")
        return _merged(peft_model)
    except DAMAGE as error:
        raise UserError(
            f"The adapter in '{folder}' is damaged or belongs to another model ({in_one_line(error)[:200]})."
        ) from error


def _merged(peft_model: PeftModel) -> nn.Module:
    """The base with the adapter in its weights and the trained modules in their places.

    peft's own `merge_and_unload` can't take modules without a `weight` back, such as an embedder, for most methods.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    peft_model.merge_adapter()
    model = peft_model.get_base_model()
    for name, module in list(model.named_modules()):
        parent, _, own_name = name.rpartition(".")
        if isinstance(module, BaseTunerLayer):
            setattr(model.get_submodule(parent), own_name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            setattr(model.get_submodule(parent), own_name, module.modules_to_save["default"])
    return model


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers an optimiser would move."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
