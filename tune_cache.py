"""What --tune has measured, kept for later runs: an entry for each pair of models, machine, batch size and way to sample."""
import json
import os
import sys
import zlib
from dataclasses import asdict
from pathlib import Path

import torch

from batch import Stats
from kernels import TORCH, Int8Weight
from tune import Times, best_mode, choose

SAMPLED_ROWS = 1024         # of the embedding, for a fingerprint: a large one would take long on a CPU


def fingerprint(model):
    """What tells weights from others of their shape: the bits of the embedding's first rows, the first and the last layer,
    taken for whole numbers and summed up, as every device does in the same way. Returns 8 hex digits."""
    weights = [model.embed[:SAMPLED_ROWS]]
    for layer in (model.layers[0], model.layers[-1]):
        for weight in (layer.attn_norm, layer.wqkv, layer.wo, layer.mlp_norm, layer.w_gate_up, layer.w_down):
            weights += weight if isinstance(weight, Int8Weight) else [weight]
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32}
    sums = [int(weight.view(whole[weight.element_size()]).sum()) for weight in weights]
    return f"{zlib.crc32(repr(sums).encode()):08x}"


def key(target_model, draft_model, batch, sampling, accept):
    """The name of an entry: a line for people, too. sampling, accept: acceptance and hits depend on them."""
    def name(model):
        c, device = model.config, model.device
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        weights = "int8" if isinstance(model.layers[0].wqkv, Int8Weight) else str(model.dtype).removeprefix("torch.")
        how = ("torch" if model.ops is TORCH else "triton") + (", graphs" if model.graphs else "")
        return (f"{gpu}, {weights} {fingerprint(model)}, {how}, {c.n_layers} layers x {c.dim}, {c.n_heads}/{c.n_kv_heads} heads "
                f"x {c.head_dim}, ffn {c.ffn_dim}, vocabulary {c.vocab_size}")
    own_gpu = ", on its own device" if draft_model.device != target_model.device else ""
    how = "greedy"
    if sampling.temperature:
        how = f"temperature {sampling.temperature}, top-k {sampling.top_k}, top-p {sampling.top_p}, {accept}"
    return f"torch {torch.__version__} | {name(target_model)} | {name(draft_model)}{own_gpu} | batch {batch} | {how}"


def path():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saguaro" / "tune.json"


def load(target_model, draft_model, batch, sampling, accept):
    """(Times, Stats) that were saved, or None. A file that can't be read is told of and ignored."""
    file = "the cache of --tune"
    try:
        file = path()
        entry = json.loads(file.read_text(encoding="utf-8")).get(
            key(target_model, draft_model, batch, sampling, accept))
        if entry is None:
            return None
        times, stats = Times(**entry["times"]), Stats(choices=entry["choices"])
        stats.misses = {int(f): counts for f, counts in entry["misses"].items()}
        times.verify_seconds(1), stats.rank_acceptance(), stats.miss_exponent(), choose(times, stats, draft_model)     # are they whole?
        return times, stats
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        print(f"{file} is of no use ({error!r}) and ignored; --tune writes it anew", file=sys.stderr)


def save(target_model, draft_model, times, stats, sampling, accept):
    """Keep what `tune.find` found, and for people the plans that follow. Where that can't be, it is told of and done without."""
    plans = choose(times, stats, draft_model)
    entry = dict(fastest=best_mode(plans), plans={mode: plan._asdict() for mode, plan in plans.items()}, times=asdict(times),
                 choices=stats.choices, misses=stats.misses)
    try:
        file = path()
        try:
            entries = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            entries = {}
        entries = entries if isinstance(entries, dict) else {}
        entries[key(target_model, draft_model, times.batch, sampling, accept)] = entry
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(f"{file.name}.{os.getpid()}")
        new.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
        new.replace(file)                                                   # whole, whoever else writes
    except (OSError, RuntimeError) as error:
        print(f"the choice can't be kept for later runs: {error}", file=sys.stderr)
