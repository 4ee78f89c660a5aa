"""The house has floors and no back-stairs: a module imports only from lower floors, a recipe only public names."""

import ast
import importlib
from importlib.util import resolve_name
from pathlib import Path

import pytest

PACKAGE = "hf_condlr"
PUBLIC_MODULES = (PACKAGE, *(f"{PACKAGE}.{name}" for name in ("attacks", "baselines", "files")))
ROOT = Path(__file__).parent.parent

# Modules and subpackages, the package's own `__init__` on top. Inside a subpackage imports are free.
FLOORS = (
    {"errors", "files", "precision", "devices"},
    {"linalg", "divergence", "replicas"},
    {"shards"},
    {"config", "layers", "attacks", "product_clip"},
    {"initialization", "calibration", "ranks", "targets", "checkpoints", "training_args"},
    {"interference", "moments", "stacks", "optimizer_checks"},
    {"sharing"},
    {"fisher", "feasible", "manifold", "diagnostics", "metrics", "restoring", "adversarial", "baselines"},
    {"starts", "model_card", "plots", "sharded_checkpoints"},
    {"hub"},
    {"saving"},
    {"conversion", "evaluation"},
    {"loading", "export"},
    {"trainer", "cli"},
    {"__init__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module):
    """`hf_condlr.attacks.pgd` lies in the room `attacks`, `hf_condlr` itself in `__init__`."""
    return f"{module}.__init__".split(".")[1]


def imports(source, package=""):
    """Pairs (module, name or None) of all imports from hf_condlr, wherever in the source; relative ones resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            found = [(module, alias.name) for alias in node.names]
        else:
            continue
        yield from ((module, name) for module, name in found if module.split(".")[0] == PACKAGE)


def back_stairs(source, *, room, package):
    """Rooms that a module in `room` must not import from and does."""
    rooms = {
        name if module == PACKAGE and name in FLOOR else room_of(module) for module, name in imports(source, package)
    }
    is_subpackage = package != PACKAGE
    return sorted(
        other
        for other in rooms
        if not (is_subpackage and other == room) and not FLOOR.get(other, len(FLOORS)) < FLOOR[room]
    )


def private_imports(source, public):
    """Imports of a recipe that go past the names its public modules, {module: names}, export."""
    return sorted(
        f"{module}.{name}" if name else module
        for module, name in imports(source)
        if module not in public or (name is not None and name not in public[module])
    )


MODULES = sorted((ROOT / PACKAGE).rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").rglob("*.py"))


def relative(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_module_imports_only_from_lower_floors(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    room = parts[1]
    assert room in FLOOR, f"{relative(path)} has no floor: give it one in FLOORS"
    assert back_stairs(path.read_text(encoding="utf-8"), room=room, package=".".join(parts[:-1])) == []


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_recipe_imports_only_public_names(path):
    public = {module: set(importlib.import_module(module).__all__) for module in PUBLIC_MODULES}
    assert private_imports(path.read_text(encoding="utf-8"), public) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from .linalg import retract_qr", []),
        ("from . import errors, layers", []),
        ("import torch; from peft import PeftConfig", []),
        ("from hf_condlr_extras import plots", []),
        ("from .plots import plot_report", ["plots"]),
        ("from .conversion import to_dense_model", ["conversion"]),
        ("from . import trainer", ["trainer"]),
        ("from . import CondLRConfig", ["__init__"]),
        ("import hf_condlr", ["__init__"]),
        ("import hf_condlr.trainer as t", ["trainer"]),
        ("from hf_condlr import saving", ["saving"]),
        ("from hf_condlr.model_card.card import write", ["model_card"]),
        ("from .attic import box", ["attic"]),
        ("def late():\n    if True:\n        from .cli import main", ["cli"]),
    ],
)
def test_back_stairs_from_manifold(source, found):
    assert back_stairs(source, room="manifold", package=PACKAGE) == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from .base import Attack", []),
        ("from ..linalg import condition_number", []),
        ("from ..layers import LowRankLinear", ["layers"]),
        ("from .. import PGD", ["__init__"]),
    ],
)
def test_back_stairs_from_inside_attacks(source, found):
    assert back_stairs(source, room="attacks", package=f"{PACKAGE}.attacks") == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from hf_condlr import CondLRConfig", []),
        ("from hf_condlr.attacks import PGD", []),
        ("import hf_condlr", []),
        ("from hf_condlr import linalg", ["hf_condlr.linalg"]),
        ("from hf_condlr import *", ["hf_condlr.*"]),
        ("from hf_condlr.attacks.pgd import PGD", ["hf_condlr.attacks.pgd.PGD"]),
        ("def late():\n    import hf_condlr.manifold", ["hf_condlr.manifold"]),
    ],
)
def test_private_imports(source, found):
    assert private_imports(source, {PACKAGE: {"CondLRConfig"}, f"{PACKAGE}.attacks": {"PGD"}}) == found
