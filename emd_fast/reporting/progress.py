"""Progress of a phase: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

from emd_fast.distributed import is_main

_LINES = 10  # plain lines in a phase, at most


class Progress:
    """Shows the progress of one phase on stderr.

    Args:
        name: name of the phase.
        total: number of steps.
        done: steps that an earlier part of the run has finished.
    """

    def __init__(self, name: str, total: int, done: int = 0) -> None:
        self.name, self.total, self.done = name, total, done
        self.began = time.monotonic()
        self.first = done
        self.every = max(1, -(-total // _LINES))
        self.bar = (
            tqdm(total=total, initial=done, desc=name, unit="step") if sys.stderr.isatty() and is_main() else None
        )

    def update(self, done: int, text: str = "") -> None:
        """Shows that `done` steps are finished, with `text` beside the number."""
        if self.bar is not None:
            self.bar.update(done - self.done)
            if text:
                self.bar.set_postfix_str(text, refresh=False)
        elif done % self.every == 0 or done == self.total:
            seconds = time.monotonic() - self.began
            left = seconds / max(done - self.first, 1) * (self.total - done)
            say(f"{self.name} {done}/{self.total}  {text}  {seconds:.0f} s, {left:.0f} s left")
        self.done = done

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def summary(row: Mapping[str, float]) -> str:
    """Formats a row of log.jsonl: losses, drift, speed, memory and shares of the time."""
    parts = [
        f"{word} {row[name] * scale:.3g}{unit}"
        for name, word, scale, unit in (
            ("generator_loss", "generator", 1, ""),
            ("fake_score_loss", "fake score", 1, ""),
            ("drift_rms", "drift", 1, ""),
            ("images_per_second", "", 1, " images/s"),
            ("tflops", "", 1, " TFLOP/s"),
            ("mfu", "MFU", 100, "%"),
            ("memory_gib", "", 1, " GiB"),
        )
        if name in row
    ]
    times = [
        f"{word} {row[name]:.0%}"
        for name, word in (("e_step_share", "E"), ("m_step_share", "M"), ("fake_score_share", "F"))
        if name in row
    ]
    return ", ".join(part.strip() for part in [*parts, " ".join(times)] if part)


def say(line: str) -> None:
    """Prints one line to stderr on rank 0. stdout is for results only."""
    if not is_main():
        return
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()
