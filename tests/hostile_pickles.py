"""Pickles of attackers, put together from opcodes, and networks of EDM whose tensors lie."""

import io
import pickle
import struct

import edm_files


def text(value):
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def call(module, name, *arguments):
    """GLOBAL and REDUCE: module.name(*arguments), the arguments being opcodes already."""
    return b"c" + f"{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def stack_call(module, name, *arguments):
    return text(module) + text(name) + b"\x93(" + b"".join(arguments) + b"tR"


def whole(body, protocol=4):
    return b"\x80" + bytes([protocol]) + body + b"."


def as_ema(body):
    """{"ema": body}"""
    return whole(b"}" + text("ema") + body + b"s")


def as_state(body):
    """A network whose state is this: the place where a reader has most reason to go on."""
    meta = b"}(" + text("type") + text("class") + text("class_name") + text("EDMPrecond") + text("version") + b"K\x06"
    meta += text("module_src") + text(edm_files.HOSTILE) + text("state") + body + b"u"
    return as_ema(b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n" + meta + b"\x85R")


def as_arguments(body):
    """A network whose constructor's arguments are this."""
    return as_state(b"}(" + text("_init_args") + b")" + text("_init_kwargs") + body + b"u")


def saved(storage, offset=0, size=(2,), stride=(1,), names=("w",), table="_parameters", arguments=(), kwargs=None):
    """A file with a network that has one tensor under each name."""
    tensor = Call("torch._utils", "_rebuild_tensor_v2", storage, offset, size, stride, False, {})
    module = edm_files.Module("EDMPrecond", *arguments, **(kwargs or {}))
    module.__dict__[table] = dict.fromkeys(names, tensor)
    return dumps(module)


class Call:
    """Pickles as a call of module.name."""

    def __init__(self, module, name, *arguments):
        self.function, self.arguments = Word(module, name), arguments

    def __reduce__(self):
        return self.function, self.arguments


class Word:
    """Pickles as a global."""

    def __init__(self, module, name):
        self.module, self.name = module, name

    def __call__(self):
        raise AssertionError


class Pickler(pickle._Pickler):
    """Python's own, with GLOBAL written for words that name nothing here."""

    def save(self, obj, *arguments, **options):
        if isinstance(obj, Word):
            self.write(b"c" + f"{obj.module}\n{obj.name}\n".encode())
        else:
            super().save(obj, *arguments, **options)


def dumps(network):
    file = io.BytesIO()
    with edm_files.nvlabs_modules():
        Pickler(file, 4).dump({"ema": network})
    return file.getvalue()


def storage(content, kind=("torch", "FloatStorage"), count=None, key="0", **more):
    """What torch.storage._load_from_bytes is given: a file of torch in its old form, with every part for a change."""
    count = len(content) // 4 if count is None else count
    file = io.BytesIO()

    class Old(Pickler):
        def persistent_id(self, obj):
            return more.get("identifier", ("storage", Word(*kind), key, "cpu", count, None)) if obj == "<it>" else None

    pickle.dump(more.get("magic", 0x1950A86A20F9469CFC6C), file, 2)
    pickle.dump(1001, file, 2)
    pickle.dump({"protocol_version": 1001, "little_endian": more.get("little_endian", True)}, file, 2)
    Old(file, 2).dump(more.get("object", "<it>"))
    pickle.dump(more.get("keys", [key]), file, 2)
    file.write(struct.pack("<q", more.get("written", count)) + content)
    return Call("torch.storage", "_load_from_bytes", file.getvalue() + more.get("behind", b""))
