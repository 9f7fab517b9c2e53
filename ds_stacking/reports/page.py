"""One self-contained HTML page: style, tables and charts inside, nothing loaded, no script.

It is dark or light as the reader's device is, and one column on a phone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from ds_stacking.reports.figure import COLOURS, THEME


def _variables(theme: int) -> str:
    return " ".join(f"--{name}: {colours[theme]};" for name, colours in THEME.items())


STYLE = (
    f":root {{ color-scheme: light dark; {_variables(0)} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {_variables(1)} }} }}"
    """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 1rem; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { max-width: 75ch; margin: .4rem 0; overflow-wrap: anywhere; }
.first { font-size: 1.2rem; font-weight: 600; margin: .6rem 0 .8rem; }
.dim, figcaption { color: var(--dim); font-size: .875rem; }
.cards, .charts { display: grid; gap: .75rem; }
.cards { grid-template-columns: repeat(auto-fit, minmax(min(100%, 9.5rem), 1fr)); }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
@media (min-width: 46rem) { .charts:has(> :nth-child(4):last-child) { grid-template-columns: 1fr 1fr; } }
.card { background: var(--card); border-radius: 8px; padding: .6rem .8rem; font-size: .8125rem; color: var(--dim); }
.card b { display: block; font-size: 1.25rem; color: var(--text); font-variant-numeric: tabular-nums; }
figure { margin: 0; background: var(--card); border-radius: 8px; padding: .6rem; } svg { display: block; width: 100%; }
figure > b { font-size: .9375rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--dim); font-weight: 600; } th:first-child, td:first-child { text-align: left; padding-left: 0;
  position: sticky; left: 0; background: var(--ground); }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; font-size: .875rem; margin: .5rem 0; }
.legend i { display: inline-block; width: 1.1em; height: 4px; border-radius: 2px; margin-right: .45em;
  vertical-align: .2em; background: var(--c); }
svg * { stroke-linecap: butt; stroke-linejoin: round; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); border-radius: 8px; padding: .8rem; }
""" + "".join(f".c{i} {{ --c: var(--c{i}); }}\n" for i in range(len(COLOURS)))
)


def page(title: str, parts: Iterable[str]) -> str:
    """The page of `parts`, which are HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def heading(text: str) -> str:
    """A section's heading."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, *, dim: bool = False) -> str:
    """A paragraph; `dim` for an explanation."""
    return f'<p class="dim">{escape(text)}</p>' if dim else f"<p>{escape(text)}</p>"


def strong(text: str) -> str:
    """The first thing to read on a page."""
    return f'<p class="first">{escape(text)}</p>'


def cards(figures: Iterable[tuple[str, str]]) -> str:
    """Figures (value, meaning), each large on a card."""
    inner = "".join(f'<div class="card"><b>{escape(value)}</b>{escape(name)}</div>' for value, name in figures)
    return f'<div class="cards">{inner}</div>'


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; on a phone it scrolls by itself."""
    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def legend(names: Iterable[tuple[int, str]]) -> str:
    """Colours (their numbers) and what they stand for."""
    return (
        '<div class="legend">' + "".join(f'<span class="c{c}"><i></i>{escape(n)}</span>' for c, n in names) + "</div>"
    )


def charts(figures: Iterable[tuple[str, str]]) -> str:
    """Charts (title, SVG) side by side where there is room; those without data are left out."""
    inner = "".join(f"<figure><b>{escape(title)}</b>{svg}</figure>" for title, svg in figures if svg)
    return f'<div class="charts">{inner}</div>'
