"""When everything ran: spans of the rounds' parts, as a Chrome trace or as two lanes in the terminal.

The loops mark their parts with `with stats.span("verify", "target"):`, which costs nothing unless `stats.timeline` is set.
On a GPU a span is two CUDA events on the stream that the work goes to, so nothing waits for them; they are read when the
run is over.
"""
import bisect
import contextlib
import json
import shutil
import sys
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from errors import UserError

LANES = ("target", "draft", "host")
LOOKS = {"edge": ("▐", "\033[34m"), "verify": ("█", "\033[34m"), "draft": ("▒", "\033[33m"),
         "join": ("│", "\033[37m"), "commit": ("│", "\033[37m"), "miss": ("░", "\033[31m"),
         True: ("✓", "\033[32m"), False: ("✗", "\033[31m")}           # glyph and colour of a span, and of a hit or not


class Span(NamedTuple):
    name: str           # verify | draft | join | commit | miss | read-back
    lane: str           # one of LANES
    round: int
    start: float        # seconds, by the same clock in all lanes
    end: float


class Timeline:
    """Collects spans while a loop runs. Give one to Stats: `Stats(timeline=Timeline(target=cuda0, draft=cuda0))`."""

    def __init__(self, **devices):
        """devices: lane -> torch.device of its work; what has none, or a CPU, is timed by the host's clock."""
        self.devices = {lane: device for lane, device in devices.items() if device.type == "cuda"}
        self.marks, self.origins = [], {}               # (name, lane, round, start, end): events, or seconds
        self.first_round = 0
        for device in self.devices.values():            # ties the device's clock to the host's, to some microseconds
            torch.cuda.synchronize(device)
            event = self.now(device)
            event.synchronize()
            self.origins[device] = event, time.perf_counter()

    @staticmethod
    def now(device):
        """A point in time on the current stream of a GPU, or on the host if there is no device."""
        if device is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    @contextlib.contextmanager
    def span(self, name, lane, round):
        device = self.devices.get(lane)
        start = self.now(device)
        yield
        self.marks.append((name, lane, self.first_round + round, start, self.now(device)))

    def next_text(self):
        """Another loop starts, which counts its rounds from 0: here they go on, with a gap in between."""
        self.first_round = max((mark[2] for mark in self.marks), default=-2) + 2

    def spans(self):
        """All spans in order of their start. Waits for the GPU."""
        def seconds(mark, lane):
            if isinstance(mark, float):
                return mark
            mark.synchronize()
            event, at = self.origins[self.devices[lane]]
            return at + event.elapsed_time(mark) / 1e3
        return sorted((Span(name, lane, round, seconds(start, lane), seconds(end, lane))
                       for name, lane, round, start, end in self.marks), key=lambda span: span.start)


def joins(spans):
    """(when it ended, whether it hit, when the next verify began) of every join of SSD that another verify followed: a miss is
    what a backup had to answer."""
    found, join, missed = [], None, False
    for span in spans:
        if span.name == "verify":
            if join is not None and span.round <= join.round + 1:
                found.append((join.end, not missed, span.start))
            join = None
        elif span.name == "join":
            join, missed = span, False
        missed = missed or span.name == "miss"
    return found


def outcomes(spans):
    """(when, whether it hit) of those joins."""
    return [(at, hit) for at, hit, _ in joins(spans)]


def overlap(spans, start, end):
    """How long spans, of which no two run at a time, run between start and end."""
    return sum(max(0.0, min(span.end, end) - max(span.start, start)) for span in spans)


def hidden_share(spans):
    """How much of the draft's time, backups included, lies inside a verify; 0 where there is no draft."""
    verify = [span for span in spans if span.name == "verify"]              # one after the other, never two at a time
    drafting = [span for span in spans if span.name in ("draft", "miss")]
    ends, hidden = [span.end for span in verify], 0.0
    for span in drafting:
        first = bisect.bisect(ends, span.start)
        hidden += overlap(verify[first:first + 3], span.start, span.end)
    return hidden / max(1e-9, sum(span.end - span.start for span in drafting))


