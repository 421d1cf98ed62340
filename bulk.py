"""
Work in bulk: thousands of texts at a time for training, where the rest of this project is about one step's latency.

A dense forward (no tree, no mask, differentiable), sampling of continuations in big batches, and a training loop.
distill.py and make_weights.py are written on top.

Shapes: B rows, T tokens, D head_dim, V vocabulary.
"""
import functools
import math
import random
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from errors import UserError
from kernels.linear import rotate
from model import KVCache, Llama

NUCLEUS = 256           # top-p is taken among this many most likely tokens: a sort of the whole vocabulary is slow
CHECK_EVERY = 32        # sampled tokens between two looks (host syncs) at which rows have ended
LOG_EVERY = 50          # steps


class Rows(NamedTuple):
    """Training text: tokens [R, S] int32 on the CPU; tokens start[r] <= i < end[r] of row r are the target's own."""
    tokens: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor


def load_rows(path):
    """Rows (and other tensors) of a safetensors file."""
    try:
        tensors = load_file(path)
        return Rows(tensors["tokens"], tensors["start"], tensors["end"]), tensors
    except (OSError, KeyError, SafetensorError) as error:
        raise UserError(f"rows file {path} can't be read ({error!r}); expected tensors tokens, start and end") from None


def concatenate(a, b):
    """Rows a and b, the narrower padded."""
    S = max(a.tokens.shape[1], b.tokens.shape[1])
    tokens = torch.cat([F.pad(rows.tokens.int(), (0, S - rows.tokens.shape[1])) for rows in (a, b)])
    return Rows(tokens, torch.cat([a.start, b.start]), torch.cat([a.end, b.end]))


# ---------------------------------------------------------------------------------------------------------------------
# Forward and sampling

@functools.cache
def compiled(f):
    return torch.compile(f, dynamic=True)


def fused(f, *args):
    """f(*args): while sampling on a GPU as one compiled kernel (training compiles the whole loss anyway)."""
    return compiled(f)(*args) if args[0].is_cuda and not torch.is_grad_enabled() else f(*args)


def add_norm(x, y, weight, eps):
    """x + y, and that normed."""
    x = x + y
    return x, F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def swiglu(x):
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def dense_hidden(model, tokens, cache=None, start=0):
    """The forward of training and of mass sampling: every row stands at the same position, so nothing is masked.

    Differentiable, plain torch, equal to Llama.forward + final norm. tokens [B, T] at positions start..start+T-1 (T = 1
    where start > 0). cache: a KVCache that takes the K and V. Returns hidden [B, T, dim] after the final norm.
    """
    c = model.config
    B, T = tokens.shape
    angles = torch.arange(start, start + T, device=tokens.device)[None, :, None] * model.freqs      # [1, T, D/2]
    cos, sin = angles.cos(), angles.sin()
    x = F.embedding(tokens, model.embed)                                    # [B, T, dim]
    h = F.rms_norm(x, (c.dim,), model.layers[0].attn_norm.to(x.dtype), c.norm_eps)
    norms = [layer.attn_norm for layer in model.layers[1:]] + [model.norm]  # what follows each layer
    for i, (layer, next_norm) in enumerate(zip(model.layers, norms)):
        qkv = F.linear(h, layer.wqkv).view(B, T, -1, c.head_dim)
        qk, v = qkv.split([c.n_heads + c.n_kv_heads, c.n_kv_heads], dim=2)
        q, k = fused(rotate, qk, cos, sin).split([c.n_heads, c.n_kv_heads], dim=2)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))                    # [B, heads, T, D]
        if cache is not None:
            cache.k[i, :, :, start:start + T], cache.v[i, :, :, start:start + T] = k, v
            k, v = cache.k[i, :, :, :start + T], cache.v[i, :, :, :start + T]
        if T == 1:      # all query heads of a KV head see the same keys: as rows of one product, K and V are read once
            y = F.scaled_dot_product_attention(q.reshape(B, c.n_kv_heads, -1, c.head_dim), k, v).view(B, 1, -1)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
        x, h = fused(add_norm, x, F.linear(y, layer.wo), layer.mlp_norm, c.norm_eps)
        h = F.linear(fused(swiglu, F.linear(h, layer.w_gate_up)), layer.w_down)
        x, h = fused(add_norm, x, h, next_norm, c.norm_eps)
    return h


