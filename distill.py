"""
Distil a small draft for any target: python distill.py --target DIR --out DIR --layers 2 --dim 256 ...

Prompts come from a JSONL file or are the target's own (free sampling; with --chat it invents the user's turns). It
continues them in big batches; the draft learns its full distribution at every token; a report on held-out prompts follows.
With --draft-vocab N the draft knows only the target's N-1 most frequent tokens; `d2t` maps its ids to the target's, and its
id 0 stands for every other token.
Shapes: B rows, T tokens, L longest row of a batch, n sampled tokens in a batch, N draft vocabulary, V target's.

References: Distilling for speculative decoding: Zhou et al. 2023, DistillSpec, https://arxiv.org/abs/2310.08461;
prompts from an instruct model itself: Xu et al. 2024, Magpie, https://arxiv.org/abs/2406.08464
"""
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from bulk import (Batches, Rows, concatenate, dense_hidden, exit_on_interrupt, flash, load_model, load_rows, new_model,
                  sample_continuations, to_device, train, whole)
from errors import UserError, exit_on_user_error
from generate import find_device
from request import FlagParser, has_place
from tokenizer import Tokenizer

MIN_DRAFT_VOCAB = 16
PROMPT_MIN_P = 0.03     # prompts should vary
HELD_OUT = 64           # prompts kept for the report where it is given none
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "chat_template.jinja")
AT_LEAST_1 = "layers dim heads kv_heads ffn tokens max_new sample_batch steps batch".split()
AT_LEAST_0 = "temperature min_p ce seed sample_minutes minutes lr".split()


# ---------------------------------------------------------------------------------------------------------------------
# Prompts

def read_prompts(path, tokenizer, chat):
    """Prompts of a JSONL file ({"prompt": text} a line) as token lists, under the chat template if `chat`."""
    try:
        texts = [json.loads(line)["prompt"] for line in Path(path).read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'prompts file {path} can\'t be read ({error!r}); expected {{"prompt": text}} a line') from None
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise UserError(f'prompts file {path} holds no prompts or empty ones; expected {{"prompt": text}} a line')
    encode = (lambda text: tokenizer.chat([{"role": "user", "content": text}])) if chat else tokenizer.prompt
    return [encode(text) for text in texts]


def free_prompts(target, tokenizer, openings, seed, stop_ids, max_tokens=96, chat=True, **sampling):
    """The target's own prompts: what it puts into a user's turn (chat), or how it starts a text.

    openings: one string a prompt, often "": the beginning of the turn. Returns texts (chat) or token lists.
    """
    if chat:
        a, b = (tokenizer.chat([{"role": "user", "content": letter}]) for letter in "ab")
        head = a[:next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)]  # the template up to the user's words
    else:
        head = [target.config.bos_id if target.config.bos_id is not None else min(stop_ids, default=0)]
    rows = sample_continuations(target, [head + tokenizer.encode(text) for text in openings], max_tokens, 1.0,
                                PROMPT_MIN_P, seed, stop_ids, name="prompts", **sampling)
    if chat:
        return [tokenizer.decode(row[len(head):end].tolist()) for row, end in zip(rows.tokens, rows.end)]
    lengths = torch.randint(1, max_tokens + 1, rows.end.shape, generator=torch.Generator().manual_seed(seed))
    return [row[:max(1, min(start + n, end - 1))].tolist()
            for row, start, n, end in zip(rows.tokens, rows.start, lengths, rows.end)]


# ---------------------------------------------------------------------------------------------------------------------
# Training

