"""bench.py: README.md and MEASURED.md are what results/ says; what is counted and timed; what rounding and synthetic acceptance
promise."""
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch

import bench
import tune
from errors import UserError
from measure import flags, pairs, predict, report, rounds, timing
from measure.plot import plot
from model import Llama, LlamaConfig
from sampling import Sampling
from timeline import Span

TINY = LlamaConfig(vocab_size=64, dim=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=48, tie_embeddings=True)


@pytest.fixture
def tiny_shapes(monkeypatch):
    for name in ("tiny", "tiny-draft"):
        monkeypatch.setitem(bench.SHAPES, name, TINY)
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setattr(bench, "LEAST_SECONDS", 0.0)
    for module in (timing, bench):
        monkeypatch.setattr(module, "seconds_of", lambda run, *devices: (run(), (1e-3, 2e-3, 4e-3))[1])


def run(capsys, *flags):
    """bench.py's JSON line and what it printed before."""
    bench.main([*flags, "--device", "cpu"])
    *printed, last = capsys.readouterr().out.splitlines()
    return json.loads(last), "\n".join(printed)


@pytest.mark.parametrize("path, some", [*zip(report.TEXTS, (["main_h100.json", "headline of main_h100.json"],
                                                               ["speculation_embedded.json"]))])
def test_texts_are_what_results_say(path, some):
    whole = path.read_text(encoding="utf-8")
    found = report.blocks(whole)
    assert {*some} <= {*found} and len(found) == whole.count("<!-- end of ")
    for name, text in found.items():
        assert f"<!-- {name} -->\n{text}<!-- end of {name} -->" in whole, "run python bench.py --report"
        result = report.RESULTS / name.removeprefix("headline of ")
        drawn = plot(report.read(result))
        assert not drawn or result.with_suffix(".svg").read_text(encoding="utf-8") == drawn, "run python bench.py --report"


def test_report_fills_in_what_there_is_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    place = tmp_path / "README.md"
    monkeypatch.setattr(report, "TEXTS", (place,))
    result = json.loads((report.ROOT / "results" / "speculation_embedded.json").read_text(encoding="utf-8"))
    (tmp_path / "a.json").write_text(json.dumps(result))
    (tmp_path / "other.json").write_text("no place there")
    empty = "before\n<!-- a.json -->\nold\n<!-- end of a.json -->\nbetween\n<!-- b.json -->\n<!-- end of b.json -->\nafter\n"
    place.write_text(empty)
    report.write()
    once = place.read_text()
    assert "old" not in once and "| accept: T = 0.0, coupled " in once and "![a](results/a.svg)" in once
    assert once.startswith("before\n") and once.endswith("between\n<!-- b.json -->\n<!-- end of b.json -->\nafter\n")
    report.write()
    assert place.read_text() == once
    ElementTree.fromstring((tmp_path / "a.svg").read_text())


def test_rounded_keeps_embeddings_and_uses_few_levels():
    config = LlamaConfig(vocab_size=20, dim=64, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=32, ffn_dim=128)
    model, before = pairs.rounded(Llama.random(config, 0, dtype=torch.float32), 4), Llama.random(config, 0, dtype=torch.float32)
    assert torch.equal(model.embed, before.embed) and torch.equal(model.head, before.head)
    for name in ("wqkv", "wo", "w_gate_up", "w_down"):
        new, old = (getattr(m.layers[0], name) for m in (model, before))
        assert all(len(group.unique()) <= 16 for group in new.view(-1, 64))
        step = (old.view(-1, 64).amax(1) - old.view(-1, 64).amin(1)) / 15
        assert ((new - old).view(-1, 64).abs() <= step[:, None] / 2 + 1e-6).all()


