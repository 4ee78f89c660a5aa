"""`recipes/image_classification.py` as a user runs it: its methods, on one process and two, pushed, wrongly called."""

import json
import re
import subprocess

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image as Picture
from transformers import AutoModelForImageClassification, ConvNextConfig, ConvNextForImageClassification, set_seed

from hf_condlr import LowRankLinear
from tests.checkpoints.hub_server import Hub
from tests.recipes.recipe_runs import METHODS, SMALL, launch, load, read, train, words

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    load("digits").write_digits(folder)
    return folder


@pytest.fixture
def call(digits, tmp_path):
    """Runs the recipe in this process; returns the folder that it wrote."""
    return lambda **options: train(tmp_path / "out", **{"dataset_name": digits} | options)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_is_what_was_evaluated(call, method):
    attacks = {"attacks": ["fgsm", "pgd-linf"], "epsilons": ["8/255", 0.05], "attack_steps": 3}
    out = call(method=method, attack_checks=method == "condlr", num_train_epochs=3, max_train_samples=None, **attacks)
    metrics = read(out / "test_results.json")
    assert 0.1 < metrics["test_accuracy"] <= 1
    assert metrics["test_robust_accuracy"] <= metrics["test_accuracy_pgd_linf_0.05"] <= metrics["test_accuracy"]
    assert metrics["test_accuracy_fgsm_0.0313725"] <= metrics["test_accuracy"]
    assert metrics["test_samples"] == metrics["test_attacked_samples"] == 37
    assert set(read(out / "all_results.json")) >= {"train_loss", "eval_accuracy", "test_accuracy_pgd_linf_0.05"}
    assert bool(read(out / "robustness.json")["checks"]) == (method == "condlr")
    assert (out / "condition_report.json").is_file() == (method != "dense")
    if method == "condlr":
        assert metrics["test_kappa_max"] <= 1.1 * (1 + 1e-4)

    files = ("model.safetensors",) if method == "dense" else ("condlr.safetensors", "condition_report.json")
    assert all((out / name).is_file() for name in ("README.md", "preprocessor_config.json", *files))
    if method != "dense":
        results = ModelCard.load(out / "README.md").data.eval_results
        attacked = [result for result in results if result.metric_type == "robust_accuracy"]
        assert [result.metric_args["epsilon"] for result in attacked] == pytest.approx([8 / 255, 0.05] * 2)
        assert attacked[-1].metric_value == pytest.approx(metrics["test_accuracy_pgd_linf_0.05"])
    saved = {"model_name_or_path": out, "model_type": None, "config_overrides": None}
    again = call(method=method, num_train_epochs=0, **saved)
    assert read(again / "test_results.json")["test_loss"] == pytest.approx(metrics["test_loss"], rel=1e-5)


def test_training_lowers_the_loss_and_augments(call):
    before = read(call(num_train_epochs=0) / "eval_results.json")["eval_loss"]
    plain = read(call(num_train_epochs=8, learning_rate=1e-2) / "all_results.json")
    assert plain["eval_loss"] < 0.95 * before
    shifted = read(call(num_train_epochs=8, learning_rate=1e-2, crop_padding=1) / "all_results.json")
    assert shifted["train_loss"] != plain["train_loss"]


