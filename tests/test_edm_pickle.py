"""Checkpoints of EDM and EDM2 are read, and nothing in them is run, however they are made."""

import contextlib
import io
import pickle
import pickletools
import struct

import edm_files
import numpy as np
import pytest
import torch
from hostile_pickles import Call, as_arguments, as_ema, as_state, call, dumps, saved, stack_call, storage, text, whole
from watch import watched

from emd_fast.io import pickles
from emd_fast.io.pickles import PickleError
from emd_fast.teachers import edm, edm_pickle


@pytest.fixture
def read(tmp_path):
    """Reads the bytes as a checkpoint, watched; returns what was raised."""

    def of(content):
        path = tmp_path / "file.pkl"
        path.write_bytes(content)
        with watched(), pytest.raises(PickleError) as caught:
            edm_pickle.read_network(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 600 + len(str(path))
        return message

    return of


SHELL = text("touch /tmp/emd_fast_ran")
SOURCE = text("open('/tmp/emd_fast_ran', 'w')")

NAMES = """os.system posix.system nt.system subprocess.Popen builtins.eval builtins.exec __builtin__.eval
builtins.compile builtins.open builtins.__import__ builtins.getattr operator.attrgetter functools.partial pickle.loads
torch.load torch.hub.load copyreg._reconstructor _codecs.decode torch._tensor._rebuild_from_type_v2 numpy.load
logging.config.listen""".split()

# name -> (bytes, what the message says)
CALLS = {
    **{f"{name} by GLOBAL": (as_ema(call(*name.rpartition(".")[::2], SHELL)), name) for name in NAMES},
    **{f"{name} by STACK_GLOBAL": (as_ema(stack_call(*name.rpartition(".")[::2], SOURCE)), name) for name in NAMES},
    "os.system by INST": (as_ema(b"(" + SHELL + b"ios\nsystem\n"), "os.system"),
    "os.system by OBJ": (as_ema(b"(cos\nsystem\n" + SHELL + b"o"), "os.system"),
    "os.system by NEWOBJ": (as_ema(b"cos\nsystem\n" + SHELL + b"\x85\x81"), "os.system"),
    "os.system by NEWOBJ_EX": (as_ema(b"cos\nsystem\n" + SHELL + b"\x85}\x92"), "os.system"),
    "getattr chain": (
        as_ema(call("builtins", "getattr", call("builtins", "__import__", text("os")), text("system"))),
        "builtins.getattr",
    ),
    "dotted": (as_ema(stack_call("torch._utils", "_rebuild_tensor_v2.__globals__", SHELL)), "_tensor_v2.__globals__"),
    "beside the network": (whole(b"}(" + text("x") + call("os", "system", SHELL) + text("ema") + b"Nu"), "os.system"),
    "in the state of a network": (as_state(call("os", "system", SHELL)), "os.system"),
    "a name that is never called": (as_ema(b"cos\nsystem\n"), "os.system"),
    "BUILD": (as_ema(b"ctorch._utils\n_rebuild_tensor_v2\n}" + text("__code__") + SOURCE + b"sb"), "state to a Name"),
    "BUILD on a dict": (as_ema(b"}}" + text("__setstate__") + SOURCE + b"sb"), "state to a dict"),
    "BUILD with slots": (as_ema(b"ctorch._utils\n_rebuild_parameter\nN}" + text("x") + b"Ns\x86b"), "state to a Name"),
    "a string is called": (as_ema(text("system") + SHELL + b"\x85R"), "calls a str"),
    "a tensor is called": (
        as_ema(call("torch_utils.persistence", "_reconstruct_persistent_obj", b"N") + SHELL + b"\x85R"),
        "not described",
    ),
    "a module is called": (as_ema(b"ctorch.nn.modules.container\nModuleDict\n)\x81" + SHELL + b"\x85R"), "calls a"),
    "__setstate__ in a state": (as_state(b"}" + text("__setstate__") + SOURCE + b"s"), "does not say what arguments"),
    "a nested network of hostile source": (as_arguments(as_state(b"N")[2:-1]), "constructor's arguments hold"),
    **{f"EXT{n}": (as_ema(b"\x82\x83\0\x84"[n - 1 : n] + b"\x01" + bytes(n - 1)), f"EXT{n}") for n in (1, 2, 4)},
    "PERSID": (as_ema(b"Pos\n"), "PERSID"),
    "BINPERSID": (as_ema(SHELL + b"Q"), "BINPERSID"),
    "out-of-band buffer": (as_ema(b"\x97"), "NEXT_BUFFER"),
    "protocol 0": (b"(S'ema'\ncos\nsystem\n(S'x'\ntRd.", "not a pickle of EDM"),
    "text opcode": (as_ema(b"S'x'\n"), "STRING"),
}
MALFORMED = {
    "empty": (b"", "empty"),
    "text": (b"hello, world", "not a pickle"),
    "zip": (b"PK\x03\x04" + bytes(64), "zip archive"),
    "one byte": (b"\x80", "byte 0"),
    "no stop": (b"\x80\x04N", "exhausted"),
    "protocol 6": (b"\x80\x06N.", "protocol 6"),
    "protocol 255": (b"\x80\xffN.", "protocol 255"),
    "unknown opcode": (whole(b"\xff"), "unknown"),
    "nothing on the stack": (b"\x80\x04.", "0 values"),
    "two values": (whole(b"NN"), "2 values"),
    "a mark is left": (whole(b"(N"), "damaged"),
    "pop from nothing": (whole(b"\x85"), "byte 2"),
    "tuple without a mark": (whole(b"t"), "byte 2"),
    "reduce without a function": (whole(b")R"), "byte 3"),
    "memo that was never put": (whole(b"h\x07"), "byte 2"),
    "memo bomb": (whole(b"Nr\xff\xff\xff\xff"), "holds something else"),
    "huge string": (whole(b"\x8d" + b"\xff" * 8), "byte count"),
    "huge bytes": (whole(b"\x8e" + struct.pack("<Q", 2**62)), "only 1 remain"),
    "huge bytearray": (whole(b"\x96" + struct.pack("<Q", 2**62)), "only 1 remain"),
    "huge frame": (b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.", "holds something else"),
    "negative length": (whole(b"\x8b" + struct.pack("<i", -5)), "count < 0"),
    "huge number": (as_ema(b"\x8b" + struct.pack("<i", 2**20) + b"\x7f" * 2**20), "8388607 bits"),
    "not UTF-8": (whole(b"X\x02\x00\x00\x00\xff\xfe"), "utf-8"),
    "bytes behind the end": (as_ema(b"N") + b"x", "follow"),
    "a second pickle": (as_ema(b"N") + whole(call("os", "system", SHELL)), "follow"),
    "no entry ema": (whole(b"}" + text("G_ema") + b"Ns"), "'G_ema'"),
    "a list": (whole(b"]"), "something else"),
    "ema is a number": (as_ema(b"K\x01"), "not a network"),
    "a network without a state": (as_state(b"N"), "no attributes"),
    "a network whose state is a list": (as_state(b"]"), "no attributes"),
    "odd items": (whole(b"}(Nu"), "key without a value"),
    "items of a list": (whole(b"](NNu"), "fills a list"),
    "append to a dict": (whole(b"}Na"), "fills a dict"),
    "a list as a key": (whole(b"}]Ns"), "list as a key"),
    "a deep tuple as a key": (whole(b"})" + b"\x85" * 100_000 + b"Ns"), "tuple as a key"),
    "a deep tuple": (as_ema(b")" + b"\x85" * 100_000), "not a network"),
    "deep arguments": (as_arguments(b"]" + b"\x85" * 99_999), "without end"),
    "arguments that hold themselves": (as_arguments(b"}\x94" + text("x") + b"h\x00s"), "without end"),
    "set of a set": (whole(b"\x8f(\x8f\x90"), "set as a key"),
}
ATTACKS = CALLS | MALFORMED


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_is_run_and_the_message_says_why(name, read):
    content, says = ATTACKS[name]
    assert says in read(content)


@pytest.mark.parametrize("name", list(CALLS)[: 2 * len(NAMES) + 4])
def test_the_attacks_are_real(name):
    reached = []

    class Reader(pickle.Unpickler):
        def find_class(self, module, word):
            reached.append(f"{module}.{word}")
            raise pickle.UnpicklingError("enough")

    with pytest.raises(pickle.UnpicklingError):
        Reader(io.BytesIO(CALLS[name][0])).load()
    assert reached == [CALLS[name][1]]


def test_an_extension_that_somebody_registered_is_refused(read):
    import copyreg

    copyreg.add_extension("posix", "system", 77)
    try:
        with contextlib.suppress(TypeError):
            pickle.loads(whole(b"\x82\x4d"))  # fills the cache past which pickle.Unpickler does not ask
        assert "EXT1" in read(as_ema(b"\x82\x4d" + SHELL + b"\x85R"))
    finally:
        copyreg.remove_extension("posix", "system", 77)


FLOATS = np.arange(8, dtype="<f4").tobytes()


def test_storages_are_those_of_torch():
    pickled = pickletools.genops(pickle.dumps(torch.arange(8.0), 4))
    (theirs,) = (argument for _, argument, _ in pickled if isinstance(argument, bytes))
    mine = storage(FLOATS).arguments[0]
    for i in (0, 1, 3, 4):  # all but the facts about the machine, which torch has more of
        assert _opcodes(theirs)[i] == _opcodes(mine)[i]
    assert theirs.endswith(struct.pack("<q", 8) + FLOATS) and mine.endswith(struct.pack("<q", 8) + FLOATS)


def _opcodes(content):
    """The sets of opcodes of the five pickles in an old file of torch."""
    file = io.BytesIO(content)
    return [{op.name for op, _, _ in pickletools.genops(file)} for _ in range(5)]


@pytest.mark.parametrize(
    "offset, size, stride", [(0, (8,), (1,)), (3, (2, 2), (2, 1)), (0, (2, 3), (1, 2)), (0, (), ())]
)
def test_tensors_are_views(tmp_path, offset, size, stride):
    path = tmp_path / "file.pkl"
    path.write_bytes(saved(storage(FLOATS), offset, size, stride))
    with watched():
        found = edm_pickle.read_network(path).tensors["w"]
    assert torch.equal(found, torch.arange(8.0).as_strided(size, stride, offset)) and found.is_contiguous()


VIEWS = {  # of eight numbers: offset, size, stride
    "too short": [(0, (9,), (1,)), (7, (2,), (1,)), (0, (2, 2), (7, 1)), (0, (3, 3), (1, 1))],
    "no saved tensor": [(0, (2**30, 2**30), (0, 0)), (7, (8,), (-1,)), (-1,), (0, (-1,)), (0, (2**70,))],
    "not described": [(0, ("2",)), (0, [2]), (0, (2,), ())],
}
STORAGES = [
    (storage(FLOATS[:-1], count=8), "31 bytes"),
    (storage(FLOATS, behind=b"x"), "33 bytes"),
    (storage(FLOATS, written=7), "8 elements"),
    (storage(b"", count=2**50), "not described"),
    (storage(b"", count=-1), "not described"),
    (storage(FLOATS, ("torch", "LongStorage"), 4), "torch.LongStorage"),
    (storage(FLOATS, ("torch.storage", "UntypedStorage")), "torch.storage.UntypedStorage"),
    (storage(FLOATS, ("os", "system")), "os.system"),
    (storage(FLOATS, object=Call("os", "system", "true")), "os.system"),
    (storage(FLOATS, object=storage(FLOATS)), "torch.storage._load_from_bytes"),
    (storage(FLOATS, object=Call("torch", "FloatStorage", "x")), "called"),
    (storage(FLOATS, object=3), "announces"),
    (storage(FLOATS, identifier=("module", "os", "x")), "not described"),
    (storage(FLOATS, keys=["1"]), "announces"),
    (storage(FLOATS, magic=1), "form in which torch"),
    (storage(FLOATS, little_endian=False), "little-endian"),
    ("storage", "not described"),
    *((Call("torch.storage", "_load_from_bytes", x), "form in which torch") for x in (b"PK\x03\x04", b"sys_info", b"")),
    (Call("torch.storage", "_load_from_bytes", CALLS["os.system by GLOBAL"][0]), "os.system"),
    (Call("torch.storage", "_load_from_bytes", "PK"), "not made of bytes"),
]
BAD_TENSORS = [
    *((saved(storage(FLOATS), *view), says) for says, views in VIEWS.items() for view in views),
    *((saved(held), says) for held, says in STORAGES),
    # Many views of one storage, and a parameter that is text.
    (saved(storage(bytes(40_000)), names=[str(i) for i in range(100)]), "more bytes"),
    (saved("x").replace(b"_rebuild_tensor_v2", b"_rebuild_parameter"), "not a tensor"),
]


@pytest.mark.parametrize(("content", "says"), BAD_TENSORS, ids=range(len(BAD_TENSORS)))
def test_tensors_that_are_none(content, says, read):
    assert says in read(content)


def test_modules_that_are_no_tree(read):
    def refused(modules, buffers=()):
        outer = edm_files.Module("EDMPrecond")
        outer.__dict__ |= {"_modules": modules, "_buffers": dict(buffers)}
        return read(dumps(outer))

    inner = edm_files.Module("Linear")
    assert "not a tree" in refused({"a": inner, "b": inner})
    for _ in range(40):
        inner, child = edm_files.Module("Linear"), inner
        inner.__dict__["_modules"] = {"x": child}
    assert "not a tree" in refused({"a": inner})
    assert "not a module" in refused({"a": 3}) and "not a tensor" in refused({}, {"a": 3})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["ddpmpp", "edm2"])
def test_real_files_are_read_whole(name, protocol, tmp_path):
    wrapper, network, kwargs = edm_files.network_of(name)
    path = tmp_path / "file.pkl"
    path.write_bytes(edm_files.file_of(name, protocol))
    with watched():
        found = edm_pickle.read_network(path)
    assert (found.class_name, found.positional, found.arguments) == (wrapper, [], kwargs)
    prefix = "unet." if wrapper == "Precond" else "model."
    own = {key[len(prefix) :]: value for key, value in found.tensors.items() if key.startswith(prefix)}
    expected = network.state_dict()
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[key], expected[key]) for key in expected)
    others = {key for key in found.tensors if not key.startswith(prefix)}
    assert bool(others) == (wrapper == "Precond")


