"""`push_to_hub` of a factored model: the factors, and a model card that keeps what the user wrote there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from transformers import PreTrainedModel

from hf_condlr.checkpoints.card import folded_card, write_model_card
from hf_condlr.distributed.shards import is_sharded
from hf_condlr.errors import CheckpointError, require
from hf_condlr.layers import converted_layers


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    base_model: str | None = None,
    robustness: Iterable[Mapping[str, Any]] = (),
    metrics: Mapping[str, Any] | None = None,
    dataset: str | None = None,
    card: str | Path | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
    **options: Any,
) -> Any:
    """Push like `PreTrainedModel.push_to_hub`, in one commit with a card of method, compression, κ and measurements.

    Args:
        model: A model with factored or folded layers.
        repo_id: "user/name"; created where it does not exist.
        base_model: For the card of a factored model, as the next three and `tags`; see `write_model_card`.
        robustness: For each attack its parameters and the accuracy under it.
        metrics: Metrics without an attack, {name: value}.
        dataset: The data of the measurements.
        card: File of the card to complete; by default the one on the Hub.
        private: Whether a new repository is private.
        token: Access token for the Hub; the stored one by default.
        revision: Branch; created where it does not exist.
        max_shard_size: Largest weight file.
        tags: Further tags of the card.
        options: `create_pr`, `commit_message` and `commit_description`, as in `PreTrainedModel.push_to_hub`.

    Returns:
        huggingface_hub's `CommitInfo`. Its errors pass through; nothing on this machine is changed.

    Raises:
        CheckpointError: The model is sharded.
    """
    refuse_sharded(model)
    repo_id = HfApi().create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        card = card or _card(repo_id, revision, token)
        if card is not None:
            shutil.copyfile(card, folder / REPOCARD_NAME)
        if converted_layers(model):
            stated: dict[str, Any] = {"base_model": base_model, "metrics": metrics, "dataset": dataset}
            write_model_card(model, folder, robustness=robustness, model_id=repo_id, tags=tags or (), **stated)
        elif card is None:  # folded: there is no κ to report
            folded_card(model, repo_id, tags=tags or ()).save(folder / REPOCARD_NAME)
        options["commit_message"] = options.get("commit_message") or "Upload model"
        return model._upload_modified_files(
            str(folder), repo_id, files_timestamps={}, token=token, revision=revision, **options
        )


def refuse_sharded(model: PreTrainedModel) -> None:
    """Refuse to upload a sharded model: one process uploads, and would wait for the others to gather with it."""
    rule = "a model to be uploaded must hold full tensors, since one process uploads it"
    remedy = "Call save_pretrained(folder) on every process, and HfApi().upload_folder(...) on one."
    require(not is_sharded(model), rule, received="shards", remedy=remedy, error=CheckpointError)


def _card(repo_id: str, revision: str | None, token: str | bool | None) -> str | None:
    """The card of the branch, or of main where the branch is still to be made; None where there is none."""
    for branch in (revision, None):
        with suppress(RevisionNotFoundError):
            try:
                return hf_hub_download(repo_id, REPOCARD_NAME, revision=branch, token=token)
            except EntryNotFoundError:
                return None
    return None
