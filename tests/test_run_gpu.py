"""run_gpu.sh, its preflight and the build that it asks for, without a GPU: words, limits, what is missing."""

import dataclasses
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import setuptools
import torch
from test_fashion import written

import benchmarks
from benchmarks import preflight
from benchmarks.harness.contenders import contenders_of
from emd_fast import backends
from emd_fast.cli import commands
from emd_fast.cli.options import parse
from emd_fast.run import fashion_cells

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "run_gpu.sh"
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


def run_gpu(*words, script=SCRIPT, **environment):
    environment = os.environ | {"PYTHON": sys.executable} | environment
    words = ["bash", str(script), *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)


def usage_parts():
    text = SCRIPT.read_text()
    accepted = re.search(r"\n        (info \| build .*?)\) parts\+=", text, re.DOTALL)[1]
    return re.findall(r"[\w-]+", accepted.replace("\\", " "))


@needs_bash
@pytest.mark.parametrize("words", [[], ["folder"], ["folder", "biuld"], ["folder", "build", "everything"]])
def test_a_wrong_word_is_a_usage_error(words, tmp_path):
    done = run_gpu(*[tmp_path / word if word == "folder" else word for word in words])
    assert done.returncode == 2 and "usage: benchmarks/run_gpu.sh FOLDER PART..." in done.stderr
    assert not list(tmp_path.iterdir())


@needs_bash
def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    for name in ("WHEELS", "DATA"):
        done = run_gpu(tmp_path / "out", "info", **{name: str(tmp_path / "none")})
        assert done.returncode == 2 and f"there is no folder {name}=" in done.stderr


