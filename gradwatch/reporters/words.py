"""How numbers, names and times are written for people: the same in every reporter."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from datetime import UTC, datetime

from gradwatch.records import NOT_MEASURED

#: What each rule says about the run, as the start of a sentence.
RULE_PHRASES = {
    "nonfinite": "Gradients become NaN or infinite",
    "exploding": "Gradients explode",
    "vanishing": "Gradients vanish",
    "spike": "Gradients spike",
    "dead": "Gradients are exactly zero",
    "imbalance": "Layers learn at very unequal rates",
    "update_ratio": "Updates are out of proportion to the weights",
    "saturation": "Activations saturate",
    "dying_relu": "ReLU units die",
    "divergence": "The loss diverges",
    "plateau": "The loss has stopped falling",
    "oscillation": "The loss oscillates",
    "underflow": "Gradients underflow",
    "unused": "Parameters never get a gradient",
    "stall": "Training stands still",
}

#: The same where one sign of a rule says something else than the others, by rule and sign.
SIGN_PHRASES = {
    ("imbalance", "scale"): "Weights are out of scale",
    ("stall", "rate"): "The learning rate is 0",
}

_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def number(value: float) -> str:
    """Three significant digits, in scientific notation where plain digits would be hard to read.

    Examples:
        >>> number(0.031249), number(1234.5), number(3e-9), number(float("nan")), number(NOT_MEASURED)
        ('0.0312', '1,230', '3e-09', 'NaN', '–')
    """
    if value == NOT_MEASURED:
        return "–"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "inf"
    rounded = float(f"{value:.3g}")
    if rounded == 0 or 1e-3 <= abs(rounded) < 1e5:
        return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:.3g}"
    return f"{rounded:.3g}"


def power(exponent: int) -> str:
    """A power of ten, as axes show it.

    Examples:
        >>> power(-12), power(-2), power(3), power(5)
        ('10⁻¹²', '0.01', '1,000', '10⁵')
    """
    if -3 <= exponent <= 3:
        return number(10.0**exponent)
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def step(value: int) -> str:
    """A step number with thousands separated.

    Examples:
        >>> step(1204311)
        '1,204,311'
    """
    return f"{value:,d}"


def percent(fraction: float) -> str:
    """A fraction as per cent; small ones keep their first digits.

    Examples:
        >>> percent(0.3219), percent(0.0042), percent(1.0)
        ('32 %', '0.42 %', '100 %')
    """
    value = 100 * fraction
    return f"{value:.0f} %" if value >= 10 or value == 0 else f"{value:.2g} %"


def size(n_bytes: float) -> str:
    """Bytes in the unit that keeps the number short.

    Examples:
        >>> size(512), size(48_300_000)
        ('512 B', '48.3 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


def duration(seconds: float) -> str:
    """A time span in its two largest units.

    Examples:
        >>> duration(0.0042), duration(0.98), duration(42), duration(3 * 3600 + 125)
        ('4.2 ms', '980 ms', '42 s', '3 h 2 min')
    """
    if seconds < 1:
        return f"{number(float(f'{1000 * seconds:.2g}'))} ms"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{n} {unit}" for n, unit in ((days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")) if n]
    return " ".join(parts[:2]) or "0 s"


def moment(unix_time: float) -> str:
    """A point in time, to the minute, in UTC.

    Examples:
        >>> moment(0)
        '1970-01-01 00:00 UTC'
    """
    return datetime.fromtimestamp(unix_time, UTC).strftime("%Y-%m-%d %H:%M UTC")


def visible(text: str) -> str:
    r"""The text with everything that could move a cursor, change a colour or turn the writing direction spelled out.

    Examples:
        >>> visible("fc\x1b[31m\nweight")
        'fc\\x1b[31m\\nweight'
    """
    if text.isprintable():
        return text
    return "".join(
        ch.encode("unicode_escape").decode() if unicodedata.category(ch) in _INVISIBLE else ch for ch in text
    )


def shorten(name: str, width: int) -> str:
    """The name in at most `width` characters: its middle gives way, the end (the most telling part) keeps more.

    Examples:
        >>> shorten("encoder.layers.11.self_attention.out_proj", 20)
        'encoder…ion.out_proj'
    """
    name = visible(name)
    if len(name) <= width:
        return name
    head = (width - 1) * 2 // 5
    return f"{name[:head]}…{name[len(name) - (width - 1 - head) :]}"


def plural(n: int, noun: str) -> str:
    """A count and its noun.

    Examples:
        >>> plural(1, "layer"), plural(1200, "step")
        ('1 layer', '1,200 steps')
    """
    return f"{n:,d} {noun}{'' if n == 1 else 's'}"


def listing(names: Sequence[str], *, most: int = 3, width: int = 48) -> str:
    """The first names and how many more there are.

    Examples:
        >>> listing(["conv1", "conv2", "fc1", "fc2", "fc3"], most=2)
        'conv1, conv2 and 3 more'
    """
    shown = [shorten(name, width) for name in names[:most]]
    rest = len(names) - len(shown)
    if rest:
        return f"{', '.join(shown)} and {rest:,d} more"
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1] if shown else "")))


def phrase(rule: str, sign: object = None) -> str:
    """What a rule, or one of its signs, says about the run; a rule of the user's own says its name in plain words.

    Examples:
        >>> phrase("exploding"), phrase("stall", "rate"), phrase("my_rule")
        ('Gradients explode', 'The learning rate is 0', 'My rule')
    """
    return SIGN_PHRASES.get((rule, str(sign))) or RULE_PHRASES.get(rule) or visible(rule).replace("_", " ").capitalize()


def lower_first(text: str) -> str:
    """The text with a small first letter, to go on in a sentence; a name in capitals stays.

    Examples:
        >>> lower_first("Gradients explode"), lower_first("ReLU units die")
        ('gradients explode', 'ReLU units die')
    """
    return text if any(ch.isupper() for ch in text[1:].partition(" ")[0]) else text[:1].lower() + text[1:]


def upper_first(text: str) -> str:
    """The text with a capital first letter.

    Examples:
        >>> upper_first("helped; over at step 12 in LSTM")
        'Helped; over at step 12 in LSTM'
    """
    return text[:1].upper() + text[1:]


def sentence(text: str) -> str:
    """The text as a sentence; nothing for nothing.

    Examples:
        >>> sentence("learning rate too high"), sentence("")
        ('Learning rate too high.', '')
    """
    text = text.strip()
    return upper_first(text) + ("" if text.endswith((".", "!", "?")) else ".") if text else ""
