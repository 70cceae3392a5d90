"""Runs -> tables, CSV, pictures and TensorBoard's HParams: `python -m eva_rl.report runs/...`."""

import argparse
import sys
from pathlib import Path

from eva_rl.errors import UserError, refused_path, while_read
from eva_rl.report.document import document, save_report
from eva_rl.report.methods import studies
from eva_rl.report.runs import read_results


def _folder(given: str) -> Path:
    if not given:
        raise argparse.ArgumentTypeError("an empty name was given where a folder was expected")
    return Path(given)


def main() -> None:
    parser = argparse.ArgumentParser("python -m eva_rl.report", description=__doc__.partition(":")[0] + ".")
    parser.add_argument("folders", nargs="+", type=_folder, help="folders with runs somewhere below them")
    parser.add_argument(
        "--output", type=_folder, help="where the report is written; report/ in the first folder by default"
    )
    arguments = parser.parse_args()
    try:
        results, left_out = read_results(arguments.folders)
        if not results:
            print(*left_out, sep="\n", end="\n" if left_out else "", file=sys.stderr)
            raise UserError("There is no complete fine-tuning run in these folders.")
        compared = studies(results)
        output = arguments.output or arguments.folders[0] / "report"
        save_report(output, results, compared, left_out)
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if not (said := refused_path(error)):
            raise
        sys.exit(f"error: {said}")
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
    for sentence in left_out + [sentence for study in compared for sentence in study.amiss]:
        print(sentence, file=sys.stderr)
    with while_read():
        print(document(results, compared))
        print(f"{output}: the same with pictures, CSV, and `tensorboard --logdir {output / 'hparams'}`")


if __name__ == "__main__":
    main()