def test_bytes_of_a_step():
    model = Llama.random(TINY, dtype=torch.float32)
    weights = sum(p.numel() for p in model.parameters())
    assert timing.model_bytes(TINY, torch.float32) == 4 * weights
    assert timing.step_bytes(TINY, torch.float32, 20) == (4 * weights, 4 * 2 * 2 * 16 * 20)
    untied = LlamaConfig(**{**vars(TINY), "tie_embeddings": False})                 # one row of the embedding is nothing
    assert timing.step_bytes(untied, torch.bfloat16, 0) == (2 * weights, 0)
    eight = timing.step_bytes(bench.SHAPES["llama-3.1-8b"], torch.bfloat16, 0)[0]
    assert abs(eight / 15.0e9 - 1) < 0.01


def test_steps(capsys, tiny_shapes):
    result, printed = run(capsys, "--steps", "tiny", "--context", "5,20", "--rows", "1,4")
    assert [(r["context"], r["rows"], r["ms"]) for r in result["rows"]] == \
        [(c, n, [2.0, 1.0, 4.0]) for c in (5, 20) for n in (1, 4)]
    weights, cached = timing.step_bytes(TINY, torch.float32, 20)
    assert result["rows"][-1]["bandwidth"] == (weights + cached) / 2e-3
    assert "tiny, context 20, 4 tokens" in printed and "| tiny  |      20 |" in printed and result["command"].startswith("python bench.py")


def test_speed_of_the_embedded_pair(capsys, tiny_shapes, tmp_path):
    where = [str(tmp_path / name) for name in ("a.json", "a.svg")]
    result, printed = run(capsys, "--max-new-tokens", "32", "--repeats", "2", "--batch", "1,2", "--temperature", "1.6",
                          "--k", "4", "--json", where[0], "--plot", where[1])
    assert result["command"] == "python bench.py --max-new-tokens 32 --repeats 2 --batch 1,2 --temperature 1.6 --k 4 --device cpu"
    assert json.loads((tmp_path / "a.json").read_text()) == result
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn.count("What runs when") == drawn.count("By batch size") == 1 and drawn.count("tok/s</title>") == 3
    assert [head["batch"] for head in result["runs"]] == [1, 2]
    for head in result["runs"]:
        assert [m["label"] for m in head["modes"]] == ["ar", "sd", "ssd"]
        assert all(m["same_text"] for m in head["modes"])
        ar, sd, ssd = head["modes"]
        assert ar["tokens_per_round"] == 1 and ar["hit_rate"] is None and ar["vs_ar"] == [1, 1, 1]
        assert sd["tokens_per_round"] > 1.5 and sd["hit_rate"] is None and 0 < ssd["hit_rate"] < 1
        assert all(m["tok_s"][1] <= m["tok_s"][0] <= m["tok_s"][2] for m in head["modes"])
    for words in ("float32", "batch 2", "K = 4", "16 outcomes guessed (confident fan-out)", "temperature 1.6", "Ceiling", "tok/s",
                  "after a hit the target waits"):
        assert words in printed


@pytest.mark.parametrize("pair", [(), ("--target-shape", "tiny", "--draft-shape", "tiny-draft", "--accept-rate", "0.8")])
def test_tune(capsys, monkeypatch, tiny_shapes, pair):
    found = []
    monkeypatch.setattr(bench, "find", lambda *args: found.append(tune.find(*args)) or found[0])
    result, printed = run(capsys, *pair, "--tune", "--max-new-tokens", "96", "--repeats", "1", "--sequences", "1")
    modes = {m["label"]: m for m in result["runs"][0]["modes"]}
    assert [*modes] == ["ar", "sd", "ssd", "sd, tuned", "ssd, tuned"] and "tune: fastest: " in printed
    assert all(m["same_text"] for m in modes.values())
    assert found[0][1].acceptance_rate > 0.5, "tuned for what the pair does here, be it SYNTHETIC"
    tuned = modes["ssd, tuned"]["options"]
    shape = f"--tree {tuned['tree']} --k {tuned['k']}" if tuned["tree"] else f"--k {tuned['k']}"
    assert f"expected with {shape} --fanout-budget {tuned['fanout_budget']}" in printed


