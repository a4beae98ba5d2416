"""The lines in docs/export.md that go from a diffusers teacher to a one-step pipeline."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import diffusers_folders as folders
import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.slow
def test_from_a_teacher_to_a_pipeline(tmp_path):
    pytest.importorskip("diffusers")
    lines = re.search(r"```py\n(from diffusers.*?)```", (DOCS / "export.md").read_text(), re.DOTALL)
    assert lines is not None
    to_the_disk = lines[1].partition("pipeline = ")[0].splitlines()
    assert len([line for line in to_the_disk if "DiffusionPipeline" not in line]) <= 10
    folders.dit(tmp_path / "teacher")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(DOCS.parent), os.environ.get("PYTHONPATH", "")])}
    script = lines[1] + "assert image.size == (16, 16)\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "one-step" / "model_index.json").exists()
