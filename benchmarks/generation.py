"""Tokens a second of a language model, dense against folded: the prompt and the decoding apart.

All models run in one process, in turns, so that the ratios hold on a machine that others use, too. Factors are random:
time does not depend on their values. Beside each ratio stands its limit: the operations of the prompt, two for each of
the blocks' weights and token, of which the head computes the last one only; and the bytes of the weights that one token
reads while decoding, the head's included.

    python -m benchmarks.generation --model path/to/smollm2-135m
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.models import DTYPES
from benchmarks.timing import CommonOptions, in_turn, ratios, run, seconds, spread
from hf_condlr import CondLRConfig, fold_model, get_robust_lowrank_model
from hf_condlr.options import option
from hf_condlr.tables import markdown_table
from studies.record import any_device

PARTS = ("prompt", "decoding")


@dataclass
class Options(CommonOptions):
    """What is measured."""

    model: str = option("smollm2-135m", "Folder of a causal language model.")
    compression_ratios: list[float] = option([0.2, 0.4, 0.6], "Shares removed, counted folded.")
    batch_sizes: list[int] = option([1, 8], "Texts at a time.")
    prompt: int = option(128, "Tokens of the prompt.")
    new_tokens: int = option(16, "Tokens to decode.")
    dtype: str = option("float32", ", ".join(DTYPES))
    rank_multiple: int = option(8, "Ranks are rounded down to multiples of it.")


class Decoding:
    """The next tokens of a batch after its prompt, with a cache of keys and values."""

    def __init__(self, model: Any, prompt: Tensor, new_tokens: int) -> None:
        self.model, self.prompt, self.new_tokens = model, prompt, new_tokens
        self.state: Any = None

    @torch.no_grad()
    def read(self) -> None:
        """Run the prompt; only its last logits are needed."""
        self.state = self.model(input_ids=self.prompt, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def write(self) -> None:
        """Decode greedily."""
        for _ in range(self.new_tokens):
            token = self.state.logits[:, -1:].argmax(-1)
            name = "cache" if "cache" in self.state else "past_key_values"  # until transformers 5.23
            self.state = self.model(input_ids=token, use_cache=True, **{name: self.state[name]})


def folded(dense: nn.Module, ratio: float, rank_multiple: int) -> nn.Module:
    """A folded copy with random factors."""
    config = CondLRConfig(
        compression_ratio=ratio, compression_form="folded", rank_multiple=rank_multiple, init_weights="orthogonal"
    )
    return fold_model(get_robust_lowrank_model(copy.deepcopy(dense), config)).eval()


def weights(model: Any) -> tuple[int, int]:
    """Weights of the matrices that a token is multiplied by: without the head, and with it."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    blocks = sum(p.numel() for p in model.parameters() if p.dim() > 1 and p is not table and p is not head)
    return blocks, blocks + head.numel()


def measure(options: Options) -> Iterator[list[dict[str, Any]]]:
    """A row for each batch size and model, with the ratios to dense round by round."""
    device = any_device()
    dense: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=DTYPES[options.dtype]).to(device).eval()
    models: dict[str, Any] = {"dense": dense}
    for ratio in options.compression_ratios:
        models[f"{100 * ratio:.0f} % removed"] = folded(dense, ratio, options.rank_multiple)
    rows: list[dict[str, Any]] = []
    for size in options.batch_sizes:
        prompt = torch.randint(dense.config.vocab_size, (size, options.prompt), device=device)
        calls = {name: Decoding(model, prompt, options.new_tokens) for name, model in models.items()}
        timed = {}
        for name, call in calls.items():
            timed[f"{name}, prompt"] = partial(seconds, call.read, device)
            timed[f"{name}, decoding"] = partial(seconds, call.write, device)
        found = in_turn(timed, options.rounds)  # in this order: each decoding goes on after its prompt
        for name, model in models.items():
            row: dict[str, Any] = {"model": name, "batch_size": size}
            for k, (part, tokens) in enumerate(zip(PARTS, (options.prompt, options.new_tokens), strict=True)):
                row[f"{part} limit"] = weights(dense)[k] / weights(model)[k]
                row[f"{part} tokens/s"] = size * tokens / statistics.median(found[f"{name}, {part}"])
                row[f"{part} speedup"] = ratios(found[f"dense, {part}"], found[f"{name}, {part}"])
            rows.append(row)
        yield rows


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each batch size and model."""
    header = ["texts", "model"]
    header += [text for part in PARTS for text in (f"{part}, tokens/s", "of dense", "limit")]
    lines = []
    for row in rows:
        parts = [[row[f"{part} {kind}"] for kind in ("tokens/s", "speedup", "limit")] for part in PARTS]
        values = [text for rate, speedup, limit in parts for text in (f"{rate:,.0f}", spread(speedup), f"{limit:.2f}")]
        lines.append([str(row["batch_size"]), row["model"], *values])
    return markdown_table(header, lines)


if __name__ == "__main__":
    run(Options, measure, table)
