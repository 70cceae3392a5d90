"""A user's files -> a Minari dataset: `python -m eva_rl.convert source=PATH dataset=mine/name-v0`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from eva_rl.config import ConvertConfig, entry_point

if TYPE_CHECKING:
    from eva_rl.convert.conversion import Found
    from eva_rl.convert.episodes import Columns
    from eva_rl.convert.taken import Column


@entry_point(ConvertConfig, "convert")
def main(config: ConvertConfig) -> None:
    from eva_rl.convert.conversion import convert
    from eva_rl.convert.episodes import Columns

    columns = Columns(**asdict(config.columns)).over(_mapping(config.mapping))
    found = convert(
        config.source,
        config.dataset,
        config.format,
        columns,
        config.actions,
        config.environment,
        config.skip_bad,
        config.overwrite,
    )
    _show(found)
    rollouts = "" if config.environment else " episodes=0"  # files have no simulator
    print(f"\npython -m eva_rl.finetune task=minari/{found.dataset_id}{rollouts}")


def _mapping(file: str | None) -> Columns:
    import yaml

    from eva_rl.convert.episodes import Columns
    from eva_rl.errors import UserError, in_one_line

    if file is None:
        return Columns()
    try:
        mapping = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"mapping={file} can't be read ({in_one_line(error)[:200]}).") from error
    if not isinstance(mapping, dict):
        raise UserError(f"mapping={file} holds no names of columns such as 'actions: [gripper, arm]'.")
    return Columns.of(mapping, f"mapping={file}")


def _show(found: Found) -> None:
    from statistics import median

    from eva_rl.table import markdown

    summary = found.summary
    print(
        markdown(
            ["taken for", "column", "shape", "type", "least", "largest"],
            [
                (column.role, name, " x ".join(map(str, column.shape)) or "1", column.dtype, *_pair(column))
                for name, column in summary.columns.items()
            ],
        )
    )
    lengths, returns = summary.lengths, summary.returns
    rows = [("episodes", len(lengths)), ("steps", sum(lengths))]
    rows += [("steps of an episode, least, median, most", f"{min(lengths)}, {median(lengths):g}, {max(lengths)}")]
    if summary.rewards:
        rows += [("returns, least, median, best", f"{min(returns):.4g}, {median(returns):.4g}, {max(returns):.4g}")]
    rows += [("observations", found.observation_space), ("actions", found.action_space)]
    print("\n" + markdown([f"{found.dataset_id}, from {found.kind}", ""], rows))
    if found.left_out:
        print("\n" + markdown(["left out", "because"], found.left_out))
    if not summary.rewards:
        print(
            "\nNo rewards were found: all are zero, and the return that the model is asked for is the same throughout."
        )


def _pair(column: Column) -> tuple[str, str]:
    return f"{column.low:.4g}", f"{column.high:.4g}"


if __name__ == "__main__":
    main()
