"""What machine this is, how fast it is, and whether the tests marked `gpu` pass there.

The rates are those of products of large square matrices in each precision, of stacks of small ones in float64, which
is what conditioning takes, and of a copy: what the floors of floors.py divide by, as this card reaches them.

    python -m benchmarks.gpu.environment
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.manifold_step import in_tf32
from benchmarks.timing import CommonOptions, run, seconds
from hf_condlr.options import option
from hf_condlr.tables import markdown_table
from studies.record import any_device, version_of

PACKAGES = ("torch", "transformers", "accelerate", "peft", "safetensors", "huggingface_hub", "triton", "datasets")
OUTCOME = re.compile(r"(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)")


@dataclass
class Options(CommonOptions):
    """What is measured."""

    size: int = option(8192, "Rows of the large matrices.")
    stack: int = option(72, "Small matrices in a stack.")
    rank: int = option(189, "Rows of the small ones.")
    tests: str = option("tests/gpu", "Where the tests marked gpu are.")


def best(call: Any, device: torch.device, rounds: int) -> float:
    """Least seconds of `rounds` calls, after one that warms up."""
    call()
    return min(seconds(call, device) for _ in range(rounds))


def rates(options: Options, device: torch.device) -> dict[str, float]:
    """TFLOP/s of products, and TB/s of a copy, bytes read and written."""
    n, r = options.size, options.rank
    found = {}
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        A = torch.randn(n, n, device=device, dtype=dtype)
        found[name] = 2e-12 * n**3 / best(lambda A=A: A @ A, device, options.rounds)
    A = torch.randn(n, n, device=device)
    with in_tf32():
        found["TF32"] = 2e-12 * n**3 / best(lambda: A @ A, device, options.rounds)
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
        X = torch.randn(options.stack, r, r, device=device, dtype=dtype)
        elapsed = best(lambda X=X: X @ X, device, options.rounds)
        found[f"{name}, {options.stack} of {r}×{r}"] = 2e-12 * options.stack * r**3 / elapsed
    target = torch.empty_like(A)
    found["copy, TB/s"] = 2e-12 * A.nbytes / best(lambda: target.copy_(A), device, options.rounds)
    return found


def run_tests(folder: str) -> dict[str, str]:
    """{test marked gpu: passed, failed, error or skipped}; what pytest prints is printed."""
    arguments = ["-v", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", folder]
    outcomes = {}
    with subprocess.Popen([sys.executable, "-m", "pytest", *arguments], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            if found := OUTCOME.match(line):
                outcomes[found[1]] = found[2].lower()
    return outcomes


def measure(options: Options) -> Iterator[dict[str, Any]]:
    """The machine; then its rates; then the outcomes of the tests."""
    device = any_device()
    machine: dict[str, Any] = {"device": str(device), "platform": platform.platform()}
    machine["packages"] = {name: version_of(name) for name in PACKAGES}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {"card": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
        machine["multiprocessors"] = properties.multi_processor_count
    yield {"machine": machine}
    results = {"machine": machine, "rates": rates(options, device)}
    yield results
    yield results | {"tests": run_tests(options.tests)}


def table(results: dict[str, Any]) -> str:
    """The card, the rates, and what did not pass."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    parts = [f"{machine.get('card', 'no GPU')}; {versions}"]
    if "rates" in results:
        lines = [[name, f"{value:.3g}"] for name, value in results["rates"].items()]
        parts.append(markdown_table(["TFLOP/s of products", "reached"], lines, align="lr"))
    if "tests" in results:
        outcomes = list(results["tests"].values())
        parts.append("Tests marked gpu: " + ", ".join(f"{outcomes.count(kind)} {kind}" for kind in sorted({*outcomes})))
        parts += [f"- {name}: {end}" for name, end in results["tests"].items() if end in ("failed", "error")]
    return "\n\n".join(parts)


if __name__ == "__main__":
    run(Options, measure, table)
