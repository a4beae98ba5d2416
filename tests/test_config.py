import dataclasses
import os
import re
from pathlib import Path

import pytest
import tomli_w
from watch import bounded

from emd_fast import config
from emd_fast.cli import commands
from emd_fast.cli.keys import overrides
from emd_fast.config import ConfigError, EMDConfig, RunConfig, TimeDistribution


@pytest.mark.parametrize("name", config.recipes())
def test_recipes_survive_the_way_through_toml(name, tmp_path):
    settings = config.load(name)
    path = tmp_path / "again.toml"
    path.write_text(tomli_w.dumps(config.to_dict(settings)))
    assert config.load(str(path)) == settings


ABOVE_0 = (
    "log_every save_every keep_checkpoints samples teacher.steps teacher.batch_size teacher.lr teacher.log_sigma_std "
    "teacher.channels mixture.modes mixture.radius mixture.std mixture.generator_width mixture.generator_layers "
    "mixture.fake_score_width mixture.fake_score_layers emd.steps emd.batch_size emd.input_scale emd.max_z_rms "
    "emd.time_distribution.low emd.time_distribution.high emd.time_distribution.std "
    "emd.time_distribution.shift emd.fake_score_time_distribution.shift "
    "emd.fake_score_time_distribution.low emd.fake_score_time_distribution.high emd.fake_score_time_distribution.std "
    "emd.optimizer.generator_lr emd.optimizer.fake_score_lr emd.average.ema_power emd.average.ema_half_life "
    "pretrained.height pretrained.width pretrained.frames fashion.classifier_steps teacher.patch"
)
AT_LEAST_0 = (
    "peak_tflops teacher.warmup emd.num_classes emd.fake_score_warmup emd.max_skipped emd.optimizer.weight_decay "
    "emd.optimizer.lr_warmup emd.optimizer.grad_clip emd.parallelism.shard_group emd.compute.micro_batch_size "
    "evaluation.every pretrained.embedded_guidance"
)
OUTSIDE = {
    **dict.fromkeys(ABOVE_0.split(), (0, -1)),
    **dict.fromkeys(AT_LEAST_0.split(), (-1,)),
    **dict.fromkeys(("teacher.seed", "emd.seed"), (-1, 2**63)),
    **dict.fromkeys(("teacher.ema", "teacher.label_dropout", "emd.average.ema"), (-0.1, 1.0)),
    "emd.langevin_steps": (0, 2**16),
    "emd.gamma_eps": (0.0, 1.0, [[0.1, 0.5], [1.0, 1.0]]),
    "emd.gamma_z": (-0.1, 1.0, [[0.1, 0.5], [1.0, 1.0]]),
    "emd.fake_score_updates": (0,),
    "emd.optimizer.betas": ([0.0, 1.0], [-0.1, 0.9]),
    "emd.optimizer.lr_end": (-0.1, 1.1),
    "emd.adapter.rank": (-1,),
    "emd.adapter.alpha": (0.0,),
    "pretrained.sample_shape": ([3, 0, 8], [-3, 8, 8]),
}


