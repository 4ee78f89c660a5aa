"""What two processes do under torchrun for `test_processes.py`: a training of an adapter under DDP."""

import os
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import distributed as dist
from transformers import set_seed

from hf_condlr import CondLRAdapterConfig, CondLRTrainer
from tests.adapters.tiny import assert_within_bounds
from tests.training.tiny import arguments, dense_bert, text_data

BATCH = 16


def train(folder, *, batch_size, name, seed=0, **options):
    """Six steps of 16 samples over all processes, in float64; writes the adapter into `folder`."""
    set_seed(0)
    model, rows = dense_bert().double(), text_data(6 * BATCH)
    set_seed(seed)  # the start of the adapter
    model = get_peft_model(model, CondLRAdapterConfig(r=3, task_type="SEQ_CLS"))
    args = arguments(folder / name, per_device_train_batch_size=batch_size, num_train_epochs=1, **options)
    trainer = CondLRTrainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    assert_within_bounds(trainer.model)
    rank = int(os.environ.get("RANK", 0))
    tensors = {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}
    save_file(tensors, folder / f"{name}-{rank}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    train(target, batch_size=BATCH // 2, name="two")
    train(target, batch_size=BATCH // 4, name="accumulated", gradient_accumulation_steps=2)
    train(target, batch_size=BATCH // 2, name="different", seed=int(os.environ["RANK"]))
    dist.destroy_process_group()
