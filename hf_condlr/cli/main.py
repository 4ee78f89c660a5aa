"""The command line `condlr`: convert, compress, report, attack, fold, densify, export and push models."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import transformers
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError

from hf_condlr.cli.compress import add_calibration, add_compress, calibration_data, given_fields, run_compress
from hf_condlr.cli.models import NO_PROCESSOR, attacks_of, load, processor_of, save, say
from hf_condlr.config import CHOICES, CondLRConfig
from hf_condlr.conversion.convert import get_robust_lowrank_model
from hf_condlr.conversion.fold import fold_model, to_dense_model
from hf_condlr.conversion.onnx import export_onnx
from hf_condlr.errors import CondLRError, ConfigError
from hf_condlr.layers import InferenceForm, condition_report, conversion_record
from hf_condlr.robustness.attacks import ATTACKS
from hf_condlr.robustness.evaluation import evaluate_robustness, load_split
from hf_condlr.robustness.evaluation.provenance import versions

EPILOG = """examples:
  condlr compress outputs/vit --dataset beans --ratio 0.6 --output small    # a trained model: measured, saved, reported
  condlr convert bert-base-uncased small --compression_ratio 0.5     # untrained yet: train it with CondLRTrainer
  condlr report outputs/vit                                          # rank, κ, bound, size of every layer
  condlr attack outputs/vit --dataset beans --attack pgd-linf --epsilon 2/255 4/255 8/255
  condlr fold outputs/vit outputs/vit-folded                         # two factors a layer, for inference
  condlr densify outputs/vit outputs/vit-dense                       # an ordinary checkpoint, for any program
  condlr export outputs/vit vit.onnx                                 # pip install 'hf_condlr[onnx]'
  condlr push outputs/vit me/vit --private

