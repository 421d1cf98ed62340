"""
How weights/ was made, from our plots, SmolLM2-135M-Instruct (Apache-2.0) and nothing else. One stage a command, in this order:

    python make_weights.py stories --smollm2 DIR    SmolLM2 tells stories along our plots         -> WORK/stories.jsonl
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
from grammar import Grammar, lay_out
from model import LlamaConfig
from tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# Stories

TEMPERATURE = 1.5               # where the grammar leaves a choice, so that SmolLM2 doesn't always choose the same


def list_plots(folder, seed, count, part):
    """`count` plots as (prompt tokens, length of the instruction before the story, question), and their grammars."""
    rng, tokenizer, found = random.Random(f"{seed} {part}"), Tokenizer.from_folder(folder), []

    def grammars():
        for _ in range(count):
            plot = templates.plot(rng)
            head = tokenizer.chat([{"role": "user", "content": plot.ask}])
            found.append((head + tokenizer.encode(plot.opening), len(head), plot.question))
            yield [[tokenizer.encode(wording) for wording in wordings] for wordings in plot.parts]
    return found, lay_out(grammars())


def decode_all(folder, rows):
    tokenizer = Tokenizer.from_folder(folder)
    return [tokenizer.decode(row.tolist()) for row in rows]


def stories(args):
    """Sample the texts. SmolLM2 is told what the story is about; its tokens are those that the plot's grammar allows."""
    count, parts = args.count or (48 if args.toy else 150_000), 16
    with multiprocessing.Pool() as pool:                                    # forked while there is no CUDA here yet
        plots = functools.partial(list_plots, args.smollm2, args.seed, count // parts)
        found, laid_out = zip(*pool.map(plots, range(parts)))
        prompts, heads, questions = zip(*itertools.chain.from_iterable(found))
        smollm2, grammar = load_model(args.smollm2, args.device), Grammar(laid_out, args.device)
        rows = sample_continuations(smollm2, prompts, grammar.longest, TEMPERATURE, seed=args.seed, grammar=grammar,
                                    batch=args.batch, minutes=args.minutes, name="stories")
        print(grammar.report())
        done = (rows.end > rows.start).nonzero()[:, 0].tolist()
        tokens, end = rows.tokens.numpy(), rows.end.tolist()
        own = [tokens[i, heads[i]:end[i]] for i in done]
        chunks = [own[i:i + 2000] for i in range(0, len(own), 2000)]
        texts = itertools.chain.from_iterable(pool.imap(functools.partial(decode_all, args.smollm2), chunks))
        with open(args.work / "stories.jsonl", "w", encoding="utf-8") as file:
            for i, text in zip(done, texts):
                file.write(json.dumps({"text": text, "question": questions[i]}) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Text: clean, deduplicate, learn a vocabulary, encode

PLAIN = re.compile(r"""[A-Z"][A-Za-z ,.!?'"-]*[.!?]"?""")                   # no markup, no digits, whole sentences
REFUSAL = re.compile(r"\b(AI|language model|I cannot|as an assistant)\b")
MERGE_SAMPLE = 30_000_000       # characters from which the vocabulary is learned


def encode_all(folder, documents):
    """Documents one after the other, each ended by <|endoftext|>, as array of int32."""
    tokenizer = Tokenizer.from_folder(folder)
    return array("i", itertools.chain.from_iterable(tokenizer.encode(document) + [0] for document in documents))


def text(args):
    """stories.jsonl -> WORK/text: tokenizer and tokens.safetensors (train, validation: one stream of documents each)."""
    lines = [json.loads(line) for line in open(args.work / "stories.jsonl", encoding="utf-8")]
    kept = {line["text"]: line["question"] for line in lines}
    kept = {story: question for story, question in kept.items() if PLAIN.fullmatch(story) and not REFUSAL.search(story)}
    documents = [f"Question: {question}\nAnswer: {story}" if i % 8 == 7 else story
                 for i, (story, question) in enumerate(kept.items())]
    random.Random(args.seed).shuffle(documents)
    save_tokenizer(documents[:1 + MERGE_SAMPLE // 600], VOCABULARY, args.work / "text")
    chunks = [documents[i:i + 2000] for i in range(0, len(documents), 2000)]
    with multiprocessing.Pool() as pool:
        parts = pool.map(functools.partial(encode_all, args.work / "text"), chunks, chunksize=1)
        tokens = torch.cat([torch.frombuffer(part, dtype=torch.int32) for part in parts])
    cut = int((0.9 if args.toy else 0.99) * len(tokens))
    save_file({"train": tokens[:cut].clone(), "validation": tokens[cut:].clone()},
              args.work / "text" / "tokens.safetensors")
    (args.work / "text" / "sample.txt").write_text("\n\n".join(documents[:200]))
    print(f"{len(lines):,} texts, {len(documents):,} kept, {sum(map(len, documents)):,} characters, {len(tokens):,} tokens")


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
    rng = random.Random(f"{args.seed} openings")
    openings = [*dict.fromkeys(templates.opening(rng) for _ in range(400 if args.toy else 60_000))]
    write_prompts(args.work / "held_out.jsonl", openings[:128])
    write_prompts(args.work / "openings.jsonl", openings[128:])
    stream = load_file(args.work / "text" / "tokens.safetensors")["train"]
    span = 128 if args.toy else ROW
    ones = torch.ones(len(stream) // span, dtype=torch.int64)
    rows = {"tokens": stream[:len(ones) * span].view(-1, span), "start": ones, "end": ones * span}
    save_file(rows, args.work / "story_rows.safetensors")
    sizes = ("--layers 1 --dim 64 --max-new 32 --tokens 4000" if args.toy else
             "--layers 1 --dim 128 --ffn 384 --max-new 192 --tokens 10000000")
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
