"""Everything of a Hugging Face folder that is not weights, copied and exported."""

from __future__ import annotations

import json

import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.formats.forking_tokens import FORKING_TOKENS
from megatron_ssft.hf.assets import copy_assets, find_tokenizer, write_assets
from megatron_ssft.tokenizers.forking_tokens import build_forking_tokens
from megatron_ssft.tokenizers.tokenizer import build_tokenizer
from tests.helpers.hf_folders import (
    CONFIG,
    GENERATION,
    but_forking_tokens,
    checkpoint,
    edit,
    files,
    sentencepiece_checkpoint,
    special_tags,
)


def test_copy_takes_everything_but_weights_and_code(tmp_path):
    repository = tmp_path / "models--org--name"
    (repository / "snapshots").mkdir(parents=True)
    source = checkpoint(repository / "snapshots" / "abc123")
    (source / "additional_chat_templates").mkdir()
    kept = {
        "chat_template.jinja": "x",
        "special_tokens_map.json": "{}",
        "LICENSE": "l",
        "additional_chat_templates/rag.jinja": "y",
    }
    dropped = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "modeling.py", "tekken.json"]
    dropped += ["chat_template.py", "LICENSE.safetensors"]
    for name, text in {**kept, **dict.fromkeys(dropped, "no")}.items():
        (source / name).write_text(text)
    blob = repository / "blobs" / "e3b0c442"
    blob.parent.mkdir()
    (source / "tokenizer.json").rename(blob)
    blob.chmod(0o444)
    (source / "tokenizer.json").symlink_to(blob)  # as in a download cache
    copy_assets(source, tmp_path / "run" / "hf")
    copied = files(tmp_path / "run" / "hf")
    expected = {*kept, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(copied) == expected
    assert all(copied[name] == files(source)[name] for name in expected)
    assert not (tmp_path / "run" / "hf" / "tokenizer.json").is_symlink()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["hf"]


def test_copy_replaces_an_older_copy_and_leaves_it_alone_when_it_fails(tmp_path):
    source = checkpoint(tmp_path / "in")
    copy_assets(source, tmp_path / "hf")
    (tmp_path / "hf" / "stale.json").write_text("{}")
    (source / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        copy_assets(source, tmp_path / "hf")
    assert (tmp_path / "hf" / "stale.json").exists()
    (source / "config.json").write_text(json.dumps(CONFIG))
    copy_assets(source, tmp_path / "hf")
    assert files(tmp_path / "hf") == files(source)
    copy_assets(tmp_path / "hf", tmp_path / "hf")  # a resumed run
    assert files(tmp_path / "hf") == files(source)
    with pytest.raises(UserError, match=r"nowhere/config\.json: cannot read it"):
        copy_assets(tmp_path / "nowhere", tmp_path / "hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "in"]


def test_export_changes_two_keys_of_the_configuration_and_nothing_else(tmp_path):
    source = checkpoint(tmp_path / "in")
    target = tmp_path / "out"
    target.mkdir()
    (target / "model.safetensors").write_text("weights")
    write_assets(source, target, special_tags(source), 384, "bfloat16")
    assert json.loads((target / "config.json").read_text()) == {**CONFIG, "vocab_size": 384, "torch_dtype": "bfloat16"}
    assert (target / "generation_config.json").read_text() == GENERATION
    assert (target / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
    assert (target / "model.safetensors").read_text() == "weights"
    assert set(files(target)) == {*files(source), "model.safetensors", FORKING_TOKENS}


def test_the_dtype_goes_where_the_configuration_has_it(tmp_path):
    for number, keys in enumerate((["dtype"], ["torch_dtype"], ["dtype", "torch_dtype"], [])):
        source = checkpoint(tmp_path / f"in{number}", **dict.fromkeys(keys, "float16"))
        wanted = set(keys or ["torch_dtype"])
        edit(source / "config.json", lambda c, keys=keys: [c.pop(k, None) for k in {"torch_dtype"} - set(keys)])
        write_assets(source, tmp_path / f"out{number}", None, 290, "bfloat16")
        config = json.loads((tmp_path / f"out{number}" / "config.json").read_text())
        assert {k for k in config if k.endswith("dtype")} == wanted and {config[k] for k in wanted} == {"bfloat16"}


def test_an_export_without_changes_is_the_same_bytes(tmp_path):
    source = checkpoint(tmp_path / "in")
    text = build_forking_tokens(build_tokenizer("HuggingFaceTokenizer", str(source)), 6, "text", None)
    write_assets(source, tmp_path / "text", text, 290, "float32")
    write_assets(source, tmp_path / "none", None, 290, "float32")
    assert files(tmp_path / "none") == files(source) == but_forking_tokens(tmp_path / "text")
    write_assets(source, tmp_path / "once", special_tags(source), 384, "float32")
    write_assets(tmp_path / "once", tmp_path / "twice", special_tags(source), 384, "float32")
    assert files(tmp_path / "twice") == files(tmp_path / "once") != files(source)
    write_assets(tmp_path / "once", tmp_path / "thrice", None, 384, "float32")  # nothing is known of tags: they stay
    assert files(tmp_path / "thrice") == files(tmp_path / "once")


def test_an_export_onto_its_source_is_refused(tmp_path):
    source = checkpoint(tmp_path / "in")
    before = files(source)
    with pytest.raises(UserError, match="must not replace"):
        write_assets(source, source, None, 384, "bfloat16")
    assert files(source) == before


def test_find_tokenizer(tmp_path):
    source = checkpoint(tmp_path / "in")
    assert find_tokenizer(source) == ("HuggingFaceTokenizer", source)
    alone = sentencepiece_checkpoint(tmp_path / "sp")
    assert find_tokenizer(alone) == ("HuggingFaceTokenizer", alone)
    (alone / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="neither"):
        find_tokenizer(alone)
