"""Trained classifiers for the tests of attacks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn


@pytest.fixture(scope="module")
def trained():
    """A small trained MLP on a ball against its outside: model, inputs (200, 6), labels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.rand(600, 6)
        labels = ((x - 0.5).square().sum(1) > 0.5).long()
        model = nn.Sequential(
            nn.Linear(6, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert (model(x).argmax(1) == labels).float().mean() > 0.95
    return model, x[:200], labels[:200]