def host_wait(spans):
    """Median seconds from the end of a join that hit to the verify that follows: the host's reading and launching."""
    return median([verify - at for at, hit, verify in joins(spans) if hit] or [0.0])


def write_chrome_trace(spans, path):
    """A file for ui.perfetto.dev or chrome://tracing. UserError if it can't be written."""
    start = min((span.start for span in spans), default=0.0)
    events = [dict(name="thread_name", ph="M", pid=0, tid=i, args=dict(name=lane)) for i, lane in enumerate(LANES)]
    events += [dict(name=span.name, cat=span.lane, ph="X", pid=0, tid=LANES.index(span.lane), args=dict(round=span.round),
                    ts=(span.start - start) * 1e6, dur=(span.end - span.start) * 1e6) for span in spans]
    events += [dict(name="hit" if hit else "miss", cat="outcome", ph="i", s="p", pid=0, tid=1, ts=(at - start) * 1e6)
               for at, hit in outcomes(spans)]
    try:
        Path(path).write_text(json.dumps(dict(traceEvents=events, displayTimeUnit="ms")) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--trace {path}: {error.strerror}") from None


def draw(spans, width=100, rounds=6, color=False):
    """The last rounds as two lanes of `width` columns, with what every lookup found and a scale in ms. Returns text."""
    spans = [span for span in spans if span.lane != "host"]
    if not spans:
        return "no rounds to draw"
    shown = [span for span in spans if span.round > spans[-1].round - rounds]
    start = min(span.start for span in shown)
    total = max(1e-9, max(span.end for span in shown) - start)
    column = lambda t: min(width - 1, int((t - start) / total * width))
    look = lambda kind: f"{LOOKS[kind][1]}{LOOKS[kind][0]}\033[0m" if color else LOOKS[kind][0]
    lanes = {lane: [" "] * width for lane in ("target", "draft", "", "ms")}
    for span in sorted(shown, key=lambda span: span.start - span.end):      # the short ones last: they stay visible
        first, last = column(span.start), max(column(span.start), column(span.end) - 1)
        edge = "edge" if span.name == "verify" and first < last else span.name      # tells it from its neighbour
        lanes[span.lane][first:last + 1] = [look(edge)] + [look(span.name)] * (last - first)
    for at, hit in outcomes(shown):
        lanes[""][column(at)] = look(hit)
    step = next(10 ** e * m for e in range(-3, 7) for m in (1, 2, 5) if 10 ** e * m >= total * 1e3 / 8)         # ms
    for mark in (f"{i * step:g}" for i in range(int(total * 1e3 / step) + 1)):
        at = column(start + float(mark) / 1e3)
        lanes["ms"][at:at + len(mark)] = mark
    times = {kind: [span.end - span.start for span in spans if span.name == kind] for kind in LOOKS}
    legend = [f"{look(kind)} {kind} {1e3 * sum(t) / len(t):.2f} ms" for kind, t in times.items() if t]
    if outcomes(spans):
        legend += [f"{look(True)} hit", f"{look(False)} miss"]
    lines = [f"{name:>7} {''.join(cells)}".rstrip() for name, cells in lanes.items()] + [f"{'':7} mean: {'   '.join(legend)}"]
    if times["draft"]:
        lines.append(f"{'':7} {hidden_share(spans):.0%} of the draft's time was hidden behind the verify")
    return "\n".join(lines)


def report(timeline, path=None, picture=False):
    """What --trace (path) and --timeline (picture, on stderr) ask for, when a run is over."""
    spans = timeline.spans()
    if picture:
        width = max(40, shutil.get_terminal_size((109, 24)).columns - 9)
        print(draw(spans, width, color=sys.stderr.isatty()), file=sys.stderr)
    if path is not None:
        write_chrome_trace(spans, path)
