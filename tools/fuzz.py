"""Damaged and random inputs: each is used rightly, or refused in one sentence.

    python -m tools.fuzz --inputs 10000 --seed 0                # all targets, as `make fuzz`
    python -m tools.fuzz --inputs 200 --targets checkpoint run

An input is a command line of random settings, or a folder as the project writes it with one to three random changes. A
change flips, cuts or removes bytes, replaces values of a JSON file by others, renames, drops or reshapes tensors, or
fills them with NaN. Input number n of a seed is always the same, and made again by `--first n --inputs 1`. What counts
as found: a traceback, more than ten seconds of computing, more than two gigabytes, a process that dies. Each target
works in a process of its own, which is started again where it dies. An input that is used may hold other numbers of the
right kind than the whole one did. That is counted as `used`, and can't be known to be wrong.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from eva_rl.errors import UserError
from tools.fuzz_targets import TARGETS

SECONDS = 10.0
WAITING = 120.0
"""Seconds that an input may take without computing."""
BYTES = 2 * 2**30
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 7, 2**31, 10**12, 10**400, 0.5, -1e300, float("nan"), float("inf"), "", "x", "../..", "\u00e4" * 300,
    [], [0], [None], [[1.0]], {}, {"x": 1},
)  # fmt: skip
"""What takes the place of a value in a JSON file."""


class Hang(BaseException):
    """An input took longer than it may, which no `except Exception` catches."""


def damaged(folder: Path, rng: np.random.Generator) -> str:
    """Change one file below the folder and return in a few words what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        return "nothing left"
    path = files[rng.integers(len(files))]
    kinds: list[Callable[[Path, np.random.Generator], str]] = [_bytes]
    kinds += [_json] * 3 if path.suffix == ".json" else []
    kinds += [_tensors] * 2 if path.suffix == ".safetensors" else []
    try:
        what = kinds[rng.integers(len(kinds))](path, rng)
    except (
        ValueError,
        OSError,
        KeyError,
        TypeError,
        SafetensorError,
    ):  # what an earlier change left can't be read as its kind
        what = _bytes(path, rng)
    return f"{path.relative_to(folder)}: {what}"


def _bytes(path: Path, rng: np.random.Generator) -> str:
    content = bytearray(path.read_bytes())
    kind = rng.choice(["flip", "cut", "remove", "empty", "zero", "insert"])
    place = int(rng.integers(len(content) + 1)) if rng.random() < 0.5 else int(rng.integers(min(len(content), 400) + 1))
    if kind == "remove":
        path.unlink()
        return "removed"
    if kind == "flip" and content:
        content[place % len(content)] ^= 1 << int(rng.integers(8))
    elif kind == "cut":
        del content[place:]
    elif kind == "empty":
        content.clear()
    elif kind == "zero":
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    else:
        content[place:place] = rng.bytes(int(rng.integers(1, 9)))
    path.write_bytes(content)
    return f"{kind} at byte {place}"


def _json(path: Path, rng: np.random.Generator) -> str:
    content = json.loads(path.read_text())
    places = list(_places(content))
    if not places:
        raise ValueError("no place")
    holder, key, name = places[rng.integers(len(places))]
    if rng.random() < 0.2:
        del holder[key]
        what = "deleted"
    else:
        holder[key] = VALUES[rng.integers(len(VALUES))]
        what = f"= {str(holder[key])[:20]}"
    path.write_text(json.dumps(content))
    return f"{name} {what}"


def _places(content: Any, name: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Every value within: what holds it, where in that, and its name."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in pairs:
        yield content, key, f"{name}/{key}"
        yield from _places(value, f"{name}/{key}")


def _tensors(path: Path, rng: np.random.Generator) -> str:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = sorted(tensors)[rng.integers(len(tensors))]
    kind = rng.choice(["drop", "rename", "nan", "flatten", "narrow", "whole numbers"])
    tensor = tensors.pop(name)
    if kind == "nan" and tensor.is_floating_point():
        tensor.view(-1)[:1] = float("nan")
    changed = {
        "drop": {},
        "rename": {f"{name}.x": tensor},
        "flatten": {name: tensor.flatten()},
        "narrow": {name: tensor[..., :1].contiguous() if tensor.ndim else tensor},
        "whole numbers": {name: tensor.long()},
    }.get(str(kind), {name: tensor})
    save_file(tensors | changed, path, metadata={"format": "pt"})
    return f"{kind} {name}"


@contextmanager
def _limits() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang

    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, ring)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of computing, however busy the machine is
    signal.setitimer(signal.ITIMER_REAL, WAITING)
    try:
        yield
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)


