"""A run or a checkpoint -> one file that acts without this project: `python -m eva_rl.export run=... format=onnx`."""

from pathlib import Path

from eva_rl.config import ExportConfig, entry_point


@entry_point(ExportConfig, "export")
def main(config: ExportConfig) -> None:
    from eva_rl.errors import UserError
    from eva_rl.policy import SUFFIXES, export_policy, load_policy

    if config.format not in SUFFIXES:
        raise UserError(f"format must be {' or '.join(SUFFIXES)}, got {config.format}.")
    run = Path(config.run)
    folder = run if any((run / part).is_dir() for part in ("adapter", "model")) else Path()
    output = Path(config.output) if config.output is not None else folder / f"policy{SUFFIXES[config.format]}"
    if output.exists():
        raise UserError(f"'{output}' is there already: name another file with output=..., or remove it.")
    export_policy(load_policy(config.run, config.task, base=config.base), config.format, output)
    print(output)


if __name__ == "__main__":
    main()
