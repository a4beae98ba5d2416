"""The text encoder of Flux.2: a Mistral 3, and a processor in place of a tokenizer."""

import dataclasses

import pytest

pytest.importorskip("diffusers")

import architectures
import test_architectures
import text_encoders
import transformers

from emd_fast.teachers import diffusers as teachers

NAME = "Flux2Transformer2DModel"
ROW = dataclasses.replace(architectures.ROWS[NAME], text=lambda: text_encoders.parts(text_encoders.mistral(8)))


@pytest.fixture
def processor(monkeypatch):
    """A processor under the name and the module of that of transformers."""
    monkeypatch.setattr(text_encoders.PixtralProcessor, "__module__", "transformers.models.pixtral.processing_pixtral")
    monkeypatch.setattr(transformers, "PixtralProcessor", text_encoders.PixtralProcessor, raising=False)


def test_prompts_are_encoded_as_by_the_stock_pipeline(tmp_path, processor, monkeypatch):
    monkeypatch.setitem(architectures.ROWS, NAME, ROW)
    test_architectures.test_prompts_are_encoded_as_by_the_stock_pipeline(tmp_path, NAME)


def test_a_processor_without_its_packages_is_refused_with_their_names(tmp_path, processor, monkeypatch):
    test_architectures.pipeline_of(ROW, **ROW.text()).save_pretrained(tmp_path / "teacher")
    teacher = teachers.load(tmp_path / "teacher", **ROW.size)

    class Placeholder:
        _backends = ("torchvision",)

    monkeypatch.setattr(transformers, "PixtralProcessor", Placeholder)
    with pytest.raises(ModuleNotFoundError, match=r"the PixtralProcessor in .* needs torchvision: install it"):
        teacher.encode(["a"])
