"""HTML from templates that escape whatever is put into them, and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


Cell = str | Html


def html(template: str, *values: object) -> Html:
    """A template (a literal of ours, never anything from outside) with values for each {}, escaped if not `Html`."""
    return Html(template.format(*(value if isinstance(value, Html) else escape(str(value)) for value in values)))


def joined(parts: Iterable[Html]) -> Html:
    """One after the other."""
    return Html("".join(parts))


def table(
    caption: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], empty: str, third: bool = False
) -> Html:
    """A table; the first cell of a row is its header.

    columns: their titles; those that begin with "#" are of numbers, and right-aligned.
    empty: what is said where there are no rows. third: it is narrow, and shares its line with others.
    """
    title = html("<h2>{}</h2>", caption)
    kind = Html(' class="third"') if third else Html("")
    if not rows:
        return html('<section{}>{}<p class="note">{}</p></section>', kind, title, empty)
    numeric = [column.startswith("#") for column in columns]
    heads = joined(
        html('<th scope="col"{}>{}</th>', _align(right), column.removeprefix("#"))
        for column, right in zip(columns, numeric, strict=True)
    )
    body = joined(
        html(
            '<tr><th scope="row">{}</th>{}</tr>',
            first,
            joined(html("<td{}>{}</td>", _align(right), cell) for cell, right in zip(rest, numeric[1:], strict=True)),
        )
        for first, *rest in rows
    )
    # Wide ones are scrolled, by keyboard too.
    return html(
        '<section{}><div class="wide" tabindex="0" role="region" aria-label="{}"><table><caption>{}</caption>'
        "<thead><tr>{}</tr></thead><tbody>{}</tbody></table></div></section>",
        kind,
        caption,
        title,
        heads,
        body,
    )


def _align(right: bool) -> Html:
    return Html(' class="n"') if right else Html("")
