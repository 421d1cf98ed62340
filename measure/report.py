"""Tables of results, on the terminal and, from results/*.json, in README.md and MEASURED.md: the same code makes both.

There a result stands between `<!-- NAME.json -->` and `<!-- end of NAME.json -->`; `write` fills in every result
there is and draws its plot beside it as results/NAME.svg, if its kind has one.
"""
import json
from pathlib import Path

from errors import UserError
from kernels import Share
from measure.plot import plot

ROOT = Path(__file__).resolve().parent.parent
RESULTS, TEXTS = ROOT / "results", (ROOT / "README.md", ROOT / "MEASURED.md")


def table(head, rows):
    """A markdown table with padded columns, so that it reads well on a terminal too. Ends in a newline."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    line = lambda cells: "| " + " | ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                                           for i, (cell, width) in enumerate(zip(cells, widths))) + " |\n"
    rule = "|" + "|".join("-" * (width + 2) if i == 0 else "-" * (width + 1) + ":" for i, width in enumerate(widths)) + "|\n"
    return line(head) + rule + "".join(map(line, rows))


def spread(values, digits=1, unit=""):
    """[median, least, most] as text."""
    if values is None:
        return "-"
    middle, least, most = (f"{value:.{digits}f}" for value in values)
    return f"{middle}{unit} [{least}..{most}]"


def ratio(value, form):
    return "-" if value is None else f"{value:{form}}"


def gigabytes(n):
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"


def card_lines(card):
    where = card["device"] + (f", {card['threads']} threads" if card["threads"] else f", driver and power limit {card['driver']}")
    return [f"{where}; torch {card['torch']}, triton {card['triton']}, Python {card['python']}. "
            f"A copy moves {card['copy_bandwidth'] / 1e12:.3f} TB/s (read + write)."]


def run_lines(head, card):
    """What is about to run, and its ceiling."""
    options, (least, most) = head["options"], head["prompt_tokens"]
    sizes = " + ".join(f"{n / 1e6:.1f} M" if n < 1e9 else f"{n / 1e9:.2f} B" for n in head["parameters"])
    guess = "greedy" if head["temperature"] == 0 else f"temperature {head['temperature']:g}"
    speculation = f"K = {options['k']}" if options["tree"] is None else f"tree {options['tree']}"
    lines = [f"**{head['pair'][0].upper()}{head['pair'][1:]}** ({sizes} parameters), {head['dtype']}, batch {head['batch']}, "
             f"{head['prompts']} prompt{'s' * (head['prompts'] > 1)} of {least if least == most else f'{least} to {most}'} tokens, up to "
             f"{head['new_tokens']} new ones each, {guess}; " +
             (f"{speculation}, {options['fanout_budget']} outcomes guessed ({options['fanout']} fan-out)" +
              (f", ssd's target with {Share(*head['share'])}; " if head["share"] else "; ")
              if len(head["parameters"]) > 1 else "") + f"{head['repeats']} repeat{'s' * (head['repeats'] > 1)}.", ""]
    ceiling = (f"Ceiling: a target step reads {gigabytes(head['weight_bytes'])} of weights and {gigabytes(head['kv_bytes'])} of "
               f"K and V, at least {head['floor_ms']:.3f} ms, {1e3 * head['batch'] / head['floor_ms']:.0f} tok/s for ar.")
    if head["weight_bytes"] < card["cache_bytes"]:
        ceiling += " It fits into the L2 cache, which is faster: no ceiling at all."
    return lines + [ceiling]


def mode_lines(head):
    rows = []
    for r in head["modes"]:
        hits = ratio(r["hit_rate"], ".3f")
        if head["batch"] > 1 and r.get("batch_hit_rate") is not None:
            hits += f" ({r['batch_hit_rate']:.3f} all)"
        rows.append([r["label"], spread(r["tok_s"]), spread(r["round_ms"], 2), ratio(r["tokens_per_round"], ".2f"),
                     ratio(r["acceptance_rate"], ".3f"), hits, ratio(r["of_ceiling"], ".0%"),
                     spread(r["first_ms"], 0), gigabytes(r["peak_bytes"]), spread(r["vs_ar"], 2), spread(r["vs_sd"], 2),
                     "yes" if r["same_text"] else "no"])
    synthetic = "SYNTHETIC " if head["synthetic"] else ""
    columns = [synthetic + "mode", "tok/s", "ms per round", "tokens per round", "accepted", "hit rate", "of ceiling",
               "first token ms", "peak memory", "x ar", "x sd", "ar's text"]
    lines = [table(columns, rows)]
    if head.get("ar_as_above"):
        lines.append("ar, which knows of no draft, is the run of the table above.\n")
    if max(head.get("passes", {}).values(), default=1) > 1:
        times = "; ".join(f"{n} x {label}" for label, n in head["passes"].items())
        lines.append(f"Runs over the prompts in a repeat, where one would be too short to tell: {times}.\n")
    if head.get("split"):
        columns = [synthetic + "ms of a round", "in all", "verify", "draft not hidden", "backup", "join", "waiting"]
        parts = [[label, *(f"{s[name]:.2f}" for name in ("round", "verify", "draft", "miss", "join", "rest"))]
                 for label, s in head["split"].items()]
        lines.append("Where a round goes, mean ms by events, in one more run:\n\n" + table(columns, parts))
    if "parts" in head:
        p, m = head["parts"], head["model"]
        lines.append(f"Parts of a round, each alone: target step {1e3 * p['ar']:.3f} ms, verify of {p['k'] + 1} "
                     f"{1e3 * p['verify']:.3f} ms, draft step {1e3 * p['draft']:.3f} ms, with {p['budget']} branches "
                     f"{1e3 * p['branches']:.3f} ms; verify beside one of the former and {p['k']} of these "
                     f"{1e3 * p['together']:.3f} ms. The speedup model makes sd {m['sd']:.2f} x ar and ssd {m['ssd']:.2f} x ar of that.\n")
    if "host" in head.get("parts", ()):
        lines.append(f"In the loop, watched: after a hit the target waits {1e3 * p['host']:.3f} ms for the host.\n")
    return lines


def speed_table(result):
    text = "\n".join(card_lines(result["card"])) + "\n"
    for head in result["runs"]:
        text += "\n" + "\n".join(run_lines(head, result["card"])) + "\n\n" + "\n".join(mode_lines(head))
    return text


def steps_table(result):
    copy, found = result["card"]["copy_bandwidth"], result["rows"]
    widths = sorted({r["rows"] for r in found})
    cell = lambda r: f"{r['ms'][0]:.3f} ({r['bandwidth'] / copy:.0%})"
    rows = []
    for shape, context in dict.fromkeys((r["shape"], r["context"]) for r in found):
        here = {r["rows"]: r for r in found if (r["shape"], r["context"]) == (shape, context)}
        first = next(iter(here.values()))
        rows.append([shape, context, gigabytes(first["weight_bytes"]), gigabytes(first["kv_bytes"]),
                     *(cell(here[n]) if n in here else "-" for n in widths)])
    least, most = (max(abs(r["ms"][i] / r["ms"][0] - 1) for r in found) for i in (1, 2))
    return "\n".join(card_lines(result["card"])) + f" Random weights, {result['dtype']}, batch 1. Medians in ms, and the share of " \
        f"the ceiling; the least and the most of a step lie within -{least:.1%} and +{most:.1%} of it.\n\n" + \
        table(["shape", "context", "weights", "K and V", *(f"{n} token{'s' * (n > 1)}" for n in widths)], rows)


def kernels_table(result):
    rate = lambda r, us: r["bytes"] / r[us] / 1e6
    rows = [[f"{r['shape']} {r['op']} {r['N']} x {r['K']}, {r['rows']} row{'s' * (r['rows'] > 1)}", f"{r['us']:.1f}",
             f"{rate(r, 'us'):.2f}", f"{r['torch_us']:.1f}", f"{rate(r, 'torch_us'):.2f}", f"{r['torch_us'] / r['us']:.2f}"]
            for r in result["rows"]]
    return "\n".join(card_lines(result["card"])) + " bfloat16; ours does its fused work (norm, RoPE, SiLU, residual, choice) " \
        "as well, F.linear the bare product.\n\n" + table(["linear", "us", "TB/s", "F.linear us", "TB/s", "x F.linear"], rows)


def predict_table(result):
    plan = lambda p, mode: f"{p[mode]:.2f} (K = {p['k']}" + (f", {p['budget']})" if mode == "ssd" else ")")
    rows = [[f"{r['draft']} ({r['draft_ms']:.2f} ms a step, {r['branch_ms']:.2f} with 16 branches)", f"{r['rate']:.1f}",
             plan(r["sd"], "sd"), plan(r["one"], "ssd"), plan(r["two"], "ssd"), f"{r['one']['hit_rate']:.2f}",
             f"{1e3 / r['ar_ms'] * r['one']['ssd']:.0f}"] for r in result["rows"]]
    return "\n".join(card_lines(result["card"])) + f" Target {result['target']} ({result['rows'][0]['ar_ms']:.2f} ms a step), " \
        f"{result['dtype']}, context {result['context']}, batch 1. PREDICTED from measured steps, not run:\n\n" + \
        table(["draft", "accepted", "sd x ar", "ssd x ar", "ssd x ar, draft on a second GPU", "hit rate", "ssd tok/s"], rows)


def speculation_table(result):
    rows = [[f"{r['table']}: {r['row']}", f"{r['tokens_per_round']:.2f}", f"{r['acceptance_rate']:.3f}",
             "" if r["table"] == "speculation" else f"{r['hit_rate']:.3f}", f"{r['forwards_per_round']:.1f}"]
            for r in result["rows"]]
    return result["what"] + ".\n\n" + \
        table(["", "tokens per round", "acceptance", "hit rate", "draft forwards per round"], rows)


def tried_table(result):
    number = lambda x, digits: "-" if x is None else f"{x:.{digits}f}"
    rows = [[r["what"], r["run"], *(f"{r[name]:.2f}" for name in ("verify_ms", "draft_ms", "both_ms")),
             f"{r['verify_end_ms']:.2f}, {r['draft_end_ms']:.2f}", number(r["hit_rate"], 2), number(r["sd_tok_s"], 0),
             number(r["ssd_tok_s"], 0)] for r in result["rows"]]
    return result["what"] + ".\n\n" + table(["", "run", "verify ms", "draft ms", "both ms", "each side's end in both", "hit rate",
                                             "sd tok/s", "ssd tok/s"], rows)


def plain_table(result):
    return result["what"] + ".\n\n" + table(result["head"], result["rows"])


def accept_table(result):
    holds = {True: "yes", False: "NO", None: "-"}
    rows = [[check["check"], holds[check["ok"]], check["line"]] for check in result["checks"]]
    return f"{result['device']}, torch {result['torch']}.\n\n" + table(["check", "holds", "what was found"], rows)


KINDS = {"accept": accept_table, "speed": speed_table, "steps": steps_table, "kernels": kernels_table, "predict": predict_table,
         "speculation": speculation_table, "tried": tried_table, "plain": plain_table}


def tables(result):
    """The tables of a result, ending in a newline."""
    return KINDS[result["kind"]](result)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def block(path):
    """What stands between the markers of a results file."""
    result = read(path)
    made = f"`{result['command']} --json results/{path.name}`" if result["command"].startswith("python") else result["command"]
    text = f"Command: {made}\n\n" + tables(result)
    return text + (f"\n![{path.stem}](results/{path.stem}.svg)\n" if plot(result) else "")


def headline(path):
    """One line: what the first run of a results file of kind "speed" has come to."""
    result = read(path)
    run = result["runs"][0]
    modes, speeds = {mode["label"]: mode for mode in run["modes"]}, []
    for name in "ar", "sd", "ssd":
        best = max((mode for mode in run["modes"] if mode["mode"] == name), key=lambda mode: mode["tok_s"][0])
        how = best["label"].partition(", ")[2]
        other = f" ({best['tok_s'][0]:.0f} with {'a ' * how.startswith('tree')}{how})" if how else ""
        speeds.append(f"`{name}` {modes[name]['tok_s'][0]:.0f}{other}")
    return f"**{', '.join(speeds)} tokens a second** on one {result['card']['device']}, batch {run['batch']}, " \
        f"{'greedy' if not run['temperature'] else 'sampled'}, {'the same tokens' if modes['ssd']['same_text'] else 'OTHER TOKENS'}.\n"


def blocks(text):
    """What a text has a place for, between `<!-- name -->` and `<!-- end of name -->`, and results/ an answer to:
    {name: text}. A name is that of a file, or "headline of" one."""
    found = {}
    for path in sorted(RESULTS.glob("*.json")):
        for name, make in ((path.name, block), (f"headline of {path.name}", headline)):
            if f"<!-- {name} -->\n" in text:
                found[name] = make(path)
    return found


def write():
    """Bring TEXTS and the plots up to date with results/."""
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        for name, content in blocks(text).items():
            begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
            head, rest = text.split(begin)
            if end not in rest:
                raise UserError(f"{path.name}: {begin.strip()} without {end}")
            text = head + begin + content + end + rest.split(end, 1)[1]
            if (RESULTS / name).exists() and (drawn := plot(read(RESULTS / name))):
                (RESULTS / name).with_suffix(".svg").write_text(drawn, encoding="utf-8")
        path.write_text(text, encoding="utf-8")
