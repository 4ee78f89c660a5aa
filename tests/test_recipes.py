"""The recipes as a user runs them: the demo in one process, the recipe by torchrun on two, and wrongly called."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from huggingface_hub import ModelCard
from PIL import Image as Picture
from transformers import AutoModelForImageClassification, ConvNextConfig, ConvNextForImageClassification, set_seed

from hf_condlr import LowRankLinear

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

RECIPES = Path(__file__).parents[1] / "recipes"
METHODS = ("dense", "lowrank", "condlr")
TINY = {"max_train_samples": 64, "max_eval_samples": 37}  # 37: batches that two processes cannot share evenly


@pytest.fixture(scope="module")
def recipe():
    sys.path.insert(0, str(RECIPES))
    try:
        import image_classification

        yield image_classification
    finally:
        sys.path.remove(str(RECIPES))


@pytest.fixture(scope="module")
def demo(recipe):
    import demo

    return demo


@pytest.fixture(scope="module")
def folder(demo, tmp_path_factory):
    """What `demo.py` wrote, which calls the recipe for the pretraining and for each method."""
    folder = tmp_path_factory.mktemp("demo")
    threads = torch.get_num_threads()
    demo.main(
        demo.Arguments(pretraining_epochs=1, epochs=1, learning_rates=[3e-3, 1e-2], output_dir=str(folder), **TINY)
    )
    torch.set_num_threads(threads)
    return folder


def read(path):
    return json.loads(path.read_text())


def words(**options):
    """A command line."""
    return [text for name, value in options.items() for text in (f"--{name}", *str(value).split())]


@pytest.fixture
def call(recipe, folder, tmp_path):
    """Runs the recipe in this process from the demo's model and data; returns the folder that it wrote."""

    def call(**options):
        options = {
            "model_name_or_path": folder / "seed0" / "pretrained",
            "dataset_name": folder / "digits",
            "num_train_epochs": 1,
            "output_dir": tmp_path / "out",
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
            **TINY,
            **options,
        }
        recipe.main(*recipe.parse(words(**{k: v for k, v in options.items() if v is not None})))
        return tmp_path / "out"

    return call


# -------------------------------------------------------------------------------------------------------- the demo


@pytest.mark.parametrize("method", METHODS)
def test_the_demos_result_is_complete(folder, method):
    result = read(folder / "seed0" / f"{method}.json")
    assert [run["learning_rate"] for run in result["sweep"]] == [3e-3, 1e-2]
    assert result["learning_rate"] in (3e-3, 1e-2)
    assert result["samples"] == 37
    assert list(result["robust"]) == ["0.025", "0.05", "0.075", "0.1", "0.15"]
    assert all(0 <= accuracy <= 1 for accuracy in (result["clean"], *result["robust"].values()))
    assert len(result["condition_numbers"]) == 24  # 4 blocks of 6 linear layers


def test_the_best_validation_accuracy_chooses_and_loss_breaks_ties(folder, demo):
    for method in METHODS:
        result = read(folder / "seed0" / f"{method}.json")
        best = min(result["sweep"], key=lambda run: (-run["accuracy"], run["loss"]))
        assert result["learning_rate"] == best["learning_rate"]
    equal = [{"accuracy": 0.5, "loss": None}, {"accuracy": 0.5, "loss": 2.0}, {"accuracy": 0.5, "loss": 1.0}]
    assert min(equal, key=demo.worse) == equal[2]
    assert max(equal, key=demo.worse) == equal[0]  # a loss that is not finite loses


def test_only_condlr_bounds_the_condition_numbers(folder):
    kappa = {m: read(folder / "seed0" / f"{m}.json")["condition_numbers"].values() for m in METHODS}
    assert max(kappa["condlr"]) <= 1.1 * (1 + 1e-4)
    assert max(kappa["lowrank"]) > 1.2
    assert max(kappa["dense"]) > 1.2


def test_both_low_rank_methods_have_the_same_size(folder):
    lowrank, condlr = (read(folder / "seed0" / f"{method}.json") for method in ("lowrank", "condlr"))
    assert lowrank["parameters"] == condlr["parameters"] < 0.5 * condlr["dense_parameters"]
    assert lowrank["dense_parameters"] == condlr["dense_parameters"]


