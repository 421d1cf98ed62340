"""Pairs of a target and a draft to measure with: real ones, padded ones, random ones in the shapes of published models."""
import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import batch as batching
from batch import check_vocabularies
from draft import SHARP
from errors import UserError
from generate import WEIGHTS, read_rows
from kernels import uniform
from measure.predict import rank_law
from measure.timing import model_bytes, random_model
from model import Llama, LlamaConfig
from pad import pad, padded_config, trim
from sampling import Sampler
from shapes import SHAPES
from tokenizer import Tokenizer

STARTS = "Once upon a time, there was", "One day,", "Long ago, near the sea, lived", "In a small town,"
HEROES = "a little fox named Tim", "a shy girl who loved to paint", "an old bear", "a kind rabbit named Lucy", "a brave duck"
OPENINGS = [f"{start} {hero}" for start in STARTS for hero in HEROES]
SYNTHETIC = 3           # the noise stream of synthetic acceptance, beside those of kernels/noise.py


@dataclass
class Pair:
    name: str
    target: Llama
    draft: Llama | None
    prompts: list                       # of token ids
    stop_ids: set
    accept: list | None = None          # SYNTHETIC: chance of the draft's 1st, 2nd, ... choice


def rounded(model, bits, group=64):
    """The model's linear weights rounded to `bits` bits in groups of `group` inputs, in place; embeddings are kept.

    A draft that needs no training and agrees with its target about as well as an off-the-shelf pair does.
    """
    for layer in model.layers:
        for w in (layer.wqkv, layer.wo, layer.w_gate_up, layer.w_down):
            groups = w.float().view(w.shape[0], -1, group)
            low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
            step = ((high - low) / (2 ** bits - 1)).clamp(min=1e-12)
            w.copy_((((groups - low) / step).round() * step + low).view(w.shape))
    return model


def worse(draft):
    """The draft with a random scale on its last norm, in place: the embedded one as it is would hardly ever be wrong."""
    scale = torch.rand(draft.config.dim, generator=torch.Generator().manual_seed(3))
    draft.norm.mul_((-0.5 + 3.0 * scale).to(draft.norm))
    return draft


def shape(name):
    if name not in SHAPES:
        raise UserError(f"unknown shape {name}; expected one of {', '.join(SHAPES)}")
    return SHAPES[name]


def check_memory(args, target, drafts, prompt_tokens):
    """UserError if the target, the drafts beside it and their KV caches won't fit (configs); before anything is loaded."""
    options, size = args.options, max(args.batch)
    nodes, length = options.most_nodes(), prompt_tokens + args.max_new_tokens
    cache = lambda c, slots: 2 * c.n_layers * c.n_kv_heads * c.head_dim * batching.whole(slots) * size * args.dtype.itemsize
    needed = model_bytes(target, args.dtype) + cache(target, length + 3 * nodes)
    for draft in drafts if args.draft_device == args.device else ():
        needed += model_bytes(draft, args.dtype) + cache(draft, length + nodes * (options.fanout_budget + 3))
    needed, cuda = 1.1 * needed + 0.3e9, args.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
    there = torch.cuda.mem_get_info(args.device)[0] if cuda else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise UserError(f"about {needed / 1e9:.1f} GB are needed and {there / 1e9:.1f} GB are there; choose a smaller model or "
                        f"shape, or lower --batch, --context or --fanout-budget")


def shape_pair(args):
    """Random weights in published shapes: the cost is real, the text is none, and acceptance is what --accept-rate says."""
    config = replace(shape(args.target_shape), max_context=1 << 20)
    draft_config = None
    if args.draft_shape:
        draft_config = replace(shape(args.draft_shape), max_context=1 << 20)
        if draft_config.vocab_size > config.vocab_size:
            raise UserError(f"the draft's vocabulary of {draft_config.vocab_size} is larger than the target's")
    lengths = args.context or [128]
    check_memory(args, config, [draft_config] if draft_config else [], max(lengths))
    target, draft = random_model(config, args.device, args.dtype), None
    if draft_config:
        draft = random_model(draft_config, args.draft_device, args.dtype)
        draft = trim(draft, config.vocab_size) if draft_config.vocab_size < config.vocab_size else draft
    prompts = torch.randint(1, (draft_config or config).vocab_size, (max(args.sequences, *args.batch), max(lengths)),
                            generator=torch.Generator().manual_seed(0)).tolist()
    name = args.target_shape if draft is None else f"SYNTHETIC: {args.target_shape} + {args.draft_shape}, random weights, " \
        f"acceptance set to {args.accept_rate:g}"
    return Pair(name, target, draft, prompts, set(), rank_law(args.accept_rate) if draft else None)


