"""distill.py and the recipe of weights/, at toy size on the CPU: python -m pytest test_distill.py"""
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import bpe
import bulk
import distill
import make_weights
import templates
from errors import UserError, exit_on_user_error
from grammar import Grammar, lay_out
from model import KVCache, Llama, LlamaConfig
from tokenizer import Tokenizer

CONFIG = LlamaConfig(vocab_size=300, dim=48, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=64, max_context=256,
                     tie_embeddings=True, eos_ids=(0,), dtype=torch.float32)
TINY = "--layers 1 --dim 32 --heads 2 --head-dim 16 --ffn 48 --tokens 1600 --max-new 16 --batch 8 --device cpu".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random target with a tokenizer of its own. Sharp logits, so that there is something to learn."""
    folder = tmp_path_factory.mktemp("target")
    target = Llama.random(CONFIG, seed=1)
    target.norm.mul_(0.5)
    target.save(folder)
    rng = random.Random(0)
    bpe.save_tokenizer([templates.opening(rng) for _ in range(200)], CONFIG.vocab_size, folder)
    return folder


def openings(path, count, seed=0):
    rng = random.Random(seed)
    make_weights.write_prompts(path, [templates.opening(rng) for _ in range(count)])
    return str(path)


def test_dense_forward_is_the_engines_forward(folder):
    model = Llama.load(folder)
    tokens = torch.randint(0, 300, (3, 21), generator=torch.Generator().manual_seed(0))
    cache, positions = KVCache(CONFIG, 3, 32, "cpu", torch.float32), torch.arange(21).expand(3, 21)
    hidden = model(tokens, positions, positions, torch.zeros(3, dtype=torch.int64),
                   torch.ones(21, 21, dtype=torch.bool).tril(), cache)
    dense = bulk.dense_hidden(model, tokens)
    torch.testing.assert_close(F.linear(dense, model.head), model.logits(hidden), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared", [0, 4])              # tokens that all prompts begin with
def test_continuations_are_those_of_one_prompt_alone(folder, shared):
    model, rng = Llama.load(folder), random.Random(3)
    prompts = [[5, 77, 130, 211][:shared] + [rng.randrange(300) for _ in range(rng.randrange(1, 12))] for _ in range(11)]
    stops = set(range(0, 300, 7))
    rows = bulk.sample_continuations(model, prompts, 15, stop_ids=stops, batch=4)
    lengths = set()
    for prompt, row, start, end in zip(prompts, *rows):
        text = list(prompt)
        while len(text) < len(prompt) + 15 and (len(text) == len(prompt) or text[-1] not in stops):
            text.append(int(F.linear(bulk.dense_hidden(model, torch.tensor([text]))[0, -1], model.head).argmax()))
        assert row[:end].tolist() == text and start == len(prompt)
        lengths.add(len(text) - len(prompt))
    assert len(lengths) > 2


def test_time_box_leaves_whole_texts(folder):
    prompts = [[7, i] for i in range(40)]
    rows = bulk.sample_continuations(Llama.load(folder), prompts, 20, 1.0, batch=4, minutes=0.0)
    assert set((rows.end - rows.start).tolist()) == {0, 20}                 # not begun, or brought to its end


def test_what_fails_on_the_device_is_done_in_a_slower_way(folder, monkeypatch, capsys):
    model, prompts = Llama.load(folder), [[7, i] for i in range(10)]
    want = bulk.sample_continuations(model, prompts, 12, [0.0, 0.9], batch=4)
    make = bulk.Slots.__init__

    def on_a_device(self, *args):
        make(self, *args)
        self.ops, self.graphs.on = bulk.rows.TRITON, True                   # of which this machine has neither
        self.graphs.stream = None
    monkeypatch.setattr(bulk.Slots, "__init__", on_a_device)
    monkeypatch.setattr(bulk.rows, "TRITON", bulk.rows.TORCH._replace(choose=None))
    got = bulk.sample_continuations(model, prompts, 12, [0.0, 0.9], batch=4)
    assert torch.equal(got.tokens, want.tokens)
    err = capsys.readouterr().err
    assert "without the CUDA graph" in err and "without the Triton kernels" in err


def test_sampling_follows_the_distribution_and_the_seed(folder, monkeypatch):
    monkeypatch.setattr(bulk, "CHECK_EVERY", 1)                             # the texts are that short
    model = Llama.load(folder)
    prompts = [[5, 7]] * 4000
    p = F.softmax(F.linear(bulk.dense_hidden(model, torch.tensor([[5, 7]]))[0, -1], model.head) / 0.7, dim=-1)
    rows = bulk.sample_continuations(model, prompts, 1, 0.7, seed=4, batch=4000)
    seen = torch.bincount(rows.tokens[:, 2].long(), minlength=300) / 4000
    assert 4000 * ((seen - p) ** 2 / p).sum() < 420                         # chi-square, 299 degrees: 299 +- 24
    rows_again = bulk.sample_continuations(model, prompts, 1, 0.7, seed=4, batch=4000)
    assert torch.equal(rows.tokens, rows_again.tokens)
    kept = bulk.sample_continuations(model, prompts, 1, 0.7, min_p=0.3, seed=4, batch=4000).tokens[:, 2].unique()
    fit = set((p >= 0.3 * p.max()).nonzero()[:, 0].tolist())
    assert set(kept.tolist()) <= fit and len(kept) > 0.8 * len(fit) > 1
    one_by_one = bulk.sample_continuations(model, prompts[:50], 1, 0.7, seed=4, batch=7)
    assert torch.equal(one_by_one.tokens, rows.tokens[:50])                 # a row's noise is its own


# Three grammars: parts, their wordings, tokens. Some wordings begin alike, some end alike, some parts have but one.
PARTS = [[[[10, 11, 12], [10, 13], [14]], [[20, 21], [20, 22, 23, 24], [25, 26]], [[30], [31], [32, 33]]],
         [[[10, 11, 12, 13], [10, 11, 12, 14], [40, 41], [42, 41]]], [[[50, 51, 52]], [[53], [54]], [[53], [54]]]]


def paths(parts):
    """All that a grammar allows."""
    return {tuple(itertools.chain.from_iterable(way)) for way in itertools.product(*parts)}


def tell(model, count=600, temperature=1.0, batch=64, **more):
    """`count` texts along PARTS, in turn, laid out in two pieces. Returns (tokens behind the prompt, prompt) of each, the grammar."""
    texts = [PARTS[i % 3] for i in range(count)]
    grammar = Grammar([lay_out(texts[:count // 3]), lay_out(texts[count // 3:])])
    grammar.state.zero_()                                                   # as another sampling would leave it
    prompts = [[7, *[5] * (i % 5 + 1)] for i in range(count)]
    rows = bulk.sample_continuations(model, prompts, grammar.longest, temperature, grammar=grammar, batch=batch, **more)
    return [tuple(row[start:end].tolist()) for row, start, end in zip(*rows)], grammar


def test_a_text_is_a_path_of_its_grammar_and_all_paths_are_found(folder):
    model = Llama.load(folder)
    texts, grammar = tell(model, 3000, 50.0, batch=500)                     # so hot that it chooses nearly evenly
    for i, parts in enumerate(PARTS):
        assert set(texts[i::3]) == paths(parts)
    tokens, choices, _ = grammar.sums.tolist()
    assert grammar.longest == 9 and tokens == sum(map(len, texts))
    a, b = (sum((text[0] == 10) + (20 in text) for text in texts[i::3]) for i in (0, 1))        # where wordings begin alike
    assert choices == 3 * 1000 + a + 1000 + b + 2 * 1000
    assert "tokens sampled" in grammar.report()


def test_what_a_text_becomes_is_the_models_choice_and_not_the_batchs(folder):
    model = Llama.load(folder)
    texts, grammar = tell(model)
    assert tell(model, batch=7)[0] == texts and tell(model, seed=1)[0] != texts
    assert tell(model, temperature=0.0)[0] != texts
    # The share of a wording is the model's probability of its tokens, among those that are allowed
    logits = F.linear(bulk.dense_hidden(model, torch.tensor([[7, 5]]))[0, -1], model.head)[[10, 40, 42]]
    many, _ = tell(model, 30_000, 0.3, batch=3000)
    firsts = torch.tensor([text[0] for text in many[10::15]])               # second grammar, prompt [7, 5]
    got = torch.stack([(firsts == token).float().mean() for token in (10, 40, 42)])
    torch.testing.assert_close(got, F.softmax(logits / 0.3, 0), rtol=0, atol=0.04)
    assert got.max() > 0.5                                                  # not an even choice
    # ... and the greedy text follows its logits step by step
    for i, text in enumerate(tell(model, 30, 0.0)[0]):
        before, allowed = [7, *[5] * (i % 5 + 1)], paths(PARTS[i % 3])
        for n, token in enumerate(text):
            options = sorted({path[n] for path in allowed if path[:n] == text[:n] and len(path) > n})
            logits = F.linear(bulk.dense_hidden(model, torch.tensor([before]))[0, -1], model.head)[options]
            assert token == options[logits.argmax()]
            before.append(token)


def test_a_grammars_entropy_is_that_of_the_choices(folder):
    model = Llama.load(folder)
    model.embed.zero_()                                                     # all tokens are as likely
    texts, grammar = tell(model, 300)
    nats = sum(math.log(3) + math.log(2) * (2 + (text[0] == 10) + (20 in text)) for text in texts[::3])
    nats += sum(math.log(3) + math.log(2) * (text[0] == 10) for text in texts[1::3]) + 200 * math.log(2)
    assert abs(grammar.sums[2].item() / nats - 1) < 1e-5


def test_what_fails_on_the_way_of_a_grammar_can_be_stepped_again(folder, monkeypatch, capsys):
    model, make, calls = Llama.load(folder), bulk.Slots.__init__, []
    want, _ = tell(model, 60)

    def on_a_device(self, *args):
        make(self, *args)
        self.ops = bulk.rows.TORCH._replace(attend=failing)

    def failing(*args):
        calls.append(1)
        if len(calls) == 15:                                                # in the middle of a step, K and V half written
            raise RuntimeError("out of luck")
        return bulk.rows.TORCH.attend(*args)
    monkeypatch.setattr(bulk.Slots, "__init__", on_a_device)
    got, grammar = tell(model, 60)
    assert got == want and grammar.sums[0] == sum(map(len, want)) and "out of luck" in capsys.readouterr().err


def test_every_plot_can_be_told(folder):
    rng, tokenizer, seen = random.Random(5), Tokenizer.from_folder(folder), set()
    assert len(templates.PLOTS) == 36 and len(templates.OPENINGS + templates.DAYS) > 90
    for head, *parts in templates.PLOTS:
        assert head.split(":")[0] in {*templates.THINGS, "none"} and len(parts) > 6, head
        assert all(len(set(part.split(" / "))) >= 3 for part in parts), head
    for _ in range(2000):
        plot = templates.plot(rng)
        assert not set("{}~/") & set(plot.ask + plot.question) and make_weights.PLAIN.fullmatch(plot.opening), plot.opening
        for part in plot.parts:
            assert len(set(part)) >= 3
            encoded = [tokenizer.encode(wording) for wording in part]
            assert not any(a != b and b[:len(a)] == a for a in encoded for b in encoded), part      # a would never be told
        for i in range(max(map(len, plot.parts))):                          # each wording is told once, at least
            text = plot.opening + "".join(part[i % len(part)] for part in plot.parts)
            assert make_weights.PLAIN.fullmatch(text) and text.count('"') % 2 == 0, text
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|[.!?] [a-z]|  ", text), text
        seen.add(plot.opening.split()[0].strip('",!'))
        assert not (plot.opening.startswith("One ") and any(wording.startswith(" One ") for wording in plot.parts[0]))
    assert {"Once", "One", "Two", "Long", "Far", "Mom", "Hello", "There", "It", "In"} <= seen


def test_stories_are_told_and_cleaned(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Tokenizer, "chat", lambda self, messages: self.encode(messages[0]["content"]))      # of a base model
    monkeypatch.setattr(make_weights, "VOCABULARY", 400)
    config = replace(CONFIG, max_context=2048)
    shutil.copytree(folder, tmp_path / "model")
    Llama.random(config, seed=1).save(tmp_path / "model")
    command = ["--toy", "--smollm2", str(tmp_path / "model"), "--work", str(tmp_path), "--device", "cpu"]
    make_weights.main(["stories", *command])
    assert re.search(r"tokens sampled, [\d.]+% of them where the grammar left a choice, of [\d.]+ nats", capsys.readouterr().out)
    path = tmp_path / "stories.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    plots = []
    for part in range(16):
        rng = random.Random(f"0 {part}")
        plots += [templates.plot(rng) for _ in range(3)]
    assert len(lines) == len(plots) == 48
    for line, plot in zip(lines, plots):
        rest = line["text"].removeprefix(plot.opening)
        for part in plot.parts:
            rest = rest.removeprefix(next(wording for wording in part if rest.startswith(wording)))
        assert rest == "" and line["question"] == plot.question
    bad = [dict(lines[0], text=text) for text in ("I'm sorry. I am a language model.", "A **bold** fox ran.", "A fox ran")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines + lines[:4] + bad))
    make_weights.main(["text", *command])
    assert "55 texts, 48 kept" in capsys.readouterr().out
    streams, tokenizer = load_file(tmp_path / "text" / "tokens.safetensors"), Tokenizer.from_folder(tmp_path / "text")
    documents = tokenizer.decode(torch.cat([streams["train"], streams["validation"]]).tolist()).split("<|endoftext|>")
    told = "\n".join(documents)
    assert told.count("Question: ") == 6 and all(line["text"] in told for line in lines)


@pytest.mark.parametrize("n", [None, 40])
def test_loss_is_the_divergence_from_the_whole_distribution(folder, n):
    target, rng = Llama.load(folder), random.Random(0)
    rows = bulk.sample_continuations(target, [[rng.randrange(300) for _ in range(4)] for _ in range(12)], 9, 1.0)
    d2t = distill.draft_vocabulary(rows, 300, n, [0]) if n else None
    draft = bulk.new_model(replace(CONFIG, vocab_size=n or 300, target_vocab_size=300 if n else None), 0, "cpu", d2t)
    teacher, batches = distill.Teacher(target, rows, d2t), distill.Batches(rows, 5, 0)
    t2d = distill.to_draft_ids(d2t, 300)
    for step in (0, 1, 2, 3):                                               # computed, then read from what was kept
        row, tokens, index, ids = batches(step)
        hidden, lse, top = teacher(row, tokens, index, ids)
        mapped = tokens if t2d is None else t2d[tokens]
        loss, metrics = distill.distillation_loss(draft, mapped, index, hidden, lse, top if t2d is None else t2d[top],
                                                  teacher.head, n is not None, 0.0)
        kls, agree = [], []
        for r in row.tolist():
            text = rows.tokens[r, :rows.end[r]].long()[None]
            p = F.softmax(F.linear(bulk.dense_hidden(target, text)[0], target.head), dim=-1)[3:-1]
            q = F.linear(bulk.dense_hidden(draft, text if t2d is None else t2d[text])[0], draft.head)[3:-1].log_softmax(-1)
            if n:
                agree.append(d2t[1 + q[:, 1:].argmax(-1)] == p.argmax(-1))
                p = torch.cat([1 - p[:, d2t[1:]].sum(-1, keepdim=True), p[:, d2t[1:]]], dim=1)
            else:
                agree.append(q.argmax(-1) == p.argmax(-1))
            kls.append((p * (p.log() - q)).sum(-1))
        torch.testing.assert_close(loss, torch.cat(kls).mean(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(metrics["greedy acceptance"], torch.cat(agree).float().mean())


def test_report_plays_the_rounds():
    #                 K=4: 2 accepted, rejected (rank 3 = 3rd of the others) | 4 accepted, bonus first | 0 accepted, rank 1
    ranks = [[0, 0, 3] + [0, 0, 0, 0, 0] + [1] + [0] * 4]
    result = distill.report(ranks, lookaheads=(4,))
    assert result["greedy_acceptance"] == 11 / 13
    assert result["K=4"]["accepted"] == (2 + 4 + 0) / 3
    assert result["K=4"]["bonus_recall"] == {"F=1": 2 / 3, "F=2": 2 / 3, "F=4": 1.0, "F=8": 1.0}


def test_distilling_learns_and_transformers_opens_it(folder, tmp_path):
    prompts = openings(tmp_path / "prompts.jsonl", 120)
    distill.main(["--target", str(folder), "--out", str(tmp_path / "draft"), "--prompts", prompts, "--steps", "120", "--lr",
                  "1e-2", *TINY, "--ce", "0.5", "--report", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["training"]["greedy acceptance"] > 0.2                    # a guess is right one time in 300
    assert 0 < report["all"]["greedy_acceptance"] <= 1 and report["all"]["K=4"]["accepted"] > 0
    assert Tokenizer.from_folder(tmp_path / "draft").encode("One day") == Tokenizer.from_folder(folder).encode("One day")
    transformers = pytest.importorskip("transformers")
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "draft", dtype=torch.float32)
    ours, tokens = Llama.load(tmp_path / "draft"), torch.arange(20)[None] * 7
    torch.testing.assert_close(hf(tokens).logits, F.linear(bulk.dense_hidden(ours, tokens), ours.head), rtol=1e-3, atol=1e-3)


def test_interrupted_and_resumed_is_the_same_as_in_one_go(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bulk, "LOG_EVERY", 1)
    curve = lambda text: re.findall(r"step \d+: loss [\d.]+", text)
    command = lambda name, *more: distill.main(["--target", str(folder), "--out", str(tmp_path / name), "--steps", "14",
                                                "--draft-vocab", "64", *TINY, *more])
    command("whole")                                                        # prompts of its own: free sampling
    whole_curve = curve(capsys.readouterr().out)
    usual, calls = distill.distillation_loss, []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 8:                                                 # the first call warms up
            os.kill(os.getpid(), signal.SIGINT)
        return usual(*args)
    monkeypatch.setattr(distill, "distillation_loss", interrupt)
    with pytest.raises(SystemExit) as stop:
        command("parts")
    first = capsys.readouterr()
    assert stop.value.code == 130 and "--resume" in first.err
    command("parts", "--resume")
    second = capsys.readouterr().out
    assert "resumed at step 7" in second
    assert curve(first.out) + curve(second) == whole_curve and len(whole_curve) == 14
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.allclose(whole[name], parts[name], atol=1e-6) for name in whole)
    draft = Llama.load(tmp_path / "parts")
    assert draft.d2t.shape == (64,) and draft.d2t[0] == -1 and draft.d2t[1:].diff().min() > 0 and 0 in draft.d2t
    assert not (tmp_path / "parts" / "tokenizer.json").exists()


def test_the_report_is_of_the_draft_that_was_saved(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "target")
    Llama.load(folder, dtype=torch.bfloat16).save(tmp_path / "target")
    usual, seen = distill.ranks_on_greedy_text, []
    monkeypatch.setattr(distill, "ranks_on_greedy_text", lambda *args: seen.append(args[:2]) or usual(*args))
    distill.main(["--target", str(tmp_path / "target"), "--out", str(tmp_path / "draft"), "--steps", "2", *TINY])
    (target, draft), saved = seen[0], Llama.load(tmp_path / "draft")
    assert saved.dtype == torch.bfloat16 and target.dtype == draft.dtype == torch.float32   # a CPU is slow in bf16
    assert torch.equal(draft.embed, saved.embed.float()) and torch.equal(draft.freqs, saved.freqs)


KILLED_WHILE_IT_SAVES_STEP_6 = """
import os, signal, sys, torch, bulk, distill
bulk.SAVE_EVERY, bulk.LOG_EVERY, save = -1, 1, torch.save
def half(state, path):
    save(state, path)
    if state["step"] == 6:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
