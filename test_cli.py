"""generate.py as a user meets it: real text from tiny random checkpoints, every mistake told in one line, clean exits.

Most tests call main(argv) in this process; the few about signals, pipes and exit codes start the real program.
"""
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import generate
import tune
from model import Llama, LlamaConfig
from tokenizer import Tokenizer

CONTEXT = 2048
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB = 256 + len(SPECIAL)
JSON_KEYS = {"text": str, "token_ids": list, "prompt_tokens": int, "mode": str, "finish_reason": str, "seconds": float,
             "tokens_per_second": float, "time_to_first_token": float, "peak_memory_bytes": int, "rounds": int,
             "tokens_per_round": float, "acceptance_rate": float, "hit_rate": float, "all_hit_rate": float}


# ---------------------------------------------------------------------------------------------------------------------
# Tiny checkpoints

def save_tokenizer(folder, special=SPECIAL):
    """A tokenizer.json whose tokens are the 256 bytes, id = byte, and a few special tokens behind them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]           # these bytes are spelled as themselves
    others = [byte for byte in range(256) if byte not in printable]             # the others as U+0100 and on (GPT-2)
    spell = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    added = [{"id": 256 + i, "content": token, "special": True, "normalized": False, "lstrip": False, "rstrip": False,
              "single_word": False} for i, token in enumerate(special)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": {spell[byte]: byte for byte in range(256)}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps(
        {"version": "1.0", "added_tokens": added, "pre_tokenizer": level, "decoder": level, "model": model}))
    template = "{% for message in messages %}{{ '<|im_start|>' + message['role'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"eos_token": "<|im_end|>", "chat_template": template}))


def save_checkpoint(folder, seed, layers=2, vocab=VOCAB, context=CONTEXT):
    config = LlamaConfig(vocab_size=vocab, dim=32, n_layers=layers, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=64,
                         max_context=context, eos_ids=(256,), dtype=torch.float32)
    model = Llama.random(config, seed=seed)
    model.head[256:VOCAB] = 0           # greedy text never stops by itself
    model.save(folder)
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="session")
def target(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("target"), seed=0)


@pytest.fixture(scope="session")
def draft(tmp_path_factory, target):
    """The target with noise on its weights: it is often right, not always."""
    folder = tmp_path_factory.mktemp("draft")
    model = Llama.load(target)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.1 * param.std(correction=0) * torch.randn(param.shape, generator=noise)
    model.save(folder)
    return str(folder)


@pytest.fixture
def broken(tmp_path, target):
    """A copy of the target to break."""
    return Path(shutil.copytree(target, tmp_path / "broken"))


# ---------------------------------------------------------------------------------------------------------------------
# Running it

@pytest.fixture
def run(monkeypatch, capsys):
    """run(*argv, stdin=...) -> (exit code, stdout, stderr) of main, on the CPU."""
    monkeypatch.setattr(sys, "argv", ["generate.py"])

    def run(*argv, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        try:
            code = generate.main(["--device", "cpu", *map(str, argv)])
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        return code, out, err
    return run


@pytest.fixture
def refused(run, monkeypatch):
    """refused(*argv, says=...): one line on stderr with these words, exit code 2, nothing on stdout.

    cheap: before any weights are read.
    """
    def refused(*argv, says, stdin=b"", cheap=True):
        with monkeypatch.context() as patch:
            if cheap:
                patch.setattr(generate.Llama, "load", lambda *_, **__: pytest.fail("weights were read first"))
            code, out, err = run(*argv, stdin=stdin)
        assert (code, out) == (2, "")
        assert err.startswith("generate.py: error: ") and err.count("\n") == 1 and err.endswith("\n"), err
        for word in [says] if isinstance(says, str) else says:
            assert word in err, err
    return refused


def start(*argv, **environment):
    """The real program in a process of its own, on the CPU."""
    argv = [sys.executable, generate.__file__, "--device", "cpu", *map(str, argv)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "", **environment}
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)


def lines(out):
    return [json.loads(line) for line in out.splitlines()]


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Text

def test_text_is_the_decoded_tokens(run, target):
    code, out, err = run("--model", target, "--prompt", "Once", "--max-new-tokens", 40)
    assert code == 0 and out.endswith("\n")
    _, line, _ = run("--model", target, "--prompt", "Once", "--max-new-tokens", 40, "--json")
    answer, tokenizer = json.loads(line), Tokenizer.from_folder(target)
    stop = answer["finish_reason"] == "stop"
    assert answer["text"] == tokenizer.decode(answer["token_ids"][:-1] if stop else answer["token_ids"]) == out[:-1]
    assert len(answer["token_ids"]) == 40 or stop
    assert len(answer["text"]) > 5 and answer["prompt_tokens"] == len(tokenizer.prompt("Once"))


def test_text_is_written_as_it_is_made(run, target, monkeypatch):
    pieces, made = [], []
    monkeypatch.setattr(generate, "write", lambda text, origin=None: pieces.append((len(made), text)))
    decode = generate.MODES["ar"]

    def counted(*args, **kwargs):
        for chunks in decode(*args, **kwargs):
            made.extend(chunks)
            yield chunks
    monkeypatch.setitem(generate.MODES, "ar", counted)
    run("--model", target, "--prompt", "Once", "--max-new-tokens", 20)
    assert len({when for when, text in pieces if text}) > 10                # along the way, not at the end


def test_closing_line(run, target, draft):
    _, _, err = run("--model", target, "--prompt", "Once", "--max-new-tokens", 8, "--mode", "ar")
    assert re.fullmatch(r"8 tokens \| [\d.]+ tok/s \| first token \d+ ms \| peak memory [\d.]+ GB\n", err)
    common = "--model", target, "--draft", draft, "--prompt", "Once", "--max-new-tokens", 8
    _, _, err = run(*common, "--mode", "sd")
    assert re.search(r"GB \| [\d.]+ tokens/round \| accepted \d+%\n$", err) and err.count("\n") == 1
    _, _, err = run(*common)
    assert re.search(r"tokens/round \| accepted \d+% \| hits \d+%, of whole batches \d+%\n$", err)
    assert err.count("\n") == 1


def test_half_a_character_at_the_end(run, target):
    """The last token of a text may begin a character; what it becomes is part of the text, streamed and whole."""
    found = 0
    for n in range(1, 12):
        ask = "--model", target, "--prompt", "Once", "--max-new-tokens", n
        text, answer = run(*ask)[1], json.loads(run(*ask, "--json")[1])
        assert text == answer["text"] + "\n" == Tokenizer.from_folder(target).decode(answer["token_ids"]) + "\n"
        found += answer["token_ids"][-1] >= 0xc2 and text.endswith("\ufffd\n")
    assert found


def test_prompt_from_stdin(run, target):
    ask = "--model", target, "--max-new-tokens", 12, "--json", "--prompt"
    expected = lines(run(*ask, "Grüße, 世界")[1])[0]
    piped = lines(run(*ask, "-", stdin="Grüße, 世界\n".encode())[1])[0]
    assert piped["token_ids"] == expected["token_ids"] and piped["prompt_tokens"] == len("Grüße, 世界".encode())


def test_seed_and_sampling_reach_the_engine(run, target):
    def text(*flags):
        return run("--model", target, "--prompt", "Once", "--max-new-tokens", 24, *flags)[1]
    assert text("--temperature", 1, "--seed", 1) == text("--temperature", 1, "--seed", 1)
    assert text("--temperature", 1, "--seed", 1) != text("--temperature", 1, "--seed", 2)
    assert text("--seed", 1) == text("--seed", 2)
    assert text("--temperature", 1, "--top-k", 1) == text() == text("--temperature", 1, "--top-p", 1e-6)


def test_padded_model_vocabulary(run, tmp_path):
    """Ids that the tokenizer hasn't got decode to nothing."""
    folder = save_checkpoint(tmp_path / "padded", seed=3, vocab=VOCAB + 200)
    _, out, _ = run("--model", folder, "--prompt", "Once", "--max-new-tokens", 40, "--temperature", 1, "--json")
    answer = lines(out)[0]
    assert max(answer["token_ids"]) >= VOCAB
    assert answer["text"] == Tokenizer.from_folder(folder).decode([i for i in answer["token_ids"] if i < VOCAB])


