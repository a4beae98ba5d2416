"""Checks of the documentation.

Every relative link and its anchor exist, every make target and emd-fast command exists, every Python
example runs, and docs/configuration.md and the table of ops and backends are what the code gives.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path

from ops_table import documents, with_table

from emd_fast import config

ROOT = Path(__file__).resolve().parents[1]
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> int:
    wrong = [problem for doc in DOCS for problem in problems(doc)]
    if not documents():
        wrong.append("no document has the table of ops and backends")
    for doc in documents():
        if with_table(doc.read_text()) != doc.read_text():
            wrong.append(f"{doc.relative_to(ROOT)}: the table of ops is out of date: run python .ci/ops_table.py")
    if (ROOT / "docs" / "configuration.md").read_text() != config.markdown():
        wrong.append("docs/configuration.md is out of date: python -m emd_fast.config > docs/configuration.md")
    print("\n".join(wrong) or f"docs: {len(DOCS)} files; links, commands, examples and tables are right")
    return 1 if wrong else 0


def problems(doc: Path) -> list[str]:
    text = doc.read_text()
    name = doc.relative_to(ROOT)
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:|mailto:", link) and (problem := broken(doc, link)):
            found.append(f"{name}: {problem}")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in re.findall(r"^    make (.*?)(?:\s{2,}.*)?(?:#.*)?$", text, re.MULTILINE):
        for target in re.sub(r"'[^']*'|\S+='[^']*'|\S+=\S*", "", line).split():
            if target not in targets:
                found.append(f"{name}: there is no target {target!r} in the Makefile")
    for command in sorted(set(re.findall(r"^    emd-fast (\w+)", text, re.MULTILINE))):
        if not is_command(command):
            found.append(f"{name}: there is no command emd-fast {command}")
    for example in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True)
        if done.returncode:
            found.append(f"{name}: the example fails: {done.stderr.strip().splitlines()[-1]}")
    return found


def broken(doc: Path, link: str) -> str | None:
    """Returns what is wrong with a relative link, or None."""
    path, _, anchor = link.partition("#")
    target = doc.parent / path if path else doc
    if not target.exists():
        return f"the link {link} leads nowhere"
    if anchor and target.suffix == ".md" and anchor not in anchors(target):
        return f"the link {link} names no heading of {target.name}"
    return None


@functools.cache
def anchors(doc: Path) -> frozenset[str]:
    """Returns the anchors that GitHub makes of the headings of a document."""
    text = re.sub(r"^```.*?^```", "", doc.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


@functools.cache  # several docs name the same few, and each answer takes an import of PyTorch
def is_command(name: str) -> bool:
    return not subprocess.run([sys.executable, "-m", "emd_fast", name, "--help"], capture_output=True).returncode


if __name__ == "__main__":
    sys.exit(main())
