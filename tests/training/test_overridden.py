"""The methods of transformers' Trainer that this package overrides, by name."""

import inspect

import pytest
from transformers import Seq2SeqTrainer, Trainer

from hf_condlr.training.trainer import OVERRIDDEN, CondLRSeq2SeqTrainer, CondLRTrainer, FactoredTrainer

CLASSES = (CondLRTrainer, CondLRSeq2SeqTrainer, FactoredTrainer)


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_transformers_still_has(name):
    assert callable(getattr(Trainer, name, None)), f"transformers' Trainer has no {name} any more"


@pytest.mark.parametrize(
    "name", ["_prepare_inputs", "label_names", "loss_is_scaled_for_ga", "callback_handler", "state"]
)
def test_transformers_still_uses(name):
    """Attributes that this package reads."""
    assert name in inspect.getsource(Trainer)


def test_nothing_else_is_overridden():
    own = {cls for each in CLASSES for cls in each.__mro__ if cls.__module__.startswith("hf_condlr")}
    defined = {name for cls in own for name in vars(cls) if not name.startswith("__")}
    assert defined & {*dir(Trainer), *dir(Seq2SeqTrainer)} - {"_abc_impl"} == {*OVERRIDDEN}


def test_no_private_attribute_of_ours_is_on_the_trainer():
    """Another library's class may have one of the same name, as TRL's `_metrics`."""
    own = {cls for each in CLASSES for cls in each.__mro__ if cls.__module__.startswith("hf_condlr")}
    private = {name for cls in own for name in vars(cls) if name.startswith("_") and not name.startswith("__")}
    assert private <= {*OVERRIDDEN}
