"""Attacks by name, as the command line, YAML files and the Trainer's arguments give them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

from hf_condlr.robustness.attacks.autoattack import AutoAttack
from hf_condlr.robustness.attacks.base import Attack, require
from hf_condlr.robustness.attacks.characters import CharacterAttack
from hf_condlr.robustness.attacks.corruptions import KINDS, Corruption
from hf_condlr.robustness.attacks.embeddings import EmbeddingFGM, EmbeddingPGD, EmbeddingSearch
from hf_condlr.robustness.attacks.gradient import FGSM, PGD
from hf_condlr.robustness.attacks.published import L2FGSM, Jitter
from hf_condlr.robustness.attacks.square import Square

ATTACKS: Mapping[str, Callable[..., Attack]] = {
    "fgsm": FGSM,
    "fgsm-unclipped": partial(FGSM, clip=False),
    "fgm-l2": partial(FGSM, norm="l2"),
    **{
        f"pgd-{norm}" + ("" if loss == "ce" else f"-{loss}"): partial(PGD, norm=norm, loss=loss)
        for norm in ("linf", "l2")
        for loss in ("ce", "margin", "dlr")
    },
    "square-linf": partial(Square, norm="linf"),
    "square-l2": partial(Square, norm="l2"),
    "autoattack-linf": partial(AutoAttack, norm="linf"),
    "autoattack-l2": partial(AutoAttack, norm="l2"),
    "l2-fgsm": L2FGSM,
    "jitter": Jitter,
    **{kind: partial(Corruption, kind) for kind in KINDS},
    "fgm-embedding": EmbeddingFGM,
    "pgd-embedding": EmbeddingPGD,
    "search-embedding": EmbeddingSearch,
    "characters": CharacterAttack,
}


"""{name: what builds the attack from `epsilon` and its options}."""


def make_attack(name: str, epsilon: float | str, **options: Any) -> Attack:
    """The attack of that name.

    Args:
        name: A key of `ATTACKS`.
        epsilon: Its budget, a number or a fraction such as "8/255"; a severity of 1 to 5 for corruptions.
        options: Its other parameters; one that is None keeps its default.

    Raises:
        AttackError: No such attack, an option that it does not have, or a value that it does not take.
    """
    known = options_of(name)
    options = {option: value for option, value in options.items() if value is not None}
    unknown = sorted(set(options) - set(known))
    require(not unknown, f"{name} takes the options {', '.join(known)}", ", ".join(unknown), "Drop the others.")
    return ATTACKS[name](epsilon=parse_epsilon(epsilon), **options)


def make_attacks(names: Iterable[str], epsilons: Iterable[float | str], **options: Any) -> list[Attack]:
    """Every attack at every budget; each takes those of the options that it has.

    Raises:
        AttackError: As `make_attack`; or none of the attacks has an option that is given.
    """
    names = list(names)
    given = {option for option, value in options.items() if value is not None}
    require(names, "at least one attack must be named", "none", f"Choose of {', '.join(ATTACKS)}.")
    taken = {name: given & set(options_of(name)) for name in names}
    ignored = sorted(given - set().union(*taken.values()))
    require(not ignored, f"one of {', '.join(names)} must have each option", ", ".join(ignored), "Drop it.")
    budgets = [parse_epsilon(epsilon) for epsilon in epsilons]
    require(budgets, "at least one epsilon must be given", "none", "4/255 or 0.05, say.")
    return [make_attack(n, e, **{option: options[option] for option in taken[n]}) for n in names for e in budgets]


def options_of(name: str) -> list[str]:
    """The parameters of the attack of that name, `epsilon` and those that the name says among them."""
    require(name in ATTACKS, f"attack must be one of {', '.join(ATTACKS)}", repr(name), "Choose one.")
    build: Any = ATTACKS[name]
    return [field.name for field in fields(getattr(build, "func", build))]


def parse_epsilon(value: float | str) -> float:
    """A number, or a fraction of two numbers as text, such as "8/255".

    Raises:
        AttackError: It is neither.
    """
    above, slash, below = str(value).partition("/")
    try:
        return float(above) / (float(below) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        require(False, "epsilon must be a number or a fraction", repr(value), "0.03 or 8/255, say.")
        raise  # never reached
