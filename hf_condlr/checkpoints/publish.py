"""Writing a checkpoint's files in one step: staged next to their place, flushed, renamed."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_condlr.checkpoints.manifest import INDEX_SUFFIX, MANIFEST, NOTICE, STEM, SUFFIX, UNREADABLE, Manifest
from hf_condlr.files import digest, flush, link_or_copy, sync_folder

STAGING = ".condlr-"

_SHARD = re.compile(r"(-\d{5}-of-\d{5})\.safetensors$")
# Weight files of factored checkpoints, and also of dense ones; other names are the user's.
_FACTORED, _ANY = (
    re.compile(rf"({names})(-\d{{5}}-of-\d{{5}})?({re.escape(SUFFIX)}|{re.escape(INDEX_SUFFIX)})")
    for names in (rf"{STEM}(-[0-9a-f]{{8}})?", rf"{STEM}(-[0-9a-f]{{8}})?|{SAFE_WEIGHTS_NAME.removesuffix(SUFFIX)}")
)


def publish(staging: Path, folder: Path, manifest: Manifest, config: dict[str, Any]) -> None:
    """Move the files that transformers wrote into `staging` to `folder`, `config.json` last.

    Args:
        staging: A folder inside `folder`.
        folder: The checkpoint's folder; a checkpoint in it stays complete until `config.json` is replaced.
        manifest: Description of the layers; the files are added.
        config: Fields of `config.json` in addition to or instead of transformers' own.
    """
    shards = sorted(staging.glob(f"*{SUFFIX}"))
    config = _read(staging / CONFIG_NAME) | {"transformers_weights": NOTICE} | config
    index_path = staging / SAFE_WEIGHTS_INDEX_NAME
    index = _read(index_path) if index_path.is_file() else None
    for path in shards:
        flush(path)  # before its digest: the file that config.json names is on the disk then
    digests = {path: digest(path) for path in shards}
    for path in set(staging.iterdir()) - {*shards, index_path, staging / CONFIG_NAME}:
        flush(path)
        os.replace(path, folder / path.name)

    def point(stem: str, place: Callable[[Path, Path], None]) -> Iterable[str]:
        """Place the weights under names that begin with `stem`, then let `config.json` name them."""
        names = {path: _renamed(path.name, stem) for path in shards}
        for path, name in names.items():
            place(path, folder / name)
        manifest.weights = f"{stem}{SUFFIX}"
        manifest.sha256 = {names[path]: value for path, value in digests.items()}
        if index is not None:
            manifest.weights = f"{stem}{INDEX_SUFFIX}"
            places = {key: _renamed(name, stem) for key, name in index["weight_map"].items()}
            _write(staging, folder / manifest.weights, index | {"weight_map": places})
            manifest.sha256[manifest.weights] = digest(folder / manifest.weights)
        sync_folder(folder)
        _write(staging, folder / CONFIG_NAME, config | {MANIFEST: manifest.to_dict()})
        sync_folder(folder)
        return manifest.sha256

    if any(_FACTORED.fullmatch(path.name) for path in folder.iterdir()):
        # Under free names first, so that the old checkpoint stays complete; then back to the usual ones.
        _remove(_ANY, folder, kept=point(f"{STEM}-{secrets.token_hex(4)}", link_or_copy))
    _remove(_ANY, folder, kept=point(STEM, lambda source, target: os.replace(source, target)))


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left: staging folders, and factors that `config.json` does not name."""
    for staging in folder.glob(f"{STAGING}*"):
        shutil.rmtree(staging, ignore_errors=True)
    kept: set[str] = set()
    if (folder / CONFIG_NAME).is_file():
        try:
            stated = _read(folder / CONFIG_NAME).get(MANIFEST) or {}
            kept = {str(stated.get("weights")), *stated.get("sha256", ())}
        except UNREADABLE:  # another program's file: nothing is known about the factors
            return
    _remove(_FACTORED, folder, kept=kept)


def _remove(pattern: re.Pattern[str], folder: Path, *, kept: Iterable[str]) -> None:
    for path in list(folder.iterdir()):
        if pattern.fullmatch(path.name) and path.name not in kept:
            path.unlink()


def _renamed(name: str, stem: str) -> str:
    """`model-00001-of-00002.safetensors` with another beginning."""
    shard = _SHARD.search(name)
    return f"{stem}{shard.group(1) if shard else ''}{SUFFIX}"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(staging: Path, path: Path, values: dict[str, Any]) -> None:
    temporary = staging / f"{path.name}.tmp"
    temporary.write_text(json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    flush(temporary)
    os.replace(temporary, path)