def test_stop_id_ends_the_text_and_is_not_printed(run, broken):
    ask = "--model", broken, "--prompt", "Once", "--max-new-tokens", 30, "--json"
    free = lines(run(*ask)[1])[0]["token_ids"]
    stop = free[10]
    generation = broken / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [256, stop]}))
    answer = lines(run(*ask)[1])[0]
    cut = free.index(stop) + 1
    assert answer["token_ids"] == free[:cut] and answer["finish_reason"] == "stop"
    assert answer["text"] == Tokenizer.from_folder(broken).decode(free[:cut - 1])


# ---------------------------------------------------------------------------------------------------------------------
# Modes

@pytest.mark.parametrize("mode", ["ar", "sd", "ssd"])
def test_json_schema(run, target, draft, mode):
    code, out, _ = run("--model", target, "--draft", draft, "--mode", mode, "--prompt", "Once", "--max-new-tokens", 32,
                       "--json")
    assert code == 0 and out.count("\n") == 1
    answer = json.loads(out)
    no_hits = {"hit_rate", "all_hit_rate"}
    none = {"ar": {"acceptance_rate", *no_hits}, "sd": no_hits, "ssd": set()}[mode]
    assert set(answer) == set(JSON_KEYS)
    for key, kind in JSON_KEYS.items():
        assert answer[key] is None if key in none else isinstance(answer[key], kind), key
    assert answer["mode"] == mode and answer["finish_reason"] == "length" and len(answer["token_ids"]) == 32
    assert 0 < answer["time_to_first_token"] < answer["seconds"] and answer["tokens_per_second"] > 0
    assert answer["peak_memory_bytes"] > 1e7
    assert answer["tokens_per_round"] == pytest.approx(32 / answer["rounds"])
    assert (answer["rounds"] == 32) == (mode == "ar")
    if mode == "ssd":
        assert 0 < answer["hit_rate"] <= 1 and 0 < answer["acceptance_rate"] <= 1


