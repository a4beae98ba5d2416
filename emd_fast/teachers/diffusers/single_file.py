"""Weights of a pipeline in one .safetensors file, under the names of its authors or of diffusers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from emd_fast.config import ConfigError
from emd_fast.io import models, reading

# Names of a component's tensors begin so in the files that Stable Diffusion 1 to 3 and XL are published as.
_PREFIXES = {
    "network": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": (
        "cond_stage_model.transformer.",
        "cond_stage_model.model.",
        "conditioner.embedders.0.transformer.",
        "text_encoders.clip_l.transformer.",
    ),
    "text_encoder_2": ("conditioner.embedders.1.model.", "text_encoders.clip_g.transformer."),
    "text_encoder_3": ("text_encoders.t5xxl.transformer.",),
}
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_Tensors = dict[str, Tensor]


class SingleFile:
    """A .safetensors file with the weights of a network, and maybe of its VAE and text encoders.

    Args:
        path: the file. Only its header is read here, and its bytes for the digest.

    Raises:
        ConfigError: no such file, a pickle, or no whole file of safetensors.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        if path.suffix in _PICKLES:
            raise ConfigError(
                f"{path} is a pickle, which can hold code: convert it to .safetensors where you trust it, and give that"
            )
        self.path = path
        try:
            if not path.is_file():  # a fifo would block
                raise OSError("there is no such file" if not path.exists() else "it is not a regular file")
            with open(path, "rb") as file:
                self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            with safe_open(path, framework="pt") as opened:
                self._names: list[str] = list(opened.keys())
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"cannot read the single file {path}: {reading.reason(error)}") from None

    def part(self, component: str) -> Part | None:
        """A component of a pipeline besides its network, or None if the file does not have it."""
        prefix = self._prefix(component)
        return Part(self, component, prefix) if prefix else None

    def network(self) -> Part:
        """The network."""
        return Part(self, "network", self._prefix("network"))

    def names(self, prefix: str) -> list[str]:
        """The names that begin with this prefix; for "" those that begin with none of a component."""
        if prefix:
            return [name for name in self._names if name.startswith(prefix)]
        others = tuple(prefix for part in _PREFIXES.values() for prefix in part)
        return [name for name in self._names if not name.startswith(others)]

    def read(self, names: list[str]) -> _Tensors:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise ValueError(reading.reason(error)) from None

    def _prefix(self, component: str) -> str:
        for prefix in _PREFIXES.get(component, ()):
            if any(name.startswith(prefix) for name in self._names):
                return prefix
        return ""


@dataclass(frozen=True)
class Part:
    """One component of a single file.

    Attributes:
        file: the file.
        component: name of the component in a pipeline.
        prefix: its tensors' names begin so; "" if no other component's do.
    """

    file: SingleFile
    component: str
    prefix: str

    def load(self, kind: Any, config: dict[str, Any], build: Callable[[dict[str, Any]], nn.Module]) -> nn.Module:
        """Returns the component, in float32, with the weights of the file.

        The names are converted by the functions of `from_single_file` of diffusers, unless they are those
        of diffusers already.

        Args:
            kind: its class.
            config: contents of its config.json.
            build: the network of a configuration.

        Raises:
            ValueError: the weights do not fit the configuration; without the path.
        """
        names = self.file.names(self.prefix)
        with torch.device("meta"):
            empty: Any = build(config)
        expected = empty.state_dict()
        if len(names) > 2 * len(expected):  # the conversion takes the square of their number in time
            raise ValueError(f"it has {len(names):,} tensors of it, its config.json describes {len(expected):,}")
        tensors = self.file.read(names)
        # A configuration cannot allocate more than the file has.
        needed, there = (sum(value.numel() for value in some.values()) for some in (expected, tensors))
        if needed > 2 * there:
            raise ValueError(f"its configuration is of {needed:,} parameters, the file has {there:,}")
        unused: list[str] = []
        if 2 * len(tensors.keys() & expected.keys()) <= len(tensors):
            tensors, unused = self._converted(kind, empty.config, tensors, set(expected))
        _share(empty, tensors)
        found = {
            "missing_keys": [name for name in expected if name not in tensors],
            "unexpected_keys": [*(name for name in tensors if name not in expected), *unused],
            "mismatched_keys": [
                (name, tensors[name].shape, value.shape)
                for name, value in expected.items()
                if name in tensors and tensors[name].shape != value.shape
            ],
        }
        models.check_fits(found)
        models.check_finite((name, tensors[name]) for name in expected)
        if whole := [
            name for name in expected if expected[name].is_floating_point() > tensors[name].is_floating_point()
        ]:
            raise ValueError(f"{whole[0][:120]} is {tensors[whole[0]].dtype}: floating-point weights are read")
        model = build(config)
        model.load_state_dict({name: tensors[name] for name in expected})
        return model

    def _converted(self, kind: Any, config: Any, tensors: _Tensors, expected: set[str]) -> tuple[_Tensors, list[str]]:
        """Tensors under the names of diffusers, and the names of those that the conversion did not use."""
        left, is_text = dict(tensors), self.component.startswith("text_encoder")
        try:
            if is_text:
                new = _text_encoder(self.prefix, config, left, expected)
            else:
                new = dict(_network(kind, dict(config), left))
        except KeyError as error:
            raise ValueError(models.told([str(error.args[0])], "missing")) from None
        except Exception as error:  # the conversions of diffusers check nothing
            raise ValueError(f"its names are not those of a {kind.__name__}: {reading.reason(error)}") from None
        new = {name: value for name, value in new.items() if isinstance(value, Tensor)}  # None: a name that is missing
        used = {value.data_ptr() for value in new.values() if value.numel()}
        # Those of text encoders are converted name by name.
        unused = [] if is_text else [name for name, value in left.items() if value.data_ptr() not in used]
        return new, unused


def _share(model: nn.Module, tensors: _Tensors) -> None:
    """Adds the other names of a tensor that a model has under several, as a T5 its embeddings."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in tensors:
            names[id(parameter)] = name
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in tensors and id(parameter) in names:
            tensors[name] = tensors[names[id(parameter)]]


def _network(kind: Any, config: dict[str, Any], tensors: _Tensors) -> Mapping[str, Any]:
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    known: Any = SINGLE_FILE_LOADABLE_CLASSES.get(kind.__name__)
    if known is None:  # diffusers reads other names of no such network
        return tensors
    new: Mapping[str, Any] = known["checkpoint_mapping_fn"](config=config, checkpoint=tensors)
    return new


def _text_encoder(prefix: str, config: Any, tensors: _Tensors, expected: set[str]) -> _Tensors:
    from diffusers.loaders import single_file_utils as convert

    new: _Tensors
    if prefix in ("cond_stage_model.model.", "conditioner.embedders.1.model."):  # of open_clip
        new = convert.convert_open_clip_checkpoint(SimpleNamespace(config=config), tensors, prefix)
    else:
        new = {name.removeprefix(prefix): value for name, value in tensors.items()}
    if "text_projection.weight" in expected and prefix == "text_encoders.clip_l.transformer.":
        new.setdefault("text_projection.weight", torch.eye(config.projection_dim))  # as diffusers does
    if not any(name.startswith("text_model.") for name in expected):  # transformers since 5.6
        new = {name.removeprefix("text_model."): value for name, value in new.items()}
    return new
