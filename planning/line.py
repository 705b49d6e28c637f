"""A line of what `clt plan` says: a value, its text, and the formula that gave it."""

from typing import Any, NamedTuple


class Line(NamedTuple):
    section: str
    key: str
    value: Any
    """For --json"""
    text: str
    formula: str


def render(lines: list[Line], explain: bool) -> str:
    """As text for a terminal; explain: each line with its formula below."""
    shown, section = [], ""
    for line in lines:
        shown.append(f"{line.section if line.section != section else '':<10}{line.text}")
        section = line.section
        if explain:
            shown.append(f"{'':<12}= {line.formula}")
    return "\n".join(shown)


def to_json(lines: list[Line], explain: bool) -> dict[str, Any]:
    """{section: {key: value}}; explain: and {"formulas": {section.key: text}}."""
    found: dict[str, Any] = {}
    for line in lines:
        found.setdefault(line.section, {})[line.key] = line.value
    if explain:
        found["formulas"] = {f"{line.section}.{line.key}": line.formula for line in lines}
    return found


def parts_text(parts: dict[str, int]) -> str:
    return " + ".join(f"{name} {size_text(size)}" for name, size in parts.items() if size)


def size_text(size: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size:.0f} B"


def count_text(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def hours_text(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.1f} s"
