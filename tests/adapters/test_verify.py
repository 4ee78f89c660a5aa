"""Adapters are checked against their τ: a damaged file is refused with its reason, an unconstrained one is named."""

import logging

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from hf_condlr.errors import CheckpointError
from tests.adapters.tiny import adapted, assert_within_bounds, base, loss_of, outputs, trained
from tests.models import MODELS

KEY = "base_model.model.model.layers.1.self_attn.v_proj.condlr_factors"


def damaged(folder, change):
    """A saved adapter whose tensors `change` has written to."""
    trained(adapted()).save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return folder


def nan(tensors):
    tensors[f"{KEY}.U"][0, 0] = float("nan")


def flipped_bit(tensors):
    tensors[f"{KEY}.V"].view(torch.int32)[0, 0] ^= 1 << 24


def ill_conditioned(tensors):
    tensors[f"{KEY}.S"][0] *= 1.3


def zero(tensors):
    tensors[f"{KEY}.S"].zero_()


def other_rank(tensors):
    tensors[f"{KEY}.S"] = tensors[f"{KEY}.S"][:1, :1].clone()


def without_a_factor(tensors):
    del tensors[f"{KEY}.S"]


def without_a_layer(tensors):
    for kind in "USV":
        del tensors[f"{KEY}.{kind}"]


def integers(tensors):
    tensors[f"{KEY}.S"] = tensors[f"{KEY}.S"].int()


DAMAGES = {
    nan: "NaN or inf in",
    flipped_bit: "bases that are not orthonormal in",
    ill_conditioned: r"κ = 1\.\d+ for 1\.1 in",
    zero: "κ = inf for 1.1 in",
    other_rank: r"shapes .* for .* in",
    without_a_factor: "no S in",
    without_a_layer: "no U, S, V in",
    integers: "dtype torch.int32 in",
}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("change", DAMAGES, ids=lambda change: change.__name__)
def test_a_damaged_file_is_refused(change, low_cpu_mem_usage, tmp_path):
    with pytest.raises(CheckpointError, match=f"{DAMAGES[change]} .*layers.1.self_attn.v_proj.*Fetch it again"):
        PeftModel.from_pretrained(base(), damaged(tmp_path, change), low_cpu_mem_usage=low_cpu_mem_usage)


def test_nothing_is_loaded_from_a_damaged_file(tmp_path):
    model = trained(adapted(), steps=1)
    before = outputs(model)
    with pytest.raises(CheckpointError):
        model.load_adapter(damaged(tmp_path, nan), "default")
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_rounded_file_is_an_adapter(dtype, tmp_path):
    def rounded(tensors):
        tensors.update({name: X.to(dtype) for name, X in tensors.items()})

    model = PeftModel.from_pretrained(base(), damaged(tmp_path, rounded), is_trainable=True)
    with pytest.raises(AssertionError):
        assert_within_bounds(model)  # rounding broke orthonormality
    assert_within_bounds(trained(model))  # the step restores it


def test_an_unconstrained_training_is_named_when_it_is_saved(tmp_path, caplog):
    model, inputs = adapted(), MODELS["llama"].inputs()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(2):
        loss_of(model, inputs).backward()
        optimizer.step()
    with caplog.at_level(logging.WARNING, logger="hf_condlr"):
        model.save_pretrained(tmp_path)
    assert "the adapter default does not obey its bound" in caplog.text
    assert "Train with CondLRCallback" in caplog.text
    with pytest.raises(CheckpointError, match=r'set "tau": "inf" in its adapter_config\.json'):
        PeftModel.from_pretrained(base(), tmp_path)


def test_an_adapter_that_obeys_is_saved_in_silence(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_condlr"):
        trained(adapted()).save_pretrained(tmp_path)
    assert caplog.text == ""