distill.main(sys.argv[1:])
"""


def test_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bulk, "LOG_EVERY", 1)
    curve = lambda text: re.findall(r"step \d+: loss [\d.]+", text)
    command = lambda name: ["--target", str(folder), "--out", str(tmp_path / name), "--prompts",
                            openings(tmp_path / "prompts.jsonl", 120), "--steps", "10", *TINY]
    distill.main(command("whole"))
    in_one_go = curve(capsys.readouterr().out)
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_IT_SAVES_STEP_6, *command("parts")], capture_output=True,
                            text=True, cwd=Path(distill.__file__).parent)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "parts" / "config.json").exists(), killed.stderr
    distill.main([*command("parts"), "--resume"])
    second = capsys.readouterr().out
    assert "resumed at step 5" in second and curve(killed.stdout)[:5] + curve(second) == in_one_go


def test_interrupted_while_it_samples_anew_leaves_nothing_of_an_older_run(folder, tmp_path, monkeypatch, capsys):
    command = ["--target", str(folder), "--out", str(tmp_path / "draft"), "--steps", "2", *TINY]
    distill.main(command)
    with pytest.raises(UserError, match="can't be resumed"):
        distill.main([*command, "--layers", "2", "--resume"])
    assert load_file(tmp_path / "draft" / "model.safetensors")              # still the first run's

    def interrupt(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(distill, "sample_continuations", interrupt)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop, bulk.exit_on_interrupt():
        distill.main([*command, "--seed", "1"])
    err = capsys.readouterr().err
    assert stop.value.code == 130 and "--resume" in err and err.count("\n") == 1
    assert not list((tmp_path / "draft.work").iterdir())


def test_slow_steps_are_told_by_the_clock(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bulk, "TELL_EVERY", -1)                             # on a CPU fifty steps may take an hour
    distill.main(["--target", str(folder), "--out", str(tmp_path / "draft"), "--steps", "3", *TINY])
    told = re.findall(r"step (\d): loss .*, greedy acceptance [\d.]+, [\d,]+ tok/s, \d+ s left", capsys.readouterr().out)
    assert told == ["1", "2", "3"]


@pytest.mark.parametrize("change, message", [
    (["--target", "nowhere"], "nowhere"),
    (["--out", "/proc/nowhere/draft"], "can't write"),
    (["--device", "cuda:99"], "--device cuda:99"),
    (["--report", "/nowhere/report.json"], "--report /nowhere/report.json"),
    (["--layers", "0"], "--layers must be at least 1"),
    (["--steps", "-1"], "--steps must be at least 1"),
    (["--lr", "nan"], "--lr must be at least 0"),
    (["--temperature", "0", "-1"], "--temperature must be at least 0"),
    (["--heads", "3", "--kv-heads", "2"], "--heads 3 must be a multiple of --kv-heads 2"),
    (["--no-such-flag"], "--no-such-flag"),
    (["--draft-vocab", "3"], "--draft-vocab 3"),
    (["--draft-vocab", "3000"], "--draft-vocab 3000"),
    (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--prompts", __file__], 'expected {"prompt": text} a line'),
])
def test_mistakes_are_told_in_one_line(folder, tmp_path, capsys, change, message):
    command = ["--target", str(folder), "--out", str(tmp_path / "draft"), "--prompts",
               openings(tmp_path / "prompts.jsonl", 80), *TINY, *change]
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        distill.main(command)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1
    assert not list(tmp_path.glob("draft*/*"))                              # nothing half written


def test_prompts_that_do_not_fit_and_rows_of_another_model_are_told(folder, tmp_path):
    command = ["--target", str(folder), "--out", str(tmp_path / "draft"), "--prompts",
               openings(tmp_path / "prompts.jsonl", 80), *TINY]
    with pytest.raises(UserError, match="too few"):
        distill.main([*command, "--max-new", "4000"])
    ones, path = torch.ones(2, dtype=torch.int64), tmp_path / "rows.safetensors"
    save_file({"tokens": torch.full((2, 9), 300, dtype=torch.int32), "start": ones, "end": 9 * ones}, path)
    with pytest.raises(UserError, match="out of range"):
        distill.main([*command, "--rows", str(path)])
    save_file({"tokens": torch.full((2, 9), 7, dtype=torch.int32), "start": 9 * ones, "end": ones}, path)
    with pytest.raises(UserError, match="out of range"):
        distill.main([*command, "--rows", str(path)])


def test_own_tokenizer_is_one_that_tokenizers_reads(folder):
    ours, text = Tokenizer.from_folder(folder), "Once upon a time, Lily's fox ran 12 miles!\n\nQuestion: Why?"
    assert ours.decode(ours.encode(text)) == text and ours.eos_ids == (0,) and ours.bos_id is None
    assert len(ours.encode("Once there was a little fox named Tim")) < 25
    tokenizers = pytest.importorskip("tokenizers")
    assert tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids == ours.encode(text)


def test_unknown_user_error_is_not_swallowed(folder):
    with pytest.raises(UserError, match="context"):
        bulk.sample_continuations(Llama.load(folder), [[1] * 250], 10)