def test_the_demo_writes_table_and_picture(folder):
    rows = (folder / "table.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["method", "---", *METHODS]
    assert len({len(row) for row in rows}) == 1
    assert (folder / "demo.png").stat().st_size > 10_000


def test_seeds_give_mean_and_standard_deviation(demo):
    assert demo.spread([1.0, 3.0], ".1f") == "2.0 ± 1.4"
    assert demo.spread([2.0, 2.0], ".1f") == "2.0"


# ------------------------------------------------------------------------------------------------------ the recipe


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_is_what_was_evaluated(call, recipe, method):
    out = call(method=method, epsilons="0.05", learning_rate=3e-3, max_eval_samples=None)
    metrics = read(out / "test_results.json")
    assert 0 <= metrics["test_accuracy_pgd_0.05"] <= metrics["test_accuracy"] <= 1
    assert metrics["test_samples"] == 719
    assert set(read(out / "all_results.json")) >= {"train_loss", "eval_accuracy", "test_accuracy_pgd_0.05"}
    assert (out / "condition_report.json").is_file() == (method != "dense")
    if method == "condlr":
        assert metrics["test_kappa_max"] <= 1.1 * (1 + 1e-4)

    files = ("model.safetensors",) if method == "dense" else ("condlr.safetensors", "condition_report.json")
    assert all((out / name).is_file() for name in ("README.md", "preprocessor_config.json", *files))
    if method != "dense":
        results = ModelCard.load(out / "README.md").data.eval_results
        [attacked] = [result for result in results if result.metric_type == "robust_accuracy"]
        assert attacked.metric_value == pytest.approx(metrics["test_accuracy_pgd_0.05"])
        assert attacked.metric_args["epsilon"] == 0.05
    again = call(model_name_or_path=out, method="dense", num_train_epochs=0, max_eval_samples=None)
    assert read(again / "test_results.json")["test_loss"] == pytest.approx(metrics["test_loss"], rel=1e-5)


def test_training_lowers_the_loss(call):
    before = read(call(num_train_epochs=0) / "eval_results.json")["eval_loss"]
    after = read(call(num_train_epochs=5, learning_rate=3e-3) / "eval_results.json")["eval_loss"]
    assert after < 0.9 * before


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
        epsilons="1e-4",
    )
    metrics = read(out / "validation_results.json")  # there is no test split
    assert metrics["validation_samples"] == 12
    assert metrics["validation_accuracy"] == 1
    assert "validation_accuracy_pgd_0.0001" in metrics
    model = AutoModelForImageClassification.from_pretrained(out)
    assert isinstance(model.convnext.encoder.stages[0].layers[0].pwconv1, LowRankLinear)
    assert model.config.id2label == {0: "bright", 1: "dark"}