def draft_vocabulary(rows, vocab_size, n, always=()):
    """d2t [n] int64: -1, then the n - 1 most frequent tokens of the sampled text (and `always`), ascending. Tells how much
    of the text they cover, which bounds the acceptance."""
    where = torch.arange(rows.tokens.shape[1])
    own = (where >= rows.start[:, None]) & (where < rows.end[:, None])
    counts = torch.bincount(rows.tokens[own].long(), minlength=vocab_size)
    share = counts.sort(descending=True).values.cumsum(0) / counts.sum()
    print("tokens covered by a vocabulary of " + ", ".join(f"{size}: {share[size - 2]:.4f}" for size in sorted(
        {n, *(size for size in (2048, 3072, 4096, 5120, 6144, 8192, 12288) if size <= vocab_size)})), flush=True)
    counts[list(always)] = counts.sum() + 1
    return torch.cat([torch.tensor([-1]), counts.argsort(descending=True, stable=True)[:n - 1].sort().values])


def to_draft_ids(d2t, vocab_size):
    """Target id -> draft id, [V] int64: 0 for a token that the draft doesn't know; None if it knows all."""
    if d2t is None:
        return None
    t2d = torch.zeros(vocab_size, dtype=torch.int64, device=d2t.device)
    return t2d.index_copy_(0, d2t[1:], torch.arange(1, len(d2t), device=d2t.device))


class Teacher:
    """The target's last hidden state at every sampled token, computed once and kept while memory lasts.

    With it the whole distribution is one matrix product away, so later epochs cost the draft's own work alone.
    """

    def __init__(self, target, rows, d2t, keep=True):
        self.target, n = target, int((rows.end - rows.start).sum())
        size = n * (target.config.dim * target.embed.element_size() + 12)
        torch.cuda.empty_cache()                                            # what sampling held counts as free
        free = torch.cuda.mem_get_info(target.device)[0] if target.embed.is_cuda else 4e9
        self.kept = keep and size < 0.5 * free
        new = lambda *shape, dtype: torch.empty(n, *shape, dtype=dtype, device=target.device)
        if self.kept:
            self.hidden, self.lse = new(target.config.dim, dtype=target.dtype), new(dtype=torch.float32)
            self.top, self.done = new(dtype=torch.int64), torch.zeros(len(rows.end), dtype=torch.bool)
        # Row 0 of a trimmed head is a placeholder: the loss puts the probability of all other tokens there.
        self.head = target.head if d2t is None else target.head[d2t.clamp(min=0)]

    @torch.no_grad()
    def __call__(self, rows, tokens, index, ids):
        """Returns hidden [n, dim], logsumexp of the logits [n], most likely token [n] (target's ids)."""
        if self.kept and self.done[rows].all():
            return self.hidden[ids], self.lse[ids], self.top[ids]
        with flash():
            hidden = dense_hidden(self.target, tokens).flatten(0, 1)[index]
        logits = (F.linear(part, self.target.head).float() for part in hidden.split(8192))
        lse, top = zip(*((part.logsumexp(-1), part.argmax(-1)) for part in logits))
        lse, top = torch.cat(lse), torch.cat(top)
        if self.kept:
            self.hidden[ids], self.lse[ids], self.top[ids] = hidden, lse, top
            self.done[rows] = True
        return hidden, lse, top


def distillation_loss(draft, tokens, index, hidden, lse, top, head, trimmed, ce):
    """KL(target || draft) + ce * cross-entropy of the target's most likely token, a mean over the n sampled tokens.

    tokens [B, L], top [n] in draft ids; hidden, lse [n] of the target and its (trimmed) head [N, dim]. Also returns the
    means of the KL, of sum(min(p, q)) (acceptance when sampling) and of "same argmax" (when greedy).
    """
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        x = dense_hidden(draft, tokens).flatten(0, 1)[index]
        logits = F.linear(x, draft.head).float()                            # [n, N]
    with torch.no_grad():
        p = (F.linear(hidden, head).float() - lse[:, None]).exp()
        if trimmed:
            p = torch.cat([(1 - p[:, 1:].sum(-1, keepdim=True)).clamp(min=0), p[:, 1:]], dim=1)
    logq = F.log_softmax(logits, dim=-1)
    cross = -(p * logq).sum(-1)
    kl = (cross + torch.special.xlogy(p, p).sum(-1)).mean()
    first = int(trimmed)                                                    # "any other token" is never drafted
    with torch.no_grad():
        sampled = torch.minimum(p, logq.exp())[:, first:].sum(-1).mean()
        greedy = ((logits[:, first:].argmax(-1) + first == top) & (top >= first)).float().mean()
    return kl + ce * F.nll_loss(logq, top), {"KL": kl, "sampled acceptance": sampled, "greedy acceptance": greedy}


