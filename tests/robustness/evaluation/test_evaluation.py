"""`evaluate_robustness`: the numbers, many processes, interruption, kinds of data, and what is refused."""

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset
from torch import nn

from hf_condlr import evaluate_robustness
from hf_condlr.errors import AttackError, EvaluationError
from hf_condlr.robustness.attacks import FGSM, PGD, CharacterAttack, Corruption, EmbeddingPGD, TextModel, Transfer
from hf_condlr.robustness.attacks.base import Attack
from hf_condlr.robustness.evaluation import RobustnessReport
from tests import classifiers, text_models
from tests.paths import ROOT

ATTACKS = [FGSM(0.1), PGD(0.1, steps=5), PGD(0.1, steps=5, loss="margin"), PGD(0.5, "l2", steps=5)]


def evaluate(model=None, dataset=None, attacks=ATTACKS, **options):
    options = {"batch_size": 48, "checks": False, "progress": False} | options
    model = classifiers.pixel_mlp() if model is None else model
    return evaluate_robustness(model, dataset or classifiers.Pairs(), attacks, **options)


def comparable(report):
    """Everything but times and the number of processes."""
    values = report.to_dict()
    for attack in values["attacks"]:
        del attack["seconds"]
    del values["settings"]["processes"]
    return values


# --------------------------------------------------------------------------------------------------- the numbers


def test_the_numbers_are_those_of_the_attacks_batch_by_batch():
    model, (pixels, labels) = classifiers.pixel_mlp().eval(), classifiers.held_out()
    report = evaluate(model)
    assert report.samples == 200 and report.labels == labels.tolist()
    correct = model(pixels).argmax(1) == labels
    assert report.correct == correct.tolist() and 0.9 < report.clean_accuracy < 1
    for attack, result in zip(ATTACKS, report.attacks, strict=True):
        expected = torch.zeros(200, dtype=torch.bool)
        for number, index in enumerate(torch.arange(200).split(48)):
            index = index[correct[index]]
            adversarial = attack.reseeded(number)(model, pixels[index], labels[index])
            expected[index] = model(adversarial).argmax(1) == labels[index]
        assert result.survived == expected.tolist()
        assert result.robust_accuracy == expected.sum().item() / 200
        assert 0.05 < result.robust_accuracy < 0.9
        assert result.largest_distance == pytest.approx(attack.epsilon, rel=0.01)
        assert result.settings["epsilon"] == attack.epsilon and result.settings["attack"] == attack.name
    linf = [a.survived for a in report.attacks[:3]]
    [case, _] = report.worst_cases
    assert case.survived == [all(flags) for flags in zip(*linf, strict=True)]
    assert report.robust_accuracy == np.mean(
        [all(flags) for flags in zip(*(a.survived for a in report.attacks), strict=True)]
    )


def test_a_wrong_sample_counts_as_wrong_under_every_adversary_but_a_corruption_may_mend_it():
    model, (pixels, labels) = classifiers.pixel_mlp(), classifiers.held_out()

    class Always(nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(torch.full((len(x),), 3), 10).float() + 0 * x.sum()

    report = evaluate(Always(), attacks=[PGD(0.0), Corruption("contrast", 1)])
    assert report.clean_accuracy == report.attacks[0].robust_accuracy == (labels == 3).sum().item() / 200
    corruption = Corruption("gaussian_noise", 5)
    report = evaluate(model, attacks=[corruption], batch_size=200)
    corrupted = corruption.reseeded(0)(model, pixels, labels)
    expected = model.eval()(corrupted).argmax(1) == labels
    assert report.attacks[0].survived == expected.tolist()
    assert report.robust_accuracy <= report.attacks[0].robust_accuracy


def test_rounding_to_eight_bits_is_measured():
    """The test digits are exact in 8 bits: a step of less than half a level is rounded away."""
    report = evaluate(classifiers.pixel_mlp(), attacks=[FGSM(0.4 / 255), FGSM(51 / 255)])
    small, large = report.attacks
    assert small.rounded_accuracy == report.clean_accuracy > small.robust_accuracy - 1e-9
    assert large.rounded_accuracy == pytest.approx(large.robust_accuracy, abs=0.01)


def test_the_model_and_the_random_states_are_as_before():
    model = classifiers.mlp()
    model.layers[1].eval()
    model.layers[4].weight.grad = torch.ones(10, 64)
    model.layers[4].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: module.training for name, module in model.named_modules()}
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    report = evaluate_robustness(
        model, classifiers.images(64), ATTACKS, processor=classifiers.processor(), progress=False, check_samples=32
    )
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]
    assert flags == {name: module.training for name, module in model.named_modules()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.layers[4].weight.grad, torch.ones(10, 64)) and model.layers[1].weight.grad is None
    assert not model.layers[4].bias.requires_grad and model.layers[1].weight.requires_grad
    assert report.settings["dtype"] == "float32" and report.settings["mean"] == pytest.approx([classifiers.MEAN])


