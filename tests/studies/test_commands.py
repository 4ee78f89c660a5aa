"""Every command of a study or a benchmark in the documentation exists, with options that it takes."""

import importlib
import re
import shlex

import pytest
from transformers import HfArgumentParser

from tests.paths import ROOT

COMMAND = re.compile(r"(?:-m|--module) ((?:studies|benchmarks)\.[\w.]+)((?:[^\n`\\]|\\\n)*)")
PAGES = [*ROOT.glob("docs/*.md"), ROOT / "README.md", *ROOT.glob("studies/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]
PAGES += [*ROOT.glob("benchmarks/**/*.md")]
COMMANDS = sorted({match for page in PAGES for match in COMMAND.findall(page.read_text()) if match[0][-5:] != ".NAME"})


@pytest.mark.parametrize(
    ("module", "options"), COMMANDS, ids=[f"{module}{i}" for i, (module, _) in enumerate(COMMANDS)]
)
def test_a_command_of_the_documentation(module, options):
    program = importlib.import_module(module)
    if hasattr(program, "__path__"):  # a package is run by its __main__
        program = importlib.import_module(f"{module}.__main__")
    classes = [getattr(program, name) for name in ("Options", "TrainingOptions") if hasattr(program, name)]
    parser = HfArgumentParser(classes, allow_abbrev=False)
    required = {action.dest for action in parser._actions if action.required}
    words = shlex.split(options.replace("\\\n", " ").rstrip(")."))
    if required and not words:  # the name alone, in running text
        return
    assert len(parser.parse_args_into_dataclasses(words)) == len(classes)  # unknown options end the program


def test_every_program_is_in_the_documentation():
    documented = {module for module, _ in COMMANDS}
    programs = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for folder in ("studies", "benchmarks")
        for path in ROOT.glob(f"{folder}/**/*.py")
        if '__name__ == "__main__"' in path.read_text()
    }
    assert programs == documented
