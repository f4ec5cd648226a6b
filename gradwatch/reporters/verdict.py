"""The verdict on a run: its state in a word, its trouble in a sentence, and the questions of the morning after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gradwatch.records import ActionRecord, RunInfo
from gradwatch.reporters import words
from gradwatch.reporters.story import Chapter, Trouble, change

State = Literal["healthy", "recovered", "warning", "sick", "crashed", "empty", "unjudged"]

#: Causes that sit in no layer: a layer named with them is only where they show most.
WHOLE = frozenset({"learning_rate", "gradients_not_cleared", "weight_decay", "bad_batch", "data_scale", "rate_zero"})

#: How a state is called, and the sign that goes with it (never colour alone).
STATE_WORDS: dict[State, tuple[str, str]] = {
    "healthy": ("Healthy", "✔"),
    "recovered": ("Recovered", "↺"),
    "warning": ("Needs a look", "▲"),
    "sick": ("Sick", "✖"),
    "crashed": ("Crashed", "✖"),
    "empty": ("Empty", "○"),
    "unjudged": ("Not judged", "○"),
}


@dataclass(frozen=True, slots=True)
class Numbers:
    """The few numbers of a run that a verdict speaks of.

    Args:
        steps: How many steps are recorded.
        first: First recorded step; None for an empty run.
        last: Last recorded step; None for an empty run.
        loss: First and last finite loss; None when no loss is known.
        skipped: How many steps were skipped.
        clipped: How many steps were clipped (coefficient below 1).
        hardest_clip: The smallest clip coefficient; 1.0 when nothing was clipped.
        lr_factor: The last learning-rate factor of gradwatch's own.
        overhead: gradwatch's own share of the step time; None when not measured.
    """

    steps: int
    first: int | None = None
    last: int | None = None
    loss: tuple[float, float] | None = None
    skipped: int = 0
    clipped: int = 0
    hardest_clip: float = 1.0
    lr_factor: float = 1.0
    overhead: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a person wants to know first.

    Args:
        state: The run in one word.
        headline: Its trouble in one sentence: what, where, since when.
        facts: Question and answer, in the order in which they are asked.
    """

    state: State
    headline: str
    facts: tuple[tuple[str, str], ...] = ()

    @property
    def word(self) -> str:
        """The state as people say it."""
        return STATE_WORDS[self.state][0]

    @property
    def sign(self) -> str:
        """The sign that stands for the state."""
        return STATE_WORDS[self.state][1]


def judge(
    info: RunInfo,
    chapters: Sequence[Chapter],
    trouble: Trouble | None,
    *,
    actions: Sequence[ActionRecord],
    numbers: Numbers,
) -> Verdict:
    """The verdict on a run.

    Args:
        info: The facts of the run.
        chapters: All chapters of its story.
        trouble: What the verdict is about, from `story.trouble`.
        actions: What was done.
        numbers: The numbers it speaks of.
    """
    state = _state(info, trouble, numbers)
    notices = [c for c in chapters if trouble is None]
    headline = _headline(state, info, trouble, numbers=numbers, notices=len(notices))
    if state == "empty":
        return Verdict(state, headline)
    if trouble is None:
        return Verdict(state, headline, _quiet_facts(info, actions, numbers, notices))
    answers = (
        ("What happened first", _first(chapters, trouble.root)),
        ("What followed", _followed(trouble)),
        ("Where", _where(info, trouble.root)),
        ("Since when", _since(trouble)),
        ("Why", words.sentence(words.visible(trouble.root.lead.cause)) or "The cause is not known."),
        ("How it ended", words.sentence(words.visible(info.status_detail)) if info.status == "crashed" else ""),
        ("What was done", _done(actions, numbers)),
        ("Did it help", _helped(actions, trouble, numbers)),
        ("What to do now", _next(info, trouble)),
    )
    return Verdict(state, headline, tuple((question, answer) for question, answer in answers if answer))


def _quiet_facts(
    info: RunInfo, actions: Sequence[ActionRecord], numbers: Numbers, notices: Sequence[Chapter]
) -> tuple[tuple[str, str], ...]:
    loss = f"{words.number(numbers.loss[0])} at first, {words.number(numbers.loss[1])} at last." if numbers.loss else ""
    done = _done(actions, numbers)
    now = "Find out why the process ended." if info.status == "crashed" else ""
    why = words.sentence(words.visible(info.status_detail)) if info.status == "crashed" else ""
    seen = " ".join(f"{c.phrase} {c.when()}." for c in notices[:3])
    answers = (
        ("Why", why), ("Loss", loss), ("Also seen", seen), ("What was done", "" if done == "Nothing." else done),
        ("What to do now", now),
    )  # fmt: skip
    return tuple((question, answer) for question, answer in answers if answer)


def _state(info: RunInfo, trouble: Trouble | None, numbers: Numbers) -> State:
    if info.status == "crashed":
        return "crashed"
    if not numbers.steps:
        return "empty"
    if trouble is None:
        return "unjudged" if _detectors_were_off(info) or _failed_detectors(info) else "healthy"
    if not trouble.is_open:
        return "recovered"
    return "sick" if trouble.severity == "critical" else "warning"


def _detectors_were_off(info: RunInfo) -> bool:
    config = info.config.get("detectors")
    return not (config.get("detectors") if isinstance(config, dict) else config)


def _failed_detectors(info: RunInfo) -> bool:
    """Whether a detector broke down while the run was watched: silence is then no proof of health."""
    return any(part.startswith("detector") for part in info.overhead.get("errors") or {})


