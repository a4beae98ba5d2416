"""Implementation of `emd-fast bench`. The command line declares its options."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import difflib
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import benchmarks
from benchmarks.harness import ceiling, clock, compare, machine, ncu, record, show
from benchmarks.harness.contenders import Contender, contenders_of
from benchmarks.harness.declare import DTYPES, Bench, Case, Inputs, RandomTensors
from benchmarks.harness.record import ABSENT, TIMED, WRONG, Record, Result, Row
from benchmarks.harness.verify import Verification, Verifier, call, with_gradients
from emd_fast.config import ConfigError
from emd_fast.io.files import write_text

AGAIN = " again"  # emd_fast is timed under two names; their difference estimates the timing noise
_MOST_SETS = 512
_CACHES = 4  # all input sets together, relative to the last-level cache


def run(options: argparse.Namespace) -> int:
    """Runs the command. Returns the exit code: 1 if emd_fast is wrong or has become slower.

    Raises:
        ConfigError: invalid options.
        RuntimeError: a backend or a tool that is not available.
    """
    if options.ncu:
        return _profile(options)
    device = device_named(options.device)
    work = _work(options, device)
    if options.one_call:
        return _one_call(options, work)
    _known(options, work)
    with _threads(options.threads):
        settings = {
            "device": device.type,
            "threads": torch.get_num_threads(),
            "rounds": options.rounds,
            "warm": options.warm,
            "graph": options.graph,
        }
        old = _older(options.compare, machine.hardware(device), settings)
        _writable(options)
        done = _measured(options, device, work, settings)
    wrong = [
        f"{result.title}: {row.contender}: {row.why}" for result in done.results for row in result.rows if _fails(row)
    ]
    slower, notes = compare.regressions(old, done) if old else ([], [])
    for note in notes:
        print(f"note: {note}")
    for problem in wrong:
        print(f"emd-fast: wrong: {problem}", file=sys.stderr)
    for problem in slower:
        print(f"emd-fast: regression: {problem}", file=sys.stderr)
    return 1 if wrong or slower else 0


def _measured(
    options: argparse.Namespace, device: torch.device, work: list[tuple[Bench, Case]], settings: dict[str, object]
) -> Record:
    before = machine.clocks(device)
    copy, copied = ceiling.copy_time(device, max(5, min(options.rounds, 20)))
    done = Record(
        when=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        hardware=machine.hardware(device),
        software=machine.software(device),
        clocks={"before": before, "after": None},
        commit=machine.commit(),
        settings=settings,
        ceiling={"bytes_per_second": copied / copy.median, "bytes": copied, "q1": copy.q1, "q3": copy.q3, "n": copy.n},
        results=(),
    )
    for bench, case in work:
        finished = done.results
        for result in _results(options, bench, case, copied / copy.median):
            clocks = {"before": before, "after": machine.clocks(device)}
            done = dataclasses.replace(done, results=(*finished, result), clocks=clocks)
            _save(options, done)  # after every case or contender, so an interrupted run keeps its results
        print(show.terminal(result) + "\n", flush=True)
    if options.plot and any(row.status == TIMED for result in done.results for row in result.rows):
        show.plot(options.plot, done)  # once at the end, since drawing takes longer than measuring a case
    print("\n".join(show.facts(done)))
    return done


def _save(options: argparse.Namespace, done: Record) -> None:
    if options.json:
        record.write(options.json, done)
    if options.markdown:
        write_text(options.markdown, show.markdown(done))


def _results(options: argparse.Namespace, bench: Bench, case: Case, bandwidth: float) -> Iterator[Result]:
    """Yields the result of a case: once, or after each contender if the benchmark does not interleave."""
    torch.compiler.reset()
    contenders, absent = contenders_of(bench, case, options.backend, options.against, options.skip, options.compile)
    moved = bench.traffic(case).total if bench.traffic else None
    flops = bench.flops(case) if bench.flops else None
    arithmetic = None
    if flops is not None and moved is None:
        arithmetic = ceiling.matmul_rate(case.device, DTYPES[case.dtype], max(5, min(options.rounds, 20)))
    sets = _sets(bench, case, moved, options.warm)
    missing = [Row(name, True, ABSENT, reason) for name, reason in absent.items()]
    verifier = Verifier(bench, bench.verified(case))
    inputs: list[Inputs] = []
    rows: list[Row] = []
    for turn in [contenders] if bench.interleaves else [[contender] for contender in contenders]:
        verifications = {contender.name: verifier.verify(contender) for contender in turn}
        if bench.interleaves:
            del verifier  # frees its tensors before the inputs are made
        inputs = inputs or [
            with_gradients(bench, case, bench.inputs(RandomTensors(case, seed))) for seed in range(sets)
        ]
        sound = [contender for contender in turn if verifications[contender.name].problem is None]
        calls = {c.name: [_call(bench, case, c, one) for one in inputs] for c in sound}
        again = {c.name + AGAIN: calls[c.name] for c in sound if c.ours}
        graph = options.graph and bench.captures
        measured = clock.measure(calls | again, case.device, options.rounds, graph)
        for contender in turn:
            verification = verifications[contender.name]
            rows.append(_row(contender, verification, measured, moved, flops, bandwidth, arithmetic))
        if not bench.interleaves:
            print(show.line(rows[-1]), flush=True)
        yield Result(
            bench.name,
            case.passes,
            case.shape,
            case.dtype,
            case.layout,
            moved,
            flops,
            sets,
            moved is not None and sets * moved >= 2 * machine.cache_bytes(case.device),
            bench.eager_name,
            (*rows, *missing),
        )


def _row(
    contender: Contender,
    verification: Verification,
    measured: clock.Measurements,
    moved: float | None,
    flops: float | None,
    bandwidth: float,
    arithmetic: float | None,
) -> Row:
    name, (seconds, failed, peaks) = contender.name, measured
    if name in seconds:
        noise = clock.timing_noise(seconds[name], seconds[name + AGAIN]) if name + AGAIN in seconds else None
        timing = clock.Timing.of(seconds[name])
        row = _timed(contender.ours, name, verification, timing, noise, moved, flops, bandwidth, arithmetic)
        return dataclasses.replace(row, peak_bytes=peaks.get(name))
    status = WRONG if verification.wrong else ABSENT
    why = failed.get(name, verification.problem)
    return Row(name, contender.ours, status, why, verification.error, verification.bound)


def _call(bench: Bench, case: Case, contender: Contender, inputs: Inputs) -> clock.Call:
    return lambda: call(bench, case, contender, inputs)


def _timed(
    ours: bool,
    name: str,
    verification: Verification,
    timing: clock.Timing,
    noise: float | None,
    moved: float | None,
    flops: float | None,
    bandwidth: float,
    arithmetic: float | None,
) -> Row:
    rate = None if moved is None else moved / timing.median
    share = None if rate is None else rate / bandwidth
    if flops is not None and arithmetic is not None:
        share = flops / timing.median / arithmetic
    return Row(
        contender=name,
        ours=ours,
        status=TIMED,
        error=verification.error,
        bound=verification.bound,
        median=timing.median,
        q1=timing.q1,
        q3=timing.q3,
        n=timing.n,
        noise=noise,
        bytes_per_second=rate,
        share=share,
        flops_per_second=None if flops is None else flops / timing.median,
    )


def _fails(row: Row) -> bool:
    """Whether an emd_fast contender is wrong, or cannot run although its backend is available."""
    return row.ours and row.status != TIMED and (row.status == WRONG or (row.why or "").startswith("cannot run"))


def _sets(bench: Bench, case: Case, moved: float | None, warm: bool) -> int:
    if warm or not bench.rotates or not moved:
        return 1
    wanted = math.ceil(_CACHES * machine.cache_bytes(case.device) / moved)
    if case.device.type == "cuda":  # a set holds about the bytes that it moves; contenders need memory too
        wanted = min(wanted, int(torch.cuda.mem_get_info(case.device)[0] / 4 / moved))
    return max(1, min(_MOST_SETS, max(2, wanted)))


def _work(options: argparse.Namespace, device: torch.device) -> list[tuple[Bench, Case]]:
    """Returns the cases to run. Without named ops, ops that do not fit shape or layout are left out."""
    for name in options.ops:
        if name not in benchmarks.NAMES:
            near = difflib.get_close_matches(name, benchmarks.NAMES, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown op {name!r}: choose from {', '.join(benchmarks.NAMES)}{hint}")
    work: list[tuple[Bench, Case]] = []
    refused = None
    for name in options.ops or benchmarks.OPS:
        bench = benchmarks.load(name)
        try:
            cases = bench.cases(options.shape, options.dtype, options.layout, device)
        except ConfigError as error:
            if options.ops:
                raise
            refused = error
            print(f"note: left out: {error}")
            continue
        for wanted in options.backend:
            if not options.ops and isinstance(bench.implementations(bench, device).get(wanted, ""), str):
                print(f"note: left out: {name} has no backend {wanted!r} here")
                break
        else:
            work += [(bench, case) for case in cases]
    if not work:
        raise refused or RuntimeError(f"no op has the backend {' and '.join(options.backend)} here")
    return work


def _known(options: argparse.Namespace, work: list[tuple[Bench, Case]]) -> None:
    """Checks the contenders that --against and --skip name, before anything is measured."""
    names: set[str] = set()
    for bench, case in work:
        found, absent = contenders_of(bench, case, options.backend, options.against)
        names |= {contender.name for contender in found} | absent.keys()
    for name in options.skip:
        if name not in names:
            raise ConfigError(f"--skip {name!r} is no contender here: {', '.join(sorted(names))}")


def device_named(name: str | None) -> torch.device:
    """Returns the device; for None a GPU if present, otherwise the CPU.

    Raises:
        ConfigError: another name than cpu, cuda or cuda:N.
        RuntimeError: no GPU is present.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: no CUDA GPU is here")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _older(path: Path | None, hardware: dict[str, object], settings: dict[str, object]) -> Record | None:
    """Reads the file of --compare and checks that it is comparable, before anything is measured."""
    if path is None:
        return None
    old = record.read(path)
    if reason := compare.refusal(old, hardware, settings):
        raise ConfigError(f"--compare: {path} {reason}")
    return old


def _writable(options: argparse.Namespace) -> None:
    if options.plot and options.plot.suffix != ".png":
        raise ConfigError(f"--plot must end in .png, got {options.plot}")
    for path in (options.json, options.markdown, options.plot):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{path} cannot be written: there is no folder {path.parent}")


def _profile(options: argparse.Namespace) -> int:
    """Builds the command for a CUDA device; printing it needs no GPU."""
    if len(options.ops) != 1:
        raise ConfigError(f"--ncu takes one op, got {len(options.ops)}")
    ((bench, case), *_) = _work(argparse.Namespace(**{**vars(options), "backend": []}), torch.device("cuda"))
    return ncu.run(ncu.command(bench, case, options.backend))


def _one_call(options: argparse.Namespace, work: list[tuple[Bench, Case]]) -> int:
    ((bench, case), *_) = work
    if case.device.type != "cuda":
        raise RuntimeError("--one-call: no CUDA GPU is here")
    ours = [c for c in contenders_of(bench, case, options.backend)[0] if c.ours]
    if not ours:
        raise RuntimeError(f"--one-call: {bench.name} has no backend here")
    ncu.one_call(bench, case, ours[-1])
    return 0
