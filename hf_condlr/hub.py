"""`push_to_hub` of a factored model: the factors, and a model card that keeps what the user wrote there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import PreTrainedModel

from hf_condlr.layers import LowRankLayer
from hf_condlr.model_card import write_model_card


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
    """
    repo_id = HfApi().create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        card = folder / "README.md"
        try:
            existing = ModelCard.load(repo_id, token=token)  # type: ignore[arg-type]
            existing.save(card)
        except EntryNotFoundError:
            pass
        if any(isinstance(module, LowRankLayer) for module in model.modules()):
            stated = {"base_model": base_model, "robustness": robustness, "metrics": metrics, "dataset": dataset}
            write_model_card(model, folder, model_id=repo_id, **stated)  # type: ignore[arg-type]
        if tags and card.is_file():
            tagged = ModelCard.load(card)
            tagged.data.tags = [*(tagged.data.tags or []), *(t for t in tags if t not in (tagged.data.tags or []))]
            tagged.save(card)
        return model._upload_modified_files(
            str(folder),
            repo_id,
            files_timestamps={},
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            token=token,
            create_pr=create_pr,
            revision=revision,
        )
