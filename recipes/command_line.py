"""Options of a recipe: from the command line, after those of a YAML or JSON file if one comes first."""

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def parse(dataclasses: Sequence[type], argv: Sequence[str], description: str) -> tuple[Any, ...]:
    """An instance of each dataclass; a mistake ends the program in one line.

    A file holds the names of the command line; what follows it on the command line wins. Options that are null in the
    file keep their default.
    """
    parser = HfArgumentParser(dataclasses, description=description, allow_abbrev=False)
    words = list(argv)
    try:
        if words and words[0].endswith((".yaml", ".yml", ".json")):
            options = yaml.safe_load(Path(words[0]).read_text())  # JSON is YAML
            require(isinstance(options, dict), f"{words[0]} must hold options and their values", options)
            words = [*itertools.chain.from_iterable(_words(*option) for option in options.items()), *words[1:]]
        return parser.parse_args_into_dataclasses(words)
    except (ValueError, OSError, yaml.YAMLError) as error:  # the library's errors about arguments are ValueErrors too
        parser.error(str(error))


def _words(name: str, value: Any) -> list[str]:
    """As on the command line, which knows each option's type (YAML takes 1e-3 for text)."""
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *(json.dumps(v) if isinstance(v, (dict, bool)) else str(v) for v in values)]


def require(condition: object, rule: str, received: object, remedy: str = "") -> None:
    """Raise a ValueError that names rule, received value and remedy, unless the condition holds."""
    if not condition:
        raise ValueError(f"{rule}; received {received!r}" + (f". {remedy}" if remedy else ""))


def require_joined(processes: int) -> None:
    """Refuse to run as several processes that do not know of each other: each would train and write alone.

    Args:
        processes: How many the program sees.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    require(
        started == processes,
        f"{started} processes were started and must work as one group",
        f"{processes} in a group",
        "Without a GPU add --use_cpu true.",
    )
