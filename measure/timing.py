"""What bench.py and tune.py measure with: times of repeated runs, the machine's card, single steps of a model at fixed shapes.

Models to measure on have random weights: zeros draw less power and clock higher.
"""
import platform
import subprocess
import time

import torch
import triton

from graphs import Graphs
from model import KVCache, Llama
from sampling import Sampler, Sampling
from tree import Tree

COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}     # several times any cache
WARM_UP = 3                                         # runs that compile kernels, record a CUDA graph and replay it
INNER = 8                                           # runs between two events: one alone would show the replay's latency


def seconds_of(run, *devices, repeats=None):
    """(least, median, most) seconds of run(), whose work is on `devices`; on GPUs by events on their current streams."""
    gpus, times = [device for device in dict.fromkeys(devices) if device.type == "cuda"], []
    for _ in range(WARM_UP if gpus else 1):
        run()
    for _ in range(repeats or (30 if gpus else 7)):
        if gpus:
            stream, (start, end) = torch.cuda.current_stream(gpus[0]), (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            for _ in range(INNER):
                run()
            for other in gpus[1:]:
                stream.wait_stream(torch.cuda.current_stream(other))
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / INNER)
        else:
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
    times.sort()
    return times[0], times[len(times) // 2], times[-1]


def copy_bandwidth(device):
    """Bytes a second of a large copy, read and written: what memory gives here."""
    a = torch.empty(COPY_BYTES[device.type], dtype=torch.uint8, device=device).random_()
    b = torch.empty_like(a)
    return 2 * a.numel() / seconds_of(lambda: b.copy_(a), device)[1]


def card(device):
    """The machine in a dict: names, versions, measured copy bandwidth in bytes a second."""
    found = dict(device=cpu_name(), threads=torch.get_num_threads(), driver=None, cache_bytes=0)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found = dict(device=properties.name, threads=None, driver=nvidia_driver(), cache_bytes=properties.L2_cache_size)
    return dict(**found, torch=torch.__version__, triton=triton.__version__, python=platform.python_version(),
                copy_bandwidth=copy_bandwidth(device))


def cpu_name():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def nvidia_driver():
    """The driver's version and the power limit, or None where nvidia-smi doesn't say."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def model_bytes(config, dtype):
    """Bytes of a model's weights, without making them."""
    return sum(p.numel() for p in Llama(config, "meta", dtype).parameters()) * dtype.itemsize


def step_bytes(config, dtype, context):
    """(weights, KV): bytes that a step of one sequence reads; the embedding counts only where it is the head as well."""
    unread = 0 if config.tie_embeddings else config.vocab_size * config.dim
    cached = 2 * config.n_layers * config.n_kv_heads * config.head_dim * context
    return model_bytes(config, dtype) - unread * dtype.itemsize, cached * dtype.itemsize


def random_model(config, device, dtype):
    """A model of a shape, with random weights drawn on the device."""
    model = Llama(config, device, dtype)
    for p in model.parameters():
        p.fill_(1.0) if p.dim() == 1 else p.normal_(0, p.shape[1] ** -0.5)
    return model


class Step:
    """A decoding step of one sequence: `rows` tokens behind `context` cached ones, through forward, head and choice.

    One token is a step of ar, more of them a verify, or branches that are drafted side by side. Call it to run it.
    """

    def __init__(self, model, rows, context, cache):
        """cache: `random_cache` of at least context + rows slots."""
        self.model, self.cache, device = model, cache, model.device
        self.sampler, self.start = Sampler(Sampling(), [0], device), torch.full((1,), context, device=device)
        self.tree = Tree([-1] + [0] * (rows - 1), device)       # a root and its children: every row counts the same
        self.positions = self.start[:, None] + self.tree.node_depth
        self.slots = self.start[:, None] + torch.arange(rows, device=device)
        self.tokens = torch.randint(0, model.config.vocab_size, (1, rows), device=device)
        self.graphs = Graphs(model.graphs)

    @torch.inference_mode()
    def __call__(self):
        return self.graphs(self.run, self.tokens)

    def run(self, tokens):
        hidden = self.model(tokens, self.positions, self.slots, self.start, self.tree.ancestors, self.cache)
        return self.sampler.choose(self.model, hidden, self.positions + 1, 1, self.model.d2t)


def random_cache(model, context, rows):
    """A KVCache of one sequence full of random K and V, with room for `rows` tokens behind `context`."""
    cache = KVCache(model.config, 1, context + rows + 1, model.device, model.dtype)
    cache.k.normal_()
    cache.v.normal_()
    return cache
