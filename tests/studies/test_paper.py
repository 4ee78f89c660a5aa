"""The published experiment on a tiny stand-in for MNIST: every method makes its row, a kill changes no number."""

import importlib.metadata
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from hf_condlr.robustness.attacks import FGSM, PGD
from studies import data as images
from studies import record, rows
from studies.paper import methods, study, table, training
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
    """Runs the study in this process, with few and short attacks."""
    monkeypatch.setattr(table, "ATTACKS", ATTACKS)

    def call(output_dir=tmp_path, epochs=1, subset=64, adversarial=0.0, ranks=(), **options):
        options = {"rank_ratios": [0.2], "learning_rates": [0.1], "seeds": [0], "check_samples": 0, **options}
        arguments = table.Options(data_dir=data_dir, output_dir=str(output_dir), attacked_images=8, **options)
        shared = {"epochs": epochs, "subset": subset, "adversarial": adversarial, "ranks": [*ranks]}
        return table.main(arguments, study.TrainingOptions(batch_size=16, **shared))

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

    written = json.loads((tmp_path / "results.json").read_text())
    assert written["rows"] == results["rows"]
    assert written["versions"]["torch"] == importlib.metadata.version("torch")
    text = (tmp_path / "table.md").read_text()
    assert (tmp_path / "fgsm.png").stat().st_size > 10_000
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


def test_layers_may_have_a_rank_ratio_of_their_own(call):
    results = call(methods=["tau=0.1", "svd_prune"], ranks=["conv2=1.0", "fc1=0.1"])
    for row in results["rows"]:
        weights = load_file(Path(row["folder"]) / study.WEIGHTS)
        ranks = {name: len(value) for name, value in weights.items() if name.endswith(".S")}
        assert ranks == {"conv1.S": 4, "conv2.S": 50, "fc1.S": 50, "fc2.S": 10}
        assert study.load_trained(row)  # what is saved fits the model that is built again
    with pytest.raises(ValueError, match=r"such as conv2=0\.5; received conv2"):
        study.TrainingOptions(ranks=["conv2"])


def test_validation_chooses_and_the_other_seeds_train_at_the_choice(call, tmp_path):
    results = call(methods=["dense"], learning_rates=[1e-3, 0.3, 0.01], seeds=[0, 1], epochs=2)
    best = max(results["sweep"], key=lambda row: row["validation_accuracy"])["learning_rate"]
    assert [row["learning_rate"] for row in results["sweep"]] == [1e-3, 0.01, 0.3]
    assert results["chosen"] == [{"label": "dense", "learning_rate": best}]
    assert [(row["seed"], row["learning_rate"]) for row in results["rows"]] == [(0, best), (1, best)]
    assert len(list(tmp_path.glob("rows/*/row.json"))) == 4
    assert len(list(tmp_path.rglob("report.json"))) == 2  # what was not chosen never meets the test split
    doubtful = best in (1e-3, 0.3)
    assert ("edge of the sweep" in (tmp_path / "table.md").read_text()) == doubtful


def test_a_method_that_diverges_is_reported_and_not_attacked(call, tmp_path):
    results = call(methods=["dense", "svd_prune"], learning_rates=[1e6], epochs=2)
    assert [choice["learning_rate"] for choice in results["chosen"]] == [None, None]
    assert results["rows"] == []
    text = (tmp_path / "table.md").read_text()
    assert text.count("| diverged |") == 2
    assert "dense: diverged at every learning rate" in text


def test_checks_run_for_the_first_seed_only(call, tmp_path):
    call(methods=["tau=0.1"], seeds=[0, 1], check_samples=4)
    checks = {
        r["seed"]: len(json.loads(Path(r["report"]).read_text())["checks"])
        for r in [row for row in json.loads((tmp_path / "results.json").read_text())["rows"]]
    }
    assert checks[0] > 5
    assert checks[1] == 0


