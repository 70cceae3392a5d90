"""Many adapters at once: the base's products once for all episodes, each episode's B A beside them.

As S-LoRA does it for language models (Sheng et al. 2023, arXiv 2311.03285, section 5), here for the steps of episodes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eva_rl.adapter.factors import lora_factors
from eva_rl.batch import Batch
from eva_rl.errors import UserError, did_you_mean
from eva_rl.model import DecisionTransformer, Decoder, load_notes
from eva_rl.model.decoder import BlockWeights
from eva_rl.model.embedder import Embedder
from eva_rl.model.nearest import task_vector
from eva_rl.policy import ActingPolicy
from eva_rl.rollout import TargetReturn
from eva_rl.spaces import spaces_from_text

if TYPE_CHECKING:
    from eva_rl.interface import TaskStatistics
    from eva_rl.library.index import Entry, Library
    from eva_rl.rollout import Job

ATTENTION = ("q", "k", "v")


@dataclass(frozen=True)
class Factors:
    """A block's factors of K adapters, or of n episodes.

    They are transposed, as rows are multiplied by them, and LoRA's scale is in B.
    """

    qkv_a: Tensor  #: (K, d, 3 r)
    qkv_b: Tensor  #: (K, 3, r, d)
    o_a: Tensor  #: (K, d, r)
    o_b: Tensor  #: (K, r, d)
    up_a: Tensor  #: (K, d, r)
    up_b: Tensor  #: (K, r, 4 d)
    down_a: Tensor  #: (K, 4 d, r)
    down_b: Tensor  #: (K, r, d)

    def of(self, rows: Tensor) -> Factors:
        """Those of these adapters (n,), an episode each."""
        return Factors(**{name: tensor[rows] for name, tensor in vars(self).items()})


@dataclass(frozen=True)
class Adapters:
    """LoRA of several adapters of one base and one interface, in memory together: a few hundred kB each."""

    model: DecisionTransformer
    interface: str
    names: tuple[str, ...]
    tasks: tuple[str, ...]
    statistics: tuple[TaskStatistics, ...]
    blocks: tuple[Factors, ...]
    """With factors of K adapters, in the order of their names."""
    embedder: Embedder
    """The base's embedder. Where it has vectors of tasks, the adapters' vectors (K, d) take the place of its own."""

    @classmethod
    def load(cls, library: Library, names: Sequence[str], device: torch.device | str = "cpu") -> Adapters:
        """Read these adapters of a library.

        Raises:
            UserError: if one is not LoRA of the trunk alone, or they act through different interfaces, or through one
                that the base lacks.
        """
        if not names:
            raise UserError(f"No adapter of '{library.folder}' was named: there must be one at least.")
        folders = [library.path(name) for name in names]
        notes = [load_notes(folder) for folder in folders]
        model, interfaces = library.base.transformer.to(device), {own.interface.name for own in notes}
        if len(interfaces) > 1 or not interfaces <= model.interfaces.keys():
            raise UserError(
                f"The adapters {', '.join(names)} act through {', '.join(sorted(interfaces))}, where one interface of the base was "
                f"expected for all: {', '.join(sorted(model.interfaces))}."
            )
        shapes = {
            f"trunk.{name}": (module.out_features, module.in_features)
            for name, module in model.trunk.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        name = interfaces.pop()
        embedder, vector = model.embedder_of(name), next((f"{m}.weight" for m in task_vector(model, name)), None)
        found = [lora_factors(folder, shapes, vector) for folder in folders]
        if vector is not None:
            embedder = copy.deepcopy(embedder)
            embedder.tasks = _vectors(embedder.task.weight, [own.vector for own in found])
        factors = [own.layers for own in found]
        rank = max((len(a) for own in factors for a, _ in own.values()), default=1)
        blocks = tuple(_block(factors, shapes, i, rank, device) for i in range(model.config.layers))
        tasks, statistics = tuple(own.task for own in notes), tuple(own.statistics for own in notes)
        return cls(model, name, tuple(names), tasks, statistics, blocks, embedder)

    def numbers(self, names: Sequence[str]) -> list[int]:
        """Where in `names` these are.

        Raises:
            UserError: if one is not there.
        """
        if unknown := [name for name in names if name not in self.names]:
            raise UserError(f"There is no adapter '{unknown[0]}' among those loaded: {', '.join(self.names)}.")
        return [self.names.index(name) for name in names]

    @property
    def known(self) -> dict[str, TaskStatistics]:
        """What is known of each adapter's task."""
        return dict(zip(self.tasks, self.statistics, strict=True))

    def policy_of(self, jobs: Sequence[Job]) -> MixedDecoder:
        """The policy of a group of episodes, each with the adapter of its own task."""
        return MixedDecoder(self, [self.tasks.index(job.task) for job in jobs])

    def alone(self, task: str, episodes: int) -> MixedDecoder:
        """The policy of episodes of one task."""
        return MixedDecoder(self, [self.tasks.index(task)] * episodes)


