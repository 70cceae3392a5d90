"""Runs -> one Markdown table: `python -m eva_rl.report runs/...`."""

import argparse
import sys
from pathlib import Path

from eva_rl.errors import UserError
from eva_rl.report.runs import read_results, table


def main() -> None:
    parser = argparse.ArgumentParser("python -m eva_rl.report", description="Finished runs -> one Markdown table.")
    parser.add_argument("folders", nargs="+", type=Path, help="folders with runs somewhere below them")
    try:
        results, left_out = read_results(parser.parse_args().folders)
        if not results:
            raise UserError("There is no complete fine-tuning run in these folders.")
    except UserError as error:
        sys.exit(f"error: {error}")
    for sentence in left_out:
        print(sentence, file=sys.stderr)
    print(table(results))


if __name__ == "__main__":
    main()
