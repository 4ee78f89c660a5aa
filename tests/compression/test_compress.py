"""`compress` on a tiny model of each task: what is saved, measured, said, and resumed after a kill."""

import json
import math

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_condlr import CompressionReport, compress, condition_report, is_factored
from hf_condlr.compression import recovery, run
from hf_condlr.compression.data import load_data
from hf_condlr.compression.measure import quality
from hf_condlr.compression.tasks import task_of
from hf_condlr.errors import ConfigError
from hf_condlr.layers import FoldedLayer, PivotedLayer
from hf_condlr.robustness.attacks import PGD
from tests import text_models
from tests.compression.cases import case

QUICK = {"calibration_samples": 16, "max_eval_samples": 16, "batch_size": 8}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def logits(model, x):
    with torch.no_grad():
        return model(x).logits


def test_an_image_classifier_is_measured_compressed_and_saved(out):
    model, data, processor = case("image")
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    attacks = [PGD(k / 255, steps=2) for k in (1, 2)]
    small, report = compress(
        model, data, ratio=0.4, output_dir=out, processor=processor, attacks=attacks, tau=1.0, attack_samples=8, **QUICK
    )
    assert report.data["attacked"] == 8
    assert is_factored(small) and not is_factored(model)
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())
    layers = condition_report(small)
    assert layers.max_condition_number <= 2 * (1 + 1e-4)
    assert report.factored.largest_kappa == pytest.approx(layers.max_condition_number)
    assert report.dense.largest_kappa > report.factored.largest_kappa
    # The ratio holds for the converted layers.
    removed = 1 - sum(r * (m + n) + r * r for r, (m, n) in ((x.r, x.shape) for x in layers.layers)) / sum(
        m * n for m, n in (x.shape for x in layers.layers)
    )
    assert 0.4 <= removed <= 0.45
    assert report.dense.parameters == model.num_parameters()
    assert report.factored.parameters == small.num_parameters() == report.factored.bytes // 4
    saved = report.dense.multiply_adds - report.factored.multiply_adds
    tokens = 5  # four patches and the class token
    assert saved == tokens * (report.dense.parameters - report.factored.parameters)
    squares = sum(x.r**2 for x in layers.layers)
    assert report.folded.parameters == report.factored.parameters - squares == report.pivoted.parameters + squares
    assert list(report.dense.robust) == ["pgd-linf, ε = 1/255", "pgd-linf, ε = 2/255"]
    task = task_of(model, processor, run.CompressionArguments(output_dir="", ratio=0.4, **QUICK))
    rows = task.inputs(task.columns(load_data(data, None)[0])["test"], 16)
    assert report.factored.quality == quality(small, task, rows, "")
    # What is on the disk is what was returned.
    loaded = AutoModelForImageClassification.from_pretrained(out)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(logits(loaded, x), logits(small.eval(), x))
    assert CompressionReport.load(out).to_dict() == report.to_dict()
    card = (out / "README.md").read_text()
    for text in (report.table(), (out / "report.md").read_text().strip()):
        assert text in card
    assert "| pgd-linf |" in card and (out / "preprocessor_config.json").is_file()
    assert not (out / "stages" / "factored").exists()
    assert str(report).splitlines()[0].split() == ["dense", "U,", "S,", "V", "folded", "pivoted"]


@pytest.mark.parametrize("task", ["text", "token", "language"])
def test_other_tasks(task, out):
    model, data, processor = case(task)
    small, report = compress(model, data, ratio=0.3, output_dir=out, processor=processor, **QUICK)
    assert is_factored(small) and report.metric == ("perplexity" if task == "language" else "accuracy")
    assert bool(report.dense.robust) == (task == "text")
    assert report.tau == small.condlr.config.tau == (math.inf if task == "language" else 4.0)
    assert report.factored.largest_kappa <= 5 * (1 + 1e-4) or task == "language"
    if task == "language":
        assert 1 < report.dense.quality < math.inf
        assert all(x.r % 8 == 0 or x.r < 8 for x in condition_report(small).layers)


@pytest.mark.parametrize(
    ("task", "options", "expected"),
    [
        ("image", {}, True),
        ("text", {}, True),
        ("token", {}, True),
        ("language", {}, True),
        ("image", {"sequential_calibration": False}, False),
        ("language", {"sequential_calibration": False}, False),
        ("image", {"init_weights": "svd"}, False),
    ],
)
def test_the_start_is_sequential_unless_one_says_so(task, options, expected, out):
    model, data, processor = case(task)
    small, _ = compress(model, data, ratio=0.3, output_dir=out, processor=processor, attacks=(), **options, **QUICK)
    assert small.condlr.config.sequential_calibration == expected


def test_a_model_whose_layers_run_several_times_has_no_sequential_start(out):
    _, data, processor = case("text")
    model = text_models.classifier("Albert", vocab_size=261, embedding_size=8)
    small, _ = compress(model, data, ratio=0.3, output_dir=out, processor=processor, attacks=(), **QUICK)
    assert not small.condlr.config.sequential_calibration