def test_all_modes_give_the_same_tokens(run, target, draft):
    for flags in ([], ["--temperature", "0.8", "--seed", "5"], ["--tree", "2,2,1"], ["--k", "2", "--backup", "fast"]):
        ask = "--model", target, "--draft", draft, "--prompt", "Once", "--max-new-tokens", 24, "--json", *flags
        answers = [lines(run(*ask, "--mode", mode)[1])[0] for mode in generate.MODES]
        assert answers[0]["token_ids"] == answers[1]["token_ids"] == answers[2]["token_ids"]


def test_default_mode(run, target, draft, monkeypatch, tmp_path):
    ask = "--prompt", "Once", "--max-new-tokens", 4, "--json"
    code, out, err = run("--model", target, "--draft", draft, *ask)
    assert lines(out)[0]["mode"] == "ssd" and "--mode" not in err
    code, out, err = run("--model", target, *ask)
    assert lines(out)[0]["mode"] == "ar" and err.startswith("no --draft") and err.count("\n") == 2
    code, out, err = run("--model", target, "--mode", "ar", *ask)
    assert lines(out)[0]["mode"] == "ar" and err.count("\n") == 1
    monkeypatch.setattr(generate, "WEIGHTS", tmp_path)                      # the embedded pair
    shutil.copytree(target, tmp_path / "target")
    shutil.copytree(draft, tmp_path / "draft")
    assert lines(run(*ask)[1])[0]["mode"] == "ssd"


def test_compare(run, target, draft):
    code, out, err = run("--model", target, "--draft", draft, "--prompt", "Once", "--max-new-tokens", 24, "--compare")
    head, ar, sd, ssd = [line.split() for line in out.splitlines()]
    assert code == 0 and head[0] == "mode" and (ar[0], sd[0], ssd[0]) == ("ar", "sd", "ssd")
    assert ar[2:] == ["1.00", "-", "-", "-", "yes"] and sd[4:] == ["-", "-", "yes"] and ssd[6] == "yes"
    assert float(ssd[2]) > 1 and ssd[4].endswith("%") and all(float(row[1]) > 0 for row in (ar, sd, ssd))
    _, out, _ = run("--model", target, "--draft", draft, "--prompt", "Once", "--max-new-tokens", 24, "--compare",
                    "--temperature", 1, "--accept", "residual")
    assert [line.split()[-1] for line in out.splitlines()[1:]] == ["yes", "no", "no"]       # lossless, another sample


def test_color(run, target, draft, tmp_path):
    ask = "--model", target, "--draft", draft, "--prompt", "Once", "--max-new-tokens", 40
    plain, (_, tinted, err) = run(*ask)[1], run(*ask, "--color")
    path = write_rows(tmp_path / "rows.jsonl", {"prompt": "Once"}, {"prompt": "Once"})
    _, both, _ = run(*ask[:4], "--prompts", path, *ask[6:], "--batch", 2, "--color")
    assert both.count(tinted) == 2 and "=== 2 ===" in both
    assert re.sub("\033\\[\\d+m", "", tinted) == plain and tinted.count("\033[0m") > 10
    assert not re.search("\033\\[3\\dm\033", tinted)                        # no tint around nothing
    assert all(tint in tinted and f"{tint}{origin}" in err for origin, tint in generate.TINTS.items())


# ---------------------------------------------------------------------------------------------------------------------
# Tuning, timelines, two devices

FIXED = tune.Times(1, [[n, 5e-3] for n in tune.TOKENS], [[1, 1e-3], [32, 1e-3]], [[None, 1.0, 1.0]])     # any machine


@pytest.fixture
def tuned(run, target, draft, tmp_path, monkeypatch):
    """tuned(*flags, times=...) -> (answer, stderr) of a run after --tune found `times`, in a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ask = "--model", target, "--draft", draft, "--prompt", "Once", "--max-new-tokens", 24, "--json"

    def tuned(*flags, times=FIXED):
        with monkeypatch.context() as patch:
            patch.setattr(tune, "measure", lambda *_: dataclasses.replace(times, extra=dict(times.extra)))
            patch.setattr(tune, "try_modes", lambda times, *_: tune.Stats())
            code, _, err = run(*ask, "--tune")
            assert code == 0 and "tune: fastest: " in err
        monkeypatch.setattr(tune, "measure", lambda *_: pytest.fail("measured without --tune"))
        code, out, err = run(*ask, *flags)
        assert code == 0
        return lines(out)[0], err
    return tuned


def used(monkeypatch):
    """The Options that each loop is started with, by mode."""
    seen = {}
    for mode in ("sd", "ssd"):
        loop = generate.MODES[mode]
        monkeypatch.setitem(generate.MODES, mode, lambda *args, _loop=loop, _mode=mode, **more: (
            seen.update({_mode: args[5]}), _loop(*args, **more))[1])
    return seen


def test_tune(run, target, draft, tmp_path, monkeypatch):
    """The real thing: it measures, says what it found, answers, and keeps it for the next run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ask = "--model", target, "--draft", draft, "--prompt", "Once", "--max-new-tokens", 24, "--json"
    plain = lines(run(*ask, "--mode", "ssd")[1])[0]
    code, out, err = run(*ask, "--tune")
    assert code == 0 and lines(out)[0]["token_ids"] == plain["token_ids"]
    fastest = re.search(r"tune: fastest: (ar|sd|ssd)\n", err)[1]
    assert lines(out)[0]["mode"] == fastest and all(f"tune: {mode}: " in err for mode in generate.MODES)
    (entry,) = json.loads((tmp_path / "saguaro" / "tune.json").read_text()).values()
    assert entry["fastest"] == fastest and set(entry["plans"]) == set(generate.MODES)
    code, out, err = run(*ask)
    assert lines(out)[0]["mode"] == fastest and "tune:" not in err


