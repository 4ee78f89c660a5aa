"""README and docs/: programs run, links and paths lead somewhere, pages can be reached, documented options exist."""

import ast
import importlib
import re
import shlex
from dataclasses import fields

import pytest
import torch

from hf_condlr import CondLRConfig, CondLRTrainingArguments
from hf_condlr.cli import main
from tests.models import vit
from tests.paths import ROOT

PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]

# Pages of docs/ whose Python blocks are one program that needs nothing else, and what it prints.
PROGRAMS = {
    "adapters.md": "κ at most",
    "configuration.md": "layers converted",
    "deployment.md": "",
    "robustness.md": "less dense",
    "training.md": "kappa_max",
    "training_loop.md": "κ at most",
}


def text(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL)


def without_code(page):
    """The page as its readers see it: `#` in a shell block is no heading."""
    return re.sub(r"^```.*?^```", "", text(page), flags=re.MULTILINE | re.DOTALL)


def links(page):
    """(file relative to the root, anchor) of every link that stays in the repository."""
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", without_code(page)):
        target = (ROOT / page).parent.joinpath(path).resolve() if path else ROOT / page
        yield str(target.relative_to(ROOT.resolve())), anchor


def anchors(page):
    """The anchors that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.*)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def run(program, page, **given):
    exec(compile(program, page, "exec"), given)
    return given


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore:'pin_memory'")  # where there is no GPU
def test_the_blocks_of_the_readme_run(capsys):
    samples = [{"pixel_values": torch.rand(3, 16, 16), "labels": i % 5} for i in range(8)]
    for program in blocks("README.md"):
        run(program, "README.md", model=vit(), train_dataset=samples)
    assert "κ at most" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:'pin_memory'")
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_page_that_is_a_program_runs(name, capsys):
    run("\n".join(blocks(f"docs/{name}")), name)
    assert PROGRAMS[name] in capsys.readouterr().out


# Sections of docs/image_models.md, each a program, and what it needs that the package does not.
SECTIONS = {
    "timm": ["timm"],
    "Mixup, CutMix, RandAugment": ["torchvision"],
    "An average of the weights (EMA)": [],
    "Rates of each layer": [],
    "Lightning": ["lightning"],
}


@pytest.mark.filterwarnings("ignore")  # of the libraries
@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_that_is_a_program_runs(section):
    for module in SECTIONS[section]:
        pytest.importorskip(module)
    found = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", text("docs/image_models.md"), re.MULTILINE | re.DOTALL))
    programs = {
        name: re.findall(r"^```python\n(.*?)^```", body, re.MULTILINE | re.DOTALL) for name, body in found.items()
    }
    assert [name for name, blocks in programs.items() if blocks] == [*SECTIONS]
    [program] = programs[section]
    run(program, section)


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_import_names_that_exist(page):
    for node in ast.walk(ast.parse("\n".join(blocks(page)))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_condlr":
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_lead_somewhere(page):
    missing = [file for file, _ in links(page) if not (ROOT / file).exists()]
    missing += [f"{file}#{anchor}" for file, anchor in links(page) if anchor and anchor not in anchors(file)]
    assert missing == []


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_paths_in_commands_and_text_exist(page):
    paths = re.findall(r"\b(?:hf_condlr|recipes|studies|benchmarks|tests)/[\w/]+\.(?:py|yaml)\b", text(page))
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_page_can_be_reached_from_the_readme():
    found, waiting = set(), ["README.md"]
    while waiting:
        page = waiting.pop()
        if page in PAGES and page not in found:
            found.add(page)
            waiting += [file for file, _ in links(page)]
    assert sorted(set(PAGES) - found) == []


def test_the_readme_is_short_and_shows_the_two_commands():
    assert len(text("README.md").splitlines()) <= 150
    assert "make demo" in text("README.md") and "make test" in text("README.md")


@pytest.mark.parametrize(
    ("page", "options"), [("docs/configuration.md", CondLRConfig), ("docs/training.md", CondLRTrainingArguments)]
)
def test_documented_options_exist(page, options):
    header = re.search(r"^\| (?:field|argument) \|.*?\n\n", text(page), re.MULTILINE | re.DOTALL).group()
    cells = [row.split("|")[1] for row in header.splitlines()[2:] if row]
    documented = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    known = {field.name for field in fields(options)}
    assert documented - known == set()


def test_every_field_of_the_config_is_documented():
    own = {name for name in CondLRConfig.__annotations__ if name != "peft_type"}
    assert [name for name in sorted(own) if f"| `{name}` |" not in text("docs/configuration.md")] == []


def test_documented_options_of_the_command_condlr_exist(capsys):
    lines = {line for page in PAGES for line in re.findall(r"^condlr (\w+ .*)$", text(page), re.MULTILINE)}
    assert lines
    for line in sorted(lines):
        command, *arguments = shlex.split(line, comments=True)
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        known = re.findall(r"--\w+", capsys.readouterr().out)
        assert [argument for argument in arguments if argument.startswith("--") and argument not in known] == []
