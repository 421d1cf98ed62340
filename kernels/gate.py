"""A gate in a stream: what is launched behind it starts when all sequences have hit, or else when somebody opens it.

It takes the host out of the way between two rounds of SSD: the next verify is launched before anybody knows how this one ends,
and after a hit follows the join at once. After a miss it waits here for the backup, which the host launches on the other stream.
Bytes: a few. Grid: one program, which spins in a corner of one multiprocessor.

There's no twin in plain torch: on a CPU nothing is launched ahead.
"""
import triton
import triton.language as tl


@triton.jit
def gate_kernel(found_ptr, opened_ptr, B, BLOCK: tl.constexpr):
    """found [B, 4]: hit (0 or 1) first. opened [1] int32: becomes 1 where the gate is opened; closed again behind whoever waited."""
    b = tl.arange(0, BLOCK)
    hits = tl.load(found_ptr + 4 * b, mask=b < B, other=1)
    if tl.min(hits, axis=0) == 0:
        while tl.atomic_add(opened_ptr, 0, sem="acquire") == 0:
            pass
        tl.store(opened_ptr, 0)


def wait_at_gate(found, opened):
    """Let the current stream wait unless found [B, 4] int64 says that all hit, until opened [1] int32 is 1; sets it back to 0."""
    assert found.shape[1] == 4 and found.is_contiguous()
    gate_kernel[(1,)](found, opened, len(found), triton.next_power_of_2(len(found)), num_warps=1)
