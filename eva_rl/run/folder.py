"""Whether a fine-tuning run may write to a folder."""

from __future__ import annotations

from pathlib import Path

from eva_rl import files
from eva_rl.errors import UserError
from eva_rl.run.rows import find_row


def check_run_folder(path: Path, resume: bool = False) -> None:
    """As `eva_rl.files.check_run_folder`, for a run whose result may stand in a `runs.jsonl`.

    Raises:
        UserError: if files can't be written there, or there is the result of a run that this one does not resume.
    """
    files.check_run_folder(path, resume)
    if not resume and (row := find_row(path)):
        raise UserError(f"'{row.file}' has the result of '{row.run}': set another run_dir, or resume=true.")
