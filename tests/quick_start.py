"""A program for an empty environment with the wheel alone: convert, train, report, save and load a tiny ViT."""

import tempfile

import torch
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from hf_condlr import CondLRConfig, CondLRTrainer, CondLRTrainingArguments, condition_report, get_robust_lowrank_model

config = ViTConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
    num_labels=5,
)
model = get_robust_lowrank_model(ViTForImageClassification(config), CondLRConfig(rank_ratio=0.25, tau=0.1))
samples = [{"pixel_values": torch.rand(3, 16, 16), "labels": i % 5} for i in range(16)]
with tempfile.TemporaryDirectory() as folder:
    args = CondLRTrainingArguments(folder, max_steps=4, report_to="none", use_cpu=True)
    trainer = CondLRTrainer(model=model, args=args, train_dataset=samples)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForImageClassification.from_pretrained(folder)
report = condition_report(loaded)
assert report.max_condition_number <= 1.1 * (1 + 1e-4), report
