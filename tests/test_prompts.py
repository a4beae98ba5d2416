"""Files of prompts: where a prompt ends, and which files are refused."""

from __future__ import annotations

import os

import pytest

from emd_fast.config import ConfigError
from emd_fast.tasks import encoded

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