def _headline(state: State, info: RunInfo, trouble: Trouble | None, *, numbers: Numbers, notices: int) -> str:
    if state == "empty":
        return "No step has been recorded" + (" yet." if info.status == "running" else ".")
    if state == "unjudged":
        steps = words.plural(numbers.steps, "step")
        if _failed_detectors(info):
            return f"{steps} without a finding, but detectors failed: that nothing is wrong cannot be said."
        return f"{steps} recorded, but no detector was on: nothing was judged."
    said = f"{_trouble_in_words(trouble, len({p.layer for p in info.parameters}))}." if trouble else ""
    if state == "crashed":
        at = "before the first step" if numbers.last is None else f"after step {words.step(numbers.last)}"
        return f"The run crashed {at}. " + (said or "No trouble with gradients was found before.")
    so_far = " so far" if info.status == "running" else ""
    quiet = "a warning" if notices else "a finding"
    return said or f"Nothing is wrong{so_far}: {words.plural(numbers.steps, 'step')} without {quiet}."


def _trouble_in_words(trouble: Trouble, n_layers: int) -> str:
    where = trouble.root.where(n_layers)
    return " ".join(filter(None, (trouble.root.phrase, where + "," if "," in where else where, trouble.when())))


def _first(chapters: Sequence[Chapter], root: Chapter) -> str:
    said = words.visible(root.lead.message) or f"{root.phrase}."
    before = [c for c in chapters if c.severity != "info" and c.first_step < root.first_step]
    if not before:
        return said
    sign = min(before, key=lambda c: c.first_step)
    return f"{said} First sign at step {words.step(sign.first_step)}: {words.lower_first(sign.phrase)}."


def _followed(trouble: Trouble) -> str:
    told: dict[str, str] = {}
    for chapter in trouble.followed:
        if chapter.rule != trouble.root.rule and chapter.first_step >= trouble.root.first_step:
            told.setdefault(chapter.rule, f"{chapter.phrase} {chapter.when()}.")
    return " ".join(told.values())


def _since(trouble: Trouble) -> str:
    at = f"Step {words.step(trouble.root.first_step)}"
    return (
        f"{at}, and it still holds." if trouble.is_open else f"{at}; over at step {words.step(trouble.over_at or 0)}."
    )


def _where(info: RunInfo, root: Chapter) -> str:
    depth = {p.layer: p.depth for p in info.parameters}
    order = sorted(depth, key=depth.__getitem__)
    if not root.layers or root.came_with_the_loss:
        return "The whole model."
    worst = root.layers[0]
    place = f" (layer {order.index(worst) + 1:,d} of {len(order):,d} from the input)" if worst in depth else ""
    if root.lead.evidence.get("cause_id") in WHOLE and len(order) > 1:
        return f"The whole model, most in {words.shorten(worst, 64)}{place}."
    rest = [name for name in root.layers if name != worst]
    return words.shorten(worst, 64) + place + (f"; also {words.listing(rest)}" if rest else "") + "."


def _done(actions: Sequence[ActionRecord], numbers: Numbers) -> str:
    applied = [a for a in actions if not a.dry_run]
    said = []
    for name, count in Counter(a.action for a in applied).items():
        own = sorted((a for a in applied if a.action == name), key=lambda a: a.step)
        times = (
            f"at step {words.step(own[0].step)}"
            if count == 1
            else f"{count:,d} times from step {words.step(own[0].step)} on"
        )
        said.append(f"{words.visible(name)} {times}{_changed(own)}.")
    if numbers.clipped:
        share = words.percent(numbers.clipped / numbers.steps)
        hardest = words.number(numbers.hardest_clip)
        said.append(
            f"Gradients were clipped at {words.plural(numbers.clipped, 'step')} ({share}), at most to ×{hardest}."
        )
    if numbers.skipped:
        said.append(f"{words.plural(numbers.skipped, 'step')} skipped.")
    dry = len(actions) - len(applied)
    if dry:
        said.append(f"{words.plural(dry, 'action')} only noted (dry run).")
    return " ".join(said) or "Nothing."


def _changed(own: list[ActionRecord]) -> str:
    changed = change(own[0], own[-1]).rstrip(".")
    return f" ({changed})" if changed else ""


def _helped(actions: Sequence[ActionRecord], trouble: Trouble, numbers: Numbers) -> str:
    """Outcomes as recorded; where none is, whether the condition ended after the last action."""
    applied = [a for a in actions if not a.dry_run and a.step >= trouble.root.first_step]
    if not applied and trouble.is_open:
        return ""
    if not applied and not (numbers.clipped or numbers.skipped):
        return "It went over by itself."
    outcomes = Counter(a.outcome for a in applied if a.outcome)
    said = "; ".join(f"{words.visible(o)}" + (f" ({n:,d} times)" if n > 1 else "") for o, n in outcomes.most_common(4))
    now = "the trouble goes on" if trouble.is_open else f"it was over at step {words.step(trouble.over_at or 0)}"
    return words.upper_first(f"{said}; {now}." if said else f"{now}.")


def _next(info: RunInfo, trouble: Trouble) -> str:
    advice = [words.sentence(words.visible(a)) for a in trouble.root.lead.advice[:2]]
    said = " Or: ".join([advice[0], *(words.lower_first(a) for a in advice[1:])]) if advice else ""
    if trouble.is_open or info.status == "crashed":
        return said or "Look at the layers and steps named here."
    return f"Nothing at once. To keep it from coming back: {words.lower_first(said)}" if said else "Nothing at once."
