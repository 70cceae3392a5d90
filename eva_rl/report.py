"""Runs -> tables, CSV, pictures and TensorBoard's HParams: `python -m eva_rl.report runs/...`."""

import argparse
import sys
from pathlib import Path

from eva_rl.errors import UserError, refused_path, while_read
from eva_rl.study import compare, document, pack, save_report


def _folder(given: str) -> Path:
    if not given:
        raise argparse.ArgumentTypeError("it must be the name of a folder, got an empty one")
    return Path(given)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m eva_rl.report", description=(__doc__ or "").partition(":")[0] + ".")
    parser.add_argument("folders", nargs="+", type=_folder, help="folders with runs somewhere below them")
    parser.add_argument(
        "--output", type=_folder, help="where the report is written; report/ in the first folder by default"
    )
    parser.add_argument("--pictures", choices=("png", "svg"), default="png", help="the kind of files, png by default")
    parser.add_argument(
        "--pack", action="store_true", help="first add finished runs to runs.jsonl in their folder, a row a run"
    )
    return parser.parse_args()


def _report(arguments: argparse.Namespace) -> None:
    packed = [sentence for folder in arguments.folders for sentence in pack(folder)] if arguments.pack else []
    print(*packed, sep="\n", end="\n" if packed else "", file=sys.stderr)
    comparison = compare(arguments.folders)
    if not comparison.runs:
        print(*comparison.left_out, sep="\n", end="\n" if comparison.left_out else "", file=sys.stderr)
        raise UserError("There is no complete fine-tuning run in these folders.")
    output = arguments.output or arguments.folders[0] / "report"
    save_report(output, comparison, arguments.pictures)
    for sentence in comparison.amiss:
        print(sentence, file=sys.stderr)
    with while_read():
        print(document(comparison))
        print(f"{output}: the same with pictures, CSV, and `tensorboard --logdir {output / 'hparams'}`")


def main() -> None:
    arguments = _arguments()
    try:
        _report(arguments)
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if not (said := refused_path(error)):
            raise
        sys.exit(f"error: {said}")
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
