"""
How weights/ was made, from our plots, SmolLM2-135M-Instruct (Apache-2.0) and nothing else. One stage a command, in this order:

    python make_weights.py stories --smollm2 DIR    plots, to which SmolLM2 adds sentences        -> WORK/stories.jsonl
    python make_weights.py text                     clean, deduplicate, tokenizer, encode (CPU)   -> WORK/text/
    python make_weights.py target                   train the story target                        -> WEIGHTS/target
    python make_weights.py draft                    distil its draft                              -> WEIGHTS/draft
    python make_weights.py prompts --smollm2 DIR    instructions, code and sums for SmolLM2       -> WORK/prompts.jsonl
    python make_weights.py smollm2 --smollm2 DIR    distil its draft                              -> WEIGHTS/smollm2-draft

Each stage but text has a time box (--minutes); the training ones take --resume. --toy shrinks all sizes, so that the
whole recipe runs on a laptop's CPU in minutes (its texts are useless). Words and templates are in templates.py.
"""
import argparse
import functools
import itertools
import json
import multiprocessing
import random
import re
import shutil
from array import array
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import distill
import templates
from bpe import save_tokenizer
from bulk import dense_hidden, exit_on_interrupt, load_model, new_model, sample_continuations, to_device, train
from errors import exit_on_user_error
from model import LlamaConfig
from tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# Stories

class Plots:
    """Steers sampling: at each end of a sentence outside of quotes the next cue is fed; the text ends with the last one."""

    def __init__(self, cues, tokenizer, device="cpu"):
        pieces = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
        self.sentence_end = torch.tensor([piece.rstrip('" \n').endswith((".", "!", "?")) for piece in pieces]).to(device)
        self.quotes = torch.tensor([piece.count('"') % 2 for piece in pieces]).to(device)
        cues = [*cues, []]                                                  # the last is for rows without a text

        def pad(lists):
            width = max(map(len, lists))
            return torch.tensor([row + row[-1:] * (width - len(row)) for row in lists]).to(device)
        self.queue = pad([sum(texts, []) + [0] for texts in cues])          # [P + 1, Q] all cues, one after the other
        self.bounds = pad([[0, *itertools.accumulate(map(len, texts))] for texts in cues])      # [P + 1, cues + 1]
        self.total = self.bounds[:, -1]
        self.fed, self.part, self.inside = torch.zeros(3, len(cues), dtype=torch.int64, device=device)

    def __call__(self, rows, token, ended, active):
        fed, part, last = self.fed[rows], self.part[rows], self.bounds.shape[1] - 1
        cued = active & (fed < self.bounds[rows, part])                     # in the middle of a cue
        token = torch.where(cued, self.queue[rows, fed], token)
        inside = (self.inside[rows] + self.quotes[token] * active) % 2
        turn = (self.sentence_end[token] & (inside == 0) | ended) & active & ~cued
        self.fed[rows], self.inside[rows], self.part[rows] = fed + cued, inside, part + (turn & (part < last))
        return token, cued & (fed + 1 == self.total[rows])


def list_plots(folder, seed, count, part):
    """`count` plots as (prompt tokens, length of the instruction before the story, tokens of the cues, plot)."""
    rng, tokenizer, found = random.Random(f"{seed} {part}"), Tokenizer.from_folder(folder), []
    for _ in range(count):
        plot = templates.plot(rng)
        head, (first, *stems) = tokenizer.chat([{"role": "user", "content": plot.ask}]), plot.stems
        cues = [tokenizer.encode(cue + stem) for cue, stem in zip(plot.cues, [*stems, ""])]
        found.append((head + tokenizer.encode(plot.opening + first), len(head), cues, plot))
    return found


def decode_all(folder, rows):
    tokenizer = Tokenizer.from_folder(folder)
    return [tokenizer.decode(row.tolist()) for row in rows]


