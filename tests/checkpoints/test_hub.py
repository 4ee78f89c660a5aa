"""Factored models on the Hub: pushed, pulled, during training too, with a card; a failed upload changes nothing.

The Hub's client reads its endpoint when it is imported: one subprocess does everything, the tests read what it found.
"""

import json
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard

from tests.checkpoints.hub_server import Hub
from tests.paths import ROOT

pytestmark = pytest.mark.processes

CLIENT = """
import importlib, json, sys, time
from pathlib import Path
import torch
from huggingface_hub import upload_file
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForSequenceClassification
import hf_condlr
from hf_condlr import *
from hf_condlr.cli import main
from tests import models
from tests.training.tiny import arguments, convert, dense_bert, text_data

time.sleep = lambda seconds: None  # the client's retries
folder, out = Path(sys.argv[1]), {}
load = AutoModelForImageClassification.from_pretrained

def vit(bias=0.0):
    model = get_robust_lowrank_model(models.vit(), CondLRConfig(rank_ratio=0.5))
    with torch.no_grad():
        model.classifier.bias += bias
    return model

def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

def error_of(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"

first, second = vit(), vit(1.0)
robustness = [{"attack": "pgd-linf", "epsilon": 0.05, "steps": 20, "accuracy": 0.75, "samples": 100}]
sha = first.push_to_hub("me/vit", metrics={"accuracy": 0.9}, robustness=robustness, dataset="mnist").oid
second.push_to_hub("me/vit", tags=["mine"], commit_message="Second")
out["newest"] = same(load("me/vit"), second)
out["first"] = same(load("me/vit", revision=sha), first)
out["base"] = type(AutoModel.from_pretrained("me/vit")).__name__
second.save_pretrained(folder / "saved", push_to_hub=True, repo_id="me/saved", private=True, max_shard_size="5KB")
out["sharded"] = same(load("me/saved"), second)
fold_model(load("me/vit")).push_to_hub("me/folded")
(folder / "README.md").write_text("# Mine")
upload_file(path_or_fileobj=folder / "README.md", path_in_repo="README.md", repo_id="me/saved", commit_message="words")
second.push_to_hub("me/saved", revision="dev")
out["folded"] = type(load("me/folded").vit.layers[0].mlp.fc1).__name__
out["without a token"] = error_of(load, "me/secret", token="hf_wrong")
out["read only"] = error_of(first.push_to_hub, "me/vit", token="hf_read")

second.save_pretrained(folder / "failed")
out["failed"] = error_of(first.save_pretrained, folder / "failed", push_to_hub=True, repo_id="me/failed")
out["complete"] = same(load(folder / "failed"), first)

first.save_pretrained(folder / "command")
(folder / "command" / "README.md").write_text("# Mine")
out["command"] = main(["push", str(folder / "command"), "me/command", "--private"])

options = dict(push_to_hub=True, hub_model_id="me/bert", hub_strategy="every_save", save_strategy="steps", save_steps=6)
args = arguments(folder / "out", eval_strategy="steps", eval_steps=6, **options)
trainer = CondLRTrainer(model=convert(dense_bert()), args=args, train_dataset=text_data(), eval_dataset=text_data(8),
    compute_metrics=lambda p: {"accuracy": 0.5})
trainer.train()
trainer._finish_current_push()
load_text = AutoModelForSequenceClassification.from_pretrained
out["during training"] = same(load_text("me/bert"), trainer.model)
trainer.push_to_hub()
readme = folder / "out" / "README.md"
readme.write_text(readme.read_text() + "\\nMy own words.\\n")
with torch.no_grad():
    trainer.model.classifier.bias += 1
trainer.push_to_hub(dataset="glue")
out["after training"] = same(load_text("me/bert"), trainer.model)

importlib.reload(hf_condlr.checkpoints.load)  # as in a notebook
importlib.reload(hf_condlr)
out["reloaded"] = same(load(folder / "command"), first)
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """What the client found, and the Hub as it is then."""
    command = [sys.executable, "-c", CLIENT, str(tmp_path_factory.mktemp("hub"))]
    with Hub() as hub:
        hub.create("me/secret", private=True)
        hub.create("me/failed")
        hub.fail_next("POST", r"/api/models/me/failed/commit/", status=500)
        environment = hub.environment("hf_write") | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        yield json.loads(done.stdout.splitlines()[-1]), hub
        assert not hub.failures


def test_what_was_pushed_is_what_is_pulled(pushed):
    found, hub = pushed
    assert found["newest"] and found["first"] and found["sharded"]
    assert (found["base"], found["folded"]) == ("ViTModel", "FoldedLayer")
    assert set(hub.files("me/vit")) == {
        ".gitattributes",
        "README.md",
        "condition.png",
        "condlr.safetensors",
        "config.json",
    }
    assert hub.commits("me/vit")[0].title == "Second"


def test_the_card_states_what_was_measured_and_keeps_tags(pushed):
    _, hub = pushed
    first = ModelCard(hub.files("me/vit", hub.commits("me/vit")[1].sha)["README.md"].decode())
    values = {result.metric_type: result.metric_value for result in first.data.eval_results}
    assert values == {"accuracy": 0.9, "robust_accuracy": 0.75}
    assert 'ViTForImageClassification.from_pretrained("me/vit")' in first.text
    newest = ModelCard(hub.files("me/vit")["README.md"].decode())
    assert {"mine", "condlr"} <= set(newest.data.tags)


def test_a_new_branch_starts_from_the_card_of_main(pushed):
    _, hub = pushed
    assert "# Mine" in hub.files("me/saved", "dev")["README.md"].decode()
    assert hub.files("me/saved")["README.md"] == b"# Mine"


def test_refusals_are_the_clients_own_errors(pushed):
    found, _ = pushed
    assert "401" in found["without a token"] or "RepositoryNotFound" in found["without a token"]
    assert "403" in found["read only"]


def test_training_pushes_complete_checkpoints(pushed):
    """During the training, and at its end; the card has the last evaluation, and the user's text survives."""
    found, hub = pushed
    assert found["during training"] and found["after training"]
    card = ModelCard(hub.files("me/bert")["README.md"].decode())
    assert {result.metric_type for result in card.data.eval_results} == {"accuracy", "loss"}
    assert card.text.rstrip().endswith("My own words.")


def test_an_upload_that_fails_leaves_local_files_and_the_hub_as_they_were(pushed):
    found, hub = pushed
    assert "500" in found["failed"] and found["complete"]
    assert set(hub.files("me/failed")) == {".gitattributes"}


def test_the_command_pushes_a_folder_with_its_own_card(pushed):
    found, hub = pushed
    assert found["command"] == 0
    assert {"README.md", "condlr.safetensors", "config.json"} <= set(hub.files("me/command"))
    card = hub.files("me/command")["README.md"].decode()
    assert "# Mine\n" in card and "## Compression" in card


def test_the_package_can_be_reloaded(pushed):
    assert pushed[0]["reloaded"]
