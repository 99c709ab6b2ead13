"""Packages that flags ask for are missed before anything is tokenized."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.flags import build_config
from megatron_ssft.errors import UserError
from megatron_ssft.training import packages, trainer
from megatron_ssft.training.packages import kernels_remark, missing_packages, refuse_missing
from tests.helpers.training_runs import BASE

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def config(**changes):
    return build_config(BASE | {"data_path": ["train.jsonl"]} | changes, SSFTConfig)


@pytest.fixture
def without(monkeypatch):
    """Let packages be absent, or all others be there."""

    def hide(*absent):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name in absent else object())

    return hide


CASES = {
    "TransformerEngine": ({"transformer_impl": "transformer_engine"}, "transformer_engine", "--transformer-impl"),
    "its attention": ({"attention_backend": "te", "bf16": True}, "transformer_engine", "--attention-backend te"),
    "flash-attn": ({"attention_backend": "flash", "bf16": True}, "flash_attn", "--attention-backend flash"),
    "FlashAttention 3": (
        {"attention_backend": "flash3", "bf16": True},
        "flash_attn_interface",
        "--attention-backend f",
    ),
    "FlashAttention 4": (
        {"attention_backend": "flash4", "bf16": True},
        "flash_attn.cute",
        "--attention-backend flash4",
    ),
    "W&B": ({"wandb_project": "ssft"}, "wandb", "--wandb-project"),
    "TensorBoard": ({"save": "run"}, "tensorboard", "the package tensorboard"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_missing_package_is_refused_by_its_flag(name, without):
    changes, package, text = CASES[name]
    without(package)
    with pytest.raises(UserError, match=f"^{text}.* is not installed"):
        refuse_missing(config(**changes).run, CUDA)
    without()
    assert missing_packages(config(**changes).run) == []
    refuse_missing(config(**changes).run, CUDA)


def test_transformer_engine_needs_a_gpu(without):
    without()
    with pytest.raises(UserError, match="needs CUDA; use --transformer-impl local"):
        refuse_missing(config(transformer_impl="transformer_engine").run, CPU)


def test_kernels_that_would_be_faster_are_named_on_a_gpu(without):
    without("flash_attn", "flash_attn_interface", "transformer_engine")
    remark = kernels_remark(config(bf16=True).run, CUDA)
    assert "none of flash_attn, flash_attn_interface, flash_attn.cute, transformer_engine is installed" in remark
    assert kernels_remark(config(bf16=True).run, CPU) is None
    assert kernels_remark(config(bf16=True, sequence_layout="padded").run, CUDA) is None
    without("flash_attn")
    assert kernels_remark(config(bf16=True).run, CUDA) is None


def test_the_trainer_looks_before_it_reads_the_data(monkeypatch):
    """In the order of the trainer's own start."""
    calls = []

    def stop(*_):
        calls.append("packages")
        raise UserError("missing")

    monkeypatch.setattr(packages, "missing_packages", stop)
    monkeypatch.setattr(trainer, "on_first_rank", lambda work, topology: work())
    monkeypatch.setattr(trainer, "build_vocabulary", lambda *_: pytest.fail("too late"))
    with pytest.raises(UserError, match="missing"):
        trainer.Trainer(config(), type("Topology", (), {"device": CPU, "is_first_rank": True})())
    assert calls == ["packages"]
