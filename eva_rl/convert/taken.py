"""An episode of the user's files -> what is kept of it, checked.

Every error names file, episode and column.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from eva_rl.convert.episodes import Columns, Episode, Format, matching, refuse_missing, stacked
from eva_rl.errors import UserError


@dataclass(frozen=True)
class Taken:
    """An episode of T steps, by column."""

    where: str
    observations: dict[str, np.ndarray]  #: (T + 1, ...) each
    actions: dict[str, np.ndarray]  #: (T, ...) each
    rewards: np.ndarray | None  #: (T,)
    success: np.ndarray | None  #: (T + 1,)
    terminated: bool

    def __len__(self) -> int:
        return len(next(iter(self.actions.values())))


@dataclass
class Column:
    """What all episodes hold in one column."""

    role: str
    shape: tuple[int, ...]
    dtype: np.dtype
    low: float = np.inf
    high: float = -np.inf

    def add(self, values: np.ndarray) -> None:
        self.dtype = np.promote_types(self.dtype, values.dtype)
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))


@dataclass
class Summary:
    """What was found in all episodes so far."""

    columns: dict[str, Column] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    rewards: bool = False
    success: bool = False

    def add(self, taken: Taken) -> None:
        """Take an episode in.

        Raises:
            UserError: if its columns are not those of the episodes before.
        """
        found = {("observations", name): values for name, values in taken.observations.items()}
        found |= {("actions", name): values for name, values in taken.actions.items()}
        rewards, success = taken.rewards is not None, taken.success is not None
        if self.columns:
            known = {(column.role, name) for name, column in self.columns.items()}
            odd = sorted(name for _, name in known ^ set(found))
            odd += ["rewards"] * (rewards != self.rewards) + ["success"] * (success != self.success)
            if odd:
                none = f", or none, columns.{odd[0]}=[]" if odd[0] in ("rewards", "success") else ""
                raise UserError(
                    f"{taken.where} has other columns than the episodes before ('{odd[0]}'): give all the same{none}."
                )
        self.rewards, self.success = rewards, success
        for (_, name), values in found.items():
            column = self.columns.get(name)
            if column is not None and column.shape != values.shape[1:]:
                raise UserError(
                    f"{taken.where}, column '{name}' has rows of shape {values.shape[1:]} where the episodes before have "
                    f"{column.shape}: give all the same."
                )
        for (role, name), values in found.items():
            self.columns.setdefault(name, Column(role, values.shape[1:], values.dtype)).add(values)
        self.lengths.append(len(taken))
        self.returns.append(0.0 if taken.rewards is None else float(taken.rewards.sum()))

    def in_order(self, taken: Taken) -> Taken:
        """An episode that was added, with its columns in the order of the first one's.

        They are joined to vectors in that order.
        """
        return replace(
            taken,
            observations={name: taken.observations[name] for name in self.columns if name in taken.observations},
            actions={name: taken.actions[name] for name in self.columns if name in taken.actions},
        )


def take(episode: Episode, columns: Columns, given: Columns, kind: Format) -> Taken:
    """What is kept of an episode: `columns` says what is taken for what, `given` what of that the user named.

    Raises:
        UserError: if a column is missing, empty, of another length, or holds text, NaN or infinite numbers.
    """
    found = _found(episode, columns, given)
    actions = {name: _finite(episode, name) for name in found["actions"]}
    steps = len(next(iter(actions.values())))
    if not steps:
        raise UserError(f"{episode.where}, column '{found['actions'][0]}' is empty: remove that episode.")
    observations = {name: _continued(episode, name, steps) for name in found["observations"]}
    for name, values in actions.items():
        _of_length(episode, name, values, (steps,))
    ends = {role: [_flags(episode, name, steps) for name in found[role]] for role in ("terminations", "truncations")}
    for role, said in ends.items():
        for name, flags in zip(found[role], said, strict=True):
            if flags[:-1].any() and not kind.ends_inside:
                raise UserError(
                    f"{episode.where}, column '{name}' says that it ends at step {int(flags.argmax())} of {steps}: name the column that "
                    f"tells episodes apart with columns.episode=..., or leave that column out with columns.{role}=[]."
                )
    rewards = [_singles(episode, name, (steps,)) for name in found["rewards"]]
    success = [_success(episode, name, steps) for name in found["success"]]
    return Taken(
        episode.where,
        observations,
        actions,
        rewards[0] if rewards else None,
        success[0] if success else None,
        bool(any(flags[-1] for flags in ends["terminations"])),
    )


def _found(episode: Episode, columns: Columns, given: Columns) -> dict[str, list[str]]:
    """The names of the columns that are taken, by role."""
    found = {
        role: _chosen(episode, role, getattr(columns, role), getattr(given, role))
        for role in ("observations", "actions", "rewards", "terminations", "truncations", "success")
    }
    for role in ("observations", "actions"):
        if not found[role]:
            raise UserError(
                f"{episode.where} has no column for {role}: columns.{role}=[...] names them, out of {episode.listed}."
            )
    if both := [name for name in found["observations"] if name in found["actions"]]:
        raise UserError(
            f"{episode.where}, column '{both[0]}' is taken for both observations and actions: name others with columns.observations=[...] "
            "or columns.actions=[...]."
        )
    return found


def _chosen(episode: Episode, role: str, names: tuple[str, ...] | None, given: tuple[str, ...] | None) -> list[str]:
    refuse_missing(episode, role, given)
    found = matching(names or (), episode.columns)
    if len(found) > 1 and role in ("rewards", "success"):
        raise UserError(
            f"{episode.where}: columns.{role} names {' and '.join(map(repr, found))} where one was expected."
        )
    return found


def _finite(episode: Episode, name: str) -> np.ndarray:
    values = stacked(episode, name)
    if values.dtype.kind not in "fiub":
        raise UserError(f"{episode.where}, column '{name}' holds {values.dtype} where numbers were expected.")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values.reshape(len(values), -1)).all(1)))
        raise UserError(
            f"{episode.where}, column '{name}' holds NaN or infinite numbers (at step {row}): mend or remove it."
        )
    return values


def _of_length(episode: Episode, name: str, values: np.ndarray, lengths: tuple[int, ...]) -> np.ndarray:
    if len(values) not in lengths:
        raise UserError(
            f"{episode.where}, column '{name}' has {len(values)} rows where {' or '.join(map(str, lengths))} were expected, one for "
            "each action: give all columns the same length."
        )
    return values


def _continued(episode: Episode, name: str, steps: int) -> np.ndarray:
    """What was observed, (T + 1, ...).

    Where the files do not hold what followed the last action, the last observation is repeated.
    """
    values = _of_length(episode, name, _finite(episode, name), (steps, steps + 1))
    if len(values) == steps + 1:
        return values
    final = (episode.final or {}).get(name)
    if final is None or np.shape(final) != values.shape[1:] or not np.isfinite(final).all():
        final = values[-1]
    return np.concatenate([values, np.asarray(final, values.dtype)[None]])


def _singles(episode: Episode, name: str, lengths: tuple[int, ...]) -> np.ndarray:
    """A column of one number a row."""
    values = _of_length(episode, name, _finite(episode, name), lengths)
    if values.size != len(values):
        raise UserError(
            f"{episode.where}, column '{name}' has rows of shape {values.shape[1:]} where one number was expected: join them to one, or name "
            "another column."
        )
    return values.reshape(-1)


def _flags(episode: Episode, name: str, steps: int) -> np.ndarray:
    return _singles(episode, name, (steps,)) != 0


def _success(episode: Episode, name: str, steps: int) -> np.ndarray:
    """Whether the task is solved in each state, (T + 1,).

    One value for the whole episode is taken for the last state.
    """
    value = episode.columns[name]
    if isinstance(value, np.ndarray) and value.ndim == 0:
        episode = replace(episode, columns={name: value[None]})
    values = _singles(episode, name, (1, steps, steps + 1))
    return np.concatenate([np.zeros(steps + 1 - len(values)), values]).astype(np.float32)
