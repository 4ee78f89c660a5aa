"""Factored checkpoints: what is saved, loaded, verified, described and pushed. Importing it registers the loader."""

from hf_condlr.checkpoints.card import write_model_card
from hf_condlr.checkpoints.load import FactoredCheckpointLoader
from hf_condlr.checkpoints.sharded import load_sharded, save_sharded

__all__ = ["FactoredCheckpointLoader", "load_sharded", "save_sharded", "write_model_card"]
