"""distill.py and the recipe of weights/, at toy size on the CPU: python -m pytest test_distill.py"""
import json
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
    bpe.save_tokenizer([" ".join(templates.plot(rng)[2:3]) for _ in range(200)], CONFIG.vocab_size, folder)
    return folder


def openings(path, count, seed=0):
    rng = random.Random(seed)
    make_weights.write_prompts(path, [templates.plot(rng)[2] for _ in range(count)])
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
    want = bulk.sample_continuations(model, prompts, 12, [0.0, 0.9], penalty=0.2, batch=4)
    make = bulk.Slots.__init__

    def on_a_device(self, *args):
        make(self, *args)
        self.ops, self.graphs.on = bulk.rows.TRITON, True                   # of which this machine has neither
        self.graphs.stream = None
    monkeypatch.setattr(bulk.Slots, "__init__", on_a_device)
    monkeypatch.setattr(bulk.rows, "TRITON", bulk.rows.TORCH._replace(choose=None))
    got = bulk.sample_continuations(model, prompts, 12, [0.0, 0.9], penalty=0.2, batch=4)
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


def test_plots_put_their_cues_where_sentences_end(folder):
    model, tokenizer = Llama.load(folder), Tokenizer.from_folder(folder)
    texts = [[" Then Tom came.", " In the end,", " they slept."], [" All was well."]] * 3
    cues = [[tokenizer.encode(text) for text in row] for row in texts]
    steer = make_weights.Plots(cues, tokenizer)
    steer.sentence_end[::2], steer.quotes[:] = True, 0                      # a random model seldom ends a sentence
    rows = bulk.sample_continuations(model, [tokenizer.encode("One day, Max")] * 6, 90, 1.0, seed=2, steer=steer)
    lengths = set()
    for row, start, end, parts in zip(*rows, cues):
        text, last = row[start:end].tolist(), 0
        assert len(text) < 90 and text[-len(parts[-1]):] == parts[-1]       # the text ends with its last cue
        for cue in parts:                                                   # in order, each behind one sentence
            at = next(i for i in range(last, len(text)) if text[i:i + len(cue)] == cue)
            assert steer.sentence_end[text[at - 1]] and not steer.sentence_end[text[last:at - 1]].any()
            last = at + len(cue)
            lengths.add(at)
    assert len(lengths) > 6


def test_only_sentences_that_fit_stay_in_a_story():
    story = dict(opening="Once, Max had a kite.", stems=[" The sun", "", "", ""], names=["Max", "Ivy"], strange=["fox", "she"],
                 cues=[" Then the kite was gone.", " Ivy came.", " They found it.", " They were happy."])
    tell = lambda *added: make_weights.clean(dict(story, text=story["opening"] + "".join(
        part + cue for part, cue in zip(added, story["cues"]))))
    plot = story["opening"] + "".join(story["cues"])
    assert tell("", "", "", "") == (plot, 0)
    for wrong in " A fox came.", " She cried.", " Max had a spoon.", " Then Tim came.", ' "Hi," said Max.', " It cost 5 cents.", " Max was happy.":
        assert tell("", wrong, "", "") == (plot, 0), wrong
    text, own = tell("", " Max was sad.", "\nMax ran to\tIvy.", "")
    assert text == plot.replace(" Ivy came.", " Max was sad. Ivy came. Max ran to Ivy.") and own == 29
    assert make_weights.clean(dict(story, text=story["opening"] + " Then the kite was gone. Ivy")) is None


def test_every_plot_can_be_told():
    rng = random.Random(5)
    for kind in templates.PLOTS:
        assert kind[0].split(":")[0] in {*templates.THINGS, "none"} and len(kind) > 6, kind[0]
    for _ in range(3000):
        plot = templates.plot(rng)
        text = plot.opening + "".join(plot.cues)
        assert len(plot.stems) == len(plot.cues) > 0 and not set("{}~/") & set(text + plot.ask + plot.question)
        assert text.count('"') % 2 == 0 and not plot.strange & make_weights.words_of(text), text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|[.!?] [a-z]|  ", text), text


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
