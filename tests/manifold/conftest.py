"""Fixtures of the tests of the manifold step."""

import pytest


@pytest.fixture
def running_ahead(monkeypatch):
    """The step as a GPU takes it, on a CPU: masks in place of branches, products in place of factorisations."""
    monkeypatch.setattr("hf_condlr.manifold.masks.runs_ahead", lambda X: True)
