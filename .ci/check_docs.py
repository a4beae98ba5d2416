"""Every relative link in the docs leads to a file, every make target and emd-fast command in them exists, and the
README's Python runs."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> int:
    wrong = [problem for doc in DOCS for problem in problems(doc)]
    print("\n".join(wrong) or f"docs: {len(DOCS)} files, links, commands and the example are right")
    return 1 if wrong else 0


def problems(doc: Path) -> list[str]:
    text = doc.read_text()
    name = doc.relative_to(ROOT)
    found = []
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not link.startswith("http") and not (doc.parent / link).exists():
            found.append(f"{name}: the link {link} leads nowhere")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
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


@functools.cache  # several docs name the same few, and each answer takes an import of PyTorch
def is_command(name: str) -> bool:
    return not subprocess.run([sys.executable, "-m", "emd_fast", name, "--help"], capture_output=True).returncode


if __name__ == "__main__":
    sys.exit(main())