def test_augmentation_mirrors_and_shifts():
    augment = load("image_trainers").augment
    pixels = torch.arange(64.0).reshape(1, 1, 8, 8).expand(64, 1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    flipped = augment(pixels, generator, flip=True, padding=0)
    mirrored = (flipped == pixels.flip(-1)).all((1, 2, 3))
    assert torch.equal(flipped[~mirrored], pixels[~mirrored])
    assert 16 < mirrored.sum() < 48
    shifted = augment(pixels, generator, flip=False, padding=1)
    assert set(shifted[:, 0, 3, 3].int().tolist()) == {27 + 8 * i + j for i in (-1, 0, 1) for j in (-1, 0, 1)}
    assert torch.equal(augment(pixels, generator, flip=False, padding=0), pixels)


def test_a_folder_of_images_without_validation_and_test_on_a_convolutional_network(call, tmp_path):
    """Colour pictures of two classes, one bright, one dark; a fresh head, resizing, calibration, augmentation."""
    generator = np.random.default_rng(0)
    for name, low in (("dark", 0), ("bright", 160)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(24):
            pixels = generator.integers(low, low + 95, (20, 24, 3), dtype=np.uint8)
            Picture.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    set_seed(0)
    config = ConvNextConfig(image_size=32, hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, num_labels=7)
    ConvNextForImageClassification(config).save_pretrained(tmp_path / "convnext")
    processor = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}, "crop_pct": 1.0}
    (tmp_path / "convnext" / "preprocessor_config.json").write_text(json.dumps(processor))
    out = call(
        model_name_or_path=tmp_path / "convnext",
        model_type=None,
        config_overrides=None,
        dataset_name=tmp_path / "pictures",
        init_weights="activation_aware",
        calibration_samples=16,
        horizontal_flip=True,
        crop_padding=2,
        validation_fraction=0.25,
        num_train_epochs=10,
        learning_rate=1e-2,
        max_train_samples=None,
        max_eval_samples=None,
        max_attack_samples=5,
        epsilons=1e-4,
    )
    metrics = read(out / "validation_results.json")  # there is no test split
    assert (metrics["validation_samples"], metrics["validation_attacked_samples"]) == (12, 5)
    assert metrics["validation_accuracy"] == 1
    assert "validation_accuracy_pgd_linf_0.0001" in metrics
    model = AutoModelForImageClassification.from_pretrained(out)
    assert isinstance(model.convnext.encoder.stages[0].layers[0].pwconv1, LowRankLinear)
    assert model.config.id2label == {0: "bright", 1: "dark"}


def test_a_fresh_models_processor_normalises_by_the_training_images(call):
    out = call(num_train_epochs=0)
    processor, config = read(out / "preprocessor_config.json"), read(out / "config.json")
    assert processor["size"] == {"height": 8, "width": 8}
    assert processor["image_mean"] == pytest.approx([0.305], abs=0.02)  # of all digits; here of 64
    assert processor["image_std"] == pytest.approx([0.376], abs=0.02)
    assert (config["hidden_size"], len(config["id2label"])) == (32, 10)


def test_a_factored_checkpoint_trains_on_but_not_as_a_dense_model(call, caplog):
    first = call()
    saved = {"model_name_or_path": first, "model_type": None, "config_overrides": None, "num_train_epochs": 0}
    with pytest.raises(ValueError, match=r"method dense needs a dense model; received .*\. Choose lowrank or condlr"):
        call(method="dense", **saved)
    again = call(**saved)
    assert "is factored already" in caplog.text
    assert read(again / "test_results.json")["test_kappa_max"] <= 1.1 * (1 + 1e-4)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dense", {"adversarial_attack": "fgsm", "adversarial_share": 0.5}),
        ("lowrank", {"adversarial_attack": "pgd", "adversarial_steps": 2, "adversarial_norm": "l2"}),
        ("condlr", {"adversarial_attack": "pgd", "trades_beta": 6, "adversarial_schedule": "constant"}),
    ],
)
def test_adversarial_training_by_every_method_from_a_file(digits, tmp_path, method, options):
    recipe, file = load("image_classification"), tmp_path / "run.yaml"
    options = {"method": method, "adversarial_epsilon": "16/255", "logging_steps": 1, **options}
    file.write_text("".join(f"{name}: {value}\n" for name, value in options.items()))
    out = tmp_path / "out"
    recipe.main(*recipe.parse([str(file), *words(**SMALL, output_dir=out, dataset_name=digits)]))
    logged = [entry for entry in read(out / "trainer_state.json")["log_history"] if "loss" in entry]
    assert len(logged) == 4
    rising = options.get("adversarial_schedule") != "constant"
    expected = [0, 0, 8 / 255, 16 / 255] if rising else [16 / 255] * 4  # ramp: from a quarter to three quarters
    assert [entry["adversarial_epsilon"] for entry in logged] == pytest.approx(expected)
    assert [("adversarial_error" in entry) for entry in logged] == [epsilon > 0 for epsilon in expected]


