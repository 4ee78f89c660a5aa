"""Attacks by name, for the command line, YAML files and the Trainer's arguments."""

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
from hf_condlr.robustness.attacks.robustdlrt import L2FGSM, Jitter
from hf_condlr.robustness.attacks.square import Square

# What builds each attack from `epsilon` and its options.
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


def make_attack(name: str, epsilon: float | str, **options: Any) -> Attack:
    """The attack of that name.

    Args:
        name: A key of `ATTACKS`.
        epsilon: Budget, a number or a fraction such as "8/255"; for corruptions a severity from 1 to 5.
        options: Other parameters of the attack; None stands for the default.

    Raises:
        AttackError: There is no such attack, or it does not have such an option, or not such a value.
    """
    known = options_of(name)
    options = {option: value for option, value in options.items() if value is not None}
    unknown = sorted(set(options) - set(known))
    require(not unknown, f"{name} takes the options {', '.join(known)}", ", ".join(unknown), "Drop the others.")
    return ATTACKS[name](epsilon=parse_epsilon(epsilon), **options)


def make_attacks(names: Iterable[str], epsilons: Iterable[float | str], **options: Any) -> list[Attack]:
    """Every attack at every budget; each is given the options that it has.

    Raises:
        AttackError: See `make_attack`; or there is an option that none of the attacks has.
    """
    names = list(names)
    given = {option for option, value in options.items() if value is not None}
    require(names, "at least one attack must be named", "none", f"Choose among {', '.join(ATTACKS)}.")
    taken = {name: given & set(options_of(name)) for name in names}
    ignored = sorted(given - set().union(*taken.values()))
    require(not ignored, f"one of {', '.join(names)} must have each option", ", ".join(ignored), "Drop it.")
    budgets = [parse_epsilon(epsilon) for epsilon in epsilons]
    require(budgets, "at least one epsilon must be given", "none", "For example 4/255 or 0.05.")
    return [make_attack(n, e, **{option: options[option] for option in taken[n]}) for n in names for e in budgets]


def options_of(name: str) -> list[str]:
    """The parameters of an attack, including `epsilon` and those that its name fixes."""
    require(name in ATTACKS, f"attack must be one of {', '.join(ATTACKS)}", repr(name), "Choose one.")
    build: Any = ATTACKS[name]
    return [field.name for field in fields(getattr(build, "func", build))]


def parse_epsilon(value: float | str) -> float:
    """The value of a number, or of a fraction such as "8/255".

    Raises:
        AttackError: The value is neither.
    """
    above, slash, below = str(value).partition("/")
    try:
        return float(above) / (float(below) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        require(False, "epsilon must be a number or a fraction", repr(value), "For example 0.03 or 8/255.")
        raise  # never reached