def test_half_precision_and_positional_arguments(tmp_path):
    _, network, kwargs = edm_files.network_of("edm2")
    first = [kwargs.pop(name) for name in ("img_resolution", "img_channels", "label_dim")]
    network_16 = edm_files.wrapped(network, "Precond", **kwargs).half()
    network_16._init_args = tuple(first)
    path = tmp_path / "file.pkl"
    path.write_bytes(edm_files.dumps_edm2(network_16))
    assert {value.dtype for value in edm_pickle.read_network(path).tensors.values()} == {torch.float16}
    assert edm.load(path).sample_shape == (3, 8, 8)


@pytest.mark.slow
def test_damaged_files_are_refused_or_read_and_nothing_is_run(tmp_path):
    good, path = edm_files.file_of("vp"), tmp_path / "file.pkl"
    generator = np.random.default_rng(0)
    refused = 0
    for trial in range(120):
        content = bytearray(good)
        at = int(generator.integers(len(good)))
        if trial % 4 == 0:
            content = content[:at]
        elif trial % 4 == 1:
            del content[at : at + int(generator.integers(1, 50))]
        else:
            content[at] = int(generator.integers(256))
        path.write_bytes(bytes(content))
        try:
            with watched():
                edm_pickle.read_network(path)
            edm.load(path)
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 45


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_plain_values(protocol):
    values = [None, True, 3, -(2**40), 2**100, 1.5, "ü", b"x", (1, (2, 3), ()), {"a": [1, {"b"}]}]
    for value in [*values, *([bytearray(b"y")] if protocol == 5 else [])]:
        assert pickles.read(io.BytesIO(pickle.dumps(value, protocol)), {"builtins set": set}) == value
