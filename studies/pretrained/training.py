"""One training, dense or factored, which goes on from its last checkpoint after a kill."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_condlr import CondLRTrainer, CondLRTrainingArguments, FactoredTrainer
from studies.pretrained.tasks import Task

BATCH = 32


def trainer(
    task: Task, model: Any, folder: Path, *, rate: float, steps: int, seed: int, free: bool, bf16: bool, **options: Any
) -> Any:
    """The package's Trainer.

    Args:
        task: Its data.
        model: Dense or factored.
        folder: Of checkpoints.
        rate: Largest learning rate of AdamW; a tenth of the steps warms up, a cosine follows.
        steps: Optimizer steps of `BATCH` samples.
        seed: Order of the samples, their crops.
        free: Weights train without the manifold step: dense models, and the factors of plain low rank.
        bf16: Forward passes in bfloat16 (autocast).
        options: `teacher`, and further training arguments.
    """
    teacher = options.pop("teacher", None)
    args = CondLRTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=rate,
        seed=seed,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        warmup_steps=0.1,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        save_steps=50,
        save_total_limit=1,
        logging_steps=10,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        bf16=bf16,
        **({"train_sampling_strategy": "group_by_length"} if task.name == "sst2" else {}),
        **options,
    )
    made = (FactoredTrainer if free else CondLRTrainer)(
        model=model,
        args=args,
        train_dataset=task.train,
        data_collator=task.augment,
        processing_class=task.processor,
        teacher=teacher,
        compute_metrics=lambda output: {"accuracy": float((np.argmax(output[0], -1) == output[1]).mean())},
    )
    made.remove_callback(PrinterCallback)
    return made


def fitted(task: Task, model: Any, folder: Path, **options: Any) -> dict[str, Any]:
    """Train, or go on with a training that was killed; loss, validation accuracy, seconds."""
    set_seed(options["seed"])
    checkpoints = folder / "checkpoints"
    made = trainer(task, model, checkpoints, **options)
    last = get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None
    metrics = made.train(resume_from_checkpoint=last).metrics
    shutil.rmtree(checkpoints, ignore_errors=True)
    return {
        "validation_accuracy": accuracy(task, model, task.validation),
        "training_loss": metrics["train_loss"],
        "training_seconds": round(metrics["train_runtime"], 1),
    }


def accuracy(task: Task, model: Any, rows: Any) -> float:
    """Share of the rows that the model classifies correctly."""
    right = hits(task, model, rows)
    return sum(right) / len(right)


@torch.inference_mode()
def hits(task: Task, model: Any, rows: Any) -> list[bool]:
    """Whether the model classifies each row correctly, in the dtype of its weights."""
    model.eval()
    right: list[bool] = []
    for start in range(0, len(rows), 64):
        batch = task.collate([rows[i] for i in range(start, min(start + 64, len(rows)))])
        labels = batch.pop("labels")
        right += (model(**batch).logits.argmax(-1) == labels).tolist()
    return right


def fit_head(task: Task, model: Any, samples: int, *, bf16: bool) -> float:
    """Train the classifier alone on features of the frozen encoder; returns the share of them that it gets right.

    A classifier drawn at random would first spoil the encoder (Kumar et al. 2022, linear probing, then fine-tuning).
    """
    model.eval()
    features, labels = [], []
    hook = model.classifier.register_forward_pre_hook(lambda _, args: features.append(args[0].float()))
    rows = task.train.shuffle(seed=0).select(range(min(samples, len(task.train))))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for start in range(0, len(rows), BATCH):
            batch = task.augment([rows[i] for i in range(start, min(start + BATCH, len(rows)))])
            labels.append(batch.pop("labels"))
            model(**batch)
    hook.remove()
    x, y = torch.cat(features).clone(), torch.cat(labels).clone()
    optimizer = torch.optim.AdamW(model.classifier.parameters(), lr=1e-3, weight_decay=1e-2)
    for index in torch.randint(0, len(y), (600, 64)):
        loss = torch.nn.functional.cross_entropy(model.classifier(x[index]), y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float((model.classifier(x).argmax(-1) == y).float().mean())
