"""The command line `condlr`: convert, report, attack, fold, densify, export and push models."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, PreTrainedModel

from hf_condlr.checkpoints import load as loading  # noqa: F401  # registers itself: factored checkpoints load
from hf_condlr.config import CHOICES, CondLRConfig
from hf_condlr.conversion.convert import get_robust_lowrank_model
from hf_condlr.conversion.fold import fold_model, to_dense_model
from hf_condlr.conversion.onnx import export_onnx
from hf_condlr.errors import CondLRError, ConfigError
from hf_condlr.layers import condition_report, conversion_record
from hf_condlr.robustness.attacks import ATTACKS, make_attacks
from hf_condlr.robustness.evaluation import evaluate_robustness, load_split

EPILOG = """examples:
  condlr convert bert-base-uncased small --compression_ratio 0.5     # untrained yet: train it with CondLRTrainer
  condlr report outputs/vit                                          # rank, κ, bound, size of every layer
  condlr attack outputs/vit --dataset beans --attack pgd-linf --epsilon 2/255 4/255 8/255
  condlr fold outputs/vit outputs/vit-folded                         # two factors a layer, for inference
  condlr densify outputs/vit outputs/vit-dense                       # an ordinary checkpoint, for any program
  condlr export outputs/vit vit.onnx                                 # pip install 'hf_condlr[onnx]'
  condlr push outputs/vit me/vit --private

