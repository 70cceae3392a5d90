"""A run with EVA -> the pictures of `docs/eva.md`: `python -m tools.eva_pictures RUN_OF_EVA RUN_OF_EVA_RHO2 [FOLDER]`."""

import json
import sys
from pathlib import Path

from eva_rl.run.eva import GROUP, eva_figures

PICTURES = {"eva": ("spectrum", "batches"), "eva_rho2": ("rank",)}
"""Of each run, in the order of the command line."""


def main() -> None:
    *runs, folder = [Path(name) for name in sys.argv[1:]] + [Path("docs/images")] * (len(sys.argv) == 3)
    folder.mkdir(parents=True, exist_ok=True)
    for run, (method, pictures) in zip(runs, PICTURES.items(), strict=True):
        figures = eva_figures(json.loads((run / "eva.json").read_text())["layers"])
        for picture in pictures:
            figures[f"{GROUP}/{picture}"].savefig(
                folder / f"{method}-{picture}.png", dpi=80, metadata={"Software": None}
            )


if __name__ == "__main__":
    main()
