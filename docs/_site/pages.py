"""Write the pages of the documentation site into a folder: docs/, the README, the recipes and the API reference.

`make docs` runs it, and then the site generator of mkdocs.yml over that folder. Links between files of the repository
become links between pages, and formulas in `$`...`$` or in a fence named math become MathML, which needs no script.
"""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from pathlib import Path

import griffe
from latex2mathml.converter import convert

ROOT = Path(__file__).parents[2]
OUT = ROOT / "outputs/site_pages"
PAGES = {  # file of the repository: page of the site
    "README.md": "index.md",
    "docs/README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "CITATION.cff": "citation.md",
    "benchmarks/gpu/README.md": "gpu.md",
}
SECTIONS = {  # package or module that defines a public name: heading in the API reference
    "compression": "Compression",
    "config": "Configuration",
    "conversion": "Conversion",
    "layers": "Layers and their condition",
    "manifold": "The manifold step",
    "training": "Trainers",
    "robustness": "Attacks and evaluation",
    "adapters": "Adapters",
    "checkpoints": "Checkpoints",
    "scripts": "For scripts",
}


def main() -> None:
    """Write all pages anew."""
    shutil.rmtree(OUT, ignore_errors=True)
    shutil.copytree(ROOT / "docs", OUT, ignore=shutil.ignore_patterns("_site", "README.md"))
    shutil.copy(Path(__file__).with_name("site.css"), OUT)
    for page in OUT.glob("*.md"):
        page.write_text(_page(f"docs/{page.name}"), encoding="utf-8")
    for source, name in PAGES.items():
        text = _page(source) if source.endswith(".md") else _listing(source, "yaml")
        (OUT / name).write_text(text, encoding="utf-8")
    (OUT / "recipes").mkdir()
    for recipe in sorted((ROOT / "recipes").rglob("*.py")):
        name = recipe.relative_to(ROOT).as_posix()
        page = (OUT / name).with_suffix(".md")
        page.parent.mkdir(exist_ok=True)
        page.write_text(_listing(name, "python"), encoding="utf-8")
    (OUT / "api.md").write_text(_api(), encoding="utf-8")
    listed = set(re.findall(r"\S+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    if differing := listed ^ {page.relative_to(OUT).as_posix() for page in OUT.rglob("*.md")}:
        raise ValueError(f"the navigation in mkdocs.yml must list every page, and no other; see {sorted(differing)}")


def _listing(source: str, language: str) -> str:
    return f"# {source}\n\n````{language}\n{(ROOT / source).read_text(encoding='utf-8')}````\n"


def _page(source: str) -> str:
    """A file in Markdown with its links as those of the site, and its formulas drawn."""
    folder = (ROOT / source).parent

    def target(found: re.Match[str]) -> str:
        link, anchor = found[1], found[2] or ""
        path = (folder / link).resolve().relative_to(ROOT).as_posix()
        if path in PAGES:
            path = PAGES[path]
        elif path.startswith("recipes/"):
            path = f"{path.removesuffix('.py')}.md"
        return f"]({path.removeprefix('docs/')}{anchor})"

    text = (ROOT / source).read_text(encoding="utf-8")
    text = re.sub(r"\]\((?!\w+:)([^)#\s]+)(#[^)]*)?\)", target, text)
    text = re.sub(r"^```math\n(.+?)\n```$", lambda found: _formula(found[1], "block"), text, flags=re.DOTALL | re.M)
    return re.sub(r"\$`(.+?)`\$", lambda found: _formula(found[1], "inline"), text)


def _formula(latex: str, display: str) -> str:
    return convert(latex, display=display).replace("\n", " ")


def _api() -> str:
    """One section for each part of the package, with the public names that it defines."""
    package = griffe.load("hf_condlr", search_paths=[str(ROOT)])
    paths: dict[str, list[str]] = defaultdict(list)
    for name in map(str, package.exports or ()):
        path = package[name].canonical_path
        if package[name].is_module:  # a function in a module of the same name, which griffe takes for the module
            path += f".{name}"
        if not package[path.removeprefix("hf_condlr.")].has_docstring:
            raise ValueError(f"a public name must have a docstring; {name} has none")
        paths[path.split(".")[1]].append(path)
    if unknown := set(paths) - set(SECTIONS):
        raise KeyError(f"SECTIONS must name each part of hf_condlr that has public names; it lacks {sorted(unknown)}")
    lines = ["# API reference", "", "Every public name, `from hf_condlr import NAME`. Other names may change."]
    for part, heading in SECTIONS.items():
        lines += ["", f"## {heading}", ""]
        for path in paths[part]:
            lines += [f"::: {path}", "    options:", "      heading_level: 3", ""]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