def flash():
    """Attention backends whose cost doesn't depend on whether a length was seen before (cuDNN plans every new one)."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def pick(logits, temperature, top_p, generator):
    """One token a row, logits [B, V] -> [B]: argmax, or a sample by a race of exponentials (no host sync)."""
    if temperature == 0:
        return logits.argmax(-1)
    ids = None
    if top_p < 1:
        logits, ids = logits.topk(min(NUCLEUS, logits.shape[-1]))           # sorted, most likely first
    p = F.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        p = p * (p.cumsum(-1) - p < top_p)
    choice = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1, keepdim=True)
    return (choice if ids is None else ids.gather(1, choice))[:, 0]


@torch.inference_mode()
def sample_continuations(model, prompts, max_new_tokens, temperature=0.0, top_p=1.0, seed=0, stop_ids=(), penalty=0.0,
                         steer=None, batch=2048, minutes=None, name="sampling"):
    """Continue thousands of prompts at a time.

    Rows of a batch advance together, one position a step, from the shortest prompt's end; a longer prompt's remaining
    tokens are fed instead of sampled, so there is no padding and no mask. Rows that ended leave the batch.

    prompts: list of token lists. temperature: a float, or a list that the batches take in turn. penalty: subtracted
    from the logits of tokens that a row already holds. steer(group, device), for the prompts `group` of a batch, returns
    step(rows, token, ended, active) -> token, ended, which may change what was sampled. minutes: start no batch after
    this time. Returns Rows, one a prompt (end = start for those that time didn't allow); a row ends with its stop id
    where it met one.
    """
    temperatures = temperature if isinstance(temperature, (list, tuple)) else [temperature]
    device, V, total = model.device, model.config.vocab_size, max(map(len, prompts)) + max_new_tokens
    if total > model.config.max_context:
        raise UserError(f"the longest prompt and {max_new_tokens} new tokens are {total} tokens, "
                        f"the target's context is {model.config.max_context}; shorten the prompts or --max-new")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))      # equal lengths share a batch
    groups = [order[i:i + batch] for i in range(0, len(order), batch)]
    random.Random(seed).shuffle(groups)                                     # so that a time limit keeps all lengths
    cache = KVCache(model.config, min(batch, len(prompts)), total, device, model.dtype)
    base_k, base_v = cache.k, cache.v
    stops = torch.tensor(sorted(stop_ids), device=device)
    tokens = torch.zeros(len(prompts), total, dtype=torch.int32)
    start = torch.tensor([len(prompt) for prompt in prompts])
    end = start.clone()
    began, made = time.time(), 0
    for g, group in enumerate(groups):
        if minutes is not None and time.time() - began > 60 * minutes:
            break
        B, first, last = len(group), len(prompts[group[0]]), len(prompts[group[-1]]) + max_new_tokens
        cache.k, cache.v = base_k[:, :B], base_v[:, :B]
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + g)
        text = torch.tensor([prompts[i] + [0] * (last - len(prompts[i])) for i in group]).to(device)     # [B, last]
        length = torch.tensor([len(prompts[i]) for i in group]).to(device)
        stop_at = length + max_new_tokens                                   # becomes the row's end
        rows = torch.arange(B, device=device)                               # the rows of `text` still in the batch
        fine = torch.zeros(B, V, dtype=model.dtype, device=device).scatter_(1, text[:, :first], penalty) if penalty else None
        step = steer(group, device) if steer else None
        with flash():
            hidden = dense_hidden(model, text[:, :first], cache)[:, -1]
            for t in range(first, last):
                logits = F.linear(hidden, model.head)                       # [rows, V]
                if penalty:
                    logits -= fine
                token = pick(logits, temperatures[g % len(temperatures)], top_p, generator)
                active = t >= length[rows]                                  # the others still read their prompt
                token = torch.where(active, token, text[rows, t])
                ended = torch.isin(token, stops)
                if step:
                    token, ended = step(rows, token, ended, active)
                text[rows, t] = token
                if penalty:
                    fine.scatter_(1, token[:, None], penalty)
                stop_at[rows] = torch.where(ended & active & (t < stop_at[rows]), t + 1, stop_at[rows])
                if t % CHECK_EVERY == 0:
                    alive = (t + 1 < stop_at[rows]).nonzero()[:, 0]
                    if len(alive) == 0:
                        break
                    if len(alive) < 0.8 * len(rows):
                        cache.keep(alive.tolist())
                        rows, token = rows[alive], token[alive]
                        fine = fine[alive] if penalty else None
                hidden = dense_hidden(model, token[:, None], cache, t)[:, -1]
        tokens[group, :last] = text.int().cpu()
        end[group] = stop_at.cpu()
        made += int((end[group] - start[group]).sum())
        seconds = time.time() - began
        print(f"{name}: batch {g + 1}/{len(groups)}, {made:,} tokens, {made / seconds:,.0f} tok/s, "
              f"{seconds * (len(groups) / (g + 1) - 1):.0f} s left", flush=True)
    return Rows(tokens, start, end)


# ---------------------------------------------------------------------------------------------------------------------
# Training

def to_device(tensor, device):
    """From CPU without waiting for the work that the GPU still has to do (a copy from unpinned memory would)."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def new_model(config, seed, device, d2t=None, target=None):
    """fp32 model with small residual branches and embedding; the target's own embedding where the width allows."""
    model = Llama.random(config, seed, device, torch.float32)
    for layer in model.layers:
        for weight in (layer.wo, layer.w_down):
            weight.mul_((2 * config.n_layers) ** -0.5)
    model.embed.mul_(0.02)
    if d2t is not None:
        model.d2t.copy_(d2t)
    if target is not None and target.config.dim == config.dim:
        model.embed.copy_(target.embed if d2t is None else target.embed[d2t.clamp(min=0)])
    return model


def learning_rate(progress, peak, warmup=0.03):
    """Linear warmup, then a cosine down to 2 % of the peak; progress in 0..1."""
    if progress < warmup:
        return peak * (0.02 + 0.98 * progress / warmup)
    return peak * (0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup)))))


