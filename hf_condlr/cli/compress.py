"""`condlr compress`, and the calibration data of `condlr convert`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import fields
from types import UnionType
from typing import Any, get_args, get_type_hints

from transformers.hf_argparser import string_to_bool

from hf_condlr.cli.models import attacks_of, load, processor_of, say, say_size
from hf_condlr.compression import CompressionArguments, compress
from hf_condlr.compression.arguments import InputArguments
from hf_condlr.errors import ConfigError
from hf_condlr.robustness.attacks import ATTACKS

DATASET = "name on the Hub, or a folder of images, of parquet, csv or text files"


def add_fields(option: Callable[..., Any], arguments: type, *, leave_out: Iterable[str] = ()) -> None:
    """Add an option for each field of a dataclass of options; it is None where it is not given."""
    hints = get_type_hints(arguments)
    for field in fields(arguments):
        kinds = [kind for kind in _kinds(hints[field.name]) if kind is not type(None)]
        name, text = f"--{field.name}", field.metadata["help"]
        if field.name in leave_out:
            continue
        if kinds == [bool]:
            option(name, type=string_to_bool, nargs="?", const=True, metavar="BOOL", help=text)
        else:
            kind = kinds[0] if len(kinds) == 1 and kinds[0] in (int, float) else str
            option(
                name,
                type=kind,
                nargs="+" if list[str] in kinds else None,
                choices=field.metadata.get("choices"),
                help=text,
            )


def _kinds(hint: Any) -> list[Any]:
    return list(get_args(hint)) if isinstance(hint, UnionType) else [hint]


def given_fields(args: argparse.Namespace, arguments: type) -> dict[str, Any]:
    """The fields that were given on the command line; a list of one module is a name or a regex."""
    values = {field.name: getattr(args, field.name, None) for field in fields(arguments)}
    values = {name: value for name, value in values.items() if value is not None}
    for name in ("target_modules", "exclude_modules"):
        if isinstance(given := values.get(name), list) and len(given) == 1:
            [values[name]] = given
    return values


def add_compress(option: Callable[..., Any]) -> None:
    """Add the options of `condlr compress`."""
    option("--dataset", required=True, help=f"{DATASET}, with a split train and test or validation")
    option("--output", required=True, metavar="OUT", help="folder to write; an interrupted run resumes there")
    add_fields(option, CompressionArguments, leave_out=("output_dir",))
    option("--attack", nargs="+", metavar="NAME", help=f"{', '.join(ATTACKS)}; none; default: PGD of 10 steps")
    option("--epsilon", nargs="+", metavar="E", help="budgets, 1/255 or 0.02; with --attack")
    option("--steps", type=int, metavar="N", help="gradient steps of these attacks")


def run_compress(args: argparse.Namespace) -> None:
    """Compress a model, save it, and say the table."""
    import datasets

    datasets.disable_progress_bars()  # of many short steps
    model, report = compress(
        load(args),
        args.dataset,
        output_dir=args.output,
        processor=processor_of(args),
        attacks=_attacks(args),
        **given_fields(args, CompressionArguments),
    )
    say(str(report))
    say_size(model, args.output)


def add_calibration(option: Callable[..., Any]) -> None:
    """Add the options of `condlr convert` that make calibration data."""
    best = "a trained model loses least with --init_weights fisher --rank_allocation fisher --conditioned_start --tau 4"
    option("--dataset", help=f"calibration data, of the split train: {DATASET}; {best}")
    add_fields(option, InputArguments)


def calibration_data(args: argparse.Namespace, model: Any) -> Any:
    """Batches of the data set that was named; None without one."""
    inputs = given_fields(args, InputArguments)
    if args.dataset is None:
        given = ", ".join(f"--{name}" for name in inputs)
        if given:
            raise ConfigError("these need --dataset", received=given, remedy="Name the calibration data.")
        return None
    from hf_condlr.compression.data import load_data  # needs datasets
    from hf_condlr.compression.tasks import task_of

    arguments = InputArguments(**inputs)
    task = task_of(model, processor_of(args), arguments)
    data, _ = load_data(args.dataset, arguments.dataset_config)
    return task.calibration_data(task.columns(data)["train"])


def _attacks(args: argparse.Namespace) -> Any:
    if args.attack != ["none"]:
        return attacks_of(args)
    rule, received = "--attack none takes no budgets", f"--epsilon {args.epsilon}, --steps {args.steps}"
    if args.epsilon is not None or args.steps is not None:
        raise ConfigError(rule, received=received, remedy="Leave them out.")
    return ()