def test_synthetic_acceptance(capsys, tiny_shapes):
    """The rates that come out are those that were asked for, all modes write the same, and it says SYNTHETIC."""
    result, printed = run(capsys, "--target-shape", "tiny", "--draft-shape", "tiny-draft", "--accept-rate", "0.8", "--repeats",
                          "1", "--max-new-tokens", "300", "--sequences", "2")
    (head,) = result["runs"]
    assert head["synthetic"] and "SYNTHETIC: tiny + tiny-draft" in printed and "SYNTHETIC mode" in printed
    assert "SYNTHETIC: tiny + tiny-draft" in plot(result) and "SYNTHETIC: tiny + tiny-draft" in report.tables(result)
    assert all(m["same_text"] for m in head["modes"])
    ar, sd, ssd = head["modes"]
    assert abs(sd["acceptance_rate"] - 0.8) < 0.04 and abs(ssd["acceptance_rate"] - 0.8) < 0.04
    assert abs(ssd["hit_rate"] - head["model"]["hit_rate"]) < 0.06


def test_padded_pair(capsys, monkeypatch):
    """Both models at the cost of other shapes, with longer vocabularies: text and acceptance stay what they are."""
    shape = LlamaConfig(vocab_size=5000, dim=384, n_layers=7, n_heads=8, n_kv_heads=2, head_dim=128, ffn_dim=1024)
    monkeypatch.setitem(bench.SHAPES, "wide", shape)
    monkeypatch.setitem(bench.SHAPES, "wide-draft", replace(shape, vocab_size=4500, dim=192, n_layers=3, ffn_dim=400))
    flags = "--repeats", "1", "--sequences", "1", "--max-new-tokens", "40"
    plain, padded = (run(capsys, *flags, *more)[0]["runs"][0] for more in ((), ("--pad", "wide", "--pad-draft", "wide-draft")))
    assert padded["pair"] == "the embedded pair, the target padded to wide, the draft to wide-draft"
    assert padded["parameters"][1] > 2 * plain["parameters"][1] and all(mode["same_text"] for mode in padded["modes"])
    for a, b in zip(plain["modes"], padded["modes"]):
        assert a["tokens_per_round"] == b["tokens_per_round"] and a["acceptance_rate"] == b["acceptance_rate"]


