"""CondLRCallback: the constraint in any Trainer, wherever the optimizer was created, and nothing lost on resume."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from hf_condlr import CondLRCallback, CondLRTrainer, FactoredTrainerMixin, condition_report
from hf_condlr.errors import ConfigError, OptimizerError
from hf_condlr.linalg import obeys_bound
from tests.training.tiny import (
    AfterEachStep,
    StopAt,
    arguments,
    assert_equal_weights,
    convert,
    dense_bert,
    dense_vit,
    text_data,
)


class FactoredPlainTrainer(FactoredTrainerMixin, Trainer):
    """Another Trainer with the checkpoints of factored models."""


def plain(folder, cls=Trainer, **options):
    kwargs = {name: options.pop(name) for name in ("model", "callbacks", "optimizers", "rows") if name in options}
    rows = kwargs.pop("rows", None) or text_data()
    callback = options.pop("callback", None) or CondLRCallback()
    return cls(
        model=kwargs.pop("model", None) or convert(dense_bert()),
        args=arguments(folder, TrainingArguments, **options),
        train_dataset=rows,
        eval_dataset=rows[:8],
        callbacks=[callback, *kwargs.pop("callbacks", [])],
        **kwargs,
    )


def callback_of(trainer):
    return next(x for x in trainer.callback_handler.callbacks if isinstance(x, CondLRCallback))


# ------------------------------------------------------------------------------------- where the optimizer comes from


class LayerWiseRates(Trainer):
    def create_optimizer(self, model=None):
        groups = [
            {"params": [p for n, p in self.model.named_parameters() if ("layer.0" in n) == first], "lr": rate}
            for first, rate in ((True, 1e-3), (False, 1e-2))
        ]
        self.optimizer = torch.optim.AdamW(groups)
        return self.optimizer


class LayerWiseCondLRTrainer(LayerWiseRates, CondLRTrainer):
    """A mixin in the wrong order: its create_optimizer calls no other one."""


def own_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


MAKERS = {
    "a plain Trainer": (Trainer, lambda model: {}),
    "layer-wise rates": (LayerWiseRates, lambda model: {}),
    "an overridden create_optimizer": (LayerWiseCondLRTrainer, lambda model: {}),
    "optimizers=": (Trainer, lambda model: {"optimizers": (own_optimizer(model), None)}),
    "optimizer_cls_and_kwargs=": (
        Trainer,
        lambda model: {"optimizer_cls_and_kwargs": (torch.optim.Adamax, {"lr": 0.01})},
    ),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_the_guarantee_holds_after_each_step(maker, tmp_path):
    cls, make = MAKERS[maker]
    model, watch = convert(dense_bert()), AfterEachStep()
    trainer = cls(
        model=model,
        args=arguments(tmp_path, TrainingArguments),
        train_dataset=text_data(),
        callbacks=[CondLRCallback(warmup_ratio=0.0), watch],
        **make(model),
    )
    trainer.train()
    assert watch.steps == callback_of(trainer).handle.step_count == 12
    assert {layer.bound for layer in condition_report(model).layers} == {1.1}


def test_it_logs_the_condition_and_detaches_at_the_end(tmp_path):
    trainer = plain(tmp_path, eval_strategy="epoch")
    trainer.train()
    history = trainer.state.log_history
    assert all("kappa_max" in entry for entry in history if "loss" in entry)
    assert sum("eval_kappa_max" in entry for entry in history) == 2
    assert "eval_kappa_bound" in trainer.evaluate()
    inner = trainer.optimizer.optimizer
    assert not inner._optimizer_step_post_hooks and not inner._optimizer_step_pre_hooks


@pytest.mark.parametrize("kind", ["a copy", "an unhooked step"])
def test_a_step_that_moves_factors_without_the_hooks_ends_the_training(kind, tmp_path):
    """Of two optimizers over the same factors the one that the Trainer calls is not the one with the hooks."""
    trainer = plain(tmp_path)

    class Replace(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step != 3:
                return
            inner = optimizer.optimizer
            if kind == "a copy":
                optimizer.optimizer = torch.optim.AdamW(inner.param_groups)
            else:
                inner._optimizer_step_pre_hooks.clear()
                inner._optimizer_step_post_hooks.clear()

    trainer.add_callback(Replace())
    with pytest.raises(OptimizerError, match=r"an optimizer that has the manifold step; received AdamW, which has"):
        trainer.train()


def test_an_optimizer_that_steps_seldom_is_no_error(tmp_path):
    class EverySecond(torch.optim.SGD):
        calls = 0

    model = convert(dense_bert())
    optimizer = EverySecond(model.parameters(), lr=0.01)
    step = optimizer.step

    def seldom(*args, **kwargs):
        EverySecond.calls += 1
        return step(*args, **kwargs) if EverySecond.calls % 2 == 0 else None

    optimizer.step = seldom
    trainer = plain(tmp_path, model=model, optimizers=(optimizer, None))
    trainer.train()
    assert callback_of(trainer).handle.step_count == 6


# ------------------------------------------------------------------------------------------------ refused before a step


def test_what_cannot_be_kept_is_refused_before_the_first_step(tmp_path):
    model = convert(dense_bert())
    optimizer = torch.optim.SGD(model.classifier.parameters(), lr=0.1)
    with pytest.raises(OptimizerError, match="must hold every trainable factor"):
        plain(tmp_path, model=model, optimizers=(optimizer, None)).train()
    with pytest.raises(OptimizerError, match="must have factored layers"):
        plain(tmp_path, model=dense_bert()).train()
    with pytest.raises(ConfigError, match="bf16_full_eval must be off"):
        plain(tmp_path, bf16_full_eval=True)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"warmup_ratio": 1.5}, r"conditioning_warmup_ratio must lie in \[0, 1\]; received 1.5"),
        ({"warmup_ratio": math.nan}, r"conditioning_warmup_ratio must lie in \[0, 1\]; received nan"),
        ({"projection_interval": 0}, "projection_interval must be an integer ≥ 1; received 0"),
        ({"drift_check_interval": -1}, "drift_check_interval must be an integer ≥ 0; received -1"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        CondLRCallback(**settings)


def test_settings_come_from_the_call_then_from_the_arguments_then_from_the_defaults(tmp_path):
    for callback, args, steps in (
        (CondLRCallback(warmup_ratio=0.5), arguments(tmp_path), 6),
        (CondLRCallback(), arguments(tmp_path, conditioning_warmup_ratio=0.75), 9),
        (CondLRCallback(), arguments(tmp_path, TrainingArguments), 4),
    ):
        trainer = Trainer(
            model=convert(dense_bert()), args=args, train_dataset=text_data(), callbacks=[callback, StopAt(1)]
        )
        trainer.train()
        assert callback.handle.state_dict()["warmup_steps"] == steps


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
@pytest.mark.parametrize("args", ["plain", "none"])
def test_the_trainer_works_with_plain_arguments_or_none(args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {} if args == "none" else {"args": arguments(tmp_path, TrainingArguments)}
    trainer = CondLRTrainer(model=convert(dense_bert()), train_dataset=text_data(8), callbacks=[StopAt(1)], **options)
    if args == "none":
        trainer.args.report_to, trainer.args.save_strategy = [], "no"
    trainer.train()
    assert trainer.manifold_step.step_count == 1


# ------------------------------------------------------------------------------------------------------ going on


@pytest.mark.parametrize("interval, restored", [(1, False), (4, True)])
def test_resume_equals_no_interruption(interval, restored, tmp_path):
    """Whether or not transformers restores callbacks itself."""
    dense, rows = dense_bert(), text_data()
    options = {"save_strategy": "steps", "save_steps": 3, "restore_callback_states_from_checkpoint": restored}
    trainers = []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        model = convert(copy.deepcopy(dense))
        callback = CondLRCallback(warmup_ratio=0.5, projection_interval=interval)
        trainer = plain(tmp_path, FactoredPlainTrainer, model=model, rows=rows, callback=callback, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainers.append(trainer)
    whole, resumed = (callback_of(trainer).handle for trainer in trainers)
    assert resumed.state_dict() == whole.state_dict() and whole.step_count == 12
    assert_equal_weights(trainers[0].model, trainers[1].model)


def test_a_plain_trainer_says_that_it_cannot_resume(tmp_path):
    trainer = plain(tmp_path, save_strategy="steps", save_steps=6)
    trainer.train()
    with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
        plain(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def spoiled(folder, change):
    path = folder / "checkpoint-6" / "trainer_state.json"
    state = json.loads(path.read_text())
    change(state["stateful_callbacks"], state["stateful_callbacks"]["CondLRCallback"]["attributes"])
    path.write_text(json.dumps(state))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda callbacks, own: callbacks.pop("CondLRCallback"), "none of CondLRCallback in its trainer_state.json"),
        (lambda callbacks, own: own.update(schedule=None), "none of CondLRCallback in its trainer_state.json"),
        (lambda callbacks, own: own["schedule"]["initial_condition"].popitem(), "must name the layers of this model"),
    ],
)
def test_a_damaged_schedule_is_refused(change, message, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 6}
    plain(tmp_path, FactoredPlainTrainer, **options).train()
    spoiled(tmp_path, change)
    trainer = plain(tmp_path, FactoredPlainTrainer, **options)
    with pytest.raises(OptimizerError, match=message):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_a_training_after_an_interrupt_goes_on(tmp_path):
    trainer = plain(tmp_path, callback=CondLRCallback(warmup_ratio=0.5))

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2 and not getattr(self, "done", False):
                self.done = True
                raise KeyboardInterrupt

    trainer.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert callback_of(trainer).handle.step_count == 14
    assert condition_report(trainer.model).max_condition_number <= 1.1 * (1 + 1e-4)


def test_a_training_that_is_resumed_from_its_last_step_is_over(tmp_path):
    """20 steps of 6 an epoch: Trainer itself would take step 21."""
    dense, rows = dense_bert(), text_data()
    options = {"max_steps": 20, "save_strategy": "steps", "save_steps": 20, "lr_scheduler_type": "constant"}
    models, steps = [], []
    for checkpoint in (None, str(tmp_path / "checkpoint-20")):
        models.append(convert(copy.deepcopy(dense)))
        trainer = CondLRTrainer(model=models[-1], args=arguments(tmp_path, **options), train_dataset=rows)
        trainer.train(resume_from_checkpoint=checkpoint)
        steps.append((trainer.state.global_step, trainer.manifold_step.step_count))
    assert steps == [(20, 20), (20, 20)]
    assert_equal_weights(*models)


# ----------------------------------------------------------------------------------------------------- best model

BEST = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
    "greater_is_better": True,
    "save_strategy": "steps",
    "eval_strategy": "steps",
    "save_steps": 3,
    "eval_steps": 3,
}


@pytest.mark.filterwarnings("ignore:Could not locate the best model")
def test_the_best_model_is_none_of_the_warm_up_and_is_restored(tmp_path):
    """In a plain Trainer, which finds no weights it knows; the two best evaluations are in the warm-up of 6 steps."""
    kept, seen = {}, []
    scores = iter([9.0, 8.0, 7.0, 3.0, 0.0])

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, model=None, **kwargs):
            kept[state.global_step] = copy.deepcopy(model.state_dict())
            stored = json.loads((tmp_path / f"checkpoint-{state.global_step}" / "trainer_state.json").read_text())
            seen.append((stored["best_metric"], stored["best_global_step"], state.best_global_step))

    rows = text_data()
    trainer = Trainer(
        model=convert(dense_bert()),
        args=arguments(tmp_path, TrainingArguments, **BEST),
        train_dataset=rows,
        eval_dataset=rows[:8],
        compute_metrics=lambda prediction: {"score": next(scores)},
        callbacks=[CondLRCallback(warmup_ratio=0.55), EarlyStoppingCallback(2), Keep()],
    )
    trainer.train()
    assert seen == [(None, None, None), (None, None, None), (7.0, 9, 9), (7.0, 9, 9)]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-9")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, kept[9][name])


@pytest.mark.parametrize("bypass", [False, True])
def test_weights_that_other_code_wrote_are_not_the_best_model(bypass, tmp_path):
    """As a callback does that evaluates an average of the weights; `p.data` has no version counter."""

    class Average(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 9:
                for p in model.parameters():
                    (p.data if bypass else p.detach()).mul_(0.5)

    scores, rows = iter([0.0, 1.0, 9.0, 2.0, 0.0]), text_data()
    trainer = Trainer(
        model=convert(dense_bert()),
        args=arguments(tmp_path, TrainingArguments, **BEST | {"load_best_model_at_end": False}),
        train_dataset=rows,
        eval_dataset=rows[:8],
        compute_metrics=lambda prediction: {"score": next(scores)},
        callbacks=[CondLRCallback(warmup_ratio=0.0), Average()],
    )
    trainer.train()
    assert trainer.state.best_metric == 2.0 and trainer.state.best_global_step == 12


# ----------------------------------------------------------------------------------- projection every k-th step


class Look(TrainerCallback):
    """Asks for an evaluation, behind the callback's back if it comes after it."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = state.global_step == 2


