"""The recipe of the published experiments on tiny stand-ins: every method makes its row, a kill changes no number."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from hf_condlr import condition_report
from hf_condlr.robustness.attacks import FGSM, PGD
from studies import data as images
from studies import record, rows
from studies.paper import experiments, methods, study, table, training
from tests.studies.conftest import pictures

METHODS = (
    "dense",
    "unconstrained",
    "tau=0",
    "tau=0.1",
    "tau=0.1:rms",
    "tau=0.5:mean",
    "tau=inf",
    "svd_prune",
    "cayley",
)
METHODS += ("projected", "penalty=0.5")
ATTACKS = (FGSM(0.03), PGD(0.05, steps=2), PGD(0.05, steps=2, loss="margin"))


@pytest.fixture
def call(monkeypatch, data_dir, tmp_path):
    """Runs the recipe in this process, with few and short attacks."""

    def call(experiment="lenet5_mnist", output_dir=tmp_path, epochs=1, subset=64, **options):
        tiny = replace(experiments.EXPERIMENTS[experiment], attacks=ATTACKS)
        monkeypatch.setitem(experiments.EXPERIMENTS, experiment, tiny)
        options = {"rank_ratios": [0.2], "learning_rates": [0.1], "seeds": [0], "check_samples": 0, **options}
        arguments = table.Options(
            experiment, data_dir=data_dir, output_dir=str(output_dir), attacked_images=8, **options
        )
        return table.main(arguments, study.TrainingOptions(epochs=epochs, batch_size=16, subset=subset))

    return call


# ---------------------------------------------------------------------------------------------------------- the table


def test_every_method_makes_its_row(call, tmp_path):
    results = call(methods=[*METHODS])
    assert not any(row["diverged"] for row in results["rows"])
    rows = {(row["method"], row["rank_ratio"]): row for row in results["rows"]}
    full_rank = {(name, None) for name in ("dense", "cayley", "projected")}
    low_rank = {(name, 0.2) for name in METHODS if (name, None) not in full_rank}
    assert set(rows) == full_rank | low_rank
    assert {rows[key]["parameters"] for key in full_rank} == {431_080}
    assert {rows[key]["parameters"] for key in low_rank} == {151_576}
    kappa = {key: max(row["condition_numbers"].values()) for key, row in rows.items()}
    for name, bound in (("tau=0", 1), ("tau=0.1", 1.1), ("tau=0.1:rms", 1.1), ("tau=0.5:mean", 1.5)):
        assert kappa[name, 0.2] <= bound * (1 + 1e-4)
    assert kappa["cayley", None] == pytest.approx(1, abs=1e-4)
    assert kappa["projected", None] == pytest.approx(1, abs=1e-4)
    assert kappa["dense", None] > 2
    for name in ("tau=0.1", "tau=inf", "penalty=0.5"):
        assert rows[name, 0.2]["orthonormality_error"] < 1e-4
    assert rows["svd_prune", 0.2]["training_loss"] == rows["dense", None]["training_loss"]  # no training after it
    for row in rows.values():
        robust = row["robust_accuracy"]
        assert set(robust) == {
            *("fgsm 0.03", "pgd-linf 0.05", "pgd-linf-margin 0.05"),
            *("worst linf 0.03", "worst linf 0.05"),
        }
        assert robust["worst linf 0.05"] <= min(robust["pgd-linf 0.05"], robust["pgd-linf-margin 0.05"])
        assert 0 <= robust["fgsm 0.03"] <= 1

    written = json.loads((tmp_path / "lenet5_mnist" / "results.json").read_text())
    assert written["rows"] == results["rows"]
    assert written["versions"]["torch"] == torch.__version__
    text = (tmp_path / "lenet5_mnist" / "table.md").read_text()
    assert (tmp_path / "lenet5_mnist" / "fgsm.png").stat().st_size > 10_000
    labels = ("CondLR τ = 0.1, rms", "orthonormal U, V (τ = ∞)", "SVD prune", "soft penalty β = 0.5")
    for label in ("dense", *(f"{label}, rank ratio 0.2" for label in labels)):
        assert len(re.findall(rf"^\| {re.escape(label)} \|", text, re.MULTILINE)) >= 4  # results, 2 attacks, sweep


def test_svd_prune_is_the_truncated_dense_network(call, tmp_path):
    call(methods=["dense", "svd_prune"])
    weights = {path.parent.name.split("-")[0]: load_file(path) for path in tmp_path.rglob("model.safetensors")}
    dense, pruned = weights["dense"], weights["svd_prune"]
    for name, rank in (("conv1", 4), ("conv2", 10), ("fc1", 100), ("fc2", 10)):
        W = dense[f"{name}.weight"].flatten(1).double()
        U, S, V = (pruned[f"{name}.{factor}"].double() for factor in "USV")
        P, sigma, Qh = torch.linalg.svd(W, full_matrices=False)
        torch.testing.assert_close(U @ S @ V.mT, P[:, :rank] * sigma[:rank] @ Qh[:rank], rtol=0, atol=1e-5)


def test_validation_chooses_and_the_other_seeds_train_at_the_choice(call, tmp_path):
    results = call(methods=["dense"], learning_rates=[1e-3, 0.3, 0.01], seeds=[0, 1], epochs=2)
    best = max(results["sweep"], key=lambda row: row["validation_accuracy"])["learning_rate"]
    assert [row["learning_rate"] for row in results["sweep"]] == [1e-3, 0.01, 0.3]
    assert results["chosen"] == [{"label": "dense", "learning_rate": best}]
    assert [(row["seed"], row["learning_rate"]) for row in results["rows"]] == [(0, best), (1, best)]
    assert len(list(tmp_path.glob("lenet5_mnist/rows/*/row.json"))) == 4
    assert len(list(tmp_path.rglob("report.json"))) == 2  # what was not chosen never meets the test split
    doubtful = best in (1e-3, 0.3)
    assert ("edge of the sweep" in (tmp_path / "lenet5_mnist" / "table.md").read_text()) == doubtful


def test_a_method_that_diverges_is_reported_and_not_attacked(call, tmp_path):
    results = call(methods=["dense", "svd_prune"], learning_rates=[1e6], epochs=2)
    assert [choice["learning_rate"] for choice in results["chosen"]] == [None, None]
    assert results["rows"] == []
    text = (tmp_path / "lenet5_mnist" / "table.md").read_text()
    assert text.count("| diverged |") == 2
    assert "dense: diverged at every learning rate" in text


def test_checks_run_for_the_first_seed_only(call, tmp_path):
    call(methods=["tau=0.1"], seeds=[0, 1], check_samples=4)
    checks = {
        r["seed"]: len(json.loads(Path(r["report"]).read_text())["checks"])
        for r in [row for row in json.loads((tmp_path / "lenet5_mnist" / "results.json").read_text())["rows"]]
    }
    assert checks[0] > 5
    assert checks[1] == 0


# -------------------------------------------------------------------------------------------------------------- kills


class Killed(BaseException):
    """As a signal: no handler of errors catches it."""


def killing(monkeypatch, owner, name, at):
    """The call number `at` of a function ends the program at its beginning."""
    original, calls = getattr(owner, name), []

    def replacement(*args, **kwargs):
        calls.append(args)
        if len(calls) == at:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, replacement)
    return calls


def outcome(results):
    """Everything but times and folders."""
    hidden = ("training_seconds", "report", "folder")
    return [{k: v for k, v in row.items() if k not in hidden} for row in results["rows"] + results["sweep"]]


@pytest.mark.parametrize(
    ("method", "owner", "name", "at"),
    [
        ("tau=0.1", training, "one_epoch", 2),
        ("tau=0.1", training, "save_checkpoint", 2),
        ("tau=0.1", study, "save_model", 1),
        ("cayley", training, "one_epoch", 2),
    ],
)
def test_a_row_killed_within_ends_at_the_same_numbers(call, monkeypatch, tmp_path, method, owner, name, at):
    """Between two epochs, before a checkpoint is written, and before the final weights are."""
    options = {"methods": [method], "epochs": 2, "subset": 40}
    whole = call(output_dir=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        killing(patch, owner, name, at)
        with pytest.raises(Killed):
            call(output_dir=tmp_path / "killed", **options)
    calls = killing(monkeypatch, training, "one_epoch", 0)
    again = call(output_dir=tmp_path / "killed", **options)
    assert outcome(again) == outcome(whole)
    # No epoch is repeated but the one that was killed.
    assert len(calls) == {"one_epoch": 1, "save_checkpoint": 1, "save_model": 0}[name]
    first, second = (load_file(next((tmp_path / name).rglob("model.safetensors"))) for name in ("whole", "killed"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not list(tmp_path.rglob("*checkpoint*"))


def test_augmentation_and_batch_statistics_survive_a_kill(call, monkeypatch, tmp_path):
    """The stand-in for CIFAR-100, a narrow network in the place of WideResNet."""

    class Narrow(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 8, 3, stride=4), torch.nn.BatchNorm2d(8)
            self.classifier = torch.nn.Linear(8, 100)

        def forward(self, x):
            return self.classifier(self.norm(self.conv(x)).relu().mean((2, 3)))

    narrow = replace(experiments.EXPERIMENTS["wrn16_4_cifar100"], network=Narrow)
    monkeypatch.setitem(experiments.EXPERIMENTS, "wrn16_4_cifar100", narrow)
    options = {"experiment": "wrn16_4_cifar100", "methods": ["tau=0.5"], "epochs": 3}
    whole = call(output_dir=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        killing(patch, training, "one_epoch", 3)
        with pytest.raises(Killed):
            call(output_dir=tmp_path / "killed", **options)
    assert outcome(call(output_dir=tmp_path / "killed", **options)) == outcome(whole)
    assert len(set(whole["rows"][0]["training_loss"])) == 3


def test_a_kill_between_rows_repeats_nothing(call, monkeypatch, tmp_path):
    options = {"methods": ["dense", "unconstrained"], "seeds": [0, 1], "output_dir": tmp_path}
    with monkeypatch.context() as patch:
        trained = killing(patch, study, "fit", 4)
        with pytest.raises(Killed):
            call(**options)
        assert len(trained) == 4
    trained = killing(monkeypatch, study, "fit", 0)
    attacked = killing(monkeypatch, rows, "evaluate_robustness", 0)
    results = call(**options)
    assert len(trained) == 1  # unconstrained, seed 1
    assert len(attacked) == 1  # seed 0 of both and seed 1 of dense were attacked before
    assert len(results["rows"]) == 4
    call(**options)
    assert len(trained) == 1
    call(**options | {"epochs": 2, "methods": ["dense"], "seeds": [0]})  # other settings are other rows
    assert len(trained) == 2


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(("epochs", "places"), [(120, (70, 100)), (12, (7, 10)), (3, (1.75, 2.5))])
def test_the_rate_falls_where_it_was_published(call, monkeypatch, tmp_path, epochs, places):
    rates = []

    def record(model, optimizer, data, order, batch_size, schedule):
        for _ in range(math.ceil(len(data.labels) / batch_size)):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return 1.0

    monkeypatch.setattr(training, "one_epoch", record)
    call(methods=["dense"], epochs=epochs, subset=80)  # 60 images in batches of 16: 4 steps an epoch
    steps = [round(place * 4) for place in places]
    expected = [0.1] * steps[0] + [0.03] * (steps[1] - steps[0]) + [0.009] * (4 * epochs - steps[1])
    assert rates == pytest.approx(expected)


def test_methods_start_from_the_same_weights():
    experiment = experiments.EXPERIMENTS["lenet5_mnist"]

    def start(name):
        return methods.build_model(methods.Method.parse(name), experiment, 3, 0.2).state_dict()

    for names in (("dense", "svd_prune", "cayley"), ("unconstrained", "tau=0.1", "tau=inf", "penalty=1")):
        first, *others = map(start, names)
        for other in others:
            assert all(torch.equal(first[key], other[key]) for key in first)


def test_optimizers():
    for name, kind, has_handle in (
        ("dense", "SGD", False),
        ("unconstrained", "SGD", False),
        ("tau=inf", "SGD", True),
        ("penalty=0.1", "SGD", True),
        ("cayley", "CayleySGD", False),
        ("projected", "ProjectedSGD", False),
    ):
        method = methods.Method.parse(name)
        model = methods.build_model(method, experiments.EXPERIMENTS["lenet5_mnist"], 0, 0.2)
        optimizer, handle = methods.make_optimizer(method, model, 0.1, 0.3)
        assert (type(optimizer).__name__, handle is not None) == (kind, has_handle)
        assert all(group["momentum"] == 0.3 for group in optimizer.param_groups)
        assert len(optimizer._optimizer_step_pre_hooks) == {"penalty": 2}.get(method.kind, int(has_handle))


# ---------------------------------------------------------------------------------------------------- networks, images


def factored_size(model, rank_ratio, last):
    """r(m + n) + r² for each layer, its bias, and what is neither convolution nor linear."""
    size = 0
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            m, n = layer.weight.shape[0], layer.weight[0].numel()
            r = min(m, n) if name == last else max(1, round(rank_ratio * min(m, n)))
            size += r * (m + n) + r * r + (m if layer.bias is not None else 0)
        elif not list(layer.children()):
            size += sum(p.numel() for p in layer.parameters())
    return size


@pytest.mark.parametrize(
    ("experiment", "classes", "expected"),
    [
        # 4,224 channels: weights and biases of the convolutions, batch normalisation, linear layers.
        ("vgg16_cifar10", 10, 14_710_464 + 4_224 + 2 * 4_224 + 2 * 262_656 + 5_130),
        # Stem, three groups of convolutions with their shortcuts, batch normalisation of 1,808 channels, linear layer.
        ("wrn16_4_cifar10", 10, 432 + 120_832 + 524_288 + 2_097_152 + 2 * 1_808 + 2_570),
        ("wrn16_4_cifar100", 100, 2_748_890 + 90 * 257),
    ],
)
def test_networks_for_cifar(experiment, classes, expected):
    setting = experiments.EXPERIMENTS[experiment]
    model = setting.network().eval()
    dense = sum(p.numel() for p in model.parameters())
    assert dense == expected
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert model(images).shape == (2, classes)
        size = factored_size(model, 0.2, setting.last_layer)
        factored = methods.build_model(methods.Method.parse("tau=0.1"), setting, 0, 0.2).eval()
        assert factored(images).shape == (2, classes)
    assert sum(p.numel() for p in factored.parameters()) == size < 0.45 * dense
    layers = {layer.name: layer for layer in condition_report(factored).layers}
    assert layers[setting.last_layer].r == min(layers[setting.last_layer].shape)
    assert len(layers) == (16 if experiment == "vgg16_cifar10" else 17)  # 3 shortcuts among the 17


def test_full_rank_factors_compute_what_the_dense_network_does():
    setting = experiments.EXPERIMENTS["wrn16_4_cifar10"]
    torch.manual_seed(0)
    model = setting.network().eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        factored = methods.prune(model, setting, 1.0)
        torch.testing.assert_close(factored(images), expected, rtol=1e-3, atol=1e-4)


def test_images_are_read_as_they_are(data_dir):
    splits = images.load_images("cifar100", data_dir)
    assert splits["train"].images.shape == (80, 3, 32, 32)
    assert splits["test"].images.dtype == torch.uint8
    expected = pictures((32, 32, 3), 30, 100, 4, ("img", "fine_label"))
    assert splits["test"].labels.tolist() == list(expected["fine_label"])
    np.testing.assert_array_equal(splits["test"].images[7].permute(1, 2, 0).numpy(), np.asarray(expected[7]["img"]))
    assert images.load_images("mnist", data_dir)["test"].images.shape == (30, 1, 28, 28)


def test_validation_images_are_held_out():
    split = images.Split(torch.arange(100).reshape(100, 1, 1, 1), torch.arange(100))
    train, validation = images.hold_out(split, 10, 40)
    assert (len(train.labels), len(validation.labels)) == (30, 10)
    assert not set(train.labels.tolist()) & set(validation.labels.tolist())
    assert torch.equal(train.images.flatten(), train.labels)
    assert torch.equal(images.hold_out(split, 10)[1].labels, validation.labels)


def test_augmentation():
    pixels = torch.arange(1, 65, dtype=torch.uint8).reshape(1, 1, 8, 8).expand(200, 1, 8, 8)
    split = images.Augmented(pixels, torch.arange(200), torch.Generator().manual_seed(0))
    batch, labels = split.batch(torch.arange(200))
    assert labels.tolist() == list(range(200))
    plain = torch.nn.functional.pad(pixels[0].float() / 255, [4] * 4)[0]
    shifts = {
        (mirror, i, j): (plain.flip(-1) if mirror else plain)[i : i + 8, j : j + 8]
        for mirror in (False, True)
        for i in range(9)
        for j in range(9)
    }
    found = [next(key for key, value in shifts.items() if torch.equal(value, x[0])) for x in batch]
    assert 70 < sum(mirror for mirror, _, _ in found) < 130
    assert {i for _, i, _ in found} == {j for _, _, j in found} == set(range(9))


def test_published_attacks():
    found = {name: e.attacks for name, e in experiments.EXPERIMENTS.items()}
    mnist = [a for a in found["lenet5_mnist"] if isinstance(a, FGSM)]
    assert [a.epsilon for a in mnist] == [0.01, 0.02, 0.03, 0.04, 0.05, 0.06]
    assert all(a.clip for a in mnist)
    for name in ("vgg16_cifar10", "wrn16_4_cifar10", "wrn16_4_cifar100"):
        fgsm = [a for a in found[name] if isinstance(a, FGSM)]
        assert [(a.epsilon, a.clip) for a in fgsm] == [(0.002, False), (0.004, False), (0.006, False)]
        pgd = [a for a in found[name] if isinstance(a, PGD)]
        assert [(a.epsilon, a.norm) for a in pgd] == 2 * [(0.1, "l2"), (0.2, "l2"), (0.3, "l2")]


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--experiment resnet", "experiment must be one of lenet5_mnist, .*; received 'resnet'"),
        ("--methods densest", "a method must be one of dense, .* or penalty=BETA; received 'densest'"),
        ("--methods tau", "a method must be one of .*received 'tau'"),
        ("--methods tau=-1", "tau must be .*received -1"),
        ("--methods tau=0.1:median", "center must be one of nearest, rms, mean; received 'median'"),
        ("--methods penalty=-1", "a method must be one of .*received 'penalty=-1'"),
        ("--rank_ratios 0", r"rank_ratios must lie in \(0, 1\]; received \[0.0\]"),
        ("--learning_rates 0", r"learning_rates must be > 0; received \[0.0\]"),
        ("--epochs 0", "epochs must be ≥ 1; received 0"),
        ("--subset 0", "subset must be ≥ 1; received 0"),
        ("--validation_fraction 1", r"validation_fraction must lie in \(0, 1\); received 1"),
    ],
)
def test_a_wrong_option_is_said_in_one_line(monkeypatch, capsys, words, message):
    argv = [*(() if "--experiment" in words else ("--experiment", "lenet5_mnist")), *words.split()]
    monkeypatch.setattr("sys.argv", ["table", *argv])
    with pytest.raises(SystemExit):
        record.parse(table.Options, study.TrainingOptions)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert re.search(message, line)


def test_options_of_an_experiment():
    options = table.Options("vgg16_cifar10", methods=["dense", "tau=0.1"])
    assert options.learning_rates == [0.0125, 0.025, 0.05, 0.1]
    entries = [(entry.method, entry.rank_ratio) for entry in options.entries()]
    assert entries == [("dense", None), ("tau=0.1", 0.5), ("tau=0.1", 0.2)]


def test_missing_images_are_said_in_one_line(monkeypatch, tmp_path):
    load = images.load_images
    monkeypatch.delenv("CONDLR_DATA", raising=False)
    with pytest.raises(SystemExit, match=r"^No folder mnist in nowhere: set CONDLR_DATA, or --data_dir, "):
        load("mnist")
    with pytest.raises(SystemExit, match=r"^No folder cifar10 in .*: set CONDLR_DATA, or --data_dir, "):
        load("cifar10", str(tmp_path))
    (tmp_path / "cifar10").mkdir()
    with pytest.raises(SystemExit, match=r"^The data set .*cifar10 cannot be read: .+$"):
        load("cifar10", str(tmp_path))
    rows = Dataset.from_dict({"picture": [1, 2], "label": [0, 1]})
    rows.to_parquet(tmp_path / "cifar10" / "train.parquet")
    with pytest.raises(SystemExit, match="has no split test, but train"):
        load("cifar10", str(tmp_path))
    rows.to_parquet(tmp_path / "cifar10" / "test.parquet")
    with pytest.raises(SystemExit, match="must have the columns image and label; it has picture, label"):
        load("cifar10", str(tmp_path))


def test_several_processes_are_refused(call, monkeypatch):
    class Two:
        num_processes = 2

    monkeypatch.setattr(table, "Accelerator", Two)
    with pytest.raises(SystemExit, match="made by one process, not 2"):
        call(methods=["dense"])