def outcome(use: Callable[[], object]) -> str:
    """`used`, `refused`, or what should not be: `hang`, or the last lines of a traceback."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _limits():
                use()
        except UserError as error:
            return "refused" if "\n" not in str(error) else f"several lines: {error}"
        except Hang:
            return "hang"
        except Exception:  # noqa: BLE001 (any is what is looked for)
            return " | ".join(traceback.format_exc().splitlines()[-5:])
    return "used"


def run_input(target: str, whole: Path, number: int, seed: int) -> tuple[str, str]:
    """Input `number` of this seed: what was done to it, and its outcome."""
    rng = np.random.default_rng((seed, sorted(TARGETS).index(target), number))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "input"
        shutil.copytree(whole, folder)
        use, draw, what = TARGETS[target].use, TARGETS[target].words, []
        if draw is None:
            what = [damaged(folder, rng) for _ in range(int(rng.integers(1, 4)))]
            return "; ".join(what), outcome(lambda: use(folder))
        words = draw(rng)
        return " ".join(words), outcome(lambda: use(words))


def work(target: str, log: Path, first: int, last: int, seed: int) -> None:
    """Inputs `first` to `last` (excluded), a line each in the log, of which the process may die."""
    soft = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + BYTES
    with tempfile.TemporaryDirectory() as place, log.open("a") as file:
        whole = Path(place) / "whole"
        TARGETS[target].make(whole)
        if TARGETS[target].words is None and (found := outcome(lambda: TARGETS[target].use(whole))) != "used":
            raise RuntimeError(f"the whole input is not used: {found}")
        resource.setrlimit(resource.RLIMIT_DATA, (soft, soft))
        for number in range(first, last):
            print(json.dumps({"begins": number}), file=file, flush=True)
            what, found = run_input(target, whole, number, seed)
            print(json.dumps({"input": number, "what": what, "outcome": found}), file=file, flush=True)


def campaign(target: str, first: int, count: int, seed: int) -> Counter[str]:
    """Run so many inputs of a target in processes of their own and count how many had which outcome."""
    with tempfile.TemporaryDirectory() as place:
        log, begun = Path(place) / "log.jsonl", first
        while begun < first + count:
            command = [sys.executable, "-m", "tools.fuzz", "--work", str(log), "--targets", target, "--seed", str(seed)]
            command += ["--first", str(begun), "--inputs", str(first + count - begun)]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
            if not lines or (done.returncode and "begins" not in lines[-1]):
                raise RuntimeError(f"The target '{target}' could not be made: {done.stderr}")
            if "begins" in lines[-1]:
                with log.open("a") as file:
                    number = lines[-1]["begins"]
                    print(json.dumps({"input": number, "what": "", "outcome": f"died: {done.returncode}"}), file=file)
            begun = 1 + max(line.get("input", line.get("begins")) for line in lines)
        results = [line for line in map(json.loads, log.read_text().splitlines()) if "input" in line]
    for line in results:
        if line["outcome"] not in ("used", "refused"):
            print(f"{target} {line['input']} ({line['what']}): {line['outcome']}")
    return Counter(line["outcome"] if line["outcome"] in ("used", "refused") else "found" for line in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=sorted(TARGETS), default=sorted(TARGETS))
    parser.add_argument("--inputs", type=int, default=10_000, help="of each target")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.work:
        work(a.targets[0], a.work, a.first, a.first + a.inputs, a.seed)
        return
    found = 0
    for target in a.targets:
        counts = campaign(target, a.first, a.inputs, a.seed)
        print(
            f"{target}: {a.inputs} inputs, {', '.join(f'{n} {name}' for name, n in sorted(counts.items()))}", flush=True
        )
        found += counts["found"]
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
