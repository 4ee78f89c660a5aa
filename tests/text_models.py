"""Tiny sequence classifiers and tokenizers for the attacks on texts, built offline.

Models are built once and copied for each caller, so that no test sees what another one did to its model.
"""

import copy
from functools import cache

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

from tests.models import VOCAB, build

LABELS = 3
PAD, BOS, EOS = 0, 1, 2
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "num_labels": LABELS,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
T5 = {"d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": PAD}
BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "init_std": 0.3,
    "scale_embedding": True,
    "forced_eos_token_id": EOS,
    "decoder_start_token_id": EOS,
}
GROUPED = {"num_key_value_heads": 1}
ARCHITECTURES = {
    "Bert": {},
    "Roberta": {},
    "DistilBert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    "Albert": {"embedding_size": 12},
    "Electra": {"embedding_size": 12},
    "DebertaV2": {},
    "ModernBert": {"cls_token_id": BOS, "sep_token_id": EOS},
    "Longformer": {"attention_window": 16, "sep_token_id": EOS},
    "GPT2": {},
    "Llama": GROUPED,
    "Mistral": GROUPED,
    "Qwen3": {**GROUPED, "head_dim": 8},
    "Gemma": {**GROUPED, "head_dim": 8},
    "OPT": {"ffn_dim": 24, "word_embed_proj_dim": 12, "init_std": 0.3},
    "T5": T5,
    "Bart": BART,
}


def classifier(name, dtype=torch.float32, **overrides):
    """A random sequence classifier of an architecture, in evaluation mode."""
    return copy.deepcopy(_classifier(name, dtype, **overrides))


@cache
def _classifier(name, dtype, **overrides):
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **ARCHITECTURES.get(name, {}), **overrides})
    return build(getattr(transformers, f"{name}ForSequenceClassification"), config).to(dtype)


def token_batch(padding_side="right", vocabulary=VOCAB):
    """3 samples of 7, 5 and 7 tokens, each with one end of text as its last token; none of the words is special."""
    ids = torch.randint(4, vocabulary, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[:, -1] = EOS
    short = torch.cat([ids[1, :4], ids[1, -1:]])
    empty = torch.full((2,), PAD)
    ids[1] = torch.cat([short, empty] if padding_side == "right" else [empty, short])
    mask[1] = (ids[1] != PAD).long()
    return {"input_ids": ids, "attention_mask": mask}


# ---------------------------------------------------------------------------------------------------- tokenizers


def framed(backend, **options):
    """A fast tokenizer with BERT's frame: [CLS] text [SEP], or [CLS] first [SEP] second [SEP]."""
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        **options,
    )


FRAME = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def byte_tokenizer(**options):
    """A token for each byte; knows every character."""
    symbols = FRAME + sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, [], unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return framed(backend, **options)


def word_tokenizer(words, **options):
    """A token for each word of a list; others are [UNK]."""
    backend = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate([*FRAME, *words])}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return framed(backend, **options)


def bert_for(tokenizer, labels=2):
    """A tiny BERT for a tokenizer."""
    special = {"bos_token_id": None, "eos_token_id": None}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 128}
    return classifier("Bert", num_labels=labels, initializer_range=0.1, **special, **sizes)


# ------------------------------------------------------------------------------------------------ a trained model


GOOD, BAD = ["good", "great", "fine", "lovely", "superb"], ["awful", "poor", "dull", "weak", "boring"]
FILLER = ["the", "film", "was", "and", "plot", "actors", "is", "with", "music", "a"]


def reviews(number, seed=0):
    """Reviews of 12 words, 3 to 5 of them opinions, and whether the good ones are more."""
    generator = torch.Generator().manual_seed(seed)

    def draw(words, k):
        return [words[i] for i in torch.randint(len(words), (k,), generator=generator)]

    texts, labels = [], []
    for i in range(number):
        many, few = int(torch.randint(2, 4, (), generator=generator)), int(torch.randint(0, 2, (), generator=generator))
        label = i % 2
        opinions = draw((BAD, GOOD)[label], many + few) + draw((GOOD, BAD)[label], few)
        words = opinions + draw(FILLER, 12 - len(opinions))
        texts.append(" ".join(words[j] for j in torch.randperm(12, generator=generator)))
        labels.append(label)
    return texts, torch.tensor(labels)


def trained_reviewer():
    """A tiny BERT that tells good reviews from bad ones, and its tokenizer; of more than 95 % accuracy."""
    return copy.deepcopy(_trained_reviewer())


@cache
def _trained_reviewer():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = word_tokenizer(GOOD + BAD + FILLER)
        model = bert_for(tokenizer).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        texts, labels = reviews(256)
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(**batch).logits, labels).backward()
            optimizer.step()
        optimizer.zero_grad()
        model.eval()
        texts, labels = reviews(128, seed=1)
        accuracy = (model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.argmax(1) == labels).float()
    assert accuracy.mean() > 0.95, accuracy.mean()
    return model, tokenizer
