"""`push_to_hub` of a factored model: the factors, and a model card that keeps what the user wrote there."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from transformers import PreTrainedModel

from hf_condlr.checkpoints.card import write_model_card
from hf_condlr.distributed.shards import is_sharded
from hf_condlr.errors import CheckpointError
from hf_condlr.layers import factored_layers


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    base_model: str | None = None,
    robustness: Iterable[Mapping[str, Any]] = (),
    metrics: Mapping[str, Any] | None = None,
    dataset: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
) -> Any:
    """As `PreTrainedModel.push_to_hub`, in one commit with a card of method, compression, κ and what was measured.

    Args:
        model: A model with factored or folded layers.
        repo_id: "user/name"; created where it does not exist.
        base_model: For the card, see `write_model_card`; so are the next three.
        robustness: What attacks left of the accuracy.
        metrics: Measured without an attack.
        dataset: That it was measured with.
        private: Whether a new repository is private.
        token: Of the Hub; the stored one by default.
        revision: Branch; created where it does not exist.
        create_pr: Open a pull request instead of committing.
        commit_message: "Upload model" by default.
        commit_description: Of the commit.
        max_shard_size: Largest weight file.
        tags: For the card.

    Returns:
        huggingface_hub's `CommitInfo`. Its errors pass through; nothing on this machine is changed.

    Raises:
        CheckpointError: The model is sharded.
    """
    check_whole(model)
    options: dict[str, Any] = {
        "commit_message": commit_message,
        "commit_description": commit_description,
        "create_pr": create_pr,
    }
    if not factored_layers(model):  # folded: κ is no more to be told
        cls: Any = type(model)
        options |= {"private": private, "max_shard_size": max_shard_size, "tags": tags or []}
        return cls.push_to_hub(model, repo_id, token=token, revision=revision, **options)
    repo_id = HfApi().create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        with contextlib.suppress(EntryNotFoundError):
            shutil.copyfile(_card(repo_id, revision, token), folder / REPOCARD_NAME)
        stated: dict[str, Any] = {"base_model": base_model, "metrics": metrics, "dataset": dataset, "tags": tags or ()}
        write_model_card(model, folder, robustness=robustness, model_id=repo_id, **stated)
        return model._upload_modified_files(
            str(folder),
            repo_id,
            files_timestamps={},
            token=token,
            revision=revision,
            **options | {"commit_message": commit_message or "Upload model"},
        )


def check_whole(model: PreTrainedModel) -> None:
    """Refuse to upload a sharded model: one process uploads, and would wait for the others to gather with it.

    Raises:
        CheckpointError: Some parameter is sharded.
    """
    if is_sharded(model):
        raise CheckpointError(
            "a model to be uploaded must hold whole tensors, since one process uploads it",
            received="shards",
            remedy="Call save_pretrained(folder) without push_to_hub on every process, then "
            "HfApi().upload_folder(folder_path=folder, repo_id=...) on one.",
        )


def _card(repo_id: str, revision: str | None, token: str | bool | None) -> str:
    """The card of the branch, of main where the branch is to be made."""
    try:
        return hf_hub_download(repo_id, REPOCARD_NAME, revision=revision, token=token)
    except RevisionNotFoundError:
        return hf_hub_download(repo_id, REPOCARD_NAME, token=token)
