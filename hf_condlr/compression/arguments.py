"""`CompressionArguments`: the options of `compress` and of the command `condlr compress`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

from hf_condlr.config import CHOICES, CondLRConfig
from hf_condlr.errors import ConfigError, require
from hf_condlr.layers import InferenceForm
from hf_condlr.options import option
from hf_condlr.robustness.attacks.registry import parse_epsilon

# Fields that become fields of the CondLRConfig under the same name.
_CONVERSION = ["tau", "target_modules", "exclude_modules", "init_weights", "rank_allocation", "rank_multiple"]
_CONVERSION += ["sequential_calibration"]
_FORMS = ("factored", *get_args(InferenceForm))
ROBUST_STEPS = 200  # of a robust recovery, by default


@dataclass(kw_only=True)
class InputArguments:
    """Which columns of a data set a model reads, and how its inputs are made."""

    dataset_config: str | None = option(None, "Configuration of a data set that has several.")
    image_column: str | None = option(None, "Column of images, where there are several.")
    text_columns: list[str] | None = option(None, "One or two columns of texts or of words, where there are others.")
    label_column: str | None = option(None, "Column of labels, where they are not class labels, label or labels.")
    max_length: int | None = option(
        None, "Tokens a text, or of a language model a block; by default what the model takes, of a block 512 at most."
    )
    batch_size: int | None = option(
        None, "Samples a batch; by default 32, of a language model 4, and 1 to calibrate it."
    )
    calibration_samples: int | None = option(
        None,
        "Samples of the training data that choose the ranks and the factors; by default 1,024, of a language model 256 "
        "blocks.",
    )
    seed: int = option(0, "Seed of the choice of samples and of the recovery.")

    def __post_init__(self) -> None:
        for name in ("calibration_samples", "batch_size", "max_length"):
            value = getattr(self, name)
            self._require(value is None or value >= 1, name, "be ≥ 1")

    def _require(self, valid: bool, name: str, rule: str, remedy: str = "See its help.") -> None:
        require(valid, f"{name} must {rule}", received=getattr(self, name), remedy=remedy, error=ConfigError)


@dataclass(kw_only=True)
class CompressionArguments(InputArguments):
    """How a model is compressed, and how that is measured. Every field is validated on construction."""

    output_dir: str = field(metadata={"help": "Folder to write; an interrupted run resumes there."})
    ratio: float | None = option(
        None, "Share of the converted layers' weights to remove, in (0, 1), counted in the form that is saved."
    )
    max_drop: float | None = option(
        None,
        "Instead of a ratio: remove as much as costs at most so many points of validation accuracy (of a language "
        "model: so many percent of its perplexity), before any recovery.",
    )
    tau: float | None = option(
        None,
        "κ(S) ≤ 1 + tau in every converted layer; 'inf' leaves κ unbounded. By default 4; for a language model, "
        "which a bound costs much, inf.",
    )
    target_modules: list[str] | str = option(
        "all-linear", "Modules to convert, as in CondLRConfig: by default every linear layer but the head."
    )
    exclude_modules: list[str] | str | None = option(None, "Modules of those to leave dense, as in CondLRConfig.")
    init_weights: str = option("fisher", "Start of the factors.", choices=CHOICES["init_weights"])
    rank_allocation: str = option(
        "fisher", "How the ratio is spread over the layers.", choices=CHOICES["rank_allocation"]
    )
    sequential_calibration: bool | None = option(
        None,
        "Factor each layer for what the compressed layers before it give; by default so where most layers lie in "
        "blocks that run one after the other.",
    )
    rank_multiple: int | None = option(
        None, "Ranks are rounded down to multiples of this; by default 8 for language models, else 1."
    )
    form: str = option(
        "factored",
        "What is saved: U, S, V, which train on within the bound; or for inference only, smaller but without a bound "
        "that can be verified, folded with r(m+n) weights a layer, or pivoted with r(m+n-r).",
        choices=_FORMS,
    )
    recovery_steps: int = option(0, "Steps of distillation from the dense model after compression, on training data.")
    learning_rate: float | None = option(None, "Learning rate of the recovery; by default 1e-5.")
    adversarial_epsilon: float | str | None = option(
        None, "Recover on adversarial samples of this radius too, half of each batch; 1/255 for pixels, 0.05 for texts."
    )
    robust: bool = option(
        False,
        "Make a classifier of images or texts harder to fool, for a few points of accuracy: a recovery on adversarial "
        "samples, by default of 200 steps, with the radius and learning rate that did well in docs/results.md.",
    )
    attack_samples: int | None = option(
        None, "Samples that are attacked, of those that measure the result; by default 128."
    )
    max_eval_samples: int | None = option(None, "Measure on at most this many samples of a split; by default all.")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [f"{name}={value}" for name in ("ratio", "max_drop") if (value := getattr(self, name)) is not None]
        rule, remedy = "exactly one of ratio and max_drop must be given", "For example ratio=0.6, or max_drop=1.0."
        require(len(given) == 1, rule, received=" and ".join(given) or "neither", remedy=remedy, error=ConfigError)
        ratio, drop = self.ratio, self.max_drop
        remedy = "It is the share removed: 0.6 keeps 40 % of the converted layers' weights."
        self._require(ratio is None or 0 < ratio < 1, "ratio", "lie in (0, 1)", remedy)
        self._require(drop is None or 0 <= drop < 100, "max_drop", "lie in [0, 100)", "1.0 is one point of accuracy.")
        for name in ("attack_samples", "max_eval_samples"):
            value = getattr(self, name)
            self._require(value is None or value >= 1, name, "be ≥ 1")
        self._require(self.recovery_steps >= 0, "recovery_steps", "be ≥ 0")
        if self.robust:
            self.recovery_steps = self.recovery_steps or ROBUST_STEPS
        for name in ("learning_rate", "adversarial_epsilon"):
            is_used = self.recovery_steps > 0 or getattr(self, name) is None
            self._require(is_used, name, "come with recovery_steps", "For example recovery_steps=200.")
        rate = self.learning_rate
        self._require(rate is None or rate > 0, "learning_rate", "be > 0")
        if self.adversarial_epsilon is not None:
            self.adversarial_epsilon = parse_epsilon(self.adversarial_epsilon)
        self._require(self.form in _FORMS, "form", f"be one of {', '.join(_FORMS)}")
        self.condlr_config(ratio or 0.5)  # checks the other values

    def condlr_config(self, ratio: float, **defaults: Any) -> CondLRConfig:
        """The config of a conversion that removes this share; `defaults` hold where nothing was given."""
        given = {name: value for name in _CONVERSION if (value := getattr(self, name)) is not None}
        form = "training" if self.form == "factored" else self.form
        fixed: dict[str, Any] = {"compression_ratio": ratio, "compression_form": form, "conditioned_start": True}
        return CondLRConfig(**defaults | given | fixed)
