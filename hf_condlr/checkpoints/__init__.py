"""Factored checkpoints: what is saved, loaded, verified, described and pushed."""

METHOD = "condlr"
"""The name of the format, under which transformers finds the loader."""
