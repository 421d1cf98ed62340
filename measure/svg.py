"""Plots as SVG, written by hand: a canvas that grows downwards, axes with round numbers, lines, a legend.

A plot takes the colours of the reader's theme, light or dark. The same calls give the same bytes.
"""
import math
import textwrap
from html import escape

WIDTH, LEFT, RIGHT = 780, 170, 30
TITLE_WIDTH, NOTE_WIDTH = 84, 125       # characters
STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #24292f }
text { paint-order: stroke; stroke: #ffffff; stroke-width: 3px } .on, .lane { stroke: none }
.title { font-size: 15px; font-weight: 600 } .small { font-size: 11px; fill: #6e7781 } .on { fill: #ffffff; font-size: 11px } .lane { font-size: 11px }
.back { fill: #ffffff } .grid { stroke: #d8dee4; stroke-width: 1 } .whisker { stroke: #24292f; stroke-width: 1.2 }
.ar { fill: #6e7781 } .sd { fill: #1f6feb } .ssd { fill: #d9480f } .two { fill: #2b8a3e } .other { fill: #8c959f }
.line { fill: none; stroke-width: 2.2 } .line.ar { stroke: #6e7781 } .line.sd { stroke: #1f6feb }
.line.ssd { stroke: #d9480f } .line.two { stroke: #2b8a3e } .pale { fill-opacity: .55 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3; stroke: #0d1117 } .on, .lane { stroke: none } .small { fill: #9198a1 } .on { fill: #ffffff } .back { fill: #0d1117 } .grid { stroke: #30363d }
.whisker { stroke: #e6edf3 } .ar { fill: #7d8590 } .sd { fill: #388bfd } .ssd { fill: #f0703a } .two { fill: #3fb950 }
.line.ar { stroke: #7d8590 } .line.sd { stroke: #388bfd } .line.ssd { stroke: #f0703a } .line.two { stroke: #3fb950 }
.line { fill: none } }
"""


class Canvas:
    """Shapes from top to bottom; y is where the next panel begins."""

    def __init__(self):
        self.parts, self.y = [], 14

    def text(self, x, y, text, kind="", anchor="start"):
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(str(text))}</text>')

    def rect(self, x, y, width, height, kind, tip=""):
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, .5):.1f}" height="{height:.1f}" rx="2" '
                          f'class="{kind}">' + (f"<title>{escape(tip)}</title>" if tip else "") + "</rect>")

    def line(self, points, kind):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" class="{kind}"/>')

    def title(self, title, note=""):
        for line in textwrap.wrap(title, TITLE_WIDTH):
            self.text(16, self.y + 14, line, "title")
            self.y += 22
        for line in textwrap.wrap(note, NOTE_WIDTH):
            self.text(16, self.y + 9, line, "small")
            self.y += 16
        self.y += 6

    def svg(self):
        size = f'width="{WIDTH}" height="{self.y:.0f}" viewBox="0 0 {WIDTH} {self.y:.0f}"'
        return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n<style>{STYLE}</style>\n' \
               f'<rect width="100%" height="100%" class="back"/>\n' + "\n".join(self.parts) + "\n</svg>\n"


def ticks(top, n=5):
    """Round numbers from 0 to just above `top`."""
    raw = top / n
    step = 10 ** math.floor(math.log10(raw))
    step *= next(f for f in (1, 2, 2.5, 5, 10) if f * step >= raw * .999)
    return [i * step for i in range(math.ceil(top / step - 1e-9) + 1)]


def lines(canvas, left, width, height, series, ends, top=None, percent=False):
    """Lines over a common x axis: series [(label, kind, [(x, y)])]; ends: labels of the axes; top: the least height of y."""
    xs = sorted({x for _, _, points in series for x, _ in points})
    marks = [0, .2, .4, .6, .8, 1] if percent else ticks(max([y for _, _, points in series for _, y in points] + [top or 0]), 4)
    place = lambda x: left + width * xs.index(x) / max(1, len(xs) - 1)
    rise = lambda y: canvas.y + height - height * y / marks[-1]
    for mark in marks:
        canvas.line([(left, rise(mark)), (left + width, rise(mark))], "grid")
        canvas.text(left - 6, rise(mark) + 4, f"{mark:.0%}" if percent else f"{mark:g}", "small", "end")
    for x in xs:
        canvas.text(place(x), canvas.y + height + 15, f"{x:g}", "small", "middle")
    for label, kind, points in series:
        canvas.line([(place(x), rise(y)) for x, y in points], f"line {kind}")
        for x, y in points:
            canvas.parts.append(f'<circle cx="{place(x):.1f}" cy="{rise(y):.1f}" r="3" class="{kind}">'
                                f'<title>{escape(label)}: {y:.2f} at {x:g}</title></circle>')
    canvas.text(left + width / 2, canvas.y + height + 31, ends[0], "small", "middle")
    canvas.text(left - 34, canvas.y - 8, ends[1], "small")


def legend(canvas, entries):
    x = 16
    for label, kind in entries:
        canvas.rect(x, canvas.y, 12, 12, kind)
        canvas.text(x + 17, canvas.y + 11, label)
        x += 34 + 7.2 * len(label)
    canvas.y += 30
