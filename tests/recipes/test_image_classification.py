"""`image_classification.py`, copied alone into an empty folder: every method, its data, restarts, several processes."""

import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from huggingface_hub import ModelCard
from PIL import Image as Picture
from transformers import AutoModelForImageClassification, PreTrainedConfig

from tests.checkpoints.hub_server import Hub
from tests.recipes.recipe_runs import IMAGES, METHODS, RECIPES, copied, launch, parse, read, run, words

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that holds a copy of the recipe, and next to it the digits."""
    folder = tmp_path_factory.mktemp("copied")
    copied("demo", tmp_path_factory.mktemp("demo")).write_digits(folder.with_name("digits"))
    return folder


@pytest.fixture(scope="module")
def recipe(place):
    return copied("image_classification", place)


@pytest.fixture
def call(recipe, place, tmp_path):
    """Runs the recipe in this process; returns the folder that it wrote."""
    data = place.with_name("digits")
    return lambda **options: run(recipe, tmp_path / "out", **IMAGES | {"dataset_name": data} | options)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_is_what_was_evaluated(call, capsys, method):
    attacks = {"attacks": ["fgsm", "pgd-linf"], "epsilons": ["8/255", 0.05], "attack_steps": 3}
    out = call(method=method, num_train_epochs=2, max_train_samples=400, max_attack_samples=20, **attacks)
    metrics = read(out / "test_results.json")
    assert 0.1 < metrics["test_accuracy"] <= 1
    assert (
        metrics["test_robust_accuracy"]
        <= metrics["test_accuracy_pgd_linf_0.05"]
        <= metrics["test_accuracy_fgsm_0.0313725"]
        <= 1
    )
    assert (metrics["test_samples"], metrics["test_attacked_samples"]) == (37, 20)
    assert set(read(out / "all_results.json")) >= {"train_loss", "eval_accuracy", "test_accuracy_pgd_linf_0.05"}
    assert read(out / "robustness.json")["checks"] == []
    weights = "model.safetensors" if method == "dense" else "condlr.safetensors"
    assert all((out / name).is_file() for name in ("README.md", "preprocessor_config.json", weights))
    if method != "dense":
        assert "12 layers are factored: " in capsys.readouterr().out
        results = ModelCard.load(out / "README.md").data.eval_results
        assert {result.dataset_split for result in results} == {"test"}  # both clean and attacked
        found = {(r.metric_type, (r.metric_args or {}).get("epsilon")): r.metric_value for r in results}
        assert found["accuracy", None] == pytest.approx(metrics["test_accuracy"])
        assert found["robust_accuracy", 0.05] == pytest.approx(metrics["test_accuracy_pgd_linf_0.05"])
        assert "On the test split." in (out / "README.md").read_text()
    if method == "condlr":
        assert metrics["test_kappa_max"] <= 1.1 * (1 + 1e-4)
    saved = {"model_name_or_path": out, "model_type": None, "config_overrides": None}
    again = call(method=method, num_train_epochs=0, **saved)
    assert read(again / "test_results.json")["test_loss"] == pytest.approx(metrics["test_loss"], rel=1e-5)


def test_a_checkpoint_with_the_same_classes_in_another_order_keeps_its_head(call, tmp_path, caplog):
    first = call(num_train_epochs=2, max_train_samples=400, method="dense").rename(tmp_path / "first")
    model = AutoModelForImageClassification.from_pretrained(first)
    order = [3, 0, 1, 2, 9, 8, 7, 6, 5, 4]
    with torch.no_grad():
        for parameter in (model.classifier.weight, model.classifier.bias):
            parameter.copy_(parameter[order])
    names = [model.config.id2label[i].upper() for i in order]  # names are compared without case
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    shutil.copytree(first, tmp_path / "second")
    model.save_pretrained(tmp_path / "second")
    saved = {"model_name_or_path": tmp_path / "second", "model_type": None, "config_overrides": None}
    again = call(method="dense", num_train_epochs=0, **saved)
    before, after = (read(folder / "test_results.json") for folder in (first, again))
    assert after["test_loss"] == pytest.approx(before["test_loss"], rel=1e-4)
    assert before["test_accuracy"] == after["test_accuracy"] > 0.2
    assert "classes are numbered as in" in caplog.text
    assert AutoModelForImageClassification.from_pretrained(again).config.id2label == dict(enumerate(names))


def test_augmentation_mirrors_and_shifts(recipe):
    pixels = torch.arange(64.0).reshape(1, 1, 8, 8).expand(64, 1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    flipped = recipe.augment(pixels, generator, flip=True, padding=0)
    mirrored = (flipped == pixels.flip(-1)).all((1, 2, 3))
    assert torch.equal(flipped[~mirrored], pixels[~mirrored])
    assert 16 < mirrored.sum() < 48
    shifted = recipe.augment(pixels, generator, flip=False, padding=1)
    assert set(shifted[:, 0, 3, 3].int().tolist()) == {27 + 8 * i + j for i in (-1, 0, 1) for j in (-1, 0, 1)}
    assert torch.equal(recipe.augment(pixels, generator, flip=False, padding=0), pixels)


def write_pictures(folder):
    """Colour pictures of two classes, one bright, one dark."""
    generator = np.random.default_rng(0)
    for name, low in (("dark", 0), ("bright", 160)):
        (folder / name).mkdir(parents=True)
        for i in range(24):
            pixels = generator.integers(low, low + 95, (20, 24, 3), dtype=np.uint8)
            Picture.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_a_folder_of_images_without_validation_and_test_on_a_fresh_convolutional_network(call, tmp_path, caplog):
    """A damaged image is found before training; a ResNet has no image size."""
    pictures = write_pictures(tmp_path / "pictures")
    (pictures / "dark" / "0.png").write_bytes((pictures / "dark" / "1.png").read_bytes()[:300])
    options = {
        "model_type": "resnet",
        "config_overrides": "{embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1], layer_type: basic}",
        "dataset_name": pictures,
        "target_modules": [r".*\.convolution"],
        "init_weights": "activation_aware",
        "horizontal_flip": True,
        "crop_padding": 2,
        "validation_fraction": 0.25,
        "num_train_epochs": 8,
        "learning_rate": 1e-2,
        "max_train_samples": None,
        "max_eval_samples": None,
        "max_attack_samples": 5,
        "attacks": "pgd-linf",
        "epsilons": 1e-4,
    }
    with pytest.raises(
        ValueError, match=r"every row must be readable; received OSError: .*dark/0\.png\) in row 24 of the"
    ):
        call(**options)
    out = call(**options, skip_unreadable=True)
    metrics = read(out / "validation_results.json")  # there is no test split
    assert (metrics["validation_samples"], metrics["validation_attacked_samples"]) == (11, 5)
    assert metrics["validation_accuracy"] > 0.8
    assert "validation_accuracy_pgd_linf_0.0001" in metrics
    assert read(out / "preprocessor_config.json")["size"] == {"height": 20, "width": 24}
    assert AutoModelForImageClassification.from_pretrained(out).config.id2label == {0: "bright", 1: "dark"}


def test_a_fresh_models_processor_normalises_by_the_training_images(call):
    out = call(num_train_epochs=0)
    processor, config = read(out / "preprocessor_config.json"), read(out / "config.json")
    assert processor["size"] == {"height": 8, "width": 8}
    assert processor["image_mean"] == pytest.approx([0.305], abs=0.02)  # of all digits; here of 64
    assert processor["image_std"] == pytest.approx([0.376], abs=0.02)
    assert (config["hidden_size"], len(config["id2label"])) == (32, 10)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dense", {"adversarial_attack": "fgsm", "adversarial_share": 0.5}),
        ("lowrank", {"adversarial_attack": "pgd", "adversarial_steps": 2, "adversarial_norm": "l2"}),
        ("condlr", {"adversarial_attack": "pgd", "trades_beta": 6, "adversarial_schedule": "constant"}),
    ],
)
def test_adversarial_training_by_every_method(call, method, options):
    out = call(method=method, adversarial_epsilon="16/255", logging_steps=1, **options)
    logged = [entry for entry in read(out / "trainer_state.json")["log_history"] if "loss" in entry]
    rising = options.get("adversarial_schedule") != "constant"
    expected = [0, 0, 8 / 255, 16 / 255] if rising else [16 / 255] * 4  # ramp: from a quarter to three quarters
    assert [entry["adversarial_epsilon"] for entry in logged] == pytest.approx(expected)


def test_distillation_takes_a_teacher_of_the_same_classes(call, tmp_path):
    teacher = call(method="dense").rename(tmp_path / "teacher")
    taught = {"teacher": teacher, "distillation_temperature": 4, "max_train_samples": 32}
    losses = [
        read(call(distillation_weight=weight, **taught) / "train_results.json")["train_loss"] for weight in (0.01, 1)
    ]
    assert losses[0] > 10 * losses[1] > 0  # a fresh teacher is easily matched, the labels are not
    pictures = write_pictures(tmp_path / "pictures")
    with pytest.raises(ValueError, match=r"the teacher must know the classes \['bright', 'dark'\], .*; received \['0'"):
        call(dataset_name=pictures, distillation_weight=0.5, **taught)


# ----------------------------------------------------------------------------------------------------------- images


def rows(recipe, *images):
    data = Dataset.from_dict(
        {"image": list(images), "labels": [0] * len(images)},
        features=Features({"image": Image(), "labels": ClassLabel(names=["a"])}),
    )
    return data.cast_column("image", Image(decode=False))


def test_grey_and_colour_images_become_what_the_model_takes(recipe):
    grey, red = Picture.new("L", (8, 8), 51), Picture.new("RGB", (8, 8), (255, 0, 0))
    processor = recipe.ViTImageProcessorPil(size={"height": 8, "width": 8}, do_normalize=False)
    data, takes = rows(recipe, grey, red), lambda channels: PreTrainedConfig(num_channels=channels)
    colour = recipe.Transform(processor, takes(3))(data[:])["pixel_values"]
    assert torch.equal(colour[0], torch.full((3, 8, 8), 0.2)) and colour[1, :, 0, 0].tolist() == [1, 0, 0]
    weighed = recipe.Transform(processor, takes(1))(data[:])["pixel_values"]
    assert weighed[:, 0, 0, 0].tolist() == pytest.approx([0.2, 0.299], abs=2e-3)
    with pytest.raises(ValueError, match=r"must take images of 1 or 3 channels; received 4"):
        recipe.Transform(processor, takes(4))


def test_sixteen_bits_are_refused_rather_than_cut_off_and_no_image_too(recipe):
    assert recipe.unreadable({"image": None}) == "no image"
    deep = Picture.fromarray(np.full((8, 8), 40_000, dtype=np.uint16))
    assert (
        recipe.unreadable(rows(recipe, deep)[0]) == "ValueError: images must have 8 bits a channel; received mode I;16"
    )


# --------------------------------------------------------------------------------------------------------- restarts

# Whatever is random: order, dropout, augmentation, random starts of attacks in training. 8 steps, half an epoch each 2.
RANDOM = {
    "config_overrides": [IMAGES["config_overrides"][0].replace("}", ", hidden_dropout_prob: 0.1}")],
    "horizontal_flip": True,
    "crop_padding": 1,
    "adversarial_attack": "pgd",
    "adversarial_epsilon": 0.05,
    "adversarial_steps": 1,
    "num_train_epochs": 2,
    "save_strategy": "steps",
    "save_steps": 2,
}


@pytest.fixture(scope="module")
def uninterrupted(recipe, place, tmp_path_factory):
    """{method: output folder of an uninterrupted training}."""
    root, data = tmp_path_factory.mktemp("uninterrupted"), place.with_name("digits")
    return {m: run(recipe, root / m, **IMAGES | RANDOM | {"method": m, "dataset_name": data}) for m in METHODS}


def outcome(folder):
    """Final metrics but times."""
    kinds = ("accuracy", "loss", "kappa_max")
    metrics = read(folder / "all_results.json")
    return {name: value for name, value in metrics.items() if name.endswith(kinds) and name != "train_loss"}


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_training_ends_as_an_uninterrupted_one(call, uninterrupted, tmp_path, caplog, method):
    """The checkpoint that it resumes from is deleted on the way, and the one after it is half written."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.copytree(uninterrupted[method] / name, out / name)
    shutil.copy(uninterrupted[method] / "settings.json", out)
    (out / "checkpoint-6" / "trainer_state.json").write_text('{"epoch": 1.')
    for file in (out / "checkpoint-6").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:1000])
    call(method=method, save_total_limit=1, **RANDOM)
    assert f"resuming from {out}/checkpoint-4" in caplog.text and not (out / "checkpoint-4").exists()
    assert outcome(out) == pytest.approx(outcome(uninterrupted[method]), rel=1e-6)
    assert read(out / "train_results.json")["train_steps_before"] == 4


