"""Counter-based random numbers: noise that is a pure function of (seed, stream, position, token id).

Nothing is drawn in sequence, so the noise of a position is the same in a batch or alone, in ar, sd or ssd, for the
target and for the draft. That is what couples the two (the `coupled` accept rule, see README): the Gumbel-max trick makes
argmax(logits / T + g) an exact sample of softmax(logits / T), and a draft that adds the same g guesses that sample.
"""
import torch
import triton
import triton.language as tl

TARGET, DRAFT, ACCEPT = 0, 1, 2     # streams: the shared sampling noise, a draft's private noise, accept/reject coins
MASK = 0xFFFFFFFF
POSITION_SALT, ID_SALT = tl.constexpr(0x9E3779B9), tl.constexpr(0x85EBCA6B)     # so that position 7 isn't token 7


def mix(h):
    """A 32-bit finaliser with low bias (Wellons' lowbias32). int64 in and out: torch has no uint32 arithmetic."""
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & MASK
    h = ((h ^ (h >> 15)) * 0x846CA68B) & MASK
    return h ^ (h >> 16)


@triton.jit
def mix32(h):
    """`mix` in Triton, on uint32."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def key32(seed, stream, position):
    """What (seed, stream, position) add to a hash: of scalars, or of [M] int64; uint32."""
    key = mix32((seed >> 32).to(tl.uint32) ^ mix32((stream + 1).to(tl.uint32)))
    return mix32(mix32(seed.to(tl.uint32) ^ key) ^ mix32((position + POSITION_SALT).to(tl.uint32)))


@triton.jit
def gumbel_of(key, ids):
    """`gumbel_ref` in Triton for keys and int64 ids that broadcast: fp32, from bit-equal hashes."""
    h = mix32(key ^ mix32((ids + ID_SALT).to(tl.uint32)))
    u = tl.minimum((h.to(tl.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    race = tl.where(u < 1e-3, u * (1 + u * (0.5 + u * 0.3333333)), -tl.log(1 - u))                          # -log1p(-u)
    return -tl.log(race)


@triton.jit
def gumbel32(seed, stream, position, ids):
    """The same for seed, position [M] int64 of M rows, ids [N] int64 -> [N, M]."""
    return gumbel_of(key32(seed, stream, position)[None, :], ids[:, None])


def uniform_ref(seeds, stream, positions, ids):
    """Uniform numbers in (0, 1), 32 bits fine near zero, where a race of exponentials needs them.

    seeds [B] int64, positions [B, T] int64, ids [..., n] int64 broadcast against [B, T, n] -> [B, T, n] float32.
    """
    key = mix((seeds & MASK) ^ mix(((seeds >> 32) & MASK) ^ mix(torch.full_like(seeds, stream + 1))))   # [B]
    key = mix(key[:, None] ^ mix(positions + POSITION_SALT.value & MASK))                                        # [B, T]
    h = mix(key[:, :, None] ^ mix(ids + ID_SALT.value & MASK))                                             # [B, T, n]
    return ((h.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


def gumbel_ref(seeds, stream, positions, ids):
    """Standard Gumbel noise -log(E), E = -log(1 - u); same arguments as `uniform`. Returns [B, T, n] float32."""
    u = uniform_ref(seeds, stream, positions, ids)
    return -torch.log(-torch.log1p(-u))


uniform, gumbel = uniform_ref, gumbel_ref     # a kernel only inside `head.best`, where the noise is born in registers
