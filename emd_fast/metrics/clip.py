"""CLIP score: how well images fit their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emd_fast.io import models, reading, tensors
from emd_fast.metrics.images import rgb


class ClipScore:
    """CLIP score 100 max(cos(image, text), 0), by a CLIP model of transformers.

    Code in the folder is not run (`trust_remote_code=False`), and `.bin` weights are read by
    torch.load with weights_only=True, which is the default of transformers.

    Args:
        name: a folder with a CLIPModel and its CLIPProcessor, or a model name on the Hugging Face
            hub.
        device: where the model runs.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: there is no such model.

    Source: Hessel et al. (arXiv 2104.08718), with the usual weight of 100 instead of their 2.5.
    """

    def __init__(self, name: str | Path, device: torch.device | str = "cpu") -> None:
        try:
            from transformers import CLIPConfig, CLIPModel, CLIPProcessor
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'the CLIP score needs transformers: `pip install "emd_fast[diffusers]"`', name=error.name
            ) from error
        try:
            if Path(name).is_dir():
                models.check_folder(Path(name), lambda config: CLIPModel(CLIPConfig.from_dict(config)))
                tensors.check(tensors.of_transformers(Path(name)))
            else:
                models.check_config(CLIPConfig.get_config_dict(str(name), trust_remote_code=False)[0])
            with models.silenced():
                loaded: Any = CLIPModel.from_pretrained(
                    str(name), trust_remote_code=False, output_loading_info=True, dtype=torch.float32
                )
                model, found = loaded
                self._processor: Any = CLIPProcessor.from_pretrained(str(name), trust_remote_code=False)
            models.check_loaded(model, found)
        except Exception as error:  # transformers raises exceptions of many kinds
            raise ValueError(f"{name} holds no CLIP model: {reading.reason(error)}") from None
        self._model, self._device = model.to(device).eval(), torch.device(device)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (n,) float64, on the CPU, of images (n, 1 or 3, H, W) uint8. Long prompts are cut off.

        Raises:
            ValueError: the numbers of prompts and images differ.
        """
        if len(images) != len(prompts):
            raise ValueError(f"the CLIP score needs a prompt for each image, got {len(prompts)} for {len(images)}")
        pictures = list(rgb(images).cpu().permute(0, 2, 3, 1).numpy())
        inputs = self._processor(
            text=list(prompts), images=pictures, return_tensors="pt", padding=True, truncation=True
        ).to(self._device)
        output = self._model(**inputs)
        cosine = torch.cosine_similarity(output.image_embeds.double(), output.text_embeds.double())
        return 100 * cosine.clamp(min=0).cpu()
