"""Prompts: where one ends in a file, which files are refused, and encoding in batches."""

from __future__ import annotations

import json
import os

import diffusers_folders as folders
import pytest
import torch

from emd_fast.config import ConfigError
from emd_fast.tasks import encoded, encoding
from emd_fast.teachers import diffusers as teachers
from emd_fast.train import conditions

READ = {
    "LF": (b"a b\nc\n", ["a b", "c"]),
    "CRLF": (b"a b\r\nc\r\n", ["a b", "c"]),
    "no last end": (b"a b\nc", ["a b", "c"]),
    "empty lines and outer space": (b"\n  a b \t\n\r\n\xc2\xa0\nc\n\n", ["a b", "c"]),
    "a byte order mark": (b"\xef\xbb\xbfa b\nc\n", ["a b", "c"]),
    "a mark and CRLF": (b"\xef\xbb\xbfa b\r\nc\r\n", ["a b", "c"]),
    "two files joined": (b"\xef\xbb\xbfa b\n\xef\xbb\xbfc\n", ["a b", "c"]),
    **{
        f"U+{code:04X} inside": (f"a{chr(code)}b\nc\n".encode(), [f"a{chr(code)}b", "c"])
        for code in (0x0B, 0x0C, 0x1C, 0x1D, 0x1E, 0x85, 0x2028, 0x2029, 0xFEFF)
    },
    "other planes": ("😀\né".encode(), ["😀", "é"]),
}


@pytest.mark.parametrize("name", READ)
def test_a_prompt_ends_at_a_line_end_and_nowhere_else(tmp_path, name):
    content, prompts = READ[name]
    (tmp_path / "p.txt").write_bytes(content)
    assert encoded.lines_of(tmp_path / "p.txt") == prompts


