"""The format of a factored checkpoint: its file names, what `config.json` states of each layer, and the checks of it.

    config.json                transformers' own, and {"quantization_config": manifest, "transformers_weights": NOTICE}
    condlr.safetensors         the model's parameters under the model's own names; or an index and shards

The weights have no name that plain transformers looks for, and `transformers_weights` is no file name at all: without
this package loading is an error that says what to install, never a model with random weights.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from torch import Tensor, nn
from transformers.utils import CONFIG_NAME

from hf_condlr.checkpoints.rounding import KAPPA_TOLERANCE, measure
from hf_condlr.errors import CheckpointError
from hf_condlr.layers import Factors, FoldedLayer, LowRankLayer
from hf_condlr.layers.model import compressed_layers
from hf_condlr.linalg import CENTERS, Center

METHOD = "condlr"


FORMAT = 1


STEM = "condlr"


NOTICE = "the weights are low-rank factors; pip install hf_condlr, and import hf_condlr before from_pretrained"


MANIFEST = "quantization_config"  # where transformers looks for what builds a model's layers before it loads them


SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"


PARTS = {"factored": ("U", "S", "V"), "folded": ("down.weight", "up.weight")}


@dataclass(frozen=True)
class StoredLayer:
    """What a checkpoint states of one layer."""

    r: int
    form: Literal["factored", "folded"] = "factored"
    tau: float = math.inf
    center: Center = "nearest"
    orthonormal: bool = False
    """Whether U and V had orthonormal columns; those of a model trained without the manifold step have not."""
    bound: float = math.inf
    """The bound on κ(S) that was in force when it was saved; inf where none was, or S did not obey it."""

    @classmethod
    def of(cls, layer: LowRankLayer | FoldedLayer, factors: Factors | None = None) -> StoredLayer:
        """As the layer is now, or would be with other factors."""
        if isinstance(layer, FoldedLayer):
            return cls(r=layer.up.weight.shape[1], form="folded")
        factors = (layer.U, layer.S, layer.V) if factors is None else factors
        orthonormal, least = measure(factors, factors[1].dtype)
        bound = layer.bound if least <= layer.bound * KAPPA_TOLERANCE else math.inf
        return cls(r=layer.r, tau=layer.tau, center=layer.center, orthonormal=orthonormal, bound=bound)

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("r", isinstance(self.r, int) and self.r >= 1, "an integer ≥ 1"),
            ("form", self.form in PARTS, f"one of {', '.join(PARTS)}"),
            ("tau", isinstance(self.tau, float) and self.tau >= 0, "a number ≥ 0"),
            ("center", self.center in CENTERS, f"one of {', '.join(CENTERS)}"),
            ("orthonormal", isinstance(self.orthonormal, bool), "true or false"),
            ("bound", isinstance(self.bound, float) and self.bound >= 1, "a number ≥ 1"),
        ):
            if not valid:
                raise ValueError(f"{name} must be {rule}, not {getattr(self, name)!r}")


@dataclass
class Manifest:
    """What `config.json` states of the weight files."""

    weights: str
    """Name of the weight file, or of the index of its shards."""
    layers: dict[str, StoredLayer]
    """By the names in the files."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Of each weight file."""
    config: dict[str, Any] | None = None
    """The `CondLRConfig` that the model was converted with."""
    format: int = FORMAT
    quant_method: str = METHOD

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON values: an infinite number is the string "inf"."""
        return _as_json(asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Manifest:
        """Read and check it.

        Raises:
            CheckpointError: It is from a later version, or contradicts the format.
        """
        version = values.get("format")
        if version != FORMAT:
            raise CheckpointError(
                f"this version of hf_condlr reads format {FORMAT} of factored checkpoints",
                received=f"format {version!r} in {CONFIG_NAME}",
                remedy="Upgrade hf_condlr if the checkpoint comes from a newer version.",
            )
        try:
            unknown = set(values) - {f.name for f in fields(cls)}
            if unknown:
                raise ValueError(f"unknown {', '.join(sorted(unknown))}")
            layers = {name: StoredLayer(**_from_json(entry)) for name, entry in values["layers"].items()}
            manifest = cls(**values | {"layers": layers})
            named = [manifest.weights, *manifest.sha256]
            if wrong := [name for name in named if not re.fullmatch(rf"{STEM}[\w.-]*{SUFFIX}(\.index\.json)?", name)]:
                raise ValueError(f"{wrong[0]!r} is no name of a weight file")
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{MANIFEST} in {CONFIG_NAME} must describe a factored checkpoint",
                received=str(error),
                remedy="Take the file as save_pretrained wrote it.",
            ) from error
        return manifest


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_json(entry) for key, entry in value.items()}
    return "inf" if value == math.inf else value


def _from_json(entry: dict[str, Any]) -> dict[str, Any]:
    numbers = {"tau", "bound"}
    return {key: float(value) if key in numbers else value for key, value in entry.items()}


def stored_layers(model: nn.Module, state_dict: dict[str, Tensor] | None = None) -> dict[str, StoredLayer]:
    """What a checkpoint of the model states, by the layers' names.

    Args:
        model: The model.
        state_dict: The tensors that are written instead of its own (an average of the weights, say).

    Raises:
        CheckpointError: `state_dict` lacks a factor, or has one of another shape.
    """
    layers = compressed_layers(model)
    if state_dict is None:
        return {name: StoredLayer.of(layer) for name, layer in layers.items()}
    own = {f"{n}.{part}": p for n, m in layers.items() for part, p in m.named_parameters()}
    wrong = [key for key, p in own.items() if key not in state_dict or state_dict[key].shape != p.shape]
    if wrong:
        raise CheckpointError(
            "a state_dict must hold the tensors of this model",
            received=f"none of the right shape for {', '.join(wrong[:5])}",
            remedy="Pass the state_dict of a model converted alike, or none. Nothing was written.",
        )
    stated = {}
    for name, layer in layers.items():
        factors = None if isinstance(layer, FoldedLayer) else tuple(state_dict[f"{name}.{k}"] for k in "USV")
        stated[name] = StoredLayer.of(layer, factors)  # type: ignore[arg-type]  # three of them
    return stated
