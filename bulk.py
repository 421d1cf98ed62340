"""
Work in bulk: thousands of texts at a time for training, where the rest of this project is about one step's latency.

A dense forward (no tree, no mask, differentiable), sampling of continuations in big batches with the kernels of
kernels/rows.py, and a training loop. distill.py and make_weights.py are written on top.

Shapes: B rows, T tokens, D head_dim, V vocabulary.
"""
import contextlib
import functools
import itertools
import math
import os
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
from graphs import Graphs, on
from kernels import rows
from kernels.linear import rotate
from model import KVCache, Llama

CHECK_EVERY = 32        # steps of sampling between two looks (host syncs) at how far it is
TELL_EVERY = 10         # seconds
LOG_EVERY = 50          # steps, or TELL_EVERY seconds if they take longer
SAVE_EVERY = 60         # seconds


class Rows(NamedTuple):
    """Training text: tokens [R, S] int32 on the CPU; tokens start[r] <= i < end[r] of row r are the target's own."""
    tokens: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor


@contextlib.contextmanager
def exit_on_interrupt():
    """Ctrl-C while texts are sampled or a report is made: one line, exit code 130. (train keeps its step first.)"""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted: the same command with --resume goes on from what was finished", file=sys.stderr)
        raise SystemExit(130) from None


def whole(path, write):
    """A file at `path` by write(path), all of it or none: whoever is killed in between leaves what was there before."""
    write(part := f"{path}.part")
    os.replace(part, path)


def load_rows(path, vocab_size):
    """Rows (and other tensors) of a safetensors file, of a model with so many tokens."""
    try:
        tensors = load_file(path)
        rows = tokens, start, end = Rows(tensors["tokens"], tensors["start"], tensors["end"])
        if not (tokens.dim() == 2 and tokens.numel() and start.shape == end.shape == tokens.shape[:1]):
            raise ValueError(f"shapes {[list(x.shape) for x in rows]}")
        if tokens.min() < 0 or tokens.max() >= vocab_size or start.min() < 1 or not (
                (start < end) & (end <= tokens.shape[1])).all():
            raise ValueError("a token or a bound is out of range")
        return rows, tensors
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise UserError(f"rows file {path} can't be read ({error!r}); expected tokens [R, S] below {vocab_size} and "
                        "1 <= start [R] < end [R] <= S") from None


def concatenate(a, b):
    """Rows a and b, the narrower padded."""
    S = max(a.tokens.shape[1], b.tokens.shape[1])
    tokens = torch.cat([F.pad(rows.tokens.int(), (0, S - rows.tokens.shape[1])) for rows in (a, b)])
    return Rows(tokens, torch.cat([a.start, b.start]), torch.cat([a.end, b.end]))


# ---------------------------------------------------------------------------------------------------------------------
# Forward and sampling

def load_model(folder, device):
    """A checkpoint for work in bulk: on a CPU in fp32, since most multiply many rows in bf16 ten times slower."""
    return Llama.load(folder, device, None if torch.device(device).type == "cuda" else torch.float32)


def dense_hidden(model, tokens):
    """The forward of training: whole rows from position 0, plainly causal; the same function as Llama.forward.

    With gradients, or on a CPU, in plain torch; without them on a GPU by the kernels of kernels/rows.py. tokens [B, T].
    Returns hidden [B, T, dim] after the final norm.
    """
    c = model.config
    B, T = tokens.shape
    angles = torch.arange(T, device=tokens.device)[None, :, None] * model.freqs     # [1, T, D/2]
    cos, sin = angles.cos(), angles.sin()

    def attention(qkv, i):
        qk, v = qkv.view(B, T, -1, c.head_dim).split([c.n_heads + c.n_kv_heads, c.n_kv_heads], dim=2)
        q, k = rotate(qk, cos, sin).split([c.n_heads, c.n_kv_heads], dim=2)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))                    # [B, heads, T, D]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
    if tokens.is_cuda and not torch.is_grad_enabled():                      # in training torch.compile fuses the twins
        with on(tokens.device):
            return forward(model, tokens, attention, rows.add_norm, rows.swiglu)
    return forward(model, tokens, attention, rows.add_norm_ref, rows.swiglu_ref)


