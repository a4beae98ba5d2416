"""Table of ops and backends in the docs, rendered from the registries of emd_fast.

The table stands between two comments, `<!-- ops-table -->` and `<!-- /ops-table -->`. It depends on the
code alone, never on the hardware or the packages of a machine.

    python .ci/ops_table.py    rewrites the table in every document that has one
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from emd_fast.backends import NAMES, native, reference, triton
from emd_fast.ops.attention import BACKENDS as ATTENTION_BACKENDS

ROOT = Path(__file__).resolve().parents[1]
_TABLE = re.compile(r"(<!-- ops-table -->\n).*?(<!-- /ops-table -->)", re.DOTALL)
_BACKWARD = "_backward"


def table() -> str:
    """Returns the table in Markdown. A cell is "yes" only if the backend has forward and backward."""
    kernels = {
        "reference": frozenset(reference.OPS),
        "cpu": native.OPS,
        "triton": triton.OPS,
        "cuda": native.OPS,
    }
    if set(kernels) != set(NAMES) - {"auto"}:
        raise AssertionError(f"the backends are {', '.join(NAMES)}, the table has {', '.join(kernels)}")
    rows = [["op", "backward kernel", *kernels, "others"]]
    rows.append(["---"] * len(rows[0]))
    for op in (op for op in reference.OPS if not op.endswith(_BACKWARD)):
        backward = op + _BACKWARD if op + _BACKWARD in reference.OPS else None
        needed = {op} | ({backward} if backward else set())
        served = ["yes" if needed <= ops else "-" for ops in kernels.values()]
        others = [name for name in ATTENTION_BACKENDS if name not in kernels] if op == "attention" else []
        rows.append([f"`{op}`", "yes" if backward else "-", *served, ", ".join(others) or "-"])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def documents() -> list[Path]:
    """Returns the documents that contain the table."""
    docs = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [doc for doc in docs if _TABLE.search(doc.read_text())]


def with_table(text: str) -> str:
    """Returns the text with an up-to-date table."""
    return _TABLE.sub(lambda match: match[1] + table() + match[2], text)


def main() -> int:
    for doc in documents():
        doc.write_text(with_table(doc.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
