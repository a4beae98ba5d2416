"""What an exported folder keeps of the teacher's folder: its embedded guidance, and no path of a machine."""

import json

import pytest

pytest.importorskip("diffusers")

import architectures
from test_architectures import pipeline_of, trained

from emd_fast.export import export, load
from emd_fast.teachers import diffusers as teachers

FLUX = architectures.ROWS["FluxTransformer2DModel"]


def test_no_path_is_published_and_the_embedded_guidance_is_kept(tmp_path):
    pipeline_of(FLUX).save_pretrained(tmp_path / "teacher")
    for name in ("model_index.json", "vae/config.json", "transformer/config.json"):
        path = tmp_path / "teacher" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "_name_or_path": "/home/me/secret"}))
    teacher = teachers.load(tmp_path / "teacher", **FLUX.size, embedded_guidance=7.0)
    out = export(trained(teacher, FLUX, steps=1), tmp_path / "one-step")
    written = [path for path in out.rglob("*") if path.suffix in (".json", ".md")]
    assert len(written) > 4 and not [path for path in written if "secret" in path.read_text()]
    assert load(out).metadata.embedded_guidance == 7.0
    guided = teachers.load(tmp_path / "teacher", **FLUX.size)
    plain = export(trained(guided, FLUX, steps=1), tmp_path / "plain")
    assert load(plain).metadata.embedded_guidance is None and "embedded" not in (plain / "emd_fast.json").read_text()
