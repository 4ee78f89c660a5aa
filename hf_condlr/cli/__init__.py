"""The command line `condlr`."""

from hf_condlr.cli.main import main

__all__ = ["main"]
