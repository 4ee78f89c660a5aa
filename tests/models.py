"""Tiny random transformers models with inputs, one of every architecture that conversion might treat differently.

Weights are large enough that a layer converted wrongly shows in the logits, biases are not zero, and no two of a
layer's dimensions agree without need. Building one leaves the global random state as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import peft
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Image
from packaging.version import Version
from PIL import Image as Picture
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.pytorch_utils import Conv1D

VOCAB = 37
LABELS = 5
IMAGE = 16

transformers_adapters = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),  # 5.24 came out before the version that it asks for
    reason=f"add_adapter of this transformers needs PEFT {MIN_PEFT_VERSION}",
)


@dataclass(frozen=True)
class TinyModel:
    """A model's builder and inputs, and what `target_modules="all-linear"` makes of it."""

    build: Callable[..., transformers.PreTrainedModel]
    inputs: Callable[[], dict[str, torch.Tensor]]
    linear_layers: int
    """How many nn.Linear and Conv1D there are but the head, counted by hand."""
    head: str
    """Name of the classifier or the output embeddings."""
    convolutions: int = 0
    """How many nn.Conv2d with groups=1 there are."""


def build(model_class, config, **overrides):
    """A model in eval mode with random, not negligible parameters; `overrides` go to its config."""
    for name, value in overrides.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = model_class(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases start at 0 and norms at 1: a lost one would not be noticed
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def vit(model_class=transformers.ViTForImageClassification, **overrides):
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=IMAGE,
        patch_size=8,
        num_labels=LABELS,
        initializer_range=0.3,
    )
    return build(model_class, config, **overrides)


def swin(model_class=transformers.SwinForImageClassification, **overrides):
    config = transformers.SwinConfig(
        image_size=IMAGE,
        patch_size=2,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=2,
        mlp_ratio=1.5,
        num_labels=LABELS,
        initializer_range=0.3,
    )
    return build(model_class, config, **overrides)


def convnext(model_class=transformers.ConvNextForImageClassification, **overrides):
    config = transformers.ConvNextConfig(
        num_stages=2,
        hidden_sizes=[8, 12],
        depths=[1, 1],
        patch_size=2,
        image_size=IMAGE,
        layer_scale_init_value=1.0,  # at the default of 1e-6 no block would matter
        num_labels=LABELS,
        initializer_range=0.3,
    )
    return build(model_class, config, **overrides)


def resnet(model_class=transformers.ResNetForImageClassification, **overrides):
    config = transformers.ResNetConfig(
        embedding_size=6, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=LABELS
    )
    return build(model_class, config, **overrides)


def siglip(model_class=transformers.SiglipForImageClassification, **overrides):
    """Not in `MODELS`: a model that is its own `base_model`, and as `SiglipVisionModel` one that pools by attention."""
    vision = transformers.SiglipVisionConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=IMAGE,
        patch_size=8,
    )
    if model_class is transformers.SiglipVisionModel:
        return build(model_class, vision, **overrides)
    text = transformers.SiglipTextConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    config = transformers.SiglipConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), num_labels=LABELS)
    return build(model_class, config, **overrides)


def yolos():
    """Not in `MODELS`: a detector."""
    config = transformers.YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=[IMAGE, IMAGE],
        patch_size=8,
        num_detection_tokens=3,
        use_mid_position_embeddings=False,
        num_labels=LABELS,
    )
    return build(transformers.YolosForObjectDetection, config)


def bert(model_class=transformers.BertForSequenceClassification, **overrides):
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=LABELS,
        initializer_range=0.3,
    )
    return build(model_class, config, **overrides)


def distilbert(model_class=transformers.DistilBertForSequenceClassification, **overrides):
    config = transformers.DistilBertConfig(
        vocab_size=VOCAB,
        dim=16,
        n_layers=2,
        n_heads=2,
        hidden_dim=24,
        max_position_embeddings=16,
        num_labels=LABELS,
        initializer_range=0.3,
    )
    return build(model_class, config, **overrides)


def gpt2(model_class=transformers.GPT2LMHeadModel, **overrides):
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        num_labels=LABELS,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    return build(model_class, config, **overrides)


def llama(model_class=transformers.LlamaForCausalLM, **overrides):
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=LABELS,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    return build(model_class, config, **overrides)


def t5(model_class=transformers.T5ForConditionalGeneration, **overrides):
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=16,
        d_kv=6,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        num_labels=LABELS,
    )
    return build(model_class, config, **overrides)


def pixels(batch=2):
    generator = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(batch, 3, IMAGE, IMAGE, generator=generator)}


def tokens(batch=2, length=7):
    """Token ids, the last row padded at its end."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, -2:] = 0
    ids = torch.randint(2, VOCAB, (batch, length), generator=generator)
    return {"input_ids": ids.where(mask.bool(), torch.ones_like(ids)), "attention_mask": mask}


def token_pairs():
    """As `tokens`, and the beginning of an answer for a decoder."""
    return {**tokens(), "decoder_input_ids": tokens(length=4)["input_ids"]}


def write_pictures(folder, number=12):
    """A data set of noisy images for `vit()`: splits train and test as parquet."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (number, IMAGE, IMAGE, 3), generator=generator, dtype=torch.uint8)
    pictures = [Picture.fromarray(x.numpy()) for x in noise]
    features = Features({"image": Image(), "label": ClassLabel(num_classes=LABELS)})
    folder.mkdir()
    for split in ("train", "test"):
        rows = {"image": pictures, "label": [i % LABELS for i in range(number)]}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


MODELS = {
    "vit": TinyModel(vit, pixels, linear_layers=12, head="classifier", convolutions=1),
    "swin": TinyModel(swin, pixels, linear_layers=13, head="classifier", convolutions=1),
    "convnext": TinyModel(convnext, pixels, linear_layers=4, head="classifier", convolutions=2),
    "resnet": TinyModel(resnet, pixels, linear_layers=0, head="classifier.1", convolutions=7),
    "bert": TinyModel(bert, tokens, linear_layers=13, head="classifier"),
    "distilbert": TinyModel(distilbert, tokens, linear_layers=13, head="classifier"),
    "gpt2": TinyModel(gpt2, tokens, linear_layers=8, head="lm_head"),
    "llama": TinyModel(llama, tokens, linear_layers=14, head="lm_head"),
    "t5": TinyModel(t5, token_pairs, linear_layers=32, head="lm_head"),
}


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def dense_layers(model):
    """{name: layer} of every nn.Linear and Conv1D."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
