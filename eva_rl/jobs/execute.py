"""What the commands do, for Python: a job -> a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eva_rl.config.words import Job, completed
from eva_rl.errors import UserError
from eva_rl.files import read_json
from eva_rl.run.rows import find_row
from eva_rl.settings import EvaluateConfig, FinetuneConfig, PretrainConfig

if TYPE_CHECKING:
    from eva_rl.policy import ActingPolicy


@dataclass(frozen=True)
class Run:
    """A run's folder."""

    folder: Path

    @property
    def result(self) -> dict[str, Any]:
        """What its result.json states, as far as it got, or its row in a `runs.jsonl`.

        Raises:
            UserError: if there is none, or it is damaged.
        """
        path = self.folder / "result.json"
        if not path.is_file() and (row := find_row(self.folder)):
            return row.content
        return read_json(path)

    def policy(self, task: str | None = None, **options: Any) -> ActingPolicy:
        """What it trained, as a policy that acts in a loop of your own (see `load_policy`)."""
        from eva_rl.policy import load_policy

        return load_policy(self.folder, task, **options)


def execute(job: Job, *words: str) -> Run:
    """Do what `python -m eva_rl.finetune`, `pretrain` or `evaluate` does.

        run = eva_rl.execute(eva_rl.Finetune(task="metaworld/hammer-v3", adapter="eva"), "adapter.rank=4")

    Args:
        job: `Finetune`, `Pretrain` or `Evaluate`. What it leaves open is as in `configs/`. The name of a file there may
            stand for what the file holds, as in `adapter="eva"`.
        words: further settings as on the command line, such as `adapter.rank=4`. They come last.

    Raises:
        UserError: where the command would end: for settings that make no sense, and for whatever a user can mend.
    """
    job = completed(job, words)
    if isinstance(job, FinetuneConfig):
        from eva_rl.jobs.finetuning import finetune

        return Run(finetune(job))
    if isinstance(job, PretrainConfig):
        from eva_rl.jobs.pretraining import pretrain

        return Run(pretrain(job))
    if isinstance(job, EvaluateConfig):
        from eva_rl.jobs.evaluation import evaluate

        return Run(evaluate(job))
    raise UserError(f"execute takes Finetune(...), Pretrain(...) or Evaluate(...), got {job!r}.")
