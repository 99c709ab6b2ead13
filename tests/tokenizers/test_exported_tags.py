"""forking_tokens.json of an export: written, read back, refused where it is damaged."""

from __future__ import annotations

import json

import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.tokenizers.exported_tags import read_forking_tokens
from tests.helpers.hf_folders import edit
from tests.helpers.scratch_folders import scratch


@pytest.mark.parametrize("format", ["special", "text"])
def test_an_export_says_what_its_tags_are(tmp_path, format):
    _, tags, _ = scratch(tmp_path, format=format)
    assert read_forking_tokens(tmp_path / "export") == tags
    data = json.loads((tmp_path / "export" / "forking_tokens.json").read_text())
    assert data == {"format": format, "strings": list(tags.strings), "ids": [list(ids) for ids in tags.ids]}
    assert not (tmp_path / "hf" / "forking_tokens.json").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda d: d.pop("format"), '\'format\' is missing, it must be "special" or "text"'),
        (lambda d: d.update(strings=[]), "'strings' must be a list of texts"),
        (lambda d: d.update(strings="<think1>"), "'strings' must be a list of texts"),
        (lambda d: d["strings"].pop(), '"strings" has 5 entries and "ids" 6'),
        (lambda d: d.update(ids=[257, 258]), "'ids' must be a list of lists"),
        (lambda d: d["ids"].__setitem__(0, []), "'ids' must be a list of lists"),
        (lambda d: d["ids"].__setitem__(0, [True]), "'ids' must be a list of lists"),
        (lambda d: d["ids"].__setitem__(0, [60, 61]), "exactly one id"),
        (lambda d: d["ids"].__setitem__(0, [258]), "two tags are the same"),
        (lambda d: d["ids"].reverse(), r"the tag '<think1>' has ids \[262\] there and \[257\] in the folder's"),
        (lambda d: d["strings"].__setitem__(5, "<think7>"), r"the tag '<think7>' has ids \[262\] there and \[60, "),
    ],
)
def test_damaged_forking_tokens_are_refused(tmp_path, change, problem):
    scratch(tmp_path)
    path = tmp_path / "export" / "forking_tokens.json"
    edit(path, change)
    with pytest.raises(UserError, match=rf"export/forking_tokens\.json: .*{problem}") as caught:
        read_forking_tokens(tmp_path / "export")
    assert "\n" not in str(caught.value)


def test_a_folder_without_forking_tokens_is_refused(tmp_path):
    scratch(tmp_path)
    with pytest.raises(UserError, match=r"hf/forking_tokens\.json: no such file; export the run again"):
        read_forking_tokens(tmp_path / "hf")
    (tmp_path / "export" / "forking_tokens.json").write_text("{")
    with pytest.raises(UserError, match=r"forking_tokens\.json: not JSON"):
        read_forking_tokens(tmp_path / "export")
