"""Checks of a checkpoint before it is loaded: complete files, and factors that obey their bound."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import CONFIG_NAME

from hf_condlr.checkpoints.manifest import MANIFEST, Manifest, StoredLayer
from hf_condlr.checkpoints.rounding import can_be_orthonormal, least_condition_number
from hf_condlr.distributed.sharded_linalg import is_finite, orthonormality_error
from hf_condlr.distributed.shards import full_tensor
from hf_condlr.errors import CheckpointError, listed, require
from hf_condlr.files import digest
from hf_condlr.layers import Factors
from hf_condlr.linalg import condition_number, obeys_bound

FETCH = "Fetch the checkpoint again, or use an earlier one."
Header = dict[str, tuple[tuple[int, ...], str]]
"""{name: (shape, dtype)} of the stored tensors, dtypes under safetensors' names."""
FACTOR_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def check_factors(name: str, factors: Factors, stored: StoredLayer, dtype: torch.dtype) -> None:
    """Check that U, S, V can be the rounding of factors that obey what the checkpoint states.

    Args:
        name: The layer's name, for the message.
        factors: The loaded U, S, V. Sharded ones are checked by all processes together.
        stored: Description of the layer in `config.json`.
        dtype: Dtype of the file; that of the factors may round once more.

    Raises:
        CheckpointError: The factors contradict the description.
    """
    U, S, V = factors
    # Lists: each entry may be a sum over processes. Orthonormal bases are finite.
    orthonormal = stored.orthonormal and all([can_be_orthonormal(basis, dtype) for basis in (U, V)])
    if not all([is_finite(factor) for factor in ([S] if orthonormal else factors)]):
        raise _changed(name, "U, S and V must be finite", "a value that is not")
    if stored.orthonormal and not orthonormal:
        error = max(orthonormality_error(U).item(), orthonormality_error(V).item())
        raise _changed(name, "U and V must have orthonormal columns", f"an orthonormality error of {error:.3g}")
    if stored.bound < math.inf and not obeys_bound(least_condition_number(S, dtype), stored.bound):
        kappa = condition_number(full_tensor(S)).item()
        raise _changed(name, f"κ(S) must be at most {stored.bound:.6g} as {CONFIG_NAME} states", f"κ = {kappa:.6g}")


def check_order(name: str, order: Tensor) -> None:
    """Check that the order of a pivoted layer's outputs is one: a permutation.

    Raises:
        CheckpointError: It is not.
    """
    is_read = not order.is_meta  # `device_map` may have left it on the disk
    if is_read and not torch.equal(order.sort().values, torch.arange(len(order)).to(order)):
        raise _changed(name, "the order of outputs must be a permutation", "another list of numbers")


def _changed(name: str, rule: str, received: str) -> CheckpointError:
    return CheckpointError(
        rule, received=f"{received} in {name}", remedy="The weights are not those that were saved: fetch them again."
    )


def require_regular_files(folder: Path, manifest: Manifest) -> None:
    """Refuse pipes and devices, which could be read without end, before anything opens them; missing files pass."""
    for path in [folder / name for name in (manifest.weights, *manifest.sha256)]:
        if path.exists() and not path.is_file():
            found = f"another kind of file at {path}"
            raise CheckpointError("weight files must be regular files", received=found, remedy=FETCH)


def verify_files(files: Iterable[Path], manifest: Manifest) -> None:
    """Compare weight files and index with the digests that `config.json` states.

    Args:
        files: The files that are about to be loaded; the index lies next to them.
        manifest: The manifest in `config.json`.

    Raises:
        CheckpointError: A file is missing, is not the one that was saved, or would not be loaded.
    """
    found = {path.name: path for path in files}
    if found and manifest.weights in manifest.sha256:
        found[manifest.weights] = next(iter(found.values())).with_name(manifest.weights)
    wrong = [f"an index without {name}" for name in manifest.sha256 if name not in found]
    for name, path in found.items():
        try:
            if digest(path) != manifest.sha256.get(name):
                wrong.append(f"another {name}")
        except OSError as error:
            wrong.append(str(error))
    rule = f"the weight files must be those that were saved, with the sha256 that {CONFIG_NAME} states"
    remedy = f"{FETCH} If dense weights lie here, remove {MANIFEST} and transformers_weights from {CONFIG_NAME}."
    require(not wrong, rule, received=listed(wrong), remedy=remedy, error=CheckpointError)


def read_headers(files: Iterable[Path]) -> Header:
    """Shape and dtype of all stored tensors; reads no values."""
    found: Header = {}
    for path in files:
        try:
            if not path.is_file():
                raise OSError("no such regular file")
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # a safe_open is no mapping
                    part = file.get_slice(name)
                    found[name] = (tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                "weight files must be readable", received=f"{path.name}: {error}", remedy=FETCH
            ) from error
    return found
