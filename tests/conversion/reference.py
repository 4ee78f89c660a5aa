"""The metric of a start by its definition, in float64: roots from eigenvalues."""

import torch


def whiten(W, C):
    """W C^{1/2} in the eigenbasis of C."""
    values, Q = torch.linalg.eigh(C.double())
    return (W.double() @ Q) * values.clamp_min(0).sqrt()


def fisher_root(F):
    """F̃^{1/2}, F̃ = F + (tr F/m) I, or I for F = 0."""
    F = F.double()
    damping, identity = F.trace() / len(F), torch.eye(len(F), dtype=torch.float64)
    values, Q = torch.linalg.eigh(F + damping * identity if damping > 0 else identity)
    return (Q * values.sqrt()) @ Q.mT


def in_metric(W, C, F=None):
    """F̃^{1/2} W C^{1/2} up to a rotation on the right."""
    return whiten(W, C) if F is None else fisher_root(F) @ whiten(W, C)