def test_adversarial_training_sees_attacked_images_and_is_chosen_by_clean_and_robust_accuracy(call, monkeypatch):
    seen, measured = [], []
    epoch, accuracy = training.one_epoch, training.accuracy

    def watched_epoch(model, optimizer, split, *args):
        pixels = split.batch(torch.arange(len(split.labels)))[0]
        hook = model.register_forward_pre_hook(
            lambda module, inputs: (
                seen.append(torch.cdist(inputs[0].flatten(1), pixels.flatten(1), p=math.inf))
                if module.training
                else None
            )
        )
        loss = epoch(model, optimizer, split, *args)
        hook.remove()
        return loss

    def watched_accuracy(model, split, attack=None):
        measured.append((attack, accuracy(model, split, attack)))
        return measured[-1][1]

    monkeypatch.setattr(training, "one_epoch", watched_epoch)
    monkeypatch.setattr(training, "accuracy", watched_accuracy)
    [row] = call(methods=["tau=0.1"], adversarial=0.1, autoattack=[0.1])["rows"]
    nearest = torch.cat([distances.min(1).values for distances in seen])
    assert len(nearest) == 48
    assert nearest.max() <= 0.1 + 1e-6
    assert nearest.median() == pytest.approx(0.1, abs=1e-3)  # an image that was not attacked has distance 0
    (none, clean), (attack, robust) = measured
    assert (none, attack.name, attack.epsilon, attack.steps) == (None, "pgd-linf", 0.1, 3)
    assert row["validation_accuracy"] == pytest.approx((clean + robust) / 2)
    assert row["robust_accuracy"]["worst linf 0.1"] <= row["robust_accuracy"]["autoattack-linf 0.1"]


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

    def record(model, optimizer, data, order, batch_size, schedule, attack):
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
    def start(name):
        return methods.build_model(methods.Method.parse(name), 3, 0.2).state_dict()

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
        model = methods.build_model(method, 0, 0.2)
        optimizer, handle = methods.make_optimizer(method, model, 0.1)
        assert (type(optimizer).__name__, handle is not None) == (kind, has_handle)
        assert all(group["momentum"] == 0.3 for group in optimizer.param_groups)
        assert len(optimizer._optimizer_step_pre_hooks) == {"penalty": 2}.get(method.kind, int(has_handle))


# -------------------------------------------------------------------------------------------------------------- images


def test_images_are_read_as_they_are(data_dir):
    splits = images.load_images(data_dir)
    assert splits["train"].images.shape == (80, 1, 28, 28)
    assert splits["test"].images.dtype == torch.uint8
    expected = pictures((28, 28), 30, 10, 4)
    assert splits["test"].labels.tolist() == list(expected["label"])
    np.testing.assert_array_equal(splits["test"].images[7, 0].numpy(), np.asarray(expected[7]["image"]))


def test_validation_images_are_held_out():
    split = images.Split(torch.arange(100).reshape(100, 1, 1, 1), torch.arange(100))
    train, validation = images.hold_out(split, 10, 40)
    assert (len(train.labels), len(validation.labels)) == (30, 10)
    assert not set(train.labels.tolist()) & set(validation.labels.tolist())
    assert torch.equal(train.images.flatten(), train.labels)
    assert torch.equal(images.hold_out(split, 10)[1].labels, validation.labels)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--methods densest", "a method must be one of dense, .* or penalty=BETA; received 'densest'"),
        ("--methods tau", "a method must be one of .*received 'tau'"),
        ("--methods tau=-1", "tau must be .*received -1"),
        ("--methods tau=0.1:median", "center must be one of nearest, rms, mean; received 'median'"),
        ("--methods penalty=-1", "a method must be one of .*received 'penalty=-1'"),
    ],
)
def test_a_wrong_option_is_said_in_one_line(monkeypatch, capsys, words, message):
    monkeypatch.setattr("sys.argv", ["table", *words.split()])
    with pytest.raises(SystemExit):
        record.parse(table.Options, study.TrainingOptions)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert re.search(message, line)


def test_missing_images_are_said_in_one_line(monkeypatch, tmp_path):
    monkeypatch.delenv("CONDLR_DATA", raising=False)
    with pytest.raises(SystemExit, match=r"^No folder mnist in nowhere: set CONDLR_DATA, or --data_dir, "):
        images.load_images()
    folder = tmp_path / "mnist"
    folder.mkdir()
    wrong = "mnist must hold the splits train and test of MNIST, with the columns image and label"
    rows = Dataset.from_dict({"picture": [1, 2], "label": [0, 1]})
    for name in (None, "train", "test"):
        if name:
            rows.to_parquet(folder / f"{name}.parquet")
        with pytest.raises(SystemExit, match=wrong):
            images.load_images(str(tmp_path))