MODEL is a folder or a name on the Hub, dense or factored."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it did what it was asked, 1 after an error said on stderr, 2 for a wrong call."""
    args = _parser().parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    try:
        args.run(args)
    except (CondLRError, HfHubHTTPError, SafetensorError, OSError, ValueError) as error:
        sys.stderr.write(f"condlr {args.command}: {error}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="condlr",
        description="Robust low-rank models: every weight U S Vᵀ, well conditioned.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str, run: Callable[[argparse.Namespace], None], text: str, *arguments: str
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("model", metavar="MODEL", help="folder or name on the Hub")
        command.set_defaults(run=run)
        for argument in arguments:
            command.add_argument(argument.lower(), metavar=argument, help=_HELP[argument])
        return command

    convert = add("convert", _convert, "factor a dense model's layers by truncated SVD, and save it", "OUT")
    convert.add_argument("--config", metavar="FOLDER", help="folder of a saved CondLRConfig, instead of what follows")
    rank = convert.add_mutually_exclusive_group()
    rank.add_argument("--compression_ratio", type=float, metavar="C", help="share of the weights removed, in (0, 1)")
    rank.add_argument("--rank_ratio", type=float, metavar="Q", help="rank as a share of min(in, out), in (0, 1]")
    rank.add_argument("--r", type=int, metavar="R", help="rank")
    convert.add_argument("--target_modules", nargs="+", metavar="NAME", help="suffixes, or one regex; all-linear")
    convert.add_argument("--tau", metavar="T", help="condition numbers stay ≤ 1 + T in training; 0.1, inf for none")
    convert.add_argument("--head", choices=CHOICES["head"], help="what becomes of the output layer; dense")
    convert.add_argument("--rank_allocation", choices=CHOICES["rank_allocation"], help="of C; uniform")
    convert.add_argument("--rank_multiple", type=int, metavar="N", help="ranks from C or Q are multiples of N; 1")

    report = add("report", _report, "rank, condition number, bound and size of every factored layer")
    report.add_argument("--json", action="store_true", help="as JSON")
    report.add_argument("--plot", metavar="FILE", help="draw the spectra; pip install 'hf_condlr[plot]'")

    attack = add("attack", _attack, "accuracy under adversarial attacks, with checks that the attacks worked")
    attack.add_argument("--dataset", required=True, help="name on the Hub, folder of images or parquet, a parquet file")
    attack.add_argument("--dataset_config", metavar="NAME", help="configuration of a data set that has several")
    attack.add_argument("--split", help="test if there is one, else validation, else train")
    attack.add_argument("--attack", nargs="+", metavar="NAME", help=f"{', '.join(ATTACKS)}; a standard set")
    attack.add_argument("--epsilon", nargs="+", metavar="E", help="budgets, 8/255 or 0.03; with --attack")
    attack.add_argument("--steps", type=int, metavar="N", help="gradient steps")
    attack.add_argument("--restarts", type=int, metavar="N", help="random starts, the worst counts")
    attack.add_argument("--max_samples", type=int, metavar="N", help="attack so many, drawn once; all")
    attack.add_argument("--batch_size", type=int, default=64, metavar="N", help="samples attacked together; 64")
    attack.add_argument("--image_column", metavar="NAME", help="where there are several columns of images")
    attack.add_argument("--text_columns", nargs="+", metavar="NAME", help="where there are more than one text, or two")
    attack.add_argument("--label_column", metavar="NAME", help="labels, label or label_ids")
    attack.add_argument(
        "--no_checks", action="store_true", help="leave out the checks, which attack a few samples more"
    )
    attack.add_argument("--output_dir", metavar="FOLDER", help="write report.json; go on there after an interruption")
    attack.add_argument("--save_examples", action="store_true", help="write adversarial examples there, as parquet")
    attack.add_argument("--json", action="store_true", help="print JSON instead of the table")
    attack.add_argument("--plot", metavar="FILE", help="draw accuracy over ε; pip install 'hf_condlr[plot]'")

    add("fold", _fold, "join U and S: two matrix products a layer, for inference", "OUT")
    add("densify", _densify, "multiply the factors out: a dense checkpoint for any program", "OUT")
    add("export", _export, "write an ONNX file, folded; needs pip install 'hf_condlr[onnx]'", "FILE")
    push = add("push", _push, "upload to the Hub, with a model card", "REPO")
    push.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    push.add_argument("--revision", metavar="BRANCH", help="branch; main")
    return parser


_HELP = {"OUT": "folder to write", "FILE": "file to write", "REPO": "user/name on the Hub"}


def _load(name: str) -> PreTrainedModel:
    """By the class that its config names: what was saved, with its head."""
    config = AutoConfig.from_pretrained(name)
    [architecture] = config.architectures or [None]
    model_class: Any = getattr(transformers, architecture or "", None)
    if model_class is None:
        raise ConfigError(
            "config.json must name an architecture of transformers",
            received=repr(architecture),
            remedy="Load the model in Python with its own class.",
        )
    return model_class.from_pretrained(name)


def _save(model: PreTrainedModel, args: argparse.Namespace) -> None:
    """The model, with the tokenizer or image processor of the one it was made from."""
    if Path(args.out).resolve() == Path(args.model).resolve():
        raise ConfigError("OUT must be another folder than MODEL", received=args.out, remedy="Name a new one.")
    model.save_pretrained(args.out)
    with contextlib.suppress(OSError, ValueError, ImportError):  # it has none, or one for an extra
        AutoProcessor.from_pretrained(args.model).save_pretrained(args.out)
    size = sum(path.stat().st_size for path in Path(args.out).glob("*.safetensors"))
    _say(f"wrote {args.out}: {model.num_parameters():,} parameters, {size:,} bytes of weights")


def _convert(args: argparse.Namespace) -> None:
    names = (
        "compression_ratio",
        "rank_ratio",
        "r",
        "target_modules",
        "tau",
        "head",
        "rank_allocation",
        "rank_multiple",
    )
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.config and given:
        raise ConfigError("--config holds all settings", received=", ".join(given), remedy="Give one or the other.")
    if "tau" in given:
        given["tau"] = given["tau"] if given["tau"] == "inf" else float(given["tau"])
    if len(given.get("target_modules", ())) == 1:
        [given["target_modules"]] = given["target_modules"]
    config: Any = CondLRConfig.from_pretrained(args.config) if args.config else CondLRConfig(**given)
    model = get_robust_lowrank_model(_load(args.model), config)
    _say(str(conversion_record(model).report))
    _save(model, args)


def _report(args: argparse.Namespace) -> None:
    report = condition_report(_load(args.model))
    _say(json.dumps(report.to_dict(), indent=2) if args.json else str(report))
    if args.plot:
        report.plot(args.plot)


def _attack(args: argparse.Namespace) -> None:
    if (args.attack is None) != (args.epsilon is None):
        given, missing = ("--attack", "--epsilon") if args.attack else ("--epsilon", "--attack")
        raise ConfigError("--attack and --epsilon belong together", received=f"only {given}", remedy=f"Add {missing}.")
    if args.attack is None and (args.steps or args.restarts):
        raise ConfigError("--steps and --restarts need --attack", received="no --attack", remedy="Name the attacks.")
    attacks = None
    if args.attack is not None:
        attacks = make_attacks(args.attack, args.epsilon, steps=args.steps, restarts=args.restarts)
    names = ("image_column", "text_columns", "label_column", "max_samples", "batch_size", "output_dir", "save_examples")
    report = evaluate_robustness(
        _load(args.model),
        load_split(args.dataset, args.dataset_config, args.split),
        attacks,
        processor=AutoProcessor.from_pretrained(args.model),
        checks=not args.no_checks,
        **{name: getattr(args, name) for name in names},
    )
    _say(json.dumps(report.to_dict(), indent=1) if args.json else str(report))
    if args.plot:
        report.plot(args.plot)


def _fold(args: argparse.Namespace) -> None:
    model = _load(args.model)
    condition_report(model)  # refuses a model without factors
    _save(fold_model(model), args)


def _densify(args: argparse.Namespace) -> None:
    model = _load(args.model)
    condition_report(model)
    _save(to_dense_model(model), args)


def _export(args: argparse.Namespace) -> None:
    path = export_onnx(_load(args.model), args.file)
    _say(f"wrote {path}: {path.stat().st_size:,} bytes")


def _push(args: argparse.Namespace) -> None:
    model: Any = _load(args.model)
    commit = model.push_to_hub(args.repo, private=args.private, revision=args.revision)
    with contextlib.suppress(OSError, ValueError, ImportError):
        AutoProcessor.from_pretrained(args.model).push_to_hub(args.repo, revision=args.revision)
    _say(f"pushed {commit.commit_url}")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
