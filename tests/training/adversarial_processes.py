"""Adversarial training by torchrun, as `test_adversarial.py` starts it: weights after FGSM, accuracies, PGD's seeds."""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import ViTImageProcessorPil, set_seed

from hf_condlr import CondLRTrainer, RobustnessArguments
from hf_condlr.training.perturbed_inputs import PixelInputs
from tests.training.tiny import arguments, convert, dense_vit

MEAN, STD, EPSILON = 0.5, 0.25, 1 / 16


def train(folder, batch_size, **options):
    """Three steps on 48 images in all, in float64; the trainer, and the seeds that attacks were made with."""
    set_seed(0)
    seeds, attack = [], PixelInputs.attack

    def recorded(self, epsilon, seed):
        seeds.append(seed)
        return attack(self, epsilon, seed)

    rows = [
        {"pixel_values": ((torch.randint(0, 256, (1, 8, 8)) / 256 - MEAN) / STD).double(), "labels": i % 2}
        for i in range(48)
    ]
    model = convert(dense_vit().double())
    args = arguments(
        folder,
        per_device_train_batch_size=batch_size,
        num_train_epochs=1,
        optim="adamw_torch",
        adversarial_schedule="constant",
        projection_interval=2,  # of three steps the last one is settled at the end
        **options,
    )
    robustness = RobustnessArguments(epsilons=["1/16"], steps=2, max_samples=13)
    processor = ViTImageProcessorPil(image_mean=[MEAN], image_std=[STD])
    PixelInputs.attack = recorded
    try:
        trainer = CondLRTrainer(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=processor,
            robustness=robustness,
        )
        trainer.train()
    finally:
        PixelInputs.attack = attack
    return trainer, seeds


def robust_metrics(trainer):
    """What an evaluation says of attacks."""
    return {name: value for name, value in trainer.evaluate().items() if "robust" in name or "pgd" in name}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, process = Path(sys.argv[1]), int(os.environ["RANK"])
    trainer, _ = train(folder / "out", 8, adversarial_attack="fgsm", adversarial_epsilon=EPSILON)
    metrics = robust_metrics(trainer)
    (folder / f"metrics-{process}.json").write_text(json.dumps(metrics))
    if process == 0:
        torch.save(trainer.model.state_dict(), folder / "fgsm.pt")
    _, seeds = train(
        folder / "out", 8, adversarial_attack="pgd", adversarial_epsilon=EPSILON, adversarial_steps=1, trades_beta=1.0
    )
    (folder / f"seeds-{process}.json").write_text(json.dumps(seeds))
    torch.distributed.destroy_process_group()
