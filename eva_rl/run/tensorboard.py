"""TensorBoard: scalars by step and pictures, in the run's own folder."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eva_rl.errors import no_space
from eva_rl.files import check_space, is_full, make_folder
from eva_rl.run.result import RunResult, flat

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter


SPARE = 2**19
"""Bytes that must be free besides those that are logged."""
PICTURE = 2**18
"""Bytes that a figure may take."""
AGAIN = 10.0
"""Seconds from one look for space to the next."""


class TensorBoard:
    """A context manager that writes scalars of a run to `<run>/events.out.tfevents...`."""

    def __init__(self, run_dir: Path):
        from torch.utils.tensorboard import SummaryWriter  # seconds to import

        self.run_dir = make_folder(run_dir)
        self.looked = -math.inf
        self._check()
        self.writer = SummaryWriter(str(run_dir))

    def _check(self, size: int = 0) -> None:
        """Find a full disk out here, every now and then: TensorBoard writes in a thread, whose error nobody would catch."""
        if size or time.monotonic() > self.looked + AGAIN:
            check_space(self.run_dir, size + SPARE)
            self.looked = time.monotonic()

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._check()
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)

    def figures(self, step: int, figures: Mapping[str, Figure]) -> None:
        self._check(PICTURE * len(figures))
        for name, figure in figures.items():
            self.writer.add_figure(name, figure, step)

    def animation(self, name: str, step: int, gif: bytes, size: tuple[int, int]) -> None:
        """Log an animated GIF of this width and height, which the browser plays among the images."""
        # protobuf makes the class when it is imported.
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        self._check(len(gif))
        image = Summary.Image(encoded_image_string=gif, width=size[0], height=size[1], colorspace=3)
        _add(self.writer, Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def text(self, name: str, markdown: str) -> None:
        self._check()
        self.writer.add_text(name, markdown)

    def hparams(self, result: RunResult) -> None:
        """What the run was made with and what came of it, for the HParams tab."""
        from torch.utils.tensorboard.summary import hparams

        made = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in flat(result.settings).items()
        }
        for summary in hparams(made, outcome(result)):
            _add(self.writer, summary)

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.writer.close()
        except OSError as error:
            if kind is not None:
                return  # the error that ended the run goes on
            if is_full(error):
                raise no_space(self.run_dir) from error
            raise


def _add(writer: SummaryWriter, summary: Any, step: int | None = None) -> None:
    assert writer.file_writer is not None  # until it is closed
    writer.file_writer.add_summary(summary, step)


def write_hparams(folder: Path, results: Sequence[RunResult]) -> None:
    """What each run was made with and what came of it, for TensorBoard's HParams tab, in a folder of its own a run."""
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    check_space(make_folder(folder), SPARE)
    made = [flat(result.settings) for result in results]
    values = {name: [own[name] for own in made if name in own] for name in sorted(set().union(*made))}
    numeric = {name for name, own in values.items() if all(isinstance(value, int | float) for value in own)}
    made = [{name: value if name in numeric else str(value) for name, value in own.items()} for own in made]
    found = [outcome(result) for result in results]
    columns, _, _ = hparams(_merged(made), _merged(found))  # TensorBoard reads one run's, whichever it meets first
    for number, (result, settings, scores) in enumerate(zip(results, made, found, strict=True)):
        _, start, end = hparams(settings, scores)
        name = f"{number:04d}-{result.adapter}-{result.task.replace('/', '-')}-{result.seed}"
        with SummaryWriter(str(folder / name)) as writer:
            for summary in (columns, start, end):
                _add(writer, summary)
            for score, value in scores.items():
                writer.add_scalar(score, value)


def _merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}


def outcome(result: RunResult) -> dict[str, float]:
    """What came of a run: scores, seconds and weights, by name."""
    found = {f"result/{name}": own.mean for name, own in result.scores.items() if own is not None}
    found |= {f"seconds/{phase}": seconds for phase, seconds in result.seconds.items()}
    return found | {"trainable_parameters": float(result.trainable_parameters)}
