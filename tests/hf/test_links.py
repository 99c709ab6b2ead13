"""Links of a model folder: into itself and into its own download cache, and nowhere else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.formats.links import refuse_foreign_link
from megatron_ssft.hf.assets import copy_assets
from megatron_ssft.hf.folder import read_hf_config
from megatron_ssft.hf.safetensors_io import HFWeights
from megatron_ssft.tokenizers.tokenizer import build_tokenizer
from tests.helpers.hf_folders import checkpoint, files


def as_in_a_cache(folder, root):
    """The same files, kept as the hub's cache keeps them: contents among the blobs, links with their names."""
    snapshot, blobs = root / "models--org--name" / "snapshots" / "abc123", root / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blobs / f"{number:064x}")
        depth = len(link.relative_to(snapshot).parts) - 1
        link.symlink_to(Path("../" * (depth + 2)) / "blobs" / f"{number:064x}")
    return snapshot


def refused(work, path):
    with pytest.raises(UserError) as error:
        work()
    text = str(error.value)
    assert text.startswith(f"{path}: is a link out of the model folder") and "\n" not in text


def test_a_download_cache_is_read_as_the_folder_that_it_shows(tmp_path):
    source = checkpoint(tmp_path / "in")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("y")
    snapshot = as_in_a_cache(source, tmp_path)
    copy_assets(snapshot, tmp_path / "a")
    copy_assets(source, tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b") and "additional_chat_templates/rag.jinja" in files(
        tmp_path / "a"
    )
    assert not any(path.is_symlink() for path in (tmp_path / "a").rglob("*"))
    assert read_hf_config(snapshot) == read_hf_config(source)


def test_a_folder_behind_a_link_is_a_folder(tmp_path):
    source = checkpoint(tmp_path / "in")
    (tmp_path / "link").symlink_to(source)
    (source / "chat_template.jinja").symlink_to("template.txt")  # within the folder
    (source / "template.txt").write_text("x")
    copy_assets(tmp_path / "link", tmp_path / "a")
    assert (tmp_path / "a" / "chat_template.jinja").read_text() == "x"


@pytest.mark.parametrize("name", ["chat_template.jinja", "LICENSE", "merges.txt", "additional_chat_templates/x.jinja"])
@pytest.mark.parametrize("cached", [False, True])
def test_no_file_of_this_machine_lands_in_an_export(tmp_path, name, cached):
    secret = tmp_path / "secret"
    secret.write_text("root:x")
    source = checkpoint(tmp_path / "in")
    folder = as_in_a_cache(source, tmp_path) if cached else source
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    refused(lambda: copy_assets(folder, tmp_path / "out"), folder / name)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_links_is_no_way_round(tmp_path):
    source = checkpoint(tmp_path / "in")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jinja").write_text("secret")
    (source / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    name = source / "additional_chat_templates" / "a.jinja"
    refused(lambda: copy_assets(source, tmp_path / "out"), name)


def test_another_models_blobs_are_not_its_own(tmp_path):
    snapshot = as_in_a_cache(checkpoint(tmp_path / "in"), tmp_path / "one")
    other = as_in_a_cache(checkpoint(tmp_path / "in2"), tmp_path / "two")
    (snapshot / "chat_template.jinja").symlink_to((other / "config.json").resolve())
    refused(lambda: refuse_foreign_link(snapshot / "chat_template.jinja", snapshot), snapshot / "chat_template.jinja")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_what_is_read_is_not_followed_either(tmp_path, name):
    source = checkpoint(tmp_path / "in")
    (source / name).rename(tmp_path / "moved")
    (source / name).symlink_to(tmp_path / "moved")
    read = (
        read_hf_config if name == "config.json" else lambda folder: build_tokenizer("HuggingFaceTokenizer", str(folder))
    )
    refused(lambda: read(source), source / name)


def test_weights_elsewhere_are_refused_and_those_in_the_cache_read(tmp_path):
    import torch
    from safetensors.torch import save_file

    (tmp_path / "in").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "in" / "model.safetensors")
    with HFWeights(as_in_a_cache(tmp_path / "in", tmp_path)) as weights:
        assert weights.read("a").tolist() == [1.0, 1.0]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").symlink_to(tmp_path / "in" / "model.safetensors")
    refused(lambda: HFWeights(tmp_path / "other"), tmp_path / "other" / "model.safetensors")
