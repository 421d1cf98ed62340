"""What of a result is drawn: bars of speed, a timeline of rounds, lines over K, fan-out and acceptance. Returns SVG text."""
from measure.svg import LEFT, RIGHT, WIDTH, Canvas, legend, lines, ticks

MODES = "ar", "sd", "ssd"               # have a colour of their own


def bars(canvas, modes):
    """tok/s of modes, with whiskers from the least to the most."""
    marks = ticks(max(m["tok_s"][2] for m in modes))
    left = max(LEFT, 24 + 7 * max(len(m["label"]) for m in modes))
    scale = (WIDTH - left - RIGHT - 120) / marks[-1]
    top, bottom = canvas.y, canvas.y + 26 * len(modes)
    for mark in marks:
        canvas.line([(left + mark * scale, top), (left + mark * scale, bottom)], "grid")
        canvas.text(left + mark * scale, bottom + 14, f"{mark:g}", "small", "middle")
    for i, m in enumerate(modes):
        y, (middle, least, most) = top + 26 * i + 4, m["tok_s"]
        canvas.text(left - 8, y + 14, m["label"], "", "end")
        canvas.rect(left, y, middle * scale, 18, m["mode"] if m["mode"] in MODES else "other", f"{middle:.1f} tok/s")
        canvas.line([(left + least * scale, y + 9), (left + most * scale, y + 9)], "whisker")
        against = "" if m["vs_ar"] is None or m["label"] == "ar" else f"  ({m['vs_ar'][0]:.2f} x ar)"
        canvas.text(left + most * scale + 8, y + 14, f"{middle:.0f}{against}")
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


def swept(modes, what):
    """{mode: [(value, row)]} of the rows that --sweep added for k, fanout_budget or tree, and the plain row among them.

    Empty if there is one value alone, which makes no line.
    """
    title = {"k": "K = ", "fanout_budget": " outcomes", "tree": "tree of"}[what]
    found = {}
    for m in modes:
        if "," in m["label"] and title in m["label"]:
            found.setdefault(m["mode"], []).append((int(m["options"][what]), m))
    for m in modes:
        if m["label"] in found and m["options"]["tree"] is None and what != "tree":
            found[m["label"]].append((m["options"][what], m))
    found = {mode: sorted(points, key=lambda point: point[0]) for mode, points in found.items()}
    return found if len({value for points in found.values() for value, _ in points}) > 1 else {}


def speed_plot(result):
    canvas, batches = Canvas(), {}
    for head in result["runs"]:
        least, most = head["prompt_tokens"]
        batches.setdefault((head["pair"], most if least == most else None), []).append(head)
    for heads in batches.values():
        head, (least, most) = heads[0], heads[0]["prompt_tokens"]
        panels = [(swept(head["modes"], what), x, y, field) for what, x, y, field in (
            ("k", "lookahead K", "tok/s", "tok_s"), ("tree", "tokens in the tree", "tok/s", "tok_s"),
            ("fanout_budget", "outcomes guessed", "tok/s", "tok_s"), ("fanout_budget", "outcomes guessed", "hit rate", "hit_rate"))]
        panels = [panel for panel in panels if panel[0]]
        in_lines = {m["label"] for found, *_ in panels for points in found.values() for _, m in points} - {*MODES}
        name = head["pair"][0].upper() + head["pair"][1:]
        note = f"{result['card']['device']}, {head['dtype']}, batch {head['batch']}, prompts of " \
               f"{least if least == most else f'{least} to {most}'} tokens; bars: medians, whiskers: least to most of " \
               f"{head['repeats']} repeat{'s' * (head['repeats'] > 1)}"
        canvas.title(name, note)
        bars(canvas, [m for m in head["modes"] if m["label"] not in in_lines])
        if "parts" in head:
            canvas.title("What runs when", "each part timed alone, ssd's with the other model beside it; ssd: a hit, then a miss")
            timeline(canvas, head["parts"])
        if panels:
            canvas.title("Other lookaheads, trees, fan-outs", "medians; what isn't on an axis is as above")
            legend(canvas, [(mode, mode) for mode in ("sd", "ssd")])
            pairs_of_lines(canvas, [
                ([(mode, mode, [(at, (m[field] or 0.0) if field == "hit_rate" else m[field][0]) for at, m in points])
                  for mode, points in found.items()], (x, y), field == "hit_rate") for found, x, y, field in panels])
        if len({h["batch"] for h in heads}) > 1:
            canvas.title("By batch size", "tok/s of all sequences together; hits of each sequence, and rounds in which all hit")
            legend(canvas, [(mode, mode) for mode in MODES] + [("ssd, all hit", "two")])
            by_batch = lambda mode, value: [(h["batch"], value(m)) for h in heads for m in h["modes"] if m["label"] == mode]
            hits = [("each", "ssd", by_batch("ssd", lambda m: m["hit_rate"] or 0.0)),
                    ("all", "two", by_batch("ssd", lambda m: m.get("batch_hit_rate") or 0.0))]
            speeds = [(mode, mode, by_batch(mode, lambda m: m["tok_s"][0])) for mode in MODES]
            pairs_of_lines(canvas, [(speeds, ("sequences at once", "tok/s"), False), (hits, ("sequences at once", "hit rate"), True)])
    return canvas.svg()


def pairs_of_lines(canvas, panels):
    """Panels (series, labels of the axes, whether in percent), two in a row."""
    for i in range(0, len(panels), 2):
        canvas.y += 18
        for j, (series, ends, percent) in enumerate(panels[i:i + 2]):
            lines(canvas, 60 + j * 380, 300, 150, series, ends, percent=percent)
        canvas.y += 200


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
    canvas, kinds = Canvas(), (("uniform", "ar"), ("geometric", "sd"), ("auto", "two"), ("confident", "ssd"))
    canvas.title("Hit rate by the number of outcomes guessed", result["what"].split(";")[0])
    legend(canvas, kinds)
    canvas.y += 22
    for j, temperature in enumerate(("0.0", "1.0")):
        series = []
        for fanout, kind in kinds:
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