@pytest.mark.parametrize("key", OUTSIDE)
def test_a_value_outside_its_range_is_refused_and_named(key):
    assert OUTSIDE.keys() == {entry.key for table in config.tables() for entry in table.entries if entry.facts.range}
    for value in OUTSIDE[key]:
        with pytest.raises(ConfigError, match=rf"{key.rpartition('.')[2]} must (each )?be (in|above|at least)"):
            config.load("gmm", {key: value})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 1.5}, "steps must be int"),
        ({"steps": True}, "steps must be int"),
        ({"gamma_z": float("nan")}, "gamma_z"),
        ({"gamma_z": [[0.5, 0.01], [0.1, 0.001]]}, "rising"),
        ({"gamma_z": [[0.5, 0.0]]}, "above 0 where it is a table"),
        ({"fake_score_updates": 0}, "nothing learns"),
        ({"sampling": "xz"}, "'x_z'"),
        ({"sampling": "x_z", "cuda_graph": True}, 'cuda_graph must be False or "auto"'),
        ({"cuda_graph": "atuo"}, "cuda_graph must be bool or 'auto', got 'atuo'"),
        ({"cuda_graph": 1}, "cuda_graph must be bool or 'auto', got 1"),
        ({"weighting": "sgima2"}, "did you mean 'sigma2'"),
        ({"betas": [0.0]}, "betas"),
        ({"adapter_networks": "fake_score"}, "adapter_networks must be a list of 'generator' or"),
        ({"adapter_networks": ["student"]}, "adapter_networks must be one of 'generator', 'fake_score'"),
        ({"adapter_networks": []}, "adapter_networks must name generator, fake_score or both"),
        ({"adapter_targets": ["to_q", ""]}, "adapter_targets must be names of layers"),
        ({"compile": True, "fuse": False}, "compile must be False without fuse"),
        ({"optimizer_name": "adam"}, "optimizer_name must be one of 'adamw', 'apex_adamw', 'adamw_8bit'"),
        ({"optimizer": "adamw"}, "optimizer must be a table"),
        ({"optimizer": {"generator_rl": 1}}, "did you mean 'generator_lr'"),
        ({"generator_rl": 1}, "did you mean 'generator_lr'"),
        ({"time_distribution": {"low": 2.0, "high": 1.0}}, "low"),
        ({"time_distribution": {"kidn": "log_normal"}}, "did you mean 'kind'"),
        ({"time_distribution": {"shift": 3.0}}, 'shift must be left out for times of kind "log_uniform", got 3.0'),
    ],
)
def test_a_wrong_value_is_named(changes, said):
    with pytest.raises(ConfigError) as error:
        EMDConfig(**changes)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_keys_of_a_section_are_accepted_flat_and_read_from_it():
    flat = EMDConfig(generator_lr=0.5, optimizer_name="adamw_8bit", ema=0.5, cuda_graph=True, shard_group=2)
    assert (flat.optimizer.generator_lr, flat.optimizer.name, flat.average.ema) == (0.5, "adamw_8bit", 0.5)
    assert flat == EMDConfig(
        optimizer={"generator_lr": 0.5, "name": "adamw_8bit"},
        average=config.AverageConfig(ema=0.1),
        compute={"cuda_graph": True},
        parallelism={"shard_group": 2},
        ema=0.5,  # over the section
    )
    changed = dataclasses.replace(flat, fake_score_lr=0.25, steps=3)
    assert changed.optimizer == dataclasses.replace(flat.optimizer, fake_score_lr=0.25)
    assert (changed.steps, changed.average, changed.compute) == (3, flat.average, flat.compute)
    assert not hasattr(flat, "generator_lr")


@pytest.mark.parametrize(
    ("change", "forbidden"),
    [
        *(({key: 1}, None) for key in ("max_skipped", "micro_batch_size", "shard_group")),
        *(({key: True}, None) for key in ("activation_checkpointing", "compile", "cuda_graph")),
        ({"cuda_graph": "auto"}, None),
        ({"fuse": False, "parallel": "fsdp", "max_z_rms": 5.0, "steps": 9}, None),
        ({"gamma_z": 0.5}, ("gamma_z", 0.02, 0.5)),
        ({"seed": 1, "steps": 9}, ("seed", 0, 1)),
        ({"generator_lr": 0.5}, ("optimizer.generator_lr", 1e-3, 0.5)),
        ({"ema": 0.5}, ("average.ema", 0.99, 0.5)),
        ({"precision": "float32"}, ("compute.precision", "auto", "float32")),
        ({"time_distribution": {"low": 0.1}}, ("time_distribution.low", 0.05, 0.1)),
        ({"time_distribution": {"kind": "karras"}}, ("time_distribution.kind", "log_uniform", "karras")),
    ],
)
def test_resumable_keys_may_change_and_others_may_not(change, forbidden):
    assert config.forbidden_change(EMDConfig(), EMDConfig(**change)) == forbidden