def test_the_model_is_settled_before_evaluations_and_checkpoints(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 3}
    seen = {}

    class Watch(TrainerCallback):
        def note(self, state, model):
            report = condition_report(model)
            seen[state.global_step] = all(obeys_bound(x.condition_number, x.bound) for x in report.layers) and (
                report.max_orthonormality_error < 1e-5 and all(math.isfinite(x.bound) for x in report.layers)
            )

        def on_evaluate(self, args, state, control, model=None, **kwargs):
            self.note(state, model)

        def on_save(self, args, state, control, model=None, **kwargs):
            self.note(state, model)

    callback = CondLRCallback(projection_interval=4)
    trainer = plain(tmp_path, callback=callback, callbacks=[Watch()], learning_rate=3e-2, **options)
    trainer.train()
    assert seen == dict.fromkeys((3, 5, 6, 9, 10, 12), True)


def test_an_evaluation_between_projections_is_an_error_in_another_trainer_only(tmp_path):
    options = {"learning_rate": 3e-2, "callback": CondLRCallback(projection_interval=4), "callbacks": [Look()]}
    with pytest.raises(OptimizerError, match=r"where the constraint holds; received step 2, between two projections"):
        plain(tmp_path, **options).train()
    args = arguments(tmp_path, projection_interval=4, learning_rate=3e-2)
    trainer = CondLRTrainer(
        model=convert(dense_bert()), args=args, train_dataset=text_data(), eval_dataset=text_data(8), callbacks=[Look()]
    )
    trainer.train()


def test_models_inside_a_module_of_ones_own(tmp_path):
    """Checkpoints of a plain module that holds a factored model."""

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = convert(dense_vit())

        def forward(self, pixel_values, labels=None):
            return self.inner(pixel_values=pixel_values, labels=labels)

    rows = [{"pixel_values": torch.rand(1, 8, 8), "labels": i % 2} for i in range(48)]
    model = Wrapper()
    models = [model, copy.deepcopy(model)]
    for each, checkpoint in zip(models, (None, str(tmp_path / "checkpoint-6")), strict=True):
        options = {"save_strategy": "steps", "save_steps": 6}
        trainer = plain(tmp_path, FactoredPlainTrainer, model=each, rows=rows, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
    assert_equal_weights(*models)