def adapters_of(
    folder: str, tasks: Sequence[str], adapter: str | None, base: str | None, device: torch.device | str = "cpu"
) -> Adapters:
    """The adapters of a library for these tasks, one each: of several for a task, the one with the best score.

    Raises:
        UserError: if one has none, or an adapter was named beside the library.
    """
    from eva_rl.library.index import INDEX, Library

    if adapter is not None:
        raise UserError(f"adapter={adapter} was given beside library={folder}: name one of them.")
    if not (Path(folder) / INDEX).is_file():
        raise UserError(
            f"'{folder}' is no library (there is no {INDEX} in it): `python -m eva_rl.library add` makes one."
        )
    library = Library(folder, base)
    best = {entry.task: entry.name for entry in sorted(library.entries, key=_score)}
    if missing := [task for task in tasks if task not in best]:
        hint = did_you_mean(missing[0], best)
        raise UserError(f"'{folder}' holds no adapter for '{missing[0]}'. {hint}".rstrip())
    return Adapters.load(library, [best[task] for task in tasks], device)


def _vectors(known: Tensor, own: Sequence[Tensor | None]) -> torch.nn.Embedding:
    """The adapters' vectors (K, d), with the known one (d,) for those that brought none."""
    rows = [known.detach() if vector is None else vector.to(known) for vector in own]
    return torch.nn.Embedding.from_pretrained(torch.stack(rows))


def _score(entry: Entry) -> tuple[float, float]:
    """Success rate, then return, each counted as lower than any other where it is unknown."""
    rate, value = (-math.inf if own is None else own.mean for own in (entry.success_rate, entry.episode_return))
    return rate, value


def _block(
    factors: Sequence[dict[str, tuple[Tensor, Tensor]]],
    shapes: dict[str, tuple[int, int]],
    number: int,
    rank: int,
    device: torch.device | str,
) -> Factors:
    """A block's factors of all adapters, those of lower rank filled up with zeros, which add nothing."""

    def stacked(layer: str) -> tuple[Tensor, Tensor]:
        name = f"trunk.blocks.{number}.{layer}"
        out, width = shapes[name]
        a, b = torch.zeros(len(factors), width, rank), torch.zeros(len(factors), rank, out)
        for place, own in enumerate(factors):
            if name in own:
                first, second = own[name]
                a[place, :, : len(first)], b[place, : len(first)] = first.T, second.T
        return a.to(device), b.to(device)

    inputs = [stacked(f"attention.{layer}") for layer in ATTENTION]
    found = {}
    for layer in ("attention.o", "feed_forward.up", "feed_forward.down"):
        short = layer.rpartition(".")[2]
        found[f"{short}_a"], found[f"{short}_b"] = stacked(layer)
    return Factors(qkv_a=torch.cat([a for a, _ in inputs], -1), qkv_b=torch.stack([b for _, b in inputs], 1), **found)


