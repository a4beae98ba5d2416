"""Calls of the ops, for backends that are compared with the reference: shapes, layouts and dtypes."""

import torch
from helpers import DTYPES, NOISE_ERROR, assert_as_good_as_eager, draw, per_sample, seeded

from emd_fast import Noise
from emd_fast.backends import reference

# One element, odd and prime sizes, rows of channels_last, many samples a program, several parts of a sum or tiles.
SMALL = [(3,), (7, 1), (300, 5), (2, 3, 8, 8), (2, 3, 7, 7), (2, 37, 6, 6), (1, 3, 37, 19), (3, 2, 3, 2, 5)]
SHAPES = [
    *SMALL, (2, 64, 4, 4), (2, 1, 2, 3, 2, 2, 3, 2, 2), (2, 3, 128, 128), (1, 49999), (64, 3, 64, 64), (0, 3, 4, 4),
    (3, 0),
]  # fmt: skip
NUMBERS = {"seed": 0x123456789ABCDEF, "step": 3, "first_sample": 1000, "substep": 2}
WRITTEN = {"langevin_eps": 2, "langevin_z": 1}  # so many leading arguments
# What the contract allows the noise of these results, times the largest factor before it.
NOISY = dict.fromkeys(("normal", "perturb", "langevin_z", "langevin_eps 0"), 2 * NOISE_ERROR)


def cases(shapes):
    layouts = ["contiguous", "channels_last", "transposed", "sliced", "batch_last"]
    return [(s, x) for s in shapes for x in layouts if x in ("contiguous", "sliced") or len(s) == 4]


def calls(shape, layout, dtypes=DTYPES, terms=(1, 2, 3, 4, 5)):
    """(op, arguments as torch.library has them) for each of the ops that work on (B, ...)."""
    g, batch, noise = seeded(0), shape[0], Noise(**NUMBERS).state
    a, b, c, d = (per_sample(batch, g) for _ in range(4))
    yield "uniform", [list(shape), noise, 65535, 1]
    for i, dtype in enumerate(dtypes):
        output, wide = draw(shape, g, dtype, layout), draw(shape, g, torch.float32, layout)
        state, dense = draw(shape, g), draw(shape, g, dtype)
        yield "normal", [list(shape), noise, 6, 1, dtype]
        yield "perturb", [output, a, b, wide, None, 0, 0, dtype]
        yield "perturb", [output, a, b, None, noise, 5, 0, torch.float32 if i % 2 else dtype]
        for sizes in (None, per_sample(batch, g, 0.0, 1.0)):
            yield "langevin_z", [state, output, 0.01, sizes, i == 2, noise, 7]
        for count in terms:
            x = wide if count == 5 else None
            outputs = [draw(shape, g, dtype, layout) for _ in range(count - (x is not None))]
            if count == 3:  # not all of one layout and dtype
                outputs[1] = draw(shape, g)
            coefs, sizes = torch.randn(count, batch, generator=g).T, None if i % 2 else per_sample(batch, g, 0.0, 1.0)
            exact = i == 2
            yield "langevin_eps", [state, draw(shape, g), x, outputs, coefs, a, b, 0.3, sizes, exact, noise, 7, dtype]
        yield "m_step_loss", [output, state, a, b, c]
        yield "m_step_loss_backward", [torch.ones(()).expand(batch) if i % 2 else d, state, a, b, c, dtype]
        yield "score_matching_loss", [output, wide, dense, a, b, c]
        yield "score_matching_loss_backward", [d, output, wide, dense, a, b, c]


def results(run, op, arguments, convert):
    """What run returns, after what it wrote; each argument is converted first, and written ones are copies."""
    given = [[convert(v) for v in a] if isinstance(a, list) else convert(a) for a in arguments]
    written = [a.clone() for a in given[: WRITTEN.get(op, 0)]]
    result = run(*written, *given[len(written) :])
    return [*written, *([] if result is None else [result])]


def doubled(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    return torch.float64 if isinstance(value, torch.dtype) else value


def assert_as_good_as_reference(run, op, arguments, device="cpu"):
    """On the device against float64 on the CPU, with the error of the reference in the same dtypes."""
    ours = results(run, op, arguments, lambda value: value.to(device) if isinstance(value, torch.Tensor) else value)
    exact, eager = (results(reference.OPS[op], op, arguments, convert) for convert in (doubled, lambda value: value))
    for i, (mine, right, its) in enumerate(zip(ours, exact, eager, strict=True)):
        assert mine.device.type == device and mine.dtype == its.dtype and mine.is_contiguous()
        more = NOISY.get(f"{op} {i}" if op == "langevin_eps" else op, 0.0)
        assert_as_good_as_eager(mine.cpu(), right, its, more=more, what=f"{op} {i} {its.dtype}")
