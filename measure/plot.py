"""Plots of results as SVG, written by hand: bars of speed, a timeline of rounds, lines over K, fan-out and acceptance.

A plot takes the colours of the reader's theme, light or dark. The same result gives the same bytes.
"""
import math
from html import escape

WIDTH, LEFT, RIGHT = 780, 170, 30
CLASS = {"ar": "ar", "sd": "sd", "ssd": "ssd"}          # colours by mode; others are grey
STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #24292f }
.title { font-size: 15px; font-weight: 600 } .small { font-size: 11px; fill: #6e7781 } .on { fill: #ffffff; font-size: 11px } .lane { font-size: 11px }
.back { fill: #ffffff } .grid { stroke: #d8dee4; stroke-width: 1 } .whisker { stroke: #24292f; stroke-width: 1.2 }
.ar { fill: #6e7781 } .sd { fill: #1f6feb } .ssd { fill: #d9480f } .two { fill: #2b8a3e } .other { fill: #8c959f }
.line { fill: none; stroke-width: 2.2 } .line.ar { stroke: #6e7781 } .line.sd { stroke: #1f6feb }
.line.ssd { stroke: #d9480f } .line.two { stroke: #2b8a3e } .pale { fill-opacity: .55 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .small { fill: #9198a1 } .on { fill: #ffffff } .back { fill: #0d1117 } .grid { stroke: #30363d }
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
        self.text(16, self.y + 14, title, "title")
        self.y += 22
        if note:
            self.text(16, self.y + 9, note, "small")
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


def bars(canvas, modes):
    """tok/s of modes, with whiskers from the least to the most."""
    marks = ticks(max(m["tok_s"][2] for m in modes))
    scale = (WIDTH - LEFT - RIGHT - 120) / marks[-1]
    top, bottom = canvas.y, canvas.y + 26 * len(modes)
    for mark in marks:
        canvas.line([(LEFT + mark * scale, top), (LEFT + mark * scale, bottom)], "grid")
        canvas.text(LEFT + mark * scale, bottom + 14, f"{mark:g}", "small", "middle")
    for i, m in enumerate(modes):
        y, (middle, least, most) = top + 26 * i + 4, m["tok_s"]
        canvas.text(LEFT - 8, y + 14, m["label"], "", "end")
        canvas.rect(LEFT, y, middle * scale, 18, CLASS.get(m["mode"], "other"), f"{middle:.1f} tok/s")
        canvas.line([(LEFT + least * scale, y + 9), (LEFT + most * scale, y + 9)], "whisker")
        against = "" if m["vs_ar"] is None or m["label"] == "ar" else f"  ({m['vs_ar'][0]:.2f} x ar)"
        canvas.text(LEFT + most * scale + 8, y + 14, f"{middle:.0f}{against}")
    canvas.text(WIDTH - RIGHT, bottom + 14, "tok/s", "small", "end")
    canvas.y = bottom + 34


def timeline(canvas, parts):
    """What runs when: ar, sd, and ssd with a hit and then a miss, from the times of the parts."""
    ms = {name: 1e3 * parts[name] for name in ("ar", "verify", "draft", "branches", "together")}
    k, together = parts["k"], max(ms["together"], ms["verify"])
    drafting, end = k * ms["draft"], 2 * max(ms["together"], ms["verify"]) + k * ms["draft"]
    marks = ticks(end, 8)
    scale = (WIDTH - LEFT - RIGHT) / marks[-1]
    lanes = [("ar: target", "ar", []), ("sd: draft", "sd", []), ("sd: target", "sd", []), ("ssd: draft", "ssd", []),
             ("ssd: target", "ssd", [])]
    lanes[0][2].extend((t * ms["ar"], ms["ar"], "1 token", "") for t in range(int(end / ms["ar"])))
    t = 0.0
    while t + drafting + ms["verify"] <= end * 1.001:
        lanes[1][2].append((t, drafting, f"{k} tokens", "pale"))
        lanes[2][2].append((t + drafting, ms["verify"], "verify", ""))
        t += drafting + ms["verify"]
    for t, what in ((0, "hit"), (together, "miss")):
        lanes[3][2].append((t, ms["together"], f"{parts['budget']} outcomes: {what}", "pale"))
        lanes[4][2].append((t, together, "verify", ""))
    lanes[3][2].append((2 * together, drafting, "backup", "pale"))
    bottom = canvas.y + 26 * len(lanes)
    for mark in marks:
        canvas.line([(LEFT + mark * scale, canvas.y), (LEFT + mark * scale, bottom)], "grid")
        canvas.text(LEFT + mark * scale, bottom + 14, f"{mark:g}", "small", "middle")
    for i, (label, kind, boxes) in enumerate(lanes):
        y = canvas.y + 26 * i + 3
        canvas.text(LEFT - 8, y + 14, label, "", "end")
        for start, length, what, pale in boxes:
            canvas.rect(LEFT + start * scale, y, length * scale - 1.5, 20, f"{kind} {pale}", f"{what}: {length:.3f} ms")
            if length * scale > 7 * len(what):
                canvas.text(LEFT + (start + length / 2) * scale, y + 14, what, "on" if not pale else "lane", "middle")
    canvas.text(WIDTH - RIGHT, bottom + 28, "ms", "small", "end")
    canvas.y = bottom + 44


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


def swept(modes, what):
    """{mode: [(value, row)]} of the rows that --sweep added for k, fanout_budget or tree."""
    title = {"k": "K = ", "fanout_budget": " outcomes", "tree": "tree of"}[what]
    found = {}
    for m in modes:
        if "," in m["label"] and title in m["label"]:
            found.setdefault(m["mode"], []).append((int(m["options"][what]), m))
    return found


def speed_plot(result):
    canvas = Canvas()
    for head in result["runs"]:
        plain = [m for m in head["modes"] if "," not in m["label"]]
        name = head["pair"][0].upper() + head["pair"][1:]
        note = f"{result['card']['device']}, {head['dtype']}, batch {head['batch']}, prompts of {head['prompt_tokens'][0]} to " \
               f"{head['prompt_tokens'][1]} tokens; bars: medians, whiskers: least to most of {head['repeats']} repeats"
        canvas.title(name, note)
        bars(canvas, plain)
        if "parts" in head:
            canvas.title("What runs when", "each part timed alone, ssd's with the other model beside it; ssd: a hit, then a miss")
            timeline(canvas, head["parts"])
        panels = [(swept(head["modes"], what), x, y, field) for what, x, y, field in (
            ("k", "lookahead K", "tok/s", "tok_s"), ("tree", "tokens in the tree", "tok/s", "tok_s"),
            ("fanout_budget", "outcomes guessed", "tok/s", "tok_s"), ("fanout_budget", "outcomes guessed", "hit rate", "hit_rate"))]
        panels = [panel for panel in panels if panel[0]]
        for i in range(0, len(panels), 2):
            canvas.y += 18
            for j, (found, x, y, field) in enumerate(panels[i:i + 2]):
                value = (lambda m: m["hit_rate"] or 0.0) if field == "hit_rate" else lambda m: m["tok_s"][0]
                series = [(mode, mode, [(at, value(m)) for at, m in points]) for mode, points in found.items()]
                lines(canvas, 60 + j * 380, 300, 150, series, (x, y), percent=field == "hit_rate")
            canvas.y += 200
        if panels:
            legend(canvas, [("sd", "sd"), ("ssd", "ssd")])
    return canvas.svg()


def predict_plot(result):
    canvas = Canvas()
    canvas.title(f"Predicted speed over ar, target {result['target']}",
                 f"{result['card']['device']}, {result['dtype']}, context {result['context']}; the best K and fan-out at each point")
    legend(canvas, [("sd", "sd"), ("ssd, one GPU", "ssd"), ("ssd, draft on a second GPU", "two")])
    drafts = list(dict.fromkeys(r["draft"] for r in result["rows"]))
    top = max(max(r["sd"]["sd"], r["one"]["ssd"], r["two"]["ssd"]) for r in result["rows"])
    for i in range(0, len(drafts), 2):
        canvas.y += 22
        for j, draft in enumerate(drafts[i:i + 2]):
            rows = [r for r in result["rows"] if r["draft"] == draft]
            series = [(label, kind, [(r["rate"], r[plan][mode]) for r in rows]) for label, kind, plan, mode in (
                ("sd", "sd", "sd", "sd"), ("ssd", "ssd", "one", "ssd"), ("ssd, two GPUs", "two", "two", "ssd"))]
            canvas.text(60 + j * 380 + 150, canvas.y - 10, f"draft {draft}", "", "middle")
            lines(canvas, 60 + j * 380, 300, 150, series, ("acceptance per token", "x ar"), top)
        canvas.y += 200
    return canvas.svg()


def speculation_plot(result):
    """Hit rate by fan-out, where several budgets were measured."""
    budget = lambda row: int(row["row"].split("budget ")[1].split(",")[0])
    fanouts = [r for r in result["rows"] if r["table"] == "fan-out"]
    if len({budget(r) for r in fanouts}) < 2:
        return ""
    canvas = Canvas()
    canvas.title("Hit rate by the number of outcomes guessed", result["what"].split(";")[0])
    legend(canvas, [("uniform", "ar"), ("geometric", "sd"), ("auto", "ssd")])
    canvas.y += 22
    for j, temperature in enumerate(("0.0", "1.0")):
        series = []
        for fanout, kind in (("uniform", "ar"), ("geometric", "sd"), ("auto", "ssd")):
            points = [(budget(r), r["hit_rate"]) for r in fanouts
                      if r["row"].startswith(f"T = {temperature}") and r["row"].endswith(fanout)]
            series.append((fanout, kind, points))
        canvas.text(60 + j * 380 + 150, canvas.y - 10, f"temperature {float(temperature):g}", "", "middle")
        lines(canvas, 60 + j * 380, 300, 150, series, ("outcomes guessed", "hit rate"), percent=True)
    canvas.y += 200
    return canvas.svg()


PLOTS = {"speed": speed_plot, "predict": predict_plot, "speculation": speculation_plot}


def plot(result):
    """The SVG text of a result; empty if there is nothing to draw."""
    return PLOTS[result["kind"]](result) if result["kind"] in PLOTS else ""