def test_a_parquet_file_with_columns_named_and_labels_as_text(recipe, tmp_path):
    images = [Picture.new("L", (8, 8), i) for i in range(20)]
    rows = {"picture": images, "other": images, "kind": ["cat", "dog"] * 10}
    features = Features({"picture": Image(), "other": Image(), "kind": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    args = recipe.DataArguments(
        str(tmp_path / "train.parquet"), image_column="picture", label_column="kind", validation_fraction=0.2
    )
    data = recipe.load_data(args)
    assert {name: len(split) for name, split in data.items()} == {"train": 16, "validation": 4}
    assert data["train"].features["labels"] == ClassLabel(names=["cat", "dog"])
    assert sorted(data["validation"]["labels"]) == [0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"one column of Image, or --image_column must name it; received .*'other'"):
        recipe.load_data(recipe.DataArguments(str(tmp_path / "train.parquet"), label_column="kind"))
    with pytest.raises(ValueError, match="label_column must be one of picture, other, kind; received 'colour'"):
        recipe.load_data(
            recipe.DataArguments(str(tmp_path / "train.parquet"), image_column="other", label_column="colour")
        )


def test_a_test_split_with_secret_labels_is_left_out(recipe, tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(num_classes=2)})
    image = Picture.new("L", (8, 8))
    for split, labels in {"train": [0, 1], "validation": [0, 1], "test": [-1, -1]}.items():
        rows = Dataset.from_dict({"image": [image] * 2, "label": labels}, features=features)
        rows.to_parquet(tmp_path / f"{split}.parquet")
    assert set(recipe.load_data(recipe.DataArguments(str(tmp_path)))) == {"train", "validation"}


def test_augmentation_mirrors_and_shifts(recipe):
    class Processor:
        def __call__(self, images, **options):
            return {"pixel_values": torch.stack([torch.tensor(np.asarray(image))[None].float() for image in images])}

    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    batch = {"image": [Picture.fromarray(pixels)] * 64, "labels": [0] * 64}
    plain = recipe.Transform(Processor(), channels=1)(batch)["pixel_values"]
    assert torch.equal(plain, torch.tensor(pixels)[None, None].float().expand(64, 1, 8, 8))
    torch.manual_seed(0)
    flipped = recipe.Transform(Processor(), channels=1, flip=True)(batch)["pixel_values"]
    mirrored = (flipped == plain.flip(-1)).all((1, 2, 3))
    assert torch.equal(flipped[~mirrored], plain[~mirrored])
    assert 16 < mirrored.sum() < 48
    shifted = recipe.Transform(Processor(), channels=1, padding=1)(batch)["pixel_values"]
    assert set(shifted[:, 0, 3, 3].int().tolist()) == {27 + 8 * i + j for i in (-1, 0, 1) for j in (-1, 0, 1)}


def test_resuming_goes_on_from_the_last_checkpoint(call, tmp_path):
    options = {"method": "lowrank", "save_strategy": "epoch", "num_train_epochs": 2}
    whole = read(call(**options) / "test_results.json")["test_loss"]
    (tmp_path / "out" / "checkpoint-16" / "trainer_state.json").unlink()
    again = call(resume_from_checkpoint="true", **options)
    assert read(again / "test_results.json")["test_loss"] == pytest.approx(whole, rel=1e-6)


def test_a_factored_checkpoint_trains_on(call, folder, caplog):
    first = call()
    again = call(model_name_or_path=first, num_train_epochs=0)
    assert "is factored already" in caplog.text
    assert read(again / "test_results.json")["test_kappa_max"] <= 1.1 * (1 + 1e-4)


def test_distillation_takes_a_teacher(call, folder):
    out = call(teacher=folder / "seed0" / "pretrained", distillation_weight=0.5, learning_rate=1e-3)
    assert math.isfinite(read(out / "train_results.json")["train_loss"])


def test_two_processes_evaluate_the_true_number_of_samples(call, folder, tmp_path):
    # accelerate launch --cpu --num_processes 2 runs one process; torchrun runs two.
    options = {"epsilons": "0.05", "learning_rate": 3e-3, "per_device_train_batch_size": 16}
    one = call(**options)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [
        str(RECIPES / "image_classification.py"),
        *words(**TINY, **options | {"per_device_train_batch_size": 8}),
    ]
    command += words(model_name_or_path=folder / "seed0" / "pretrained", dataset_name=folder / "digits")
    command += words(
        num_train_epochs=1, save_strategy="no", report_to="none", use_cpu=True, output_dir=tmp_path / "two"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test_accuracy_pgd_0.05") == 1  # the main process speaks for all

    two, one = read(tmp_path / "two" / "all_results.json"), read(one / "all_results.json")
    assert set(two) >= set(one)
    for split in ("eval", "test"):
        assert one[f"{split}_samples"] == two[f"{split}_samples"] == 37
        # Four optimizer steps on the same batches in all, joined or shared.
        assert two[f"{split}_loss"] == pytest.approx(one[f"{split}_loss"], rel=1e-2)
    assert round(37 * two["test_accuracy_pgd_0.05"], 6) % 1 == pytest.approx(0, abs=1e-4)
    assert two["test_kappa_max"] <= 1.1 * (1 + 1e-4)


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
        ({"pgd_steps": 0, "epsilons": 0.1}, "steps.*≥ 1.*received steps=0"),
        ({"conditioning_warmup_ratio": 2.0}, "conditioning_warmup_ratio must lie in .*received 2.0"),
    ],
)
def test_a_wrong_argument_is_said_in_one_line(recipe, capsys, wrong, message):
    with pytest.raises(SystemExit):
        recipe.parse(words(**NEEDED | wrong))
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert re.search(message, line)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("run.yaml", "learning_rate: 1e-3\nepsilons: [0.1, 2e-1]\nbf16: false\ncompression_ratio: null\n"),
        ("run.json", '{"learning_rate": 0.001, "epsilons": [0.1, 0.2], "bf16": false, "compression_ratio": null}'),
    ],
)
def test_a_file_comes_first_and_the_command_line_wins(recipe, tmp_path, file, text):
    (tmp_path / file).write_text(text)
    model, data, training = recipe.parse([str(tmp_path / file), *words(**NEEDED, learning_rate="3e-3", rank_ratio=0.5)])
    assert (model.rank_ratio, model.compression_ratio, data.epsilons) == (0.5, None, [0.1, 0.2])
    assert (training.learning_rate, training.bf16) == (3e-3, False)  # YAML takes 1e-3 for text


def test_a_file_that_is_not_there_or_names_no_option_is_an_error(recipe, tmp_path, capsys):
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
            recipe.parse([str(tmp_path / file), *words(**NEEDED)])
        assert message in capsys.readouterr().err
