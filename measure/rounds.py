"""Where the time of a round goes, from the spans of a Timeline: every moment of it belongs to one part."""
from statistics import median

from timeline import overlap

PARTS = "verify", "draft", "miss", "join"       # what of the draft's spans counts is what no verify hides
RARE = 3                                        # rounds longer than so many medians record graphs, and aren't counted


def split(spans, settle):
    """Mean ms of a round and of its parts, the first `settle` rounds of each text left out. Returns a dict; {} if none is left.

    A round lasts from the start of a verify to that of the next. "rest": nothing of ours ran; the target waited for the host.
    """
    kinds = dict(draft=["draft"], miss=["miss"], join=["join", "commit"])
    verifies, rounds, age = [span for span in spans if span.name == "verify"], [], 0
    for now, after in zip(verifies, verifies[1:]):
        age = age + 1 if after.round == now.round + 1 else 0
        if age <= settle:
            continue
        near = [span for span in spans if span.lane == "draft" and span.end > now.end and span.start < after.start]
        found = {name: overlap([span for span in near if span.name in names], now.end, after.start)
                 for name, names in kinds.items()}
        found |= dict(round=after.start - now.start, verify=min(now.end, after.start) - now.start)
        rounds.append(found | dict(rest=found["round"] - sum(found[name] for name in PARTS)))
    usual = RARE * median([found["round"] for found in rounds] or [0.0])
    rounds = [found for found in rounds if found["round"] <= usual]
    return {name: 1e3 * sum(found[name] for found in rounds) / len(rounds) for name in rounds[0]} if rounds else {}
