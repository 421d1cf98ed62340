"""timeline.py: spans come from where they should, the trace is what Perfetto reads, the picture shows what overlapped."""
import json

import pytest
import torch

from errors import UserError
from timeline import Span, Timeline, draw, hidden_share, host_wait, outcomes, write_chrome_trace


def rounds(missed=(), n=4):
    """n rounds of SSD, 10 ms each, 15 ms after a miss: draft 4 of verify's 8 ms, join 1 ms."""
    spans, t = [], 100.0
    for r in range(n):
        spans += [Span("verify", "target", r, t, t + .008), Span("draft", "draft", r, t + .001, t + .005),
                  Span("join", "draft", r, t + .008, t + .009), Span("read-back", "host", r, t + .009, t + .0095)]
        t += .010
        if r in missed:
            spans.append(Span("miss", "draft", r + 1, t, t + .005))
            t += .005
    return spans


def test_outcomes_and_hidden_share():
    assert [hit for _, hit in outcomes(rounds())] == [True] * 3             # nobody knows what the last one was for
    assert [hit for _, hit in outcomes(rounds(missed=[1]))] == [True, False, True]
    assert hidden_share(rounds()) == pytest.approx(1) and hidden_share([]) == 0
    assert hidden_share(rounds(missed=[1])) == pytest.approx(16 / 21)
    assert host_wait(rounds(missed=[0, 1])) == pytest.approx(.001) and host_wait(rounds(missed=[0, 1, 2])) == host_wait([]) == 0
    apart = [span._replace(round=span.round + 4, start=span.start + 1, end=span.end + 1) for span in rounds()]
    other_text = [span._replace(round=span.round + 1) for span in apart]
    assert len(outcomes(rounds() + apart)) == 7 and len(outcomes(rounds() + other_text)) == 6


def test_picture():
    target, draft, marks, scale, legend, hidden = draw(rounds(missed=[1]), width=45).splitlines()
    assert target == " target ▐███████  ▐███████       ▐███████  ▐███████"
    assert draft == "  draft  ▒▒▒▒   │  ▒▒▒▒   │ ░░░░░ ▒▒▒▒   │  ▒▒▒▒   │"
    assert marks.split() == ["✓", "✗", "✓"] and scale.split()[:4] == ["ms", "0", "10", "20"]
    assert legend.split("mean: ")[1].split("   ")[:2] == ["█ verify 8.00 ms", "▒ draft 4.00 ms"] and "76%" in hidden
    assert "\033[" not in draw(rounds()) and "\033[" in draw(rounds(), color=True)
    assert draw([]) == "no rounds to draw"
    assert 8 + 50 < len(draw(rounds(n=20), width=60).splitlines()[0]) <= 8 + 60      # the last rounds only
    assert draw(rounds(n=20), rounds=3).count("✓") == 3                     # two, and the legend's


def test_chrome_trace(tmp_path):
    write_chrome_trace(rounds(missed=[1]), tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert [e["args"]["name"] for e in events if e["ph"] == "M"] == ["target", "draft", "host"]
    spans = [e for e in events if e["ph"] == "X"]
    assert len(spans) == 17 and spans[0]["ts"] == 0 and spans[0]["dur"] == pytest.approx(8000)
    assert {e["name"]: e["tid"] for e in spans} == {"verify": 0, "draft": 1, "join": 1, "miss": 1, "read-back": 2}
    assert [e["name"] for e in events if e["ph"] == "i"] == ["hit", "miss", "hit"]
    with pytest.raises(UserError, match="--trace .*no.*: No such file"):
        write_chrome_trace([], tmp_path / "no" / "t.json")


def test_collecting_on_the_host():
    timeline = Timeline(target=torch.device("cpu"))
    with timeline.span("verify", "target", 0):
        pass
    timeline.next_text()
    with timeline.span("verify", "target", 0):
        pass
    first, second = timeline.spans()
    assert (first.round, second.round) == (0, 2) and first.start <= first.end <= second.start


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_collecting_on_a_gpu():
    """A span on a stream ends when the work there is done, though nobody waits for it."""
    device = torch.device("cuda")
    torch.cuda._sleep(1)                        # the first call loads the kernel
    timeline, stream = Timeline(target=device, draft=device), torch.cuda.Stream()
    with timeline.span("read-back", "host", 0):
        with torch.cuda.stream(stream), timeline.span("draft", "draft", 0):
            torch.cuda._sleep(20_000_000)
        with timeline.span("verify", "target", 0):
            torch.cuda._sleep(10_000_000)
    spans = {span.name: span for span in timeline.spans()}
    assert spans["draft"].end - spans["draft"].start > 0.004 > spans["read-back"].end - spans["read-back"].start
    assert 0.5 < hidden_share(timeline.spans()) * 2 < 1.2
