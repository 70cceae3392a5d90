"""Runs -> Markdown tables, of the runs and of the methods: `python -m eva_rl.report runs/...`."""

import argparse
import sys
from pathlib import Path

from eva_rl.errors import UserError
from eva_rl.report.runs import read_results, table
from eva_rl.report.study import comparison


def main() -> None:
    parser = argparse.ArgumentParser("python -m eva_rl.report", description="Finished runs -> Markdown tables.")
    parser.add_argument("folders", nargs="+", type=Path, help="folders with runs somewhere below them")
    try:
        results, left_out = read_results(parser.parse_args().folders)
        if not results:
            raise UserError("There is no complete fine-tuning run in these folders.")
    except UserError as error:
        sys.exit(f"error: {error}")
    tables, amiss = comparison(results, ("base", "demonstrations", "steps"))
    for sentence in left_out + amiss:
        print(sentence, file=sys.stderr)
    print("\n\n".join([table(results), *tables]))


if __name__ == "__main__":
    main()
