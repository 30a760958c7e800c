"""
A page that is written as HTML and as Markdown at once: headings, tables, figures, long texts. Everything it is given
is escaped.
"""

import base64
import html
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..data.whole_file import write_whole
from . import tables


STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 76rem; margin: 0 auto; padding: 1rem; }
h1 { line-height: 1.2; } h2 { border-bottom: 2px solid #0072B2; margin-top: 2.5rem; } h3 { margin-bottom: .3rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #888; vertical-align: bottom; white-space: normal; min-width: 3.5rem; } th:first-child, td:first-child { text-align: left; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figure img { width: 100%; max-width: 36rem; } figcaption { font-size: .85rem; color: #444; }
details { border: 1px solid #ccc; border-radius: .4rem; padding: .5rem .8rem; margin: .5rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: .8rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f5; padding: .6rem; margin: .2rem 0; font-size: .85rem; }
@media print { details { break-inside: avoid; } h2 { break-after: avoid; } figure { break-inside: avoid; } }
"""


@dataclass
class Page:
    """The two renderings of a report, which grow together."""

    title: str
    figures_dir: Path
    body: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    drawn: set[str] = field(default_factory=set)  # names of figures

    def heading(self, text: str, level: int = 2) -> None:
        self.body.append(f"<h{level}>{html.escape(text)}</h{level}>")
        self.text.append(f"{'#' * level} {tables.plain(text)}\n")

    def paragraph(self, text: str) -> None:
        self.body.append(f"<p>{html.escape(text)}</p>")
        self.text.append(f"{tables.plain(text)}\n")

    def table(self, table: tables.Table) -> None:
        header, rows = table
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        lines = ("".join(f"<td>{_cell(cell)}</td>" for cell in row) for row in rows)
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        self.body.append(
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )
        self.text.append(tables.markdown(table))

    def figures(self, drawn: Iterable[tuple[str, str, bytes]]) -> None:
        """(file name, caption, SVG) of each."""
        self.body.append('<div class="figures">')
        for name, caption, svg in drawn:
            while name in self.drawn:  # of two runs whose names differ only in signs
                name += "-"
            self.drawn.add(name)
            data, caption_html = base64.b64encode(svg).decode(), html.escape(caption)
            self.body.append(
                f'<figure><img alt="{caption_html}" src="data:image/svg+xml;base64,{data}"><figcaption>{caption_html}</figcaption></figure>'
            )
            (self.figures_dir / f"{name}.svg").write_bytes(svg)
            self.text.append(f"![{tables.plain(caption)}]({self.figures_dir.name}/{name}.svg)\n")
        self.body.append("</div>")

    def texts(self, summary: str, parts: dict[str, str], opened: bool) -> None:
        shown = "".join(f"<div><b>{html.escape(k)}</b><pre>{html.escape(v)}</pre></div>" for k, v in parts.items())
        self.body.append(
            f'<details{" open" if opened else ""}><summary>{html.escape(summary)}</summary><div class="texts">{shown}</div></details>'
        )
        self.text.append(f"**{tables.plain(summary)}**\n")
        for name, part in parts.items():  # indented, so that nothing in it is Markdown or HTML
            self.text.append(f"{name}:\n\n" + "".join(f"    {line}\n" for line in part.splitlines()))

    def write(self, output_dir: Path) -> None:
        page = (
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{STYLE}</style></head><body>\n"
            + "\n".join(self.body)
            + "\n</body></html>\n"
        )
        write_whole(output_dir / "report.html", page)
        write_whole(output_dir / "report.md", "\n".join(self.text))


def _cell(text: str) -> str:
    """An interval goes below its number: side by side they would not fit on a screen."""
    value, bracket, interval = text.partition(" [")
    return html.escape(value) + (f"<br><small>[{html.escape(interval)}</small>" if bracket else "")
