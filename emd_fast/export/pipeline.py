"""Exports a distilled generator as a diffusers pipeline folder or as one safetensors file.

Both hold the network's weights and the coefficients of the generator,

    x = c_skip u + c_out F(c_in u; c_noise),        u = input_scale z,

so that `load` needs neither the teacher nor its schedule.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from emd_fast.diffusion.denoiser import Denoiser
from emd_fast.diffusion.few_step import FewStepGenerator
from emd_fast.diffusion.generator import Generator
from emd_fast.export import card, facts, lora
from emd_fast.export.one_step import Call, Metadata, OneStep
from emd_fast.fusion.fusing import fuse_known
from emd_fast.io.files import write_atomic
from emd_fast.io.models import check_config
from emd_fast.io.reading import read_bytes, reason
from emd_fast.teachers.diffusers import DiffusersDenoiser, architectures
from emd_fast.teachers.diffusers.architectures import ARCHITECTURES, Experts, Network
from emd_fast.teachers.diffusers.folder import EXPORTED, Folder, import_diffusers, read_json
from emd_fast.teachers.mlp import PointGenerator, TimeMLP
from emd_fast.teachers.small_unet import SmallUNet
from emd_fast.train import adapters
from emd_fast.train.trainer import EMDTrainer

_ORIGINS = ("_name_or_path", "name_or_path")  # keys with a path of this machine, which must not be published
_OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")  # pipelines run without them


class NotForStock(UserWarning):
    """Warns that only `load` can read an exported folder, because no diffusers pipeline makes its samples."""


# Writing ----------------------------------------------------------------------------------------------------------


def export(
    trainer: EMDTrainer | str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: Literal["diffusers", "safetensors", "lora"] = "diffusers",
    *,
    ema: bool = True,
    teacher: Denoiser | None = None,
) -> Path:
    """Writes a trainer's generator to disk.

    Args:
        trainer: a trainer, or the path of a checkpoint that `trainer.save` wrote.
        out: path of a file for "safetensors"; of a new or empty folder for the others.
        format: "diffusers" writes the layout of a pipeline, and needs a teacher from a diffusers folder.
            An adapter is merged into the weights, in "safetensors" too. "lora" writes the adapter alone,
            for `load_lora_weights` of the teacher's pipeline.
        ema: whether to export the EMA of the generator's weights or the weights themselves.
        teacher: the teacher of the checkpoint, if `trainer` is a path.

    Returns:
        The path `out`, which `load` reads, except of a LoRA. If no stock diffusers pipeline can make the
        same samples, the folder gets no model_index.json, so that none can make other samples, and a
        NotForStock warning gives the reason.

    Raises:
        ValueError: the format cannot describe the generator, `out` is a folder that is not empty, or
            `trainer` is a path and `teacher` is None.
    """
    if format not in ("diffusers", "safetensors", "lora"):
        raise ValueError(f"format must be 'diffusers', 'safetensors' or 'lora', got {format!r}")
    if not isinstance(trainer, EMDTrainer):
        if teacher is None:
            raise ValueError("a checkpoint holds no teacher: give export() the teacher that it was distilled from")
        trainer = EMDTrainer.resume(Path(trainer), teacher, trains=False)
    generator = trainer.ema.module if ema else trainer.generator
    if format == "lora":
        base_dtype = trainer.config.adapter.base_dtype
        return lora.write(Path(out), generator, trainer.teacher_facts["sha256"], trainer.steps_done, base_dtype)
    generator = adapters.merged(generator)
    metadata = _metadata(trainer, generator, ema)
    if format == "diffusers":
        return _write_folder(Path(out), generator, metadata, trainer.teacher_facts["sha256"])
    return _write_file(Path(out), generator, metadata)


def example(trainer: EMDTrainer, out: str | os.PathLike[str]) -> str:
    """Lines of Python with which diffusers samples an exported folder that has a stock pipeline."""
    from emd_fast.teachers.diffusers import stock

    assert isinstance(trainer.generator, (Generator, FewStepGenerator))
    return stock.example(trainer.generator, str(out))


def _metadata(trainer: EMDTrainer, generator: nn.Module, ema: bool) -> Metadata:
    calls = _calls(generator)
    first = calls[0]._asdict() if calls else dict.fromkeys(Call._fields, 1.0)
    first.pop("alpha")
    first["input_scale"] = first.pop("scale")
    return Metadata(
        **first,
        sample_shape=trainer.sample_shape,
        latent_shape=trainer.latent_shape,
        precision="bfloat16" if trainer.compute_dtype == torch.bfloat16 else "float32",
        dtype=str(next(generator.parameters()).dtype).removeprefix("torch."),
        seed=trainer.config.seed,
        num_classes=trainer.config.num_classes,
        steps=trainer.steps_done,
        ema=ema,
        t_star=generator.t_star if isinstance(generator, (Generator, FewStepGenerator)) else None,
        rungs=calls if len(calls) > 1 else (),
        embedded_guidance=getattr(getattr(generator, "denoiser", None), "embedded_guidance", None),
    )


def _calls(generator: nn.Module) -> list[Call]:
    if isinstance(generator, Generator):
        t = torch.tensor([generator.t_star], dtype=torch.float32)
        c_in, c_noise = (value.item() for value in generator.denoiser.network_inputs(t))
        return [Call(generator.c_skip, generator.c_out, c_in, c_noise, 0.0, generator.input_scale)]
    if isinstance(generator, FewStepGenerator):
        t, alpha, scale, c_skip, c_out = generator.values.unbind()
        columns = (c_skip, c_out, *generator.denoiser.network_inputs(t), alpha, scale)
        return [Call(*call) for call in torch.stack(columns, dim=1).tolist()]
    return []


def _write_folder(out: Path, generator: nn.Module, metadata: Metadata, teacher_hash: str) -> Path:
    from emd_fast.teachers.diffusers import stock

    if not isinstance(generator, (Generator, FewStepGenerator)) or not isinstance(
        generator.denoiser, DiffusersDenoiser
    ):
        raise ValueError("format 'diffusers' needs a teacher from a folder of diffusers; use format='safetensors'")
    facts.check_new(out)
    denoiser = generator.denoiser
    component = denoiser.folder.component
    source = denoiser.folder
    models: dict[str, Any] = {component: denoiser.network.model}
    if isinstance(denoiser.network, Experts):
        models["transformer_2"] = denoiser.network.second
    index = {name: value for name, value in source.index.items() if name not in ("scheduler", *_ORIGINS)}
    index |= {component: ["diffusers", source.model_class], "_diffusers_version": import_diffusers().__version__}
    if "transformer_2" in index and len(models) == 1:
        index |= {"transformer_2": [None, None], "boundary_ratio": None}

    try:
        pipeline, scheduler = stock.pipeline_class(denoiser), stock.scheduler(generator)
        index |= {"_class_name": pipeline, "scheduler": ["diffusers", type(scheduler).__name__]}
    except stock.NoStockPipeline as reason:
        pipeline, scheduler = None, None
        warnings.warn(
            f"{out}: emd_fast.export.load reads it, stock diffusers does not: {reason}",
            NotForStock,
            stacklevel=3,
        )

    # Written beside `out` and renamed, so that an interrupted export leaves no incomplete pipeline.
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        for name, model in models.items():
            model.save_pretrained(unfinished / name)
            config = read_json(unfinished / name / "config.json")
            config = {key: value for key, value in config.items() if key not in _ORIGINS}
            # Pipelines of UNets take the size of their samples from here. A DiT has its own size.
            sides = list(metadata.sample_shape[1:])
            if component == "unet" and config.get("sample_size") not in (sides, sides[0]):
                config["sample_size"] = sides[0] if sides[0] == sides[1] else sides
            _write_json(unfinished / name / "config.json", config)
        for name in index:
            if name in _OPTIONAL and source.has(name) and not (source.root / name).exists():
                index[name] = [None, None]  # many downloads leave it out
            elif name not in (component, "transformer_2", "scheduler") and source.has(name):
                source.copy(name, unfinished / name)
                _forget_origin(unfinished / name)
        if scheduler is not None:
            scheduler.save_pretrained(unfinished / "scheduler")
            _write_json(unfinished / "model_index.json", index)
        elif len(models) > 1:  # the boundary is part of the steps of the schedule
            (unfinished / "scheduler").mkdir()
            _write_json(unfinished / "scheduler" / "scheduler_config.json", denoiser.scheduler_config)
        written = facts.digests_of(unfinished, EXPORTED)
        if scheduler is not None:  # after the digests: people edit a card
            (unfinished / "README.md").write_text(card.of_folder(generator, teacher_hash, metadata.steps))
        told = {"generator": facts.table_of_metadata(metadata), "pipeline": index, "digests": written}
        (unfinished / EXPORTED).write_text(facts.encoded(told, indent=2))
        if out.exists():
            out.rmdir()
        os.replace(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _forget_origin(folder: Path) -> None:
    """Removes the path that a component was once read from out of its configuration files."""
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        if path.exists() and (config := read_json(path)).keys() & set(_ORIGINS):
            _write_json(path, {key: value for key, value in config.items() if key not in _ORIGINS})


def _write_file(out: Path, generator: nn.Module, metadata: Metadata) -> Path:
    from safetensors.torch import save as encoded

    denoiser: Any = generator.denoiser if isinstance(generator, (Generator, FewStepGenerator)) else None
    network: Any = generator if denoiser is None else denoiser.network
    if denoiser is not None and denoiser.has_output and not isinstance(network, Network):
        raise ValueError("this generator's Denoiser has an `output` of its own, which a file cannot hold")
    if isinstance(network, Experts):
        raise ValueError("this generator has two networks, and a file holds one: use format='diffusers'")
    if isinstance(network, Network):
        model: Any = network.model
        described = {
            "class": type(model).__name__,
            "config": {key: value for key, value in model.config.items() if not key.startswith("_")},
        }
    elif type(network).__name__ in _OWN:
        described = {"class": type(network).__name__, "config": _OWN[type(network).__name__][1](network)}
    else:
        raise ValueError(
            f"a {type(network).__name__} cannot be described in a file: {', '.join((*_OWN, *ARCHITECTURES))} can; save "
            "its state_dict instead"
        )
    weights = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    told = {
        "generator": facts.table_of_metadata(metadata),
        "network": described,
        "digests": {"weights": facts.digest_of(weights)},
    }
    whole = encoded(weights, {"emd_fast": facts.encoded(told)})
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, lambda file: file.write(whole))
    return out


def _points(network: Any) -> dict[str, Any]:
    return {
        "dimension": network.last.out_features,
        "width": network.last.in_features,
        "layers": len(network.hidden),
        "seed": 0,  # any value: the file replaces the initial weights
    }


def _small_unet(network: Any) -> dict[str, Any]:
    # Earlier releases read a network without these two.
    patch = {} if network.patch == 1 else {"patch": network.patch}
    null_label = {} if network.null_label is None else {"null_label": network.null_label}
    return {
        "in_channels": network.first.in_channels // network.patch**2,
        "channels": network.first.out_channels,
        "num_classes": network.num_classes - len(null_label),
        **null_label,
        **patch,
        "embedding": network.embedding.out_features,
    }


# This project's networks: name -> (class, function that reads the constructor's arguments from a network).
_OWN: dict[str, tuple[type[nn.Module], Callable[[Any], dict[str, Any]]]] = {
    "SmallUNet": (SmallUNet, _small_unet),
    "TimeMLP": (TimeMLP, _points),
    "PointGenerator": (PointGenerator, _points),
}


# Reading ----------------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str], *, device: torch.device | str = "cpu", fuse: bool = True) -> OneStep:
    """Loads a generator that `export` wrote.

    Args:
        path: the folder or file.
        device: where its weights go.
        fuse: apply `emd_fast.fuse` to the network. If fuse refuses the network, it stays unfused, with a
            warning.

    Raises:
        ValueError: `export` did not write the path, or a later version of it did.
    """
    path = Path(path)
    one_step = _read_folder(path) if path.is_dir() else _read_file(path)
    for parameter in one_step.parameters():
        # Tensors that safetensors maps may be unaligned, which changes the rounding of PyTorch's kernels.
        parameter.data = parameter.data.clone()
    one_step.to(device).eval().requires_grad_(False)
    if fuse:
        try:
            fuse_known(one_step)
        except ValueError as error:
            warnings.warn(f"{path} is not fused: {error}", stacklevel=2)
    return one_step


def _read_folder(path: Path) -> OneStep:
    if not (path / EXPORTED).exists():
        raise ValueError(f"{path} was not written by emd_fast.export: it has no {EXPORTED}")
    try:
        content = read_bytes(path / EXPORTED)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path / EXPORTED}: {reason(error)}") from None
    table = facts.decoded(path / EXPORTED, content, {"pipeline"}, indent=2)
    metadata = facts.metadata(path / EXPORTED, table["generator"])
    facts.check_files(path, table.get("digests", {}), EXPORTED)
    folder = Folder(path)
    return OneStep(folder.load_network(facts.DTYPES[metadata.dtype]), metadata, folder=folder)


def _read_file(path: Path) -> OneStep:
    from safetensors import SafetensorError, safe_open

    try:
        if not path.is_file():  # a fifo would block
            raise OSError("there is no such file" if not path.exists() else "it is not a regular file")
        with safe_open(str(path), "pt") as file:
            header = (file.metadata() or {}).get("emd_fast", "{}")
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    table = facts.decoded(path, header, {"network"})
    metadata = facts.metadata(path, table["generator"])
    if "digests" in table and table["digests"] != {"weights": facts.digest_of(weights)}:
        raise ValueError(f"{path} is damaged: its weights do not have the SHA-256 that the export stated")
    network = _built(path, *facts.network(path, table["network"]), weights).to(facts.DTYPES[metadata.dtype])
    network.load_state_dict(weights)
    return OneStep(network, metadata, whole=isinstance(network, PointGenerator))


def _built(path: Path, name: str, config: dict[str, Any], weights: Mapping[str, Tensor]) -> nn.Module:
    """The network that a file describes, with any weights. It is built without memory first, and compared.

    Raises:
        ValueError: an unknown class, or another architecture than that of the weights.
    """

    def build() -> nn.Module:
        if name in _OWN:
            return _OWN[name][0](**config)
        return architectures.network(getattr(import_diffusers(), name).from_config(config))

    if name not in _OWN and name not in ARCHITECTURES:
        raise ValueError(f"{path} holds a {name[:100]}, which this release cannot build")
    try:
        if name in _OWN:
            facts.check_own(path, config, weights)
        else:
            check_config(config)
        with torch.device("meta"):
            facts.check_shapes(path, build(), weights)
        return build()
    except ModuleNotFoundError:
        raise
    except Exception as error:  # constructors raise exceptions of many kinds
        said = reason(error)
        raise ValueError(said if str(path) in said else f"{path} describes no {name}: {said}") from None
