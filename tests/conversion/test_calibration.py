"""What a model gets of a calibration batch: decoders run on labels, and their padding does not count."""

import pytest
import torch
from datasets import Dataset
from torch import nn

from hf_condlr import CondLRConfig, get_robust_lowrank_model
from hf_condlr.conversion.measuring import input_covariances, output_fisher
from hf_condlr.errors import ConversionError
from tests.conversion.test_architectures import build
from tests.models import bert

PAIRS = {  # name: a decoder's own layer, one that reads the encoder's output
    "BART": ("model.decoder.layers.0.fc1", "model.decoder.layers.0.encoder_attn.k_proj"),
    "mT5": ("decoder.block.0.layer.2.DenseReluDense.wi_0", "decoder.block.0.layer.1.EncDecAttention.k"),
    "Whisper": ("model.decoder.layers.0.fc1", "model.decoder.layers.0.encoder_attn.k_proj"),
}


def pair_batch(case):
    """Source and target of equal length, each with padding of its own."""
    model, inputs = build(case)
    inputs = {name: x for name, x in inputs.items() if name != "decoder_input_ids"}
    labels = torch.arange(3, 15).reshape(2, 6)
    labels[0, 2:] = -100
    if "input_ids" in inputs:
        inputs["attention_mask"] = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    return model, inputs | {"labels": labels}


def recorded(model, name, batch):
    rows = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: rows.append(args[0]))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return rows[0]


@pytest.mark.parametrize("case", PAIRS)
def test_a_decoder_is_calibrated_on_the_labels_and_each_side_on_its_own_tokens(case):
    model, batch = pair_batch(case)
    own, reads_encoder = PAIRS[case]
    target, source = batch["labels"] != -100, batch.get("attention_mask", torch.ones(2, 10)).bool()
    found = input_covariances(model, PAIRS[case], [batch])
    for name, mask in ((own, target), (reads_encoder, source)):
        X = recorded(model, name, batch)[mask]
        assert len(X) == mask.sum()
        torch.testing.assert_close(found[name], X.mT @ X / len(X), rtol=1e-4, atol=1e-5)


def test_decoder_inputs_of_the_batch_come_before_its_labels():
    """A model without a head accepts no labels; a mask of the decoder's own says which tokens count."""
    model, batch = pair_batch("BART")
    name = "decoder.layers.0.fc1"
    inputs = {"decoder_input_ids": torch.arange(5, 17).reshape(2, 6), "decoder_attention_mask": torch.ones(2, 6)}
    inputs["decoder_attention_mask"][1, 3:] = 0
    found = input_covariances(model.model, [name], [batch | inputs])[name]
    given = {key: value for key, value in batch.items() if key != "labels"} | inputs
    X = recorded(model.model, name, given)[inputs["decoder_attention_mask"].bool()]
    torch.testing.assert_close(found, X.mT @ X / 9, rtol=1e-4, atol=1e-5)


def test_the_fisher_matrix_of_a_decoder_counts_the_labels_only():
    """Labels of −100 draw no ŷ: another padding of the target changes nothing."""
    model, batch = pair_batch("BART")
    name = "model.encoder.layers.0.fc1"
    shorter = {**batch, "labels": batch["labels"][:1, :2], "input_ids": batch["input_ids"][:1]}
    shorter["attention_mask"] = batch["attention_mask"][:1]
    padded = {key: value[:1] for key, value in batch.items()}
    expected = output_fisher(model, [name], [shorter])[name]
    torch.testing.assert_close(output_fisher(model, [name], [padded])[name], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("case", ["BART", "mT5"])
def test_a_decoder_without_labels_is_an_error_that_says_so(case):
    model, batch = pair_batch(case)
    del batch["labels"]
    with pytest.raises(ConversionError, match="must hold what its decoder runs on; received neither labels"):
        input_covariances(model, [PAIRS[case][0]], [batch])


def second_moment_of_gradients(model, name, batch, factors):
    """E_ŷ[g gᵀ] = Jᵀ cov J with J the Jacobian of the logits z; `factors` (B, C, C) is cov(∂ log p/∂z)."""
    kept = []
    hook = model.get_submodule(name).register_forward_hook(lambda module, args, output: kept.append(output))
    logits = model(**batch).logits
    hook.remove()
    total = 0
    for i in range(len(logits)):
        J = torch.stack([torch.autograd.grad(z, kept[0], retain_graph=True)[0][i] for z in logits[i]])  # (C, T, m)
        total = total + torch.einsum("ctm,cd,dtn->mn", J.double(), factors[i].double(), J.double())
    return total / len(logits)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_the_likelihood_is_that_of_the_model(problem):
    """cov(∂ log p/∂z) is diag(σ(z)(1 − σ(z))) for independent classes, I for a Gaussian of variance 1."""
    labels = 3 if problem == "multi_label_classification" else 1
    model = bert(num_labels=labels, problem_type=problem)
    batch = {"input_ids": torch.arange(2, 26).reshape(4, 6)}
    p = model(**batch).logits.detach().sigmoid()
    factors = torch.diag_embed(p * (1 - p)) if labels == 3 else torch.ones(4, 1, 1)
    name = "bert.encoder.layer.1.output.dense"
    expected = second_moment_of_gradients(model, name, batch, factors)
    found = output_fisher(model, [name], [batch] * 300)[name]
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_the_likelihood_is_inferred_as_transformers_infers_it():
    batch = {"input_ids": torch.arange(2, 26).reshape(4, 6)}
    name = "bert.encoder.layer.1.output.dense"
    for given, problem in (
        ({"num_labels": 1}, "regression"),
        ({"labels": torch.ones(4, 5)}, "multi_label_classification"),
        ({"labels": torch.ones(4, dtype=torch.long)}, "single_label_classification"),
    ):
        count = given.pop("num_labels", 5)
        expected = output_fisher(bert(num_labels=count, problem_type=problem), [name], [batch])[name]
        torch.testing.assert_close(output_fisher(bert(num_labels=count), [name], [batch | given])[name], expected)


@pytest.mark.parametrize(
    ("data", "received"),
    [
        (["a text", "another"], "received a str"),
        ([{"input_ids": "a text"}], "received input_ids: a str"),
        ([{"texts": torch.ones(2)}], "received texts: a tensor"),
        (Dataset.from_dict({"input_ids": [[2, 3, 4], [5, 6, 7]]}), "received input_ids: a list"),
    ],
    ids=["strings", "dict of strings", "foreign keys", "data set"],
)
def test_data_that_are_no_batches_are_an_error_that_names_the_remedy(data, received):
    config = CondLRConfig(r=2, init_weights="activation_aware")
    with pytest.raises(ConversionError, match=rf"batches of tensors .*{received}.*Pass a DataLoader with the collator"):
        get_robust_lowrank_model(bert(), config, calibration_data=data)


def test_what_the_model_does_not_accept_is_shown_with_its_own_error():
    with pytest.raises(ConversionError, match=r"the Linear accepts; received a tensor \(2, 4\): RuntimeError"):
        input_covariances(nn.Linear(3, 3), [""], [torch.ones(2, 4)])