def test_tuned_choice_is_used(tuned, monkeypatch):
    seen = used(monkeypatch)
    answer, err = tuned()
    assert answer["mode"] == "ssd" and err.count("\n") == 1
    expected = tune.choose(FIXED, tune.Stats(), SimpleNamespace(device=torch.device("cpu"), config=SimpleNamespace(vocab_size=VOCAB)))
    assert (seen["ssd"].k, seen["ssd"].tree, seen["ssd"].fanout_budget) == expected["ssd"][:3] != (6, None, 16)


@pytest.mark.parametrize("flags", [("--k", 3), ("--tree", "3,1"), ("--fanout-budget", 5), ("--mode", "sd", "--k", 2)])
def test_flags_win_over_the_choice(tuned, monkeypatch, flags):
    seen = used(monkeypatch)
    answer, _ = tuned(*flags)
    given = {flag.strip("-").replace("-", "_"): value for flag, value in zip(flags[::2], flags[1::2])}
    assert answer["mode"] == given.pop("mode", "ssd")
    assert all(getattr(seen[answer["mode"]], name) == value for name, value in given.items())


@pytest.mark.parametrize("mode, times", [("ar", dataclasses.replace(FIXED, draft=[[1, 9e-2]])),
                                         ("sd", dataclasses.replace(FIXED, slowdown=[[None, 2.0, 2.0]]))])
def test_slower_speculation_is_not_used(tuned, mode, times):
    answer, err = tuned(times=times)
    assert answer["mode"] == mode and err.startswith(f"--mode {mode}: --tune found it faster") and err.count("\n") == 2
    answer, err = tuned("--mode", "ssd", times=times)
    assert answer["mode"] == "ssd" and err.count("\n") == 1


def test_fewer_prompts_than_the_batch_have_room_for(run, target, draft, monkeypatch):
    seen = used(monkeypatch)
    run("--model", target, "--draft", draft, "--prompt", "Once", "--max-new-tokens", 4, "--batch", 64)
    assert seen["ssd"].fanout_budget == 16


@pytest.mark.parametrize("flags, tree, budget", [((), None, 16), (("--tree", 32), "32", 4), (("--tree", "4,2,1"), "4,2,1", 4),
                                                 (("--tree", "2,1,1"), "2,1,1", 8), (("--tree", 8, "--k", 8), "8", 16),
                                                 (("--tree", 32, "--fanout-budget", 7), "32", 7), (("--batch", 2), None, 16),
                                                 (("--batch", 4), None, 8), (("--batch", 64), None, 4),
                                                 (("--batch", 4, "--tree", "2,1,1"), "2,1,1", 4),
                                                 (("--batch", 8, "--fanout-budget", 16), None, 16)])
def test_without_a_choice_the_defaults(run, target, draft, monkeypatch, tmp_path, flags, tree, budget):
    seen, prompts = used(monkeypatch), tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Once"}\n' * dict(zip(flags[::2], flags[1::2])).get("--batch", 1))
    run("--model", target, "--draft", draft, "--prompts", prompts, "--max-new-tokens", 4, *(flags or ("--k", "auto")))
    assert (seen["ssd"].k, seen["ssd"].tree, seen["ssd"].fanout_budget) == (8 if "--k" in flags else 6, tree, budget)


def test_tune_in_a_conversation(run, target, draft):
    code, out, err = run("--model", target, "--draft", draft, "--chat", "--max-new-tokens", 8, "--tune", stdin=b"hi\n")
    assert code == 0 and out.count("\n") == 1 and "tune: fastest" in err


@pytest.mark.parametrize("mode", ["ar", "sd", "ssd"])
def test_trace_and_timeline(run, target, draft, tmp_path, mode):
    path = write_rows(tmp_path / "rows.jsonl", {"prompt": "Once"}, {"prompt": "a"})
    ask = "--model", target, "--draft", draft, "--prompts", path, "--max-new-tokens", 24, "--mode", mode
    code, out, err = run(*ask, "--trace", tmp_path / "t.json", "--timeline")
    assert code == 0 and out == run(*ask)[1]
    lane = {line.split()[0]: line for line in err.splitlines() if line.strip()}
    assert "█" in lane["target"] and ("▒" in lane["draft"]) == (mode != "ar") and "mean: " in err
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    names = {"ar": {"verify", "read-back"}, "sd": {"verify", "read-back", "draft", "commit"},
             "ssd": {"verify", "read-back", "draft", "join", "miss"}}[mode]
    assert {event["name"] for event in events if event["ph"] == "X"} == names
    assert ("✗" in err) == (mode == "ssd") and "\033" not in err


