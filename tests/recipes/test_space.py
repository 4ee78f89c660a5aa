"""`recipes/space/app.py`, copied alone into an empty folder: its functions, and its page through Gradio's API."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from hf_condlr import CondLRConfig, get_robust_lowrank_model
from tests.compression.cases import case, image_processor, vit
from tests.paths import ROOT
from tests.recipes.recipe_runs import RECIPES

pytest.importorskip("gradio")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.filterwarnings("ignore")  # of gradio's dependencies


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    path = shutil.copy(RECIPES / "space" / "app.py", tmp_path_factory.mktemp("space"))
    spec = importlib.util.spec_from_file_location("copied_space", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Folders of a dense and a factored image classifier, as `make demo` writes them."""
    monkeypatch.chdir(tmp_path)
    for name in ("dense", "condlr"):
        model = vit()
        if name == "condlr":
            get_robust_lowrank_model(model, CondLRConfig(rank_ratio=0.5, tau=0.1, conditioned_start=True))
        for part in (model, image_processor()):
            part.save_pretrained(name)
    return ["dense", "condlr"]


def test_an_attack_stays_in_the_ball_and_shows_what_the_model_sees(app, models):
    noise = np.random.default_rng(0).integers(60, 190, (16, 16, 3), dtype=np.uint8)
    classifier = app.Classifier.load(models[1])
    pixels = classifier.pixels(Image.fromarray(noise))
    assert pixels.min() > 0.2 and pixels.max() < 0.8  # not normalised
    shown, before, after = classifier.attack(Image.fromarray(noise), 0.1)
    assert sum(before.values()) == pytest.approx(1, abs=1e-5) == sum(after.values())
    assert list(before) == ["a", "b", "c", "d", "e"]
    label = max(before, key=before.get)
    assert after[label] < before[label]  # the attack lowered the probability that it aims at
    change = np.asarray(shown.resize((16, 16), Image.Resampling.NEAREST)).astype(int) - noise
    assert 1 <= np.abs(change).max() <= round(0.1 * 255) + 1
    _, before, after = classifier.attack(Image.fromarray(noise), 0.0)
    assert before == after


def test_a_small_image_is_magnified_by_its_pixels_and_shrinks_to_itself(app, models):
    grey = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    image = app.picture(grey)
    assert image.size == (224, 224)
    back = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX)) / 255
    assert np.abs(back - grey[0].numpy()).max() < 1.01 / 255


def test_condition_numbers_of_dense_and_factored_layers(app, models):
    dense, factored = (app.Classifier.load(name).condition_numbers() for name in models)
    assert len(dense) == len(factored) == 12  # two blocks of six; not the head
    assert max(factored) <= 1.1 * (1 + 1e-4) < max(dense)


def test_texts_get_typing_errors(app, tmp_path):
    model, _, tokenizer = case("text")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    classifier = app.Classifier.load(str(tmp_path))
    assert classifier.takes == "texts"
    shown, before, after = classifier.attack("good film bad plot", 0.5)
    assert len(shown.split()) == 4
    assert 0 <= sum(a != b for a, b in zip(shown.split(), ["good", "film", "bad", "plot"], strict=True)) <= 2
    assert len(before) == len(after) == 3


ASK = """
import json, sys
from gradio_client import Client, handle_file
import app
page = app.build(["dense", "condlr"], "examples")
_, url, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", ssr_mode=False)
client = Client(url, verbose=False)
answer = client.predict(handle_file("examples/0.png"), 0.05, api_name="/attack")
page.close()
print(json.dumps(answer))
"""


@pytest.mark.processes
def test_the_page_answers_through_its_api(app, models, tmp_path):
    """In a process of its own: gradio leaves sockets and event loops behind."""
    shutil.copy(app.__file__, tmp_path / "app.py")
    (tmp_path / "examples").mkdir()
    Image.new("RGB", (16, 16), (90, 120, 200)).save(tmp_path / "examples" / "0.png")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", ASK]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 6  # of each model the attacked image and the predictions before and after
    for label in (found[1], found[2], found[4], found[5]):
        assert label["label"] in set("abcde")


def test_models_of_different_inputs_are_refused(app, models, tmp_path):
    model, _, tokenizer = case("text")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="all be classifiers of images, or all of texts"):
        app.build(["dense", "text"])
