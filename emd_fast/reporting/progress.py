"""What a person sees while a phase runs: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

from emd_fast.distributed import is_main

_LINES = 10  # plain lines in a phase, at most


class Progress:
    """Progress of one phase of `total` steps."""

    def __init__(self, name: str, total: int, done: int = 0) -> None:
        self.name, self.total, self.done = name, total, done
        self.began = time.monotonic()
        self.first = done
        self.every = max(1, -(-total // _LINES))
        self.bar = (
            tqdm(total=total, initial=done, desc=name, unit="step") if sys.stderr.isatty() and is_main() else None
        )

    def update(self, done: int, text: str = "") -> None:
        """`done` steps are behind us; `text` is what to say beside them (only read where it is shown)."""
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
    """What a row of log.jsonl has of this, in a few words: losses, drift, speed, memory and where the time goes."""
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
    """One line for the person who watches, from the main rank: stderr, so that stdout stays for results."""
    if not is_main():
        return
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()