def test_a_finished_training_is_not_trained_again_and_can_be_attacked_afterwards(call, uninterrupted, tmp_path):
    out = shutil.copytree(uninterrupted["condlr"], tmp_path / "out")
    trained = (out / "train_results.json").read_text()
    call(attacks="pgd-linf", epsilons=0.05, attack_steps=1, **RANDOM)
    assert (out / "train_results.json").read_text() == trained
    again = outcome(out)
    assert again.pop("test_robust_accuracy") <= 1
    assert again == pytest.approx(outcome(uninterrupted["condlr"]), rel=1e-6)


def test_the_model_is_saved_before_it_is_evaluated(recipe, call, monkeypatch, tmp_path):
    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe.AttackArguments, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        call()
    assert (tmp_path / "out" / "condlr.safetensors").is_file()


# ------------------------------------------------------------------------------------------------ accelerate launch


@pytest.mark.processes
def test_two_processes_under_autocast_killed_started_again_and_pushed(place, tmp_path):
    """The true number of samples is evaluated, and the main process speaks for both."""
    out, script = tmp_path / "out", shutil.copy(RECIPES / "image_classification.py", tmp_path)
    options = IMAGES | {"dataset_name": place.with_name("digits"), "output_dir": out, "per_device_train_batch_size": 8}
    options |= {"attacks": "pgd-linf", "epsilons": 0.05, "attack_steps": 1, "bf16": True}
    options |= {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, "hub_strategy": "end"}
    command, environment = launch("ddp_cpu.yaml", script, *words(**options, hub_model_id="me/digits", push_to_hub=True))
    with Hub() as hub:
        pipes = {"env": environment | hub.environment("hf_write"), "cwd": tmp_path, "text": True}
        pipes |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, start_new_session=True, **pipes)  # its own group: all of it is killed
        deadline = time.monotonic() + 240
        while not (out / "checkpoint-4" / "trainer_state.json").is_file():
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        done = subprocess.run(command, timeout=300, check=False, **pipes)
        files = hub.files("me/digits")
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr
    assert done.stdout.count("test_accuracy_pgd_linf_0.05") == 1
    metrics, settings = read(out / "all_results.json"), read(out / "settings.json")
    assert (settings["world_size"], settings["mixed_precision"]) == (2, "bf16")
    assert (metrics["eval_samples"], metrics["test_samples"], metrics["test_attacked_samples"]) == (37, 37, 37)
    assert round(37 * metrics["test_accuracy_pgd_linf_0.05"], 6) % 1 == pytest.approx(0, abs=1e-4)
    assert metrics["test_kappa_max"] <= 1.1 * (1 + 1e-4)
    assert {"condlr.safetensors", "config.json", "preprocessor_config.json", "README.md"} <= set(files)
    assert "robust_accuracy" in files["README.md"].decode()


def test_a_wrong_argument_is_one_line(recipe, capsys):
    for wrong, message in (
        ({"validation_fraction": 1.5}, "validation_fraction must lie in (0, 1); received 1.5"),
        ({"method": "robust"}, "method must be one of dense, lowrank, condlr; received 'robust'"),
    ):
        with pytest.raises(SystemExit):
            parse(recipe, words(output_dir="o", model_name_or_path="m", dataset_name="d", **wrong))
        assert message in capsys.readouterr().err


def test_models_and_attacks_for_other_data(call):
    with pytest.raises(ValueError, match=r"the model must be one for ImageClassification; received 'bert'"):
        call(model_type="bert", config_overrides=None, dataset_name="gone")
    with pytest.raises(ValueError, match="attacks must be on pixels; received characters"):
        call(attacks="characters", epsilons=0.1, dataset_name="gone")
