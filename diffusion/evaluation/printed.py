"""Reports for terminals: names and values in columns, and what is common to all numbers once below them."""

import math
import shutil
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence

from diffusion.evaluation.report import Measurement, parts_of

WIDEST = 100  # columns
FEW = 4  # numbers of a measurement have a line each; of more, several are in one
DIGITS = 4
TOGETHER = "\N{NO-BREAK SPACE}"


def terminal_width() -> int:
    """Returns how wide a report is to be printed: as the terminal, at most `WIDEST`."""
    return max(40, min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns))


def print_report(
    title: str, measurements: Sequence[Measurement], about: Mapping[str, str | int | float], width: int | None = None
) -> str:
    """Returns a report as text within `width` columns, the terminal's by default.

    What most of the numbers share is said once below them, what others have instead in notes.
    """
    width = terminal_width() if width is None else width
    facts = [facts_of(one) for one in measurements]
    shared = {name: Counter(one[name] for one in facts).most_common(1)[0][0] for name in (facts[0] if facts else ())}
    rows: list[tuple[str, str]] = []
    notes: list[str] = []
    for one, own in zip(measurements, facts, strict=True):
        differs = ", ".join(value for name, value in own.items() if value not in ("", shared[name]))
        said = "; ".join(filter(None, (differs, one.note)))
        if said:
            notes.append(said)
        rows += lines_of(one.name + (f" [{len(notes)}]" if said else ""), parts_of(one))
    lines = [title, *wrap(", ".join(f"{name} {value}" for name, value in about.items()), width), ""]
    if rows:
        every = ", ".join(filter(None, shared.values()))
        lines += [*columns(rows, width), "", *wrap(f"Where no note says otherwise: {every}.", width)]
    for number, note in enumerate(notes, 1):
        lines += wrap(note, width, f"[{number}] ")
    return "\n".join(lines).rstrip() + "\n"


def wrap(text: str, width: int, mark: str = "") -> list[str]:
    """Returns the lines of a text after a mark, indented as it is."""
    lines = textwrap.wrap(
        text,
        width,
        initial_indent=mark,
        subsequent_indent=" " * len(mark),
        break_on_hyphens=False,
        break_long_words=False,
    )
    return [line.replace(TOGETHER, " ") for line in lines]


def facts_of(one: Measurement) -> dict[str, str]:
    """Returns how a number was made, in words; "" for what it has not."""
    reference = one.reference
    count = f", {reference.count} images" if reference and reference.count else ""
    seeds = ", ".join(map(str, one.seeds))
    return {
        "count": f"{one.num_samples} samples",
        "sampler": one.sampler + (f", {one.num_steps} steps" if one.num_steps else ""),
        "seeds": f"seed{'s' * (len(one.seeds) > 1)} {seeds}" if seeds else "",
        "ema": "" if one.ema is None else f"EMA {one.ema}",
        "features": f"features: {one.features}",
        "reference": f"compared with {reference.name} {reference.split}{count}" if reference else "",
    }


def lines_of(name: str, parts: Mapping[str, float]) -> list[tuple[str, str]]:
    """Returns the lines of a measurement as (name, value): its mean with its error, then its other parts."""
    rest = dict(parts)
    if "" in rest or "mean" in rest:
        value = rest.pop("" if "" in rest else "mean")
        error = next((rest.pop(key) for key in ("standard error", "deviation over splits") if key in rest), None)
        ends = [rest.pop(key) for key in ("min", "max") if key in rest]
        mean = number(value)
        if error:
            decimals = decimals_of(error, 2)
            mean = f"{value:.{decimals}f} ± {error:.{decimals}f}"
        mean += f" ({number(ends[0])} to {number(ends[1])} over the seeds)" if len(ends) == 2 else ""
        first = (name, mean)
    else:
        first = (name, "")
    if len(rest) > FEW:
        decimals = decimals_of(max(map(abs, rest.values())), 3)
        several = ", ".join(f"{part}:{TOGETHER}{value:.{decimals}f}" for part, value in rest.items())
        return [(name, f"{first[1]}, {several}" if first[1] else several)]
    return [first, *((f"  {part}", number(value)) for part, value in rest.items())]


def number(value: float, digits: int = DIGITS) -> str:
    """Returns a number with so many digits; tiny and huge ones as powers of ten."""
    return f"{value:#.{digits}g}".rstrip(".") if value and 1e-4 <= abs(value) < 10**digits else f"{value:.{digits}g}"


def decimals_of(value: float, digits: int) -> int:
    """Returns the decimals with which a number has so many digits, 0 to 9."""
    return min(9, max(0, digits - 1 - math.floor(math.log10(abs(value))))) if value else digits


def columns(rows: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Returns names and values in two columns, the values' decimal points beneath each other."""
    left = min(max(len(name) for name, _ in rows), width // 2) + 2
    before = [math.inf if not value or ":" in value else len(whole(value)) for _, value in rows]
    most = max((int(length) for length in before if length < math.inf), default=0)
    lines = []
    for (name, value), length in zip(rows, before, strict=True):
        pad = left + (most - int(length) if length < math.inf else 0)
        beside = wrap(value, width - pad) or [""]
        named = wrap(name.lstrip(), left - 2, " " * (len(name) - len(name.lstrip())))
        for i in range(max(len(beside), len(named))):
            text = named[i] if i < len(named) else ""
            lines.append((text.ljust(pad) + (beside[i] if i < len(beside) else "")).rstrip())
    return lines


def whole(value: str) -> str:
    """Returns what is before the decimal point of the number that a text begins with."""
    return value.split(" ")[0].partition(".")[0].partition("e")[0]
