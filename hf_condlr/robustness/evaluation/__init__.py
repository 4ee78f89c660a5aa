"""Adversarial evaluation: accuracy under attack over a data set, the checks that make it trusted, and its report."""

from hf_condlr.robustness.evaluation.checks import Check
from hf_condlr.robustness.evaluation.comparison import RobustnessComparison, compare
from hf_condlr.robustness.evaluation.data import load_split
from hf_condlr.robustness.evaluation.evaluate import evaluate_robustness
from hf_condlr.robustness.evaluation.report import AttackResult, RobustnessReport, plot_reports

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
