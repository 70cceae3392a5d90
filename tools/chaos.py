"""Commands that something goes wrong with, given again: the same files as without, and nothing left over.

    python -m tools.chaos --moments 100 --seed 0       # `make chaos`
    python -m tools.chaos --moments 5 --actions collect report

Each action is a command on a small task. It runs once whole. Then it starts again, once for each moment, on the files it started from,
and something happens. A signal ends it at a random time (SIGKILL, SIGTERM, SIGINT, or SIGINT twice). The disk has a random number of
bytes left (a tmpfs, which root alone can mount). Or the command is given twice at once. Then it is given again, unless it ended well.

What counts as found: the last command fails. Its files differ from those of the whole run, but for times and TensorBoard's events. A process
outlives its command, or a lock or a half-written file is left. A full disk or a second process ends in anything but success or one sentence.
`--first` makes one moment again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

SIGNALS: dict[str, tuple[int, ...]] = {
    "SIGKILL": (signal.SIGKILL,),
    "SIGTERM": (signal.SIGTERM,),
    "SIGINT": (signal.SIGINT,),
    "SIGINT twice": (signal.SIGINT, signal.SIGINT),
}
FULL, TWICE = "full disk", "two at once"
KINDS = (*SIGNALS, TWICE, FULL)
GRACE = 60.0
"""Seconds that a command may take to end after a signal."""
LINGER = 20.0
"""Seconds in which a worker that is just starting, on a busy machine, finds its parent gone."""
TRAIN = ["model=tiny", "steps=6", "training.batch_size=4", "training.checkpoint_every=2", "device=cpu", "resume=true"]
TASK = "gym/Pendulum-v1"
LOGS = """
import numpy as np
from pathlib import Path
Path("logs").mkdir()
for seed in range(20):
    rng = np.random.default_rng(seed)
    columns = {"observations": rng.normal(size=(500, 9)), "actions": rng.normal(size=(500, 2)), "rewards": np.ones(500)}
    np.savez(f"logs/{seed}.npz", **columns)
"""
_BASE = ["eva_rl.pretrain", f"task={TASK}", "demonstrations=2", "run_dir=base", *TRAIN]
_TUNE = ["eva_rl.finetune", f"task={TASK}", "base=base/model", "demonstrations=2", "episodes=1", "workers=0"]
_TUNE += [word for word in TRAIN if not word.startswith(("model=", "resume="))]
_RUN = [*_TUNE, "run_dir=run", "resume=true"]
ACTIONS: dict[str, list[list[str]]] = {
    # the last command of each is the one that something happens to; those before it make what it needs
    "collect": [["eva_rl.collect", f"task={TASK}", "episodes=4", "workers=1"]],
    "pretrain": [_BASE],
    "finetune": [_BASE, _RUN],
    "grid": [_BASE, [_TUNE[0], "-m", *_TUNE[1:], "adapter=lora,none"]],
    "merge": [_BASE, _RUN, ["eva_rl.merge", "run=run", "output=merged"]],
    "report": [_BASE, _RUN, ["eva_rl.report", "run"]],
    "convert": [["-c", LOGS], ["eva_rl.convert", "source=logs", "dataset=mine/logs-v0", "overwrite=true"]],
    "library": [_BASE, _RUN, ["eva_rl.library", "add", "library=lib", "run=run"]],
}
TIMES = ("seconds", "peak_memory_mib", "dataset_permalink", "creation_date", "date")
"""What differs from one run to the next in JSON files."""


def start(words: Sequence[str], place: Path) -> subprocess.Popen[bytes]:
    """A command of the project in a folder, with a process group and a datasets' root of its own."""
    environment = os.environ | {"MINARI_DATASETS_PATH": str(place / "datasets"), "PYTHONHASHSEED": "0"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, *(["-m", *words] if words[0].startswith("eva_rl.") else words)]
    with place.with_suffix(".txt").open("ab") as output:
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
    """Send these signals after so many seconds; whether the process was still there, and has ended within `GRACE`."""
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
    """Processes of this group that still run after `LINGER`, and files that only a running command may have."""
    until = time.monotonic() + LINGER
    while (alive := _alive(group)) and time.monotonic() < until:
        time.sleep(0.1)
    return [f"process {pid}" for pid in alive] + unfinished(place)


def unfinished(place: Path) -> list[str]:
    """Files that only a running command may have."""
    files = sorted(path for path in place.rglob("*") if path.suffix in (".lock", ".tmp") or path.name == ".lock")
    return [f"file {path.relative_to(place)}" for path in files]


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
    """Each file's digest, but for what tells times; hidden ones, that a kill may leave and nobody reads, are left out."""
    found = {}
    for path in sorted(path for path in place.rglob("*") if path.is_file()):
        name = path.relative_to(place).as_posix()
        if "events.out" in name or "/hparams/" in name or any(p.startswith(".") for p in path.parts):
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


