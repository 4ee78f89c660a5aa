"""Ranks from a budget, against brute force."""

import itertools
import random

import pytest
import torch

from hf_condlr.conversion.rank_budget import allocate_by_energy, allocate_uniform, break_even_rank, factored_size
from hf_condlr.errors import ConfigError

BERT = {f"a{i}": (768, 768) for i in range(8)} | {f"b{i}": (3072, 768) for i in range(4)}


def size(shapes, ranks, form="training"):
    return sum(m * n if ranks[k] is None else factored_size(m, n, ranks[k], form) for k, (m, n) in shapes.items())


def error(energies, ranks):
    return sum(0.0 if r is None else energies[k][r:].sum().item() for k, r in ranks.items())


def dense_size(shapes):
    return sum(m * n for m, n in shapes.values())


@pytest.mark.parametrize("form", ["training", "folded", "pivoted"])
@pytest.mark.parametrize("shape", [(8, 8), (100, 3), (3, 100), (1, 5), (768, 3072), (32, 32), (2, 2)])
def test_break_even_rank(shape, form):
    m, n = shape
    pays = [
        r
        for r in range(1, min(m, n) + 1)
        if r * (m + n) + {"training": r, "folded": 0, "pivoted": -r}[form] * r < m * n
    ]
    assert break_even_rank(m, n, form) == max(pays, default=0)


def test_a_square_layer_that_pays_folded_only():
    """At 20 % removed a square layer has r = 0.35 n in the training form, 0.4 n folded and 0.55 n pivoted."""
    shapes = {"square": (1000, 1000)}
    assert allocate_uniform(shapes, 0.2) == {"square": pytest.approx(1000 * (0.8 + 1) ** 0.5 - 1000, abs=1)}
    assert allocate_uniform(shapes, 0.2, form="folded") == {"square": 400}
    assert allocate_uniform(shapes, 0.2, form="pivoted") == {"square": pytest.approx(1000 - 1000 * 0.2**0.5, abs=1)}
    assert (break_even_rank(1000, 1000), break_even_rank(1000, 1000, "folded")) == (414, 499)


@pytest.mark.parametrize("form", ["training", "folded", "pivoted"])
@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.5, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("allocation", ["uniform", "energy"])
def test_budget_is_met_and_never_exceeded(allocation, ratio, form):
    generator = torch.Generator().manual_seed(0)
    shapes = BERT | {"small": (40, 30), "thin": (200, 3)}
    energies = {k: (torch.rand(min(s), generator=generator) ** 8).sort().values.flip(0) for k, s in shapes.items()}
    uniform = allocation == "uniform"
    ranks = (
        allocate_uniform(shapes, ratio, form=form)
        if uniform
        else allocate_by_energy(shapes, energies, ratio, form=form)
    )
    budget = (1 - ratio) * dense_size(shapes)
    one_more = [
        factored_size(*shapes[k], r + 1, form) - factored_size(*shapes[k], r, form)
        for k, r in ranks.items()
        if r is not None and r < break_even_rank(*shapes[k], form)
    ]
    assert size(shapes, ranks, form) <= budget
    assert size(shapes, ranks, form) >= min(0.99 * budget, budget - min(one_more, default=budget))


@pytest.mark.parametrize("ratio", [0.2, 0.6, 0.9])
@pytest.mark.parametrize("allocation", ["uniform", "energy"])
def test_ranks_are_multiples_and_use_the_budget(allocation, ratio):
    """Of 8 where they are not smaller; what is left of the budget is less than eight ranks of any layer cost."""
    generator = torch.Generator().manual_seed(0)
    shapes = BERT | {"small": (40, 30), "thin": (200, 3)}
    energies = {k: (torch.rand(min(s), generator=generator) ** 8).sort().values.flip(0) for k, s in shapes.items()}
    uniform = allocation == "uniform"
    ranks = allocate_uniform(shapes, ratio, 8) if uniform else allocate_by_energy(shapes, energies, ratio, 8)
    assert all(r is None or r < 8 or r % 8 == 0 for r in ranks.values())
    assert any(r is not None and r >= 8 for r in ranks.values())
    budget = (1 - ratio) * dense_size(shapes)
    eight_more = [
        factored_size(*shapes[k], r + 8) - factored_size(*shapes[k], r)
        for k, r in ranks.items()
        if r is not None and 8 <= r <= break_even_rank(*shapes[k]) - 8
    ]
    assert size(shapes, ranks) <= budget
    assert size(shapes, ranks) >= min(0.99 * budget, budget - min(eight_more, default=budget))


def test_uniform_is_one_ratio():
    ranks = allocate_uniform(BERT, 0.6)
    assert len(set(ranks.values())) == 1
    assert ranks["a0"] == pytest.approx(0.25 * 768, rel=0.05)


def test_layers_where_factoring_does_not_pay_stay_dense():
    ranks = allocate_uniform({"wide": (100, 100), "thin": (1, 50)}, 0.5)
    assert ranks["thin"] is None and ranks["wide"] is not None


def test_energy_against_brute_force():
    """No choice of ranks within the size that the Lagrangian point has is better; the fill only improves on it."""
    rng = random.Random(1)
    generator = torch.Generator().manual_seed(1)
    compared = 0
    for _ in range(60):
        shapes = {str(i): (rng.randint(4, 9), rng.randint(4, 9)) for i in range(3)}
        energies = {
            k: (torch.rand(min(s), generator=generator) ** 4).sort(descending=True).values for k, s in shapes.items()
        }
        ratio = rng.uniform(0.1, 0.4)
        try:
            ranks = allocate_by_energy(shapes, energies, ratio)
        except ConfigError:
            continue
        options = [[*range(1, break_even_rank(*s) + 1), None] for s in shapes.values()]
        choices = [dict(zip(shapes, option, strict=True)) for option in itertools.product(*options)]
        budget = (1 - ratio) * dense_size(shapes)
        best = min(error(energies, c) for c in choices if size(shapes, c) <= budget)
        # What greedy filling can miss of a knapsack's last piece: the optimum with one largest increment less.
        step = max(m + n + 2 * break_even_rank(m, n) + 1 for m, n in shapes.values())
        dense_jump = max(m * n - factored_size(m, n, break_even_rank(m, n)) for m, n in shapes.values())
        slack = budget - max(step, dense_jump)
        worst_allowed = min((error(energies, c) for c in choices if size(shapes, c) <= slack), default=float("inf"))
        assert best - 1e-6 <= error(energies, ranks) <= worst_allowed + 1e-6
        compared += worst_allowed < float("inf")
    assert compared > 20


def test_energy_gives_rank_to_the_layer_that_needs_it():
    flat, steep = torch.ones(64), torch.tensor([100.0] + [1e-6] * 63)
    ranks = allocate_by_energy({"flat": (64, 64), "steep": (64, 64)}, {"flat": flat, "steep": steep}, 0.6)
    assert ranks["steep"] == 1
    assert ranks["flat"] is None or ranks["flat"] > 20


def test_impossible_budget_is_refused():
    with pytest.raises(ConfigError, match=r"must leave at least rank 1 .*, here at most 0\.7.*received 0\.9"):
        allocate_uniform({"a": (8, 8)}, 0.9)
