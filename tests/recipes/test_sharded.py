"""What a recipe does on every process, since a sharded model is gathered by all of them, and on the first alone."""

from types import SimpleNamespace

import pytest

from tests.recipes.recipe_runs import load


@pytest.fixture
def running():
    return load("running")


class Saved:
    """A model and its tokenizer that note how they were saved."""

    def __init__(self):
        self.calls = []

    def save_pretrained(self, folder, **options):
        self.calls.append(options)


def trainer(model, first, sharded):
    accelerator = SimpleNamespace(unwrap_model=lambda model: model, get_state_dict=lambda model: {"whole": 1})
    return SimpleNamespace(
        accelerator=accelerator,
        model=model,
        is_fsdp_enabled=sharded,
        is_world_process_zero=lambda: first,
        processing_class=Saved(),
        args=SimpleNamespace(adversarial_attack="none"),
    )


@pytest.mark.parametrize("first", [True, False])
def test_every_process_measures_and_gathers_and_the_first_writes(running, monkeypatch, tmp_path, first):
    measured = []
    report = SimpleNamespace(to_dict=lambda: {"layers": []})
    monkeypatch.setattr(running, "condition_report", lambda model: measured.append(model) or report)
    factored, dense = Saved(), Saved()
    monkeypatch.setattr(running, "is_factored", lambda model: model is factored)
    for model in (factored, dense):
        running.save(one := trainer(model, first, sharded=True), tmp_path)
        assert len(one.processing_class.calls) == first
    assert measured == [factored]
    assert factored.calls == [{"is_main_process": first}]
    assert dense.calls == [{"is_main_process": first, "state_dict": {"whole": 1}}]
    assert (tmp_path / "condition_report.json").is_file() == first


def test_attacks_on_a_sharded_model_are_refused_before_training(running):
    check, none, some = (
        running.require_whole_for_attacks,
        SimpleNamespace(epsilons=[]),
        SimpleNamespace(epsilons=["0.1"]),
    )
    check(trainer(None, True, sharded=True), none)
    check(trainer(None, True, sharded=False), some)
    with pytest.raises(
        ValueError, match=r"attacks need the whole model on every process.*received {'epsilons': \['0.1"
    ):
        check(trainer(None, True, sharded=True), some)
    taught = trainer(None, True, sharded=True)
    taught.args.adversarial_attack = "pgd"
    with pytest.raises(ValueError, match=r"received {'adversarial_attack': 'pgd'}. Leave them out"):
        check(taught, none)
