"""The house has floors: packages import from lower ones only, files not in circles, recipes only public names."""

import ast
import importlib.metadata
import sys
from contextlib import suppress
from importlib.util import resolve_name

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hf_condlr
import hf_condlr.robustness.attacks
from tests.paths import ROOT

PACKAGE = "hf_condlr"
PUBLIC = {
    PACKAGE: {*hf_condlr.__all__},
    f"{PACKAGE}.robustness.attacks": {*hf_condlr.robustness.attacks.__all__},
    f"{PACKAGE}.files": {"replacing"},
    f"{PACKAGE}.tables": {"markdown_table"},
}

# From the ground up; inside a package imports are free as long as no files import each other.
FLOORS = (
    {"errors", "files", "tables", "after_import"},
    {"options"},
    {"linalg"},
    {"distributed", "config"},
    {"layers"},
    {"manifold", "robustness"},
    {"checkpoints"},
    {"conversion", "adapters"},
    {"training"},
    {"scripts"},
    {"compression"},
    {"cli"},
    {PACKAGE},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def module_name(path, root=ROOT):
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
RECIPES = sorted((ROOT / "recipes").rglob("*.py"))


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


def imported_modules(source, package="", modules=MODULES):
    """The modules of the package that a source imports."""
    return {
        f"{module}.{name}" if f"{module}.{name}" in modules else module for module, name in imports(source, package)
    }


def room_of(module):
    """`hf_condlr.layers.linear` lies in the room `layers`, `hf_condlr` itself in `hf_condlr`."""
    return module.split(".")[1] if "." in module else PACKAGE


def upward_imports(source, *, room, package):
    """Rooms that a module in `room` must not import from and does."""
    rooms = {room_of(module) for module in imported_modules(source, package)} - {room}
    return sorted(other for other in rooms if not FLOOR.get(other, len(FLOORS)) < FLOOR[room])


def circle(graph):
    """Some circle of {module: modules that it imports}, or []."""
    done = set()

    def walk(module, way):
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph.get(module, ())):
            found = walk(other, [*way, module])
            if found:
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := walk(module, []))), [])


def private_imports(source, public=PUBLIC):
    """Imports of a recipe that go past the names its public modules, {module: names}, export."""
    return sorted(
        f"{module}.{name}" if name else module
        for module, name in imports(source)
        if module not in public or (name is not None and name not in public[module])
    )


def package_of(module):
    return module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_from_lower_floors(module):
    room = room_of(module)
    assert room in FLOOR, f"{module} has no floor: give it one in FLOORS"
    assert upward_imports(MODULES[module].read_text(encoding="utf-8"), room=room, package=package_of(module)) == []


def test_no_two_files_import_each_other():
    graph = {
        module: imported_modules(path.read_text(encoding="utf-8"), package_of(module)) - {module}
        for module, path in MODULES.items()
    }
    assert circle(graph) == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe_imports_only_public_names(path):
    assert private_imports(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from ..linalg import retract_qr", []),
        ("from .. import errors, layers", []),
        ("import torch; from peft import PeftConfig", []),
        ("from hf_condlr_extras import plots", []),
        ("from .stack import Stack", []),
        ("from ..plots import plot_report", ["plots"]),
        ("from ..conversion import to_dense_model", ["conversion"]),
        ("from .. import training", ["training"]),
        ("from .. import CondLRConfig", ["hf_condlr"]),
        ("import hf_condlr", ["hf_condlr"]),
        ("import hf_condlr.training as t", ["training"]),
        ("from hf_condlr.robustness.attacks.gradient import PGD", ["robustness"]),
        ("def late():\n    if True:\n        from ..cli import main", ["cli"]),
    ],
)
def test_upward_imports_from_manifold(source, found):
    assert upward_imports(source, room="manifold", package=f"{PACKAGE}.manifold") == found


@pytest.mark.parametrize(
    ("graph", "found"),
    [
        ({"a": {"b"}, "b": {"c"}, "d": {"b", "c"}}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, ["b", "c", "b"]),
    ],
)
def test_circle(graph, found):
    assert circle(graph) == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from hf_condlr import CondLRConfig", []),
        ("from hf_condlr.robustness.attacks import PGD", []),
        ("import hf_condlr", []),
        ("from hf_condlr import linalg", ["hf_condlr.linalg"]),
        ("from hf_condlr import *", ["hf_condlr.*"]),
        ("from hf_condlr.robustness.attacks.gradient import PGD", ["hf_condlr.robustness.attacks.gradient.PGD"]),
        ("def late():\n    import hf_condlr.manifold", ["hf_condlr.manifold"]),
    ],
)
def test_private_imports(source, found):
    assert private_imports(source) == found


def required(name, found):
    """The distributions that an installation of one brings, extras left out."""
    for line in importlib.metadata.requires(name) or ():
        requirement = Requirement(line)
        key = canonicalize_name(requirement.name)
        if key not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found.add(key)
            with suppress(importlib.metadata.PackageNotFoundError):  # of another platform
                required(key, found)
    return found


def test_what_is_imported_at_once_is_installed_with_the_package():
    """Extras are imported where they are needed, inside functions."""
    installed, owners = required(PACKAGE, set()), importlib.metadata.packages_distributions()
    missing = []
    for path in ROOT.glob(f"{PACKAGE}/**/*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for module in {name.split(".")[0] for name in names} - {PACKAGE} - sys.stdlib_module_names:
                if not {canonicalize_name(owner) for owner in owners.get(module, ())} & installed:
                    missing.append(f"{path.relative_to(ROOT)}: {module}")
    assert missing == []