def test_the_last_step_stays_where_the_schedule_ends_and_a_run_may_be_judged_anew():
    ends = EMDConfig(lr_schedule="linear")
    assert config.forbidden_change(ends, dataclasses.replace(ends, steps=9)) == ("steps", 1000, 9)
    run = config.load("gmm")
    judged = config.load("gmm", {"samples": 5, "log_every": 1, "evaluation.every": 3})
    assert config.forbidden_change(run, judged) is None
    assert config.forbidden_change(run, config.load("gmm", {"mixture.std": 0.2})).key == "mixture.std"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[emd]\ngenerator_lr = 1e-3\n", r"'emd\.generator_lr' is a key of \[emd\.optimizer\] now"),
        ("[emd]\nsteps = 3\nprecision = 'float32'\n", r"'emd\.precision' is a key of \[emd\.compute\] now"),
        ("[emd]\nstudent_lr = 1e-3\n", r"'student_lr' is a key of .*'fake_score_lr' of \[emd\.optimizer\] now"),
        ("[mixture]\nstudent_width = 8\n", "'student_width' is a key of .*'fake_score_width' now"),
        ("emd = 3\n", "emd must be a table"),
    ],
)
def test_words_of_an_earlier_release_are_refused_in_one_line(tmp_path, text, said):
    path = tmp_path / "old.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"old\.toml: {said}") as error:
        config.load(str(path), {"emd.seed": 1})
    assert "\n" not in str(error.value)


def test_recipes_keys_and_options_that_are_none_are_named(tmp_path):
    (tmp_path / "mine.toml").write_text("steps = = 3")
    key = r"emd\.langevin_step'.*did you mean 'langevin_steps'"
    for read, said in (
        (lambda: overrides(["--student-updates", "2"]), "did you mean '--fake-score-updates'"),
        (lambda: config.load("gmm", {"emd.langevin_step": 3}), key),
        (lambda: config.load("digit"), "did you mean 'digits'"),
        (lambda: config.load(str(tmp_path / "mine.toml")), r"mine\.toml is not valid TOML"),
        (lambda: config.load(str(tmp_path / "none.toml")), "cannot read the recipe"),
        (lambda: RunConfig(task="digits", emd=EMDConfig(num_classes=0)), "num_classes must be 10"),
    ):
        with pytest.raises(ConfigError, match=said):
            read()


MARK = b"\xef\xbb\xbf"
GOOD = "task = 'gmm'  # \u00e9\n[emd]\nsteps = 7\n"


@pytest.mark.parametrize("content", [GOOD.encode(), MARK + GOOD.encode(), GOOD.replace("\n", "\r\n").encode()])
def test_recipes_are_read_as_utf_8_with_or_without_a_mark(tmp_path, content):
    (tmp_path / "mine.toml").write_bytes(content)
    assert config.load(str(tmp_path / "mine.toml")).emd.steps == 7


HUGE = "0x1" + "0" * 10**4  # as a decimal number it has more digits than Python prints
NO_RECIPES = {
    "UTF-16": (GOOD.encode("utf-16"), "line 1 is not UTF-8: save it as UTF-8"),
    "UTF-16 without a mark": ("task = 'gmm'\n".encode("utf-16-le"), "line 1 has a NUL"),
    "Latin-1": (b"[emd]\n" + GOOD.encode("latin-1"), "line 2 is not UTF-8"),
    "a NUL": (b"[emd]\nsteps = 3\0\n", "line 2 has a NUL"),
    "100 MB of nonsense": (None, "at most 65,536 are read"),
    "nested lists": (b"a = " + b"[" * 10**4, "is not valid TOML: it is nested without end"),
    "nested tables": (b"a = " + b"{a = " * 10**4, "is not valid TOML: it is nested without end"),
    "a long dotted key": (b"a." * 3 * 10**4 + b"a = 1", "line 1 has more than 256 dots"),
    "an integer of 10^4 digits": (b"[emd]\nsteps = " + b"9" * 10**4, "is not valid TOML: Exceeds the limit"),
    "a hexadecimal one": (
        f"[emd]\nsteps = {HUGE}".encode(),
        "steps must be an integer of 64 bits, got int that cannot",
    ),
    "a hexadecimal one as float": (f"[emd]\nmax_z_rms = {HUGE}".encode(), "max_z_rms must be float, got int that can"),
    "a hexadecimal one as word": (
        f"task = {HUGE}".encode(),
        "task must be one of 'digits', 'fashion', 'gmm', 'pretrained', got int",
    ),
    "a hexadecimal one in a list": (f"[emd]\ngamma_z = [{HUGE}]".encode(), "gamma_z must be .* that cannot be printed"),
    "an integer of 65 bits": (b"[emd]\nsteps = 18446744073709551616", "steps must be an integer of 64 bits"),
    "NaN": (b"[emd]\nt_star = nan", "t_star must be float, got nan"),
    "an infinite number": (b"[emd]\nt_star = -inf", "t_star must be float, got -inf"),
    "a number that becomes infinite": (b"[emd]\nt_star = 1e400", "t_star must be float, got inf"),
    "NaN in a list": (b"[emd]\ngamma_z = [[nan, 0.1]]", "gamma_z must be "),
    "a key with a line": (b'"a\\nb" = 1', r"unknown key 'a\\nb'"),
    "a key with a separator of lines": ('"a\u2028b" = 1'.encode(), r"unknown key 'a\\u2028b'"),
    "a long key": (b"a" * 10**4 + b" = 1", r"unknown key 'a{199}\.\.\.;"),
    "a table with a line": (b'[emd."a\\nb"]\nc = 1', r"unknown key 'emd\.a\\nb'"),
    "text with a line": (b'[pretrained]\nteacher = "a\\nb"', "teacher must be text without control characters"),
    "text with a NUL": (b'[pretrained]\nprompts = "a\\u0000b"', "prompts must be text without control characters"),
    "text with a separator": ('[evaluation]\nclip = "a\u2028b"'.encode(), "clip must be text without control char"),
    "a deep value": (b"[emd]\nsteps." + b"a." * 200 + b"a = 1", "steps must be int, got "),
    "a date": (b"[emd]\nsteps = 2000-01-01", "steps must be int, got datetime"),
    "a key twice": (b"[emd]\nsteps = 1\nsteps = 2", "is not valid TOML: Cannot overwrite a value"),
}