@needs_bash
def test_it_says_that_no_gpu_is_here(tmp_path):
    done = run_gpu(tmp_path / "out", "info", "ops", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout
    first, second = done.stderr.splitlines()
    assert first.startswith("run_gpu.sh: no GPU is here: ") and second == "run_gpu.sh: nothing was run"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.log"]


@pytest.fixture
def fake(tmp_path):
    """A Python that is this script."""

    def of(script):
        (tmp_path / "python").write_text(script)
        (tmp_path / "python").chmod(0o755)
        return str(tmp_path / "python")

    return of


@needs_bash
def test_it_goes_on_after_a_part_that_fails_and_ends_with_the_results(tmp_path, fake):
    python = fake(
        """#!/bin/sh
        case "$*" in
            *preflight.py*) echo "unet-sd15: needs diffusers, which is not installed"; exit 1 ;;
            *benchmarks.train*) for file; do :; done; echo "{}" > "$file" ;;
            *digest*) echo "THE TABLE" ;;
            *) exit 3 ;;
        esac
        """,
    )
    out = tmp_path / "out"
    done = run_gpu(out, "build", "train", "unet-sd15", "blocks", PYTHON=python)
    assert done.returncode == 1
    assert "THE BUILD WITH CUDA KERNELS FAILED" in done.stdout
    *_, build, train, unet, convolution, block, table = done.stdout.strip().splitlines()
    assert table == "THE TABLE"
    assert [" ".join(line.split()[:2]) for line in (build, train, unet, convolution, block)] == [
        "build FAILED", "train ok", "unet-sd15 MISSING", "convolution FAILED", "residual_block FAILED",
    ]  # fmt: skip
    assert "=== unet-sd15 ===\nunet-sd15: needs diffusers" in done.stdout
    assert "+ " not in done.stdout.partition("=== unet-sd15 ===")[2].partition("=== convolution")[0]
    assert {path.name for path in out.iterdir()} == {"run.log", "train.json"}
    assert run_gpu(out, "train", PYTHON=python).returncode == 0


@needs_bash
def test_an_extension_that_runs_cuda_kernels_is_kept_and_the_build_is_for_the_chip_that_is_here(tmp_path, fake):
    kept = run_gpu(tmp_path / "out", "build", PYTHON=fake("#!/bin/sh\nexit 0\n"))
    assert kept.returncode == 0 and "nothing is built" in kept.stdout and "setup.py" not in kept.stdout
    python = fake(
        """#!/bin/sh
        case "$*" in
            *use_backend*) exit 1 ;;
            *get_device_capability*) echo 120-real ;;
            *setup.py*) echo "CHIPS $EMD_FAST_CUDA_ARCHITECTURES, $EMD_FAST_BUILD" ;;
        esac
        """
    )
    for asked, got in ({}, "120-real"), ({"EMD_FAST_CUDA_ARCHITECTURES": "80;90"}, "80;90"):
        built = run_gpu(tmp_path / "out", "build", PYTHON=python, **asked)
        assert built.returncode == 0 and f"CHIPS {got}, cuda" in built.stdout


@needs_bash
@pytest.mark.slow
def test_what_is_stopped_can_say_what_it_has(tmp_path, fake):
    python = fake(
        """#!/bin/bash
        [[ "$*" == "-m pytest "* ]] || exit 0
        trap 'kill $!; echo "1 failed, 2 passed"; exit 2' INT
        sleep 60 >/dev/null &
        wait
        """,
    )
    done = run_gpu(tmp_path / "out", "test", "smoke", PYTHON=python, LIMIT="3")
    assert done.returncode == 1
    assert "1 failed, 2 passed" in done.stdout and "stopped after " in done.stdout
    assert "1 failed, 2 passed" in (tmp_path / "out" / "run.log").read_text()
    assert "no time is left for: " in done.stdout, "LIMIT holds for all parts together"


# A study that writes its files, and then does not end.
STUDY = """#!/bin/bash
[[ "$*" == *" study "* ]] || exit 0
echo "DATA $EMD_FAST_FASHION, CACHE $EMD_FAST_CACHE"
out=$(sed 's/.*--out \\([^ ]*\\).*/\\1/' <<<"$*")
mkdir -p "$out"
echo "$*" | tee "$out/study.md" >"$out/study.json"
[[ "$*" == *"$ENDS"* ]] && exit 0
sleep 60 >/dev/null &
trap 'kill $!; exit 130' INT
wait
"""


@pytest.fixture
def checkout(tmp_path):
    """The script in a checkout of its own: the study writes into runs/ of it."""
    (tmp_path / "checkout" / "benchmarks").mkdir(parents=True)
    return shutil.copy(SCRIPT, tmp_path / "checkout" / "benchmarks")


@needs_bash
@pytest.mark.slow
def test_the_study_leaves_its_tables_where_the_time_ends_it(tmp_path, fake, checkout):
    out, python, data = tmp_path / "out", fake(STUDY), tmp_path / "data"
    data.mkdir()
    given = {"script": checkout, "PYTHON": python, "DATA": str(data)}
    stopped = run_gpu(out, "study", LIMIT="2", ENDS="nothing", **given)
    assert stopped.returncode == 1 and "stopped after " in stopped.stdout and "--seeds 2" not in stopped.stdout
    assert (out / "study.md").read_text().endswith("--seeds 1\n") and (out / "study.json").exists()
    assert f"DATA {data}, CACHE runs/gpu-study/cache" in stopped.stdout
    begun = run_gpu(out, "study", LIMIT="2", ENDS="--seeds 1", **given)
    assert begun.returncode == 0 and "stopped after " in begun.stdout, "the second seed may be cut"
    assert (out / "study.md").read_text().endswith("--seeds 2\n")
    assert run_gpu(out, "study", ENDS="--seeds", **given).returncode == 0


@needs_bash
def test_the_words_of_the_study_are_those_of_the_command_line(tmp_path, fake, checkout):
    said = [
        run_gpu(tmp_path / "out", "study", script=checkout, PYTHON=fake(STUDY), ENDS="--seeds", DRY=dry).stdout
        for dry in ("", "1")
    ]
    commands_of = [re.findall(r"^\+ \S+ -m emd_fast (study .*)$", each, re.MULTILINE) for each in said]
    assert [len(each) for each in commands_of] == [2, 1], "a dry run has one seed"
    for words in (each.split() for found in commands_of for each in found):
        options, rest = parse(words)
        settings = commands._settings(options, rest)
        fashion_cells.check(settings)
        assert fashion_cells.chosen(options.cells) == ["a", "b"] and settings.fashion.resolution == 28
        assert settings.emd.compute.precision == "float32"


@needs_bash
def test_all_parts_name_benchmarks_contenders_and_files_that_exist(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    no_gpu = dataclasses.replace(benchmarks.load("attention"), implementations=lambda *_: {"reference": print})
    monkeypatch.setattr("benchmarks.attention.BENCH", no_gpu)
    monkeypatch.setattr(backends, "why_not", lambda *_: None)
    log = tmp_path / "words"
    python = fake(f"""#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]), file=open("{log}", "a"))""")
    parts = [part for part in usage_parts() if part != "sanitize"]
    for full in ("", "1"):
        assert run_gpu(tmp_path / "out", *parts, PYTHON=python, FULL=full).returncode == 0
    benches = []
    for words in map(json.loads, log.read_text().splitlines()):
        if words[:1] == ["benchmarks/preflight.py"]:
            assert words[1:] == parts
        if words[:2] == ["-m", "pytest"]:
            assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
        if words[:3] != ["-m", "emd_fast", "bench"]:
            continue
        benches.append(words[3:])
        for name in words[5:]:
            if name.startswith("--"):
                break
            shapes = [tuple(map(int, words[i + 1].split(","))) for i, word in enumerate(words) if word == "--shape"]
            layout = words[words.index("--layout") + 1] if "--layout" in words else None
            bench = benchmarks.load(name)
            case = bench.cases(shapes or None, None, layout, torch.device("cuda", 0))[0]
            known = {c.name for c in contenders_of(bench, case)[0]}
            assert {words[i + 1] for i, word in enumerate(words) if word == "--skip"} <= known
    whole = [words for words in benches if any(":" in word for word in words)]
    assert [("--no-compile" in words) for words in whole] == [True] * 6 + [True, True, *[False] * 4]
    norms = [words for words in benches if "group_norm" in words]
    assert ["nhwc" in words for words in norms] == [True, True, True, False, True], "NCHW with FULL=1 alone"


def test_the_contenders_that_torch_compile_makes_are_left_out(monkeypatch):
    no_gpu = dataclasses.replace(benchmarks.load("attention"), implementations=lambda *_: {"reference": print})
    monkeypatch.setattr("benchmarks.attention.BENCH", no_gpu)
    left = set()
    for name in benchmarks.NAMES:
        bench = benchmarks.load(name)
        case = bench.cases(None, None, None, torch.device("cuda", 0))[0]
        every, few = ({c.name for c in contenders_of(bench, case, compiled=c)[0]} for c in (True, False))
        left |= every - few
        assert not any(re.search("compile|tuned|autotune", contender) for contender in few), name
        assert not {c for c in bench.compiled if ":" not in c} - every - {"torch.compile"}, name
    assert {"torch.compile", "tuned baseline", "max-autotune", "emd_fast fused, compiled"} <= left


# A machine that has the packages of this environment but not those that a GPU machine lacks.
BARE = """
import sys
for name in ("tomli_w", "diffusers", "tensorboard", "wandb", "liger_kernel", "apex", "xformers", "flash_attn"):
    sys.modules[name] = None
"""


def on_a_bare_machine(tmp_path, *words, more=""):
    (tmp_path / "sitecustomize.py").write_text(BARE + more)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}
    )


