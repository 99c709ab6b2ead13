"""What --dry-run is asked: accepted where it has a use, refused elsewhere; and the table of GPUs."""

from __future__ import annotations

import pytest

from megatron_ssft.config import GFPOConfig, SSFTConfig
from megatron_ssft.config.dry_run import DryRun
from megatron_ssft.config.flags import fields_of, flag_fields, parse_arguments
from megatron_ssft.config.gpus import GPUS, peak_tflops
from tests.helpers.config_flags import argv, refusal


def asked(*words):
    return parse_arguments("", SSFTConfig, [*argv(), *words])[1]


def test_without_a_dry_run_nothing_is_asked():
    assert asked() is None
    for words in (["--world-size", "8"], ["--gpu", "H200"], ["--advise"], ["--json", "x.json"], ["--nodes-of", "4"]):
        assert refusal(lambda words=words: asked(*words)) == (
            f"{words[0]}: is a question to --dry-run; add that, or leave this out"
        )


def test_a_dry_run_alone_asks_nothing():
    assert asked("--dry-run") == DryRun()
    assert not DryRun().simulates


def test_questions_arrive():
    words = ["--world-size", "64", "--gpu", "H200", "--nodes-of", "4", "--network-gbit", "200", "--json", "b.json"]
    dry_run = asked("--dry-run", *words, "--attainable-share", "0.4")
    assert (dry_run.world_size, dry_run.nodes_of, dry_run.attainable_share) == (64, 4, 0.4)
    assert dry_run.hardware is GPUS["H200"]
    assert dry_run.network == 25e9
    assert asked("--dry-run", "--world-size", "8", "--gpu", "A100-80GB").network == 25e9
    assert asked("--dry-run", "--advise", "--gpu", "B200").simulates


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--gpu", "H200"], "--gpu H200 has no use without --world-size; leave it out"),
        (["--json", "x"], "--json x has no use without --world-size; leave it out"),
        (["--advise"], "--advise needs --gpu: which GPUs is the job to run on?"),
        (["--world-size", "0"], "--world-size 0: must be a finite number greater than 0"),
        (["--world-size", "8", "--network-gbit", "9"], "--network-gbit 9.0 has no use without --gpu; leave it out"),
        (["--world-size", "8", "--gpu", "H20", "--attainable-share", "1.5"], "--attainable-share 1.5: is a share"),
        (["--world-size", "8", "--gpu", "H20", "--attainable-share", "nan"], "--attainable-share nan: must be"),
    ],
)
def test_what_has_no_use_is_refused(words, reason):
    assert refusal(lambda: asked("--dry-run", *words)).startswith(reason)


def test_no_setting_of_a_run_has_such_a_name():
    names = {field.name for field in flag_fields(DryRun)}
    for config in (SSFTConfig, GFPOConfig):
        assert not names & fields_of(config).keys()


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_by_the_names_that_torch_gives(name, tflops):
    assert peak_tflops(name) == tflops


def test_gpus_are_as_large_as_their_names_say():
    for name, gpu in GPUS.items():
        size = name.partition("-")[2]
        if size:
            assert gpu.bytes == pytest.approx(int(size.removesuffix("GB")) * 2**30, rel=0.01)