@pytest.mark.parametrize(("given", "size"), [(None, 1), (3, 3)])
def test_a_language_model_is_calibrated_one_block_at_a_time(given, size):
    model, data, processor = case("language")
    args = run.CompressionArguments(output_dir="", ratio=0.4, max_length=8, batch_size=given, calibration_samples=6)
    task = task_of(model, processor, args)
    batches = task.calibration_data(task.columns(load_data(data, None)[0])["train"])
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(size, 8)] * (6 // size)


def test_perplexity_is_the_exponential_of_the_mean_loss_of_all_predicted_tokens(out):
    model, data, processor = case("language")
    args = run.CompressionArguments(output_dir="", ratio=0.4, max_length=8, batch_size=3)
    task = task_of(model, processor, args)
    rows = task.inputs(task.columns(load_data(data, None)[0])["test"], 7)
    losses = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        log_p = model(ids).logits[0, :-1].double().log_softmax(-1)
        losses += [-log_p[i, token].item() for i, token in enumerate(row["input_ids"][1:])]
    assert quality(model, task, rows, "") == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_tokens_after_the_first_of_a_word_do_not_count(out):
    model, data, processor = case("token")
    task = task_of(model, processor, run.CompressionArguments(output_dir="", ratio=0.4))
    rows = task.columns(load_data(data, None)[0])["test"]
    row = task.inputs(rows)[0]
    known = [label for label in row["labels"] if label != -100]
    assert known == rows[0]["labels"] and len(row["labels"]) == len(row["input_ids"]) > len(known) + 2


def test_max_drop_finds_the_largest_ratio_and_shows_the_curve(out):
    model, data, processor = case("image")
    small, report = compress(
        model, data, max_drop=8.0, output_dir=out, processor=processor, attacks=(), calibration_samples=16
    )
    fits = [point for point in report.curve if point.drop <= 8.0]
    assert len(report.curve) == 7 and report.ratio == max(point.ratio for point in fits)
    assert sorted(point.ratio for point in report.curve) == [point.ratio for point in report.curve]
    assert report.data["selection"] == "validation" and report.data["evaluation"] == "test"
    for point in report.curve:
        assert point.drop == pytest.approx(100 * (report.data["selection_quality"] - point.quality))
    assert (out / "quality.png").stat().st_size > 1000 and "quality.png" in (out / "report.md").read_text()
    assert str(report.max_drop).rstrip("0").rstrip(".") in (out / "README.md").read_text()
    assert small.num_parameters() == next(p.parameters for p in report.curve if p.ratio == report.ratio)


def test_a_max_drop_that_no_ratio_meets_is_found_by_two_evaluations(out, monkeypatch):
    model, data, processor = case("image")
    seen = []

    def quality_of(candidate, task, rows, name):
        report = condition_report(candidate) if is_factored(candidate) else None
        seen.append(None if report is None else len(report.layers))
        return 0.9 if report is None or len(report.layers) < 12 else 0.5

    monkeypatch.setattr(run, "quality", quality_of)
    call = {"max_drop": 1.0, "output_dir": out, "processor": processor, "attacks": (), "calibration_samples": 16}
    with pytest.raises(
        ConfigError, match=r"a fall of 40.00 at 0.01, .*, and of 0.00 where tau=inf .*\. Leave layers de"
    ):
        compress(model, data, **call)
    assert seen[:2] == [None, None] and seen[2] == 12 and 0 < seen[3] < 12 and len(seen) == 4


@pytest.mark.parametrize(("form", "kind"), [("folded", FoldedLayer), ("pivoted", PivotedLayer)])
def test_a_folded_model_is_saved_if_asked_for(form, kind, out):
    model, data, processor = case("image")
    small, report = compress(
        model, data, ratio=0.4, form=form, output_dir=out, processor=processor, attacks=(), **QUICK
    )
    loaded = AutoModelForImageClassification.from_pretrained(out)
    layers = [module for module in loaded.modules() if isinstance(module, kind)]
    assert len(layers) == len(report.ranks)
    assert loaded.num_parameters() == small.num_parameters() == getattr(report, form).parameters
    assert report.form == form and report.table() in (out / "README.md").read_text()
    shapes = [layer.weight_shape for layer in layers]
    sizes = [layer.down.weight.numel() + layer.up.weight.numel() for layer in layers]
    assert 0.4 <= 1 - sum(sizes) / sum(m * n for m, n in shapes) <= 0.45  # the ratio counts what is saved


class Killed(BaseException):
    """As a signal: not an Exception."""


@pytest.mark.parametrize("stage", ["_measure_dense", "_factor", "_recover", "_measure_compressed", "_save"])
def test_a_killed_run_resumes(stage, out, monkeypatch):
    model, data, processor = case("image")
    call = {"ratio": 0.4, "processor": processor, "recovery_steps": 4, "attacks": (), **QUICK}
    done = []
    for name in ("_measure_dense", "_factor", "_recover", "_measure_compressed"):
        step = getattr(run.Run, name)

        def counted(self, *args, name=name, step=step):
            done.append(name)
            return step(self, *args)

        monkeypatch.setattr(run.Run, name, counted)
    with monkeypatch.context() as patch:

        def kill(*args):
            raise Killed

        patch.setattr(run.Run, stage, kill)
        with pytest.raises(Killed):
            compress(model, data, output_dir=out, **call)
    small, report = compress(model, data, output_dir=out, **call)
    assert sorted(done) == sorted({*done})  # nothing twice
    again, same = compress(model, data, output_dir=out, **call)  # complete: only read
    assert sorted(done) == sorted({*done}) and same.to_dict() == report.to_dict()
    fresh, _ = compress(model, data, output_dir=out.with_name("fresh"), **call)
    for one, other, third in zip(small.parameters(), fresh.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other) and torch.equal(one, third)


def test_a_recovery_that_was_killed_resumes_from_its_checkpoint(out, monkeypatch):
    model, data, processor = case("image")
    call = {"ratio": 0.4, "processor": processor, "recovery_steps": 6, "attacks": (), **QUICK}
    step, seen = recovery.CondLRTrainer.training_step, []

    def killed(self, *args, **kwargs):
        seen.append(self.state.global_step)
        if len(seen) == 5:
            raise Killed
        return step(self, *args, **kwargs)

    monkeypatch.setattr(recovery.CondLRTrainer, "training_step", killed)
    with pytest.raises(Killed):
        compress(model, data, output_dir=out, **call)
    small, _ = compress(model, data, output_dir=out, **call)
    assert seen == [0, 1, 2, 3, 4, 4, 5]
    monkeypatch.undo()
    fresh, report = compress(model, data, output_dir=out.with_name("fresh"), **call)
    for one, other in zip(small.parameters(), fresh.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert report.factored.largest_kappa <= 5 * (1 + 1e-4)


def test_the_report_says_what_a_recovery_gave_and_a_loss_is_warned_of(out, caplog, monkeypatch):
    model, data, processor = case("image")
    options = {"ratio": 0.4, "processor": processor, "attacks": (), **QUICK}
    before = compress(model, data, output_dir=out.with_name("plain"), **options)[1].factored.quality
    _, report = compress(model, data, output_dir=out, recovery_steps=2, **options)
    assert report.quality_before_recovery == before
    assert f"Before the recovery of 2 steps: accuracy {100 * before:.2f} %." in str(report)
    assert ("made the model worse" in caplog.text) == (report.factored.quality < before)
    caplog.clear()

    def spoil(self, model):
        with torch.no_grad():
            model.classifier.weight.neg_()
            model.classifier.bias.neg_()
        model.save_pretrained(self.stages.folder / run.RECOVERED)
        return {"quality_before": 1.0}

    monkeypatch.setattr(run.Run, "_recover", spoil)
    compress(model, data, output_dir=out.with_name("spoiled"), recovery_steps=2, **options)
    assert "the recovery made the model worse: accuracy 1 before it, 0." in caplog.text


@pytest.mark.parametrize(("task", "radius", "rate"), [("image", 2 / 255, 3e-5), ("text", 0.05, 1e-4)])
def test_a_robust_recovery_has_the_defaults_of_its_task(task, radius, rate, out, monkeypatch):
    model, data, processor = case(task)
    seen = []
    monkeypatch.setattr(run, "recover", lambda model, teacher, task, train, args, folder: seen.append(args))
    _, report = compress(model, data, ratio=0.4, output_dir=out, processor=processor, robust=True, **QUICK)
    [args] = seen
    assert (args.recovery_steps, args.adversarial_epsilon, args.learning_rate) == (200, radius, rate)
    assert len(report.dense.robust) == len(report.factored.robust) == 2  # the default's radius, and the one above
    given = {"recovery_steps": 5, "adversarial_epsilon": "0.01", "learning_rate": 1e-3}
    other = out.with_name("given")
    compress(model, data, ratio=0.4, output_dir=other, processor=processor, robust=True, attacks=(), **given, **QUICK)
    assert (seen[1].recovery_steps, seen[1].adversarial_epsilon, seen[1].learning_rate) == (5, 0.01, 1e-3)


def test_recovery_on_adversarial_samples_keeps_the_bound(out):
    model, data, processor = case("image")
    options = {"recovery_steps": 3, "adversarial_epsilon": "2/255", "learning_rate": 1e-2, "tau": 0.5}
    small, _ = compress(model, data, ratio=0.4, output_dir=out, processor=processor, attacks=(), **options, **QUICK)
    assert condition_report(small).max_condition_number <= 1.5 * (1 + 1e-4)
    settings = json.loads((out / "stages" / "settings.json").read_text())
    assert settings["adversarial_epsilon"] == pytest.approx(2 / 255)
