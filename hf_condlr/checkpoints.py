"""The format of a factored checkpoint: its file names, what `config.json` states of each layer, and the checks of it.

    config.json                transformers' own, and {"quantization_config": manifest, "transformers_weights": NOTICE}
    condlr.safetensors         the model's parameters under the model's own names; or an index and shards

The weights have no name that plain transformers looks for, and `transformers_weights` is no file name at all: without
this package loading is an error that says what to install, never a model with random weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_condlr.errors import CheckpointError
from hf_condlr.layers import Factors, FoldedLayer, LowRankLayer
from hf_condlr.linalg import CENTERS, Center, condition_number, singular_values
from hf_condlr.shards import gram_times, is_finite, orthonormality_error, whole

METHOD = "condlr"
FORMAT = 1
STEM = "condlr"
NOTICE = "the weights are low-rank factors; pip install hf_condlr, and import hf_condlr before from_pretrained"
MANIFEST = "quantization_config"  # where transformers looks for what builds a model's layers before it loads them
SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
PROBES = 16
KAPPA_TOLERANCE = 1 + 2e-4  # the step guarantees 1 + 1e-4, and κ is measured once more
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
        orthonormal, least = _measure(factors, factors[1].dtype)
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


# -------------------------------------------------------------------------------------------------------- layers


def compressed_layers(model: nn.Module) -> dict[str, LowRankLayer | FoldedLayer]:
    """Its factored and folded layers; one in several places under its first name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (LowRankLayer, FoldedLayer))}


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


def check_factors(name: str, factors: Factors, stored: StoredLayer, dtype: torch.dtype) -> None:
    """Whether the factors U, S, V can be the rounding of ones that obey what the checkpoint states.

    Args:
        name: Of the layer, for the message.
        factors: As loaded; on the meta device (offloaded) there are no values to look at. Sharded ones are checked by
            all processes together.
        stored: What `config.json` states of them.
        dtype: Of the file; that of the factors may round once more.

    Raises:
        CheckpointError: They break what is stated.
    """
    if any(factor.is_meta for factor in factors):
        return
    if not all([is_finite(factor) for factor in factors]):  # all of them: each may be a sum over processes
        raise _broken(name, "U, S and V must be finite", "a value that is not")
    orthonormal, least = _measure(factors, dtype)
    U, S, V = factors
    if stored.orthonormal and not orthonormal:
        error = max(orthonormality_error(U).item(), orthonormality_error(V).item())
        raise _broken(name, "U and V must have orthonormal columns", f"an orthonormality error of {error:.3g}")
    if not least <= stored.bound * KAPPA_TOLERANCE:
        kappa = condition_number(whole(S)).item()
        raise _broken(name, f"κ(S) must be at most {stored.bound:.6g} as {CONFIG_NAME} states", f"κ = {kappa:.6g}")


@torch.no_grad()
def _measure(factors: Factors, dtype: torch.dtype) -> tuple[bool, float]:
    """Whether U and V can be roundings of orthonormal ones, and the least κ of an S that this one can be rounded from.

    With u the unit roundoff of `dtype` and the factors' own, rounding moves each singular value of S by at most u‖S‖_F,
    and UᵀU by at most 2u√r + u²r in the Frobenius norm.
    """
    U, S, V = factors
    r, u = S.shape[0], (torch.finfo(dtype).eps + torch.finfo(S.dtype).eps) / 2
    error = max(_orthonormality_estimate(U), _orthonormality_estimate(V))
    orthonormal = error <= (1e-4 + 2 * u) * math.sqrt(r) + u * u * r
    S = whole(S).double()
    if not torch.isfinite(S).all():
        return orthonormal, math.inf
    sigma, slack = singular_values(S), u * torch.linalg.vector_norm(S)
    return orthonormal, ((sigma[0] - slack) / (sigma[-1] + slack)).nan_to_num(nan=math.inf).item()


def _orthonormality_estimate(U: Tensor) -> float:
    """‖UᵀU − I‖_F from 16 random directions, E‖(UᵀU − I)z‖² = ‖UᵀU − I‖_F²: the whole product is slow at loading."""
    z = torch.randn(U.shape[1], PROBES, generator=torch.Generator().manual_seed(0)).to(U.device)
    return (torch.linalg.vector_norm(gram_times(U, z) - z) / math.sqrt(PROBES)).item()


def _broken(name: str, rule: str, received: str) -> CheckpointError:
    return CheckpointError(
        rule, received=f"{received} in {name}", remedy="The weights are not those that were saved: fetch them again."
    )


# --------------------------------------------------------------------------------------------------------- files


def weight_files(folder: Path) -> tuple[list[Path], Manifest | None]:
    """The weight files of a checkpoint folder; and its manifest, which the one of a plain torch module has not."""
    path = folder / CONFIG_NAME
    manifest = None
    if path.is_file():
        values = _read_json(path).get(MANIFEST)
        manifest = Manifest.from_dict(values) if values is not None else None
    if manifest is not None:
        weights = folder / manifest.weights
    else:
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        weights = index if index.is_file() else folder / SAFE_WEIGHTS_NAME
    if not weights.name.endswith(INDEX_SUFFIX):
        return [weights], manifest
    return [folder / name for name in sorted(set(_read_json(weights)["weight_map"].values()))], manifest


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "a checkpoint's JSON files must be readable", received=f"{path}: {error}", remedy=_FETCH
        ) from error


_FETCH = "Fetch the checkpoint again, or use an earlier one."


def verify_files(files: Iterable[Path], manifest: Manifest) -> None:
    """Compare each weight file with the digest that `config.json` states.

    Raises:
        CheckpointError: One is missing, or not the one that was saved.
    """
    for path in files:
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(
                "every weight file of a checkpoint must be there",
                received=str(error),
                remedy=f"{_FETCH} If dense weights lie here, {CONFIG_NAME} must not have {MANIFEST} and "
                "transformers_weights.",
            ) from error
        expected = manifest.sha256.get(path.name)
        if digest != expected:
            raise CheckpointError(
                f"a weight file must be the one that was saved, with the sha256 that {CONFIG_NAME} states",
                received=f"{path.name} with {digest[:12]}… instead of {expected and expected[:12]}…",
                remedy=f"It is damaged or was changed. {_FETCH}",
            )


def read_headers(files: Iterable[Path]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """{name: (shape, dtype)} of all stored tensors; reads no values."""
    found = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # a safe_open is no mapping
                    part = file.get_slice(name)
                    found[name] = (tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), torch.float32))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                "weight files must be readable", received=f"{path.name}: {error}", remedy=_FETCH
            ) from error
    return found


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
