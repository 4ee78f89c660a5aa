"""What the commands share: models are loaded and saved with their processors, and results are said."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoProcessor, PreTrainedModel

from hf_condlr.checkpoints.card_header import is_hub_id
from hf_condlr.checkpoints.publish import remove_leftovers
from hf_condlr.errors import ConfigError, require
from hf_condlr.layers import compressed_layers, condition_report
from hf_condlr.robustness.attacks import Attack, make_attacks

NO_PROCESSOR = (OSError, ValueError, ImportError)  # a model without one, or one that needs an extra


def load(args: argparse.Namespace, *, compressed: bool = False) -> PreTrainedModel:
    """Load the model and its head with the class that its config names; `compressed` refuses a dense one."""
    rule, found = "MODEL must be a folder, or a name on the Hub", f"{args.model}, which is not a folder"
    exists = Path(args.model).is_dir() or is_hub_id(args.model)
    require(exists, rule, received=found, remedy="Check the path.", error=ConfigError)
    trust = {"trust_remote_code": args.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(args.model, **trust)
    except StrictDataclassError as error:  # no ValueError
        rule, remedy = "values in config.json must have the types that transformers expects", "Correct the file."
        raise ConfigError(rule, received=str(error), remedy=remedy) from error
    classes: Any = [getattr(transformers, str(name), None) for name in config.architectures or ()]
    own = [name for name in getattr(config, "auto_map", ()) if name.startswith("AutoModel")]
    if args.trust_remote_code and classes == [None] and own:
        classes = [getattr(transformers, own[0])]
    elif len(classes) != 1 or not isinstance(classes[0], type) or not issubclass(classes[0], PreTrainedModel):
        rule, found = "config.json must name one model class of transformers", f"architectures={config.architectures}"
        remedy = "If the repository holds code that you trust, pass --trust_remote_code."
        raise ConfigError(rule, received=found, remedy=remedy)
    model = classes[0].from_pretrained(args.model, **trust)
    if compressed and not compressed_layers(model):
        condition_report(model)  # refuses it
    return model


def processor_of(args: argparse.Namespace) -> Any:
    """The model's tokenizer or image processor."""
    return AutoProcessor.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)


def save(model: PreTrainedModel, args: argparse.Namespace) -> None:
    """Save the model, with the tokenizer or image processor of the one it was made from."""
    model.save_pretrained(args.out)
    if not compressed_layers(model):
        remove_leftovers(Path(args.out))  # factors of an earlier checkpoint
    with contextlib.suppress(*NO_PROCESSOR):
        processor_of(args).save_pretrained(args.out)
    say_size(model, args.out)


def say_size(model: PreTrainedModel, folder: str) -> None:
    """Say what was written."""
    size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    say(f"wrote {folder}: {model.num_parameters():,} parameters, {size:,} bytes of weights")


def say(text: str) -> None:
    """Write a line to the standard output."""
    sys.stdout.write(text + "\n")


def attacks_of(args: argparse.Namespace) -> list[Attack] | None:
    """The attacks that were named, at each budget; None where none were."""
    names = ("attack", "epsilon", "steps", "restarts")
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    if not given:
        return None
    rule = "--attack and --epsilon belong together, and further options of attacks need them"
    received, remedy = f"only {', '.join(f'--{name}' for name in given)}", "Add what is missing."
    require({"attack", "epsilon"} <= {*given}, rule, received=received, remedy=remedy, error=ConfigError)
    return make_attacks(given.pop("attack"), given.pop("epsilon"), **given)
