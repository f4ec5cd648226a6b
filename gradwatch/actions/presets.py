"""Ready-made sets of remedies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gradwatch.actions.adaptive import ZClip
from gradwatch.actions.base import Action
from gradwatch.actions.lr import DecayLR
from gradwatch.actions.raise_lr import RaiseLR
from gradwatch.actions.renewal import Reinitialize, Restructure, Stop
from gradwatch.actions.rollback import Rollback
from gradwatch.actions.skip import SkipStep
from gradwatch.errors import ConfigurationError, UnknownNameError


class Ladder(list[Action]):
    """Actions in the order of escalation: the next is tried only when the one before did not help.

    A plain list is ordered by how much its actions mend instead.

    Examples:
        >>> len(Ladder([SkipStep(), DecayLR(), Rollback(), Stop()]))
        4
    """


def protect() -> Ladder:
    """What no healthy run feels: skip what is not finite, clip what stands out.

    Examples:
        >>> [action.name for action in protect()]
        ['SkipStep', 'ZClip']
    """
    # Of 144 healthy runs (122,400 steps), 5 clips in 66, 10 in 9; the published 2.5 clips every fortieth step.
    return Ladder([SkipStep(), ZClip(threshold=10.0)])


def repair(*, restructure: bool = False) -> Ladder:
    """`protect`; then, one after the other: lower the rate, roll back, initialise again, (rebuild,) stop.

    Args:
        restructure: Whether the architecture may be changed before giving up.

    Examples:
        >>> [action.name for action in repair()][2:]
        ['DecayLR', 'Rollback', 'RaiseLR', 'Reinitialize', 'Stop']
    """
    remedies: list[Action] = [
        # A loss that has diverged does not come back from a smaller rate alone.
        DecayLR(
            factor=0.3,
            on=("exploding", "spike", "oscillation", "update_ratio"),
            cooldown=10,
            within=40,
            tries=3,
            min_factor=1e-6,
            recover=500,
            hold=200,
        ),
        Rollback(on=(*Rollback.default_on, "update_ratio"), factor=0.3, every=50, cooldown=5, max_times=8),
        RaiseLR(),
        Reinitialize(on=(*Reinitialize.default_on, "stall", "imbalance")),
    ]
    if restructure:
        # An output that lets no gradient through is mended first: that keeps all weights.
        remedies.insert(3, Restructure(changes=("output",), tries=1))
        remedies.append(Restructure(changes=("activation", "norm"), tries=2))
    return Ladder([*protect(), *remedies, Stop(confirm=200)])


PRESETS: dict[str, Callable[[], Ladder]] = {
    "protect": protect,
    "repair": repair,
    "rebuild": lambda: repair(restructure=True),
}


def chosen(actions: str | Sequence[Action]) -> Sequence[Action]:
    """The actions, or those of the preset of that name.

    Raises:
        UnknownNameError: No such preset.
        ConfigurationError: Neither a list nor a name.
    """
    if not isinstance(actions, (str, Sequence)):
        raise ConfigurationError.of("actions", "a list of gradwatch actions or the name of a preset", actions)
    if not isinstance(actions, str):
        return actions
    if actions not in PRESETS:
        raise UnknownNameError.among("preset of actions", actions, PRESETS)
    return PRESETS[actions]()
