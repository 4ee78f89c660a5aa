"""Tiny models, data and arguments for the tests of Trainers."""

import math

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
)

from hf_condlr import CondLRConfig, CondLRTrainingArguments, condition_report, get_robust_lowrank_model
from hf_condlr.linalg import obeys_bound

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def dense_bert(**kwargs):
    return BertForSequenceClassification(BertConfig(vocab_size=40, **SIZES, **NO_DROPOUT, **kwargs))


def dense_vit():
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, **SIZES))


def text_data(count=48):
    return [{"input_ids": torch.randint(0, 40, (7,)), "labels": int(torch.randint(0, 2, ()))} for _ in range(count)]


def image_data(count=48):
    return [{"pixel_values": torch.rand(1, 8, 8), "labels": int(torch.randint(0, 2, ()))} for _ in range(count)]


CASES = {"bert": (dense_bert, text_data), "vit": (dense_vit, image_data)}


def arguments(folder, cls=CondLRTrainingArguments, **kwargs):
    defaults = {
        "use_cpu": True,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 3e-3,
        "logging_steps": 3,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    return cls(str(folder), **(defaults | kwargs))


def convert(model, **kwargs):
    return get_robust_lowrank_model(model, CondLRConfig(**({"rank_ratio": 0.3, "tau": 0.1} | kwargs)))


def assert_equal_weights(first, second):
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


class AfterEachStep(TrainerCallback):
    """Checks the guarantee after every optimizer step."""

    def __init__(self):
        self.steps = 0

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps += 1
        report = condition_report(model)
        assert all(obeys_bound(layer.condition_number, layer.bound) for layer in report.layers)
        assert all(math.isfinite(layer.bound) for layer in report.layers)
        assert report.max_orthonormality_error <= 1e-5