MODEL is a folder or a name on the Hub, dense or factored."""

# Fields of CondLRConfig, and their types.
_CONVERSION: dict[str, Callable[[str], Any]] = {"compression_ratio": float, "rank_ratio": float, "r": int, "tau": float}
_CONVERSION |= {"head": str, "rank_allocation": str, "rank_multiple": int, "init_weights": str}
_FLAGS = ("sequential_calibration", "conditioned_start")
_CHECKS: dict[str, Any] = {"full": True, "quick": "quick", "none": False}
_TARGETS = {"out": "folder to write", "file": "file to write", "repo": "user/name on the Hub"}
_NETWORK_ERRORS: Any = HfHubHTTPError.__bases__  # the HTTP library's own, whichever huggingface_hub uses, and OSError
_ERRORS: Any = (CondLRError, SafetensorError, ValueError, ImportError, re.error, *_NETWORK_ERRORS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it did what it was asked, 1 after an error reported on stderr, 2 for a wrong call."""
    args = _parser().parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    try:
        if "out" in args and Path(args.out).resolve() == Path(args.model).resolve():
            raise ConfigError("OUT must be another folder than MODEL", received=args.out, remedy="Name a new one.")
        args.run(args)
    except _ERRORS as error:
        text = " ".join(str(error).split())
        if isinstance(error, _NETWORK_ERRORS) and not isinstance(error, OSError):
            text = f"the Hub cannot be reached: {text}. Check the network and HF_ENDPOINT."
        sys.stderr.write(f"condlr {args.command}: {text}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="condlr",
        description="Robust low-rank models: every weight U S Vᵀ, well conditioned.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="say the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(run: Callable[[argparse.Namespace], None], text: str, target: str = "") -> Callable[..., Any]:
        """Add a command named like its function; returns what adds an option to it."""
        command = commands.add_parser(run.__name__.strip("_"), help=text, description=text, allow_abbrev=False)
        command.add_argument("model", metavar="MODEL", type=_nonempty, help="folder or name on the Hub")
        if target:
            command.add_argument(target, metavar=target.upper(), type=_nonempty, help=_TARGETS[target])
        option = command.add_argument
        option("--trust_remote_code", action="store_true", help="run the Python code of MODEL's repository")
        command.set_defaults(run=run)
        return option

    add_compress(add(_compress, "compress a trained model within a bound on κ, and report what it costs"))

    option = add(_convert, "factor a dense model's layers, and save it", "out")
    option("--config", metavar="FOLDER", help="folder of a saved CondLRConfig, instead of what follows")
    config = {field.name: field.metadata.get("help") for field in fields(CondLRConfig)}
    option("--target_modules", nargs="+", metavar="NAME", help=config["target_modules"])
    for name, kind in _CONVERSION.items():
        option(f"--{name}", type=kind, choices=CHOICES.get(name), help=config[name])

    for name in _FLAGS:
        option(f"--{name}", action="store_true", default=None, help=config[name])
    add_calibration(option)

    option = add(_report, "rank, condition number, bound and size of every factored layer")
    option("--json", action="store_true", help="print JSON instead of the table")
    option("--plot", metavar="FILE", help="draw the spectra; pip install 'hf_condlr[plot]'")

    option = add(_attack, "accuracy under adversarial attacks, with checks that the attacks worked")
    option("--dataset", required=True, help="name on the Hub, folder of images or parquet, a parquet file")
    option("--dataset_config", metavar="NAME", help="configuration of a data set that has several")
    option("--split", help="default: test if there is one, else validation, else train")
    option("--image_column", metavar="NAME", help="where there are several columns of images")
    option("--text_columns", nargs="+", metavar="NAME", help="where there are several columns of text")
    option("--label_column", metavar="NAME", help="default: labels, label or label_ids")
    option("--max_samples", type=int, metavar="N", help="attack this many, drawn once; default: all")
    option("--batch_size", type=int, default=64, metavar="N", help="samples attacked together; default: 64")
    option("--attack", nargs="+", metavar="NAME", help=f"{', '.join(ATTACKS)}; default: a standard set")
    option("--epsilon", nargs="+", metavar="E", help="budgets, 8/255 or 0.03; with --attack")
    option("--steps", type=int, metavar="N", help="gradient steps")
    option("--restarts", type=int, metavar="N", help="random starts, the worst counts")
    option("--checks", choices=_CHECKS, default="full", help="further attacks that look for signs of a false result")
    option("--output_dir", metavar="FOLDER", help="write report.json; resume there after an interruption")
    option("--save_examples", action="store_true", help="write adversarial examples there, as parquet")
    option("--json", action="store_true", help="print JSON instead of the table")
    option("--plot", metavar="FILE", help="draw accuracy over ε; pip install 'hf_condlr[plot]'")

    option = add(_fold, "put two matrix products in place of three in each layer, for inference", "out")
    forms = "folded: r(m+n) weights for a layer (m, n) of rank r; pivoted: r(m+n-r); default: folded"
    option("--form", choices=get_args(InferenceForm), default="folded", help=forms)
    add(_densify, "multiply the factors out: a dense checkpoint for any program", "out")
    add(_export, "write an ONNX file, folded; needs pip install 'hf_condlr[onnx]'", "file")
    option = add(_push, "upload a factored or folded model to the Hub, with a model card", "repo")
    option("--private", action="store_true", default=None, help="make a new repository private")
    option("--revision", metavar="BRANCH", help="branch; default: main")
    return parser


class _Version(argparse.Action):
    """Looks the version up when it is asked for, not for every command."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        say(f"condlr {versions().get('hf_condlr', 'from a source tree')}")
        parser.exit()


def _nonempty(value: str) -> str:
    if not value.strip():
        raise argparse.ArgumentTypeError("must not be empty")  # it would mean the working directory
    return value


def _show(report: Any, args: argparse.Namespace) -> None:
    say(json.dumps(report.to_dict(), indent=1) if args.json else str(report))
    if args.plot:
        report.plot(args.plot)


def _compress(args: argparse.Namespace) -> None:
    run_compress(args)


def _convert(args: argparse.Namespace) -> None:
    given = given_fields(args, CondLRConfig)
    if args.config and given:
        raise ConfigError("--config holds all settings", received=", ".join(given), remedy="Give one or the other.")
    config: Any = CondLRConfig.from_pretrained(args.config) if args.config else CondLRConfig(**given)
    model = load(args)
    get_robust_lowrank_model(model, config, calibration_data=calibration_data(args, model))
    say(str(conversion_record(model).report))
    save(model, args)


def _report(args: argparse.Namespace) -> None:
    _show(condition_report(load(args)), args)


def _attack(args: argparse.Namespace) -> None:
    names = ["image_column", "text_columns", "label_column", "max_samples", "batch_size", "output_dir", "save_examples"]
    report = evaluate_robustness(
        load(args),
        load_split(args.dataset, args.dataset_config, args.split),
        attacks_of(args),
        processor=processor_of(args),
        checks=_CHECKS[args.checks],
        **{name: getattr(args, name) for name in names},
    )
    _show(report, args)


def _fold(args: argparse.Namespace) -> None:
    save(fold_model(load(args, compressed=True), args.form), args)


def _densify(args: argparse.Namespace) -> None:
    save(to_dense_model(load(args, compressed=True)), args)


def _export(args: argparse.Namespace) -> None:
    path = export_onnx(load(args), args.file)
    say(f"wrote {path}: {path.stat().st_size:,} bytes")


def _push(args: argparse.Namespace) -> None:
    model: Any = load(args, compressed=True)
    card = Path(args.model) / REPOCARD_NAME  # the folder's own
    options = {"private": args.private, "revision": args.revision}
    commit = model.push_to_hub(args.repo, card=card if card.is_file() else None, **options)
    with contextlib.suppress(*NO_PROCESSOR):
        processor_of(args).push_to_hub(args.repo, revision=args.revision)
    say(f"pushed {commit.commit_url}")
