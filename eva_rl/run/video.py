"""Filmed episodes as files that any browser shows."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np

from eva_rl.files import replacing
from eva_rl.run.tensorboard import TensorBoard

SIDE = 240
"""Pixels of the longer side of a frame."""


def save_film(run_dir: Path, tensorboard: TensorBoard, step: int, task: str, seed: int, frames: np.ndarray) -> None:
    """Write `<run>/videos/<task>-<seed>.gif` and `.png`, and show the film in TensorBoard.

    frames: (T, height, width, 3) uint8.
    """
    name = f"{task.replace('/', '_')}-{seed}"
    animated = gif(frames)
    for suffix, content in (("gif", animated), ("png", grid(frames))):
        with replacing(run_dir / "videos" / f"{name}.{suffix}") as temporary:
            temporary.write_bytes(content)
    tensorboard.animation(f"video/{name}", step, animated, _picture(frames[0], SIDE).size)


def gif(frames: np.ndarray, milliseconds: int = 50) -> bytes:
    """An animated GIF of frames (T, height, width, 3) uint8."""
    pictures = [_picture(frame, SIDE) for frame in frames]
    stream = BytesIO()
    pictures[0].save(
        stream, "gif", save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0, optimize=False
    )
    return stream.getvalue()


def grid(frames: np.ndarray, columns: int = 6, rows: int = 2) -> bytes:
    """A PNG of frames spread evenly over the episode, from left to right and top to bottom."""
    from PIL import Image

    chosen = np.linspace(0, len(frames) - 1, columns * rows).round().astype(int)
    pictures = [_picture(frames[i], SIDE // 2) for i in chosen]
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, rows * height))
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % columns * width, number // columns * height))
    stream = BytesIO()
    sheet.save(stream, "png")
    return stream.getvalue()


def _picture(frame: np.ndarray, side: int):
    from PIL import Image

    picture = Image.fromarray(frame)
    scale = min(1.0, side / max(picture.size))
    return picture.resize([max(1, round(scale * length)) for length in picture.size])
