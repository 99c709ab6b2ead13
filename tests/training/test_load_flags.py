"""Flags beside --load and --origin: each says where the weights come from and how tags begin, or is refused."""

from __future__ import annotations

import pytest

from megatron_ssft.cli.convert import ImportFlags
from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.flags import parse_arguments
from megatron_ssft.errors import UserError
from megatron_ssft.training.startup import complete_values
from tests.helpers.bad_input import complaint, flags, start_each, write_rows
from tests.helpers.config_flags import argv, refusal
from tests.helpers.distributed import run_ranks
from tests.helpers.hf_models import random_model

RUN = "num_layers: 4\nhidden_size: 64\nnum_attention_heads: 4\ntokenizer_type: CharTokenizer\n"


def parse(*words, **changes):
    return parse_arguments("", SSFTConfig, [*argv(**changes), *words], complete_values)[0]


@pytest.fixture
def runs(tmp_path):
    """Two folders that look like runs; the second one's tags began at the mean."""
    for name, more in (("one", ""), ("two", "forking_token_init: mean\norigin: one\norigin_fingerprint: '12'\n")):
        (tmp_path / name / "iter_0000001").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text(RUN + more)
    return tmp_path


def config_file(folder, text):
    path = folder / "given.yaml"
    path.write_text(text)
    return "--config", str(path)


def test_an_origin_beside_load_is_refused(runs):
    line = refusal(lambda: parse(load=runs / "one", origin=runs / "two"))
    assert line.startswith(f"--origin {runs}/two: has no use beside --load {runs}/one") and "\n" not in line
    line = refusal(lambda: parse(load=runs / "one", origin=runs / "one"))
    assert line.startswith("--origin ")
    line = refusal(lambda: parse(load=runs / "one", origin_fingerprint="00"))
    assert line.startswith("--origin-fingerprint 00: has no use beside --load")


def test_an_origin_beside_load_in_one_file_is_refused(runs):
    words = config_file(runs, f"load: {runs}/one\norigin: {runs}/two\n")
    assert refusal(lambda: parse(*words)).startswith(f"--origin {runs}/two: has no use beside --load {runs}/one")


def test_a_flag_replaces_the_other_of_the_file(runs):
    """--load takes the place of a recorded origin, --origin that of a file's load."""
    recorded = config_file(runs, f"origin: {runs}/two\norigin_fingerprint: 'abc'\n")
    checkpoint = parse(*recorded, load=runs / "one").run.checkpoint
    assert (checkpoint.load, checkpoint.origin, checkpoint.origin_fingerprint) == (f"{runs}/one", None, None)
    loaded = config_file(runs, f"load: {runs}/one\n")
    checkpoint = parse(*loaded, origin=runs / "two").run.checkpoint
    assert checkpoint.load == checkpoint.origin == f"{runs}/two"


@pytest.mark.parametrize("finetune", [False, True])
@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"forking_token_init": "mean"}, "--forking-token-init mean"),
        ({"forking_token_init": "copy:a"}, "--forking-token-init copy:a"),
        ({"forking_token_noise": 0.5}, "--forking-token-noise 0.5"),
    ],
)
def test_how_tags_begin_is_refused_where_a_checkpoint_holds_their_rows(runs, changes, flag, finetune):
    line = refusal(lambda: parse(load=runs / "one", finetune=finetune, **changes))
    assert line.startswith(f"{flag} has no use with --load {runs}/one") and "leave it out" in line


def test_what_a_run_says_of_its_own_beginning_may_be_said_again(runs):
    words = ("--config", str(runs / "two" / "config.yaml"))
    assert parse(*words, load=runs / "two").start.forking_token_init == "mean"


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"forking_token_init": "mean"}, "--forking-token-init"),
        ({"forking_token_noise": 2.0}, "--forking-token-noise"),
        ({"forking_token_format": "text"}, "--forking-token-format"),
        ({"forking_token_template": "<t{i}>"}, "--forking-token-template"),
        ({"num_forking_tokens": 0, "forking_token_init": "mean"}, "--forking-token-init"),
        (
            {"num_forking_tokens": 3, "forking_token_format": "text", "forking_token_init": "mean"},
            "--forking-token-init",
        ),
        (
            {"num_forking_tokens": 3, "forking_token_init": "mean", "forking_token_noise": 2.0},
            "--forking-token-noise",
        ),
    ],
)
def test_an_import_refuses_flags_of_tags_that_it_does_not_make(tmp_path, changes, flag):
    with pytest.raises(UserError, match=f"^{flag} .*has no use .*leave it out"):
        ImportFlags(source=tmp_path, target=tmp_path / "run", **changes)
    ImportFlags(source=tmp_path, target=tmp_path / "run", num_forking_tokens=3, forking_token_noise=2.0)
    ImportFlags(source=tmp_path, target=tmp_path / "run", num_forking_tokens=3, forking_token_format="text")


def test_how_tags_begin_is_refused_where_a_model_folder_has_them(tmp_path):
    """An export knows its tags: their rows are taken, none is made."""
    write_rows(tmp_path / "train.jsonl")
    random_model(tmp_path / "model", "llama", True)
    shape = dict.fromkeys(("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "tokenizer_type"))
    one = {"train_iters": 1, "save": tmp_path / "one", "export_hf_at_save": True, "no_verify_hf": True}
    again = shape | {"load": tmp_path / "one" / "iter_0000001" / "hf", "save": tmp_path / "two", "train_iters": 1}
    lines = [
        flags(tmp_path, **shape | one | {"load": tmp_path / "model", "forking_token_init": "mean"}),
        flags(tmp_path, **again | {"forking_token_init": "mean"}),
        flags(tmp_path, **again),
    ]
    made, begun, plain = run_ranks(1, start_each, lines, timeout=120)[0]
    assert made[0] == plain[0] == 0, (made, plain)
    assert complaint(begun).startswith(f"--forking-token-init mean has no use with --load {again['load']}")