def test_draft_device(run, target, draft):
    ask = "--model", target, "--draft", draft, "--prompt", "Once", "--max-new-tokens", 24
    assert run(*ask, "--draft-device", "cpu")[:2] == run(*ask)[:2]


# ---------------------------------------------------------------------------------------------------------------------
# Several prompts

ROWS = [{"prompt": "Once upon a time", "id": "a", "level": [1, 2]}, {"prompt": "x", "id": "b"},
        {"prompt": "def fib(n):\n", "id": "c"}, {"prompt": "Grüße", "id": "d"}]


@pytest.mark.parametrize("temperature", [0, 1])
def test_batch_equals_one_by_one(run, target, draft, tmp_path, temperature):
    path = write_rows(tmp_path / "rows.jsonl", *ROWS)
    ask = "--model", target, "--draft", draft, "--prompts", path, "--max-new-tokens", 24, "--temperature", temperature
    batched, single = lines(run(*ask, "--json", "--batch", 3)[1]), lines(run(*ask, "--json")[1])
    assert [a["id"] for a in batched] == [a["id"] for a in single] == list("abcd") and batched[0]["level"] == [1, 2]
    assert [a["token_ids"] for a in batched] == [a["token_ids"] for a in single]
    assert all("prompt" not in a for a in batched)
    alone = lines(run("--model", target, "--mode", "ar", "--prompt", ROWS[2]["prompt"], "--max-new-tokens", 24,
                      "--temperature", temperature, "--json")[1])[0]
    assert alone["token_ids"] == batched[2]["token_ids"]