def train(model, loss_function, inputs_of, work, lr, steps=None, minutes=None, resume=False, dynamic=True):
    """AdamW, warmup + cosine, gradient norm clipped to 1; a checkpoint a minute in `work`, also on Ctrl-C.

    inputs_of(step) -> (token count, inputs); loss_function(model, *inputs) -> loss, {name: 0-d tensor}. The schedule
    follows `steps`, or the clock where `minutes` is given. dynamic: shapes change between steps (for torch.compile).
    Returns the metrics' means over the last steps.
    """
    cuda, path = model.embed.is_cuda, Path(work) / "checkpoint.pt"
    matrices = [p.requires_grad_() for p in model.parameters() if p.dim() > 1]
    vectors = [p.requires_grad_() for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=lr, betas=(0.9, 0.95), fused=cuda)
    step, spent, means = 0, 0.0, {}
    if resume and path.exists():
        state = torch.load(path, map_location=model.device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent, means = state["step"], state["spent"], state["means"]
        print(f"resumed at step {step}")
    run = torch.compile(loss_function, dynamic=dynamic, fullgraph=True) if cuda else loss_function
    with flash():
        try:                                                                # compile before the clock starts
            for warm in range(step, step + 3 * cuda + 1):                   # a few, since their shapes may differ
                run(model, *inputs_of(warm)[1])[0].backward()
        except Exception as error:
            if not cuda:
                raise
            print(f"torch.compile failed, training goes on without it: {error!r}"[:500], file=sys.stderr, flush=True)
            run = loss_function
        optimizer.zero_grad()
        stop, usual = [], signal.signal(signal.SIGINT, lambda *_: stop.append(True))
        began, saved, logged, tokens, sums = time.time() - spent, time.time(), time.time(), 0, {}
        summed = 0
        while True:
            spent = time.time() - began
            progress = step / steps if minutes is None else spent / (60 * minutes)
            if stop or progress >= 1 or time.time() - saved > 60:
                saved = time.time()
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                            "spent": spent, "means": means}, path)
                if stop or progress >= 1:
                    break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, lr)
            count, inputs = inputs_of(step)
            loss, metrics = run(model, *inputs)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(matrices + vectors, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step, tokens, summed = step + 1, tokens + count, summed + 1
            sums = {name: sums.get(name, 0.0) + value.detach() for name, value in {"loss": loss, **metrics}.items()}
            if step % LOG_EVERY == 0 or step == steps:
                means = {name: float(value) / summed for name, value in sums.items()}
                left = (1 - progress) * spent / max(progress, 1e-9)
                print(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in means.items())
                      + f", {tokens / (time.time() - logged):,.0f} tok/s, {left:.0f} s left", flush=True)
                logged, tokens, summed, sums = time.time(), 0, 0, {}
        signal.signal(signal.SIGINT, usual)
    if stop:
        print(f"interrupted: {path} holds step {step}; run the same command with --resume to go on", file=sys.stderr)
        raise SystemExit(130)
    for parameter in matrices + vectors:
        parameter.requires_grad_(False)
    return means
