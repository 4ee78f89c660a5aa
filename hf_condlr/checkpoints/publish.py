"""Writing a checkpoint's files in one step: staged beside their place, flushed, renamed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_condlr.checkpoints.manifest import (
    INDEX_SUFFIX,
    MANIFEST,
    NOTICE,
    STEM,
    SUFFIX,
    Manifest,
    StoredLayer,
)
from hf_condlr.layers import conversion_record

STAGING = ".condlr-"


_SHARD = re.compile(r"(-\d{5}-of-\d{5})\.safetensors$")


def publish(model: PreTrainedModel, staging: Path, folder: Path, layers: dict[str, StoredLayer]) -> None:
    """Move what `staging` holds into `folder`, `config.json` last."""
    shards = sorted(p for p in staging.glob(f"*{SUFFIX}"))
    config = json.loads((staging / CONFIG_NAME).read_text(encoding="utf-8"))
    config["transformers_weights"] = NOTICE
    condlr_config = conversion_record(model).config
    manifest = Manifest(
        weights="",
        layers=layers,
        config=condlr_config.to_dict() if condlr_config is not None else None,
    )
    digests = {path: _digest(path) for path in shards}
    others = [p for p in staging.iterdir() if p not in shards and p.name not in (CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME)]
    index_path = staging / SAFE_WEIGHTS_INDEX_NAME
    index = json.loads(index_path.read_text(encoding="utf-8")) if index_path.is_file() else None
    for path in others:
        _flush(path)
        os.replace(path, folder / path.name)

    def point(stem: str, place: Any) -> list[str]:
        """Place the weights under names that begin with `stem`, then let `config.json` name them."""
        names = {path: _renamed(path.name, stem) for path in shards}
        for path, name in names.items():
            place(path, folder / name)
        manifest.weights = f"{stem}{SUFFIX}"
        manifest.sha256 = {names[path]: digest for path, digest in digests.items()}
        new = list(names.values())
        if index is not None:
            manifest.weights = f"{stem}{INDEX_SUFFIX}"
            places = {key: _renamed(name, stem) for key, name in index["weight_map"].items()}
            _write_json(staging, folder / manifest.weights, index | {"weight_map": places})
            new.append(manifest.weights)
        _sync(folder)
        _write_json(staging, folder / CONFIG_NAME, config | {MANIFEST: manifest.to_dict()})
        _sync(folder)
        return new

    if any(name.startswith(STEM) for name in _weights_in(folder)):
        # Under names that are free first, so that the old checkpoint stays whole; then back to the usual ones.
        _remove_others(folder, point(f"{STEM}-{secrets.token_hex(4)}", _link_or_copy))
    _remove_others(folder, point(STEM, os.replace))


def _renamed(name: str, stem: str) -> str:
    """`model-00001-of-00002.safetensors` with another beginning."""
    shard = _SHARD.search(name)
    return f"{stem}{shard.group(1) if shard else ''}{SUFFIX}"


def _weights_in(folder: Path) -> set[str]:
    """The weight files of earlier checkpoints, factored or dense."""
    dense = SAFE_WEIGHTS_NAME.removesuffix(SUFFIX)
    names = rf"({STEM}(-[0-9a-f]{{8}})?|{dense})(-\d{{5}}-of-\d{{5}})?"  # nothing else: other files are the user's
    pattern = re.compile(rf"{names}({re.escape(SUFFIX)}|{re.escape(INDEX_SUFFIX)})")
    return {path.name for path in folder.iterdir() if pattern.fullmatch(path.name)}


def _remove_others(folder: Path, kept: list[str]) -> None:
    for name in _weights_in(folder) - set(kept):
        (folder / name).unlink()


def _digest(path: Path) -> str:
    """Of the file as it lies on the disk: flushed first, so that a commit never names what is not there yet."""
    _flush(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
        _flush(target)


def _write_json(staging: Path, path: Path, values: dict[str, Any]) -> None:
    temporary = staging / f"{path.name}.tmp"
    temporary.write_text(json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    _flush(temporary)
    os.replace(temporary, path)


def _flush(path: Path) -> None:
    if path.is_file():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Renames reach the disk in order; not every system lets a folder be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