def test_batch_text_is_whole_under_headers(run, target, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", *ROWS, {"prompt": "no id"})
    ask = "--model", target, "--prompts", path, "--max-new-tokens", 16
    answers = lines(run(*ask, "--json", "--batch", 2)[1])
    for batch in (1, 2, 8):
        _, out, err = run(*ask, "--batch", batch)
        texts = {name: a["text"] for name, a in zip([*"abcd", "5"], answers)}
        for name, text in texts.items():
            assert f"=== {name} ===\n{text}\n" in out
        assert out.count("===") == 10 and "80 tokens" in err and len(err.splitlines()) == 2


def test_blank_lines_and_byte_order_mark_are_fine(run, target, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\n{"prompt": "a"}\r\n\n{"prompt": "b\xe2\x80\xa8c"}')
    code, out, _ = run("--model", target, "--prompts", path, "--max-new-tokens", 2, "--json")
    assert code == 0 and [a["prompt_tokens"] for a in lines(out)] == [1, 5]


# ---------------------------------------------------------------------------------------------------------------------
# Chat

def test_chat_one_shot_uses_the_template_and_its_stop_ids(run, target):
    code, out, _ = run("--model", target, "--chat", "--prompt", "Hello", "--max-new-tokens", 6, "--json")
    tokenizer = Tokenizer.from_folder(target)
    assert code == 0
    assert lines(out)[0]["prompt_tokens"] == len(tokenizer.chat([{"role": "user", "content": "Hello"}]))
    args = generate.parse_flags(["--model", target, "--chat"])
    assert generate.Engine(args).stop_ids == {256, 258}                     # config.json's and the chat's


def test_conversation_remembers(run, target, draft):
    chat = "--model", target, "--draft", draft, "--chat", "--max-new-tokens", 10, "--temperature", 1, "--json"
    code, out, err = run(*chat, stdin="Hello\n\nAnd now?\n".encode())
    first, second = lines(out)
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": first["text"]},
                {"role": "user", "content": "And now?"}]
    assert code == 0 and second["prompt_tokens"] == len(Tokenizer.from_folder(target).chat(messages))
    assert err.count("tok/s") == 2
    fresh = lines(run(*chat, stdin=b"And now?\n")[1])[0]
    assert fresh["token_ids"] != second["token_ids"]


def test_conversation_forgets_when_the_context_is_full(run, tmp_path):
    folder = save_checkpoint(tmp_path / "short", seed=0, context=120)
    chat = "--model", folder, "--chat", "--max-new-tokens", 10, "--json"
    long = "Hello there, how do you do today?"
    questions = [long, "Good.", "Hello there", "And now?", long]
    code, out, err = run(*chat, stdin="\n".join([*questions[:4], "x" * 100, questions[4]]).encode())
    answers, tokenizer, messages = lines(out), Tokenizer.from_folder(folder), []
    assert code == 0 and len(answers) == 5                                  # none to the x; the chat goes on
    assert "forgotten" in err and "context of 120" in err
    for question, answer in zip(questions[:4], answers):
        messages.append({"role": "user", "content": question})
        while len(tokenizer.chat(messages)) > 120 - 10:
            del messages[:2]                                                # a question goes with its answer
        assert answer["prompt_tokens"] == len(tokenizer.chat(messages))
        messages.append({"role": "assistant", "content": answer["text"]})
    assert answers[4]["token_ids"] == answers[0]["token_ids"]


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes: flags

@pytest.mark.parametrize("flags, says", [
    (["--temperature", "-0.1"], ["--temperature", "-0.1"]), (["--temperature", "nan"], "--temperature"),
    (["--temperature", "inf"], "--temperature"), (["--top-p", "0"], "--top-p"), (["--top-p", "1.01"], "--top-p"),
    (["--top-p", "nan"], "--top-p"), (["--top-k", "-1"], "--top-k"), (["--max-new-tokens", "0"], "--max-new-tokens"),
    (["--seed", "-1"], "--seed"), (["--seed", str(2**63)], "--seed"), (["--batch", "0"], "--batch"),
    (["--k", "0"], "--k"), (["--k", "six"], ["--k", "auto", "six"]), (["--k", "1.5"], ["--k", "auto", "1.5"]),
    (["--fanout-budget", "0"], "budget"), (["--fanout-budget", "wide"], ["--fanout-budget", "auto", "wide"]), (["--saguaro-c", "-0.1"], "--saguaro-c"),
    (["--saguaro-c", "1.1"], "--saguaro-c"), (["--saguaro-c", "nan"], "--saguaro-c"), (["--tree", "4,x"], "4,x"),
    (["--fanout-budget", "5000"], "1024"), (["--kernels", "triton"], "CUDA"),
    (["--tree", "0"], "--tree"), (["--tree", "128"], ["128", "127"]), (["--tree", "8,8,8"], ["584", "127"]),
    (["--fanout", "wide"], "--fanout"), (["--accept", "all"], "--accept"), (["--backup", "none"], "--backup"),
    (["--mode", "fast"], "--mode"), (["--max-new-tokens", "ten"], "--max-new-tokens"), (["--bogus"], "--bogus"),
    (["--temp", "1"], "--temp"),
    (["--dtype", "int8"], "--dtype"), (["--device", "bogus"], "--device bogus"), (["--device", "meta"], "--device meta"),
    (["--device", "cuda:99"], "--device cuda:99"), (["--prompts", "x.jsonl"], "not both"),
    (["--json", "--color"], "--color"), (["--compare", "--json"], "--compare"),
    (["--compare", "--mode", "sd"], "--compare"), (["--compare", "--timeline"], ["--timeline", "--compare"]),
    (["--compare", "--trace", "t.json"], ["--trace", "--compare"]), (["--trace", "/no/such/t.json"], "/no/such/t.json"),
    (["--trace", "."], "--trace ."), (["--draft-device", "bogus"], "--draft-device bogus"),
    (["--draft-device", "cuda:99"], "--draft-device cuda:99"), (["--mode", "ar", "--tune"], ["--tune", "draft"]),
    (["--mode", "ar", "--draft-device", "cpu"], ["--draft-device", "draft"]),
    (["--mode", "ar", "--draft-dtype", "int8"], ["--draft-dtype", "draft"]),
])
def test_bad_flag(refused, target, draft, flags, says):
    refused("--model", target, "--draft", draft, "--prompt", "Once", *flags, says=says)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_cuda(refused, target):
    refused("--model", target, "--prompt", "Once", "--device", "cuda", says="--device cuda")


def test_nothing_to_do(refused, target):
    refused("--model", target, says="--prompt")
    refused("--model", target, "--compare", "--chat", says="--compare needs")


@pytest.mark.parametrize("flags", [["--mode", "sd"], ["--mode", "ssd"], ["--compare"]])
def test_speculation_without_draft(refused, target, flags):
    refused("--model", target, "--prompt", "Once", *flags, says=["--draft", flags[-1]])


def test_no_model_and_no_embedded_pair(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(generate, "WEIGHTS", tmp_path / "weights")
    refused("--prompt", "Once", says=["--model", str(tmp_path / "weights")])


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes: prompts

@pytest.mark.parametrize("chat", [[], ["--chat"]])
def test_empty_prompt(refused, target, tmp_path, chat):
    refused("--model", target, "--prompt", "", *chat, says="empty")
    refused("--model", target, "--prompt", "-", *chat, stdin=b"\n", says="empty")
    path = write_rows(tmp_path / "rows.jsonl", {"prompt": "a"}, {"prompt": ""})
    refused("--model", target, "--prompts", path, *chat, says=["line 2", "empty"])


def test_prompt_that_is_not_text(refused, target, tmp_path):
    refused("--model", target, "--prompt", "caf\udce9", says="UTF-8")       # how Python passes on a stray byte in argv
    refused("--model", target, "--prompt", "-", stdin=b"caf\xe9", says="UTF-8")
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n')
    refused("--model", target, "--prompts", path, says=["line 2", "UTF-8"])
    refused("--model", target, "--mode", "ar", "--chat", stdin=b"caf\xe9\n", says="UTF-8", cheap=False)


def test_prompts_file(refused, target, tmp_path):
    path = tmp_path / "rows.jsonl"
    ask = "--model", target, "--prompts", path
    refused(*ask, says=[str(path), "No such file"])
    refused("--model", target, "--prompts", tmp_path, says=[str(tmp_path), "directory"])
    for line, says in ((b'{"prompt": "b"', "not JSON"), (b'{"text": "b"}', '"prompt"'), (b'{"prompt": 5}', '"prompt"'),
                       (b'["b"]', '"prompt"')):
        path.write_bytes(b'{"prompt": "a"}\n\n' + line + b"\n")
        refused(*ask, says=["line 3", says])
    path.write_bytes(b"\n")
    refused(*ask, says="no prompt")


def test_over_the_context(refused, run, target, tmp_path):
    fits = CONTEXT - 8
    refused("--model", target, "--prompt", "x" * (fits + 1), "--max-new-tokens", 8,
            says=[str(fits + 1), str(CONTEXT + 1), f"target's context of {CONTEXT}"])
    path = write_rows(tmp_path / "rows.jsonl", {"prompt": "a"}, {"prompt": "x" * CONTEXT})
    refused("--model", target, "--prompts", path, "--max-new-tokens", 8, says=["line 2", str(CONTEXT)])


def test_context_exactly_full(run, target, draft):
    for mode in generate.MODES:
        code, out, _ = run("--model", target, "--draft", draft, "--mode", mode, "--prompt", "x" * (CONTEXT - 8),
                           "--max-new-tokens", 8, "--json")
        assert code == 0 and len(lines(out)[0]["token_ids"]) == 8


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes: checkpoints

def test_no_such_folder(refused, target):
    refused("--model", "/no/such/folder", "--prompt", "Once", says="/no/such/folder")
    refused("--model", target, "--draft", "/no/such/draft", "--prompt", "Once", says="/no/such/draft")


def test_bad_config(refused, broken):
    path = broken / "config.json"
    config = json.loads(path.read_text())
    ask = "--model", broken, "--prompt", "Once"
    path.write_text("{" + path.read_text())
    refused(*ask, says=str(path))
    path.write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}))
    refused(*ask, says=[str(path), "GPT2LMHeadModel", "LlamaForCausalLM"])
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "hidden_size"}))
    refused(*ask, says=[str(path), "hidden_size"])
    path.unlink()
    refused(*ask, says=[str(path), "missing"])


