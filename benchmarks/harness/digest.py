"""One-line summaries of result files of `emd-fast bench --json` and `benchmarks.train --json`:

python -m benchmarks.harness.digest FILE...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import train
from benchmarks.harness import record
from benchmarks.harness.record import TIMED, WRONG
from emd_fast.config import ConfigError


def lines(done: record.Record) -> list[str]:
    found = []
    for result in done.results:
        parts = []
        for row in result.rows:
            if row.status == TIMED and row.median is not None:
                share = "" if row.share is None else f" {row.share:.0%}"
                parts.append(f"{row.contender.removeprefix('emd_fast ')} {1e3 * row.median:.4g} ms{share}")
            elif row.status == WRONG:
                parts.append(f"{row.contender} WRONG")
        heat = "" if result.bytes is None else ", cold" if result.cold else ", within the cache"
        found.append(f"{result.title}{heat}: {'; '.join(parts)}")
    return found


def main(paths: Sequence[str]) -> int:
    for path in paths:
        try:
            if networks := train.read(Path(path)):
                print("\n".join(one.line() for one in networks))
                continue
            done = record.read(Path(path))
        except ConfigError as error:
            print(error, file=sys.stderr)
            return 2
        ceiling = done.ceiling["bytes_per_second"] / 1e9
        print(f"{done.hardware.get('gpu', done.hardware['cpu'])}, ceiling {ceiling:.0f} GB/s")
        print("\n".join(lines(done)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
