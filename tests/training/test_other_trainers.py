"""Trainers of other libraries: TRL's, sentence-transformers', and transformers' with PEFT's models."""

import copy
import json
import logging
import random
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from hf_condlr import CondLRCallback, FactoredTrainerMixin, condition_report
from tests.training.test_accumulation import peft_gpt2, token_data
from tests.training.tiny import SIZES, AfterEachStep, arguments, assert_equal_weights, convert, dense_bert

pytestmark = pytest.mark.filterwarnings("ignore")  # of the other libraries
WORDS = ["the", "a", "cat", "dog", "runs", "sits", "on", "under", "mat", "tree", "fast", "slow"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


@pytest.fixture
def tokenizer():
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    bare = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ("pad_token", "bos_token", "eos_token", "unk_token")
    return PreTrainedTokenizerFast(tokenizer_object=bare, **dict(zip(names, SPECIAL, strict=True)))


def sentences(count, length=4):
    generator = random.Random(0)
    return [" ".join(generator.choices(WORDS, k=length)) for _ in range(count)]


def settings(folder, **options):
    defaults = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "bf16": False, "learning_rate": 1e-2}
    steps = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "logging_steps": 2}
    return {"output_dir": str(folder), "save_strategy": "steps", "save_steps": 2} | defaults | steps | options


SCORES = {2: 9.0, 4: 5.0, 6: 7.0, 8: 3.0}  # of the steps; step 2 is in the warm-up
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
EVALUATION = {"eval_strategy": "steps", "eval_steps": 2}


def check(make, model, folder, cls):
    """The guarantee after each of 8 steps, the same end after a resume, and the best model: that of step 6."""
    kept = {}

    class Scored(FactoredTrainerMixin, cls):
        def evaluate(self, *args, **kwargs):
            step = self.state.global_step
            kept[step] = copy.deepcopy(self.model.state_dict())
            return super().evaluate(*args, **kwargs) | {"eval_score": SCORES[step]}

    other, watch = copy.deepcopy(model), AfterEachStep()
    callbacks = [CondLRCallback(warmup_ratio=0.3), watch]
    trainer = make(Scored, model, callbacks, settings(folder, **BEST, **EVALUATION))
    trainer.train()
    assert watch.steps == 8
    assert "eval_kappa_bound" in trainer.state.log_history[-2]
    assert trainer.state.best_global_step == 6
    last = copy.deepcopy(kept[8])
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, kept[6][name]), name
    resumed = make(Scored, other, [CondLRCallback(warmup_ratio=0.3)], settings(folder, **EVALUATION))
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, last[name]), name


def llama(cls=LlamaForCausalLM, **options):
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return convert(cls(LlamaConfig(vocab_size=16, num_key_value_heads=2, **SIZES, **tokens, **options)), rank_ratio=0.4)


def test_sft(tmp_path, tokenizer):
    trl = pytest.importorskip("trl")
    rows = Dataset.from_dict({"text": sentences(16, 6)})

    def make(cls, model, callbacks, options):
        data = {"train_dataset": rows, "eval_dataset": rows, "processing_class": tokenizer}
        return cls(model=model, args=trl.SFTConfig(max_length=16, **options), callbacks=callbacks, **data)

    check(make, llama(), tmp_path, trl.SFTTrainer)


def test_dpo(tmp_path, tokenizer):
    """With its own reference: DPO would load the checkpoint that the model came from."""
    trl = pytest.importorskip("trl")
    texts = [" " + text for text in sentences(32)]
    rows = Dataset.from_dict({"prompt": sentences(16), "chosen": texts[:16], "rejected": texts[16:]})

    def make(cls, model, callbacks, options):
        data = {"train_dataset": rows, "eval_dataset": rows, "processing_class": tokenizer}
        args = trl.DPOConfig(max_length=16, **options)
        return cls(model=model, ref_model=copy.deepcopy(reference), args=args, callbacks=callbacks, **data)

    reference = llama()
    check(make, copy.deepcopy(reference), tmp_path, trl.DPOTrainer)