REFUSED = {
    "Latin-1": ("a\nb\ncaf\xe9\n".encode("latin-1"), "line 3 is not UTF-8: save it as UTF-8"),
    "Latin-1 after a mark": (b"\xef\xbb\xbfa\ncaf\xe9\n", "line 2 is not UTF-8"),
    "UTF-16 with a mark": ("a\nb\n".encode("utf-16"), "line 1 is not UTF-8"),
    "UTF-16 without": ("a\nb\n".encode("utf-16-le"), "line 1 has a NUL: save it as UTF-8"),
    "UTF-32": ("a\nb\n".encode("utf-32-be"), "line 1 has a NUL"),
    "a NUL": (b"a\nb\0c\n", "line 2 has a NUL"),
    "a lone surrogate": (b"a\n\xed\xa0\x80\n", "line 2 is not UTF-8"),
    "half a character": (b"a\n\xf0\x9f", "line 2 is not UTF-8"),
    "CR alone": (b"a\n\nb\rc\n", "line 3 has a carriage return inside: end each line with LF or CRLF"),
    "a long line": (b"a\n" + b"b" * 2**17, "line 2 has 131,072 characters, at most 65,536 are read"),
    "nothing": (b"", "there is no prompt"),
    "only space": (b"\xef\xbb\xbf \n\t\r\n", "there is no prompt"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_text_is_refused_with_its_line(tmp_path, name):
    content, said = REFUSED[name]
    (tmp_path / "p.txt").write_bytes(content)
    refused(tmp_path / "p.txt", said)


def refused(path, said):
    with pytest.raises(ConfigError) as error:
        encoded.lines_of(path)
    message = str(error.value)
    assert str(path) in message and said in message and len(message.splitlines()) == 1


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 2**40)
    refused(tmp_path / "fifo", "it is not a regular file")
    refused(tmp_path, "Is a directory")
    refused(tmp_path / "none", "No such file")
    refused(tmp_path / "large", "at most 268,435,456 are read")


# Encoding in batches ----------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


class Encoder:
    """Encodes a prompt as its length. It counts prompts, and may be killed at a call."""

    batch = 4

    def __init__(self, killed_at=None, value=1.0):
        self.prompts, self.calls, self.killed_at, self.value, self.most = 0, 0, killed_at, value, 0

    def __call__(self, prompts):
        if self.calls == self.killed_at:
            raise Killed
        self.calls, self.prompts, self.most = self.calls + 1, self.prompts + len(prompts), max(self.most, len(prompts))
        return torch.tensor([[[self.value * len(prompt)]] for prompt in prompts])

    def truncated(self, prompts):
        return sum(len(prompt) > 7 for prompt in prompts)


LINES = ["x" * (i % 9) for i in range(1, 15)]  # four batches, the last of two
MADE_OF = {"text": "t", "encoder": "e"}


def table_of(path):
    return conditions.Mapped(path)[torch.arange(len(LINES))].flatten().tolist()


def encode(encoder, folder, made_of=MADE_OF, on_step=None):
    return encoding.encode(encoder, LINES, folder, made_of, on_step)


WHOLE = [float(len(line)) for line in LINES]


@pytest.mark.parametrize("killed_at", range(1, 5))
def test_a_killed_encoding_goes_on_where_it_ended(tmp_path, killed_at, capsys):
    with pytest.raises(Killed):
        encode(Encoder(killed_at), tmp_path)
    second, steps = Encoder(), []
    path = encode(second, tmp_path, on_step=lambda *words, **_: steps.append(words[:2]))
    assert second.calls == 1 + 5 - killed_at and steps == [(i, 4) for i in range(killed_at, 5)]
    assert second.most <= 4 and table_of(path) == WHOLE
    err = capsys.readouterr().err
    assert ("are encoded already" in err) == (killed_at > 1)
    cut = sum(len(line) > 7 for line in LINES)
    assert f"{cut} of 14 prompts have more tokens" in err


def damage(change):
    def apply(folder):
        path = folder / encoding.PART
        content = bytearray(path.read_bytes())
        change(content)
        path.write_bytes(content)

    return apply


def turn_last(content):
    content[-5] ^= 1  # the last four bytes are the null condition


DAMAGES = {  # to a finished part, with the prompts that are encoded again, beside the empty one
    "none": (lambda folder: None, 0),
    "a bit of the last row": (damage(turn_last), 2),
    "a header of another table": (damage(lambda content: content.__setitem__(slice(0, 40), b"x" * 40)), 0),
    "rows that are cut off": (damage(lambda content: content.__delitem__(slice(-20, None))), 6),
    "no rows": (lambda folder: (folder / encoding.PART).unlink(), 14),
    "no list": (lambda folder: (folder / encoding.ROWS).unlink(), 14),
    "a torn list": (lambda folder: os.truncate(folder / encoding.ROWS, (folder / encoding.ROWS).stat().st_size - 9), 2),
    "a list that is a link": (lambda folder: link(folder / encoding.ROWS), 14),
    "rows that are a fifo": (lambda folder: ((folder / encoding.PART).unlink(), os.mkfifo(folder / encoding.PART)), 14),
}


def link(path):
    path.unlink()
    path.symlink_to(path.parent / "elsewhere")


@pytest.mark.parametrize("name", DAMAGES)
def test_batches_that_do_not_have_their_checksum_are_encoded_again(tmp_path, name):
    change, again = DAMAGES[name]
    encode(Encoder(), tmp_path)
    change(tmp_path)
    second = Encoder()
    assert table_of(encode(second, tmp_path)) == WHOLE
    assert second.prompts == 1 + again and not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("changed", [{"text": "u", "encoder": "e"}, {"text": "t", "encoder": "f"}])
def test_nothing_is_kept_of_another_text_or_encoder(tmp_path, changed):
    encode(Encoder(value=2.0), tmp_path)
    second = Encoder()
    assert table_of(encode(second, tmp_path, changed)) == WHOLE and second.prompts == 15


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_refused(tmp_path, value):
    with pytest.raises(ValueError, match="the text encoders give NaN or infinite values for prompts from 0 on"):
        encode(Encoder(value=value), tmp_path)


def test_the_table_is_written_in_batches_of_a_bounded_size(tmp_path, monkeypatch):
    sizes = []
    write = conditions.Writer.write
    monkeypatch.setattr(
        conditions.Writer, "write", lambda self, first, cond: (sizes.append(len(cond)), write(self, first, cond))[1]
    )
    encode(Encoder(), tmp_path)
    assert sizes == [4, 4, 4, 2]


needs_text = pytest.mark.skipif(folders.transformers_missing() is not None, reason="transformers is not installed")
PROMPTS = [" ".join("abcdefghijklmnopqrstuvwxyz"[i % 7 : i % 7 + 1 + i % 9]) for i in range(70)]


@needs_text
@pytest.mark.parametrize("make", [folders.stable_diffusion, folders.sd3])
def test_the_embedding_of_a_prompt_does_not_depend_on_its_batch(tmp_path, make, caplog):
    encoder = teachers.load(make(tmp_path / "teacher")).text_encoder()
    long = "a " * 40
    caplog.clear()
    whole = encoder([*PROMPTS, long])
    alone = [encoder([prompt]) for prompt in [*PROMPTS, long]]
    for name in whole if isinstance(whole, dict) else [...]:
        one = torch.cat([each[name] for each in alone])
        torch.testing.assert_close(whole[name], one, rtol=0, atol=1e-6)  # rounding of products of another size
    assert encoder.truncated([*PROMPTS, long, long]) == 2 and not caplog.records


@needs_text
@pytest.mark.parametrize("prompt", ["\ud800", "a\udcffb"])
def test_a_prompt_that_is_no_text(tmp_path, prompt):
    teacher = teachers.load(folders.stable_diffusion(tmp_path / "teacher"))
    with pytest.raises(ValueError, match="prompt 1 holds a lone surrogate: give it in UTF-8"):
        teacher.encode(["a", prompt])
    with pytest.raises(ValueError, match="there is no prompt to encode"):
        teacher.encode([])


@needs_text
@pytest.mark.parametrize("length", [0, 13, 10**9, 10**30, None])
def test_a_tokenizer_that_makes_more_tokens_than_the_encoder_takes(tmp_path, length):
    folder = folders.stable_diffusion(tmp_path / "teacher")
    path = folder / "tokenizer" / "tokenizer_config.json"
    table = json.loads(path.read_text())
    table.pop("model_max_length")
    path.write_text(json.dumps(table if length is None else {**table, "model_max_length": length}))
    with pytest.raises(ValueError, match="the encoder takes 12: correct model_max_length") as error:
        teachers.load(folder).encode(["a"])
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
