"""Checkpoints as EDM and EDM2 write them, made without their code; the source that they embed must never run."""

import contextlib
import pickle
import sys
import types
import zlib

import numpy as np
import torch
from torch import nn

from emd_fast import Noise, ops
from emd_fast.teachers.edm_networks import DhariwalUNet, EDM2UNet, SongUNet
from emd_fast.teachers.edm_networks.arguments import DhariwalArguments, EDM2Arguments, SongArguments

HOSTILE = "import os\nos.system('true')\nopen('/tmp/emd_fast_ran', 'w')\nraise SystemExit('it ran')\n" + 99 * "# long\n"


def _reconstruct_persistent_obj(meta):
    raise AssertionError("a file of the tests was unpickled")


class EasyDict(dict):
    """A dict of dnnlib.util."""


@contextlib.contextmanager
def nvlabs_modules():
    """Inside, what pickle looks up by the names of NVlabs' modules is found."""
    names = {"torch_utils.persistence": _reconstruct_persistent_obj, "dnnlib.util": EasyDict}
    before = {name: sys.modules.get(name) for name in (*names, "torch_utils", "dnnlib")}
    for name, thing in names.items():
        module = types.ModuleType(name)
        setattr(module, thing.__name__, thing)
        sys.modules[name.partition(".")[0]] = types.ModuleType(name.partition(".")[0])
        sys.modules[name] = module
        thing.__module__ = name
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def persistent(class_name, state):
    """What pickle.Pickler makes of an object of a decorated class."""
    meta = {"type": "class", "version": 6, "module_src": HOSTILE, "class_name": class_name, "state": state}
    return _reconstruct_persistent_obj, (meta,), None


class Plain:
    """An object of a decorated class that is no module: a loss, an encoder."""

    def __init__(self, class_name, **state):
        self.class_name, self.state = class_name, {**state, "_init_args": (), "_init_kwargs": {}}

    def __reduce__(self):
        return persistent(self.class_name, self.state)


class Module(nn.Module):
    """A module of a decorated class."""

    def __init__(self, class_name, *args, **kwargs):
        super().__init__()
        self.class_name, self._init_args, self._init_kwargs = class_name, args, kwargs
        self.skip_scale, self.eps = np.sqrt(0.5), 1e-6  # a number of numpy, as blocks of SongUNet have it

    def __reduce__(self):
        state = dict(self.__dict__)
        return persistent(state.pop("class_name"), state)


def as_saved(network, class_name=None, **kwargs):
    """The network as the classes of the checkpoints would hold it."""
    kept = isinstance(network, nn.ModuleDict)
    saved = (
        nn.ModuleDict() if kept else Module(class_name or type(network).__name__, init_weight=np.sqrt(0.2), **kwargs)
    )
    for name, value in network.named_parameters(recurse=False):
        saved.register_parameter(name, nn.Parameter(value.detach().clone(), requires_grad=False))
    for name, value in network.named_buffers(recurse=False):
        saved.register_buffer(name, value)
    for name, child in network.named_children():
        saved.add_module(name, as_saved(child))
    return saved.eval()


def wrapped(network, wrapper, **kwargs):
    """The network in EDMPrecond or one of the others, with the arguments that the wrapper was built with."""
    saved = Module(wrapper, **kwargs)
    if wrapper == "Precond":
        saved.add_module("unet", as_saved(network, "UNet"))
        saved.add_module("logvar_fourier", as_saved(nn.Linear(1, 2), "MPFourier"))
        saved.add_module("logvar_linear", as_saved(nn.Linear(2, 1, bias=False), "MPConv"))
    else:
        saved.add_module("model", as_saved(network))
    return saved.eval()


def dumps(ema, protocol=4, **others):
    """The whole file of EDM, the entries beside the network included."""
    loss = Plain("EDMLoss", P_mean=-1.2, P_std=1.2)
    augment = Module("AugmentPipe", p=0.12)
    augment.register_buffer("Hz_fbank", torch.ones(2, 3))
    data = {"ema": ema, "loss_fn": loss, "augment_pipe": augment, "dataset_kwargs": {"path": "x.zip"}, **others}
    with nvlabs_modules():
        return pickle.dumps(data, protocol)


