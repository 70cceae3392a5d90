"""A run's base and adapter -> one checkpoint that needs no peft: `python -m eva_rl.merge run=...`."""

from pathlib import Path
from typing import TYPE_CHECKING, cast

from eva_rl.config import MergeConfig, entry_point

if TYPE_CHECKING:
    from eva_rl.model.action_model import ActionModel


@entry_point(MergeConfig, "merge")
def main(config: MergeConfig) -> None:
    from eva_rl.adapter import load_adapter
    from eva_rl.errors import UserError
    from eva_rl.model import find_adapter, load_base_of, load_notes, save_base

    folder = find_adapter(Path(config.run))
    if config.output is None and not Path(config.run).exists():
        raise UserError(
            f"'{config.run}' is a repository: say with output=... into which folder to write the checkpoint."
        )
    notes = load_notes(folder)
    output = Path(config.output) if config.output is not None else folder.parent / "model"
    if output.exists():
        raise UserError(f"'{output}' is there already: name another folder with output=..., or remove it.")
    base = load_base_of(folder, notes, "base", config.base)
    base.transformer.connect(notes.interface, f"The adapter in '{folder}'")
    merged = cast("ActionModel", load_adapter(base.transformer, folder))
    save_base(output, merged, base.tasks | {notes.task: notes.statistics}, notes.task)
    if notes.task.startswith("minari/"):
        from eva_rl.data import names_environment

        if not names_environment(notes.task.removeprefix("minari/")):
            return print(
                f"eva_rl.load_policy({str(output)!r}) acts with it: the dataset names no environment to evaluate it in"
            )
    print(f"python -m eva_rl.evaluate checkpoint={output} task={notes.task}")


if __name__ == "__main__":
    main()
