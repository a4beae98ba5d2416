"""Reads a diffusers folder: a pipeline with its components, or a single model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emd_fast.config import ConfigError
from emd_fast.io import models, paths, quiet, reading
from emd_fast.teachers.diffusers import architectures, files, text, weights
from emd_fast.teachers.diffusers.architectures import ARCHITECTURES, Architecture, Experts, Network, known
from emd_fast.teachers.diffusers.encoder import TextEncoder
from emd_fast.teachers.diffusers.index import checked, class_of
from emd_fast.teachers.diffusers.latents import check_statistics
from emd_fast.teachers.diffusers.single_file import Part, SingleFile

EXPORTED = "emd_fast.json"  # written by `emd_fast.export`; it lists the components too
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def import_diffusers() -> Any:
    """Imports diffusers.

    Raises:
        ModuleNotFoundError: it is not installed. The message has the command to install it.
    """
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'teachers from diffusers folders need diffusers: `pip install "emd_fast[diffusers]"`', name=error.name
        ) from error
    quiet.import_with_torchao("diffusers.quantizers")
    return diffusers


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = reading.read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {reading.reason(error)}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return value


class NoFolder(ConfigError, FileNotFoundError):
    """There is no such folder here, and no such pipeline on the hub."""


class Folder:
    """Locations of a model, its scheduler and the other components of its pipeline.

    Args:
        name: a pipeline folder (with model_index.json), a model folder (with config.json), or the
            name of a pipeline on the hub, which is downloaded to the cache of diffusers.
        file: has the weights of the network. A VAE and text encoders that it has are used instead of
            those of the folder.

    Raises:
        NoFolder: there is no such folder.
        ConfigError: the folder has no model, or its architecture is not supported.
    """

    def __init__(self, name: str | Path, file: SingleFile | None = None) -> None:
        self.root, self.file = _found(name), file
        self.index: dict[str, Any] = {}  # contents of model_index.json, for a pipeline
        self.boundary_ratio: float | None = None  # of a pipeline of two networks, in the times of its schedule
        if (self.root / "model_index.json").exists():
            self.index = _index(self.root / "model_index.json")
        elif (self.root / EXPORTED).exists():
            self.index = _index(self.root / EXPORTED, "pipeline")
        self.model = next((self.root / part for part in ("unet", "transformer") if self.has(part)), self.root)
        if not (self.model / "config.json").exists():
            raise ConfigError(
                f"{self.root} is no model of diffusers: it has no config.json, no unet/ and no transformer/"
            )
        self.model_class: str = read_json(self.model / "config.json").get("_class_name") or ""
        if not self.model_class:
            raise ConfigError(f"{self.model} is no model of diffusers: its config.json has no _class_name")
        name = self.model_class
        if not isinstance(name, str) or not name.isidentifier() or len(name) > 100:
            raise ConfigError(
                f"{self.model} is no model of diffusers: _class_name in its config.json is "
                f"{reading.shown(name)}, not the name of a class: {', '.join(ARCHITECTURES)} are supported"
            )
        try:
            self.component = known(name).component
        except ConfigError as error:
            raise ConfigError(f"{self.model} holds {error}") from None
        if self.has("transformer_2"):
            self.boundary_ratio = self._boundary_ratio()
        if not self.index and (self.root.parent / "model_index.json").exists():
            self.root = self.root.parent
            self.index = _index(self.root / "model_index.json")
        if self.has("vqvae"):
            raise ConfigError(f"{self.root} has a vqvae, which is not supported: a vae, or none, is")
        self._vae: nn.Module | None = None
        self._architecture: Architecture | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Folder:
        return self  # copies of a teacher share the folder and its VAE

    @property
    def architecture(self) -> Architecture:
        """How the network is called, which `load_network` reads."""
        assert self._architecture is not None
        return self._architecture

    @property
    def pipeline_class(self) -> str | None:
        return self.index.get("_class_name")

    def has(self, component: str) -> bool:
        return isinstance(self.index.get(component), list) and self.index[component][1] is not None

    def in_file(self, component: str) -> Part | None:
        """A component besides the network, if the single file has it."""
        return None if self.file is None else self.file.part(component)

    def copy(self, component: str, target: Path) -> None:
        """Copies the folder of a component. Weights of a variant get the plain name, which stock pipelines read.

        A component that the single file has is written from there. Links may lead into this folder,
        or into the blobs of the hub's cache.

        Raises:
            ValueError: a link that leads elsewhere, or what is no file and no folder.
        """
        if self.in_file(component) is not None:
            part: Any = (
                self.vae()
                if component == "vae"
                else text.load(self.root, self.index, self.architecture, component, self.in_file)
            )
            part.save_pretrained(target)
            return
        roots = [self.root]
        if self.root.resolve().parent.name == "snapshots":
            roots.append(self.root.resolve().parents[1] / "blobs")
        paths.copy_folder(self.root / component, target, tuple(roots))
        if stems := {"vae": files.DIFFUSERS, "text": files.TRANSFORMERS}.get(component.partition("_")[0]):
            files.drop_variant(target, stems)

    @property
    def has_scheduler(self) -> bool:
        return any(path.exists() for path in self._schedulers())

    def _schedulers(self) -> tuple[Path, Path]:
        return self.root / "scheduler" / "scheduler_config.json", self.model / "scheduler_config.json"

    def scheduler_config(self) -> dict[str, Any]:
        for path in self._schedulers():
            if path.exists():
                return read_json(path)
        raise ConfigError(f"{self.root} has no scheduler/scheduler_config.json: give load() a scheduler")

    def load_network(self, dtype: torch.dtype, *, steps: float | None = None, on_meta: bool = False) -> Network:
        """Reads the network, or both networks of a pipeline that has two.

        Args:
            steps: training steps of the schedule, which a boundary is part of. None reads the folder's scheduler.
            on_meta: only its configuration is read, and it has the sizes of weights without memory.

        Raises:
            ConfigError: its weights do not fit, or its configuration is not supported.
        """
        kind = getattr(import_diffusers(), self.model_class)

        def read(folder: Path) -> nn.Module:
            if on_meta:
                return weights.on_meta(kind, folder, dtype)
            return weights.load(kind, folder, dtype, None if self.file is None else self.file.network())

        network = architectures.network(read(self.model))
        if self.boundary_ratio is not None:
            steps = float(self.scheduler_config().get("num_train_timesteps", 1000)) if steps is None else steps
            second = read(self.root / "transformer_2")
            network = Experts(network.model, second, network.architecture, self.boundary_ratio * steps)
        self._architecture = network.architecture
        return network

    def _boundary_ratio(self) -> float:
        """The boundary_ratio of a pipeline of two networks, after checks.

        Raises:
            ConfigError: networks of which one alone is supported, of two configurations, or without a boundary.
        """
        ratio: Any = self.index.get("boundary_ratio")
        both = f"{self.root} has two networks, transformer and transformer_2"
        if not known(self.model_class).experts:
            raise ConfigError(f"{both}: one {self.model_class} alone is supported")
        if self.file is not None:
            raise ConfigError(f"{both}, and {self.file.path} holds one: give the folder without --teacher-config")
        if type(ratio) not in (int, float) or not 0 < ratio < 1:
            raise ConfigError(
                f"{both}, and boundary_ratio = {reading.shown(ratio)}: a number between 0 and 1 is needed"
            )
        configs = [
            {name: value for name, value in read_json(self.root / part / "config.json").items() if name[:1] != "_"}
            for part in ("transformer", "transformer_2")
        ]
        if configs[0] != configs[1]:
            raise ConfigError(f"{both}, of different configurations: two networks of one are supported")
        return float(ratio)

    def vae_config(self) -> dict[str, Any]:
        """Configuration of the VAE; empty without one."""
        path = self.root / "vae" / "config.json"
        return read_json(path) if self.has("vae") and path.exists() else {}

    def vae(self) -> nn.Module:
        """The float32 VAE of the folder, read once.

        Raises:
            ConfigError: its class is not supported, or its weights do not fit.
        """
        if self._vae is None:
            kind = getattr(import_diffusers(), self._class("vae", "diffusers", self.architecture.vaes))
            self._vae = weights.load(kind, self.root / "vae", part=self.in_file("vae")).eval().requires_grad_(False)
        return self._vae

    def check(self, channels: int) -> None:
        """Opens the VAE and looks for the weights of text encoders, which are read after a training.

        Args:
            channels: channels of the network's samples.

        Raises:
            ConfigError: a VAE that cannot be used or has latents of other channels, or a text encoder
                without weights.
        """
        if self.has("vae"):
            config: Any = self.vae().config
            has = self.architecture.vae_channels(config)
            if has != channels:
                raise ConfigError(
                    f"the VAE in {self.root} has {has} latent channels, the network has {channels}: give the VAE of "
                    "this network"
                )
            check_statistics(config, has)
        for name in self.index:
            if name.startswith("text_encoder") and self.has(name):
                if not (self.root / name).is_dir():
                    raise ConfigError(f"{self.root} has no folder {name}, which its model_index.json names: add it")
                if self.in_file(name) is None:
                    files.find(self.root / name, files.TRANSFORMERS)

    def check_text(self) -> None:
        """Whether the folder has text encoders of supported classes, which are read when prompts are encoded.

        Raises:
            ConfigError: it has not.
        """
        if not self.has("text_encoder"):
            raise ConfigError(f"{self.root} has no text encoder: give embeddings instead of prompts")
        text.classes(self.root, self.index, self.architecture)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents to images (B, 3, H, W) or videos (B, 3, F, H, W) float32, about in [-1, 1].

        Without a VAE it returns the latents as float32.
        """
        if not self.has("vae"):
            return latents.float()
        vae: Any = self.vae().to(latents.device)
        return self.architecture.decode(latents.to(vae.dtype), vae).float()

    def text_encoder(
        self, model: nn.Module, shape: Sequence[int], embedded_guidance: float | None = None
    ) -> TextEncoder:
        """Reads the text encoders of the folder's pipeline, onto the device of the model.

        Args:
            shape: shape of a sample.
            embedded_guidance: for networks that take it; None for the default of their pipeline.

        Raises:
            ConfigError: the folder has no text encoder, or one that cannot be read.
        """
        self.check_text()
        constants = self.architecture.constants(shape, self.vae_config(), embedded_guidance)
        return text.read(self.root, self.index, self.architecture, constants, model, self.in_file)

    def _class(self, component: str, library: str, classes: tuple[str, ...]) -> str:
        try:
            return class_of(self.index, component, library, classes)
        except ValueError as error:
            raise ConfigError(f"cannot use the pipeline in {self.root}: {error}") from None


def _index(path: Path, part: str | None = None) -> dict[str, Any]:
    table = read_json(path)
    try:
        return checked(table if part is None else table.get(part, {}))
    except ValueError as error:
        raise ConfigError(f"cannot use {path}: {error}") from None


def _found(name: str | Path) -> Path:
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or not _HUB_NAME.fullmatch(str(name)):
        raise NoFolder(f"{name} is no folder, and not the name of a pipeline on the hub either")
    try:
        pipeline = import_diffusers().DiffusionPipeline
        with models.silenced():
            return Path(pipeline.download(str(name), trust_remote_code=False))
    except (OSError, ValueError, RuntimeError) as error:
        raise NoFolder(
            f"{name} is no folder here, and the hub did not give it: {str(error).splitlines()[0].partition(' (')[0]}"
        ) from error
