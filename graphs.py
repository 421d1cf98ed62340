"""How steps run: as CUDA graphs, where a few hundred kernel launches become one; two of them side by side; and how their
outcome gets to the host."""
import contextlib
import ctypes
import itertools
import operator
import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch.utils import _pytree as pytree

from kernels import MAX_ROWS
from kernels.mail import send


def on(device):
    """A context in which kernels go to `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def cross(x, device):
    """x (a tensor, a NamedTuple of such, or None) on `device`: itself if it's there, else by a peer copy.

    Nobody waits for the copy but the current streams of the two GPUs.
    """
    if x is None or torch.is_tensor(x):
        return x if x is None else x.to(device, non_blocking=True)
    parts = [cross(part, device) for part in x]
    return x if all(map(operator.is_, parts, x)) else type(x)(*parts)


@contextlib.contextmanager
def fork(stream):
    """A context whose kernels go to `stream` (None: where all go), behind what the current one has got; gives a function that
    lets that one wait for them. While a graph is recorded they become a branch of it."""
    if stream is None:
        yield lambda: None
        return
    here = torch.cuda.current_stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        yield partial(here.wait_stream, stream)


FIRST = -1              # priority of the draft's kernels: tiny and many, they must not queue behind the target's grids
MOST = 24               # graphs that a side keeps: a verify for each tree, a few for each way to draft
# Nothing may wait for the host where each launch waits for its end, or where streams share so few queues that one blocks another.
BLOCKING = os.environ.get("CUDA_LAUNCH_BLOCKING", "0") != "0" or int(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") or 8) < 8


class Graphs:
    """Calls methods of one object, functions of tensors, by CUDA graph where `on`; one is recorded the second time it is
    asked for.

    A function may read and write tensors that its owner keeps (KV cache, prefix lengths) in place. A graph reads its
    arguments (tensors, tuples of them, or constants) where they lay when it was recorded: the same tensors again cost
    nothing, others are copied there, so nobody else may need what was passed then. Its results stand at fixed addresses
    and hold until the same function is called with the same shapes and constants again. What it does in Python happens
    only while it is recorded. Every graph has memory of its own: in a shared pool the scratch space of one would lie over
    the results of another.
    """

    slow = 0            # calls, of all Graphs, that weren't replays: steps that compile or are recorded take long

    def __init__(self, on, priority=0):
        """priority: of the kernels in the graphs; negative ones go first where two graphs wait for the same room."""
        # A stream of its own to record on, since libraries keep a workspace per stream, and graphs run side by side; the
        # priority of a recorded kernel is that of this stream, whichever stream the graph is launched on.
        self.on, self.recorded, self.known = on, {}, {}
        self.stream = torch.cuda.Stream(priority=priority) if on else None

    def clear(self):
        """Forget all graphs: what their functions keep has moved."""
        self.recorded, self.known = {}, {}

    def ready(self, f, *args):
        """Whether to call f(*args) now means to launch a graph and no more: nothing to compile, to record, to copy or to wait for."""
        return not BLOCKING and (f.__func__, *map(id, args)) in self.known

    def __call__(self, f, *args, warm=False):
        """warm: all that f does has run before, on the streams that record it, so it is recorded at once."""
        if not self.on:
            return f(*args)
        # The host's time counts: what was passed before, the very same objects, needs no looking into.
        same = (f.__func__, *map(id, args))
        if same in self.known:
            _, graph, results = self.known[same]
            graph.replay()
            return results
        leaves = pytree.tree_leaves(args)
        key = (f.__func__, *(tuple(x.shape) if torch.is_tensor(x) else x for x in leaves))
        Graphs.slow += not self.recorded.get(key)
        if key not in self.recorded and not warm:   # the first time as it is, but on the stream that will record: that compiles
            self.recorded[key] = None               # the kernels and makes what they keep for each stream
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                results = f(*args)
            current.wait_stream(self.stream)
            return results
        if self.recorded.get(key) is None:
            graph = torch.cuda.CUDAGraph()      # begun by hand: torch.cuda.graph would stop the world and collect garbage
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    results = f(*args)
                finally:
                    graph.capture_end()
            self.recorded.pop(key, None)        # the newest stands last, the oldest makes room
            self.recorded[key] = graph, leaves, results
            if len(self.recorded) > MOST:
                self.recorded.pop(next(iter(self.recorded)))
                self.known = {}
        graph, recorded, results = self.recorded[key]
        in_place = True
        for fixed, x in zip(recorded, leaves):
            if torch.is_tensor(x) and (x.data_ptr() != fixed.data_ptr() or x.stride() != fixed.stride()):
                fixed.copy_(x)
                in_place = False
        if in_place:
            self.known = {} if len(self.known) > MOST else self.known
            self.known[same] = args, graph, results             # the args, too: an id is theirs while they live
        graph.replay()
        return results


class Mailbox:
    """What each run of a step leaves to the host: a few numbers a sequence, sent by the step itself (kernels/mail.py).

    The host asks for a receipt whenever it has launched the step, so that both count alike.
    """

    DEPTH, WIDTH = 4, 2 * MAX_ROWS + 4          # runs that may be on their way; a line: its number, and a Target's report at most
    FIRST = itertools.count(1 << 32, 1 << 32)   # no two boxes have a number in common
    KEPT = deque(maxlen=64)                     # the latest boxes, for late mail: torch doesn't know that a kernel writes there

    def __init__(self, device, rows):
        self.device, self.rows, self.number = device, rows, next(self.FIRST)
        if device.type == "cuda":
            self.box = torch.zeros(self.DEPTH, rows, self.WIDTH, dtype=torch.int64, pin_memory=True)
            self.KEPT.append(self.box)
            self.words = (ctypes.c_int64 * self.box.numel()).from_address(self.box.data_ptr())
            self.sent = torch.full((rows,), self.number, dtype=torch.int64, device=device)

    def send(self, x):
        """To be called in the step: x [rows, n] int64."""
        if x.is_cuda:
            send(x, self.box, self.sent)

    def receipt(self, x):
        """To be called once for each run of the step. Returns a function that waits for what this run sent, and gives lists."""
        if not x.is_cuda:
            lists = x.tolist()
            return lambda: lists
        self.number += 1
        return partial(self.wait_for, self.number, x.shape[1])

    def wait_for(self, number, n):
        words, first, lists = self.words, number % self.DEPTH * self.rows * self.WIDTH, []
        for at in range(first, first + self.rows * self.WIDTH, self.WIDTH):
            began = time.monotonic()
            while words[at] != number:
                if words[at] > number:
                    raise RuntimeError(f"the mail of run {number} was written over by that of {words[at]}: runs were launched that "
                                       f"nobody asked a receipt for")
                if time.monotonic() > began + 1:                            # seldom: has the GPU failed?
                    torch.cuda.current_stream(self.device).query()          # raises then
                    began = time.monotonic()
            lists.append(words[at + 1:at + 1 + n])
        return lists


class Beside:
    """Runs both sides at once: on two streams of a GPU, in two worker threads of a CPU.

    On a GPU the next round may be launched before the host knows how this one ended (`ahead`). It stands behind a gate then, a
    kernel that lets it pass at once if all sequences hit; else it waits until the backup has run, aside (`backing_up`).
    """

    def __init__(self, drafter):
        self.drafter, self.device, self.cuda = drafter, drafter.device, drafter.device.type == "cuda"

    def __enter__(self):
        if self.cuda:
            self.stream, self.aside = (torch.cuda.Stream(self.device, priority=FIRST) for _ in range(2))
            self.passed = torch.cuda.Event()
            self.drafter.opened.fill_(0)                                    # loads the kernel that opens it, too
        else:
            self.pool, self.threads = ThreadPoolExecutor(2), torch.get_num_threads()
        return self

    def __exit__(self, *_):
        if self.cuda:
            with torch.cuda.stream(self.aside):
                self.drafter.opened.fill_(1)                                # come what may, nobody stays at the gate
            for stream in self.stream, self.aside:
                torch.cuda.current_stream(self.device).wait_stream(stream)
        else:
            self.pool.shutdown()

    def both(self, target, draft):
        """Start target() on the caller's stream, and draft() beside it unless it is None; returns for each a function that
        joins and gives its result. The target's step goes first: it is launched in less time than the draft's many small
        kernels, and has more to do."""
        if draft is None:
            verified = target()
            return lambda: verified, lambda: None
        if not self.cuda:
            return self.submit(target), self.submit(draft)
        self.passed.record(torch.cuda.current_stream(self.device))
        verified = target()
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.passed)                             # not for the target's step
            drafted = draft()

        def join():
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            return drafted
        return lambda: verified, join

    def ahead(self, target, speculation):
        """Launch the next round, to start where all sequences have hit or a backup has run: as one graph, or in its parts where a
        timeline is to see them. Until that is known nobody may wait for the GPU, nor load a kernel. Returns its receipts."""
        if self.drafter.stats.timeline is None:
            return self.drafter.round(target)
        self.drafter.wait_at_gate()
        verified, drafted = self.both(partial(target.verify, *speculation), self.drafter.precompute)
        verdict, report = verified()
        return report, self.drafter.switch(verdict, drafted())

    @contextlib.contextmanager
    def backing_up(self, waiting):
        """A context for what misses need. If a round is waiting at the gate, that happens aside and opens it: at once, as mail is
        what a round does last, and it said who missed."""
        if not waiting:
            yield
            return
        with torch.cuda.stream(self.aside):
            yield
            self.drafter.opened.fill_(1)

    def submit(self, work):
        @torch.inference_mode()
        def run():
            torch.set_num_threads(max(1, self.threads // 2))                # both sides get half of the cores
            return work()
        return self.pool.submit(run).result
