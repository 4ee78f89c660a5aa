"""Models, and what damages their checkpoints, for the tests of checkpoints."""

import json

import torch
from safetensors.torch import load_file, save_file

from hf_condlr import CondLRConfig, attach_manifold_step, get_robust_lowrank_model
from hf_condlr.files import digest
from hf_condlr.layers import LowRankLayer
from tests import models
from tests.conversion import test_architectures
from tests.models import MODELS

ARCHITECTURES = [*MODELS, *test_architectures.CASES]


def build(case):
    if case in MODELS:
        return MODELS[case].build(), MODELS[case].inputs()
    return test_architectures.build(case)


def convert(case, model, **kwargs):
    pattern = {
        **test_architectures.NAMED,
        "resnet": r".*\.convolution",
        "convnext": r".*\.(pwconv1|downsampling_layer\.1)",
    }
    settings = {"target_modules": pattern.get(case, "all-linear"), "rank_ratio": 0.5, "tau": 0.1} | kwargs
    return get_robust_lowrank_model(model, CondLRConfig(**settings))


def output(model, inputs):
    with torch.no_grad():
        return test_architectures.output(model, inputs)


def factored_vit():
    return convert("vit", models.vit())


def constrained(model):
    """A training step, so that bounds are in force."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    attach_manifold_step(optimizer, model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LowRankLayer)}


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def write_config(folder, config):
    (folder / "config.json").write_text(json.dumps(config))


Q = "vit.layers.0.attention.q_proj"


def edit_manifest(folder, edit):
    config = read_config(folder)
    edit(config["quantization_config"])
    write_config(folder, config)


def edit_tensors(folder, edit, path=None):
    """With a digest that fits: someone changed file and digest."""
    path = path or next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    edit_manifest(folder, lambda manifest: manifest["sha256"].update({path.name: digest(path)}))


def truncate(folder):
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(folder):
    path = next(folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-50] ^= 1  # the least of some weight: no other check could see it
    path.write_bytes(data)
