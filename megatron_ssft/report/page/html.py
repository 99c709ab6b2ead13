"""One HTML page out of sections: no script, nothing loaded from elsewhere, every text from the data escaped."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from megatron_ssft.report.exhibits import Exhibit, Picture, Section, TableData

# Whatever might slip through, a browser neither loads nor runs it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
LARGEST_SVG = 200_000
"""Bytes; a chart with more is shown as PNG."""

CSS = """
:root{color-scheme:light dark;--ink:#1f2328;--soft:#59636e;--paper:#fffffe;--page:#f3f5f7;--line:#d1d9e0;
--link:#0a5cad}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#a5aeb8;--paper:#161b22;--page:#0d1117;--line:#3d444d;
--link:#79b8ff}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--page);color:var(--ink);overflow-wrap:anywhere;
font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main,header,nav,footer{max-width:1180px;margin:0 auto;padding:0 16px}
header{padding-top:28px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .5rem}
h2{font-size:1.35rem;margin:2.4rem 0 .5rem;padding-bottom:.3rem;border-bottom:2px solid var(--line)}
h3{font-size:1.08rem;margin:0 0 .6rem}
p,ul{margin:.5rem 0}
section>p,section>ul,header p{max-width:80ch}
a{color:var(--link)}
nav ul{display:flex;flex-wrap:wrap;gap:0 1.2rem;list-style:none;padding:0}
nav a{display:inline-block;padding:.3rem 0}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,500px),1fr));gap:16px;margin:1rem 0}
.card{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:16px;min-width:0;margin:0}
.card img{display:block;width:100%;max-width:540px;height:auto;margin:0 auto}
figcaption{margin-top:.6rem}figcaption p{margin:.3rem 0}
details{margin-top:.6rem}
summary{cursor:pointer;color:var(--link);padding:.25rem 0}
.scroll{overflow-x:auto;margin:.4rem 0;max-width:100%}
table{border-collapse:collapse;font-size:.9rem;line-height:1.35}
caption{text-align:left;font-weight:600;padding:.2rem 0 .4rem}
caption span{display:inline-block;position:sticky;left:0;max-width:min(70ch,calc(100vw - 3rem))}
th,td{padding:.3rem .7rem .3rem 0;border-bottom:1px solid var(--line);
text-align:left;vertical-align:top;max-width:42ch;min-width:3.2rem}
tbody th{font-weight:500;min-width:6rem}
.facts td{min-width:7rem}
.num td,.num thead th+th{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.num td.words{text-align:left;white-space:normal;min-width:14rem}
.rule{color:var(--soft);font-size:.85rem;margin:.2rem 0 0;max-width:80ch}
.missing{color:var(--soft)}
footer{color:var(--soft);font-size:.85rem;padding-top:2rem;padding-bottom:2rem}
:focus-visible{outline:3px solid var(--link);outline-offset:2px}
@media (max-width:480px){main,header,nav,footer{padding-left:8px;padding-right:8px}
.card{padding:8px;border-radius:8px}h1{font-size:1.4rem}}
@media print{.grid{display:block}.card{break-inside:avoid;margin-bottom:12px}}
"""


def page(title: str, lead: str, sections: Sequence[Section], footer: str) -> str:
    """The whole document. All arguments are plain text."""
    links = "".join(f'<li><a href="#{escape(s.key)}">{escape(s.title)}</a></li>' for s in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>{_paragraph(lead)}</header>\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main>\n'
        + "".join(map(_section, sections))
        + f"</main>\n<footer>{_paragraph(footer)}</footer>\n</body>\n</html>\n"
    )


def _paragraph(text: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{escape(text)}</p>\n" if text else ""


def _lines(text: str) -> str:
    return "".join(_paragraph(line) for line in text.split("\n"))


def _section(section: Section) -> str:
    exhibits = "".join(map(_exhibit, section.exhibits))
    grid = f'<div class="grid">\n{exhibits}</div>\n' if exhibits else ""
    remarks = "".join(f"<li>{escape(text)}</li>\n" for text in section.remarks)
    remarks = f'<ul class="{"missing" if section.exhibits else "told"}">\n{remarks}</ul>\n' if remarks else ""
    parts = [_paragraph(section.intro), grid, remarks, *(_table(table) for table in section.tables)]
    if section.folded:
        folded = "".join(map(_table, section.folded))
        parts.append(f"<details><summary>All other tables</summary>\n{folded}</details>\n")
    key = escape(section.key)
    return (
        f'<section aria-labelledby="{key}">\n<h2 id="{key}">{escape(section.title)}</h2>\n{"".join(parts)}</section>\n'
    )


def _exhibit(exhibit: Exhibit) -> str:
    tables = "".join(map(_table, exhibit.tables))
    details = f"<details><summary>Numbers as a table</summary>\n{tables}</details>\n" if tables else ""
    return (
        f'<figure class="card" id="{escape(exhibit.key)}">\n<h3>{escape(exhibit.title)}</h3>\n'
        f'<img alt="{escape(exhibit.alt)}" src="{data_uri(exhibit.picture)}">\n'
        f"<figcaption>{_lines(exhibit.text)}</figcaption>\n{details}</figure>\n"
    )


def data_uri(picture: Picture) -> str:
    """The picture itself as an address: the SVG unless it is too large."""
    kind, data = ("svg+xml", picture.svg) if len(picture.svg) <= LARGEST_SVG else ("png", picture.png)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _table(table: TableData) -> str:
    """In a box of its own that scrolls sideways where the table is wider than the page; reachable by keyboard."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    body = "".join(_row(row) for row in table.rows)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(table.title)}">'
        f'<table class="{"num" if table.numeric else "facts"}"><caption><span>{escape(table.title)}</span></caption>'
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n{_paragraph(table.rule, 'rule')}"
    )


def _row(cells: Iterable[str]) -> str:
    first, *rest = cells
    others = "".join(f'<td class="{"words" if len(cell) > 30 else "figure"}">{escape(cell)}</td>' for cell in rest)
    return f'<tr><th scope="row">{escape(first)}</th>{others}</tr>\n'