def forward(model, tokens, attention, add_norm, swiglu):
    """tokens [...] -> hidden [..., dim] after the final norm; attention(qkv [..., (H + 2 KV) D], layer) -> [..., H D].
    add_norm, swiglu: of kernels.rows."""
    c = model.config
    x = F.embedding(tokens, model.embed)                                    # [..., dim]
    h = F.rms_norm(x, (c.dim,), model.layers[0].attn_norm.to(x.dtype), c.norm_eps)
    norms = [layer.attn_norm for layer in model.layers[1:]] + [model.norm]  # what follows each layer
    for i, (layer, next_norm) in enumerate(zip(model.layers, norms)):
        x, h = add_norm(x, F.linear(attention(F.linear(h, layer.wqkv), i), layer.wo), layer.mlp_norm, c.norm_eps)
        h = F.linear(swiglu(F.linear(h, layer.w_gate_up)), layer.w_down)
        x, h = add_norm(x, h, next_norm, c.norm_eps)
    return h


def flash():
    """Attention backends whose cost doesn't depend on whether a length was seen before (cuDNN plans every new one)."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


class Slots:
    """`batch` texts that advance together, each at a position of its own; where one ends, the next prompt moves in.

    All of that is decided on the device, so a step is one CUDA graph. A prompt is fed token by token, except what all prompts
    begin with: its K and V are in each slot since the slot's first text. See sample_continuations.
    """

    def __init__(self, model, prompts, max_new_tokens, temperature, min_p, seed, stop_ids, grammar, batch):
        device, self.model, self.P = model.device, model, len(prompts)
        self.min_p, self.seed, self.grammar = min_p, seed * 1_000_003, grammar
        if grammar:
            grammar.begin()
        length = torch.tensor([len(prompt) for prompt in prompts] + [0])
        S = int(length.max()) + max_new_tokens
        text = torch.zeros(self.P + 1, S, dtype=torch.int32)                # the last row is for slots without a text
        text[torch.arange(S) < length[:, None]] = torch.tensor([*itertools.chain.from_iterable(prompts)], dtype=torch.int32)
        low, high = min(prompts), max(prompts)                              # what these two share, all do
        self.common = next((i for i, (a, b) in enumerate(zip(low[:-1], high[:-1])) if a != b), min(len(low), len(high)) - 1)
        self.text, self.length = text.to(device), length.to(device)
        self.limit = torch.cat([self.length[:-1] + max_new_tokens, self.length[-1:]])
        self.end = self.length.clone()
        temperatures = temperature if isinstance(temperature, (list, tuple)) else [temperature]
        self.temperature = torch.tensor(temperatures, dtype=torch.float32).repeat(self.P // len(temperatures) + 2).to(device)
        self.stops = torch.zeros(model.config.vocab_size, dtype=torch.bool)
        self.stops[sorted(stop_ids)] = True
        self.stops = self.stops.to(device)
        B = min(batch, self.P)
        self.cache = KVCache(model.config, B, S, device, model.dtype)
        self.row = torch.arange(B, device=device)                           # each slot's text
        self.at = torch.zeros(B, dtype=torch.int64, device=device)          # position of the token that is fed next
        self.next = torch.full((), B, device=device)                        # the next prompt
        cuda, D = device.type == "cuda", model.config.head_dim
        self.ops, self.graphs = rows.TRITON if cuda and D & (D - 1) == 0 else rows.TORCH, Graphs(cuda)

    def step(self):
        """One token for each slot. What a failed kernel leaves behind can be stepped again: the state changes last."""
        row, at, cache = self.row, self.at, self.cache
        attention = lambda qkv, i: self.ops.attend(qkv, at, self.model.freqs, cache.k[i], cache.v[i])
        hidden = forward(self.model, self.text[row, at], attention, self.ops.add_norm, self.ops.swiglu)      # [B, dim]
        head, new = self.model.head, at + 1
        if self.grammar:
            token, *onward = self.grammar.choose(hidden, head, row, at, self.temperature, self.seed)
            ended = onward[0] == 0
        else:
            token = self.ops.choose(F.linear(hidden, head), row, at, self.temperature, self.min_p, self.seed)
            ended = self.stops[token]
        active = new >= self.length[row]                                    # the others still read their prompt
        token = torch.where(active, token, self.text[row, new].long())
        over = ended & active | (new + 1 >= self.limit[row])
        self.text[row, new] = token.int()
        self.end[row] = torch.where(over, new + 1, self.end[row])
        fresh = (self.next + over.cumsum(0) - 1).clamp(max=self.P)
        if self.grammar:
            self.grammar.go_on(row, active, *onward)
        self.next += over.sum()
        self.row.copy_(torch.where(over, fresh, row))
        self.at.copy_(new.masked_fill(over, self.common))

    def advance(self, steps):
        """`steps` steps, as well as this machine can: kernels in a CUDA graph, kernels, plain torch."""
        while steps:
            try:
                self.graphs(self.step)
                steps -= 1
            except Exception as error:
                if self.ops is rows.TORCH and not self.graphs.on:
                    raise
                what = "the CUDA graph" if self.graphs.on else "the Triton kernels"
                print(f"sampling goes on without {what}: {error!r}"[:500], file=sys.stderr, flush=True)
                self.graphs.on, self.ops = False, self.ops if self.graphs.on else rows.TORCH


@torch.inference_mode()
def sample_continuations(model, prompts, max_new_tokens, temperature=0.0, min_p=0.0, seed=0, stop_ids=(), grammar=None,
                         batch=2048, minutes=None, name="sampling"):
    """Continue thousands of prompts, `batch` of them at a time.

    prompts: list of token lists. temperature: a float, or a list that the prompts take in turn. min_p: leave out tokens
    less likely than this times the likeliest (Nguyen et al. 2024, https://arxiv.org/abs/2407.01082). grammar: a Grammar of
    as many texts, along which they go on and with which they end; then min_p and stop_ids don't count. minutes: start no text
    after this time. name: of the progress lines, or None. Returns Rows, one a prompt (end = start for those that time didn't
    allow); a row ends with its stop id where it met one. What a row holds depends on (prompt, seed, its number), not on the
    batch, but for rounding.
    """
    total = max(map(len, prompts)) + max_new_tokens
    if total > model.config.max_context:
        raise UserError(f"the longest prompt and {max_new_tokens} new tokens are {total} tokens, "
                        f"the target's context is {model.config.max_context}; shorten the prompts or --max-new")
    start = torch.tensor([len(prompt) for prompt in prompts])
    with on(model.device), flash():
        slots = Slots(model, prompts, max_new_tokens, temperature, min_p, seed, stop_ids, grammar, batch)
        began = told = time.time()
        while True:
            slots.advance(CHECK_EVERY)
            working, asked = (slots.row < slots.P).any().item(), slots.next.item()
            seconds = time.time() - began
            if minutes is not None and seconds > 60 * minutes:
                slots.next.fill_(slots.P)
            if name and (not working or time.time() - told > TELL_EVERY):
                made, told = int((slots.end[:-1].cpu() - start).sum()), time.time()
                print(f"{name}: {min(asked, slots.P):,} of {slots.P:,} texts begun or done, {made:,} tokens, "
                      f"{made / seconds:,.0f} tok/s in {seconds:.0f} s", flush=True)
            if not working:
                return Rows(slots.text[:-1].cpu(), start, slots.end[:-1].cpu())


# ---------------------------------------------------------------------------------------------------------------------
# Training

class Batches:
    """Batch number `step`, a function of (seed, step) alone. Rows of like length go together, to pad little."""

    def __init__(self, rows, batch, seed):
        self.rows, self.batch, self.seed, self.epoch = rows, min(batch, len(rows.end)), seed, None
        self.offset = F.pad((rows.end - rows.start).cumsum(0), (1, 0))      # [R + 1] sampled tokens before row r
        self.per_epoch = len(rows.end) // self.batch

    def __call__(self, step):
        """Returns rows [B], tokens [B, L], index [n] into flattened [B, L], ids [n]: running number of each token."""
        epoch, i = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.rows.end), generator=generator)
            groups = [group[self.rows.end[group].argsort()] for group in order.split(16 * self.batch)]
            order = torch.cat(groups)[:self.per_epoch * self.batch].view(-1, self.batch)
            self.epoch, self.order = epoch, order[torch.randperm(self.per_epoch, generator=generator)]
        rows = self.order[i]
        start, end = self.rows.start[rows, None], self.rows.end[rows, None]
        L = min(-(-int(end.max()) // 64) * 64, self.rows.tokens.shape[1])
        own = ((where := torch.arange(L)) >= start - 1) & (where < end - 1)         # position i predicts token i + 1
        ids = (self.offset[rows, None] + where - (start - 1))[own]
        return rows, self.rows.tokens[rows, :L].long(), own.flatten().nonzero()[:, 0], ids


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
    """AdamW, warmup + cosine, gradient norm clipped to 1; a checkpoint a minute in `work`, also on Ctrl-C (exit code 130).

    inputs_of(step) -> (token count, inputs); loss_function(model, *inputs) -> loss, {name: 0-d tensor}. The schedule
    follows `steps` or the clock (`minutes`), whichever is nearer its end. dynamic: shapes change between steps (for
    torch.compile). Returns the metrics' means over the last steps.
    """
    cuda, path = model.embed.is_cuda, Path(work) / "checkpoint.pt"
    matrices = [p.requires_grad_() for p in model.parameters() if p.dim() > 1]
    vectors = [p.requires_grad_() for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=lr, betas=(0.9, 0.95), fused=cuda)
    step, spent, means = 0, 0.0, {}
    if not resume:
        path.unlink(missing_ok=True)                                        # a later --resume must not find another run's
    elif path.exists():
        try:
            state = torch.load(path, map_location=model.device)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            step, spent, means = state["step"], state["spent"], state["means"]
        except Exception as error:                                          # what torch raises depends on what is broken
            raise UserError(f"{path} can't be resumed: it is broken or of other sizes; give the flags it was made with, "
                            f"or leave out --resume ({error!r:.100})") from None
        print(f"resumed at step {step}", flush=True)
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
            progress = max(step / steps if steps else 0, spent / (60 * minutes) if minutes else 0)
            over = bool(stop) or progress >= 1
            if summed and (step % LOG_EVERY == 0 or step == steps or time.time() - logged > TELL_EVERY or over and not means):
                means = {name: float(value) / summed for name, value in sums.items()}
                left = (1 - progress) * spent / max(progress, 1e-9)
                print(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in means.items())
                      + f", {tokens / (time.time() - logged):,.0f} tok/s, {left:.0f} s left", flush=True)
                logged, tokens, summed, sums = time.time(), 0, 0, {}
            if over or time.time() - saved > SAVE_EVERY:
                saved = time.time()
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": spent,
                         "means": means}
                whole(path, functools.partial(torch.save, state))
            if over:
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
        signal.signal(signal.SIGINT, usual)
    if stop:
        print(f"interrupted: {path} holds step {step}; run the same command with --resume to go on", file=sys.stderr)
        raise SystemExit(130)
    for parameter in matrices + vectors:
        parameter.requires_grad_(False)
    return means
