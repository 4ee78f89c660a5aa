"""Adapters on a base that bitsandbytes quantized, where it is installed."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_condlr import to_lora
from tests.adapters.tiny import adapted, assert_within_bounds, base, outputs, trained

pytestmark = pytest.mark.filterwarnings("ignore")  # bitsandbytes' own
pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("bits", [8, 4])
def test_an_adapter_trains_on_a_quantized_base_and_is_reloaded(tmp_path, bits):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}  # bitsandbytes' kernel takes multiples of 32
    base(**sizes).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_compute_dtype=torch.float32)

    def quantized():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=config, device_map="cpu", dtype=torch.float32
        ).eval()

    before = outputs(quantized())
    model = trained(adapted(quantized(), tau=0.1, target_modules="all-linear"))
    assert_within_bounds(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer()
    assert not layer.weight.is_floating_point() and not layer.weight.requires_grad
    model.save_pretrained(tmp_path / "adapter")
    loaded = outputs(PeftModel.from_pretrained(quantized(), tmp_path / "adapter"))
    assert (loaded - before).norm() > 1e-3 * before.norm()
    torch.testing.assert_close(outputs(model), loaded, rtol=1e-5, atol=1e-5)
    lora = to_lora(PeftModel.from_pretrained(quantized(), tmp_path / "adapter"))
    # The kernel rounds what a layer reads to half precision, to which the last bit of a float32 may matter.
    assert (outputs(lora) - loaded).norm() < 0.02 * loaded.norm()
