"""Everything that a GPU must answer, in one command and a limited time.

Each part is a process of its own with a limit, at which it is killed; what it had written by then is kept. Time that a
part leaves is shared by those after it. In the output folder: a record NAME.json of each part, `log.txt` with all that
they printed, and `summary.md`, rewritten after each part.

    python -m benchmarks.gpu --output outputs/gpu --minutes 9
    python -m benchmarks.gpu --smoke true
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from benchmarks.gpu.parts import PARTS, Part
from hf_condlr.files import replacing
from hf_condlr.options import option

NO_GPU = "Without a GPU: nothing below says anything about one."


@dataclass
class Options:
    """What is run, and where the records go."""

    output: str = option("outputs/gpu", "Folder of the records.")
    minutes: float = option(9.0, "For everything.")
    smoke: bool = option(False, "Tiny sizes, which also run on a CPU: whether everything works, not how fast.")
    parts: list[str] = option([part.name for part in PARTS], "Which parts, in their usual order.")


def limits(shares: list[float], left: float) -> float:
    """Seconds of the first of several parts, of which so many are left."""
    return left * shares[0] / sum(shares)


def run_part(part: Part, folder: Path, seconds: float, smoke: bool) -> str:
    """Run a part to its end or its limit; returns how it ended."""
    path = folder / f"{part.name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, *part.command(seconds, smoke), str(path)]
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        log.write(f"\n$ {' '.join(command[1:])}\n")
        log.flush()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and the processes that it started
            process.wait()
    return f"killed at its limit of {seconds:.0f} s" if code is None else "done" if code == 0 else f"exit code {code}"


def summary(folder: Path, ends: dict[str, tuple[str, float]]) -> str:
    """Markdown: for each part its question, its tables, its command, how it ended and how long it took."""
    sections = ["# On a GPU"]
    for part in PARTS:
        if part.name not in ends:
            continue
        end, seconds = ends[part.name]
        path = folder / f"{part.name}.json"
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if "machine" in record and len(sections) == 1:
            sections.append(record["machine"] + ("" if "NVIDIA" in record["machine"] else f". {NO_GPU}"))
        sections.append(f"## {part.name}\n\n{part.question}")
        sections.append(record.get("table", "No results."))
        command = f"`{record['command']}`, " if record else ""
        sections.append(f"{command}{end}, {seconds:.0f} s.")
    return "\n\n".join(sections) + "\n"


def main() -> None:
    """Run the parts and print the summary; the exit code is that of a failure if a part did not end by itself."""
    (options,) = HfArgumentParser(Options, allow_abbrev=False).parse_args_into_dataclasses()
    parts = [part for part in PARTS if part.name in options.parts]
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").unlink(missing_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    ends: dict[str, tuple[str, float]] = {}
    for i, part in enumerate(parts):
        start = time.monotonic()
        seconds = limits([x.share for x in parts[i:]], deadline - start)
        end = run_part(part, folder, seconds, options.smoke)
        ends[part.name] = end, time.monotonic() - start
        with replacing(folder / "summary.md") as temporary:
            temporary.write_text(summary(folder, ends), encoding="utf-8")
    print((folder / "summary.md").read_text(encoding="utf-8"))
    sys.exit(any(end != "done" for end, _ in ends.values()))


if __name__ == "__main__":
    main()
