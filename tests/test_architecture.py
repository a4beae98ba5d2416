"""The packages of emd_fast import each other along the arrows of CONTRIBUTING.md, and its map names them all."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "emd_fast"
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
ARROWS = {source: targets.split(", ") for source, targets in re.findall(r"^    (\w+) -> (.*)$", TEXT, re.MULTILINE)}
OPEN_TO_ALL = {"__init__", "__main__", "schedules"}  # the public names, which lead everywhere


def reached(source: str, above: tuple[str, ...] = ()) -> set[str]:
    assert source not in above, f"a circle: {' -> '.join((*above, source))}"
    targets = ARROWS.get(source, [])
    return {*targets}.union(*(reached(target, (*above, source)) for target in targets))


def imported(path: Path) -> set[str]:
    """The packages of emd_fast, and its modules at the top, that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            first, *rest = (node.module or "").split(".")
            if first == "emd_fast":
                found |= {rest[0]} if rest else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("emd_fast.")}
    return found


def test_imports_run_along_the_arrows():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own not in OPEN_TO_ALL:
            wrong += [f"{path}: {name}" for name in sorted(imported(path) - {own} - reached(own))]
    assert not wrong, "imports against the arrows of CONTRIBUTING.md:\n" + "\n".join(wrong)


def test_the_map_names_every_package_and_module_at_the_top():
    packages = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.name for path in PACKAGE.glob("*.py")}
    assert not {name for name in packages | modules if not re.search(rf"(?<![\w/]){re.escape(name)}", TEXT)}
