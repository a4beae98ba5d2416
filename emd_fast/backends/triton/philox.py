"""The noise contract (docs/algorithm.md, "The noise") inside a kernel: words, uniform and normal numbers.

A function here returns a tile of ROWS by COLUMNS elements, drawn in blocks of four neighbours of a row. All four words
of a block and both numbers of a Box-Muller pair are used.
"""

import triton
import triton.language as tl


@triton.jit
def _multiply(x, MULTIPLIER: tl.constexpr):
    # In 64 bits, because one mul.wide gives both halves: two instructions fewer a round than mul.hi and mul.lo.
    product = x.to(tl.uint64) * MULTIPLIER
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def words(noise, stream, substep, sample, block):
    """The four uint32 words of Philox4x32-10 blocks (Salmon et al., SC 2011).

    noise points to seed, step, first sample and substep (int64), which are read here: a captured graph that replays
    sees what they are then.
    """
    seed = tl.load(noise)
    x0 = block.to(tl.uint32)
    x1 = (sample + tl.load(noise + 2)).to(tl.uint32)
    x2 = ((stream << 16) + substep + tl.load(noise + 3)).to(tl.uint32)
    x3 = tl.load(noise + 1).to(tl.uint32)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = _multiply(x0, 0xD2511F53)
        high1, low1 = _multiply(x2, 0xCD9E8D57)
        x0 = high1 ^ x1 ^ k0
        x2 = high0 ^ x3 ^ k1
        x1 = low1
        x3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return x0, x1, x2, x3


@triton.jit
def _uniform(word):
    # The product with a power of two is exact, so that fma rounds once where the contract rounds once.
    return tl.minimum(tl.fma(word.to(tl.float32), 2.0**-32, 2.0**-33), 1 - 2.0**-24)


@triton.jit
def _minus_two_log(u):
    """-2 ln u, as csrc/core/normal.h has it: u = 2^e (1 + f) with f around 0, so that nothing cancels near u = 1."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    q = tl.fma(f, -0.17469682196967065, 0.2861504192418942)
    q = tl.fma(q, f, -0.2983594788295583)
    q = tl.fma(q, f, 0.33141016570607984)
    q = tl.fma(q, f, -0.39924144228250247)
    q = tl.fma(q, f, 0.5000351049897187)
    q = tl.fma(q, f, -0.6666790044418094)
    q = tl.fma(q, f, 0.999999832128506)
    q = tl.fma(q, f, -2.0)
    return tl.fma(exponent.to(tl.float32), -1.3862943611198906, q * f)


@triton.jit
def _cos_sin_of_revolutions(u):
    """(cos, sin)(2 pi u), as csrc/core/normal.h has it: quarter turns come off exactly, unlike in radians."""
    shifted = tl.fma(u, 4.0, 12582912.0)  # 1.5 * 2^23 leaves the nearest integer in the low bits
    quarter = shifted.to(tl.int32, bitcast=True)
    r = tl.fma(shifted - 12582912.0, -0.25, u)
    y = r * r
    s = tl.fma(y, -75.39356282213731, 81.5923535548803)
    s = tl.fma(s, y, -41.341661454923866)
    s = tl.fma(s, y, 6.283185286833361) * r
    c = tl.fma(y, -83.66592100384119, 64.92322864598019)
    c = tl.fma(c, y, -19.73916726349807)
    c = tl.fma(c, y, 1.0)
    odd = (quarter & 1) != 0
    first = tl.where(odd, s, c).to(tl.int32, bitcast=True) ^ (((quarter + 1) & 2) << 30)
    second = tl.where(odd, c, s).to(tl.int32, bitcast=True) ^ ((quarter & 2) << 30)
    return first.to(tl.float32, bitcast=True), second.to(tl.float32, bitcast=True)


@triton.jit
def _normal_pair(word0, word1):
    # The fast square root is right to a unit in the last place or two: 1e-6 of the largest radius.
    radius = tl.sqrt(_minus_two_log(_uniform(word0)))
    cosine, sine = _cos_sin_of_revolutions(_uniform(word1))
    return radius * cosine, radius * sine


@triton.jit
def _four_uniforms(noise, stream, substep, sample, block):
    w0, w1, w2, w3 = words(noise, stream, substep, sample, block)
    return _uniform(w0), _uniform(w1), _uniform(w2), _uniform(w3)


@triton.jit
def _four_normals(noise, stream, substep, sample, block):
    w0, w1, w2, w3 = words(noise, stream, substep, sample, block)
    n0, n1 = _normal_pair(w0, w1)
    n2, n3 = _normal_pair(w2, w3)
    return n0, n1, n2, n3


@triton.jit
def _drawn(
    FOUR: tl.constexpr,
    noise,
    stream,
    substep,
    sample,
    first,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RUN: tl.constexpr,
):
    """What FOUR makes of each block, element by element; `first` is the block of the first column.

    A thread makes RUN neighbours, 4 or 8: the number that it loads and stores at a time. Otherwise they would have to
    be exchanged between threads. The joins only name what a thread has; the last one is the fastest index.
    """
    run = first + tl.arange(0, COLUMNS // RUN)[None, :] * (RUN // 4)
    a0, a1, a2, a3 = FOUR(noise, stream, substep, sample, run)
    if RUN == 8:
        b0, b1, b2, b3 = FOUR(noise, stream, substep, sample, run + 1)
        a0 = tl.join(a0, b0)
        a1 = tl.join(a1, b1)
        a2 = tl.join(a2, b2)
        a3 = tl.join(a3, b3)
    return tl.reshape(tl.join(tl.join(a0, a2), tl.join(a1, a3)), [ROWS, COLUMNS])


@triton.jit
def uniforms(noise, stream, substep, sample, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr):
    return _drawn(_four_uniforms, noise, stream, substep, sample, first, ROWS, COLUMNS, RUN)


@triton.jit
def normals(noise, stream, substep, sample, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr):
    return _drawn(_four_normals, noise, stream, substep, sample, first, ROWS, COLUMNS, RUN)