def test_options_that_a_method_does_not_have_are_said(call, caplog):
    call(method="lowrank", num_train_epochs=0, conditioning_warmup_ratio=0.5, projection_interval=2)
    assert "method lowrank takes no notice of conditioning_warmup_ratio, projection_interval" in caplog.text


def test_distillation_takes_a_teacher_of_the_same_classes(call, tmp_path):
    dense = call(method="dense")
    dense.rename(tmp_path / "teacher")
    taught = {"teacher": tmp_path / "teacher", "distillation_temperature": 4, "max_train_samples": 32}
    losses = [
        read(call(distillation_weight=weight, **taught) / "train_results.json")["train_loss"] for weight in (0.01, 1)
    ]
    assert losses[0] > 10 * losses[1] > 0  # a fresh teacher is easily matched, the labels are not
    with pytest.raises(
        ValueError, match=r"the teacher must know the classes even, odd, \.\.\. in this order; received"
    ):
        train(tmp_path / "out", dataset_name=parity(tmp_path / "parity"), distillation_weight=0.5, **taught)


def parity(folder):
    """Two classes of pictures."""
    for i in range(8):
        path = folder / ("even", "odd")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Picture.new("L", (8, 8), 30 * i).save(path)
    return folder


# ------------------------------------------------------------------------------------------------ accelerate launch


def run(command, environment):
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def test_two_processes_evaluate_the_true_number_of_samples(call, digits, tmp_path):
    options = {"epsilons": 0.05, "attack_steps": 3}
    one = call(**options)
    shared = (
        SMALL | options | {"per_device_train_batch_size": 8, "dataset_name": digits, "output_dir": tmp_path / "two"}
    )
    done = run(*launch("ddp_cpu.yaml", "image_classification.py", *words(**shared)))
    assert done.stdout.count("test_accuracy_pgd_linf_0.05") == 1  # the main process speaks for all

    two, one = read(tmp_path / "two" / "all_results.json"), read(one / "all_results.json")
    assert set(two) >= set(one)
    assert read(tmp_path / "two" / "settings.json")["processes"] == 2
    for split in ("eval", "test"):
        assert one[f"{split}_samples"] == two[f"{split}_samples"] == 37
        # Four optimizer steps on the same batches in all, joined or shared.
        assert two[f"{split}_loss"] == pytest.approx(one[f"{split}_loss"], rel=1e-2)
    assert round(37 * two["test_accuracy_pgd_linf_0.05"], 6) % 1 == pytest.approx(0, abs=1e-4)
    assert two["test_kappa_max"] <= 1.1 * (1 + 1e-4)


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as ddp_cpu.yaml without --use_cpu true
    check = load("command_line").require_joined
    check(2)
    with pytest.raises(
        ValueError, match="2 processes were started and must work as one group; received '1 in a group'"
    ):
        check(1)


def test_under_autocast_and_pushed(digits, tmp_path):
    options = SMALL | {"dataset_name": digits, "output_dir": tmp_path / "out", "epsilons": 0.05, "attack_steps": 1}
    command, environment = launch("bf16.yaml", "image_classification.py", *words(**options, hub_model_id="me/digits"))
    with Hub() as hub:
        run([*command, "--push_to_hub", "true"], environment | hub.environment("hf_write"))
        files = hub.files("me/digits")
    assert read(tmp_path / "out" / "settings.json")["mixed_precision"] == "bf16"
    assert read(tmp_path / "out" / "test_results.json")["test_kappa_max"] <= 1.1 * (1 + 1e-4)
    assert {"condlr.safetensors", "config.json", "preprocessor_config.json", "README.md"} <= set(files)
    assert "robust_accuracy" in files["README.md"].decode()


# ------------------------------------------------------------------------------------------------------ wrong calls