# ---------------------------------------------------------------------------------------------------------------------
# Report

@torch.inference_mode()
def ranks_on_greedy_text(target, draft, prompts, max_new_tokens, stop_ids, batch=512):
    """For each prompt, for each token of the target's greedy answer: how many tokens the draft ranks above it."""
    rows = sample_continuations(target, prompts, max_new_tokens, stop_ids=stop_ids, batch=batch, name="greedy answers")
    t2d, first = to_draft_ids(draft.d2t, target.config.vocab_size), int(draft.d2t is not None)
    ranks = []
    for tokens, start, end in zip(rows.tokens, rows.start.tolist(), rows.end.tolist()):
        ids = tokens[None, :end].long().to(draft.device)
        ids = ids if t2d is None else t2d[ids]
        with flash():
            logits = F.linear(dense_hidden(draft, ids)[0, start - 1:end - 1], draft.head)       # [n, N]
        own = logits.gather(1, ids[0, start:end, None])
        rank = (logits[:, first:] > own).sum(-1)
        ranks.append(torch.where(ids[0, start:end] < first, draft.config.vocab_size, rank).tolist())
    return ranks


def report(ranks, lookaheads=(4, 6, 8), fanouts=(1, 2, 4, 8)):
    """Greedy acceptance per token, and chain speculation played through the texts for each lookahead K (whole rounds):
    accepted tokens a round; recall of the bonus token among the draft's top F, a rejected token left out."""
    tokens = sum(map(len, ranks))
    result = {"tokens": tokens, "greedy_acceptance": sum(row.count(0) for row in ranks) / max(1, tokens)}
    for K in lookaheads:
        outcomes = []                                                       # (accepted tokens k, rank of the bonus)
        for row in ranks:
            at = 0
            while at + K < len(row):
                k = next((j for j in range(K) if row[at + j] > 0), K)
                outcomes.append((k, row[at + k] - (k < K)))
                at += k + 1
        rounds = max(1, len(outcomes))
        result[f"K={K}"] = {"accepted": sum(k for k, _ in outcomes) / rounds, "bonus_recall": {
            f"F={n}": sum(rank < n for _, rank in outcomes) / rounds for n in fanouts}}
    return result


