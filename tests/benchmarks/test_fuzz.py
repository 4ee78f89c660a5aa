"""Random cases against the manifold step, always the same few, and the least case of every defect they once found."""

import dataclasses
import logging

import pytest

pytest.importorskip("hypothesis")
from benchmarks import fuzz
from benchmarks import fuzz_cases as parts

Case, Do, Layer, Step = parts.Case, parts.Do, parts.Layer, parts.Step
PAIR = (Layer(8, 8, 4), Layer(8, 8, 4), Layer(5, 1, 1))
STEP = Step(0)


@pytest.fixture(autouse=True)
def quiet():
    """What is held is said, again and again."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def test_random_cases_keep_every_invariant():
    steps = []
    fuzz.fuzz(20, start=None, then=lambda run: steps.append(run.steps), most=2)
    assert sum(steps) > 40


@pytest.mark.parametrize("optimizer", parts.OPTIMIZERS)
def test_every_bad_gradient_under_every_optimizer(optimizer):
    """In one factor after the other, while the others have good ones."""
    events = [Step(i, others=((i % 9, kind),)) for i, kind in enumerate(parts.GRADIENTS)]
    assert parts.run(Case(PAIR, tuple(events), optimizer, lr=0.1)).steps == len(parts.GRADIENTS)


def test_every_bad_gradient_in_all_factors():
    events = [event for kind in parts.GRADIENTS for event in (Step(0, kind), STEP)]
    assert parts.run(Case(PAIR, tuple(events), "adamw-fused", lr=0.1)).steps == 2 * len(parts.GRADIENTS)


@pytest.mark.parametrize("ahead", [False, True])
def test_every_bad_gradient_in_adapters(ahead):
    """From their start, at which S is near zero, and as a GPU steps."""
    layers = tuple(dataclasses.replace(layer, adapter=True) for layer in (*PAIR, Layer(6, 8, 3, 0.0, conv1d=True)))
    events = [event for i, kind in enumerate(parts.GRADIENTS) for event in (Step(i, kind), STEP)]
    case = Case(layers, tuple(events), "adamw-fused", lr=0.1, ahead=ahead)
    assert parts.run(case).steps == 2 * len(parts.GRADIENTS)


# The least cases of what was found, and mended. ahead: as on a GPU
DEFECTS = {
    "squares of a gradient overflow in the optimizer": Case(PAIR, (Step(0, "1e30"), STEP), "adamw-fused"),
    "moments overflow in the optimizer": Case((Layer(8, 8, 4, 0.0),), (Step(0, "decades"),), "adafactor-relative"),
    "moments overflow where a tolerance was changed": Case(
        (Layer(8, 8, 4, 0.0),), (Step(0, "decades"), Do("tau", 0, 1e-7), Step(0, "zero")), "adafactor-relative"
    ),
    "a zero core that does not move": Case((Layer(5, 1, 1, core="zero"),), (Step(0, "zero"), STEP), "sgd"),
    "a zero core whose step is of rank one": Case((Layer(8, 8, 4, 0.0, core="zero"),), (Step(0, "rank one"),), "sgd"),
    "a zero core, twice": Case((Layer(8, 8, 4, core="zero"),), (Step(0, "zero"), Step(0, "rank one")), "sgd"),
    "written bases that do not move": Case(PAIR, (STEP, Do("bases", 2), Step(0, "zero")), "sgd"),
    "written bases without a gradient": Case(PAIR, (STEP, Do("bases", 0), Step(0, "none")), "sgd"),
    "a frozen core that is written": Case(PAIR, (STEP, Do("freeze", 1), Do("write", 0, "three decades"), STEP)),
    "a frozen core of another tolerance": Case(PAIR, (STEP, Do("freeze", 1), Do("tau", 0, 0.0), STEP)),
    "a factor written past the version counter": Case(PAIR, (STEP, Do("data", 0), Step(0, "zero"))),
    "a frozen factor written past the version counter": Case(PAIR, (STEP, Do("freeze", 5), Do("data", 5), STEP)),
    "another tolerance between projections": Case(PAIR, (STEP, Do("tau", 0, 0.0), Do("settle")), interval=2),
    "a frozen basis written between projections": Case(
        PAIR, (Do("freeze", 0), STEP, STEP, Do("bases", 0), STEP), interval=3
    ),
    "a frozen core is written and all of it loaded": Case(
        PAIR, (STEP, Do("freeze", 1), Do("write", 0, "eight decades"), Do("reload"), STEP)
    ),
}


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("defect", DEFECTS)
def test_what_was_mended_stays_so(defect, ahead):
    case = DEFECTS[defect]
    taken = sum(event.times for event in case.events if isinstance(event, Step))
    assert parts.run(dataclasses.replace(case, ahead=ahead)).steps == taken  # each of them checked
