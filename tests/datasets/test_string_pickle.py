"""The one kind of pickle that is read, a single string; nothing is ever unpickled."""

from __future__ import annotations

import base64
import pickle
import zlib

import pytest

from megatron_ssft.datasets.string_pickle import decode_payload, read_string_pickle
from megatron_ssft.errors import UserError
from tests.helpers.benchmark_rows import pack


class Hostile:
    """Unpickling it writes the file `ran`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_string_is_read_from_any_pickle_protocol():
    for text in ("", "a", "é\u2028\x00", "x" * 300, "y" * 70_000, "\\u0041\nb"):
        for protocol in range(6):
            assert read_string_pickle(pickle.dumps(text, protocol), "it") == text
    assert decode_payload(pack("[]"), "it") == "[]"


@pytest.mark.parametrize("protocol", range(6))
def test_no_other_pickle_is_read_and_nothing_runs(tmp_path, protocol):
    ran = tmp_path / "ran"
    for value in (
        Hostile(ran),
        ["a"],
        ("a", "a"),
        {"a": "b"},
        b"abc",
        7,
        None,
        True,
        [],
        str,
        print,
        ["a", Hostile(ran)],
    ):
        with pytest.raises(UserError, match="is not read"):
            read_string_pickle(pickle.dumps(value, protocol), "it")
    assert not ran.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"X",
        b"\x80\x04.",
        pickle.dumps("abc")[:-1],
        pickle.dumps("abc") + b".",
        pickle.dumps("abc") + b"cos\nsystem\n(S'true'\ntR.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"cos\nsystem\n\x8c\x04true\x85R.",
        b"\x8c\x02os\x93.",
        b"(\x8c\x01at.",
        b"\x8c\x01a\x8c\x01b.",
        b"\x8c\x01aq\x00h\x00.",
        b"\x8c\x01a0\x8c\x01b.",
        b"S'old'\n.",
        b"\x8c\x01a\x80\x04.",
        b"Pid\n.",
        b"\x82\x01.",
        b"X\xff\xff\xff\x7fabc.",
        b"\x8c\x02\xff\xfe.",
        b"q\x00" * 100 + b"\x8c\x01a.",
        b"\xff\xff",
    ],
)
def test_damaged_and_hand_written_pickles_are_refused(data):
    with pytest.raises(UserError) as caught:
        read_string_pickle(data, "it")
    assert str(caught.value).startswith("it ") and "\n" not in str(caught.value)


def test_payloads_that_are_no_payloads(monkeypatch):
    cut = base64.b64encode(zlib.compress(pickle.dumps("abc"))[:-3]).decode()
    for payload, reason in ((cut, "cut off"), ("!!", "neither JSON"), ("AAAA", "neither JSON"), ("é", "neither JSON")):
        with pytest.raises(UserError, match=reason):
            decode_payload(payload, "it")
    monkeypatch.setattr("megatron_ssft.datasets.string_pickle.MAX_BYTES", 1 << 20)
    with pytest.raises(UserError, match="larger than 1 MiB"):
        decode_payload(pack("x" * (1 << 21)), "it")
