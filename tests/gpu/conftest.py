"""Each test runs twice: on a GPU, where there is one, and on a CPU in emulation, which takes the same branches."""

import pytest
import torch


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """The GPU, or a CPU on which the step takes a GPU's branches."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        return torch.device("cuda")
    monkeypatch.setattr("hf_condlr.manifold.masks.runs_ahead", lambda X: True)
    return torch.device("cpu")


@pytest.fixture
def cuda():
    """The GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device("cuda")


@pytest.fixture
def no_waiting():
    """A context in which torch refuses whatever makes the host wait; does nothing on a CPU."""

    class NoWaiting:
        def __enter__(self):
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_):
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")

    return NoWaiting()


def pytest_collection_modifyitems(items):
    """On a GPU warnings are shown, not errors: what libraries warn of there is not known beforehand."""
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.filterwarnings("default"))
