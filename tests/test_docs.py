"""The pages that are programs run as they stand; the files that README links to exist."""

import re

import pytest

from tests.paths import ROOT


def run(page):
    """The names that the page's program leaves."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    namespace = {}
    exec(compile("\n".join(blocks), page, "exec"), namespace)
    return namespace


def test_the_page_on_the_training_loop_runs(capsys):
    namespace = run("docs/training_loop.md")
    assert "κ at most" in capsys.readouterr().out
    assert namespace["report"].layers


def test_the_page_on_robustness_runs(capsys):
    namespace = run("docs/robustness.md")
    assert namespace["report"].samples == namespace["second"].samples == 40
    assert len(namespace["report"].checks) == 16
    assert "less dense" in capsys.readouterr().out


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))]
)
def test_links_to_files_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / page).read_text())
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing
