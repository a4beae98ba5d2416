"""Philox words, uniform and normal numbers inside a kernel (docs/algorithm.md, "The noise").

`uniforms` and `normals` return a tile of ROWS by COLUMNS elements. A Philox block covers four
consecutive elements of a row. All four words of a block and both numbers of a Box-Muller pair are
used.
"""

import triton
import triton.language as tl


@triton.jit
def _multiply(x, MULTIPLIER: tl.constexpr):
    # A 64-bit product, because one mul.wide gives both halves. This saves two instructions per
    # round against mul.hi and mul.lo.
    product = x.to(tl.uint64) * MULTIPLIER
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def words(noise, stream, substep, sample, block):
    """Four uint32 words per block of Philox4x32-10 (Salmon et al., SC 2011).

    `noise` points to seed, step, first sample and substep (int64). The kernel reads them, so a
    replayed CUDA graph uses their current values.
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
    # The product with a power of two is exact, so fma rounds once, as the noise contract does.
    return tl.minimum(tl.fma(word.to(tl.float32), 2.0**-32, 2.0**-33), 1 - 2.0**-24)


@triton.jit
def _minus_two_log(u):
    """-2 ln u, by the polynomial of csrc/core/normal.h.

    u = 2^e (1 + f) with f around 0, so that nothing cancels near u = 1.
    """
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
    """(cos, sin)(2 pi u), by the polynomials of csrc/core/normal.h.

    Quarter turns are subtracted exactly, which radians would not permit.
    """
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
    # The fast square root is accurate to one or two units in the last place, 1e-6 at the largest
    # radius.
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
    """Applies FOUR to each block and arranges the results by element.

    A thread draws RUN consecutive elements, 4 or 8, as many as it loads and stores at a time. Any
    other number would exchange data between threads. The joins move no data between threads; the
    last join is the fastest index.

    Args:
        first: Philox block of the first column.
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
