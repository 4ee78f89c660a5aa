"""What a model card states of the model's class, base model and licence."""

import pytest
from huggingface_hub import constants
from torch import nn

from hf_condlr import LowRankLinear
from hf_condlr.errors import CondLRError
from tests.models import bert, gpt2, t5, vit
from tests.test_model_card import BASE, factored, header, write


@pytest.mark.parametrize(
    ("build", "auto", "task"),
    [
        (vit, "AutoModelForImageClassification", "image-classification"),
        (bert, "AutoModelForSequenceClassification", "text-classification"),
        (gpt2, "AutoModelForCausalLM", "text-generation"),
        (t5, "AutoModelForSeq2SeqLM", "text-generation"),
    ],
)
def test_lines_that_load_the_model(build, auto, task, tmp_path):
    path = write(tmp_path / "tiny", factored(build))
    lines = f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("your-name/tiny")'
    assert lines in path.read_text(encoding="utf-8")
    assert header(path)["pipeline_tag"] == task
    assert 'from_pretrained("me/mine")' in write(tmp_path, factored(build), model_id="me/mine").read_text("utf-8")


def test_a_model_outside_transformers_has_a_card_too(tmp_path):
    path = write(tmp_path, nn.Sequential(LowRankLinear(7, 6, 2)))
    assert set(header(path)) == {"tags"}
    assert "from_pretrained" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "stated"),
    [(BASE, BASE), ("gpt2", "gpt2"), ("/gone/x", None), ("./x", None), ("out/checkpoint-500", None), ("tests", None)],
)
def test_base_model_is_the_name_loaded_from_where_that_is_a_hub_id(name, stated, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    assert header(write(tmp_path, factored(name=name))).get("base_model") == stated


def test_base_model_as_given(tmp_path):
    path = write(tmp_path, factored(name=BASE), base_model="other/base")
    assert header(path)["base_model"] == "other/base"
    assert "[other/base](https://huggingface.co/other/base)" in path.read_text(encoding="utf-8")
    with pytest.raises(CondLRError, match="must be a Hub id or a folder; received '/gone/x'"):
        write(tmp_path, base_model="/gone/x")


def test_licence_of_a_base_model_in_a_folder(tmp_path):
    (tmp_path / "base").mkdir()
    lines = "license: other\nlicense_name: own\nlicense_link: LICENSE\nbase_model: someone/first"
    (tmp_path / "base" / "README.md").write_text(f"---\n{lines}\n---\n")
    path = write(tmp_path / "out", base_model=tmp_path / "base")
    stated = header(path)
    assert (stated["license"], stated["license_name"], stated["base_model"]) == ("other", "own", "someone/first")
    assert "license_link" not in stated
    text = path.read_text(encoding="utf-8")
    assert "is published under `other`, `own`." in text
    assert str(tmp_path) not in text


def test_licence_from_the_cache_while_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "out", factored(name=BASE))
    assert "license" not in header(tmp_path / "out" / "README.md")
    repository, commit = tmp_path / "cache" / "models--someone--tiny-vit", "0" * 40
    for file, content in (("refs/main", commit), (f"snapshots/{commit}/README.md", "---\nlicense: apache-2.0\n---\n")):
        (repository / file).parent.mkdir(parents=True)
        (repository / file).write_text(content)
    path = write(tmp_path / "out", factored(name=BASE))
    assert header(path)["license"] == "apache-2.0"
    assert f"[{BASE}](https://huggingface.co/{BASE}) is published under `apache-2.0`" in path.read_text("utf-8")


def test_a_model_loaded_from_its_own_folder_keeps_its_base(tmp_path):
    path = write(tmp_path, factored(name=BASE))
    before = path.read_bytes()
    write(tmp_path, factored(name=str(tmp_path)))
    assert path.read_bytes() == before