def test_what_is_measured_is_kept(tiny_shapes, monkeypatch, tmp_path):
    """A run that fails leaves the runs before it in the file."""
    real = bench.compare
    monkeypatch.setattr(bench, "compare", lambda contestants, groups, *more: real(contestants, groups, *more) if len(groups[0]) < 2
                        else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.main(["--device", "cpu", "--batch", "1,2", "--max-new-tokens", "32", "--repeats", "1", "--sequences", "1", "--json",
                    str(tmp_path / "a.json")])
    kept = report.read(tmp_path / "a.json")
    assert [head["batch"] for head in kept["runs"]] == [1] and kept["command"].startswith("python bench.py --device cpu --batch 1,2")


def test_settled_rounds_only(monkeypatch):
    """The first rounds, those with a step that isn't replayed and the ones after them are left out of time and tokens."""
    pair, = pairs.text_pairs(flags.parse_flags(["--device", "cpu"]), None, None)
    contestant = bench.Contestant(pair, "ar", None, Sampling(), 32)
    kept, (text,) = contestant.run([pair.prompts[0]], [0])
    assert kept["tokens"] == kept["rounds"] == len(text) - bench.SETTLE and kept["left_out"] == bench.SETTLE
    assert 0 < kept["seconds"] < contestant.stats.seconds
    real = bench.MODES["ar"]

    def recording(*args, **kwargs):
        for number, chunks in enumerate(real(*args, **kwargs)):
            if number == 10:
                monkeypatch.setattr(bench.Graphs, "slow", bench.Graphs.slow + 1)
            yield chunks
    monkeypatch.setitem(bench.MODES, "ar", recording)
    assert contestant.run([pair.prompts[0]], [0])[0]["left_out"] == bench.SETTLE + 2


def test_lengthened_prompts_end_as_they_did():
    prompts = [[1, 2, 3], [4, 5]]
    assert pairs.lengthened(prompts, 7) == [[4, 5, 1, 2, 3, 4, 5, 1, 2, 3][-7:], pairs.lengthened(prompts, 7)[1]]
    assert all(len(p) == 7 and p[-len(q):] == q for p, q in zip(pairs.lengthened(prompts, 7), prompts))


def test_rank_law():
    accept = predict.rank_law(0.75)
    assert accept[0] == 0.75 and all(a >= b for a, b in zip(accept[1:], accept[2:])) and sum(accept) < 1
    assert abs(sum(accept[:4]) - (1 - 0.25 * 4 ** -predict.RANK_EXPONENT)) < 1e-12


def test_predictions_are_the_models(monkeypatch):
    """Steps of a second each and a free draft: every drafted token is worth it, and a second GPU hides all there is to hide."""
    def times(draft):
        return tune.Times(1, [[1, 1.0]], [[1, draft]], [[None, 2.0, 2.0]])             # no better than in turn

    def best(*parts):
        monkeypatch.setattr(predict, "measure", lambda *models, context: times(*parts))
        rows = predict.predictions(None, Llama.random(TINY, dtype=torch.float32), "tiny", 16)
        assert [row["rate"] for row in rows] == [*predict.RATES]
        return rows[2]                                                              # acceptance .7
    free = best(0.0)
    tokens = sum(0.7 ** i for i in range(13))
    assert free["sd"]["k"] == free["one"]["k"] == 12
    assert all(abs(free[plan][mode] - tokens) < 1e-6 for plan, mode in (("sd", "sd"), ("one", "ssd"), ("two", "ssd")))
    dear = best(0.1)
    assert dear["sd"]["k"] < 12 and dear["one"]["ssd"] < dear["sd"]["sd"] < dear["two"]["ssd"]      # nothing overlaps on one
    two = dear["two"]
    drafting = 0.1 * two["k"]
    assert abs(two["ssd"] - two["tokens"] / (max(1, drafting + 0.1) + (1 - two["hit_rate"]) * drafting)) < 1e-9     # Theorem 7


def test_predict(capsys, tiny_shapes):
    result, printed = run(capsys, "--predict", "--target-shape", "tiny", "--draft-shape", "tiny-draft", "--context", "16")
    assert len(result["rows"]) == len(predict.RATES) and "PREDICTED" in printed
    ElementTree.fromstring(plot(result))


@pytest.mark.parametrize("flags, says", [
    (["--steps", "llama-9"], "llama-9.*llama-3.1-8b"), (["--kernels", "llama-3.1-8b"], "needs a CUDA GPU"),
    (["--target", "/nowhere"], "no such checkpoint folder"), (["--prompts", "/nowhere"], "/nowhere"),
    (["--sweep", "colour"], "colour"), (["--sweep", "tree=0"], "tree=0"), (["--sweep", "cta=4"], "cta=4"),
    (["--round-draft", "a"], "whole numbers"), (["--batch", "0"], "at least 1"), (["--max-new-tokens", "4"], "at least 32"),
    (["--draft-shape", "smollm2-135m"], "--target-shape"), (["--target-shape", "llama-3.2-1b", "--accept-rate", "0.5"], "together"),
    (["--target-shape", "llama-3.2-1b", "--chat", "--prompts", "x"], "leave out"), (["--k", "0"], "--k"),
    (["--target-shape", "llama-3.1-8b", "--batch", "100000"], r"GB are needed.*lower --batch"), (["--batch", "a"], "--batch"),
    (["--context", "2000"], "context of 1024"), (["--sweep", "k", "--predict"], "alone"),
    (["--predict", "--batch", "2"], "of batch 1"), (["--steps", "tiny", "--speculation"], "alone"),
    (["--target-shape", "tiny", "--tune"], "need a draft"), (["--draft-device", "cuda:99"], "--draft-device cuda:99"),
    (["--steps", "tiny", "--target", "x"], "shapes of their own"), (["--predict", "--round-draft", "5"], "goes by shapes"),
    (["--speculation", "--k", "3"], "by itself"), (["--speculation", "--batch", "1,8"], "one --batch"),
    (["--speculation", "--small", "--plot", "x.svg"], "--small"), (["--js", "x"], "unrecognized"), (["--steps", "tiny,typo"], "typo"),
    (["--speculation", "--draft-device", "cpu"], "speed of a pair"), (["--target-shape", "tiny", "--draft-device", "cpu"], "a draft"),
    (["--round-draft", "0"], "at least 1"), (["--json", "/"], "a file in a folder")])
def test_bad_requests(flags, says, tiny_shapes):
    with pytest.raises(UserError, match=says) as error:
        bench.main([*flags, "--device", "cpu"])
    assert "\n" not in str(error.value)


def test_transformers_writes_the_same(tiny_shapes, capsys):
    pytest.importorskip("transformers")
    result, printed = run(capsys, "--vs-transformers", "--max-new-tokens", "32", "--repeats", "1")
    rows = {m["label"]: m for m in result["runs"][0]["modes"]}
    assert rows["transformers generate"]["same_text"] and rows["transformers assisted"]["same_text"]
    assert rows["transformers assisted"]["tokens_per_round"] > 1.5


def test_several_drafts_of_one_target(capsys, monkeypatch, tiny_shapes):
    """ar is run once, --sweep is of the first draft, and ssd with a tree is held against sd with that tree."""
    texts, real = [], bench.MODES["ar"]
    monkeypatch.setitem(bench.MODES, "ar", lambda *args, **kwargs: texts.append(args[1]) or real(*args, **kwargs))
    result, printed = run(capsys, "--round-draft", "5,3", "--draft", str(bench.WEIGHTS / "draft"), "--sweep", "tree=7", "--k", "3",
                          "--repeats", "1", "--sequences", "1", "--max-new-tokens", "40")
    assert len(texts) == 2, "a warm-up and a repeat"
    first, *others = result["runs"]
    assert [head["pair"] for head in result["runs"]] == [
        "the embedded pair, the draft itself rounded to 5 bits", "the embedded pair, the draft itself rounded to 3 bits",
        "the embedded pair + draft"]
    labels = ["ar", "sd", "ssd", "sd, tree of 7, depth 3", "ssd, tree of 7, depth 3, 7 guessed"]
    assert [m["label"] for m in first["modes"]] == labels and first["modes"][3]["options"]["tree"] == "7"
    for head in others:
        assert [m["label"] for m in head["modes"]] == labels[:3] and head["modes"][0]["tok_s"] == first["modes"][0]["tok_s"]
    assert len({head["modes"][1]["tokens_per_round"] for head in result["runs"]}) > 1, "other drafts"
    assert all(m["same_text"] for head in result["runs"] for m in head["modes"])
    sd, ssd = (first["modes"][i]["tok_s"][0] for i in (3, 4))
    assert first["modes"][4]["vs_sd"][0] == ssd / sd and printed.count("the run of the table above") == 2
    assert [*first["split"]] == labels[1:] and "draft not hidden" in printed
    drawn = plot(result)
    assert ">sd, tree of 7, depth 3<" in drawn and "tokens in the tree" not in drawn, "one value is a bar, not a line"


class Clockless:
    """A contestant whose runs take as long as it is told."""
    def __init__(self, name, seconds, log):
        self.name, self.seconds, self.log = name, seconds, log

    def run(self, group, seeds):
        self.log.append((self.name, *group, seeds))
        return bench.Counter(tokens=10, seconds=self.seconds, rounds=10), [[1]]


def test_turns(monkeypatch):
    """The warm-up is of two groups; a repeat goes over the prompts as often as it takes to last; modes change at every group."""
    monkeypatch.setattr(bench, "LEAST_SECONDS", 1.0)
    log = []
    contestants = {"slow": Clockless("slow", 0.1, log), "fast": Clockless("fast", 0.06, log)}
    counted, texts, passes = bench.compare(contestants, [["abcde"[i]] for i in range(5)], 3, torch.device("cpu"))
    assert log[:4] == [("slow", "a", [0]), ("slow", "c", [2]), ("fast", "a", [0]), ("fast", "c", [2])]
    assert passes == {"slow": 2, "fast": 4} and texts["slow"] == [[1]] * 5
    assert bench.batching.IDLE >= 4, "two contestants, requests of two kinds at most"
    assert [r["tokens"] for r in counted["slow"]] == [100] * 3 and [r["tokens"] for r in counted["fast"]] == [200] * 3
    assert [name for name, _, _ in log[4:34]] == ["slow", "fast"] * 5 + ["fast"] * 5 + ["slow", "fast"] * 5 + ["fast"] * 5
    assert log[34][0] == "fast", "the next repeat begins with another one"


def test_parts_of_a_round_add_up():
    span = lambda name, lane, round, start, end: Span(name, lane, round, start * 1e-3, end * 1e-3)
    spans = []
    for r in range(6):                          # a verify of 5, a draft that ends 1 later, a join of 1, a backup of 2, 1 of nothing
        at = 10 * r
        spans += [span("verify", "target", r, at, at + 5), span("draft", "draft", r, at + .5, at + 6),
                  span("join", "draft", r, at + 6, at + 7), span("miss", "draft", r, at + 7, at + 9),
                  span("read-back", "host", r, at + 7, at + 9)]
    found = rounds.split(spans, 2)
    assert {name: round(ms, 9) for name, ms in found.items()} == \
        dict(draft=1.0, miss=2.0, join=1.0, round=10.0, verify=5.0, rest=1.0)
    late = [span("verify", "target", 6, 500, 505), span("verify", "target", 7, 510, 515)]      # something was recorded before it
    assert rounds.split(spans + late, 2)["round"] < 11
    assert rounds.split(spans[:5], 2) == {}


def test_prompts_are_spread():
    rows = [json.loads(line) for line in (report.ROOT / "prompts" / "humaneval20_gsm8k20_mtbench20.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == 60 and all(row["prompt"] for row in rows)
    assert [sum(row["id"].startswith(name) for row in rows) for name in ("HumanEval", "gsm8k", "mtbench")] == [20] * 3
    assert len({row["category"] for row in rows}) == 9, "all eight of mtbench, one of which is math, and code"


def test_a_sweep_is_drawn_as_lines():
    """Each of K, tree and fan-out where it has two values; what has no axis, a share of the GPU, is a bar; long names fit in."""
    row = dict(tok_s=[5.0, 4.0, 6.0], vs_ar=[2.0] * 3, hit_rate=0.5)
    options = lambda **given: dict(k=6, tree=None, fanout_budget=16) | given
    modes = [dict(row, label=mode, mode=mode, options=options()) for mode in ("ar", "sd", "ssd")]
    modes += [dict(row, label="ssd, 8 outcomes", mode="ssd", options=options(fanout_budget=8)),
              dict(row, label="ssd, K = 4", mode="ssd", options=options(k=4)), dict(row, label="ssd, full grid", mode="ssd", options=options()),
              dict(row, label="ssd, tree of 8, depth 6", mode="ssd", options=options(tree="8"))]
    head = dict(pair="pair " * 40, prompt_tokens=[5, 5], batch=1, dtype="float32", repeats=1, modes=modes)
    drawn = plot(dict(kind="speed", runs=[head], card=dict(device="x" * 60)))
    ElementTree.fromstring(drawn)
    texts = [line for line in drawn.splitlines() if line.startswith("<text")]
    shown = lambda words: sum(f">{words}<" in text for text in texts)
    assert [shown(w) for w in ("lookahead K", "outcomes guessed", "tokens in the tree", "ssd, full grid", "ssd, K = 4")] == [1, 2, 0, 1, 0]
    assert shown("ssd, tree of 8, depth 6") == 1 and shown("prompts of 5 to 5") == 0 and max(map(len, texts)) < 240