# ------------------------------------------------------------------------------------------------ kinds of data


def test_images_pixel_values_and_pairs_give_the_same():
    processor, model = classifiers.processor(), classifiers.mlp()
    images = classifiers.images(60)

    def transform(batch):
        values = processor([image.convert("L") for image in batch["image"]], return_tensors="pt")["pixel_values"]
        return {"pixel_values": values, "labels": batch["label"]}

    results = [
        evaluate(model, dataset, processor=processor)
        for dataset in (images, images.with_transform(transform), classifiers.Pairs(60))
    ]
    kinds = [report.settings["data"] for report in results]
    assert kinds == ["images", "pixel_values", "tensors"]
    for report in results[1:]:
        assert report.correct == results[0].correct
        for a, b in zip(report.attacks, results[0].attacks, strict=True):
            assert np.mean(np.array(a.survived) != np.array(b.survived)) <= 0.02  # measured: 0
    assert results[0].model == "digits-mlp"


class Handing(nn.Module):
    """Hands everything on, as PEFT and torch.compile do."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_other_forms_of_the_same_data_and_model():
    images, processor = classifiers.images(40), classifiers.processor()
    expected = evaluate(classifiers.mlp(), images, processor=processor)
    rows = [(row["image"], row["label"]) for row in images]
    values = [{"pixel_values": (x - classifiers.MEAN) / classifiers.STD, "labels": y} for x, y in classifiers.Pairs(40)]
    for model, dataset in (
        (classifiers.mlp(), rows),  # pictures and labels, as torchvision's data sets give them
        (classifiers.mlp(), images.with_format("torch")),
        (Handing(classifiers.mlp()), values),
        (Handing(classifiers.mlp()), images),
    ):
        report = evaluate(model, dataset, processor=processor, checks=True, check_samples=16)
        assert [a.survived for a in report.attacks] == [a.survived for a in expected.attacks]
        [own] = [check for check in report.checks if check.name == "the attacked model is the model"]
        assert own.passed and "own preprocessing" in own.found
    single = evaluate(classifiers.mlp(), images, ATTACKS[1], processor=processor)
    assert single.attacks[0].survived == expected.attacks[1].survived
    model = classifiers.mlp()
    with torch.inference_mode():
        again = evaluate(model, images, processor=processor)
    assert [a.survived for a in again.attacks] == [a.survived for a in expected.attacks]


def test_samples_that_rounding_mends_are_attacked_once_more_without_stopping():
    """PGD that stops at the border leaves examples that rounding mends; the accuracy under rounding is that beyond."""
    attack = PGD(16 / 255, steps=100, step_size=0.2 / 255)  # small steps, which end close behind the border
    report = evaluate(attacks=[attack], batch_size=200)
    model, (pixels, labels) = classifiers.pixel_mlp().eval(), classifiers.held_out()
    index = torch.tensor(report.correct).nonzero()[:, 0]
    stopped = attack.reseeded(0)(model, pixels[index], labels[index])
    naive = (model((stopped * 255).round() / 255).argmax(1) == labels[index]).sum().item() / 200
    [result] = report.attacks
    assert result.robust_accuracy <= result.rounded_accuracy < naive - 0.02  # measured: 0.74, 0.74, 0.765
    assert result.rounded_accuracy - result.robust_accuracy <= 0.01


def test_rounding_is_measured_in_batches_without_a_correct_sample_too():
    report = evaluate(batch_size=1, max_samples=40, attacks=[FGSM(0.4 / 255)])
    assert report.clean_accuracy < 1 and report.attacks[0].rounded_accuracy == report.clean_accuracy


class Argmax(nn.Module):
    """Certain answers, no gradients."""

    def __init__(self):
        super().__init__()
        self.inner = classifiers.pixel_mlp()

    def forward(self, x):
        return torch.nn.functional.one_hot(self.inner(x).argmax(1), 10).float() * 9


def test_a_model_without_gradients_is_evaluated_and_found_out():
    report = evaluate(Argmax(), attacks=[PGD(32 / 255, steps=3)], checks=True, check_samples=64)
    failed = {check.name for check in report.failed_checks}
    assert "gradients are not zero (linf)" in failed and report.attacks[0].robust_accuracy > 0.8


def test_processors_of_several_kinds_and_those_that_normalise_otherwise():
    images, processor = classifiers.images(40), classifiers.processor()
    expected = evaluate(classifiers.mlp(), images, processor=processor)
    both = type("BothProcessor", (), {"image_processor": processor, "tokenizer": object()})()
    report = evaluate(classifiers.mlp(), images, processor=both)
    assert [a.survived for a in report.attacks] == [a.survived for a in expected.attacks]
    assert report.settings["columns"] == ["image", "label"] and report.settings["processor"] == type(processor).__name__
    with pytest.raises(AttackError, match="must say how pixels are normalised; received object"):
        evaluate(classifiers.mlp(), classifiers.Pairs(4), processor=object())
    processor.include_top = True
    with pytest.raises(AttackError, match=r"must normalise pixels once; received .*include_top=True"):
        evaluate(classifiers.mlp(), images, processor=processor)


def test_a_model_in_half_precision_is_found_out():
    report = evaluate(classifiers.pixel_mlp().bfloat16(), checks=True, check_samples=16)
    [check] = [check for check in report.failed_checks if check.name == "float32 in the attack"]
    assert "parameters in half precision" in check.found and "model.float()" in check.suspicion


def test_checks_draw_their_samples(monkeypatch):
    """Rows may come sorted by class."""
    pixels, labels = classifiers.held_out()
    order = labels.argsort(stable=True)
    data = torch.utils.data.TensorDataset(pixels[order], labels[order])
    batches, module = [], sys.modules["hf_condlr.robustness.evaluation.evaluate"]
    check_batch = module._check_batch
    monkeypatch.setattr(module, "_check_batch", lambda s, p: batches.append(p) or check_batch(s, p))
    report = evaluate(dataset=data, checks=True, check_samples=30)
    assert report.settings["check_samples"] == 30 and len(batches[0]) == 30
    assert len({int(labels[order][p]) for p in batches[0]}) > 5


def test_max_samples_draws_the_same_samples_for_every_model():
    first = evaluate(max_samples=50)
    second = evaluate(classifiers.pixel_mlp(scale=2.0), max_samples=50)
    other = evaluate(max_samples=50, seed=1)
    assert first.samples == second.samples == 50
    assert first.settings["samples_digest"] == second.settings["samples_digest"] != other.settings["samples_digest"]
    labels = classifiers.held_out()[1]
    assert len(set(first.labels)) == 10 and first.labels != labels[:50].tolist()
    assert evaluate(max_samples=10_000).samples == 200


# ---------------------------------------------------------------------------------- interruption, many processes


class Breaks(nn.Module):
    """A model that raises at a call."""

    def __init__(self, at):
        super().__init__()
        self.inner, self.calls, self.at = classifiers.pixel_mlp(), 0, at

    def forward(self, x):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.inner(x)


def test_interrupted_and_gone_on_is_uninterrupted(tmp_path):
    model = Breaks(at=None)
    whole, calls = evaluate(model, output_dir=tmp_path / "whole"), model.calls
    model = Breaks(at=calls // 3)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, output_dir=tmp_path / "broken")
    done = list((tmp_path / "broken").glob("outcomes-*/*.json"))
    assert 0 < len(done) < 5 and not (tmp_path / "broken" / "report.json").exists()
    model = Breaks(at=None)
    gone_on = evaluate(model, output_dir=tmp_path / "broken")
    assert comparable(gone_on) == comparable(whole)
    assert 0 < model.calls < calls  # finished batches are not attacked again
    again = Breaks(at=None)
    assert comparable(evaluate(again, output_dir=tmp_path / "broken")) == comparable(whole)
    assert again.calls == 2  # of the first and the last batch, which tell whether it is the same evaluation
    assert comparable(RobustnessReport.load(tmp_path / "broken" / "report.json")) == comparable(whole)


def test_another_model_attack_choice_or_data_set_is_not_taken_for_the_same(tmp_path):
    evaluate(output_dir=tmp_path)
    changed = classifiers.pixel_mlp()
    changed.model.layers[4].bias.data += 1e-3
    pixels, labels = classifiers.held_out()
    darker = torch.utils.data.TensorDataset(0.9 * pixels, labels)
    transfer = [Transfer(PGD(0.1, steps=2), changed)], [Transfer(PGD(0.1, steps=2), classifiers.pixel_mlp())]
    for options in (
        {"model": changed},
        {"model": classifiers.pixel_mlp(scale=300.0)},  # the same parameters
        {"attacks": ATTACKS[:2]},
        {"attacks": transfer[0]},
        {"attacks": transfer[1]},
        {"dataset": darker},
        {"max_samples": 50},
        {"batch_size": 50},
    ):
        before = set(tmp_path.glob("outcomes-*"))
        evaluate(**options, output_dir=tmp_path)
        assert len(set(tmp_path.glob("outcomes-*")) - before) == 1


def test_batches_whose_data_changed_are_attacked_again(tmp_path):
    """In the middle, where the key does not look."""
    pixels, labels = classifiers.held_out()
    changed = pixels.clone()
    changed[60:120] = changed[60:120].flip(-1)
    first, second = (torch.utils.data.TensorDataset(x, labels) for x in (pixels, changed))
    evaluate(dataset=first, output_dir=tmp_path)
    assert comparable(evaluate(dataset=second, output_dir=tmp_path)) == comparable(evaluate(dataset=second))
    assert len(list(tmp_path.glob("outcomes-*"))) == 1


SCRIPT = """
import sys

