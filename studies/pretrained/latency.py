"""How long the compressed models take, as they are used: with S multiplied into U."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch

from hf_condlr import fold_model, is_factored

WARM_UP, ROUNDS = 2, 20


@torch.inference_mode()
def milliseconds(models: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, float]:
    """Processor time of each model for the batch: the fastest of 20 forward passes, the models taking turns.

    Other load on the machine hardly counts. Factored models are folded, in place.
    """
    folded = {name: fold_model(model) if is_factored(model) else model for name, model in models.items()}
    fastest = dict.fromkeys(folded, math.inf)
    for turn in range(WARM_UP + ROUNDS):
        for name, model in folded.items():
            start = time.process_time()
            model.eval()(**batch)
            if turn >= WARM_UP:
                fastest[name] = min(fastest[name], 1000 * (time.process_time() - start))
    return fastest