def made(words: Sequence[str], place: Path) -> float:
    """Give a command that nothing happens to; how many seconds it took."""
    began = time.monotonic()
    if code := start(words, place).wait():
        raise RuntimeError(f"{' '.join(words)} ended with {code}: {said(place)}")
    return time.monotonic() - began


def said(place: Path) -> str:
    """The end of what the commands in a folder printed."""
    return place.with_suffix(".txt").read_text(errors="replace")[-600:]


def interrupted(kind: str, words: Sequence[str], place: Path, after: float) -> tuple[int, list[str]]:
    """Send a command signals after so many seconds: its exit status, and what was found wrong."""
    process = start(words, place)
    try:
        interrupt(process, after, SIGNALS[kind])
    except RuntimeError as error:
        return process.returncode, [str(error)]
    return process.returncode, [found for found in left_over(process.pid, place) if found.startswith("process")]


def side_by_side(count: int, words: Sequence[str], place: Path) -> tuple[int, list[str]]:
    """Give a command so many times at once: the best exit status, and what was found wrong."""
    output = place.with_suffix(".txt")
    before = output.stat().st_size if output.exists() else 0
    processes = [start(words, place) for _ in range(count)]
    codes = [process.wait() for process in processes]
    wrong = [found for process in processes for found in left_over(process.pid, place) if found.startswith("process")]
    text = output.read_bytes()[before:].decode(errors="replace")
    if "Traceback" in text or min(codes) < 0:
        wrong.append(f"ended with {codes}: {text[-900:]}")
    if count > 1 and all(codes):
        wrong.append(f"none of {count} at once succeeded: {text[-900:]}")
    return min(codes), wrong


def moment(
    action: str, expected: dict[str, str], place: Path, seconds: float, rng: np.random.Generator
) -> tuple[str, list[str]]:
    """Let something happen to an action, and give it again: what it was, and what was found wrong."""
    words, kind = ACTIONS[action][-1], str(rng.choice(KINDS if os.path.ismount(place) else KINDS[:-1]))
    what = kind
    if kind in SIGNALS:
        after = float(rng.uniform(0, seconds))
        what = f"{kind} after {after:.2f} s"
        code, wrong = interrupted(kind, words, place, after)
    elif kind == TWICE:
        code, wrong = side_by_side(2, words, place)
    else:
        left = int(10 ** rng.uniform(3, 6.5))
        what = f"{kind} after {left} bytes"
        resize(place, left)
        code, wrong = side_by_side(1, words, place)
        resize(place, None)
    if code:
        code = start(words, place).wait()
    now = contents(place)
    wrong += [f"differs: {path}" for path in sorted(now.keys() | expected) if now.get(path) != expected.get(path)]
    if code and (now != expected or "already" not in said(place)):  # what it makes may have been whole before
        wrong.append(f"given again it ended with {code}: {said(place)}")
    return what, wrong


def resize(place: Path, left: int | None) -> None:
    """Leave so many bytes on the tmpfs at this folder, or plenty."""
    found = os.statvfs(place)
    size = 2**31 if left is None else (found.f_blocks - found.f_bfree) * found.f_frsize + left
    subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)


@contextmanager
def mounted(place: Path) -> Iterator[None]:
    """A tmpfs at this folder, where there is a right to mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=2G", "tmpfs", str(place)]
    if subprocess.run(mount, check=False, stderr=subprocess.DEVNULL).returncode:
        print("No tmpfs can be mounted here: no disk will be full.", file=sys.stderr)
    try:
        yield
    finally:
        if os.path.ismount(place):
            subprocess.run(["umount", "-l", str(place)], check=True)


def campaign(action: str, moments: range, seed: int) -> int:
    """So many moments of an action, all in a folder of one name, since files state it; in how many something was wrong."""
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        place, needed = Path(folder, "place"), Path(folder, "needed")
        place.mkdir()
        with mounted(place):
            for words in ACTIONS[action][:-1]:
                made(words, place)
            shutil.copytree(place, needed)
            seconds = made(ACTIONS[action][-1], place)
            expected, usual = contents(place), set(unfinished(place))
            for number in moments:
                for path in place.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                shutil.copytree(needed, place, dirs_exist_ok=True)
                rng = np.random.default_rng((seed, list(ACTIONS).index(action), number))
                what, wrong = moment(action, expected, place, seconds, rng)
                wrong += sorted(set(unfinished(place)) - usual)
                bad += bool(wrong)
                for sentence in wrong:
                    print(f"{action} {number}: {what}: {sentence}", flush=True)
    print(f"{action}: {len(moments)} moments of {seconds:.1f} s, {bad} with something wrong", flush=True)
    return bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actions", nargs="+", choices=sorted(ACTIONS), default=list(ACTIONS))
    parser.add_argument("--moments", type=int, default=100, help="of each action")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    bad = sum(campaign(action, range(a.first, a.first + a.moments), a.seed) for action in a.actions)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
