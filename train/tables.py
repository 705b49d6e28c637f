"""Tables as HTML; their texts are escaped here."""

import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

NO_NUMBER = "\N{EN DASH}"


def number(value: float) -> str:
    """Whole numbers in full, others with four significant digits; an en dash where there is no number."""
    if not math.isfinite(value):
        return NO_NUMBER
    if float(value).is_integer() and abs(value) < 1e12:
        return f"{value:,.0f}"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.3g}"
    return f"{value:.4g}"


def bar_table(head: Sequence[str], rows: Sequence[Sequence[str | float]], caption: str) -> str:
    """A table whose second column is drawn as bars as well; words and numbers as given."""
    bars = [float(row[1]) for row in rows]
    top = max([bar for bar in bars if math.isfinite(bar)], default=0.0) or 1.0
    body = "".join(_bar_row(row, 100 * bar / top) for row, bar in zip(rows, bars, strict=True))
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    return _scroll(
        f'<table class="bars"><caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table>",
        caption,
    )


def _bar_row(row: Sequence[str | float], percent: float) -> str:
    share = percent if math.isfinite(percent) else 0.0
    cells = [f'<th scope="row">{escape(str(row[0]))}</th>']
    for nth, cell in enumerate(row[1:]):
        if isinstance(cell, str):
            cells.append(f"<td>{escape(cell)}</td>")
            continue
        bar = f'<i style="--w:{share:.2f}%"></i>' if nth == 0 else ""
        value = f' data-value="{cell:.9g}"' if math.isfinite(cell) else ""
        cells.append(f"<td{value}>{bar}<span>{number(cell)}</span></td>")
    return f"<tr>{''.join(cells)}</tr>"


def fact_table(facts: dict[str, Any], caption: str) -> str:
    """Names and values."""
    rows = "".join(
        f'<tr><th scope="row">{escape(name).replace("_", "_<wbr>")}</th><td>{escape(_text(value))}</td></tr>'
        for name, value in facts.items()
    )
    table = f'<table class="facts"><caption>{escape(caption)}</caption><tbody>{rows}</tbody></table>'
    return _scroll(table, caption)


def plain_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, links: dict[str, str]
) -> str:
    """Texts, the first of each row as its heading; those in `links` lead to an address."""

    def cell(text: str) -> str:
        shown = escape(text)
        return f'<a href="{escape(links[text])}">{shown}</a>' if text in links else shown

    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{cell(row[0])}</th>'
        + "".join(f"<td>{cell(text)}</td>" for text in row[1:])
        + "</tr>"
        for row in rows
    )
    return _scroll(
        f"<table><caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>",
        caption,
    )


def number_table(
    values: npt.NDArray[np.float64], axes: tuple[str, str], names: tuple[list[str], list[str]], title: str
) -> str:
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in names[1])
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{number(value) if math.isfinite(value) else ''}</td>" for value in row)
        + "</tr>"
        for name, row in zip(names[0], values.tolist(), strict=True)
    )
    corner = f"<th>{escape(axes[0])} ↓ {escape(axes[1])} →</th>"
    return _scroll(f"<table><thead><tr>{corner}{heads}</tr></thead><tbody>{body}</tbody></table>", title)


def _scroll(table: str, label: str) -> str:
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{table}</div>'


def _text(value: Any) -> str:
    if value is None or value == "":
        return NO_NUMBER
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or NO_NUMBER
    return str(value)
