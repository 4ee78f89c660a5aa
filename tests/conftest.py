"""What holds for every test: no network, a fixed seed, a fixed number of threads."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's threads would spin against torch's

import gc
import socket

import pytest
import torch
import transformers

# Fixed, so that sums are split alike on every machine; small matrices gain nothing from more.
torch.set_num_threads(1)


def pytest_collection_finish():
    """What was imported stays: collections of garbage, one a training at least, need not look at it again."""
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Files that start processes first: they take longest, and each core works on a whole file at a time."""
    slow = {item.path for item in items if item.get_closest_marker("processes")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def seed():
    transformers.set_seed(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    connect = socket.socket.connect

    def connect_locally(self, address):
        is_local = self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost")
        if not is_local:
            raise OSError(f"tests have no network, but this one connects to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)
