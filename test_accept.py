"""measure/accept.py says what holds and what doesn't; measure/sanitize.py launches every kernel of a round."""
import json
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

import graphs
import kernels
from generate import MODES
from kernels import launch
from measure import accept, sanitize
from measure.pairs import Pair
from model import Llama, LlamaConfig
from saguaro import Options
from test_correctness import DEVICE, PAIRS

no_gpu = pytest.mark.skipif(DEVICE.type == "cuda", reason="with a GPU, run python -m measure.accept")


@pytest.fixture
def accepts(tmp_path, monkeypatch, capsys):
    """Run checks on a tiny pair: (exit code, the JSON's checks by name, what was printed)."""
    prompts = [[1, 2, 3], [4], [5, 6, 5, 6, 5]]
    monkeypatch.setattr(accept, "load", lambda name, args: Pair(name, *PAIRS["perturbed"](), prompts[:args.prompts], set()))

    threads, path = torch.get_num_threads(), tmp_path / "accept.json"

    def run(only, new=12):
        code = accept.main(["--only", only, "--pairs", "embedded", "--device", "cpu", "--new", str(new), "--runs", "2", "--batch", "2",
                            "--json", str(path)])
        return code, json.loads(path.read_text())["checks"], capsys.readouterr().out.splitlines()
    torch.set_num_threads(1)                    # so small a model waits longer for threads than it computes
    yield run
    torch.set_num_threads(threads)


@no_gpu
def test_what_holds(accepts):
    code, checks, lines = accepts("exact,delays,steady,storm,host", new=20)
    names = "exact", "exact", "delays", "steady", "storm", "host"
    assert code == 0 and [(check["check"], check["ok"]) for check in checks] == [*zip(names, [True] * 3 + [None] * 3)]
    assert len(lines) == 6 and "3 prompts x 20 tokens in 9 ways" in lines[0] and "skipped: needs a CUDA GPU" in lines[3]
    storm, host = checks[4:]
    assert 0.1 < storm["ratio"]["ssd"] < 10 and storm["ratio"]["sd"] == 1 and storm["tokens"] < 1.4
    assert host["rounds"] > 3 and 0 < host["own"] <= host["own_p90"] and 0 <= host["early"] <= 1


@no_gpu
@pytest.mark.parametrize("mode", ["ar", "ssd"])
def test_one_other_token_is_found(accepts, monkeypatch, mode):
    """The last token of the last text, in one mode, and with ar only where it is alone."""
    def spoilt(models, prompts, *more, loop=MODES[mode], **stats):
        for chunks in loop(*models, prompts, *more, **stats):
            for chunk in chunks:
                if prompts[chunk.sequence] == [5, 6, 5, 6, 5] and (mode != "ar" or len(prompts) == 1 and more[0] == 12):
                    chunk.tokens[-1] = 66
            yield chunks
    monkeypatch.setitem(MODES, mode, lambda *args, **more: spoilt(args[:1 + (mode != "ar")], *args[1 + (mode != "ar"):], **more))
    code, checks, lines = accepts("exact")
    assert code == 1 and not checks[0]["ok"] and "FAILED" in lines[0]
    assert {(way[0], way[3]) for way in checks[0]["wrong"]} == {(mode, 2)} and len(checks[0]["wrong"]) == {"ar": 1, "ssd": 4}[mode]


@no_gpu
def test_a_late_run_that_differs_is_found(accepts, monkeypatch):
    runs = []

    def spoilt(*args, loop=MODES["ssd"], **more):
        runs.append(args)
        for chunks in loop(*args, **more):
            if len(runs) == 3:
                chunks[0].tokens[0] = 66
            yield chunks
    monkeypatch.setitem(MODES, "ssd", spoilt)
    code, checks, _ = accepts("delays")
    assert code == 1 and checks[0]["wrong"] == [[None, 1]]      # two prompts a run: the third is the second run's first


def test_prompts_and_what_is_missing(monkeypatch, capsys):
    args = SimpleNamespace(prompts=40, device=DEVICE, dtype=torch.float32, pairs=["smollm2"])
    pair = accept.load("embedded", args)
    assert len({*map(tuple, pair.prompts)}) == 40
    assert not torch.equal(pair.draft.norm, Llama.load(accept.ROOT / "weights/draft", DEVICE, torch.float32).norm), "made worse"
    monkeypatch.setattr(Llama, "load", lambda *_: None)
    if (accept.ROOT / accept.FOLDERS["smollm2"][0]).exists():
        count = len(accept.load("smollm2", args).prompts)
        assert count == 40 or f"{count} prompts instead of 40" in capsys.readouterr().out
    monkeypatch.setitem(accept.FOLDERS, "smollm2", ("checkpoints/none", "weights/none"))
    assert [(ok, line) for ok, line, _ in accept.exact(None, args)] == [(None, "smollm2: skipped, checkpoints/none isn't there")]


@no_gpu
def test_every_kernel_is_launched_for_the_sanitizer(monkeypatch):
    """All that are called so in kernels/, but for those of bulk.py, the gate, at which none waits without graphs, and the one that
    sends mail, which a CPU doesn't; in Triton's interpreter, at tiny sizes."""
    files = {name: file for name, file in vars(kernels).items() if isinstance(file, ModuleType) and name not in ("rows", "gate", "mail")}
    found, launched = {(file, name) for file in files for name in vars(files[file]) if name.endswith("_kernel")}, set()

    class Watched:
        def __init__(self, at, kernel):
            self.at, self.kernel = at, kernel

        def __getitem__(self, grid):
            launched.add(self.at)
            return self.kernel[grid]
    for file, name in found:
        monkeypatch.setattr(files[file], name, Watched((file, name), getattr(files[file], name)))
    monkeypatch.setattr(kernels, "ops_for", lambda tensor: kernels.TRITON)
    monkeypatch.setattr(Llama, "run_with", lambda self, **_: setattr(self, "ops", kernels.TRITON))
    monkeypatch.setattr(graphs.Beside, "submit", lambda self, work: (lambda result: lambda: result)(work()))    # no threads there
    monkeypatch.setattr(launch, "blocks_for", lambda N, K, *_: launch.Blocks(32, 32, 2, 4, 2 if K == 96 else 1))
    config = LlamaConfig(vocab_size=64, dim=32, n_layers=1, n_heads=4, n_kv_heads=1, head_dim=16, ffn_dim=96)
    runs = [run[:3] + (Options(k=2, fanout_budget=3),) for run in sanitize.RUNS if run[0] == "ssd"][:1]
    for dim in (32, 64):                                                    # streamed, and taken at once
        lines = list(sanitize.rounds(replace(config, dim=dim, n_heads=dim // 16), torch.device("cpu"), torch.float32, [1, 2], new=2, runs=runs))
        assert len(lines) == 1 and len(found) > 15
    assert launched == found, found - launched


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA")
def test_what_the_sanitizer_watches(capsys):
    for part in "1/2", "2/2":
        sanitize.main([part])
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line != "ok"]
    assert len(lines) == 2 * len(sanitize.RUNS) and out.endswith("ok\n") and " 0 hits of 0" in out