def test_a_benchmark_runs_on_a_bare_machine(tmp_path):
    words = ["bench", "normal", "--device", "cpu", "--shape", "2,3", "--rounds", "1", "--warm", "--no-compile"]
    done = on_a_bare_machine(tmp_path, "-m", "emd_fast", *words)
    assert done.returncode == 0 and "emd_fast reference" in done.stdout, done.stderr
    done = on_a_bare_machine(tmp_path, "-m", "emd_fast", "bench", "unet:sd15", "--device", "cpu", "--shape", "1")
    assert done.returncode == 2 and done.stderr == "emd-fast: sd15 needs diffusers (pip install diffusers)\n"


def test_everything_that_a_part_imports_is_importable_on_a_bare_machine(tmp_path):
    own = {name for names in preflight.MODULES.values() for name in names if name.startswith(("benchmarks.", "emd_"))}
    modules = ", ".join(sorted(own | {"emd_fast.run.distill"}))
    done = on_a_bare_machine(tmp_path, "-c", f"import {modules}")
    assert done.returncode == 0, done.stderr


def test_the_preflight_names_what_is_missing(tmp_path, monkeypatch, capsys):
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None if name == "diffusers" else name)
    monkeypatch.setattr(preflight.shutil, "which", lambda name, path: None)
    imported = []
    monkeypatch.setattr(preflight.importlib, "import_module", imported.append)
    monkeypatch.setattr(preflight, "why_no_gpu", lambda: None)
    monkeypatch.setattr(preflight, "ROOT", tmp_path)
    assert preflight.main(["e_step-sd15", "sanitize", "build", "e_step-adm"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "e_step-sd15: needs diffusers, which is not installed",
        "sanitize: needs the program compute-sanitizer, which is not on the PATH",
        "build: needs the program cmake, which is not on the PATH",
        "build: needs the program c++, which is not on the PATH",
    ]
    assert imported == list(preflight.MODULES["e_step-adm"]), "nothing is imported for a part that cannot run"
    imported.clear()
    assert preflight.main(["e_step-sd15", "sanitize"]) == 2 and not imported
    (tmp_path / "emd_fast").mkdir()
    (tmp_path / "emd_fast" / "_C.cpython-312.so").touch()
    assert preflight.main(["build"]) == 0, "an extension that is carried along needs no compiler"
    monkeypatch.setattr(preflight, "why_no_gpu", lambda: "none")
    assert preflight.main(["e_step-adm"]) == 2 and "no GPU is here: none" in capsys.readouterr().out
    monkeypatch.setenv("DRY", "1")
    assert preflight.main(["e_step-adm"]) == 0


def test_the_preflight_reads_the_images_of_the_study(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "why_no_gpu", lambda: None)
    monkeypatch.setattr(preflight.importlib, "import_module", lambda name: None)
    monkeypatch.setenv("EMD_FAST_FASHION", str(written(tmp_path / "data")))
    assert preflight.main(["study"]) == 0 and not capsys.readouterr().out
    (tmp_path / "data" / "t10k-labels-idx1-ubyte").unlink()
    assert preflight.main(["study", "info"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert re.match("study: needs Fashion-MNIST, DATA=FOLDER: .*data has no file t10k-labels-idx1-ubyte", line)


def test_the_preflight_reports_an_import_that_fails(monkeypatch, capsys, tmp_path):
    (tmp_path / "of_another_version.py").write_text("raise RuntimeError('not for\\nthis torch')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(preflight, "why_no_gpu", lambda: None)
    monkeypatch.setitem(preflight.MODULES, "info", ("json", "of_another_version"))
    assert preflight.main(["info", "train"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "info: cannot import of_another_version: RuntimeError: not for this torch"


def test_the_preflight_knows_all_parts_and_keeps_the_profile_of_the_standard_library(tmp_path):
    assert set(preflight.MODULES) == set(usage_parts())
    # PyTorch's profiler and others import `profile` through cProfile.
    more = "import atexit\natexit.register(lambda: print('PROFILE', __import__('profile').__file__))"
    done = on_a_bare_machine(tmp_path, str(ROOT / "benchmarks" / "preflight.py"), "info", more=more)
    assert "Traceback" not in done.stdout + done.stderr and "cannot import" not in done.stdout
    (found,) = re.findall("^PROFILE (.*)$", done.stdout, re.MULTILINE)
    assert not Path(found).is_relative_to(ROOT / "benchmarks")


def test_the_files_that_need_a_gpu_are_found():
    skips = [path.name for path in (ROOT / "tests").glob("test_*.py") if skips_itself(path)]
    assert "test_cuda.py" in skips
    for path in (ROOT / "tests").glob("test_*.py"):
        if re.search(r"^if not torch\.cuda\.is_available\(\):", path.read_text(), re.MULTILINE):
            assert path.name in skips, "the line that run_gpu.sh looks for"


def skips_itself(path):
    return '\n    pytest.skip("no GPU", allow_module_level=True)' in path.read_text()


def test_the_cuda_kernels_are_built_for_the_chips_that_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho release 13.0, V13.0.88\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    build = types.SimpleNamespace(**runpy.run_path("setup.py"))
    folders = []

    def compile_extension(source, folder, output, settings):
        folders.append((folder.name.partition("-torch")[2], settings.get("CMAKE_CUDA_ARCHITECTURES")))

    monkeypatch.setitem(build.build_kernels.__globals__, "compile_extension", compile_extension)
    for chips in ("", "90-real", "80-real;120"):
        monkeypatch.setenv("EMD_FAST_CUDA_ARCHITECTURES", chips)
        assert build.build_kernels("cuda", tmp_path / "_C.so")["cuda_reason"] is None
    version = str(torch.__version__)
    names = {"-cuda": None, "-cuda-90-real": "90-real", "-cuda-80-real-120": "80-real;120"}
    assert folders == [(version + name, chips) for name, chips in names.items()]