def test_a_dense_reference_is_said(tmp_path, tokenizer, caplog):
    """`ref_model=None` of a model that was converted in memory."""
    trl = pytest.importorskip("trl")

    class Factored(FactoredTrainerMixin, trl.DPOTrainer):
        pass

    dense = LlamaForCausalLM(LlamaConfig(vocab_size=16, num_key_value_heads=2, pad_token_id=0, **SIZES))
    dense.save_pretrained(tmp_path / "dense")
    model = convert(LlamaForCausalLM.from_pretrained(tmp_path / "dense"), rank_ratio=0.4)
    texts = [" " + text for text in sentences(8)]
    rows = Dataset.from_dict({"prompt": sentences(4), "chosen": texts[:4], "rejected": texts[4:]})
    args = trl.DPOConfig(max_length=16, **settings(tmp_path / "out"))
    with caplog.at_level(logging.WARNING, logger="hf_condlr"):
        Factored(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    assert "the reference model is dense, and the trained one is factored" in caplog.text


def test_reward(tmp_path, tokenizer):
    trl = pytest.importorskip("trl")
    rows = Dataset.from_dict({"chosen": sentences(16), "rejected": sentences(16, 5)})

    def make(cls, model, callbacks, options):
        data = {"train_dataset": rows, "eval_dataset": rows, "processing_class": tokenizer}
        return cls(model=model, args=trl.RewardConfig(max_length=16, **options), callbacks=callbacks, **data)

    check(make, llama(LlamaForSequenceClassification, num_labels=1), tmp_path, trl.RewardTrainer)


def test_sentence_transformers(tmp_path, tokenizer):
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from sentence_transformers.models import Pooling, Transformer

    sizes = SIZES | {"vocab_size": 16}
    convert(BertModel(BertConfig(**sizes)), rank_ratio=0.4).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    texts = sentences(32)
    rows = Dataset.from_dict({"first": texts[:16], "second": texts[16:]})
    model = st.SentenceTransformer(modules=[Transformer(str(tmp_path / "base")), Pooling(16)], device="cpu")

    def make(cls, model, callbacks, options):
        args = st.SentenceTransformerTrainingArguments(**options)
        loss = MultipleNegativesRankingLoss(model)
        return cls(model=model, args=args, train_dataset=rows, eval_dataset=rows, loss=loss, callbacks=callbacks)

    check(make, model, tmp_path / "out", st.SentenceTransformerTrainer)
    model.save_pretrained(str(tmp_path / "final"))
    assert_equal_weights(model, st.SentenceTransformer(str(tmp_path / "final"), device="cpu"))


def test_a_peft_model_whose_factors_train(tmp_path):
    """PEFT saves only its adapter; the factors are saved next to it."""
    rows = token_data(16)

    def make(cls, model, callbacks, options):
        args = TrainingArguments(**options)
        return cls(model=model, args=args, train_dataset=rows, eval_dataset=rows, callbacks=callbacks)

    check(make, peft_gpt2(), tmp_path, Trainer)
    assert {"adapter_model.safetensors", "condlr_factors.safetensors"} <= {
        path.name for path in (tmp_path / "checkpoint-8").iterdir()
    }


def test_a_peft_model_whose_factors_are_frozen(tmp_path):
    """Nothing moves the factors, and nothing but the adapter is saved."""
    model = convert(dense_bert())
    model = get_peft_model(model, LoraConfig(target_modules=["classifier"]))
    args = arguments(tmp_path, TrainingArguments, save_strategy="steps", save_steps=2, max_steps=2)
    with torch.no_grad():
        for layer in condition_report(model).layers:
            assert layer.condition_number > 1.1  # κ_0, which no step may leave
    trainer = Trainer(model=model, args=args, train_dataset=token_data(8), callbacks=[CondLRCallback()])
    with pytest.raises(ValueError, match="a frozen S must obey its bound already"):
        trainer.train()


def test_the_weights_are_among_the_files_that_are_pushed(tmp_path):
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    for name in ("condlr.safetensors", "condlr-00001-of-00002.safetensors", "optimizer.pt"):
        (folder / name).write_text("")
    args, state = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=7)
    CondLRCallback().on_push_begin(args, state, None)
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {
        "condlr.safetensors",
        "condlr-00001-of-00002.safetensors",
    }


def test_the_state_is_strict_json(tmp_path):
    args = arguments(tmp_path, TrainingArguments, save_strategy="steps", save_steps=6)
    rows = [{"input_ids": torch.randint(0, 40, (7,)), "labels": i % 2} for i in range(48)]
    model = convert(dense_bert(), tau="inf")
    Trainer(model=model, args=args, train_dataset=rows, callbacks=[CondLRCallback()]).train()
    text = (tmp_path / "checkpoint-6" / "trainer_state.json").read_text()
    stored = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert stored["stateful_callbacks"]["CondLRCallback"]["attributes"]["schedule"]["step_count"] == 6
