"""Adversarial evaluation: accuracy under attack over a data set, the checks that make it trusted, and its report."""

from hf_condlr.robustness.evaluation.comparison import RobustnessComparison, compare
from hf_condlr.robustness.evaluation.evaluate import evaluate_robustness
from hf_condlr.robustness.evaluation.report import AttackResult, Check, RobustnessReport, plot_reports
from hf_condlr.robustness.evaluation.rows import load_split

__all__ = [
    "AttackResult",
    "Check",
    "RobustnessComparison",
    "RobustnessReport",
    "compare",
    "evaluate_robustness",
    "load_split",
    "plot_reports",
]
