"""What `import hf_condlr` does: it registers the loader, imports next to nothing, and gives every public name."""

import ast
import importlib
import pickle
import subprocess
import sys

import pytest

import hf_condlr
from tests.paths import ROOT

LIGHT = ("adapters", "adapters.lora_registration", "adapters.registration", "after_import")
LIGHT += ("checkpoints", "checkpoints.registration")

pytestmark = pytest.mark.processes


def run(*lines):
    """What a fresh interpreter prints."""
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", "\n".join(lines)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_the_import_adds_its_own_few_modules():
    lines = ("import sys, torch, transformers", "before = set(sys.modules)", "import hf_condlr")
    added = run(*lines, "print(*sorted(set(sys.modules) - before))")
    assert added == ["hf_condlr", *(f"hf_condlr.{name}" for name in LIGHT)]


def test_the_import_needs_neither_torch_nor_transformers():
    assert run("import hf_condlr, sys", "print(*{'torch', 'transformers'} & set(sys.modules))") == []


@pytest.mark.parametrize("first", ["import hf_condlr", "import transformers.quantizers, hf_condlr"])
def test_the_loader_is_registered_before_and_after_transformers_registry(first):
    lines = (
        "import sys",
        first,
        "from transformers import PreTrainedModel",
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as loaders, AutoQuantizationConfig",
        "manifest = {'quant_method': 'condlr', 'format': 1, 'weights': 'condlr.safetensors', 'layers': {}}",
        "config = AutoQuantizationConfig.from_dict(manifest)",
        "loader = loaders['condlr'](config)",
        "print(type(config).__name__, type(loader).__name__, loaders['condlr'].__name__)",
        "print(*[finder for finder in sys.meta_path if type(finder).__module__.startswith('hf_condlr')])",
    )
    assert run(*lines) == ["FactoredCheckpointConfig", "FactoredCheckpointLoader", "FactoredCheckpointLoader"]


def test_a_second_registration_changes_nothing():
    lines = ("import importlib, sys, hf_condlr", "finders = list(sys.meta_path)", "importlib.reload(hf_condlr)")
    assert run(*lines, "print(sys.meta_path == finders)") == ["True"]


def test_a_registry_that_fails_to_import_is_waited_for_again():
    lines = (
        "import sys, hf_condlr, transformers",
        "sys.modules['transformers.quantizers.base'] = None",
        "try: import transformers.quantizers",
        "except ImportError: del sys.modules['transformers.quantizers.base']",
        "import transformers.quantizers.auto as registry",
        "print('condlr' in registry.AUTO_QUANTIZER_MAPPING)",
    )
    assert run(*lines) == ["True"]


def test_every_public_name_is_there():
    assert {*hf_condlr.__all__} <= {*dir(hf_condlr)}
    for name in hf_condlr.__all__:
        assert getattr(hf_condlr, name).__name__ == name
    names = {}
    exec("from hf_condlr import *", names)
    assert {*hf_condlr.__all__} <= names.keys()


def test_names_are_listed_alike_for_type_checkers_and_at_run_time():
    tree = ast.parse((ROOT / "hf_condlr/__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and getattr(node.test, "id", "") != "")
    typed = {
        node.module.removeprefix("hf_condlr."): [alias.name for alias in node.names]
        for node in block.body
        if isinstance(node, ast.ImportFrom)
    }
    assert typed == hf_condlr._MODULES
    assert sorted(name for names in typed.values() for name in names) == sorted(hf_condlr.__all__)


def test_packages_are_attributes():
    assert hf_condlr.linalg is importlib.import_module("hf_condlr.linalg")
    packages = {path.parent.name for path in (ROOT / "hf_condlr").glob("*/__init__.py")}
    assert packages == {*hf_condlr._PACKAGES}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'hf_condlr' has no attribute 'CondLRConfg'"):
        hf_condlr.CondLRConfg  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'CondLRConfg'"):
        exec("from hf_condlr import CondLRConfg")


def test_public_names_pickle():
    for value in (hf_condlr.CondLRConfig, hf_condlr.evaluate_robustness, hf_condlr.LowRankLinear(4, 3, 2)):
        assert type(pickle.loads(pickle.dumps(value))) is type(value)


def test_without_datasets_and_evaluate_only_what_needs_them_fails():
    """As on a machine that has torch, transformers, accelerate and peft, and no more."""
    lines = (
        "import sys",
        "sys.modules['datasets'] = sys.modules['evaluate'] = None",
        "import torch, hf_condlr",
        "names = {name for name in hf_condlr.__all__ if name not in ('RobustAccuracy', 'AttackSuccessRate')}",
        "for name in names: getattr(hf_condlr, name)",
        "def error(call):",
        "    try: call()",
        "    except ImportError as error: return error.name",
        "print(error(lambda: hf_condlr.RobustAccuracy))",  # needs evaluate, too
        "print(error(lambda: hf_condlr.load_split('beans')))",
        "print(error(lambda: hf_condlr.DatasetArguments('beans').load()))",
        "from torch.utils.data import TensorDataset",
        "from transformers import ViTConfig, ViTForImageClassification",
        "sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)",
        "model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4))",
        "rows = TensorDataset(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))",
        "from hf_condlr.robustness.attacks import PGD",
        "hf_condlr.evaluate_robustness(model, rows, [PGD(0.1, steps=1)], checks=False)",
        "from hf_condlr.cli import main",
    )
    assert run(*lines) == ["datasets", "datasets", "datasets"]