def dumps_edm2(ema, protocol=4):
    """The whole file of EDM2."""
    scale = np.float32(0.5) / np.float32([4.17, 4.62, 3.71, 3.28])
    encoder = Plain("StabilityVAEEncoder", vae_name="x", scale=scale, bias=-scale, batch_size=8, _vae=None)
    with nvlabs_modules():
        data = EasyDict(encoder=encoder, dataset_kwargs=EasyDict(class_name="x"), loss_fn=Plain("EDM2Loss"))
        data["ema"] = ema
        return pickle.dumps(data, protocol)


TINY = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "model_channels": 16, "channel_mult": [1, 2]}
TINY |= {"num_blocks": 1, "attn_resolutions": [4]}
FIR = {"resample_filter": [1, 3, 3, 1]}
NCSNPP = {"embedding_type": "fourier", "channel_mult_noise": 2, **FIR}
OTHER = {"concat_balance": 0.4, "res_balance": 0.2, "attn_balance": 0.6, "clip_act": 0.5, "channel_mult_emb": 3, **FIR}

# name -> wrapper, class of the network, its arguments besides TINY
NETWORKS = {
    "ddpmpp": ("EDMPrecond", SongUNet, {"label_dim": 5, "augment_dim": 9}),
    "ncsnpp": ("EDMPrecond", SongUNet, {"encoder_type": "residual", **NCSNPP}),
    "skips": ("EDMPrecond", SongUNet, {"label_dim": 2, "encoder_type": "skip", "decoder_type": "skip", **FIR}),
    "residual_box": ("EDMPrecond", SongUNet, {"encoder_type": "residual", "decoder_type": "skip"}),
    "adm": ("EDMPrecond", DhariwalUNet, {"label_dim": 5, "augment_dim": 9, "model_channels": 64}),
    "vp": ("VPPrecond", SongUNet, {}),
    "ve": ("VEPrecond", SongUNet, {}),
    "iddpm": ("iDDPMPrecond", DhariwalUNet, {"label_dim": 5, "out_channels": 6}),
    "edm2": ("Precond", EDM2UNet, {"label_dim": 5, "channels_per_head": 8}),
    "edm2_other": ("Precond", EDM2UNet, {"channels_per_head": 8, "channel_mult_noise": 2, **OTHER}),
}
_ARGUMENTS = {SongUNet: SongArguments, DhariwalUNet: DhariwalArguments, EDM2UNet: EDM2Arguments}


def network_of(name):
    """(wrapper, network with every weight random, arguments as the wrapper's constructor took them)."""
    wrapper, kind, more = NETWORKS[name]
    arguments = {**TINY, **more}
    network = fill(kind(_ARGUMENTS[kind](**arguments))).eval()
    kwargs = {key: value for key, value in arguments.items() if key not in ("in_channels", "out_channels")}
    kwargs["img_channels"] = 3
    if wrapper != "Precond":
        kwargs |= {"model_type": kind.__name__, "dropout": 0.13}
    return wrapper, network, {**kwargs, "use_fp16": True}


def file_of(name, protocol=4):
    """The bytes of a checkpoint with that network."""
    wrapper, network, kwargs = network_of(name)
    return (dumps_edm2 if wrapper == "Precond" else dumps)(wrapped(network, wrapper, **kwargs), protocol)


@torch.no_grad()
def fill(network):
    """Every tensor but the FIR filters from the noise contract, by its name: the same on every machine."""
    for name, value in network.state_dict().items():
        if name.endswith("resample_filter"):
            continue
        noise = Noise(zlib.crc32(name.encode()))
        drawn = ops.normal(tuple(value.shape) or (1,), noise, stream=13).reshape(value.shape)
        if value.dim() == 0:
            drawn = 0.5 + 0.2 * drawn
        elif "freqs" in name or "phases" in name:
            drawn = 2 * drawn
        elif "norm" in name and name.endswith("weight"):
            drawn = 1 + 0.2 * drawn
        elif value.dim() > 1:
            drawn = drawn / value[0].numel() ** 0.5
        else:
            drawn = 0.2 * drawn
        value.copy_(drawn)
    return network


def image(batch=2):
    """(x_t, sigma, labels): an input that everybody can compute."""
    sigma = torch.tensor([0.3, 7.0, 0.05, 40.0])[:batch]
    waves = torch.sin(torch.arange(batch * 3 * 64, dtype=torch.float64) * 0.37).float().reshape(batch, 3, 8, 8)
    return waves * sigma[:, None, None, None], sigma, torch.arange(batch) % 2
