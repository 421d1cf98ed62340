"""
How weights/ was made, from SmolLM2-135M-Instruct (Apache-2.0) and nothing else. One stage a command, in this order:

    python make_weights.py stories --smollm2 DIR    story texts, sampled by our own engine        -> WORK/stories.jsonl
    python make_weights.py text                     clean, deduplicate, tokenizer, encode (CPU)   -> WORK/text/
    python make_weights.py target                   train the story target                        -> WEIGHTS/target
    python make_weights.py polish                   make it repeat itself less                    -> WEIGHTS/target
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
from model import Llama, LlamaConfig
from tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# Stories

class Plots:
    """Steers sampling: a cue is fed at the first end of a sentence after `pace` tokens; the text ends after the last."""

    def __init__(self, cues, pace, tokenizer, device="cpu"):
        pieces = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
        self.sentence_end = torch.tensor([piece.rstrip('" \n').endswith((".", "!", "?")) for piece in pieces]).to(device)
        self.quotes = torch.tensor([piece.count('"') % 2 for piece in pieces]).to(device)
        cues = [*cues, []]                                                  # the last is for rows without a text

        def pad(lists):
            width = max(map(len, lists))
            return torch.tensor([row + [0] * (width - len(row)) for row in lists]).to(device)
        self.queue = pad([sum(texts, []) + [0] for texts in cues])          # [P + 1, Q] all cues, one after the other
        self.bounds = pad([[0, *itertools.accumulate(map(len, texts))] for texts in cues])      # [P + 1, cues + 1]
        self.pace = torch.tensor([*pace, 0]).to(device)
        self.fed, self.part, self.since, self.inside = torch.zeros(4, len(cues), dtype=torch.int64, device=device)

    def __call__(self, rows, token, ended, active):
        fed, part, last = self.fed[rows], self.part[rows], self.bounds.shape[1] - 1
        cued = active & (fed < self.bounds[rows, part])                     # in the middle of a cue
        token = torch.where(cued, self.queue[rows, fed], token)
        inside = (self.inside[rows] + self.quotes[token] * active) % 2
        since = (self.since[rows] + active).masked_fill(cued, 0)
        turn = self.sentence_end[token] & (inside == 0) & (since >= self.pace[rows]) & active & ~cued
        self.fed[rows], self.inside[rows], self.since[rows] = fed + cued, inside, since
        self.part[rows] = part + ((turn | (ended & active & ~cued)) & (part < last))
        return token, (turn | ended & ~cued) & (part == last)


def list_plots(folder, seed, count, part):
    """`count` plots as (prompt tokens, length of the head, tokens of the cues, question); half instruct the model."""
    rng, tokenizer, plots = random.Random(f"{seed} {part}"), Tokenizer.from_folder(folder), []
    for i in range(count):
        ask, question, opening, cues = templates.plot(rng)
        head = tokenizer.chat([{"role": "user", "content": ask}]) if i % 2 else [0]
        plots.append((head + tokenizer.encode(opening), len(head), [tokenizer.encode(cue) for cue in cues], question))
    return plots


def decode_all(folder, rows):
    tokenizer = Tokenizer.from_folder(folder)
    return [tokenizer.decode(row.tolist()) for row in rows]


def stories(args):
    """Sample the texts: half after an instruction in the chat template, half as plain text."""
    count, parts = args.count or (48 if args.toy else 380_000), 16
    with multiprocessing.Pool() as pool:                                    # forked while there is no CUDA here yet
        plots = sum(pool.map(functools.partial(list_plots, args.smollm2, args.seed, count // parts), range(parts)), [])
        prompts, heads, cues, questions = zip(*plots)
        smollm2, tokenizer = load_model(args.smollm2, args.device), Tokenizer.from_folder(args.smollm2)
        rng = random.Random(args.seed)
        steer = Plots(cues, [rng.randint(8, 26) for _ in plots], tokenizer, args.device)
        stops = {*tokenizer.eos_ids, *tokenizer.chat_stop_ids, 0}
        rows = sample_continuations(smollm2, prompts, 110 if args.toy else 200, 0.6, 0.05, args.seed, stops, penalty=0.3,
                                    steer=steer, batch=args.batch, minutes=args.minutes, name="stories")
        done = (rows.end > rows.start).nonzero()[:, 0].tolist()
        tokens, end = rows.tokens.numpy(), rows.end.tolist()
        own = [tokens[i, heads[i]:end[i]] for i in done]
        chunks = [own[i:i + 2000] for i in range(0, len(own), 2000)]
        texts = itertools.chain.from_iterable(pool.imap(functools.partial(decode_all, args.smollm2), chunks))
        with open(args.work / "stories.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"question": questions[i], "text": text}) + "\n" for i, text in zip(done, texts))


# ---------------------------------------------------------------------------------------------------------------------
# Text: clean, deduplicate, learn a vocabulary, encode

ASCII = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": " - ",
                       "\u2026": "...", "\u00a0": " "})
# Not ASCII, markup, refusals, talk about the story instead of the story, a word said twice
UNWANTED = re.compile(
    r"[^\x20-\x7e]|[*#<>|_\[\]{}=/\\@~^`]|\b(as an AI|language model|I'm sorry, but|Here is|Here's a|[Tt]his (story|tale)"
    r"|[Tt]he (story|tale|moral|narrator)|in this|simple (words|sentences|language)|read(er|ers))\b|\b(\w+) \6\b")
KNOWN = set("I Mom Dad Mr Mrs Miss Hello Mommy Daddy Grandma Grandpa Oh Yes No".split())
MERGE_SAMPLE = 30_000_000       # characters from which the vocabulary is learned


def clean(text):
    """The story as plain ASCII up to its last whole sentence; None if it isn't fit to learn from."""
    text = re.sub(r"\s+", " ", text.translate(ASCII)).strip()
    text = text[:max(text.rfind(mark) for mark in ('.', '!', '?', '."', '!"', '?"')) + 1]
    text += '"' * (text.count('"') % 2)
    words = text.split()
    if UNWANTED.search(text) or not 50 <= len(words) <= 260:
        return None
    sentences = [re.sub(r"\W+", " ", sentence).strip().lower() for sentence in re.split(r"[.!?]", text)]
    long = [sentence for sentence in sentences if sentence.count(" ") >= 3]
    if len(set(long)) < len(long):                                          # says a sentence twice
        return None
    lower = [re.sub(r"\W", "", word).lower() for word in words]
    grams = Counter(zip(lower, lower[1:], lower[2:], lower[3:], lower[4:]))
    if max(grams.values()) > 2 or grams.total() - len(grams) > 3:           # goes round in circles
        return None
    opening, rest = text[:110], text[110:]
    strangers = set(re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", rest)) - KNOWN - set(re.findall(r"[A-Z][a-z]+", opening))
    return text if len(strangers) <= 1 else None                            # at most one new name


def encode_all(folder, documents):
    """Documents one after the other, each ended by <|endoftext|>, as array of int32."""
    tokenizer = Tokenizer.from_folder(folder)
    return array("i", itertools.chain.from_iterable(tokenizer.encode(document) + [0] for document in documents))


def words_of(story):
    return set(re.findall(r"[a-z]+", story.lower()))


def text(args):
    """stories.jsonl -> WORK/text: tokenizer and tokens.safetensors (train, validation: one stream of documents each)."""
    lines = [json.loads(line) for line in open(args.work / "stories.jsonl", encoding="utf-8")]
    with multiprocessing.Pool() as pool:
        cleaned = pool.map(clean, [line["text"] for line in lines], chunksize=500)
        kept, starts = {}, set()
        for line, story in zip(lines, cleaned):
            if story and story not in kept and story[:100] + story[-60:] not in starts:
                kept[story] = line["question"]
                starts.add(story[:100] + story[-60:])
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
    print(f"{len(lines):,} texts, {len(documents):,} kept, {sum(map(len, documents)):,} characters, "
          f"{len(tokens):,} tokens")


# ---------------------------------------------------------------------------------------------------------------------
# The story pair

VOCABULARY, CONTEXT, ROW = 4096, 1024, 512
EPOCHS = 4                  # 30 epochs of 6 M tokens overfitted badly: 0.56 nats in training, 1.96 in validation
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
    shutil.rmtree(args.work / "unpolished", ignore_errors=True)             # what an earlier target was
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


def said_again(tokens, n=5):
    """Which tokens complete n tokens in a row that stand earlier in the same text, too: [B, L] bool for tokens [B, L]."""
    windows = F.pad(tokens, (n - 1, 0), value=-1).unfold(1, n, 1)           # [B, L, n]
    weights = torch.tensor([1_000_003 ** i % 2 ** 61 for i in range(n)], device=tokens.device)
    keys = (windows * weights).sum(-1)                                      # int64 that wraps around: a hash
    return (keys[:, :, None] == keys[:, None, :]).tril(-1).any(-1)


def unlikelihood_loss(model, tokens, again, other, was):
    """-log(1 - p) of the tokens that repeat, KL to what the model was at all others (Welleck et al. 2020, and an anchor).

    tokens [B, L + 1]; again, other [B, L] bool: which of tokens[:, 1:]; was [B, L, V]: log-probabilities.
    """
    logq = next_logits(model, tokens).log_softmax(-1)
    p = logq.gather(-1, tokens[:, 1:, None])[..., 0].exp()
    kl = (was.exp() * (was - logq)).sum(-1)
    count = (again | other).sum()
    anchor = torch.where(other, kl, 0.0).sum() / count
    loss = torch.where(again, -(1 - p).clamp(min=1e-4).log(), 0.0).sum() / count + anchor
    return loss, {"said again": again.sum() / count, "KL": anchor}


def polish(args):
    """Unlikelihood training of the story target on texts of its own, two thirds greedy: small models go round in circles."""
    folder, origin, (size, new) = args.weights / "target", args.work / "unpolished", (4, 32) if args.toy else (48, 160)
    if not origin.exists():
        shutil.copytree(folder, origin)
    tokenizer = Tokenizer.from_folder(folder)
    before, model = (Llama.load(origin, args.device, torch.float32) for _ in range(2))

    def inputs_of(step):
        rng = random.Random(f"{args.seed} polish {step}")
        prompts = [tokenizer.prompt(templates.plot(rng)[2]) for _ in range(size)]
        rows = sample_continuations(model, prompts, new, [0.0, 0.0, 0.7], seed=step, stop_ids=model.config.eos_ids,
                                    batch=size, name=None)
        tokens, start, end = (x.clone().to(args.device) for x in rows)      # clones: no tensors of inference mode
        where, tokens = torch.arange(tokens.shape[1], device=args.device), tokens.long()
        own = (where >= start[:, None]) & (where < end[:, None])
        again = said_again(tokens) & own
        with torch.no_grad():
            was = F.linear(dense_hidden(before, tokens[:, :-1]), before.head).log_softmax(-1)
        return int(own.sum()), (tokens, again[:, 1:], (own & ~again)[:, 1:], was)

    work = args.work / "polish"
    work.mkdir(exist_ok=True)
    means = train(model, unlikelihood_loss, inputs_of, work, 3e-4, args.steps or 200, args.minutes, args.resume)
    model.to(torch.bfloat16).save(folder)
    (args.work / "polish.json").write_text(json.dumps({"training": means, "arguments": vars(args)}, indent=2, default=str))


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
    stages = {stage.__name__: stage for stage in (stories, text, target, polish, draft, prompts, smollm2)}
    parser = argparse.ArgumentParser(description="Make weights/: see the top of this file.")
    add = parser.add_argument
    add("stage", choices=stages)
    add("--smollm2", default="checkpoints/smollm2", help="folder of SmolLM2-135M-Instruct")
    add("--work", type=Path, default=Path("work"), help="folder for what lies between the stages")
    add("--weights", type=Path, default=Path("weights"), help="folder for the models")
    add("--minutes", type=float, help="time box of the stage")
    add("--sample-minutes", type=float, default=1.5, help="time box of sampling in the stage smollm2")
    add("--steps", type=int, help="training steps (default: target 4 epochs, polish 200, drafts 3000 or by the clock)")
    add("--count", type=int, help="stories or prompts to sample (default: 380,000 and 120,000)")
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