def test_bad_weights(refused, broken):
    path = broken / "model.safetensors"
    content, ask = path.read_bytes(), ("--model", broken, "--prompt", "Once")
    path.write_bytes(content[:-100])
    refused(*ask, says=str(path), cheap=False)
    path.write_bytes(content[:4])
    refused(*ask, says=str(path), cheap=False)
    path.unlink()
    refused(*ask, says=[str(path), "missing"], cheap=False)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(*ask, says="model-00001-of-00002.safetensors", cheap=False)


def test_bad_tensor(refused, broken):
    config = json.loads((broken / "config.json").read_text())
    ask = "--model", broken, "--prompt", "Once"
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    refused(*ask, says=["model.layers.2", "missing"], cheap=False)
    (broken / "config.json").write_text(json.dumps({**config, "intermediate_size": 65}))
    refused(*ask, says=["mlp.", "64", "65"], cheap=False)


def test_bad_tokenizer(refused, broken):
    ask = "--model", broken, "--prompt", "Once"
    save_tokenizer(broken, SPECIAL + ("<|one|>", "<|too|>", "<|many|>"))
    refused(*ask, says=[str(VOCAB), str(VOCAB + 3)])
    (broken / "tokenizer.json").write_text("{}")
    refused(*ask, says="tokenizer.json")
    (broken / "tokenizer.json").unlink()
    refused(*ask, says="tokenizer.json")


def test_chat_without_template(refused, broken):
    (broken / "tokenizer_config.json").write_text("{}")
    save_special = json.loads((broken / "tokenizer.json").read_text())
    save_special["added_tokens"] = save_special["added_tokens"][:1]
    (broken / "tokenizer.json").write_text(json.dumps(save_special))
    refused("--model", broken, "--chat", "--prompt", "Once", says="chat template")
    refused("--model", broken, "--chat", says="chat template")


def test_bad_draft(refused, target, tmp_path):
    other = save_checkpoint(tmp_path / "other", seed=0, vocab=VOCAB + 5)
    refused("--model", target, "--draft", other, "--prompt", "Once", says=[str(VOCAB), str(VOCAB + 5)])
    short = save_checkpoint(tmp_path / "short", seed=0, context=64)
    refused("--model", target, "--draft", short, "--prompt", "Once", "--max-new-tokens", 64,
            says=["68", "draft's context of 64"])


# ---------------------------------------------------------------------------------------------------------------------
# Clean exits

