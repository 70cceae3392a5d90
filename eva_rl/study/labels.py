"""What a run's settings say: under which protocol it was made, and what to call its method among others."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eva_rl.run.result import RunResult, flat

FACTS = ("task", "adapter", "base", "demonstrations", "steps", "learning_rate", "seed")
"""What a run is first told by, fields of its result."""
PROTOCOL = ("adapter.rank", "adapter.layers")
"""Settings of an adapter that belong to the protocol: how much it may train, and where."""
DERIVED = ("adapter.config.", "adapter.size.")
"""Settings of an adapter whose numbers mostly follow from others of it, and name a variant where no other does."""
OWN = {"steps": "adapter.steps", "training.batch_size": "adapter.batch_size"}
"""Settings that a method has a value of its own for, where the run names none: methods that take theirs share a protocol."""
MISSING = "not set"
SEEDS = ("seed", "prng_key")
"""What the names of settings end with that are seeds of random numbers."""


@dataclass(frozen=True)
class Labelled:
    """A run among others."""

    run: RunResult
    method: str
    """The adapter's name, and of several variants of it, the settings that tell them apart."""
    settings: dict[str, Any]
    """By their names on the command line."""
    protocol: dict[str, Any]
    """All settings but the method's, the task and the seed, by their names on the command line."""


def labelled(runs: Sequence[RunResult]) -> list[Labelled]:
    """Each run with the name of its method among these runs, and its protocol.

    The optimiser's name follows the adapter's where it is not the default. A setting is named where its value is not the
    commonest among the runs.
    """
    settings = [flat(run.settings) for run in runs]
    protocols = [_protocol_of(own) for own in settings]
    of_method = [{name: value for name, value in own.items() if _of_method(name)} for own in settings]
    variants: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for run, own, protocol in zip(runs, of_method, protocols, strict=True):
        variants.setdefault(_named(run), []).append((in_words(protocol), own))
    telling = {name: _telling(own) for name, own in variants.items()}
    found = []
    for run, own, flat_settings, protocol in zip(runs, of_method, settings, protocols, strict=True):
        told = [k for k, commonest in telling[_named(run)].items() if _value(own, k) != commonest]
        parts = [_named(run), *(f"{k.removeprefix('adapter.')}={own.get(k, MISSING)}" for k in told)]
        found.append(Labelled(run, ", ".join(parts), flat_settings, protocol))
    return found


def _protocol_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    free = {name for name in settings if name == "task" or name.endswith(SEEDS) or _of_method(name)}
    own = {name for name, of_method in OWN.items() if settings.get(name) == settings.get(of_method, MISSING)}
    return {name: "the method's own" if name in own else settings[name] for name in settings if name not in free}


def _of_method(name: str) -> bool:
    """Whether a setting is part of what makes a method.

    The other settings, except task and seed, are the protocol.
    """
    if name.endswith(SEEDS):  # some methods draw numbers of their own, from the run's seed
        return False
    if name == "training.learning_rate" or name.startswith(("optimizer.", "allocator.")):
        return True
    return name.startswith("adapter.") and name not in PROTOCOL


def _named(run: RunResult) -> str:
    """The adapter's name, and those of the optimiser and the allocator where the run's settings name any."""
    chosen = {group: run.settings.get(group) for group in ("optimizer", "allocator")}
    more = [f"{group}={own['name']}" for group, own in chosen.items() if isinstance(own, Mapping)]
    return ", ".join([run.adapter, *more])


def _telling(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, str | None]:
    """The settings that tell variants apart, each with its runs' commonest value (None where several are as common).

    runs: the protocol of each and the settings of its method. What is derived and differs between protocols only, as a size
    that follows from the rank does, tells no variants apart.
    """
    differs = differing([own for _, own in runs])
    chosen = [name for name in differs if not _is_derived(name, [own.get(name, 0) for _, own in runs])]
    told = {(protocol, *(_value(own, name) for name in chosen)) for protocol, own in runs}
    if len(told) < len({(protocol, in_words(own)) for protocol, own in runs}):
        by_protocol: dict[str, list[Mapping[str, Any]]] = {}
        for protocol, own in runs:
            by_protocol.setdefault(protocol, []).append(own)
        within = set().union(*map(differing, by_protocol.values()))
        chosen = [name for name in differs if name in chosen or name in within]
    found = {}
    for name in chosen:
        counts = Counter(_value(own, name) for _, own in runs).most_common(2)
        found[name] = counts[0][0] if len(counts) < 2 or counts[0][1] > counts[1][1] else None
    return found


def _is_derived(name: str, values: Sequence[Any]) -> bool:
    """Whether these values may follow from the rank or the layers, as numbers and lists do.

    Words and switches are chosen.
    """
    return name.startswith(DERIVED) and {type(value) for value in values} <= {int, float, list}


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the settings that are not the same in all of these."""
    names = sorted(set().union(*settings))
    return [name for name in names if len({_value(own, name) for own in settings}) > 1]


def in_words(settings: Mapping[str, Any]) -> str:
    """The same text for the same settings."""
    return json.dumps(settings, sort_keys=True)


def _value(settings: Mapping[str, Any], name: str) -> str:
    """A setting's value as text.

    A setting that is not set has no value, not even null.
    """
    return json.dumps(settings[name]) if name in settings else MISSING
