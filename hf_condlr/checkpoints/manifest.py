"""The format of a factored checkpoint: its file names, and what `config.json` states of files and layers.

    config.json                transformers' own, and {"quantization_config": manifest, "transformers_weights": NOTICE}
    condlr.safetensors         the model's parameters under the model's own names; or an index and shards

The weights have no name that plain transformers looks for, and `transformers_weights` is not a file name: without this
package loading is an error that says what to install, never a model with random weights.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from torch import Tensor, nn
from transformers.utils import CONFIG_NAME

from hf_condlr.checkpoints import METHOD
from hf_condlr.checkpoints.rounding import can_be_orthonormal, least_condition_number
from hf_condlr.config import CondLRConfig
from hf_condlr.errors import CheckpointError, listed, require
from hf_condlr.layers import Factors, InferenceLayer, LowRankLayer
from hf_condlr.layers.model import compressed_layers, loaded_factors
from hf_condlr.linalg import CENTERS, Center, obeys_bound

FORMAT = 1
STEM = "condlr"
NOTICE = "the weights are low-rank factors; pip install hf_condlr, and import hf_condlr before from_pretrained"
MANIFEST = "quantization_config"  # where transformers looks for what builds a model's layers before it loads them
SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
PARTS = {
    "factored": ("U", "S", "V"),
    "folded": ("down.weight", "up.weight"),
    "pivoted": ("down.weight", "up.weight", "order"),
}
UNREADABLE = (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError)
"""Exceptions that reading values of the wrong type or size raises."""

_FILE_NAME = re.compile(rf"{STEM}[\w.-]*{re.escape(SUFFIX)}(\.index\.json)?")
_LAYER_NAME = re.compile(r"(?!__)\w+(\.(?!__)\w+)*")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredLayer:
    """Description of one layer in a checkpoint."""

    r: int
    form: Literal["factored", "folded", "pivoted"] = "factored"
    tau: float = math.inf
    center: Center = "nearest"
    orthonormal: bool = False
    """Whether U and V had orthonormal columns; those of a model trained without the manifold step have not."""
    bound: float = math.inf
    """The bound on κ(W) in force when it was saved; inf where none was, or the factors did not obey it."""

    @classmethod
    def of(cls, layer: LowRankLayer | InferenceLayer, factors: Factors | None = None) -> StoredLayer:
        """Describe the layer as it is, or as it would be with other factors."""
        if isinstance(layer, InferenceLayer):
            return cls(r=layer.r, form=layer.form)
        factors = (layer.U, layer.S, layer.V) if factors is None else factors
        U, S, V = factors
        orthonormal = all([can_be_orthonormal(basis, S.dtype) for basis in (U, V)])  # each may be a sum over processes
        bound = math.inf
        # κ(W) = κ(S) for orthonormal bases only
        if orthonormal and layer.bound < math.inf and obeys_bound(least_condition_number(S, S.dtype), layer.bound):
            bound = layer.bound
        return cls(r=layer.r, tau=layer.tau, center=layer.center, orthonormal=orthonormal, bound=bound)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StoredLayer:
        """Read from JSON values; raises ValueError, or another of `UNREADABLE`, if they contradict the format."""
        numbers = {name: float(value) for name, value in values.items() if name in ("tau", "bound")}
        return cls(**values | numbers)

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON values: an infinite number is the string "inf"."""
        return {name: "inf" if value == math.inf else value for name, value in asdict(self).items()}

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("r", type(self.r) is int and self.r >= 1, "an integer ≥ 1"),
            ("form", self.form in PARTS, f"one of {', '.join(PARTS)}"),
            ("tau", self.tau >= 0, "a number ≥ 0"),
            ("center", self.center in CENTERS, f"one of {', '.join(CENTERS)}"),
            ("orthonormal", isinstance(self.orthonormal, bool), "true or false"),
            ("bound", self.bound >= 1, "a number ≥ 1"),
            ("bound", self.orthonormal or self.bound == math.inf, "inf where the bases are not orthonormal"),
        ):
            if not valid:
                raise ValueError(f"{name} must be {rule}, not {getattr(self, name)!r}")


@dataclass
class Manifest:
    """Description of the weight files in `config.json`."""

    weights: str
    """Name of the weight file, or of the index of its shards."""
    layers: dict[str, StoredLayer]
    """Layers by their names in the files."""
    sha256: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each weight file and of the index."""
    config: CondLRConfig | None = None
    """The config that the model was converted with."""
    format: int = FORMAT
    quant_method: str = METHOD

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON values."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {
            "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
            "config": None if self.config is None else self.config.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Any) -> Manifest:
        """Read and check a manifest.

        Raises:
            CheckpointError: The manifest is from a later version, or contradicts the format.
        """
        version = values.get("format") if isinstance(values, dict) else None
        rule = f"this version of hf_condlr reads format {FORMAT} of factored checkpoints"
        found = f"format {version!r} in {CONFIG_NAME}"
        remedy = "Upgrade hf_condlr if the checkpoint comes from a newer version."
        require(version == FORMAT, rule, received=found, remedy=remedy, error=CheckpointError)
        try:
            layers = {name: StoredLayer.from_dict(entry) for name, entry in values["layers"].items()}
            config = None if values.get("config") is None else CondLRConfig.from_peft_type(**values["config"])
            manifest = cls(**values | {"layers": layers, "config": config})
            for texts, pattern, kind in (
                ([manifest.weights, *manifest.sha256], _FILE_NAME, "the name of a weight file"),
                (manifest.sha256.values(), _DIGEST, "a SHA-256"),
                (layers, _LAYER_NAME, "the name of a layer"),
            ):
                if wrong := [text for text in texts if not pattern.fullmatch(text)]:
                    raise ValueError(f"{wrong[0]!r} is not {kind}")
        except UNREADABLE as error:
            raise CheckpointError(
                f"{MANIFEST} in {CONFIG_NAME} must describe a factored checkpoint",
                received=str(error) or type(error).__name__,
                remedy="Take the file as save_pretrained wrote it.",
            ) from error
        return manifest


def stored_layers(model: nn.Module, state_dict: dict[str, Tensor] | None = None) -> dict[str, StoredLayer]:
    """Descriptions of the model's layers for a checkpoint, by the layers' names.

    Args:
        model: The model.
        state_dict: The tensors that are written instead of the model's, such as an average of the weights.

    Raises:
        CheckpointError: `state_dict` lacks a factor, or has one of another shape.
    """
    layers = compressed_layers(model)
    own = {f"{name}.{part}": p.shape for name, layer in layers.items() for part, p in layer.state_dict().items()}
    given = own if state_dict is None else {name: tensor.shape for name, tensor in state_dict.items()}
    wrong = [name for name, shape in own.items() if given.get(name) != shape]
    rule, found = "a state_dict must hold the tensors of this model", f"none of the right shape for {listed(wrong)}"
    remedy = "Pass the state_dict of a model converted with the same config, or none. Nothing was written."
    require(not wrong, rule, received=found, remedy=remedy, error=CheckpointError)
    stated = {}
    for name, layer in layers.items():
        factors: Any = None
        if isinstance(layer, LowRankLayer):
            loaded = state_dict and tuple(state_dict[f"{name}.{part}"] for part in "USV")
            factors = loaded or loaded_factors(model, name)
        stated[name] = StoredLayer.of(layer, factors)
    return stated