NEEDED = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "robust"}, "method must be one of dense, lowrank, condlr; received 'robust'"),
        ({"tau": -0.1}, "tau.*received -0.1"),
        ({"rank_ratio": 1.5}, "rank_ratio.*received 1.5"),
        ({"rank_ratio": 0.5, "compression_ratio": 0.5}, "rank_ratio"),
        ({"init_weights": "magic"}, "init_weights.*magic"),
        ({"method": "dense", "teacher": "t"}, "a teacher needs method condlr; received 'dense'"),
        ({"calibration_samples": 0}, "calibration_samples must be ≥ 1; received 0"),
        ({"max_train_samples": 0}, "max_train_samples must be ≥ 1; received 0"),
        ({"validation_fraction": 1.0}, r"validation_fraction must lie in \(0, 1\); received 1.0"),
        ({"crop_padding": -1}, "crop_padding must be ≥ 0; received -1"),
        ({"epsilons": -0.1}, "epsilon must be .*received -0.1"),
        ({"epsilons": "8:255"}, "epsilon must be a number or a fraction; received '8:255'"),
        ({"attack_steps": 0, "epsilons": 0.1}, "steps.*≥ 1.*received steps=0"),
        ({"attacks": "characters", "epsilons": 0.1}, r"data have attacks on pixels; received \['characters'\]"),
        ({"attacks": "magic", "epsilons": 0.1}, "attack must be one of .*received 'magic'"),
        ({"conditioning_warmup_ratio": 2.0}, "conditioning_warmup_ratio must lie in .*received 2.0"),
        ({"adversarial_attack": "pgd"}, "adversarial_epsilon must be given with pgd"),
        ({"model_type": "vit"}, "one of model_name_or_path and model_type must be given; received .*'model_type'"),
        ({"model_name_or_path": None}, r"one of model_name_or_path and model_type must be given; received \[\]"),
        ({"config_overrides": "a"}, "config_overrides needs model_type; received 'a'"),
    ],
)
def test_a_wrong_argument_is_said_in_one_line(capsys, wrong, message):
    with pytest.raises(SystemExit):
        load("image_classification").parse(words(**NEEDED | wrong))
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert re.search(message, line)


@pytest.mark.parametrize(
    ("model_type", "overrides", "message"),
    [
        ("vitt", "{}", "model_type must be one that transformers has; received 'vitt'"),
        ("vit", "{hidden: 1}", r"config_overrides must be fields of ViTConfig; received \['hidden'\]"),
        ("vit", "{hidden_size:1}", "config_overrides must be fields of ViTConfig"),
        ("vit", "hidden_size=1", "config_overrides must be a mapping such as {hidden_size: 128}; received 'hidden_si"),
    ],
)
def test_a_wrong_fresh_model_is_said(model_type, overrides, message):
    with pytest.raises(ValueError, match=message):
        load("method").MethodArguments(model_type=model_type, config_overrides=overrides)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("run.yaml", "learning_rate: 1e-3\nepsilons: [0.1, 2/255]\nbf16: false\ncompression_ratio: null\n"),
        ("run.json", '{"learning_rate": 0.001, "epsilons": [0.1, "2/255"], "bf16": false, "compression_ratio": null}'),
    ],
)
def test_a_file_comes_first_and_the_command_line_wins(tmp_path, file, text):
    (tmp_path / file).write_text(text)
    line = [str(tmp_path / file), *words(**NEEDED, learning_rate="3e-3", rank_ratio=0.5)]
    model, data, training = load("image_classification").parse(line)
    assert (model.rank_ratio, model.compression_ratio, data.epsilons) == (0.5, None, ["0.1", "2/255"])
    assert (training.learning_rate, training.bf16) == (3e-3, False)  # YAML takes 1e-3 for text


def test_a_file_that_is_not_there_or_names_no_option_is_an_error(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("learning_rat: 1e-3\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    for file, message in (
        ("run.yaml", "learning_rat"),
        ("gone.yaml", "No such file"),
        ("list.yaml", "must hold options"),
        ("bad.yaml", "expected ','"),
    ):
        with pytest.raises(SystemExit):
            load("image_classification").parse([str(tmp_path / file), *words(**NEEDED)])
        assert message in capsys.readouterr().err
