"""`Stages`: results of the steps of a long run, kept in a folder, so that a run that was killed resumes."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_condlr.errors import ConfigError, require
from hf_condlr.files import replacing

logger = logging.getLogger(__name__)
FOLDER = "stages"
SETTINGS = "settings.json"


class Stages:
    """The steps of a run in `folder`; each is done once, and its result is written when it is complete.

    Args:
        folder: Output folder of the run: new, empty, or of the same run.
        settings: Everything that the results depend on, as JSON values.

    Raises:
        ConfigError: The folder holds something else, or a run with other settings.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]) -> None:
        self.folder = Path(folder) / FOLDER
        settings = json.loads(json.dumps(settings, default=str))
        path, parent = self.folder / SETTINGS, Path(folder)
        remedy = "Name a new folder."
        is_file = parent.exists() and not parent.is_dir()
        require(
            not is_file, "output_dir must be a folder", received=f"the file {parent}", remedy=remedy, error=ConfigError
        )
        done = sorted(entry.stem for entry in self.folder.glob("*.json") if entry != path)
        if path.is_file() and done:
            self._require_same(settings, json.loads(path.read_text(encoding="utf-8")))
            logger.warning("%s resumes: %s is done", parent, ", ".join(done))
            return
        others = sorted(entry.name for entry in parent.iterdir() if entry != self.folder) if parent.is_dir() else []
        rule = "output_dir must be new, empty, or of a run to resume"
        received = f"{parent} with {', '.join(others[:3])}{' and more' if len(others) > 3 else ''}"
        require(not others, rule, received=received, remedy=remedy, error=ConfigError)
        self._write(path, settings)

    def run(self, name: str, step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a step, JSON values, computed now or earlier; `seconds` is its time, or what it states."""
        path = self.folder / f"{name}.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        start = time.perf_counter()
        result = step()
        self._write(path, {"seconds": round(time.perf_counter() - start, 2)} | result)
        return json.loads(path.read_text(encoding="utf-8"))

    def remove(self, *names: str) -> None:
        """Remove folders of steps whose results are no longer needed."""
        for name in names:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _write(self, path: Path, values: dict[str, Any]) -> None:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def _require_same(self, settings: dict[str, Any], old: dict[str, Any]) -> None:
        names = sorted({*settings, *old})
        changed = [f"{k} {old.get(k)!r} → {settings.get(k)!r}" for k in names if old.get(k) != settings.get(k)]
        rule = f"the run in {self.folder.parent} must be resumed with its own model, data and settings"
        remedy = "Choose another output_dir, or remove the folder to begin again."
        require(not changed, rule, received=", ".join(changed), remedy=remedy, error=ConfigError)
