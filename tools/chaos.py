"""Commands killed at random moments and run again: the same files as without, and nothing left over.

    python -m tools.chaos --moments 100 --seed 0       # `make chaos`
    python -m tools.chaos --moments 5 --actions collect report

Each action is a command on a small task. The command first runs once whole. Then, for each moment, it starts in new
folders, a signal (SIGKILL, SIGTERM, SIGINT, or SIGINT twice) ends it at a random time of its length, and it is run
again. What counts as found: the second command fails, its files differ from those of the whole run, a process outlives
it, or a lock or a half-written file is left. Times and TensorBoard's events may differ. `--first` makes one moment
again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

SIGNALS: dict[str, tuple[int, ...]] = {
    "SIGKILL": (signal.SIGKILL,),
    "SIGTERM": (signal.SIGTERM,),
    "SIGINT": (signal.SIGINT,),
    "SIGINT twice": (signal.SIGINT, signal.SIGINT),
}
GRACE = 60.0
"""Seconds that a command may take to end after a signal."""
TRAIN = ["model=tiny", "steps=6", "training.batch_size=4", "training.checkpoint_every=2", "device=cpu", "resume=true"]
TASK = "gym/Pendulum-v1"
ACTIONS: dict[str, list[list[str]]] = {
    # the last command of each is killed; those before it make what it needs
    "collect": [["eva_rl.collect", f"task={TASK}", "episodes=4", "workers=1"]],
    "pretrain": [["eva_rl.pretrain", f"task={TASK}", "demonstrations=2", "run_dir=base", *TRAIN]],
}
ACTIONS["finetune"] = [
    *ACTIONS["pretrain"],
    ["eva_rl.finetune", f"task={TASK}", "base=base/model", "demonstrations=2", "run_dir=run", "episodes=1", "workers=0"]
    + [word for word in TRAIN if not word.startswith("model=")],
]
ACTIONS["merge"] = [*ACTIONS["finetune"], ["eva_rl.merge", "run=run", "output=merged"]]
ACTIONS["report"] = [*ACTIONS["finetune"], ["eva_rl.report", "run"]]
TIMES = ("seconds", "peak_memory_mib", "dataset_permalink", "creation_date", "date")
"""What differs from one run to the next in JSON files."""


def start(words: Sequence[str], place: Path) -> subprocess.Popen[bytes]:
    """A command of the project in a folder, with a process group and a datasets' root of its own."""
    environment = os.environ | {"MINARI_DATASETS_PATH": str(place / "datasets"), "PYTHONHASHSEED": "0"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, *(["-m", *words] if words[0].startswith("eva_rl.") else words)]
    with (place / "output.txt").open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=place,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        )


def _heed_interrupts() -> None:
    """A shell has what it starts in the background ignore SIGINT, which is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupt(process: subprocess.Popen[bytes], after: float, signals: Sequence[int]) -> bool:
    """Send these signals after so many seconds and return whether the process was still there.

    If it was, it has ended within `GRACE`.
    """
    try:
        process.wait(after)
        return False
    except subprocess.TimeoutExpired:
        for number in signals:
            process.send_signal(number)
            time.sleep(0.05)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise RuntimeError(f"did not end within {GRACE:.0f} s of its signal") from None
    return True


def left_over(group: int, place: Path) -> list[str]:
    """Processes of this group that still run a moment later, and files that only a running command may have."""
    for _ in range(50):
        if not (alive := _alive(group)):
            break
        time.sleep(0.1)
    found = [f"process {pid}" for pid in alive]
    for path in sorted(place.rglob("*")):
        if path.name == ".lock" or path.name.endswith(".lock") or path.suffix == ".tmp":
            found.append(f"file {path.relative_to(place)}")
    return found


def _alive(group: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


def contents(place: Path) -> dict[str, str]:
    """Each file's digest, but for what tells times.

    Hidden files are left out, since a kill may leave them and nobody reads them.
    """
    found = {}
    for path in sorted(path for path in place.rglob("*") if path.is_file()):
        name = path.relative_to(place).as_posix()
        if (
            name == "output.txt"
            or "events.out" in name
            or "/hparams/" in name
            or any(p.startswith(".") for p in path.parts)
        ):
            continue
        content = path.read_bytes()
        if path.suffix == ".json":
            content = json.dumps(_timeless(json.loads(content)), sort_keys=True).encode()
        if path.suffix in (".hdf5", ".csv", ".md", ".safetensors"):  # these hold times of their own
            content = b"" if path.suffix != ".safetensors" or "checkpoints" in name else content
        found[name] = hashlib.sha256(content.replace(str(place).encode(), b"")).hexdigest()[:16]
    return found


def _timeless(content: object) -> object:
    if isinstance(content, dict):
        return {key: _timeless(value) for key, value in content.items() if key not in TIMES}
    return [_timeless(value) for value in content] if isinstance(content, list) else content


def whole(action: str, place: Path) -> tuple[dict[str, str], float]:
    """The files of an action that nothing interrupts, and how long its last command takes."""
    for words in ACTIONS[action]:
        began = time.monotonic()
        if code := start(words, place).wait():
            raise RuntimeError(f"{' '.join(words)} ended with {code}: {(place / 'output.txt').read_text()[-800:]}")
    return contents(place), time.monotonic() - began


def moment(action: str, expected: dict[str, str], seconds: float, rng: np.random.Generator) -> tuple[str, list[str]]:
    """One interruption: what it was, and what was found wrong."""
    name = sorted(SIGNALS)[rng.integers(len(SIGNALS))]
    after = float(rng.uniform(0, seconds))
    what = f"{action}, {name} after {after:.2f} s"
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        *before, words = ACTIONS[action]
        for needed in before:
            start(needed, place).wait()
        process = start(words, place)
        try:
            if not interrupt(process, after, SIGNALS[name]):
                what += " (it had ended)"
        except RuntimeError as error:
            return what, [str(error)]
        wrong = [found for found in left_over(process.pid, place) if found.startswith("process")]
        again = start(words, place)
        if code := again.wait():
            return what, [*wrong, f"given again it ended with {code}: {(place / 'output.txt').read_text()[-400:]}"]
        wrong += left_over(again.pid, place)
        now = contents(place)
        return what, wrong + [
            f"differs: {path}" for path in sorted(now.keys() | expected) if now.get(path) != expected.get(path)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actions", nargs="+", choices=sorted(ACTIONS), default=list(ACTIONS))
    parser.add_argument("--moments", type=int, default=100, help="of each action")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    total = 0
    for action in a.actions:
        with tempfile.TemporaryDirectory() as folder:
            expected, seconds = whole(action, Path(folder))
        bad = 0
        for number in range(a.first, a.first + a.moments):
            rng = np.random.default_rng((a.seed, list(ACTIONS).index(action), number))
            what, wrong = moment(action, expected, seconds, rng)
            bad += bool(wrong)
            for sentence in wrong:
                print(f"{number}: {what}: {sentence}", flush=True)
        print(f"{action}: {a.moments} moments of {seconds:.1f} s, {bad} with something wrong", flush=True)
        total += bad
    sys.exit(1 if total else 0)


if __name__ == "__main__":
    main()
