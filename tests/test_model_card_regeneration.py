"""Writing a model card where one is: our section and fields are renewed, the user's words and fields stay."""

import os
import stat

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_condlr.errors import CondLRError
from hf_condlr.model_card.card import BEGIN, END
from tests.test_model_card import BASE, FGSM, MEASURED, PGD, factored, header, write

USER_HEADER = """# See the Hub's documentation of the fields.
language: "no"  # Norwegian
license: mit
tags:
- mine
- robustness

# by hand
date: 2024-01-05
"""
USER_TEXT = "\n# My model\n\nWritten by hand, | and $dollars.\n"


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


def user_card(folder, lines=USER_HEADER, text=USER_TEXT):
    path = folder / "README.md"
    path.write_text(f"---\n{lines}---\n{text}", encoding="utf-8")
    return path


def results(path):
    return [(r.metric_type, r.metric_value) for r in ModelCard.load(path).data.eval_results or []]


# -------------------------------------------------------------------------------------------------------- written twice


@pytest.mark.parametrize("before", ["nothing", "empty", "text", "card", "card of Windows", "text without end of line"])
def test_twice_is_once(before, tmp_path):
    path = tmp_path / "README.md"
    if before != "nothing":
        content = {"empty": "", "text": USER_TEXT}.get(before, f"---\n{USER_HEADER}---\n{USER_TEXT}")
        content = "Words" if before.startswith("text without") else content
        path.write_bytes(content.replace("\n", "\r\n" if "Windows" in before else "\n").encode())
    write(tmp_path, **MEASURED, plot=True)
    once = path.read_bytes(), (tmp_path / "condition.png").read_bytes()
    write(tmp_path, **MEASURED, plot=True)
    assert (path.read_bytes(), (tmp_path / "condition.png").read_bytes()) == once
    assert once[0].endswith(b"\n")
    if "Windows" in before:
        assert once[0].count(b"\n") == once[0].count(b"\r\n")


def test_section_and_fields_are_renewed(tmp_path):
    write(tmp_path / "a", factored(name=BASE), **MEASURED)
    path = write(tmp_path / "a", factored(name="someone/else", r=2), robustness=[PGD], dataset="mnist")
    fresh = write(tmp_path / "b" / "a", factored(name="someone/else", r=2), robustness=[PGD], dataset="mnist")
    assert header(path) == header(fresh)
    assert path.read_text("utf-8").partition(BEGIN)[2] == fresh.read_text("utf-8").partition(BEGIN)[2]


def test_what_is_measured_no_more_goes(tmp_path):
    write(tmp_path, factored(name=BASE), **MEASURED)
    path = write(tmp_path)
    assert set(header(path)) == {"library_name", "pipeline_tag", "tags"}
    assert "robust accuracy |" not in path.read_text(encoding="utf-8")


def test_text_around_the_section_survives(tmp_path):
    path = write(tmp_path)
    edit(path, BEGIN, f"Words before.\r\n{BEGIN}")
    edit(path, END, f"{END} and\n\n\nafter\n")
    before, after = (path.read_bytes().partition(mark.encode())[i] for mark, i in ((BEGIN, 0), (END, 2)))
    write(tmp_path, factored(r=2))
    content = path.read_bytes()
    assert content.partition(BEGIN.encode())[0] == before
    assert content.partition(END.encode())[2] == after


# -------------------------------------------------------------------------------------------------------- a user's card


def test_a_card_without_markers_keeps_its_text_and_its_header_to_the_letter(tmp_path):
    path = user_card(tmp_path)
    write(tmp_path, factored(name=BASE))
    content = path.read_text(encoding="utf-8")
    fences = content.split("---\n")
    united = USER_HEADER.replace("- robustness\n", "- robustness\n- condlr\n- low-rank\n- compression\n")
    assert fences[1].startswith(united)
    assert yaml.safe_load(fences[1].removeprefix(united)) == {
        "base_model": BASE,
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
    }
    text = content.partition("---\n" + USER_TEXT)[2]
    assert text.startswith("\n" + BEGIN)
    assert "\n# " not in text, "the user has a title"


def test_a_card_without_a_header_gets_one(tmp_path):
    (tmp_path / "README.md").write_text("Words.\n")
    text = ModelCard.load(write(tmp_path)).text
    assert text.startswith(f"\nWords.\n\n{BEGIN}\n")


def test_the_card_of_transformers_is_completed(tmp_path):
    """The template of `push_to_hub` has fields without a value, and comments, in its header."""
    path = user_card(tmp_path, "# comment\nlibrary_name: transformers\ntags: []\nlicense:\nbase_model:\n")
    write(tmp_path, factored(name=BASE))
    assert (header(path)["base_model"], header(path)["license"]) == (BASE, None)
    assert path.read_text(encoding="utf-8").startswith("---\n# comment\n")


