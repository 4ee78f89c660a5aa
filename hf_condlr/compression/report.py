"""`CompressionReport`: what a model was and what became of it; a table, JSON, Markdown, a picture."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from hf_condlr.compression.search import Point
from hf_condlr.errors import MissingExtraError
from hf_condlr.files import replacing
from hf_condlr.options import finite_json
from hf_condlr.tables import markdown_table

STEPS = {
    "dense": "measuring dense",
    "search": "searching",
    "factored": "converting",
    "recovered": "recovering",
    "compressed": "measuring compressed",
}
REPORT, PAGE, PICTURE = "report.json", "report.md", "quality.png"


@dataclass
class ModelMeasures:
    """Measurements of one form of the model; None for what was not measured, or could not be."""

    parameters: int
    bytes: int
    multiply_adds: int
    """For one sample."""
    latency_ms: float | None = None
    """For one sample, on this machine."""
    quality: float | None = None
    robust: dict[str, float] = field(default_factory=dict)
    """{attack and ε: accuracy under it}."""
    clean_of_attacked: float | None = None
    """Accuracy without an attack of the samples that were attacked."""
    largest_kappa: float | None = None


@dataclass
class CompressionReport:
    """Result of `compress`; `str()` is the table with what it was measured on."""

    metric: str
    """Name of the quality: `accuracy`, or `perplexity`."""
    ratio: float
    """Share of the converted layers' weights that was removed, counted in the form that is saved."""
    tau: float
    form: str
    """What is saved: `factored`, `folded` or `pivoted`."""
    dense: ModelMeasures
    factored: ModelMeasures
    folded: ModelMeasures
    pivoted: ModelMeasures
    ranks: dict[str, int]
    """The rank of each factored layer."""
    seconds: dict[str, float]
    """Time of each step, a key of `STEPS`."""
    data: dict[str, Any]
    """What the rows of each purpose were, and how many."""
    curve: list[Point] = field(default_factory=list)
    """Ratios that the search for `max_drop` tried."""
    max_drop: float | None = None
    recovery_steps: int = 0
    quality_before_recovery: float | None = None
    failed_checks: list[str] = field(default_factory=list)
    """Reasons to doubt the accuracies under attack."""
    versions: dict[str, str] = field(default_factory=dict)

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of the table: measure, dense, factored, folded, pivoted."""
        forms = (self.dense, self.factored, self.folded, self.pivoted)
        return [
            ("parameters", *(f"{form.parameters:,}" for form in forms)),
            ("bytes", *(f"{form.bytes:,}" for form in forms)),
            ("multiply-adds of a sample", *(f"{form.multiply_adds:,}" for form in forms)),
            ("latency of a sample, ms", *(_number(form.latency_ms, ".2f") for form in forms)),
            (self._title(), *(self._quality(form.quality) for form in forms)),
            *(
                [("clean accuracy of the attacked", *(_number(form.clean_of_attacked, ".1%") for form in forms))]
                if self.dense.robust
                else []
            ),
            *(
                (f"accuracy under {name}", *(_number(form.robust.get(name), ".1%") for form in forms))
                for name in self.dense.robust
            ),
            ("largest κ", *(_kappa(form) for form in forms)),
        ]

    def table(self) -> str:
        """The table in Markdown, and below it what was measured on which rows, and how long it took."""
        header = ("", "dense", "compressed: U, S, V", "compressed, folded", "compressed, pivoted")
        return markdown_table(header, self.rows(), align="lr") + "\n\n" + "\n".join(self.notes())

    def notes(self) -> list[str]:
        """What the table does not say."""
        data, total = self.data, sum(self.seconds.values())
        steps = ", ".join(f"{STEPS[name]} {seconds:.0f}" for name, seconds in self.seconds.items())
        bound = f"κ ≤ {1 + self.tau:g}" if math.isfinite(self.tau) else "κ not bounded"
        lines = [
            f"{self.ratio:.1%} of the converted layers' weights are removed, counted in the form that is saved "
            f"({self.form}): {len(self.ranks)} layers of ranks {min(self.ranks.values())} to "
            f"{max(self.ranks.values())}, {bound}. The other forms compute the same as U, S, V, to rounding.",
            f"{self.metric.capitalize()} on {data['evaluation_rows']:,} samples of {data['evaluation']}"
            + (f", {data['attacked']:,} of which were attacked" if self.dense.robust else "")
            + f"; calibrated on {data['calibration_rows']:,} samples of train. "
            f"Multiply-adds and latency are those of an input of {data['sample']}.",
            f"{total:.0f} seconds: {steps}; on {data['device']}, {data['threads']} threads.",
        ]
        if self.recovery_steps:
            before = self._quality(self.quality_before_recovery) + (" %" if self.metric == "accuracy" else "")
            lines.append(f"Before the recovery of {self.recovery_steps:,} steps: {self.metric} {before}.")
        if self.max_drop is not None:
            unit = "points of accuracy" if self.metric == "accuracy" else "percent of the perplexity"
            tried = ", ".join(f"{p.ratio:.3g}: {'—' if p.drop is None else f'{p.drop:+.2f}'}" for p in self.curve)
            lines.append(
                f"Largest ratio that costs at most {self.max_drop:g} {unit} on {data['selection_rows']:,} samples of "
                f"{data['selection']}, before any recovery; tried ({unit} lost): {tried}."
            )
        return lines + [f"A check of the attacks failed: {check}" for check in self.failed_checks]

    def __str__(self) -> str:
        rows = [("", "dense", "U, S, V", "folded", "pivoted"), *self.rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", *self.notes()])

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON values; an infinite number is None."""
        return finite_json(asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; τ of None is infinite."""
        forms = {name: ModelMeasures(**values[name]) for name in ("dense", "factored", "folded", "pivoted")}
        tau = math.inf if values["tau"] is None else values["tau"]
        return cls(**values | forms | {"tau": tau, "curve": [Point(**point) for point in values["curve"]]})

    def save(self, folder: str | Path) -> None:
        """Write `report.md`, `quality.png` after a search where matplotlib is installed, and `report.json`, last."""
        folder = Path(folder)
        picture = ""
        if self.curve:
            with suppress(MissingExtraError):
                picture = f"\n\n![{self.metric} and κ over the size]({self.plot(folder / PICTURE).name})"
        for name, text in ((PAGE, self.table() + picture), (REPORT, json.dumps(self.to_dict(), indent=1))):
            with replacing(folder / name) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote."""
        return cls.from_dict(json.loads((Path(folder) / REPORT).read_text(encoding="utf-8")))

    def plot(self, path: str | Path) -> Path:
        """Draw the curve of the search: quality over the size of the full model, and κ beside it.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            remedy = "pip install 'hf_condlr[plot]'."
            raise MissingExtraError("plot needs matplotlib", received="no such package", remedy=remedy) from error
        scale = 100 if self.metric == "accuracy" else 1
        points = [point for point in self.curve if point.quality is not None]
        sizes = [100 * point.parameters / self.dense.parameters for point in points]
        figure = Figure(figsize=(9.4, 3.7), layout="constrained")
        left, right = figure.subplots(1, 2)
        values = [scale * point.quality for point in points if point.quality is not None]
        left.plot(sizes, values, "o-", color="#2b6cb0", markersize=5, label="compressed, nothing trained after it")
        if self.max_drop is not None and (dense := self.data.get("selection_quality")) is not None:
            least = dense - self.max_drop / 100 if scale == 100 else dense * (1 + self.max_drop / 100)
            left.axhline(scale * dense, color="#666666", lw=1, label="dense")
            left.axhline(scale * least, color="#c1432e", lw=1, ls="--", label=f"max_drop = {self.max_drop:g}")
        chosen = [(x, y) for x, y, p in zip(sizes, values, points, strict=True) if p.ratio == self.ratio]
        left.plot(*zip(*chosen, strict=True), "o", color="#c1432e", markersize=9, label="chosen") if chosen else None
        left.set(xlabel="parameters of the full model, % of dense", ylabel=self._title())
        left.legend(frameon=False, fontsize=8)
        right.plot(sizes, [point.largest_kappa for point in points], "o-", color="#d1802f", markersize=5)
        if math.isfinite(self.tau):
            right.axhline(1 + self.tau, color="#c1432e", lw=1, ls="--", label="1 + τ")
            right.legend(frameon=False, fontsize=8)
        right.set(xlabel="parameters of the full model, % of dense", ylabel="largest κ")
        right.set_ylim(bottom=1)
        for axes in (left, right):
            axes.grid(alpha=0.25)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=150, format=Path(path).suffix.lstrip(".") or "png")
        return Path(path)

    def _title(self) -> str:
        return "clean accuracy, %" if self.metric == "accuracy" else self.metric

    def _quality(self, value: float | None) -> str:
        return _number(None if value is None else 100 * value, ".2f") if self.metric == "accuracy" else _number(value)


def _kappa(form: ModelMeasures) -> str:
    """κ; JSON has no infinity, so that it is None of a form that was measured."""
    is_infinite = form.largest_kappa is None and form.quality is not None
    return "∞" if is_infinite else _number(form.largest_kappa, ",.4g")


def _number(value: float | None, shape: str = ".4g") -> str:
    if value is None:
        return ""
    return format(value, shape) if math.isfinite(value) else "∞"