@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(mode, n): Ctrl-C comes after n rounds."""
    def interrupt(mode, rounds):
        loop = generate.MODES[mode]

        def interrupted(*args, **kwargs):
            for done, chunks in enumerate(loop(*args, **kwargs)):
                if done == rounds:
                    raise KeyboardInterrupt
                yield chunks
        monkeypatch.setitem(generate.MODES, mode, interrupted)
    return interrupt


def test_interrupted_text(run, target, interrupt):
    ask = "--model", target, "--mode", "ar", "--prompt", "Once", "--max-new-tokens", 30
    whole = run(*ask)[1]
    interrupt("ar", 12)
    code, out, err = run(*ask)
    assert code == 130 and out.endswith("\n") and len(out) > 5 and whole.startswith(out[:-1]) and out != whole
    assert err.startswith("12 tokens | ") and err.count("\n") == 1


def test_interrupted_batch(run, target, tmp_path, interrupt):
    path = write_rows(tmp_path / "rows.jsonl", *ROWS)
    ask = "--model", target, "--mode", "ar", "--prompts", path, "--max-new-tokens", 30, "--batch", 3
    whole = lines(run(*ask, "--json")[1])
    interrupt("ar", 12)
    code, out, err = run(*ask, "--json")
    answers = lines(out)
    assert code == 130 and [a["id"] for a in answers] == list("abc")        # the fourth was never begun
    assert all(a["finish_reason"] == "interrupted" and a["token_ids"] == w["token_ids"][:12]
               for a, w in zip(answers, whole))
    assert err.startswith("36 tokens | ")
    code, out, err = run(*ask)
    assert code == 130 and out == "".join(f"=== {a['id']} ===\n{a['text']}\n" for a in answers)
    assert err.startswith("36 tokens | ")


def test_interrupted_before_the_first_token(run, target, tmp_path, interrupt):
    interrupt("ar", 0)
    path = write_rows(tmp_path / "rows.jsonl", *ROWS)
    for flags in (["--prompt", "Once"], ["--prompts", path, "--batch", "4"], ["--prompt", "Once", "--json"]):
        code, _, err = run("--model", target, "--mode", "ar", *flags)
        assert code == 130 and err.startswith("0 tokens | ") and err.count("\n") == 1


def test_interrupted_chat(run, target, interrupt, monkeypatch):
    interrupt("ar", 5)
    code, out, err = run("--model", target, "--mode", "ar", "--chat", stdin=b"Hello\nHello\n")
    assert code == 130 and out.endswith("\n") and err.count("5 tokens | ") == 1
    monkeypatch.setattr("builtins.input", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run("--model", target, "--mode", "ar", "--chat") == (130, "", "\n")      # waiting for a line


def test_interrupted_loading(run, target, monkeypatch):
    def load(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(generate.Llama, "load", load)
    assert run("--model", target, "--mode", "ar", "--prompt", "Once") == (130, "", "\n")


@pytest.mark.parametrize("mode", ["ar", "ssd"])
def test_ctrl_c(target, draft, mode):
    """The real signal to the real program, while it streams."""
    process = start("--model", target, "--draft", draft, "--mode", mode, "--prompt", "Once", "--max-new-tokens",
                    CONTEXT - 10)
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and (first + out).endswith(b"\n")
    closing = re.fullmatch(rb"(\d+) tokens \| .* GB( \| .*)?\n", err)
    assert closing and 1 <= int(closing[1]) < CONTEXT - 10


def test_reader_goes_away(target):
    process = start("--model", target, "--mode", "ar", "--prompt", "Once", "--max-new-tokens", CONTEXT - 10)
    process.stdout.read(1)
    process.stdout.close()                                                  # as `| head -c 1` does
    assert process.wait(timeout=30) == 141 and process.stderr.read() == b""


def test_real_exit_code_and_streams():
    process = start("--prompt", "Once", "--top-p", "2")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, b"") and err == b"generate.py: error: --top-p must lie in (0, 1], got 2.0\n"


def test_terminal_without_unicode(target):
    process = start("--model", target, "--mode", "ar", "--prompt", "Once", "--max-new-tokens", 40,
                    PYTHONIOENCODING="ascii")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and b"?" in out and out.isascii() and b"40 tokens" in err


def test_out_of_memory(refused, target, monkeypatch):
    def load(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore about it.")
    monkeypatch.setattr(generate.Llama, "load", load)
    refused("--model", target, "--mode", "ar", "--prompt", "Once", says=["20 GiB", "--batch"], cheap=False)


@pytest.mark.parametrize("tty, device, patience, told", [(True, "cuda", 0.01, 1), (True, "cuda", 60.0, 0), (True, "cpu", 0.01, 0),
                                                         (False, "cuda", 0.01, 0)])
def test_a_slow_start_says_why(monkeypatch, capsys, tty, device, patience, told):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: tty, raising=False)
    monkeypatch.setattr(generate, "PATIENCE", patience)
    with generate.compiling(torch.device(device)):
        time.sleep(0.2)
    out, err = capsys.readouterr()
    assert out == "" and err.count("compiling kernels for this GPU") == err.count("\n") == told


@pytest.mark.parametrize("tty", [True, False])
def test_progress_of_loading(monkeypatch, capsys, tty):
    clock = iter([0, *range(1, 20)])
    monkeypatch.setattr(generate.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: tty, raising=False)
    progress = generate.loading("target")
    for done in range(1, 8):
        progress(done * 1e9, 7e9)
    out, err = capsys.readouterr()
    assert out == "" and ("\r" in err) == tty and (err.count("loading the target") == 7) == tty
    assert "of 7000 MB" in err and err.endswith("\n")
