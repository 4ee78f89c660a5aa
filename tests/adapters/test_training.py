"""Adapters in Trainers: the guarantee after each step, exact resume, TRL, accumulation, optimizers."""

import copy
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from hf_condlr import (
    CondLRAdapterConfig,
    CondLRCallback,
    CondLRTrainer,
    attach_manifold_step,
    condition_report,
    fold_model,
    to_dense_model,
)
from hf_condlr.errors import ConversionError
from hf_condlr.layers import factored_layers
from tests.adapters.tiny import adapted, assert_within_bounds, base, loss_of, outputs, trained
from tests.models import MODELS
from tests.training.test_other_trainers import sentences, settings, tokenizer  # noqa: F401  # a fixture
from tests.training.tiny import AfterEachStep, arguments, assert_equal_weights, dense_bert, text_data


def adapter_bert(**options):
    torch.manual_seed(3)
    return get_peft_model(dense_bert(), CondLRAdapterConfig(**({"r": 3, "task_type": "SEQ_CLS"} | options)))


def every_second_step(folder, cls=None, **options):
    cls = {} if cls is None else {"cls": cls}
    return arguments(folder, **cls, save_strategy="steps", save_steps=3, **options)


class TestTrainer:
    def test_the_guarantee_holds_after_each_step_and_is_logged(self, tmp_path):
        watch, model = AfterEachStep(), adapter_bert()
        trainer = CondLRTrainer(model=model, args=arguments(tmp_path), train_dataset=text_data(), callbacks=[watch])
        trainer.train()
        assert watch.steps == 12
        assert_within_bounds(model)
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert all(entry["kappa_max"] <= 1.1 * (1 + 1e-4) for entry in logged)
        assert {entry["kappa_bound"] for entry in logged} == {1.1}  # no warm-up: κ = 1 at the start
        assert not any("compression" in entry for entry in logged)

    @pytest.mark.parametrize("cls", [CondLRTrainer, Trainer])
    def test_resume_equals_no_interruption(self, cls, tmp_path):
        rows, other = text_data(), TrainingArguments if cls is Trainer else None
        callbacks = {"callbacks": [CondLRCallback()]} if cls is Trainer else {}
        whole = cls(model=adapter_bert(), args=every_second_step(tmp_path, other), train_dataset=rows, **callbacks)
        whole.train()
        callbacks = {"callbacks": [CondLRCallback()]} if cls is Trainer else {}
        resumed = cls(model=adapter_bert(), args=every_second_step(tmp_path, other), train_dataset=rows, **callbacks)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        assert_equal_weights(whole.model, resumed.model)
        names = {path.name for path in (tmp_path / "checkpoint-12").iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json"} <= names
        assert "condlr_factors.safetensors" not in names
        stored = load_file(tmp_path / "checkpoint-12" / "adapter_model.safetensors")
        assert {name.rpartition(".")[2] for name in stored} == {"U", "S", "V", "weight", "bias"}  # and the classifier's

    def test_the_best_model_is_restored(self, tmp_path):
        scores = iter([3.0, 9.0, 1.0, 2.0])
        kept = []

        class Scored(CondLRTrainer):
            def evaluate(self, *args, **kwargs):
                kept.append(copy.deepcopy(self.model.state_dict()))
                return super().evaluate(*args, **kwargs) | {"eval_score": next(scores)}

        options = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
        args = every_second_step(tmp_path, eval_strategy="steps", eval_steps=3, **options)
        trainer = Scored(model=adapter_bert(), args=args, train_dataset=text_data(), eval_dataset=text_data(8))
        trainer.train()
        for name, value in trainer.model.state_dict().items():
            assert torch.equal(value, kept[1][name]), name

    def test_the_card_is_pefts(self, tmp_path):
        trainer = CondLRTrainer(model=adapter_bert(), args=arguments(tmp_path), train_dataset=text_data())
        trainer.save_model()
        trainer.create_model_card()
        assert "library_name: peft" in (tmp_path / "README.md").read_text()

    def test_rounded_factors_are_float32_again(self, tmp_path):
        """As TRL rounds the adapters of a quantized model."""
        model = trained(adapter_bert(), "bert")
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.bfloat16()
        args = arguments(tmp_path, TrainingArguments, num_train_epochs=1)
        trainer = Trainer(model=model, args=args, train_dataset=text_data(), callbacks=[CondLRCallback()])
        model.base_model.model.classifier.float()
        trainer.train()
        assert_within_bounds(model)


@pytest.mark.filterwarnings("ignore")  # of TRL
class TestTRL:
    def trainer(self, folder, tokenizer, **options):  # noqa: F811
        trl = pytest.importorskip("trl")
        torch.manual_seed(5)
        rows, watch = Dataset.from_dict({"text": sentences(16, 6)}), AfterEachStep()
        args = trl.SFTConfig(max_length=16, **settings(folder, **options))
        config = CondLRAdapterConfig(r=2, tau=0.2)
        callbacks = [CondLRCallback(), watch]
        data = {"train_dataset": rows, "processing_class": tokenizer}
        model = base(vocab_size=16)
        return trl.SFTTrainer(model=model, args=args, peft_config=config, callbacks=callbacks, **data), watch

    def test_sft_and_its_resume(self, tmp_path, tokenizer):  # noqa: F811
        whole, watch = self.trainer(tmp_path, tokenizer)
        whole.train()
        assert watch.steps == 8
        assert isinstance(whole.model, PeftModel)
        assert_within_bounds(whole.model)
        resumed, _ = self.trainer(tmp_path, tokenizer)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert_equal_weights(whole.model, resumed.model)
        stored = json.loads((tmp_path / "checkpoint-8" / "adapter_config.json").read_text())
        assert stored["tau"] == 0.2


class TestSteps:
    def test_accumulation_equals_one_batch(self):
        """Four quarters of a batch, as one batch: float64, five steps of AdamW; measured: 1e-15."""
        torch.manual_seed(0)
        x, y = torch.randint(1, 37, (8, 5)), torch.randint(0, 5, (8,))
        ends = []
        for parts in (1, 4):
            torch.manual_seed(1)
            model = adapted(base("bert").double())
            optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
            attach_manifold_step(optimizer, model)
            for _ in range(5):
                for ids, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
                    (model(input_ids=ids, labels=labels).loss / parts).backward()
                optimizer.step()
                optimizer.zero_grad()
            ends.append(model.state_dict())
        for name, value in ends[0].items():
            torch.testing.assert_close(value, ends[1][name], rtol=0, atol=1e-10)

    @pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
    @pytest.mark.parametrize("tau", [0.0, 0.1, 4.0, "inf"])
    def test_optimizers(self, optimizer, tau):
        model = adapted(r=4, tau=tau)
        inputs, losses = MODELS["llama"].inputs(), []
        optimizer = optimizer(model.parameters(), lr=1e-2)
        assert not attach_manifold_step(optimizer, model).metric_scaling
        for _ in range(20):
            losses.append(loss_of(model, inputs))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
            assert_within_bounds(model)
        assert losses[-1] < losses[0]

    def test_the_first_step_gives_the_core_its_scale(self):
        """S₁ is the conditioned −η Uᵀ∇L(W₀)V: the formula in float64 for SGD and τ = ∞."""
        model = adapted(tau="inf", scale=3.0)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        weight, update = layer.base_layer.weight, layer.condlr_factors["default"]
        U, V = (p.detach().double().numpy().copy() for p in (update.U, update.V))
        weight.requires_grad_(True)
        loss_of(model, MODELS["llama"].inputs()).backward()
        G = weight.grad.double().numpy()
        optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "condlr" in n], 0.5)
        attach_manifold_step(optimizer, model)
        optimizer.step()
        expected = -0.5 * 3.0 * U.T @ G @ V
        np.testing.assert_allclose(update.S.detach().numpy(), expected, atol=1e-5 * np.abs(expected).max())

    def test_a_frozen_adapter_stays_beside_one_that_trains(self):
        model = trained(adapted(adapter="first"))
        model.add_adapter("second", CondLRAdapterConfig(r=3))
        model.base_model.set_adapter(["first", "second"])
        model.set_requires_grad("first", False)
        before = {name: p.clone() for name, p in model.named_parameters() if ".first." in name}
        trained(model, steps=5)
        for name, p in model.named_parameters():
            assert name not in before or torch.equal(p, before[name])
        assert_within_bounds(model)
        assert sum(".second" in name for name in factored_layers(model)) == 14

    def test_an_adapter_added_after_the_step_was_attached_is_named(self):
        model = adapted()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        attach_manifold_step(optimizer, model)
        model.add_adapter("second", CondLRAdapterConfig(r=3))
        loss_of(model, MODELS["llama"].inputs()).backward()
        with pytest.raises(ValueError, match=r"must be those to which the step was attached.*condlr_factors\.second"):
            optimizer.step()


@pytest.mark.parametrize("function", [fold_model, to_dense_model])
def test_adapters_are_not_folded(function):
    model = trained(adapted())
    before = outputs(model)
    with pytest.raises(ConversionError, match=r"received adapters .*Call merge_and_unload\(\) first"):
        function(model)
    assert torch.equal(outputs(model), before)
    assert len(condition_report(model).layers) == 14