import torch
from accelerate import Accelerator
from hf_condlr import evaluate_robustness
from tests import classifiers
from tests import text_models
from tests.robustness.evaluation.test_evaluation import ATTACKS

torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
report = evaluate_robustness(
    classifiers.mlp(), classifiers.images(), ATTACKS, processor=classifiers.processor(), batch_size=48,
    accelerator=accelerator, output_dir=sys.argv[1], check_samples=48, progress=False,
)
assert report.samples == 200
assert len(report.checks) > 10, report.checks
accelerator.end_training()
"""


def test_two_processes_give_what_one_gives(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.run(
        [sys.executable, *command, tmp_path / "script.py", tmp_path / "two"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    two = RobustnessReport.load(tmp_path / "two" / "report.json")
    one = evaluate(
        classifiers.mlp(), classifiers.images(), processor=classifiers.processor(), check_samples=48, checks=True
    )
    assert two.settings["processes"] == 2 and comparable(two) == comparable(one)


# ------------------------------------------------------------------------------------------- adversarial examples


def test_saved_examples_are_those_that_were_evaluated(tmp_path):
    model, (pixels, labels) = classifiers.pixel_mlp().eval(), classifiers.held_out()
    report = evaluate(model, attacks=[PGD(0.1, steps=5), FGSM(0.05)], output_dir=tmp_path, save_examples=True)
    for result, name in zip(report.attacks, ("pgd-linf-0.1", "fgsm-0.05"), strict=True):
        folder = tmp_path / f"examples-{report.settings['key']}" / name
        rows = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))["train"].with_format("torch")
        assert len(rows) == sum(report.correct)
        index, adversarial = rows["index"][:], torch.stack(list(rows["pixels"][:]))
        assert adversarial.shape[1:] == (1, 8, 8) and adversarial.dtype == torch.float32
        assert torch.equal(rows["label"][:], labels[index])
        assert (adversarial - pixels[index]).abs().max() <= result.epsilon + 1e-6
        predictions = model(adversarial).argmax(1)
        assert torch.equal(predictions, rows["prediction"][:])
        assert (predictions == labels[index]).tolist() == [result.survived[i] for i in index.tolist()]


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attacks": [EmbeddingPGD(0.1)]}, "attacks must take what the data set holds, tensors; .*pgd-embedding"),
        ({"batch_size": 0}, "batch_size must be ≥ 1; received 0"),
        ({"check_samples": 0}, "check_samples must be ≥ 1"),
        ({"max_samples": 0}, "max_samples must be ≥ 1"),
        ({"save_examples": True}, "save_examples needs a folder"),
        ({"dataset": iter([])}, "a data set must have a length and rows by number; received list_iterator"),
        ({"dataset": []}, "the data set must hold at least one sample"),
        ({"dataset": [3]}, r"a row must be a dictionary or a pair \(pixels, label\); received int"),
        ({"dataset": [{"a": 1, "label": 0}]}, "rows must hold one image or one text, or the two"),
        ({"dataset": [{"text": "a"}]}, "must have a column of labels, labels, label, label_ids, or label_column"),
        ({"dataset": [(torch.zeros(1, 8, 8), 0.5)]}, "labels must be one class number a sample; received .*0.5"),
        ({"dataset": [(torch.zeros(1, 8, 8), -1)]}, "labels must be class numbers from 0; received -1"),
        ({"dataset": [(torch.zeros(1, 8, 8), "cat")]}, "labels must be one class number a sample; received .*cat"),
        ({"dataset": [(torch.zeros(1, 8, 8), None)]}, "labels must be one class number a sample; received .*None"),
        ({"dataset": [(torch.zeros(1, 8, 8), torch.eye(10)[3])]}, "labels must be one class number a sample"),
        ({"dataset": DatasetDict(test=classifiers.images(4))}, r"must be one split; received test. .*data\['test'\]"),
        ({"attacks": []}, "attacks must be at least one attack; received none"),
        ({"attacks": ["pgd-linf"]}, "attacks must be at least one attack; received 'pgd-linf'.*make_attacks"),
        ({"dataset": [(torch.zeros(1, 8, 8), 10)]}, "labels must be classes of the model, 0 to 9; received 10"),
        (
            {"dataset": classifiers.images(4), "image_column": "photo"},
            "a column that is named must exist; received photo",
        ),
    ],
)
def test_errors(options, message):
    arguments = {"model": classifiers.pixel_mlp(), "dataset": classifiers.Pairs(), "attacks": ATTACKS} | options
    with pytest.raises(EvaluationError, match=message):
        evaluate_robustness(**arguments)


def test_images_without_their_normalisation_are_refused():
    with pytest.raises(EvaluationError, match="their normalisation must be known; received images and no image proc"):
        evaluate(classifiers.mlp(), classifiers.images(4))
    with pytest.raises(EvaluationError, match="images must be made into pixels by the model's image processor"):
        evaluate(classifiers.pixel_mlp(), classifiers.images(4))


def test_a_model_of_one_output_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    with pytest.raises(EvaluationError, match=r"of at least two classes; received .*\(48, 1\)"):
        evaluate(model)


@dataclass(frozen=True)
class Nothing(Attack):
    """Returns the inputs."""

    epsilon: float
    name, threat = "nothing", "none"

    def __call__(self, model, inputs, labels):
        return inputs


def test_an_attack_of_ones_own():
    report = evaluate(attacks=[Nothing(1.0)])
    assert report.attacks[0].survived == report.correct and report.attacks[0].largest_distance is None
    json.dumps(report.to_dict(), allow_nan=False)


# -------------------------------------------------------------------------------------------------------- texts


def reviews(number=48):
    texts, labels = text_models.reviews(number, seed=1)
    return Dataset.from_dict({"text": texts, "label": labels.tolist()})


TEXT_ATTACKS = [EmbeddingPGD(0.3, steps=5), EmbeddingPGD(0.6, steps=5), CharacterAttack(0.3)]


def test_texts_pairs_and_tokens_are_evaluated():
    model, tokenizer = text_models.trained_reviewer()
    data = reviews()
    report = evaluate(model, data, TEXT_ATTACKS, processor=tokenizer)
    assert report.settings["data"] == "texts" and report.clean_accuracy > 0.9
    assert 0.05 < report.attacks[0].robust_accuracy < report.clean_accuracy
    assert report.attacks[2].robust_accuracy < report.clean_accuracy
    assert report.attacks[0].largest_distance <= 0.3 * (1 + 1e-5)
    tokens = data.map(lambda batch: tokenizer(batch["text"]), batched=True)  # the text column stays, unused
    both = type("BothProcessor", (), {"image_processor": object(), "tokenizer": tokenizer})()  # it pads them
    of_tokens = evaluate(model, tokens, TEXT_ATTACKS[:2], processor=both)
    assert of_tokens.settings["data"] == "input_ids"
    for ours, theirs in zip(of_tokens.attacks, report.attacks, strict=False):
        assert ours.survived == theirs.survived
    pairs = data.add_column("text_pair", ["the plot was"] * len(data))
    paired = evaluate(model, pairs, [EmbeddingPGD(0.3, steps=2)], processor=tokenizer)
    assert paired.samples == 48 and paired.settings["data"] == "texts"
    named = data.add_column("id", [f"review {i}" for i in range(len(data))])
    with pytest.raises(EvaluationError, match=r"or the two texts of a known pair.*of texts: text, id.*text_columns"):
        evaluate(model, named, TEXT_ATTACKS[:1], processor=tokenizer)
    alone = evaluate(model, pairs, TEXT_ATTACKS[:1], processor=tokenizer, text_columns=["text"])
    assert alone.attacks[0].survived == report.attacks[0].survived


def test_text_evaluations_are_checked_too():
    model, tokenizer = text_models.trained_reviewer()
    strong = [EmbeddingPGD(0.15, steps=40, restarts=2)]
    report = evaluate(model, reviews(), strong, processor=tokenizer, checks=True, check_samples=16)
    assert [str(check) for check in report.failed_checks] == []
    assert "no gradient masking (embedding, ε = 0.15)" in {check.name for check in report.checks}
    weak = evaluate(model, reviews(), [EmbeddingPGD(0.6, steps=1)], processor=tokenizer, checks=True, check_samples=16)
    assert "converged (embedding, ε = 0.6)" in {check.name for check in weak.failed_checks}


def test_examples_of_texts_are_saved(tmp_path):
    model, tokenizer = text_models.trained_reviewer()
    report = evaluate(model, reviews(), TEXT_ATTACKS, processor=tokenizer, output_dir=tmp_path, save_examples=True)
    cache = {"cache_dir": str(tmp_path / "cache"), "split": "train"}
    folder = tmp_path / f"examples-{report.settings['key']}"
    rows = load_dataset(str(folder / "characters-0.3"), **cache)
    inputs = tokenizer(rows["text"][:], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert model(**inputs).logits.argmax(1).tolist() == rows["prediction"][:]
    rows = load_dataset(str(folder / "pgd-embedding-0.3"), **cache).with_format("torch")
    batch = {name: torch.stack(list(rows[name][:])) for name in ("input_ids", "attention_mask", "perturbation")}
    with torch.no_grad():
        predictions = TextModel(model, tokenizer)(batch).argmax(1)
    assert torch.equal(predictions, rows["prediction"][:])
    survived = [report.attacks[0].survived[i] for i in rows["index"][:].tolist()]
    assert survived == (predictions == rows["label"][:]).tolist()


def test_texts_without_their_tokenizer_and_tokens_for_the_character_attack_are_refused():
    model, tokenizer = text_models.trained_reviewer()
    with pytest.raises(AttackError, match="texts need a tokenizer"):
        evaluate(model, reviews(4), TEXT_ATTACKS[:1])
    tokens = reviews(4).map(lambda batch: tokenizer(batch["text"]), batched=True)
    with pytest.raises(EvaluationError, match="must take what the data set holds, input ids; received characters"):
        evaluate(model, tokens, TEXT_ATTACKS, processor=tokenizer)
