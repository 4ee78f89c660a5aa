"""The command line `condlr`: convert, report, attack, fold, densify, export and push models."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import HfApi
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, PreTrainedModel

from hf_condlr.checkpoints import load as loading  # noqa: F401  # registers itself: factored checkpoints load
from hf_condlr.checkpoints.card_origin import is_hub_id
from hf_condlr.checkpoints.publish import remove_leftovers
from hf_condlr.config import CHOICES, CondLRConfig
from hf_condlr.conversion.convert import get_robust_lowrank_model
from hf_condlr.conversion.fold import fold_model, to_dense_model
from hf_condlr.conversion.onnx import export_onnx
from hf_condlr.errors import CondLRError, ConfigError, require
from hf_condlr.layers import compressed_layers, condition_report, conversion_record, factored_layers
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
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("model", metavar="MODEL", type=_nonempty, help="folder or name on the Hub")
        command.add_argument(
            "--trust_remote_code", action="store_true", help="run the Python code of MODEL's repository"
        )
        command.set_defaults(run=run)
        return command

    convert = add("convert", _convert, "factor a dense model's layers by truncated SVD, and save it")
    convert.add_argument("out", metavar="OUT", type=_nonempty, help="folder to write")
    _add_conversion(convert)
    report = add("report", _report, "rank, condition number, bound and size of every factored layer")
    report.add_argument("--json", action="store_true", help="print JSON instead of the table")
    report.add_argument("--plot", metavar="FILE", help="draw the spectra; pip install 'hf_condlr[plot]'")
    _add_attack(add("attack", _attack, "accuracy under adversarial attacks, with checks that the attacks worked"))
    for name, run, text in (
        ("fold", _fold, "join U and S: two matrix products a layer, for inference"),
        ("densify", _densify, "multiply the factors out: a dense checkpoint for any program"),
    ):
        add(name, run, text).add_argument("out", metavar="OUT", type=_nonempty, help="folder to write")
    export = add("export", _export, "write an ONNX file, folded; needs pip install 'hf_condlr[onnx]'")
    export.add_argument("file", metavar="FILE", type=_nonempty, help="file to write")
    push = add("push", _push, "upload to the Hub, with a model card")
    push.add_argument("repo", metavar="REPO", type=_nonempty, help="user/name on the Hub")
    push.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    push.add_argument("--revision", metavar="BRANCH", help="branch; main")
    return parser


def _nonempty(value: str) -> str:
    if not value.strip():
        raise argparse.ArgumentTypeError("must not be empty")  # it would mean the working directory
    return value


def _add_conversion(convert: argparse.ArgumentParser) -> None:
    convert.add_argument("--config", metavar="FOLDER", help="folder of a saved CondLRConfig, instead of what follows")
    rank = convert.add_argument_group("rank, one of").add_mutually_exclusive_group()
    rank.add_argument("--compression_ratio", type=float, metavar="C", help="share of the weights removed, in (0, 1)")
    rank.add_argument("--rank_ratio", type=float, metavar="Q", help="rank as a share of min(in, out), in (0, 1]")
    rank.add_argument("--r", type=int, metavar="R", help="rank")
    more = convert.add_argument_group("layers and constraint")
    more.add_argument("--target_modules", nargs="+", metavar="NAME", help="suffixes, or one regex; all-linear")
    more.add_argument("--tau", metavar="T", help="condition numbers stay ≤ 1 + T in training; 0.1, inf for none")
    more.add_argument("--head", choices=CHOICES["head"], help="what becomes of the output layer; dense")
    more.add_argument("--rank_allocation", choices=CHOICES["rank_allocation"], help="of C; uniform")
    more.add_argument("--rank_multiple", type=int, metavar="N", help="ranks from C or Q are multiples of N; 1")


def _add_attack(attack: argparse.ArgumentParser) -> None:
    data = attack.add_argument_group("data")
    data.add_argument("--dataset", required=True, help="name on the Hub, folder of images or parquet, a parquet file")
    data.add_argument("--dataset_config", metavar="NAME", help="configuration of a data set that has several")
    data.add_argument("--split", help="test if there is one, else validation, else train")
    data.add_argument("--image_column", metavar="NAME", help="where there are several columns of images")
    data.add_argument("--text_columns", nargs="+", metavar="NAME", help="where there are more than one text, or two")
    data.add_argument("--label_column", metavar="NAME", help="labels, label or label_ids")
    data.add_argument("--max_samples", type=int, metavar="N", help="attack this many, drawn once; all")
    data.add_argument("--batch_size", type=int, default=64, metavar="N", help="samples attacked together; 64")
    attacks = attack.add_argument_group("attacks")
    attacks.add_argument("--attack", nargs="+", metavar="NAME", help=f"{', '.join(ATTACKS)}; a standard set")
    attacks.add_argument("--epsilon", nargs="+", metavar="E", help="budgets, 8/255 or 0.03; with --attack")
    attacks.add_argument("--steps", type=int, metavar="N", help="gradient steps")
    attacks.add_argument("--restarts", type=int, metavar="N", help="random starts, the worst counts")
    attacks.add_argument(
        "--no_checks", action="store_true", help="leave out the checks, which attack a few more samples"
    )
    output = attack.add_argument_group("output")
    output.add_argument("--output_dir", metavar="FOLDER", help="write report.json; go on there after an interruption")
    output.add_argument("--save_examples", action="store_true", help="write adversarial examples there, as parquet")
    output.add_argument("--json", action="store_true", help="print JSON instead of the table")
    output.add_argument("--plot", metavar="FILE", help="draw accuracy over ε; pip install 'hf_condlr[plot]'")


def _load(args: argparse.Namespace) -> PreTrainedModel:
    """By the class that its config names: the saved model with its head."""
    require(
        Path(args.model).is_dir() or is_hub_id(args.model),
        "MODEL must be a folder, or a name on the Hub",
        received=f"{args.model}, which is not a folder",
        remedy="Check the path.",
        error=ConfigError,
    )
    trust = {"trust_remote_code": args.trust_remote_code}
    config = AutoConfig.from_pretrained(args.model, **trust)
    found: Any = [getattr(transformers, str(name), None) for name in config.architectures or ()]
    if args.trust_remote_code and found == [None]:
        found = [
            getattr(transformers, name) for name in getattr(config, "auto_map", ()) if name.startswith("AutoModel")
        ]
        return found[0].from_pretrained(args.model, **trust)
    require(
        len(found) == 1 and isinstance(found[0], type) and issubclass(found[0], PreTrainedModel),
        "config.json must name one model class of transformers",
        received=f"architectures={config.architectures}",
        remedy="If the repository holds code that you trust, pass --trust_remote_code.",
        error=ConfigError,
    )
    return found[0].from_pretrained(args.model)


def _processor(args: argparse.Namespace) -> Any:
    return AutoProcessor.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)


def _save(model: PreTrainedModel, args: argparse.Namespace) -> None:
    """The model, with the tokenizer or image processor of the one it was made from."""
    model.save_pretrained(args.out)
    if not compressed_layers(model):
        remove_leftovers(Path(args.out))  # factors of an earlier checkpoint
    with contextlib.suppress(OSError, ValueError, ImportError):  # it has none, or one for an extra
        _processor(args).save_pretrained(args.out)
    size = sum(path.stat().st_size for path in Path(args.out).glob("*.safetensors"))
    _say(f"wrote {args.out}: {model.num_parameters():,} parameters, {size:,} bytes of weights")


def _load_factored(args: argparse.Namespace) -> PreTrainedModel:
    model = _load(args)
    require(
        factored_layers(model) or not compressed_layers(model),
        f"condlr {args.command} needs the factors U, S and V",
        received="a folded model, which has lost them",
        remedy="Use the factored model that it was folded from.",
        error=ConfigError,
    )
    condition_report(model)  # refuses a dense model
    return model


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _convert(args: argparse.Namespace) -> None:
    names = [
        "compression_ratio",
        "rank_ratio",
        "r",
        "target_modules",
        "tau",
        "head",
        "rank_allocation",
        "rank_multiple",
    ]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.config and given:
        raise ConfigError("--config holds all settings", received=", ".join(given), remedy="Give one or the other.")
    if "tau" in given:
        given["tau"] = given["tau"] if given["tau"] == "inf" else float(given["tau"])
    if len(given.get("target_modules", ())) == 1:
        [given["target_modules"]] = given["target_modules"]
    config: Any = CondLRConfig.from_pretrained(args.config) if args.config else CondLRConfig(**given)
    model = get_robust_lowrank_model(_load(args), config)
    _say(str(conversion_record(model).report))
    _save(model, args)


def _report(args: argparse.Namespace) -> None:
    report = condition_report(_load_factored(args))
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
    names = ["image_column", "text_columns", "label_column", "max_samples", "batch_size", "output_dir", "save_examples"]
    report = evaluate_robustness(
        _load(args),
        load_split(args.dataset, args.dataset_config, args.split),
        attacks,
        processor=_processor(args),
        checks=not args.no_checks,
        **{name: getattr(args, name) for name in names},
    )
    _say(json.dumps(report.to_dict(), indent=1) if args.json else str(report))
    if args.plot:
        report.plot(args.plot)


def _fold(args: argparse.Namespace) -> None:
    _save(fold_model(_load_factored(args)), args)


def _densify(args: argparse.Namespace) -> None:
    model = _load(args)
    if not compressed_layers(model):
        condition_report(model)  # refuses a dense model
    _save(to_dense_model(model), args)


def _export(args: argparse.Namespace) -> None:
    path = export_onnx(_load(args), args.file)
    _say(f"wrote {path}: {path.stat().st_size:,} bytes")


def _push(args: argparse.Namespace) -> None:
    model: Any = _load(args)
    card = Path(args.model) / REPOCARD_NAME  # the folder's own
    options = {"card": card} if compressed_layers(model) and card.is_file() else {}
    commit = model.push_to_hub(args.repo, private=args.private, revision=args.revision, **options)
    if card.is_file() and not options:
        commit = HfApi().upload_file(
            path_or_fileobj=card, path_in_repo=REPOCARD_NAME, repo_id=args.repo, revision=args.revision
        )
    with contextlib.suppress(OSError, ValueError, ImportError):
        _processor(args).push_to_hub(args.repo, revision=args.revision)
    _say(f"pushed {commit.commit_url}")


if __name__ == "__main__":
    sys.exit(main())