def describe(name, result):
    """The report of one prompt set as text."""
    lines = [f"{name}: greedy acceptance {result['greedy_acceptance']:.3f} per token ({result['tokens']:,} tokens)"]
    for key, value in result.items():
        if key.startswith("K="):
            recall = ", ".join(f"{n} {hit:.3f}" for n, hit in value["bonus_recall"].items())
            lines.append(f"  {key}: {value['accepted']:.2f} accepted a round; bonus token recalled: {recall}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def parse_args(argv):
    parser = FlagParser(description="Distil a small draft for a target model.")
    add = parser.add_argument
    add("--target", required=True, help="folder of the target (Hugging Face layout)")
    add("--out", required=True, help="folder of the draft; work files go to OUT.work")
    add("--layers", type=int, default=2, help="of the draft: few, since each costs time in every step")
    add("--dim", type=int, default=256, help="its width")
    add("--heads", type=int, help="query heads (default: dim / head-dim)")
    add("--kv-heads", type=int, default=1, help="key and value heads")
    add("--head-dim", type=int, default=64, help="64 or 128 for the Triton kernels")
    add("--ffn", type=int, help="default: 8/3 dim")
    add("--draft-vocab", type=int, help="keep the target's N - 1 most frequent tokens (default: all)")
    add("--prompts", help="JSONL file, {\"prompt\": text} a line (default: the target's own free sampling)")
    add("--chat", action="store_true", help="put prompts into the chat template")
    add("--rows", help="more training text: safetensors with tokens [R, S], start [R], end [R]")
    add("--tokens", type=int, default=2_000_000, help="sample at most this many")
    add("--max-new", type=int, default=256, help="longest continuation")
    add("--temperature", type=float, nargs="+", default=[0.0, 0.0, 0.0, 0.8], help="prompts take these in turn")
    add("--min-p", type=float, default=0.05, help="never sample what is less likely than this times the likeliest token")
    add("--sample-batch", type=int, default=2048, help="rows sampled at a time")
    add("--sample-minutes", type=float, help="time box of sampling")
    add("--steps", type=int, help="default: 2000, or what --minutes allow")
    add("--minutes", type=float, help="time box of training")
    add("--batch", type=int, default=128, help="rows a step")
    add("--lr", type=float, default=2e-3, help="peak learning rate")
    add("--ce", type=float, default=0.0, help="weight of the cross-entropy of the target's most likely token")
    add("--seed", type=int, default=0, help="of weights, sampling and batches")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--resume", action="store_true", help="go on from OUT.work")
    add("--eval-prompts", nargs="+", default=[], help="JSONL files for the report (default: 64 held-out prompts)")
    add("--report", help="write the report to this JSON file")
    args = parser.parse_args(argv)
    if args.heads is None:
        args.heads = max(1, args.dim // max(1, args.head_dim))
    if args.ffn is None:
        args.ffn = -(-args.dim * 8 // 3 // 64) * 64
    for name in AT_LEAST_1 + AT_LEAST_0:
        least, values = int(name in AT_LEAST_1), getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not least <= value < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if args.head_dim < 2 or args.head_dim % 2 or args.heads % args.kv_heads:
        raise UserError(f"--heads {args.heads} must be a multiple of --kv-heads {args.kv_heads}, and --head-dim even, "
                        f"got {args.head_dim}")
    if args.min_p > 1:
        raise UserError(f"--min-p is a share of the likeliest token's probability: at most 1, got {args.min_p}")
    if args.report and not has_place(args.report):
        raise UserError(f"--report {args.report}: can't be written; expected a file in a folder that is there")
    return args


def sampled_rows(args, target, tokenizer, stop_ids):
    """Prompts, then continuations: (Rows to train on, held-out prompts as token lists)."""
    room = dict(batch=args.sample_batch, stop_ids=stop_ids)
    count = HELD_OUT + max(args.batch, args.tokens // args.max_new)
    if args.prompts:
        prompts = read_prompts(args.prompts, tokenizer, args.chat)[:count]
    else:
        prompts = free_prompts(target, tokenizer, [""] * count, args.seed, chat=args.chat, **room)
        if args.chat:
            turns = (text for text in dict.fromkeys(prompts) if text.strip())
            prompts = [tokenizer.chat([{"role": "user", "content": text}]) for text in turns]
    prompts = [prompt for prompt in prompts if len(prompt) + args.max_new <= target.config.max_context]
    if len(prompts) <= HELD_OUT:
        raise UserError(f"{len(prompts)} prompts that fit the context are too few: the first {HELD_OUT} are held out "
                        "for the report; give more, or shorter ones")
    rows = sample_continuations(target, prompts[HELD_OUT:], args.max_new, args.temperature, args.min_p, args.seed,
                                minutes=args.sample_minutes, name="continuations", **room)
    return Rows(*(tensor[rows.end > rows.start] for tensor in rows)), prompts[:HELD_OUT]


def main(argv=None):
    args = parse_args(argv)
    out, work = Path(args.out), Path(f"{args.out}.work")
    target = load_model(args.target, find_device(args.device))
    tokenizer = Tokenizer.from_folder(args.target)
    c, V, steps = target.config, target.config.vocab_size, args.steps or (None if args.minutes else 2000)
    if args.draft_vocab is not None and not MIN_DRAFT_VOCAB <= args.draft_vocab <= V:
        raise UserError(f"--draft-vocab {args.draft_vocab} is out of range: expected {MIN_DRAFT_VOCAB} to {V}, the target's")
    evaluations = {path: read_prompts(path, tokenizer, args.chat) for path in args.eval_prompts}
    more = load_rows(args.rows, V)[0] if args.rows else None
    try:
        for probe in (out / "writable", work / "writable"):
            probe.parent.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
    except OSError as error:
        raise UserError(f"can't write to {error.filename}: {error.strerror}; choose another --out") from None

    stop_ids = sorted({*c.eos_ids, *tokenizer.eos_ids, *tokenizer.chat_stop_ids})
    if args.resume and (work / "rows.safetensors").exists():
        rows, tensors = load_rows(work / "rows.safetensors", V)
        held_out = [prompt[prompt >= 0].tolist() for prompt in tensors["held_out"]]
    else:
        for name in "rows.safetensors", "checkpoint.pt":                    # of another run
            (work / name).unlink(missing_ok=True)
        rows, held_out = sampled_rows(args, target, tokenizer, stop_ids)
        width = max(map(len, held_out))
        padded = torch.tensor([prompt + [-1] * (width - len(prompt)) for prompt in held_out])
        whole(work / "rows.safetensors", lambda path: save_file({**rows._asdict(), "held_out": padded}, path))
    if more:
        rows = concatenate(rows, more)

    d2t = draft_vocabulary(rows, V, args.draft_vocab, stop_ids).to(target.device) if args.draft_vocab else None
    config = replace(c, vocab_size=args.draft_vocab or V, dim=args.dim, n_layers=args.layers, head_dim=args.head_dim,
                     n_heads=args.heads, n_kv_heads=args.kv_heads, ffn_dim=args.ffn, tie_embeddings=True,
                     target_vocab_size=V if args.draft_vocab else None)
    draft = new_model(config, args.seed, target.device, d2t, target)
    sampled, size = int((rows.end - rows.start).sum()), sum(p.numel() for p in draft.parameters())
    print(f"draft: {size:,} parameters; {sampled:,} tokens to learn from", flush=True)
    batches, teacher, t2d = Batches(rows, args.batch, args.seed), Teacher(target, rows, d2t), to_draft_ids(d2t, V)

    def inputs_of(step):
        row, tokens, index, ids = batches(step)
        tokens, index, ids = (to_device(x, target.device) for x in (tokens, index, ids))
        hidden, lse, top = teacher(row, tokens, index, ids)
        tokens, top = (tokens, top) if t2d is None else (t2d[tokens], t2d[top])
        return tokens.numel(), (tokens, index, hidden, lse, top, teacher.head, d2t is not None, args.ce)

    means = train(draft, distillation_loss, inputs_of, work, args.lr, steps, args.minutes, args.resume)
    draft.to(c.dtype).save(out)
    draft = load_model(out, target.device)                                  # .to() has rounded its RoPE frequencies, too
    if d2t is None:                                                         # trimmed ids mean nothing to a tokenizer
        for path in filter(Path.exists, (Path(args.target) / name for name in TOKENIZER_FILES)):
            shutil.copy(path, out)

    results = {"draft_parameters": size, "sampled_tokens": sampled, "training": means, "arguments": vars(args)}
    everything = []
    for name, prompts in (evaluations or {"held-out prompts": held_out}).items():
        ranks = ranks_on_greedy_text(target, draft, prompts, args.max_new, stop_ids)
        everything += ranks
        results[name] = report(ranks)
        print(describe(name, results[name]), flush=True)
    results["all"] = report(everything)
    print(describe("all", results["all"]))
    if args.report:
        Path(args.report).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    with exit_on_user_error(), exit_on_interrupt():
        main()
