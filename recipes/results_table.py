"""Runs of the recipes side by side, as a Markdown table.

    python recipes/results_table.py outputs/lm/dense outputs/lm/lowrank outputs/lm/condlr

Reads what the recipes write in their output folders: `settings.json` and `all_results.json`.
"""

import json
import re
import sys
from pathlib import Path

SHOWN = re.compile(r"(test|validation)_(\w*accuracy\w*|perplexity|kappa_max|compression)|start_perplexity")


def table(folders: list[Path]) -> str:
    """A row for each finished run.

    Raises:
        SystemExit: A folder is no finished run of a recipe.
    """
    runs = []
    for folder in folders:
        try:
            settings, results = (json.loads((folder / f"{n}.json").read_text()) for n in ("settings", "all_results"))
        except OSError as error:
            sys.exit(
                f"{folder} must be the output folder of a finished run of a recipe; received {error}. Name others."
            )
        runs.append(([str(folder), settings["method"], f"{settings['learning_rate']:g}"], results))
    names = list(dict.fromkeys(name for _, results in runs for name in sorted(results) if SHOWN.fullmatch(name)))
    lines = [["run", "method", "learning rate", *names]]
    for said, results in runs:
        lines.append([*said, *(f"{results[name]:.4g}" if name in results else "" for name in names)])
    lines.insert(1, ["---"] * 3 + ["---:"] * len(names))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python recipes/results_table.py FOLDER [FOLDER ...]")
    print(table([Path(name) for name in sys.argv[1:]]))
