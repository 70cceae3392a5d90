"""A run or a checkpoint -> a Hugging Face repository: its files, and a model card for people."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from eva_rl.errors import UserError, in_one_line
from eva_rl.files import read_json, write_json
from eva_rl.model import NOTES, load_base, load_base_of, load_notes
from eva_rl.policy.load import find_folder

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", NOTES)
MODEL_FILES = ("config.json", "model.safetensors")
SCORES = ("success_rate", "success_at_end", "episode_return", "normalized_score")


@dataclass(frozen=True)
class Card:
    """What the model card says."""

    repo: str
    base: str | None
    """The base an adapter belongs to. None for a whole model."""
    tasks: tuple[str, ...]
    sees: str
    """Its observations and actions, in words."""
    result: Mapping[str, Any]
    """The run's result.json. Empty where there is none."""

    def __str__(self) -> str:
        from huggingface_hub import ModelCardData

        library = "eva_rl" if self.base is None else "peft"
        tags = ["eva_rl", "decision-transformer", "offline-reinforcement-learning", *(["lora"] if self.base else [])]
        facts = ModelCardData(library_name=library, pipeline_tag="reinforcement-learning", tags=tags)
        if self.base is not None and self.base.count("/") == 1:  # the Hub knows repositories alone
            facts.base_model = self.base
        parts = [f"---\n{facts.to_yaml()}\n---", f"# {self.repo.rpartition('/')[2]}", self._what(), self._use()]
        return "\n\n".join([*parts, *self._scores(), *self._made()]) + "\n"

    def _what(self) -> str:
        kind = "A model" if self.base is None else f"An adapter of the base `{self.base}`"
        where = f"`{self.tasks[0]}`" if len(self.tasks) == 1 else f"{len(self.tasks)} tasks"
        return f"{kind} that acts in {where}: {self.sees}. Made with eva_rl, which reads it as `{self.repo}`."

    def _use(self) -> str:
        task = "" if len(self.tasks) == 1 else f', task="{self.tasks[0]}"'
        return (
            "```python\nimport eva_rl\n\n"
            f'policy = eva_rl.load_policy("{self.repo}"{task})\npolicy.reset()\naction = policy.act(observation)\n```'
        )

    def _scores(self) -> Iterator[str]:
        from eva_rl.table import markdown

        found, before = self.result.get("status") == "complete" and self.result, self.result.get("zero_shot") or {}
        rows = [
            (name.replace("_", " "), *(_in_words(scores.get(name)) for scores in (before, found)), found[name]["n"])
            for name in SCORES
            if found and found.get(name)
        ]
        if rows:
            yield markdown(["mean [95 % interval]", "zero-shot", "fine-tuned", "episodes"], rows)

    def _made(self) -> Iterator[str]:
        known = {
            name: self.result[name]
            for name in ("adapter", "dataset", "demonstrations", "steps", "seed")
            if name in self.result
        }
        if known:
            yield "Trained with " + ", ".join(f"{name} {value}" for name, value in known.items()) + "."


def _in_words(estimate: Mapping[str, Any] | None) -> str | None:
    """A mean and its interval, which a single episode has none of."""
    if not estimate:
        return None
    mean, low, high = (estimate[name] for name in ("mean", "low", "high"))
    return f"{mean:.2f}" if low is None or high is None else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


@contextmanager
def staged(path: str, repo: str, base: str | None) -> Iterator[Path]:
    """A temporary folder of what is to be published, with the model card.

    What is there is loaded first, to make sure that it is whole.

    base: where others find an adapter's base, if that is not where this run found it.

    Raises:
        UserError: if there is nothing whole to publish, or others could not find the base.
    """
    folder = find_folder(path)
    result = next((read_json(p) for p in (folder.parent / "result.json", folder / "result.json") if p.is_file()), {})
    with TemporaryDirectory() as temporary:
        target = Path(temporary)
        if (folder / NOTES).is_file():
            notes = load_notes(folder)
            found = load_base_of(folder, notes, "base", base)
            where = base or notes.base
            if Path(where).is_absolute() or Path(where).is_dir():
                raise UserError(
                    f"The adapter in '{folder}' belongs to the base '{where}', which others don't have: publish that first, and "
                    "name its repository with base=owner/name."
                )
            found.transformer.connect(notes.interface, f"The adapter in '{folder}'")
            _check_adapter(found.transformer, folder)
            _copy(folder, target, ADAPTER_FILES)
            write_json(target / NOTES, read_json(folder / NOTES) | {"base": where})
            settings = read_json(folder / "adapter_config.json") | {"base_model_name_or_path": where}
            write_json(target / "adapter_config.json", settings)
            card = Card(repo, where, (notes.task,), notes.interface.in_words, result)
        else:
            found = load_base(str(folder))
            _copy(folder, target, MODEL_FILES)
            tasks = (found.task,) if found.task else tuple(found.tasks)
            sees = "; ".join(dict.fromkeys(own.in_words for own in found.model.interfaces.values()))
            card = Card(repo, None, tasks, sees, result)
        own = folder / "README.md"
        (target / "README.md").write_text(own.read_text("utf-8") if own.is_file() else str(card), "utf-8")
        yield target


def _check_adapter(model: Any, folder: Path) -> None:
    from eva_rl.adapter import load_adapter

    load_adapter(model, folder)


def _copy(folder: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        shutil.copy(folder / name, target / name)


def publish(path: str, repo: str, base: str | None = None, private: bool = False) -> str:
    """Push a run's adapter or model, or a checkpoint, to the Hugging Face repository `owner/name`, and return its URL.

    Raises:
        UserError: if there is nothing whole to publish, or the Hub refuses it.
    """
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise UserError(f"repo must be owner/name, got {repo}.")
    with staged(path, repo, base) as folder:
        from huggingface_hub import HfApi

        hub = HfApi()
        try:
            hub.create_repo(repo, private=private, exist_ok=True)
            hub.upload_folder(repo_id=repo, folder_path=folder, commit_message="Publish with eva_rl")
        except Exception as error:
            raise UserError(
                f"'{repo}' can't be published ({type(error).__name__}: {in_one_line(error)[:200]}): check the name, log in with "
                "`hf auth login`, or connect to the internet."
            ) from error
    return f"https://huggingface.co/{repo}"
