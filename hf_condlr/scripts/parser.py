"""`ScriptParser`: the options of a training script, from a YAML file and the command line."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml  # type: ignore[import-untyped]
from transformers import HfArgumentParser, TrainingArguments

from hf_condlr.scripts.checks import check

HELP = (
    "A YAML or JSON file of options may come first; the command line wins. Every option of transformers' "
    "TrainingArguments is taken, too: --help_trainer lists them."
)
TRAINER = {option.name for option in fields(TrainingArguments)}


class ScriptParser(HfArgumentParser):
    """Fills dataclasses from the command line, after the options of a YAML or JSON file if one comes first.

    The file holds the names of the command line; an option that is null in it keeps its default. A mistake in either
    ends the program with one line that names it. `--help` lists the options of the dataclasses without those of
    transformers' `TrainingArguments`, which `--help_trainer` lists.

    Args:
        dataclass_types: A dataclass, or several; each becomes a group of options under the first line of its docstring.
        description: Text for `--help`.

    Examples:
        >>> parser = ScriptParser((ModelArguments, DatasetArguments, CondLRTrainingArguments))
        >>> model_args, data_args, training_args = parser.parse(["run.yaml", "--learning_rate", "1e-3"])
    """

    def __init__(self, dataclass_types: Any, *, description: str | None = None) -> None:
        texts = {"description": description, "epilog": HELP, "usage": "%(prog)s [FILE] [OPTIONS]"}
        super().__init__(dataclass_types, formatter_class=_HelpFormatter, allow_abbrev=False, **texts)
        self.add_argument("--help_trainer", action="help", help="list the options of TrainingArguments and exit")

    def parse(self, arguments: Sequence[str] | None = None) -> tuple[Any, ...]:
        """Return an instance of each dataclass.

        Args:
            arguments: Words of a command line; by default those that the program was started with.
        """
        words = list(sys.argv[1:] if arguments is None else arguments)
        try:
            if words and words[0].endswith((".yaml", ".yml", ".json")):
                words = [*_words_of_file(Path(words[0])), *words[1:]]
            self._show_trainer("--help_trainer" in words)
            *parsed, unknown = self.parse_args_into_dataclasses(
                words, return_remaining_strings=True, look_for_args_file=False
            )
            if unknown:
                name = next((word for word in unknown if word.startswith("--")), unknown[0])
                near = difflib.get_close_matches(name, self._option_string_actions, n=1)
                self.error(f"unknown option {name}" + (f"; did you mean {near[0]}?" if near else ""))
            for part in parsed:
                if isinstance(part, TrainingArguments):
                    require_one_group(part.world_size)
            return tuple(parsed)
        except (ValueError, OSError, yaml.YAMLError) as error:  # errors about arguments are ValueErrors, too
            self.error(str(error))

    def error(self, message: str) -> NoReturn:
        """End the program with one line; argparse would put all options before it."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (--help lists the options)\n")

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        title = "Training" if issubclass(dtype, TrainingArguments) else (dtype.__doc__ or dtype.__name__)
        group: Any = self.add_argument_group(title.splitlines()[0].rstrip("."))
        hints = get_type_hints(dtype)
        for option in fields(dtype):
            if option.init:
                option.type = hints[option.name]
                if {str, list[str]} <= {*get_args(option.type)}:
                    text = option.metadata.get("help")
                    group.add_argument(
                        f"--{option.name}", nargs="+", action=_OneOrMore, default=option.default, help=text
                    )
                else:
                    self._parse_dataclass_field(group, option)

    def _show_trainer(self, trainer: bool) -> None:
        """Hide from the help the options of `TrainingArguments` or all others, and each --no_... of an option."""
        for action in self._actions:
            negates = action.option_strings[0].startswith("--no_") and action.const is False
            if negates or ((action.dest in TRAINER) != trainer and action.dest != "help"):
                action.help = argparse.SUPPRESS


class _OneOrMore(argparse.Action):
    """A text, or a list of several; transformers would make a list of one text and drop the default."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows an option once, not with hyphens too, and no default that says nothing."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        values = "" if action.nargs in (0, "?") else f" {self._format_args(action, action.dest.upper())}"
        return action.option_strings[-1 if action.dest == "help" else 0] + values

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, [], argparse.SUPPRESS) else super()._get_help_string(action)


def require_one_group(processes: int) -> None:
    """Refuse to run as several processes that do not know of each other: each would train and write alone.

    Args:
        processes: Number of processes that this one knows of, itself included.

    Raises:
        ConfigError: More of them were started.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    rule, remedy = f"{started} processes were started and must work as one group", "Without a GPU add --use_cpu true."
    check(started == processes, rule, f"{processes} in a group", remedy)


def _words_of_file(path: Path) -> list[str]:
    """The options of a file as words of a command line, whose types decide: YAML reads 1e-3 as text."""
    options = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    rule, remedy = f"{path} must hold options and their values", "Write `name: value`, one option a line."
    check(isinstance(options, dict), rule, repr(options), remedy)
    words = []
    for name, value in options.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(json.dumps(v) if isinstance(v, (dict, bool)) else str(v) for v in values)]
    return words