def refused(path, said, capsys):
    assert commands.main(["plan", str(path)]) == 2
    err = capsys.readouterr().err.strip()
    assert str(path) in err and re.search(said, err) and len(err.splitlines()) == 1 and len(err) < 2000, err


@pytest.mark.parametrize("name", NO_RECIPES)
def test_a_file_that_is_no_recipe_is_named_in_one_line(tmp_path, name, capsys):
    content, said = NO_RECIPES[name]
    path = tmp_path / "mine.toml"
    path.write_bytes(content or b"")
    if content is None:
        os.truncate(path, 10**8)
    with bounded(64):
        refused(path, said, capsys)


def test_what_is_no_file_is_no_recipe(tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo.toml")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    refused(tmp_path / "fifo.toml", "it is not a regular file", capsys)
    refused(tmp_path / "folder.toml", "Is a directory", capsys)
    refused(tmp_path / "zero.toml", "it is not a regular file", capsys)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed", "9" * 10**4], "seed must be int, got '9"),
        (["--seed", HUGE], "seed must be in [0, 2^63), got int that cannot be printed"),
        (["--gamma-z", "[" * 10**4], "gamma_z must be "),
        (["--seed", "1\n[emd]\nsteps = 3"], "seed must be int, got '1"),
        (["--prompts", "a\udcffb"], "prompts must be text without control characters, in UTF-8"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_have_the_same_rules(words, said, capsys):
    assert commands.main(["plan", "gmm", *words]) == 2
    err = capsys.readouterr().err.strip()
    assert said in err and len(err.splitlines()) == 1 and len(err) < 2000, err


def test_safe_conversions_are_made():
    made = EMDConfig(gamma_z=0, betas=[0, 0.9], time_distribution={"high": 3})
    assert made.gamma_z == 0.0 and isinstance(made.gamma_z, float)
    assert made.optimizer.betas == (0.0, 0.9)
    assert made.time_distribution == TimeDistribution(high=3.0)


def test_every_key_has_help_and_one_short_name_and_the_docs_are_up_to_date():
    entries = [entry for table in config.tables() for entry in table.entries]
    keys = {key for name in config.recipes() for key in config.flatten(config.load(name))}
    assert keys <= {entry.key for entry in entries} and all(entry.facts.help for entry in entries)
    names = [name for entry in entries for name in {entry.key, entry.short}]
    assert len(names) == len(set(names))
    docs = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
    assert docs.read_text() == config.markdown()
