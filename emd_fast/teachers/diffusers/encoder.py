"""Text encoders of a pipeline: any number of prompts, in batches of a fixed size."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from emd_fast.config import ConfigError
from emd_fast.diffusion import ragged
from emd_fast.diffusion.denoiser import Condition
from emd_fast.io import models, reading
from emd_fast.teachers.diffusers.architectures import Architecture
from emd_fast.teachers.diffusers.architectures.conditions import LENGTH, MASK

BATCH = 32
"""Prompts that the encoders take at once: about 30 MB of activations of the CLIP of Stable Diffusion 1.5."""
_LONGEST = 2**14  # tokens of a prompt; the encoders in use take 77 to 512


class TextEncoder:
    """Encodes prompts with the text encoders of a loaded pipeline.

    Each prompt is padded to the same number of tokens, so the embedding of a prompt depends
    on the other prompts of a batch by the rounding of matrix products at most.

    Args:
        pipeline: a pipeline of diffusers with `encode_prompt`.
        architecture: how its network is called.
        constants: tensors of the condition that do not depend on the prompt, by name.
        device: where its encoders run.
        root: its folder, for errors.

    Attributes:
        dtype: of the floating tensors that it returns, besides the constants; None for that of the encoders.

    Raises:
        ConfigError: a tokenizer that makes more tokens than its encoder takes.
    """

    batch = BATCH
    dtype: torch.dtype | None = None

    def __init__(
        self,
        pipeline: Any,
        architecture: Architecture,
        constants: Mapping[str, Any],
        device: torch.device,
        root: Path,
    ) -> None:
        self._pipeline, self._architecture, self._constants, self._root = pipeline, architecture, constants, root
        self._device = device
        self._options = _options(pipeline, device)
        limit = self._options.get("max_sequence_length")
        self._tokenizers: list[tuple[Any, int]] = []  # with the number of tokens that a prompt may have
        for name, part in pipeline.components.items():
            if name.startswith("text_encoder") and part is not None:
                part.to(device)
                tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"))
                tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # that of a processor
                if "CLIP" in type(part).__name__ or limit is None:
                    makes = getattr(pipeline, "tokenizer_max_length", tokenizer.model_max_length)
                else:
                    makes = limit
                most = getattr(part.config, "max_position_embeddings", _LONGEST)
                if not 2 <= makes <= most:
                    raise ConfigError(
                        f"the tokenizer of {name} in {root} makes {str(makes)[:20]} tokens, the encoder takes {most}: "
                        "correct model_max_length in its tokenizer_config.json"
                    )
                self._tokenizers.append((tokenizer, int(makes)))

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Condition:
        """Returns the conditions that the network takes, (B, ...).

        Raises:
            ConfigError: a prompt that is no text, or an encoder that fails.
        """
        if not prompts:
            raise ConfigError("there is no prompt to encode: give at least one")
        for i, prompt in enumerate(prompts):
            if any("\ud800" <= letter <= "\udfff" for letter in prompt):
                raise ConfigError(f"prompt {i} holds a lone surrogate: give it in UTF-8")
        try:
            with models.silenced():
                starts = range(0, len(prompts), BATCH)
                parts = [self._encoded(list(prompts[start : start + BATCH])) for start in starts]
        except Exception as error:  # tokenizers and encoders raise exceptions of many kinds
            raise ConfigError(f"cannot encode prompts with {self._root}: {reading.reason(error)}") from error
        return pytree.tree_map(lambda *leaves: torch.cat(leaves), *parts) if len(parts) > 1 else parts[0]

    def _encoded(self, prompts: list[str]) -> Condition:
        cond = self._architecture.condition(self._pipeline.encode_prompt(prompt=prompts, **self._options))
        takes = self._architecture.takes.tensors
        if MASK in takes:
            # Of one length for all batches, as the rows of a table are.
            tokens = self._options["max_sequence_length"]
            cond = {
                name: ragged.padded(value, tokens) if LENGTH in takes[name] else value for name, value in cond.items()
            }
        if self.dtype is not None:
            cond = pytree.tree_map(lambda leaf: leaf.to(self.dtype) if leaf.is_floating_point() else leaf, cond)
        if not self._constants:
            return cond
        rows = {name: torch.tensor(row, dtype=torch.float32) for name, row in self._constants.items()}
        n, device = len(prompts), self._device
        return {**cond, **{name: row.to(device).repeat(n, *[1] * row.dim()) for name, row in rows.items()}}

    def truncated(self, prompts: Sequence[str]) -> int:
        """The number of prompts that have more tokens than one of the encoders takes."""
        longer: set[int] = set()
        with models.silenced():
            for tokenizer, limit in self._tokenizers:
                tokens = tokenizer(list(prompts), truncation=False, padding=False).input_ids
                longer |= {i for i, each in enumerate(tokens) if len(each) > limit}
        return len(longer)


def _options(pipeline: Any, device: torch.device) -> dict[str, Any]:
    """Arguments of `encode_prompt` beside the prompts: the defaults of the pipeline's call, which may be others."""
    call = inspect.signature(type(pipeline).__call__).parameters
    options = {}
    for name, parameter in inspect.signature(pipeline.encode_prompt).parameters.items():
        default = call[name].default if name in call else parameter.default
        options[name] = None if default is inspect.Parameter.empty else default
    known = {"device": device, "do_classifier_free_guidance": False}
    return {name: known.get(name, value) for name, value in options.items() if name not in ("prompt", "kwargs")}
