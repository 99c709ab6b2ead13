"""The online loop over stand-ins for its programs: the order of its stages, stopping, failing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time

import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.formats.manifest import FileRecord, seal
from megatron_ssft.rounds.gfpo_rounds import questions_of_round
from tests.helpers.online_loop import STAGES, STATE


def test_stages_come_in_order_and_rounds_build_on_each_other(whole):
    made, out = whole
    expected = [f"{stage} round_00{r}" for r in (0, 1) for stage in STAGES]
    assert made.journal("begin") == made.journal("end") == expected
    finished = json.loads((made.work / "finished.json").read_text())
    assert finished == {"rounds": 2, "run": "round_001/run", "hf": "round_001/run/iter_0000003/hf"}
    second = json.loads((made.work / "round_001" / "stages.json").read_text())
    assert second["export"]["arguments"][1] == "round_000/run/iter_0000003/hf"
    train = second["train"]["arguments"]
    assert train[train.index("--load") + 1] == "round_000/run"
    assert train[train.index("--reference") + 1] == str(made.folder / "start")
    rows = [json.loads(line) for line in (made.work / "rounds.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [0, 1] and all(row["reason"] == "done" for row in rows)
    assert "before" in out and "after" in out and out.endswith((made.work / "finished.json").read_text())
    assert made.left_behind() == []


def test_seeds_differ_between_rounds_and_follow_from_the_first(whole):
    made, _ = whole
    seeds = []
    for r in (0, 1):
        stages = json.loads((made.work / f"round_00{r}" / "stages.json").read_text())
        for stage in ("generate", "train"):
            arguments = stages[stage]["arguments"]
            seeds.append(arguments[arguments.index("--seed") + 1])
    assert seeds == ["1234", "1234", "2234", "2234"]


def test_a_finished_loop_is_left_alone_and_rounds_can_be_added(whole, place):
    assert place.run()[0] == 0
    before = place.results()
    assert place.run()[0] == 0
    assert place.run(rounds=1)[0] == 0
    assert place.results() == before and len(place.journal("begin")) == 6
    status, _, err = place.run("--lr", "0.2", rounds=3)  # other flags are no matter for rounds that are done
    assert status == 0, err
    assert place.journal("begin")[6:] == [f"{stage} round_002" for stage in STAGES]
    assert json.loads((place.work / "finished.json").read_text())["rounds"] == 3
    after = place.results()
    assert {name: after[name] for name in before if name.startswith("round_")} == {
        name: text for name, text in before.items() if name.startswith("round_")
    }
    assert len(after["rounds.jsonl"].splitlines()) == 3


@pytest.mark.parametrize("lacks", [1, 2])
def test_samples_that_failed_are_tried_again(whole, place, lacks):
    status, out, err = place.run(rounds=1, STUB_LACKS=str(lacks))
    assert status == 0, err
    assert place.journal("begin") == ["generate round_000"] * (1 + lacks) + ["score round_000", "train round_000"]
    assert out.count("some samples failed; trying them again") == lacks and "going on without" not in out
    same = whole[0].work / "round_000" / "rollouts.jsonl"
    assert (place.work / "round_000" / "rollouts.jsonl").read_text() == same.read_text()


def test_samples_that_always_fail_are_done_without(place):
    status, out, err = place.run(rounds=1, STUB_LACKS="9")
    assert status == 0, err
    assert place.journal("begin") == ["generate round_000"] * 3 + ["score round_000", "train round_000"]
    assert "some samples failed in 3 tries; going on without them" in out
    stages = json.loads((place.work / "round_000" / "stages.json").read_text())
    assert stages["generate"]["seconds"] > 0


def test_weights_without_an_export_are_exported(whole, place):
    hf = place.folder / "start" / "iter_0000005" / "hf"
    (hf / "weights").unlink()
    hf.rmdir()
    status, _, err = place.run("--train-args=--no-export-hf-at-save", rounds=1)
    assert status == 0, err
    assert place.journal("begin") == [
        "export round_000", "generate round_000", "score round_000", "train round_000", "export round_001"
    ]  # fmt: skip
    assert json.loads((place.work / "finished.json").read_text())["hf"] == "round_001/hf"
    same = whole[0].work / "round_000" / "rollouts.jsonl"
    assert (place.work / "round_000" / "rollouts.jsonl").read_text() == same.read_text()
    assert (place.work / "round_001" / "hf" / "weights").read_text() == (
        whole[0].work / "round_000" / "run" / "iter_0000003" / "weights"
    ).read_text()


def test_a_round_without_signal_stops_the_loop_before_training(place):
    status, out, err = place.run(STUB_EQUAL="round_001")
    rewards = place.work / "round_001" / "rewards.jsonl"
    assert status == 2 and err.count("\n") == 1
    assert err.startswith(f"round 1: {rewards}: all of its 6 questions have the same reward under every tag")
    assert f"the weights of the rounds before are in {place.work}" in err
    assert place.journal("begin") == [f"{stage} round_000" for stage in STAGES] + [
        "generate round_001", "score round_001"
    ]  # fmt: skip
    assert not (place.work / "round_001" / "run").exists() and not (place.work / "finished.json").exists()
    assert place.run(STUB_EQUAL="round_001")[2] == err  # as long as the rewards stay as they are


@pytest.mark.parametrize("flags", ["--objective grpo", "--objective=grpo", "--objective gfpo-exact --objective grpo"])
def test_grpo_judges_by_completions_and_not_by_tags(place, flags):
    status, _, err = place.run(f"--train-args={flags}", rounds=1, STUB_EQUAL="round_000")
    assert status == 0, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_is_handed_on_and_waited_for(whole, place, number):
    process = place.start(STUB_SLOW="1")
    place.wait_for(process, "step", "train round_000")
    process.send_signal(number)
    status, _, err = place.finish(process)
    assert status == 128 + number
    assert err == f"stopped by {number.name} in round 0, train\n"
    steps = place.journal("step")
    assert 1 <= len(steps) < 3 and place.left_behind() == []
    assert (place.work / "round_000" / "run" / f"iter_000000{len(steps)}").is_dir()
    assert place.run()[0] == 0
    assert place.results() == whole[0].results() and len(place.journal("step")) == 6


def test_sigterm_ends_a_program_that_saves_nothing(whole, place):
    process = place.start(STUB_HOLD="generate:round_000")
    place.wait_for(process, "hold", "generate round_000")
    process.terminate()
    time.sleep(0.3)
    assert process.poll() is None  # it is waited for, however long it takes
    place.kill_left_behind()
    assert place.finish(process)[0] == 143
    assert place.journal("begin") == ["generate round_000"]
    assert place.run()[0] == 0
    assert place.results() == whole[0].results()


def test_training_that_was_stopped_by_others_is_no_end(place):
    process = place.start(STUB_SLOW="1")
    place.wait_for(process, "step", "train round_000")
    (pid,) = [line.split()[3] for line in place.lines("journal") if line.startswith("begin train")]
    os.kill(int(pid), signal.SIGTERM)
    status, _, err = place.finish(process)
    assert status == 143 and err == "round 0, train: was told to stop before its end\n"
    assert place.run()[0] == 0


def test_launched_ranks_are_asked_by_the_command_given(place):
    """As on a cluster, where a SIGTERM to srun would end the ranks without a checkpoint."""
    asked = f"{sys.executable} -c \"open({str(place.folder / 'asked')!r}, 'w')\""
    process = place.start(ranks=("--launcher", sys.executable, "--stop-launched", asked), STUB_SLOW="1")
    place.wait_for(process, "step", "train round_000")
    process.terminate()
    status, _, err = place.finish(process)
    assert (place.folder / "asked").exists()
    assert status == 143 and err == "stopped by SIGTERM after round 0, train\n"
    assert place.journal("step") == ["train round_000"] * 3  # the ranks themselves got no signal from the loop


@pytest.mark.parametrize("stage", STAGES)
def test_a_failing_program_ends_the_loop_with_its_status(whole, place, stage):
    status, _, err = place.run(STUB_FAIL=f"{stage}:round_001")
    assert status == 7
    lines = err.splitlines()
    assert lines[0] == "no such luck" and lines[1].startswith("exit status 7: ") and len(lines) == 2
    assert place.journal("begin")[-1] == f"{stage} round_001"
    assert place.run()[0] == 0
    assert place.results() == whole[0].results()


def test_a_program_that_cannot_be_started(place):
    status, _, err = place.run(ranks=("--launcher", "no-such-launcher"))
    assert status == 127 and err.endswith("no-such-launcher: cannot be started: No such file or directory\n")


WRONG = [
    (["--rounds", "0"], "--rounds 0: must be positive"),
    (["--questions-per-round", "7"], "there are only 6 questions"),
    (["--train-args=--lr=1"], "--train-args --lr=1: is given by the loop itself"),
    (["--generate-args", "--temperature 1 --seed 3"], "--generate-args --seed: is given by the loop itself"),
    (["--score-args", "--answer-after '#"], "no closing quotation; check the quotes"),
    (["--backend", "openai"], "--backend openai and --base-url go together"),
    (["--serve", "vllm serve {model}"], "--serve: needs --backend openai"),
    (["--backend", "openai", "--base-url", "http://localhost:1/v1"], "keeps its weights over the rounds"),
    (["--backend", "openai", "--base-url", "http://localhost:1/v1", "--serve", "vllm serve"], "write {model} where"),
    (["--launcher", "srun python"], "--nproc and --launcher: give one"),
    (["--stop-launched", "scancel 1"], "--stop-launched: is for --launcher"),
    (["--load", "nowhere"], "--load nowhere: holds no checkpoint"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
]


@pytest.mark.parametrize(("flags", "text"), WRONG)
def test_wrong_flags_are_one_line_and_nothing_is_made(place, flags, text):
    status, _, err = place.run(*flags)
    assert status == 2 and text in err and err.count("\n") == 1
    assert not place.work.exists()


def test_dry_run_makes_nothing(place):
    status, out, _ = place.run("--dry-run")
    assert status == 0 and not place.work.exists() and place.journal("begin") == []
    lines = out.splitlines()
    assert [line.split()[2] for line in lines] == STAGES * 2
    assert f"--load {place.work / 'round_000' / 'run'}" in lines[5]


def test_questions_of_rounds():
    assert questions_of_round(5, None, 1, 3) == [0, 1, 2, 3, 4]
    for wanted in (1, 3, 4, 10):
        rounds = [questions_of_round(10, wanted, 1, r) for r in range(2 * (10 // wanted))]
        assert rounds == [questions_of_round(10, wanted, 1, r) for r in range(len(rounds))]
        for taken in rounds:
            assert taken == sorted(set(taken)) and len(taken) == wanted
        epoch = [i for taken in rounds[: 10 // wanted] for i in taken]
        assert len(set(epoch)) == len(epoch)  # no repetition until the epoch is over
    assert questions_of_round(100, 10, 1, 0) != questions_of_round(100, 10, 2, 0)
    assert questions_of_round(100, 100, 1, 0) == list(range(100))
    with pytest.raises(UserError, match="there are only 3"):
        questions_of_round(3, 4, 1, 0)


def two_checkpoints(place):
    """The start with an older checkpoint, both with manifests."""
    newest = place.folder / "start" / "iter_0000005"
    older = newest.with_name("iter_0000004")
    shutil.copytree(newest, older)
    (older / "train_state.json").write_text(json.dumps(STATE | {"iteration": 4}))
    shutil.rmtree(older / "hf")  # the loop exports what it needs
    for folder in (newest, older):
        state = folder / "train_state.json"
        state.write_text(json.dumps(json.loads(state.read_text()) | {"has_manifest": True}))
        seal(folder, {"hf": FileRecord(size=0, sha256="0" * 64)} if (folder / "hf").is_dir() else {})
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"].pop("hf", None)
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return newest, older


def test_a_round_verifies_the_checkpoint_that_it_starts_from(place):
    newest, older = two_checkpoints(place)
    (newest / "weights").write_text("the beginninG")  # of the same size
    status, _, err = place.run(rounds=1)
    assert status == 2 and err.startswith(f"{newest}/weights: damaged") and err.count("\n") == 1
    assert "--on-damaged-checkpoint older" in err and place.journal("begin") == []
    status, out, err = place.run("--train-args=--on-damaged-checkpoint older", rounds=1)
    assert status == 0, err
    assert f"going on from {older}" in out
    assert place.journal("begin")[0] == "export round_000"  # the older one has no export yet
    arguments = json.loads((place.work / "round_000" / "stages.json").read_text())["export"]["arguments"]
    assert arguments[0] == str(older)


def test_an_impatient_round_looks_at_sizes_only(place):
    newest, _ = two_checkpoints(place)
    (newest / "weights").write_text("the beginninG")
    assert place.run("--train-args=--no-verify-checkpoint", rounds=1)[0] == 0
