"""Parquet files, as pyarrow reads them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from eva_rl.errors import UserError, in_one_line


def columns_of(path: Path) -> list[str]:
    """The names of the file's columns."""
    return _arrow().parquet.read_schema(path).names if _whole(path) else []


def read(path: Path, names: list[str] | None = None) -> dict[str, Any]:
    """The file's columns by name: arrays (N, ...), or lists where rows are neither numbers nor lists of one length.

    Raises:
        UserError: if pyarrow is missing, or the file can't be read.
    """
    _whole(path)
    table = _arrow().parquet.read_table(path, columns=names)
    return {name: _array(table.column(name)) for name in table.column_names}


def are_pictures(cells: Any) -> bool:
    """Whether a column's cells are files of pictures, as Hugging Face's datasets keep them: their bytes, and a path."""
    return isinstance(cells, list) and bool(cells) and isinstance(cells[0], dict) and "bytes" in cells[0]


def picture(cell: Any) -> np.ndarray:
    """A picture that is kept as a file of its own within a cell.

    Its shape is (height, width, channels), or (height, width) if it is grey.

    Raises:
        ValueError: if the cell holds none that can be read.
    """
    from PIL import Image

    try:
        shown = Image.open(io.BytesIO(cell["bytes"]))
        # a palette's numbers say nothing without it
        return np.asarray(shown.convert("RGB") if shown.mode == "P" else shown)
    except (OSError, TypeError, KeyError, SyntaxError) as error:  # the last is Pillow's for a broken PNG
        raise ValueError(in_one_line(error)) from error


def _whole(path: Path) -> bool:
    pyarrow = _arrow()
    try:
        pyarrow.parquet.ParquetFile(path).close()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"'{path}' can't be read as Parquet ({in_one_line(error)[:200]}): get it again.") from error
    return True


def _array(column: Any) -> Any:
    kind = column.type
    pyarrow = _arrow()
    if column.null_count and (pyarrow.types.is_integer(kind) or pyarrow.types.is_boolean(kind)):
        return column.cast(pyarrow.float64()).to_numpy()  # what is missing becomes NaN, and is named as such
    if pyarrow.types.is_struct(kind):
        return column.to_pylist()
    values = column.to_numpy()
    if values.dtype != object or not len(values) or not isinstance(values[0], np.ndarray):
        return values
    rows = [_rows(row) for row in values]
    return np.stack(rows) if len({row.shape for row in rows}) == 1 else rows


def _rows(row: Any) -> np.ndarray:
    """A row of nested lists as one array."""
    if isinstance(row, np.ndarray) and row.dtype == object and len(row) and isinstance(row[0], np.ndarray):
        return np.stack([_rows(part) for part in row])
    return np.asarray(row)


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "Parquet files need the package pyarrow, which is not installed: run `pip install 'eva_rl[arrow]'`."
        ) from error
    return pyarrow