def test_fields_that_the_user_changed_stay(tmp_path):
    path = write(tmp_path, factored(name=BASE), **MEASURED)
    edit(path, f"base_model: {BASE}", "base_model: me/mine")
    edit(path, "library_name: transformers\n", "library_name: other\nlanguage: de\n")
    for _ in range(2):
        write(tmp_path, factored(name=BASE), **MEASURED)
        stated = header(path)
        assert (stated["base_model"], stated["library_name"], stated["language"]) == ("me/mine", "other", "de")


def test_our_licence_does_not_complete_the_users(tmp_path):
    (tmp_path / "base").mkdir()
    user_card(tmp_path / "base", "license: other\nlicense_name: own\n")
    path = write(tmp_path, base_model=tmp_path / "base")
    assert header(path)["license_name"] == "own"
    edit(path, "license: other", "license: mit")
    write(tmp_path, base_model=tmp_path / "base")
    assert header(path)["license"] == "mit"
    assert "is published under `other`, `own`" in path.read_text(encoding="utf-8")


def test_the_users_measurements_stay_beside_ours(tmp_path):
    path = write(tmp_path, **MEASURED)
    edit(
        path,
        "    - type: f1\n      value: 0.5\n",
        "    - type: f1\n      value: 0.6\n    - type: wer\n      value: 9\n",
    )
    for _ in range(2):
        write(tmp_path, metrics={"accuracy": 0.9, "f1": 0.5}, robustness=[FGSM], dataset="cifar10")
        assert sorted(results(path)) == [("accuracy", 0.9), ("f1", 0.6), ("robust_accuracy", 0.8125), ("wer", 9)]
    write(tmp_path)
    assert results(path) == [("f1", 0.6), ("wer", 9)]


def test_an_index_without_results_stays(tmp_path):
    path = user_card(tmp_path, "model-index:\n- name: mine\n  results: []\n")
    assert header(write(tmp_path))["model-index"] == [{"name": "mine", "results": []}]
    write(tmp_path, metrics={"accuracy": 0.5})
    assert ModelCard.load(path).data.model_name == "mine"
    assert results(path) == [("accuracy", 0.5)]


@pytest.mark.parametrize(
    "lines",
    [
        "{language: de, tags: [mine]}\n",
        "tags: &t [mine]\nother: *t\nlanguage: de\n",
        "language: de\ntags: [mine,\nb]\n",
    ],
    ids=["flow", "anchor", "over two lines"],
)
def test_unusual_headers_keep_their_meaning(lines, tmp_path):
    path = user_card(tmp_path, lines)
    for _ in range(2):
        stated = header(write(tmp_path, factored(name=BASE)))
        assert {"language": "de", "base_model": BASE}.items() <= stated.items()
        assert {"mine", "condlr"} <= set(stated["tags"])
        assert stated.get("other", ["mine"]) == ["mine"]
    assert path.read_text(encoding="utf-8").count(BEGIN) == 1


def test_a_lost_record_makes_every_field_the_users(tmp_path):
    path = write(tmp_path, factored(name=BASE))
    edit(path, "<!-- condlr:header {", "<!-- condlr:header {broken ")
    assert header(write(tmp_path, factored(name="someone/else")))["base_model"] == BASE


# --------------------------------------------------------------------------------------------------- errors and writing


BROKEN = {
    "no YAML": b"---\ntags: [a\n---\ntext\n",
    "no mapping": b"---\n- a\n---\ntext\n",
    "not closed": b"---\ntags: a\n\ntext\n",
    "index": b"---\nmodel-index:\n- results: 3\n---\ntext\n",
    "not UTF-8": b"---\ntags: \xff\n---\n",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_header_is_refused_and_left_as_it_was(content, tmp_path):
    (tmp_path / "README.md").write_bytes(content)
    with pytest.raises(CondLRError, match=r"header of .*README\.md must be YAML.*Mend or remove the header"):
        write(tmp_path, plot=True)
    assert (tmp_path / "README.md").read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("marks", [BEGIN, END, f"{END} {BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_unpaired_markers_are_refused(marks, tmp_path):
    path = user_card(tmp_path, text=f"Words\n{marks}\nmore words\n")
    before = path.read_bytes()
    with pytest.raises(CondLRError, match=r"section of .*README\.md must stand"):
        write(tmp_path)
    assert path.read_bytes() == before


def test_a_failure_while_writing_leaves_the_old_card(tmp_path, monkeypatch):
    path = user_card(tmp_path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_permissions_of_the_file_stay(tmp_path):
    path = user_card(tmp_path)
    path.chmod(0o640)
    write(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_hostile_names_stay_in_their_cells(tmp_path):
    name = f"a|b\n{END}"
    write(tmp_path, robustness=[{"attack": name, "accuracy": 0.5}])
    path = write(tmp_path, robustness=[{"attack": name, "accuracy": 0.5}])
    assert "| a\\|b &lt;!-- condlr:end --> | 0.5 |" in path.read_text(encoding="utf-8")
