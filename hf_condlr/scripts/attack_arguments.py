"""`AttackArguments`: the options of a training script that attack the trained model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_condlr.options import option
from hf_condlr.robustness.attacks import Attack, make_attacks
from hf_condlr.robustness.evaluation import RobustnessReport, evaluate_robustness
from hf_condlr.scripts.checks import check


@dataclass
class AttackArguments:
    """Attacks: on the trained classifier, on the test split."""

    attacks: list[str] = field(
        default_factory=list, metadata={"help": "pgd-linf, pgd-linf-margin, fgsm, ...; for texts pgd-embedding, ..."}
    )
    epsilons: list[str] = field(
        default_factory=list, metadata={"help": "Budgets of each attack (8/255): of pixels in [0, 1], shares of texts."}
    )
    attack_steps: int | None = option(None, "Gradient steps of the attacks that have them.")
    max_attack_samples: int | None = option(None, "Attack this many samples, the same for every model; by default all.")
    attack_checks: bool = option(True, "Look for signs that the attacks failed.")

    def __post_init__(self) -> None:
        most = self.max_attack_samples
        check(most is None or most >= 1, "max_attack_samples must be ≥ 1", most, "Leave it out to attack all.")
        given = [name for name in ("attacks", "epsilons") if getattr(self, name)]
        check(len(given) != 1, "attacks and epsilons belong together", f"{given} alone", "Give both, or neither.")
        self.make_attacks()  # checks the values

    def make_attacks(self, *takes: str) -> list[Attack]:
        """Each attack with each budget.

        Args:
            takes: Inputs that may be attacked: "pixels", or "tokens" and "texts"; by default anything.

        Raises:
            ConfigError: An attack is for other data.
            AttackError: An unknown name, or a value that an attack does not take.
        """
        attacks = make_attacks(self.attacks, self.epsilons, steps=self.attack_steps) if self.attacks else []
        others = [attack.name for attack in attacks if takes and attack.takes not in takes]
        check(not others, f"attacks must be on {' or '.join(takes)}", ", ".join(others), "Choose others.")
        return attacks

    def require_unsharded(self, trainer: Trainer) -> None:
        """Raise a ConfigError if FSDP shards a model that will be attacked, at the end or in training."""
        asked = {*self.attacks, getattr(trainer.args, "adversarial_attack", "none")} - {"none"}
        rule = "attacks need the full model on every process, and FSDP shards it"
        remedy = "Leave the attacks out, attack the saved model, or use DDP."
        check(not asked or not trainer.is_fsdp_enabled, rule, ", ".join(sorted(asked)), remedy)

    def evaluate(self, trainer: Trainer, dataset: Any, split: str) -> tuple[dict[str, float], RobustnessReport | None]:
        """Attack the trained model; batches that are done are kept in `output_dir/attacks` for a restart.

        Args:
            trainer: Trainer whose model is attacked; its `processing_class` prepares the data.
            dataset: Images or texts and labels, as `evaluate_robustness` takes them.
            split: Name of the data in the metrics.

        Returns:
            Metrics such as test_accuracy_pgd_linf_0.05 and test_robust_accuracy, and the report; without attacks none.
        """
        attacks = self.make_attacks()
        if not attacks:
            return {}, None
        report = evaluate_robustness(
            trainer.accelerator.unwrap_model(trainer.model),
            dataset,
            attacks,
            processor=trainer.processing_class,
            accelerator=trainer.accelerator,
            batch_size=trainer.args.eval_batch_size,
            checks=self.attack_checks,
            max_samples=self.max_attack_samples,
            output_dir=Path(str(trainer.args.output_dir)) / "attacks",
            progress=not trainer.args.disable_tqdm,
        )
        found = {f"accuracy_{r.name.replace('-', '_')}_{r.epsilon:g}": r.robust_accuracy for r in report.attacks}
        found |= {"robust_accuracy": report.robust_accuracy, "attacked_samples": report.samples}
        return {f"{split}_{name}": value for name, value in found.items()}, report
