"""What PEFT promises of its methods, checked on ours: adapters start without effect, save, load, merge, add, delete."""

import copy
import io
import json
import pickle

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict

from hf_condlr import CondLRAdapterConfig, condition_report, is_factored
from hf_condlr.errors import ConversionError
from tests.adapters.tiny import ARCHITECTURES, adapted, assert_within_bounds, base, loss_of, outputs, trained
from tests.models import MODELS, transformers_adapters

TOLERANCE = 1e-5  # float32 logits of size 1; measured: 1e-6


@pytest.mark.parametrize("name", ARCHITECTURES)
class TestOneAdapter:
    def test_starts_without_effect(self, name):
        model = adapted(base(name))
        assert torch.equal(outputs(model, name), outputs(base(name), name))
        assert_within_bounds(model)

    def test_only_factors_train(self, name):
        model, before = adapted(base(name)), base(name).state_dict()
        assert all(n.endswith((".U", ".S", ".V")) for n, p in model.named_parameters() if p.requires_grad)
        trained(model, name)
        assert (outputs(model, name) - outputs(base(name), name)).abs().max() > 1e-3
        for key, value in model.unload().state_dict().items():
            assert torch.equal(value, before[key]), key

    def test_every_factor_trains_within_the_bound(self, name):
        model = adapted(base(name))
        before = copy.deepcopy(model.state_dict())
        trained(model, name)
        assert_within_bounds(model)
        still = [n for n, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[n])]
        assert still == []

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_saved_and_loaded(self, name, low_cpu_mem_usage, tmp_path):
        model = trained(adapted(base(name), tau=0.3), name)
        model.save_pretrained(tmp_path)
        assert {p.name for p in tmp_path.iterdir()} == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
        loaded = PeftModel.from_pretrained(base(name), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(outputs(loaded, name), outputs(model, name))
        assert not any(p.requires_grad for p in loaded.parameters())
        assert loaded.peft_config["default"].tau == 0.3
        assert all(layer.bound == 1.3 for layer in condition_report(loaded).layers)

    @pytest.mark.parametrize("safe_merge", [False, True])
    def test_merged_and_unmerged(self, name, safe_merge):
        model = trained(adapted(base(name), scale=3.0), name)
        before = outputs(model, name)
        model.merge_adapter(safe_merge=safe_merge)
        assert (outputs(model, name) - before).abs().max() < TOLERANCE
        model.unmerge_adapter()
        assert (outputs(model, name) - before).abs().max() < TOLERANCE
        merged = model.merge_and_unload(safe_merge=safe_merge)
        assert type(merged) is type(base(name))
        assert not is_factored(merged)
        assert (outputs(merged, name) - before).abs().max() < TOLERANCE

    def test_disabled_and_unloaded(self, name):
        model, plain = trained(adapted(base(name)), name), outputs(base(name), name)
        after = outputs(model, name)
        with model.disable_adapter():
            assert torch.equal(outputs(model, name), plain)
        assert torch.equal(outputs(model, name), after)
        model.merge_adapter()
        with model.disable_adapter():
            assert (outputs(model, name) - plain).abs().max() < TOLERANCE
        assert (outputs(model.unload(), name) - plain).abs().max() < TOLERANCE

    def test_copied_and_pickled(self, name):
        model = trained(adapted(base(name)), name)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(outputs(other, name), outputs(model, name))
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        fresh = adapted(base(name))
        fresh.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
        assert torch.equal(outputs(fresh, name), outputs(model, name))

    def test_gradient_checkpointing(self, name):
        model, other = adapted(base(name)), adapted(base(name))
        other.load_state_dict(model.state_dict())
        other.enable_input_require_grads()
        other.activation_checkpointing_enable({"use_reentrant": False})
        inputs = MODELS[name].inputs()
        for x in (model, other):
            torch.manual_seed(0)  # of dropout
            loss_of(x.train(), inputs).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        for n, p in other.named_parameters():
            if n in gradients:
                torch.testing.assert_close(p.grad, gradients[n], rtol=1e-4, atol=1e-6)


class TestSeveralAdapters:
    def test_add_set_and_delete(self):
        model = adapted(adapter="first")
        trained(model)
        first = outputs(model)
        model.add_adapter("second", CondLRAdapterConfig(r=4, tau="inf", target_modules=["q_proj"]))
        assert torch.equal(outputs(model), first)
        frozen = copy.deepcopy(get_peft_model_state_dict(model, adapter_name="first"))
        model.set_adapter("second")
        assert torch.equal(outputs(model), outputs(base()))
        trained(model, steps=5)
        second = outputs(model)
        assert_within_bounds(model)
        for key, value in get_peft_model_state_dict(model, adapter_name="first").items():
            assert torch.equal(value, frozen[key]), key
        model.set_adapter("first")
        assert torch.equal(outputs(model), first)
        with pytest.warns(UserWarning, match="Setting active adapter to second"):
            model.delete_adapter("first")
        assert torch.equal(outputs(model), second)
        assert len(condition_report(model).layers) == 2

    def test_two_active_adapters_add_up(self):
        model = trained(adapted(adapter="first"))
        model.add_adapter("second", CondLRAdapterConfig(r=3, target_modules=["v_proj", "down_proj"]))
        model.set_adapter("second")
        trained(model)
        model.base_model.set_adapter(["first", "second"])
        both = outputs(model)
        merged = model.merge_and_unload(adapter_names=["first", "second"])
        assert (outputs(merged) - both).abs().max() < TOLERANCE

    def test_saved_in_folders_of_their_own(self, tmp_path):
        model = trained(adapted(adapter="first"))
        model.add_adapter("second", CondLRAdapterConfig(r=3))
        model.set_adapter("second")
        trained(model)
        second = outputs(model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base(), tmp_path / "first", adapter_name="x")
        loaded.load_adapter(tmp_path / "second", "y")
        loaded.set_adapter("y")
        assert torch.equal(outputs(loaded), second)

    def test_a_batch_of_several_adapters_is_refused(self):
        model, inputs = adapted(), MODELS["llama"].inputs()
        with pytest.raises(ConversionError, match="must use the active adapters; received adapter_names"):
            model(**inputs, adapter_names=["default", "__base__"])

    def test_a_second_method_is_refused_by_peft(self):
        with pytest.raises(ValueError, match="different peft types"):
            adapted().add_adapter("other", LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(ValueError, match="CONDLR_ADAPTER"):
            get_peft_model(base(), CondLRAdapterConfig(), mixed=True)


class TestOptions:
    def test_ranks(self):
        model = adapted(r=3, rank_pattern={"v_proj": 1, r"layers\.0\.mlp\.up_proj": 5})
        ranks = {
            layer.name.split("model.")[-1].split(".condlr")[0]: layer.r for layer in condition_report(model).layers
        }
        assert ranks["layers.0.self_attn.v_proj"] == ranks["layers.1.self_attn.v_proj"] == 1
        assert ranks["layers.0.mlp.up_proj"] == 5
        assert ranks["layers.1.mlp.up_proj"] == ranks["layers.0.self_attn.q_proj"] == 3

    def test_a_rank_that_is_too_large_names_the_layer(self):
        with pytest.raises(ConversionError, match=r"the rank of model\.layers\.0\.self_attn\.[qkv]_proj lies in 1 … "):
            adapted(r=1000)

    def test_targets(self):
        options = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}
        assert adapted(**options).targeted_module_names == [f"model.layers.1.self_attn.{x}_proj" for x in "qv"]
        model = adapted(exclude_modules=r".*mlp.*")
        assert {name.split(".")[-2] for name in model.targeted_module_names} == {"self_attn"}
        model = adapted(base("bert"), task_type="SEQ_CLS")
        assert len(model.targeted_module_names) == MODELS["bert"].linear_layers

    def test_modules_to_save(self, tmp_path):
        model = adapted(base("bert"), target_modules=["query"], modules_to_save=["classifier"])
        trained(model, "bert")
        head = model.base_model.model.classifier
        assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base("bert"), tmp_path)
        assert torch.equal(outputs(loaded, "bert"), outputs(model, "bert"))
        assert (outputs(model.merge_and_unload(), "bert") - outputs(loaded, "bert")).abs().max() < TOLERANCE

    def test_a_layer_that_is_not_linear_is_refused_by_name(self):
        with pytest.raises(ConversionError, match=r"received model\.embed_tokens, a Embedding"):
            adapted(target_modules=["embed_tokens"])

    def test_a_layer_whose_weight_its_model_reads_is_refused_by_name(self):
        class Pooling(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = torch.nn.MultiheadAttention(8, 2)

        with pytest.raises(ConversionError, match=r"attention\.out_proj, a NonDynamicallyQuantizableLinear"):
            adapted(Pooling(), target_modules=["out_proj"])


class TestPrecision:
    def test_half_precision_base(self, tmp_path):
        """The factors stay float32, obey their bound, and are saved exactly."""
        model = adapted(base(dtype="bfloat16").bfloat16())
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert torch.equal(outputs(model), outputs(base().bfloat16()))
        trained(model)
        assert outputs(model).dtype == torch.bfloat16
        assert_within_bounds(model)
        model.save_pretrained(tmp_path)
        for low in (False, True):
            loaded = PeftModel.from_pretrained(base().bfloat16(), tmp_path, low_cpu_mem_usage=low)
            assert torch.equal(outputs(loaded), outputs(model))
            assert_within_bounds(loaded)

    def test_autocast(self):
        model = trained(adapted())
        with torch.autocast("cpu", torch.bfloat16):
            mixed = outputs(model)
        assert (mixed - outputs(model)).abs().max() < 0.1 * outputs(model).abs().max()

    def test_double_base(self):
        model = adapted(base().double())
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        before = outputs(trained(model))
        assert (outputs(model.merge_and_unload()) - before).abs().max() < 1e-12


class TestFiles:
    def test_the_config_is_strict_json(self, tmp_path):
        adapted(tau="inf", target_modules=("q_proj", "k_proj"), task_type="CAUSAL_LM").save_pretrained(tmp_path)
        text = (tmp_path / "adapter_config.json").read_text()
        stored = json.loads(text, parse_constant=lambda name: pytest.fail(name))
        assert (stored["tau"], stored["peft_type"]) == ("inf", "CONDLR_ADAPTER")
        config = PeftConfig.from_pretrained(tmp_path)
        assert isinstance(config, CondLRAdapterConfig)
        assert config.tau == float("inf")

    def test_the_base_is_found_by_the_config(self, tmp_path):
        base().save_pretrained(tmp_path / "base")
        model = type(base()).from_pretrained(tmp_path / "base")
        model = trained(adapted(model, task_type="CAUSAL_LM"))
        model.save_pretrained(tmp_path / "adapter")
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        assert torch.equal(outputs(loaded), outputs(model))

    def test_the_card_is_pefts(self, tmp_path):
        model = adapted()
        model.create_or_update_model_card(tmp_path)
        text = (tmp_path / "README.md").read_text()
        assert "library_name: peft" in text

    @transformers_adapters
    def test_transformers_own_loading(self, tmp_path):
        model = trained(adapted())
        model.save_pretrained(tmp_path)
        other = base()
        other.load_adapter(tmp_path)
        assert torch.equal(outputs(other), outputs(model))
        other.save_pretrained(tmp_path / "again")
        assert torch.equal(outputs(PeftModel.from_pretrained(base(), tmp_path / "again")), outputs(model))


def test_a_report_of_adapters():
    model = adapted(r=2)
    report, dense = condition_report(model), base()
    assert report.dense_parameters == sum(p.numel() for p in dense.parameters())
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert "parameters, " in str(report)
    assert str(report).endswith(" added")
