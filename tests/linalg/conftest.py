"""Fixtures of the tests of `hf_condlr.linalg`."""

import random

import numpy as np
import pytest
import torch

from tests.linalg import cases, reference


def random_states():
    _, keys, position, *_ = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), keys.tobytes(), position, random.getstate()


@pytest.fixture(autouse=True)
def global_random_state_untouched(request):
    before = random_states()
    yield
    assert random_states() == before or "random_factors" in request.node.name


@pytest.fixture(scope="session")
def hard():
    """The core on which LAPACK fails in float32, and its float64 decomposition P, σ, Qᵀ."""
    S = cases.core_without_svd()
    return S, *np.linalg.svd(reference.array(S))
