"""Teachers from checkpoints of EDM and EDM2 (NVlabs): pickles, or the output of `convert`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emd_fast.config import ConfigError, from_dict
from emd_fast.diffusion.denoiser import Denoiser
from emd_fast.diffusion.schedules import EDM
from emd_fast.io.files import write_atomic
from emd_fast.teachers.edm_networks import DhariwalUNet, EDM2UNet, SongUNet
from emd_fast.teachers.edm_networks.arguments import DhariwalArguments, EDM2Arguments, SongArguments, UNetArguments
from emd_fast.teachers.edm_networks.layers import fir
from emd_fast.teachers.edm_pickle import read_network

_METADATA = "emd_fast.edm"
_FORMAT = 1
# The positional arguments of every wrapper, in order. All others are passed by name.
_POSITIONAL = ("img_resolution", "img_channels", "label_dim", "use_fp16")
# Arguments without effect here: dropout is off, the trainer sets the precision, and the recipe sets
# the range of sigma.
_IDLE = {"use_fp16", "dropout", "label_dropout", "sigma_min", "sigma_max", "epsilon_t", "logvar_channels"}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_NETWORKS: dict[str, tuple[type[UNetArguments], Callable[[Any], nn.Module]]] = {
    "SongUNet": (SongArguments, SongUNet),
    "DhariwalUNet": (DhariwalArguments, DhariwalUNet),
    "UNet": (EDM2Arguments, EDM2UNet),
}


# Names of a checkpoint of latent diffusion, as published in one file.
_LDM = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.")


class EDMError(ConfigError):
    """A file has no usable teacher. The message is one line that names file and reason."""


# Preconditioning: from a network to a Denoiser ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wrapper:
    """A preconditioning class of the checkpoints, which wraps a network.

    Args:
        prefix: prefix of the network's tensors in the state dict.
        network: class of the network, if the arguments do not name one.
        own: arguments of the wrapper itself, with their defaults.
        options: (arguments of the wrapper, channels of an image) -> keyword arguments of Denoiser.
        outputs: output channels per channel of an image.
    """

    prefix: str
    network: str
    own: Mapping[str, float]
    options: Callable[[Mapping[str, Any], int], dict[str, Any]]
    outputs: int = 1


def _edm(own: Mapping[str, Any], channels: int) -> dict[str, Any]:
    return {"parametrization": "edm", "sigma_data": own["sigma_data"]}


def _c_in(t: Tensor) -> Tensor:
    return torch.rsqrt(t**2 + 1)


def _vp(own: Mapping[str, Any], channels: int) -> dict[str, Any]:
    beta_d, beta_min, last = own["beta_d"], own["beta_min"], own["M"] - 1

    def c_noise(t: Tensor) -> Tensor:
        return last * (torch.sqrt(beta_min**2 + 2 * beta_d * torch.log1p(t**2)) - beta_min) / beta_d

    return {"parametrization": "eps", "c_in": _c_in, "c_noise": c_noise}


def _ve(own: Mapping[str, Any], channels: int) -> dict[str, Any]:
    return {"parametrization": "eps", "c_noise": lambda t: torch.log(t / 2), "output": torch.neg}


def _iddpm(own: Mapping[str, Any], channels: int) -> dict[str, Any]:
    return {
        "parametrization": "eps",
        "c_in": _c_in,
        "c_noise": _NearestStep(int(own["M"]), own["C_1"], own["C_2"]),
        "output": lambda returned: returned[:, :channels],  # without the learned variance
    }


class _NearestStep:
    """c_noise of iDDPM: index (B,) float32 of the step whose noise level is nearest to sigma (B,)."""

    def __init__(self, steps: int, c_1: float, c_2: float) -> None:
        self._levels = torch.tensor(_iddpm_levels(steps, c_1, c_2), dtype=torch.float32)
        self._on: dict[torch.device, Tensor] = {}

    def __call__(self, t: Tensor) -> Tensor:
        if t.device not in self._on:
            self._on[t.device] = self._levels.to(t.device)
        levels = self._on[t.device]
        return (len(levels) - 2) - (t[:, None] - levels).abs().argmin(1).float()


def _iddpm_levels(steps: int, c_1: float, c_2: float) -> list[float]:
    """Decreasing noise levels of the chain (Nichol and Dhariwal, arXiv 2102.09672; EDM, table 1)."""

    def alpha_bar(j: int) -> float:
        return math.sin(math.pi / 2 * j / steps / (c_2 + 1)) ** 2

    levels = [0.0]
    for j in range(steps, 0, -1):
        ratio = max(alpha_bar(j - 1) / alpha_bar(j), c_1)
        levels.append(math.sqrt((levels[-1] ** 2 + 1) / ratio - 1))
    return levels[::-1]


_WRAPPERS = {
    "EDMPrecond": _Wrapper("model.", "DhariwalUNet", {"sigma_data": 0.5}, _edm),
    "VPPrecond": _Wrapper("model.", "SongUNet", {"beta_d": 19.9, "beta_min": 0.1, "M": 1000}, _vp),
    "VEPrecond": _Wrapper("model.", "SongUNet", {}, _ve),
    "iDDPMPrecond": _Wrapper("model.", "DhariwalUNet", {"C_1": 0.001, "C_2": 0.008, "M": 1000}, _iddpm, outputs=2),
    "Precond": _Wrapper("unet.", "UNet", {"sigma_data": 0.5}, _edm),
}


# A teacher in a file --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Teacher:
    """Contents of a file: class of the wrapper, its arguments, tensors of the network."""

    wrapper: str
    arguments: dict[str, Any]
    tensors: dict[str, Tensor]


def load(path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Denoiser:
    """Loads a teacher from a checkpoint of EDM or EDM2, as a Denoiser on the schedule EDM.

    Nothing in the file is executed.

    Args:
        path: a pickle of NVlabs, or the output of `convert`. The average of the weights (entry
            "ema") is read.
        device: device of the tensors.
        dtype: dtype of the parameters: float32, bfloat16 or float16. Buffers are float32.

    Returns:
        A Denoiser in eval mode. x_t is (B, C, H, W) with the shape of `sample_shape`: images in
        [-1, 1], or latents of standard deviation 0.5 for EDM2 at 512 pixels. cond is (B,) int64
        labels. None and the label num_classes mean "no label" (`null_cond`). Networks without
        classes take None only.

    Raises:
        EDMError, PickleError: both are ValueErrors. The file is of another kind, its architecture
            is not supported, or its arguments or weights do not match.
        OSError: the file cannot be opened.
        TypeError: another dtype.

    Source: Karras et al. (arXiv 2206.00364, 2312.02696); table 1 of the first for the
        preconditioning.
    """
    if dtype not in _DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    return _denoiser(Path(path), _read(Path(path)), torch.device(device), dtype)


def convert(source: str | Path, target: str | Path) -> str:
    """Converts a checkpoint to safetensors: the network's tensors and a JSON description.

    The tensors keep their dtype.

    Args:
        source: a pickle of NVlabs.
        target: path of the safetensors file.

    Returns:
        A line for messages: wrapper, network, shape of an image, classes, parameters.

    Raises:
        EDMError, PickleError: as for `load`. Nothing is written then.
        OSError: a file cannot be read or written.
    """
    from safetensors.torch import save_file

    teacher = _read(Path(source))
    denoiser = _denoiser(Path(source), teacher, torch.device("cpu"), torch.float32)  # an invalid file writes nothing
    what = {"format": _FORMAT, "class": teacher.wrapper, "arguments": teacher.arguments}
    metadata = {_METADATA: json.dumps(what)}
    write_atomic(Path(target), lambda file: save_file(teacher.tensors, file.name, metadata))
    shape = " x ".join(map(str, denoiser.sample_shape or ()))
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    kind = type(denoiser.network).__name__
    return f"{teacher.wrapper}, {kind}, {shape}, {denoiser.null_cond or 0} classes, {count / 1e6:.1f} M parameters"


def _read(path: Path) -> _Teacher:
    if path.exists() and not path.is_file():  # a fifo would block
        raise EDMError(f"{path} is not a regular file")
    with open(path, "rb") as file:
        head = file.read(9)
    # A safetensors file starts with the length of its header in eight bytes. The header starts with
    # a brace.
    teacher = _read_safetensors(path) if head[8:] == b"{" else _read_pickle(path)
    if teacher.wrapper not in _WRAPPERS:
        raise EDMError(
            f"{path}: the class {teacher.wrapper[:100]!r} is not supported; supported: {', '.join(_WRAPPERS)}"
        )
    return teacher


def _read_pickle(path: Path) -> _Teacher:
    saved = read_network(path)
    named = dict(zip(_POSITIONAL, saved.positional, strict=False))
    if len(saved.positional) > len(_POSITIONAL) or named.keys() & saved.arguments.keys():
        raise EDMError(f"{path}: {saved.class_name!r} was built with {len(saved.positional)} arguments without names")
    arguments = {name: value for name, value in (named | saved.arguments).items() if name not in _IDLE}
    prefix = _WRAPPERS[saved.class_name].prefix if saved.class_name in _WRAPPERS else ""
    tensors = {name[len(prefix) :]: tensor for name, tensor in saved.tensors.items() if name.startswith(prefix)}
    return _Teacher(saved.class_name, arguments, tensors)


def _read_safetensors(path: Path) -> _Teacher:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_METADATA)
            # Copies, because safetensors maps the file, which may change while it is mapped.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()} if text else {}
            others = _others(list(file.keys()), file.metadata() or {})
    except SafetensorError as error:
        raise EDMError(f"{path} is not a whole file of safetensors: {str(error).splitlines()[0]}") from None
    try:
        match json.loads(text or "null"):
            case {"format": int() as version, "class": str() as wrapper, "arguments": dict() as arguments}:
                if version != _FORMAT:
                    raise EDMError(f"{path} has format version {version}, this release reads {_FORMAT}")
                return _Teacher(wrapper, arguments, tensors)
    except (json.JSONDecodeError, RecursionError):
        pass
    raise EDMError(f"{path} {others}")


def _others(names: Sequence[str], metadata: Mapping[str, str]) -> str:
    """What a safetensors file without a description of an EDM network is, and what to give instead."""
    if any(name.startswith(_LDM) for name in names):
        return (
            "is a single-file checkpoint of Stable Diffusion, which does not describe its network: give "
            "--teacher-config FOLDER, a folder of diffusers with its configuration"
        )
    if "emd_fast" in metadata:
        return "is a generator that `emd-fast export` wrote, not a teacher: give the teacher of its run"
    return (
        "does not say what network it holds: give --teacher-config FOLDER with its config.json if it is of diffusers, "
        "or a pickle of NVlabs"
    )


def _denoiser(path: Path, teacher: _Teacher, device: torch.device, dtype: torch.dtype) -> Denoiser:
    wrapper = _WRAPPERS[teacher.wrapper]
    given = dict(teacher.arguments)
    kind = given.pop("model_type", wrapper.network)
    fitting = [name for name in _NETWORKS if (name == "UNet") == (teacher.wrapper == "Precond")]
    if kind not in fitting:
        raise EDMError(
            f"{path}: the network {kind!r:.100} is not supported in {teacher.wrapper}; supported: {', '.join(fitting)}"
        )
    arguments_type, network_type = _NETWORKS[kind]
    try:
        own = {name: _number(name, given.pop(name, default), type(default)) for name, default in wrapper.own.items()}
        channels = given.pop("img_channels")
        given |= {"in_channels": channels, "out_channels": wrapper.outputs * channels}
        arguments = from_dict(arguments_type, given)
        with torch.device("meta"):  # the weights are checked before memory is allocated
            network = network_type(arguments)
        options = wrapper.options(own, arguments.in_channels)
    except KeyError as error:
        raise EDMError(f"{path}: the arguments of {kind} lack {error}") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise EDMError(f"{path}: {kind} cannot be built: {str(error).splitlines()[0]}") from None
    _check_fit(path, kind, network, arguments, teacher.tensors)
    parameters = {name for name, _ in network.named_parameters()}
    weights = {
        name: tensor.to(device, dtype if name in parameters else torch.float32)
        for name, tensor in teacher.tensors.items()
    }
    network.load_state_dict(weights, strict=True, assign=True)
    shape = (arguments.in_channels, arguments.img_resolution, arguments.img_resolution)
    null = arguments.label_dim or None
    denoiser = Denoiser(network, EDM(), sample_shape=shape, null_cond=null, **options)
    denoiser.source = str(path.resolve())
    return denoiser.eval().requires_grad_(True)


def _check_fit(
    path: Path, kind: str, network: nn.Module, arguments: UNetArguments, tensors: Mapping[str, Tensor]
) -> None:
    expected = network.state_dict()
    for what, names in (("lacks", expected.keys() - tensors.keys()), ("has besides", tensors.keys() - expected.keys())):
        if names:
            raise EDMError(f"{path}: the weights do not fit {kind}: the file {what} {_some(names)}")
    taps = getattr(arguments, "resample_filter", [1.0, 1.0])
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or not tensor.is_floating_point():
            raise EDMError(
                f"{path}: the weights do not fit {kind}: {name} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"expected floating-point {tuple(expected[name].shape)}"
            )
        # The arguments select how a filter is applied, so the stored filter must match them.
        if name.endswith("resample_filter") and not torch.allclose(tensor.float(), fir(taps), atol=1e-3):
            raise EDMError(f"{path}: the weights do not fit {kind}: {name} is not the filter {taps}")


def _some(names: Any) -> str:
    first = sorted(names)[:3]
    return ", ".join(map(repr, first)) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _number(name: str, value: Any, kind: type[float]) -> float:
    if type(value) is int or (type(value) is float and kind is float):
        if 0 < value < 1e6:
            return value
    raise ValueError(f"{name} must be a positive {kind.__name__} below 1e6, got {value!r}"[:200])
