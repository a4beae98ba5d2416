"""The examples run, and their generator moves to where the teacher has its mass."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.parametrize("name", ["plain_pytorch", "accelerate_loop"])
@pytest.mark.slow
def test_the_example_distils(name):
    if name == "accelerate_loop":
        pytest.importorskip("accelerate", reason="accelerate is not installed")
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    before, after = example.main(60)
    assert after < 0.7 * before


def test_every_example_is_tested():
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == ["accelerate_loop", "plain_pytorch"]
