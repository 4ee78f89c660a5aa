"""What a checkpoint must be before it is believed: whole files, and factors that obey their bound."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_condlr.checkpoints.manifest import INDEX_SUFFIX, MANIFEST, Manifest, StoredLayer
from hf_condlr.checkpoints.rounding import KAPPA_TOLERANCE, measure
from hf_condlr.distributed.sharded_linalg import is_finite, orthonormality_error
from hf_condlr.distributed.shards import full_tensor
from hf_condlr.errors import CheckpointError
from hf_condlr.layers import Factors
from hf_condlr.linalg import condition_number


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
    orthonormal, least = measure(factors, dtype)
    U, S, V = factors
    if stored.orthonormal and not orthonormal:
        error = max(orthonormality_error(U).item(), orthonormality_error(V).item())
        raise _broken(name, "U and V must have orthonormal columns", f"an orthonormality error of {error:.3g}")
    if not least <= stored.bound * KAPPA_TOLERANCE:
        kappa = condition_number(full_tensor(S)).item()
        raise _broken(name, f"κ(S) must be at most {stored.bound:.6g} as {CONFIG_NAME} states", f"κ = {kappa:.6g}")


def _broken(name: str, rule: str, received: str) -> CheckpointError:
    return CheckpointError(
        rule, received=f"{received} in {name}", remedy="The weights are not those that were saved: fetch them again."
    )


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
