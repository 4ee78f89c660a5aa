"""A tiny BERT and batches of unequal lengths to calibrate on."""

import torch
from transformers import BertConfig, BertForSequenceClassification


def make_bert():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=40, **sizes))


def batches():
    ids, mask = torch.randint(0, 40, (12, 9)), torch.ones(12, 9, dtype=torch.long)
    mask[::2, 5:] = 0
    return [
        {"input_ids": ids[i : i + 4], "attention_mask": mask[i : i + 4], "labels": torch.zeros(4), "note": ["x"] * 4}
        for i in range(0, 12, 4)
    ]
