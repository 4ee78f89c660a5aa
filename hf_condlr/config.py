"""`CondLRConfig`: which layers become W = U S Vᵀ, at which rank, and how well conditioned S has to stay.

A dataclass on `peft.PeftConfig`. Unlike there, an unknown field is an error, and the file is strict JSON.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from huggingface_hub import hf_hub_download
from peft import PeftConfig

from hf_condlr.errors import ConfigError, require
from hf_condlr.linalg import Center
from hf_condlr.options import as_list, as_tau, is_number, option, tau_as_json

PEFT_TYPE = "CONDLR"
CONFIG_NAME = "condlr_config.json"  # not PEFT's adapter_config.json, which transformers takes for an adapter
ALL_LINEAR = "all-linear"

Head = Literal["dense", "full_rank", "low_rank"]
RankAllocation = Literal["uniform", "energy", "fisher"]
Start = Literal["svd", "randomized_svd", "activation_aware", "fisher", "orthogonal"]
CompressionForm = Literal["training", "folded", "pivoted"]
Trainable = Literal["all", "factors"]

DATA_AWARE = ("activation_aware", "fisher")
"""The starts that look at calibration data."""

CHOICES: dict[str, tuple[str, ...]] = {
    "head": get_args(Head),
    "rank_allocation": get_args(RankAllocation),
    "compression_form": get_args(CompressionForm),
    "center": get_args(Center),
    "init_weights": get_args(Start),
    "trainable": get_args(Trainable),
}


@dataclass
class CondLRConfig(PeftConfig):
    """Robust low-rank training: κ(S) ≤ 1 + τ for every converted layer once a warm-up of the bound is over.

    Exactly one of `r`, `rank_ratio`, `compression_ratio` is given. Every field is validated on construction, with a
    `ConfigError` (a `ValueError`) that names the rule, the value and the remedy.

    Examples:
        >>> config = CondLRConfig(rank_ratio=0.25, tau=0.1)
        >>> config = CondLRConfig(target_modules=["query", "value"], r=16, tau_pattern={"value": "inf"})
    """

    target_modules: list[str] | str = option(
        ALL_LINEAR,
        "Modules to convert, by PEFT's rules: 'all-linear' (every nn.Linear and Conv1D but the head), a list of name "
        "suffixes, or a regex for the full name. Conv2d layers are converted when named.",
    )
    exclude_modules: list[str] | str | None = option(None, "Modules to leave alone: a list of suffixes, or a regex.")
    layers_to_transform: list[int] | int | None = option(
        None, "Only layers of these indices; needs a list of target_modules."
    )
    layers_pattern: list[str] | str | None = option(None, "Name of the ModuleList that layers_to_transform counts in.")
    modules_to_save: list[str] | None = option(None, "Modules that stay dense and always train.")
    head: Head = option(
        "dense",
        "Output embeddings and classifier: left alone, unless target_modules names them; factored at full rank and "
        "conditioned (the last layer in the paper); or like any other layer.",
    )
    r: int | None = option(None, "Rank of every layer, at most its min(in, out).")
    rank_ratio: float | None = option(None, "Rank as a share of min(in, out), rounded, at least 1; in (0, 1].")
    compression_ratio: float | None = option(
        None, "Share of the converted layers' weights to remove, counted in the compression_form; in (0, 1)."
    )
    compression_form: CompressionForm = option(
        "training",
        "What counts as the size of a layer (m, n) of rank r: r(m+n)+r² of U, S, V, or what is stored and multiplied "
        "once the model is folded for inference, r(m+n), or pivoted, r(m+n-r).",
    )
    rank_allocation: RankAllocation = option(
        "uniform",
        "How compression_ratio is spread over the layers: one rank ratio for all; the ranks that minimise the summed "
        "squared truncation error; or those that change the predictions of a fine-tuned model least, measured on "
        "calibration data. The last one leaves layers dense with an infinite tau only.",
    )
    rank_multiple: int = option(
        1,
        "Ranks that follow from a ratio are rounded down to multiples of this, except smaller ones and the full rank. "
        "Hardware multiplies matrices faster whose sizes are multiples of 8.",
    )
    rank_pattern: dict[str, int | float] = option(
        {}, "{name or regex: int rank or float rank_ratio}; the first match wins over the defaults."
    )
    tau: float = option(0.1, "Conditioning tolerance: κ(S) ≤ 1 + tau. 'inf' leaves S unconstrained.")
    tau_pattern: dict[str, float] = option({}, "{name or regex: tau}; the first match wins over `tau`.")
    center: Center = option(
        "nearest", "Interval that singular values are clipped to: nearest to S, or around their rms or mean."
    )
    init_weights: Start = option(
        "svd",
        "Start: truncated SVD; its randomized version for large layers; the SVD weighted by each layer's inputs over "
        "calibration data, or for a fine-tuned model by its gradients too; or random orthonormal factors (training "
        "from scratch).",
    )
    sequential_calibration: bool = option(
        False,
        "Factor the layers one after the other, each for the inputs that the compressed layers before it give, to put "
        "out what the dense model does; with init_weights='activation_aware' or 'fisher'.",
    )
    conditioned_start: bool = option(
        False, "Start from the best factors with κ ≤ 1 + tau, instead of letting a warm-up bring κ down."
    )
    trainable: Trainable = option(
        "all",
        "Leave requires_grad as it is, or train only U, S, V, the converted layers' biases and modules_to_save.",
    )
    peft_type: str = option(PEFT_TYPE, "Always CONDLR.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"):
            setattr(self, name, as_list(getattr(self, name)))
        if isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR:
            self.target_modules = ALL_LINEAR
        _validate_choices(self)
        _validate_targets(self)
        _validate_patterns(self)
        _validate_ranks(self)
        self.rank_ratio = None if self.rank_ratio is None else float(self.rank_ratio)
        self.tau = as_tau("tau", self.tau)
        self.tau_pattern = {key: as_tau(f"tau_pattern[{key!r}]", value) for key, value in self.tau_pattern.items()}

    @property
    def needs_calibration_data(self) -> bool:
        """Whether the start or the ranks depend on data, as those of `activation_aware` and `fisher` do."""
        return self.init_weights in DATA_AWARE or self.rank_allocation == "fisher"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as strict JSON values; an infinite τ is the string "inf"."""
        values = super().to_dict()
        values["tau"] = tau_as_json(self.tau)
        values["tau_pattern"] = {key: tau_as_json(value) for key, value in self.tau_pattern.items()}
        return values

    @property
    def is_prompt_learning(self) -> bool:
        """Raise ConfigError: only `peft.get_peft_model` asks for this, and it cannot use this config."""
        raise ConfigError(
            "a CondLRConfig compresses a model and makes no PEFT adapter",
            received="a call of get_peft_model",
            remedy="To compress, call hf_condlr.get_robust_lowrank_model(model, config). To adapt, give get_peft_model "
            "a hf_condlr.CondLRAdapterConfig.",
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `condlr_config.json`. Patterns keep their order, in which the first match wins."""
        path = Path(save_directory, CONFIG_NAME)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> CondLRConfig:
        """Read `condlr_config.json` from a folder or, with `kwargs` for `hf_hub_download`, from the Hub."""
        path = Path(pretrained_model_name_or_path, subfolder or "", CONFIG_NAME)
        if not path.is_file():
            try:
                path = hf_hub_download(str(pretrained_model_name_or_path), CONFIG_NAME, subfolder=subfolder, **kwargs)
            except Exception as error:
                rule = f"the folder or repository must have a {CONFIG_NAME}"
                raise ConfigError(rule, received=pretrained_model_name_or_path, remedy=f"{error}") from error
        return cls.from_peft_type(**json.loads(Path(path).read_text(encoding="utf-8")))

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> CondLRConfig:
        """Build the config from the fields of a file, as `from_pretrained` does; unknown fields are an error."""
        unknown = ", ".join(sorted(set(kwargs) - {f.name for f in fields(cls)}))
        rule = "a CondLRConfig file must hold its fields only"
        remedy = "Remove them, upgrade hf_condlr, or use peft if the file configures another method."
        require(not unknown, rule, received=f"unknown {unknown}", remedy=remedy, error=ConfigError)
        return cls(**kwargs)


def _check(config: CondLRConfig, name: str, valid: object, rule: str, remedy: str) -> None:
    received = repr(getattr(config, name))
    require(valid, f"{name} must {rule}", received=received, remedy=remedy, error=ConfigError)


def _validate_choices(config: CondLRConfig) -> None:
    _check(config, "peft_type", config.peft_type == PEFT_TYPE, f"be {PEFT_TYPE}", "Load other PEFT methods with peft.")
    for name, choices in CHOICES.items():
        _check(config, name, getattr(config, name) in choices, f"be one of {', '.join(choices)}", "Choose one.")
    for name in ("conditioned_start", "sequential_calibration"):
        _check(config, name, isinstance(getattr(config, name), bool), "be true or false", "Choose one.")
    valid = not config.sequential_calibration or config.init_weights in DATA_AWARE
    rule = f"be false with init_weights={config.init_weights!r}, which looks at no data"
    _check(config, "sequential_calibration", valid, rule, f"Choose a start of {', '.join(DATA_AWARE)}.")


def _validate_targets(config: CondLRConfig) -> None:
    targets, indices, pattern = config.target_modules, config.layers_to_transform, config.layers_pattern
    for name, kinds in (
        ("target_modules", (str, list)),
        ("exclude_modules", (str, list)),
        ("modules_to_save", (list,)),
    ):
        value = getattr(config, name)
        valid = value is None or (isinstance(value, kinds) and all(isinstance(entry, str) for entry in value))
        _check(
            config, name, valid, f"be {'a regex or ' * (str in kinds)}a list of names", "For example ['classifier']."
        )
        if isinstance(value, str):
            _require_regexes(name, [value])
    _require_regexes("modules_to_save", config.modules_to_save or [])
    remedy = f"Use {ALL_LINEAR!r}, a list of name suffixes, or a regex."
    _check(config, "target_modules", targets, "name at least one module", remedy)
    if indices is None:
        _check(config, "layers_pattern", pattern is None, "come with layers_to_transform", "Give both, or neither.")
        return
    valid = all(is_number(int, i) and i >= 0 for i in (indices if isinstance(indices, list) else [indices]))
    _check(config, "layers_to_transform", valid, "hold integers ≥ 0", "For example [0, 1].")
    rule, remedy = "be a list of suffixes with layers_to_transform", "List them, or put the indices into the regex."
    _check(config, "target_modules", isinstance(targets, list), rule, remedy)


def _validate_patterns(config: CondLRConfig) -> None:
    for name in ("rank_pattern", "tau_pattern"):
        value = getattr(config, name)
        valid = isinstance(value, dict) and all(isinstance(key, str) for key in value)
        _check(config, name, valid, "be a dict from names or regexes", "Leave it out for none.")
        _require_regexes(name, value)
    for key, value in config.rank_pattern.items():
        valid = (is_number(int, value) and value >= 1) or (isinstance(value, float) and 0 < value <= 1)
        rule = "rank_pattern values must be integers ≥ 1 (ranks) or floats in (0, 1] (rank ratios)"
        remedy = "Write 8 for a rank, 0.25 for a ratio."
        require(valid, rule, received=f"{key!r}: {value!r}", remedy=remedy, error=ConfigError)


def _validate_ranks(config: CondLRConfig) -> None:
    ranks = {name: getattr(config, name) for name in ("r", "rank_ratio", "compression_ratio")}
    given = [f"{name}={value}" for name, value in ranks.items() if value is not None]
    rule, remedy = f"exactly one of {', '.join(ranks)} must be given", "Choose one; for instance rank_ratio=0.25."
    require(len(given) == 1, rule, received=" and ".join(given) or "none of them", remedy=remedy, error=ConfigError)
    r, ratio, removed, multiple = (*ranks.values(), config.rank_multiple)
    valid: object = r is None or (is_number(int, r) and r >= 1)
    _check(config, "r", valid, "be an integer ≥ 1", "For a share of the full rank use rank_ratio.")
    valid = ratio is None or (is_number(float, ratio) and 0 < ratio <= 1)
    _check(config, "rank_ratio", valid, "lie in (0, 1]", "For an integer rank use r.")
    valid = removed is None or (is_number(float, removed) and 0 < removed < 1)
    remedy = "It is the share removed: 0.6 keeps 40 % of the converted layers' weights."
    _check(config, "compression_ratio", valid, "lie in (0, 1)", remedy)
    valid = removed is not None or config.rank_allocation == "uniform"
    _check(config, "rank_allocation", valid, "be uniform without a compression_ratio", "Give compression_ratio.")
    valid = removed is not None or config.compression_form == "training"
    _check(config, "compression_form", valid, "be training without a compression_ratio", "Give compression_ratio.")
    valid = is_number(int, multiple) and multiple >= 1
    _check(config, "rank_multiple", valid, "be an integer ≥ 1", "For example 8.")
    _check(config, "rank_multiple", multiple == 1 or r is None, f"be 1 with r={r}", "Give r as a multiple of it.")


def _require_regexes(name: str, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{name} must hold valid regexes", received=repr(pattern), remedy=f"{error}.") from error