@dataclass(frozen=True)
class MixedWeights:
    """A block's weights, with an adapter for each of n episodes beside them.

    Rows are those of the episodes in their order.
    """

    base: BlockWeights
    own: Factors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def queries_keys_values(self, x: Tensor) -> Tensor:
        """(n m, d) -> (n m, 3 d)."""
        added = self._attention(x, 0)  # (n, 3, m, d)
        return self.base.queries_keys_values(x).add_(added.transpose(1, 2).reshape(len(x), -1))

    def keys_values(self, x: Tensor) -> Tensor:
        """(n m, d) -> (n m, 2 d)."""
        added = self._attention(x, 1)
        return self.base.keys_values(x).add_(added.transpose(1, 2).reshape(len(x), -1))

    def queries(self, x: Tensor) -> Tensor:
        """(n, d) -> (n, d)."""
        n, d, wide = self.own.qkv_a.shape
        h = torch.bmm(x.view(n, -1, d), self.own.qkv_a[..., : wide // 3])  # (n, m, r)
        return _added(self.base.queries(x), h, self.own.qkv_b[:, 0])

    def write(self, x: Tensor, attended: Tensor) -> Tensor:
        """As `BlockWeights.write`."""
        base, own = self.base, self.own
        x = x + _product(torch.addmm(base.o_bias, attended, base.o), attended, own.o_a, own.o_b)
        normed = base.feed_forward_norm(x)
        hidden = F.gelu(_product(torch.addmm(base.up_bias, normed, base.up), normed, own.up_a, own.up_b))
        return x + _product(torch.addmm(base.down_bias, hidden, base.down), hidden, own.down_a, own.down_b)

    def _attention(self, x: Tensor, first: int) -> Tensor:
        """What the adapters add to queries, keys and values from number `first` on: (n, 3 - first, m, d)."""
        n, d, wide = self.own.qkv_a.shape
        r, kinds = wide // 3, 3 - first
        h = torch.bmm(x.view(n, -1, d), self.own.qkv_a[..., first * r :])  # (n, m, kinds r)
        h = h.view(n, -1, kinds, r).transpose(1, 2)  # (n, kinds, m, r)
        return h @ self.own.qkv_b[:, first:]


def _product(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y (n m, out) and the episodes' own x A B of rows x (n m, in)."""
    return _added(y, torch.bmm(x.view(len(a), -1, a.shape[1]), a), b)


def _added(y: Tensor, h: Tensor, b: Tensor) -> Tensor:
    """y (n m, out) and h B, for h (n, m, r) and B (n, r, out)."""
    return torch.baddbmm(y.view(len(b), -1, b.shape[-1]), h, b).view(y.shape)


class MixedDecoder(Decoder):
    """A decoder whose episodes use different adapters of one base, none of which is merged.

    An episode's actions do not depend on the adapters beside its own, as each has products of its own.

    Args:
        rows: the number of each episode's adapter.
    """

    def __init__(self, adapters: Adapters, rows: Sequence[int], alone: bool = False):
        super().__init__(adapters.model, adapters.interface, len(rows), alone)
        self.adapters, self.embedder = adapters, adapters.embedder
        self.past: list[Batch] = []
        """The window's steps (n, 1) that are over, where adapters have vectors."""
        self._plain = self.blocks
        self.use(rows)

    @torch.inference_mode()
    def use(self, rows: Sequence[int]) -> None:
        """Go on with these adapters (n,).

        What past steps have left is computed again, with these adapters, at the next action.
        """
        self.rows = torch.tensor([*rows, *[rows[0]] * (len(self.now.mask) - len(rows))], device=self.tokens.device)
        self._gather()
        self.kept = [0] * len(self.kept)
        if self.embedder.interface.tasks:  # whose vectors the tokens hold
            for place, step in enumerate([*self.past, self.now][: self.length]):
                seen = self.embedder(replace(step, tasks=self.rows))  # (n, kinds, d)
                self.tokens[:, place * self.kinds : (place + 1) * self.kinds] = seen

    def record(self, actions: Tensor, rewards: Tensor) -> None:
        super().record(actions, rewards)
        if self.embedder.interface.tasks:
            self.past.append(self.now)

    def _start_anew(self) -> None:
        super()._start_anew()
        self.past = self.past[max(0, len(self.past) - self.half) :]

    def keep(self, episodes: Tensor) -> None:
        super().keep(episodes)
        spare = len(self.now.mask) - len(episodes)
        rows = torch.cat([episodes, episodes[:1].expand(max(spare, 0))])
        self.rows, self.past = self.rows[rows], [step.of(rows) for step in self.past]
        self._gather()

    def _gather(self) -> None:
        """Give each row its adapter's factors and its vector."""
        if self.embedder.interface.tasks:
            self.now = replace(self.now, tasks=self.rows)
        own = [factors.of(self.rows) for factors in self.adapters.blocks]
        if self.dtype != torch.float32:
            own = [replace(f, **{n: t.to(self.dtype) for n, t in vars(f).items()}) for f in own]
        self.blocks = [MixedWeights(plain, factors) for plain, factors in zip(self._plain, own, strict=True)]


class LibraryPolicy(ActingPolicy):
    """As `eva_rl.load_policy` gives it, for all adapters of a library: `act` and `reset` take an adapter's name."""

    def __init__(self, adapters: Adapters, device: torch.device | str = "cpu"):
        interface = adapters.model.interfaces[adapters.interface]
        spaces = spaces_from_text(interface.spaces)
        super().__init__(adapters.model, interface, adapters.tasks[0], spaces, adapters.statistics[0], device)
        self.adapters, self._numbers, self._by_itself = adapters, [0], True
        self._make_policy = self._decoder

    @classmethod
    def of(cls, library: Library, names: Sequence[str] | None = None, device: str = "cpu") -> LibraryPolicy:
        """See `Library.policy`."""
        from eva_rl.training import choose_device

        where = choose_device(device)
        names = [entry.name for entry in library.entries] if names is None else names
        return cls(Adapters.load(library, names, where), where)

    def reset(self, target_return: Any = None, adapter: str | Sequence[str] | None = None) -> None:
        """Begin one or more episodes as `ActingPolicy.reset` does, with this adapter, or one for each episode."""
        self._actor = None  # no episode goes on
        if adapter is not None:
            self.use(adapter)
        self._by_itself = target_return is None
        if target_return is None and len(self._numbers) > 1:
            target_return = [self._typical(number) for number in self._numbers]
        super().reset(target_return)

    def _typical(self, number: int) -> float:
        """What the adapter of this number asks for."""
        tokens = self.model.embedder_of(self.interface.name).tokens
        [found] = TargetReturn().wanted(self.adapters.tasks[number], self.adapters.statistics[number], tokens)
        return found

    def act(self, observation: Any, adapter: str | None = None) -> Any:
        """As `ActingPolicy.act`, with the adapter of this name from here on.

        If no name is given, the previous adapter stays. Within an episode, what the previous adapter made of past steps
        is computed again.
        """
        if adapter is not None:
            self.use(adapter)
        return super().act(observation)

    def act_batch(self, observations: Any, adapter: str | Sequence[str] | None = None) -> np.ndarray:
        """As `ActingPolicy.act_batch`, where `adapter` is a name for all episodes, or one for each."""
        if adapter is not None:
            self.use(adapter)
        return super().act_batch(observations)

    def keep(self, episodes: Sequence[int]) -> None:
        super().keep(episodes)
        if len(self._numbers) > 1:
            self._choose_adapters([self._numbers[episode] for episode in episodes])

    def use(self, adapter: str | Sequence[str]) -> None:
        """Act with this adapter from here on, or with one for each episode.

        Raises:
            UserError: if there is none of this name, or they are not one for each episode that is running.
        """
        numbers = self.adapters.numbers([adapter] if isinstance(adapter, str) else adapter)
        if not numbers:
            raise UserError("adapter must be a name, or one for each episode, got [].")
        actor = self._actor
        running = None if actor is None else len(actor.wanted)
        if running is not None and self._acted and len(numbers) not in (1, running):
            raise UserError(f"adapter must be one name, or one for each of {running} episodes, got {len(numbers)}.")
        changed = numbers != self._numbers
        self._choose_adapters(numbers)
        if (
            changed and actor is not None and not self._acted and self._by_itself
        ):  # another adapter asks for another return
            return self.reset()
        if changed and actor is not None and running is not None and len(numbers) in (1, running):
            cast("MixedDecoder", actor.policy).use(self._spread(running))

    def _choose_adapters(self, numbers: list[int]) -> None:
        self._numbers = numbers
        self.task, self.statistics = self.adapters.tasks[numbers[0]], self.adapters.statistics[numbers[0]]

    def _spread(self, episodes: int) -> list[int]:
        """The number of each episode's adapter."""
        return self._numbers * episodes if len(self._numbers) == 1 else self._numbers

    def _decoder(self, episodes: int) -> MixedDecoder:
        numbers = self._spread(episodes)
        if len(numbers) != episodes:
            numbers = numbers[:1] * episodes  # a beginning that has not been told of its episodes yet
        return MixedDecoder(self.adapters, numbers, alone=True)