def stories(args):
    """Sample the texts. SmolLM2 is told what the story is about, and the plot's own sentences come in between."""
    count, parts = args.count or (48 if args.toy else 150_000), 16
    with multiprocessing.Pool() as pool:                                    # forked while there is no CUDA here yet
        found = sum(pool.map(functools.partial(list_plots, args.smollm2, args.seed, count // parts), range(parts)), [])
        prompts, heads, cues, plots = zip(*found)
        smollm2, tokenizer = load_model(args.smollm2, args.device), Tokenizer.from_folder(args.smollm2)
        steer = Plots(cues, tokenizer, args.device)
        stops = {*tokenizer.eos_ids, *tokenizer.chat_stop_ids, 0}
        rows = sample_continuations(smollm2, prompts, 400, 0.4, 0.05, args.seed, stops, penalty=0.2, steer=steer,
                                    batch=args.batch, minutes=args.minutes, name="stories")
        done = (rows.end > rows.start).nonzero()[:, 0].tolist()
        tokens, end = rows.tokens.numpy(), rows.end.tolist()
        own = [tokens[i, heads[i]:end[i]] for i in done]
        chunks = [own[i:i + 2000] for i in range(0, len(own), 2000)]
        texts = itertools.chain.from_iterable(pool.imap(functools.partial(decode_all, args.smollm2), chunks))
        with open(args.work / "stories.jsonl", "w", encoding="utf-8") as file:
            for i, text in zip(done, texts):
                file.write(json.dumps({"text": text, **plots[i]._asdict()}, default=sorted) + "\n")     # sets as lists


# ---------------------------------------------------------------------------------------------------------------------
# Text: clean, deduplicate, learn a vocabulary, encode

ASCII = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": " - ",
                       "\u2026": "...", "\u00a0": " "})
KNOWN = {"I", "Mom"}
GLAD = re.compile(r"happy|smil|laugh|proud|glad|better|beautiful|wonderful|\bsun|sang|sing|danc|bright|bloom|love|\bfun")
GLOOM = re.compile(
    r"\b(sad|cry|cri|tear|afraid|scar|fright|lost|gone|brok|worr|angr|sorry|hung|cold|dark|night|tired|alone|lone|hurt|sick|fell|wrong"
    r"|rain|storm|nobody|no\b|not|never|hard|heavy|stuck|mad|hid|asleep|sleep|late|too|die|dying|dead)|n't\b", re.I)
MERGE_SAMPLE = 30_000_000       # characters from which the vocabulary is learned


def words_of(text):
    return set(re.findall(r"[a-z]+", text.lower()))


def fits(sentence, text, cue, story):
    """Whether a sentence that the model added between `text` and `cue` may stay: it is short, plain and new, nobody speaks in it,
    it brings in nothing but weather and feelings, and the mood is that of its surroundings. It is there that a small model loses
    the thread."""
    names = set(re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", sentence)) - KNOWN
    words, near = words_of(sentence), text[-150:] + cue[:80]
    return (re.fullmatch(r"[A-Z][A-Za-z',; ]*[a-z][.!?]", sentence) and sentence.count(" ") < 11 and sentence not in text
            and words <= words_of(text) | templates.PLAIN and words.isdisjoint(story["strange"])
            and names <= set(story["names"]) and not re.search(r"\b(gone|away|flew|(\w+) (and )?\2)\b", sentence)
            and not (GLAD.search(sentence) and GLOOM.search(near)) and (not GLOOM.search(sentence) or GLOOM.search(near)))


def clean(story):
    """A line of stories.jsonl -> the story with those of the model's sentences that fit, as ASCII, and how many of its characters
    the model wrote; None if it was not finished."""
    text, rest, own = story["opening"], story["text"].removeprefix(story["opening"]), 0
    for stem, cue in zip(story["stems"], story["cues"]):
        sentence, found, rest = rest.partition(cue)
        if not found:
            return None
        sentence = re.sub(r"\s+", " ", sentence.translate(ASCII)).strip()
        if fits(sentence, text, cue, story):
            text, own = f"{text} {sentence}", own + 1 + len(sentence) - len(stem)
        text += cue
    return text, own


def encode_all(folder, documents):
    """Documents one after the other, each ended by <|endoftext|>, as array of int32."""
    tokenizer = Tokenizer.from_folder(folder)
    return array("i", itertools.chain.from_iterable(tokenizer.encode(document) + [0] for document in documents))


def text(args):
    """stories.jsonl -> WORK/text: tokenizer and tokens.safetensors (train, validation: one stream of documents each)."""
    lines = [json.loads(line) for line in open(args.work / "stories.jsonl", encoding="utf-8")]
    with multiprocessing.Pool() as pool:
        kept, own = {}, 0
        for line, found in zip(lines, pool.map(clean, lines, chunksize=500)):
            if found and found[0] not in kept:
                kept[found[0]] = line["question"]
                own += found[1]
        sample = random.Random(args.seed).sample(list(kept), min(len(kept), 40_000))
        spread = Counter(itertools.chain.from_iterable(pool.map(words_of, sample, chunksize=500)))
        rare = {word for word, n in spread.items() if n < 5e-5 * len(sample)}       # 1 document of 40,000
        plain = map(rare.isdisjoint, pool.map(words_of, kept, chunksize=500))
        documents = [f"Question: {question}\nAnswer: {story}" if i % 8 == 7 else story
                     for i, (story, question) in enumerate(itertools.compress(kept.items(), plain))]
        random.Random(args.seed).shuffle(documents)
        save_tokenizer(documents[:1 + MERGE_SAMPLE // 600], VOCABULARY, args.work / "text")
        chunks = [documents[i:i + 2000] for i in range(0, len(documents), 2000)]
        parts = pool.map(functools.partial(encode_all, args.work / "text"), chunks, chunksize=1)
        tokens = torch.cat([torch.frombuffer(part, dtype=torch.int32) for part in parts])
    cut = int((0.9 if args.toy else 0.99) * len(tokens))
    save_file({"train": tokens[:cut].clone(), "validation": tokens[cut:].clone()},
              args.work / "text" / "tokens.safetensors")
    (args.work / "text" / "sample.txt").write_text("\n\n".join(documents[:200]))
    print(f"{len(lines):,} texts, {len(documents):,} kept, {sum(map(len, documents)):,} characters, {len(tokens):,} tokens; "
          f"of the plain texts SmolLM2 wrote {own / sum(map(len, kept)):.0%}, the plots are ours")


# ---------------------------------------------------------------------------------------------------------------------
# The story pair

VOCABULARY, CONTEXT, ROW = 4096, 1024, 512
EPOCHS = 6                  # 30 epochs of 6 M tokens overfitted badly: 0.56 nats in training, 1.96 in validation
TARGET = LlamaConfig(vocab_size=VOCABULARY, dim=320, n_layers=6, n_heads=5, n_kv_heads=1, head_dim=64, ffn_dim=704,
                     max_context=CONTEXT, tie_embeddings=True, eos_ids=(0,))      # 6.8 M parameters


def next_logits(model, tokens):
    """Logits [B, T, V] fp32 of tokens[:, 1:], for tokens [B, T + 1]; mixed precision on a GPU."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        return F.linear(dense_hidden(model, tokens[:, :-1]), model.head).float()


def next_token_loss(model, tokens):
    """Mean cross-entropy (nats a token) of tokens [B, T + 1]."""
    return F.cross_entropy(next_logits(model, tokens).flatten(0, 1), tokens[:, 1:].flatten()), {}


def target(args):
    """Train the story target on random windows of the stream; validation loss on the last 1 %."""
    streams = load_file(args.work / "text" / "tokens.safetensors", device=args.device)
    config = replace(TARGET, dim=64, n_layers=2, n_heads=1, ffn_dim=128) if args.toy else TARGET
    rows, span = (8, 128) if args.toy else (64, ROW)
    model = new_model(config, args.seed, args.device)
    windows = torch.arange(span + 1, device=args.device)

    def inputs_of(step):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        first = torch.randint(len(streams["train"]) - span, (rows, 1), generator=generator)
        return rows * span, (streams["train"][to_device(first, windows.device) + windows].long(),)

    (args.work / "target").mkdir(exist_ok=True)
    steps = args.steps or EPOCHS * len(streams["train"]) // (rows * span)
    train(model, next_token_loss, inputs_of, args.work / "target", 3e-3, steps, args.minutes, args.resume, dynamic=False)
    held_out = streams["validation"].unfold(0, span + 1, span + 1).long()
    with torch.no_grad():
        loss = sum(float(next_token_loss(model, part)[0]) * len(part) for part in held_out.split(rows)) / len(held_out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, validation loss {loss:.4f} nats a token")
    out = args.weights / "target"
    model.to(torch.bfloat16).save(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(args.work / "text" / name, out)
    result = {"validation_loss": loss, "train_tokens": len(streams["train"]), "arguments": vars(args)}
    (args.work / "target.json").write_text(json.dumps(result, indent=2, default=str))


def write_prompts(path, texts):
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")


def draft(args):
    """Distil the story draft: continuations of fresh openings, and the stories themselves."""
    for name, seed, count in ("openings", 1, 200 if args.toy else 60_000), ("held_out", 2, 128):
        rng = random.Random(f"{args.seed} {name} {seed}")
        write_prompts(args.work / f"{name}.jsonl", dict.fromkeys(templates.plot(rng)[2] for _ in range(count)))
    stream = load_file(args.work / "text" / "tokens.safetensors")["train"]
    span = 128 if args.toy else ROW
    ones = torch.ones(len(stream) // span, dtype=torch.int64)
    rows = {"tokens": stream[:len(ones) * span].view(-1, span), "start": ones, "end": ones * span}
    save_file(rows, args.work / "story_rows.safetensors")
    sizes = ("--layers 1 --dim 64 --max-new 32 --tokens 4000" if args.toy else
             "--layers 2 --dim 128 --ffn 384 --max-new 192 --tokens 10000000")
    distill.main([*f"--target {args.weights}/target --out {args.weights}/draft --prompts {args.work}/openings.jsonl "
                  f"--rows {args.work}/story_rows.safetensors --eval-prompts {args.work}/held_out.jsonl "
                  f"--temperature 0 0.8 --sample-batch {2 * args.batch} --batch 128 --lr 4e-3 --device {args.device} "
                  f"--report {args.work}/draft.json {sizes}".split(), *args.passed_on])


# ---------------------------------------------------------------------------------------------------------------------
# A draft for SmolLM2

def whole_turn(text):
    """A user's turn as far as it is whole: a stub up to the end of its docstring, a text that ends in a mark; or None."""
    if '"""' in text:
        parts = text.split('"""')
        return '"""'.join(parts[:2]) + '"""\n' if len(parts) > 2 else None
    return text if text.rstrip().endswith((".", "?", "!", ":", '"', "`", ")")) and len(text) > 12 else None


def prompts(args):
    """Prompts for SmolLM2: it finishes the beginnings itself, as a user would. None is taken from a benchmark."""
    smollm2, tokenizer = load_model(args.smollm2, args.device), Tokenizer.from_folder(args.smollm2)
    stops = {*tokenizer.eos_ids, *tokenizer.chat_stop_ids}
    count = args.count or (160 if args.toy else 120_000)
    openings = list(itertools.islice(templates.beginnings(random.Random(args.seed)), count))
    turns = distill.free_prompts(smollm2, tokenizer, openings, args.seed, stops, 48 if args.toy else 144,
                                 batch=args.batch, minutes=args.minutes)
    turns = dict.fromkeys(turn for turn in map(whole_turn, turns) if turn)
    print(f"{len(openings):,} beginnings, {len(turns):,} prompts")
    write_prompts(args.work / "prompts.jsonl", turns)


def smollm2(args):
    """Distil the draft for SmolLM2 on its answers, two thirds of them greedy."""
    sizes = ("--layers 1 --dim 64 --max-new 24 --draft-vocab 512 --tokens 3000" if args.toy else
             "--layers 3 --dim 576 --heads 6 --kv-heads 2 --ffn 384 --draft-vocab 5504 --max-new 256 --tokens 30000000")
    distill.main([*f"--target {args.smollm2} --out {args.weights}/smollm2-draft --prompts {args.work}/prompts.jsonl "
                  f"--chat --temperature 0 0 0.7 --sample-batch {args.batch} --batch 128 --lr 2e-3 --ce 0.5 "
                  f"--device {args.device} --report {args.work}/smollm2-draft.json {sizes}".split(),
                  "--sample-minutes", str(args.sample_minutes),
                  *(["--eval-prompts", *args.eval_prompts] if args.eval_prompts else []), *args.passed_on])


def main(argv=None):
    stages = {stage.__name__: stage for stage in (stories, text, target, draft, prompts, smollm2)}
    parser = argparse.ArgumentParser(description="Make weights/: see the top of this file.")
    add = parser.add_argument
    add("stage", choices=stages)
    add("--smollm2", default="checkpoints/smollm2", help="folder of SmolLM2-135M-Instruct")
    add("--work", type=Path, default=Path("work"), help="folder for what lies between the stages")
    add("--weights", type=Path, default=Path("weights"), help="folder for the models")
    add("--minutes", type=float, help="time box of the stage")
    add("--sample-minutes", type=float, default=1.5, help="time box of sampling in the stage smollm2")
    add("--steps", type=int, help="training steps (default: target 6 epochs, drafts 3000 or by the clock)")
    add("--count", type=int, help="stories or prompts to sample (default: 150,000 and 120,000)")
    add("--batch", type=int, default=4096, help="rows sampled at a time")
    add("--eval-prompts", nargs="+", default=[], help="JSONL files on which smollm2-draft is measured")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--resume", action="store_true")
    add("--toy", action="store_true", help="tiny sizes")
    args = parser.parse_args(argv)
    args.passed_on = ["--seed", str(args.seed), *["--resume"] * args.resume, *(
        ["--minutes", str(args.minutes)] if args.minutes else ["--steps", str(args.steps or 3000)])]
    args.work.mkdir(parents=True, exist_ok=True)
    stages[args.stage](args)


if __name__ == "__main__":
    with exit_on_user_error(), exit_on_interrupt():
        main()