def text_pairs(args, padded, padded_draft):
    """Pairs that write real text: checkpoint folders or the embedded pair, each padded to the shape of that name or not.

    Yields one for every draft asked for, with the same target and prompts.
    """
    folder, dtype, device = args.target or WEIGHTS / "target", args.dtype, args.device
    config, tokenizer = LlamaConfig.from_folder(folder), Tokenizer.from_folder(folder)
    encode = (lambda text: tokenizer.chat([{"role": "user", "content": text}])) if args.chat else tokenizer.prompt
    prompts = [encode(row["prompt"]) for row in read_rows(args).values()] if args.prompts else list(map(encode, OPENINGS))
    stop_ids = set(tokenizer.eos_ids) | set(tokenizer.chat_stop_ids if args.chat else ())
    drafts = [(folder, bits) for bits in args.round_draft] + [(args.draft, None)] * bool(args.draft)
    drafts = drafts or ([] if args.target else [(WEIGHTS / "draft", None)])
    whole, whole_drafts = padded_config(config, shape(padded)) if padded else config, []
    for draft_folder, _ in drafts:
        draft_config = LlamaConfig.from_folder(draft_folder)
        if draft_config.target_vocab_size is None:
            check_vocabularies(config, draft_config)
        whole_drafts.append(padded_config(draft_config, shape(padded_draft)) if padded_draft else draft_config)
    check_memory(args, whole, whole_drafts, max(args.context or map(len, prompts)))

    load = lambda folder, padded, device: Llama.load(folder, *("cpu", torch.float32) if padded else (device, dtype))
    target = load(folder, padded, device)
    target = pad(target, shape(padded), device=device, dtype=dtype) if padded else target
    for draft_folder, bits in drafts or [(None, None)]:
        name = "the embedded pair" if args.target is None else Path(folder).resolve().name
        if bits:
            name += f", the draft itself rounded to {bits} bits"
        elif args.draft:
            name += f" + {Path(args.draft).resolve().name}"
        name += f", the target padded to {padded}" if padded else ""
        draft = load(draft_folder, padded_draft, args.draft_device) if draft_folder else None
        if bits:
            draft = rounded(draft, bits)
        if padded_draft and draft is not None:
            draft, name = pad(draft, shape(padded_draft), device=args.draft_device, dtype=dtype), f"{name}, the draft to {padded_draft}"
        if draft is not None and (draft.config.target_vocab_size or draft.config.vocab_size) < whole.vocab_size:
            draft = trim(draft, whole.vocab_size)
        if args.draft_dtype and draft is not None:
            draft, name = draft.to_int8(), name + ", int8 draft"
        yield Pair(name, target, draft, prompts, stop_ids)


def lengthened(prompts, length):
    """Prompts of `length` tokens: each keeps its end, and before it stands the text of the others, again and again."""
    text = [token for prompt in prompts for token in prompt]
    text = text * -(-length // len(text))
    return [(text[i:] + text[:i] + prompt)[-length:] for i, prompt in enumerate(prompts)]


@contextlib.contextmanager
def synthetic(pair):
    """SYNTHETIC acceptance, for models without a common text.

    Every position of a sequence has one fixed token, which is what the target says there, and one rank, at which the
    draft says it, drawn with the chances pair.accept; how sure the draft is follows these chances, too. Both models do all
    their work first; then their choice is overwritten. So rounds cost what they cost, ar, sd and ssd write the same, and hits follow from the ranks.
    """
    if pair.accept is None:
        yield
        return
    known, chances = pair.draft.config.vocab_size - 1, torch.tensor(pair.accept, device=pair.target.device)
    bounds, chances = chances.cumsum(0), chances.log() / SHARP

    class Synthetic(Sampler):
        def rank(self, model, hidden, positions, n, ids=None):
            ranked, _ = super().rank(model, hidden, positions, n, ids)                          # [B, T, n]
            at = torch.arange(ranked.shape[-1], device=ranked.device).clamp(max=len(chances) - 1)
            scores = (chances[at] / (self.temperature or 1.0)).expand(ranked.shape).contiguous()
            u = uniform(self.seeds, SYNTHETIC, positions, torch.arange(2, device=positions.device))
            own = 1 + (u[..., :1] * known).long().clamp(max=known - 1)                          # [B, T, 1]
            if model is pair.target:
                return own.expand_as(ranked), scores
            rank = torch.searchsorted(bounds, u[..., 1:].contiguous())
            others = torch.where(ranked == own, own % known + 1, ranked)
            return torch.where(torch.arange(ranked.shape[-1], device=own.device) == rank, own, others), scores

    batching.Sampler, plain = Synthetic, batching.Sampler
    try:
        yield
    finally:
        batching.Sampler = plain
