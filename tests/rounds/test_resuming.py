"""The online loop over stand-ins for its programs: killed, and started again."""

from __future__ import annotations

import json
import sys
import time

import pytest

from tests.helpers.online_loop import STAGES


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("stage", STAGES)
def test_sigkill_in_a_stage(whole, place, stage, number):
    """Its programs ignore the SIGTERM that they get when it dies, and must be gone before anything is started again."""
    where = f"round_00{number}"
    process = place.start(STUB_HOLD=f"{stage}:{where}")
    place.wait_for(process, "hold", f"{stage} {where}")
    assert "finished.json" not in place.results()
    process.kill()
    place.finish(process)
    assert place.left_behind() != []
    status, _, err = place.run()
    assert status == 0, err
    assert place.results() == whole[0].results()
    assert place.left_behind() == [] and place.journal("race") == []
    assert place.journal("end") == whole[0].journal("end")  # nothing that was done was done again
    if stage == "train":  # from its checkpoint and not from the beginning
        assert place.journal("step").count(f"train {where}") == 2


def test_sigkill_in_an_export(whole, place):
    (place.folder / "start" / "iter_0000005" / "hf" / "weights").unlink()
    (place.folder / "start" / "iter_0000005" / "hf").rmdir()
    process = place.start(STUB_HOLD="export:round_000")
    place.wait_for(process, "hold", "export round_000")
    process.kill()
    place.finish(process)
    assert place.run()[0] == 0
    assert place.journal("end")[0] == "export round_000" and place.journal("race") == []
    last = "round_001/run/iter_0000003/weights"
    assert place.results()[last] == whole[0].results()[last]


@pytest.mark.parametrize("seconds", [0.25, 0.4, 0.55, 0.7, 0.85])
def test_sigkill_at_any_time(whole, place, seconds):
    process = place.start()
    time.sleep(seconds)
    process.kill()
    place.finish(process)
    status, _, err = place.run()
    assert status == 0, err
    assert place.results() == whole[0].results()


def test_parts_of_files_that_a_kill_left_are_removed(whole, place):
    """Killed before a file got its name, where the next start writes that file no more."""
    assert place.run(rounds=1)[0] == 0
    (place.work / "rounds.jsonl.tmp").write_text("{")
    (place.work / "round_000" / "stages.json.tmp").write_text("{")
    (place.work / "round_000" / ".rewards.jsonl.x1.tmp").write_text("")
    status, _, err = place.run()
    assert status == 0, err
    assert place.results() == whole[0].results()


def test_programs_end_by_themselves_when_the_loop_is_killed(place):
    process = place.start(STUB_SLOW="1")
    place.wait_for(process, "step", "train round_000")
    process.kill()
    place.finish(process)
    deadline = time.monotonic() + 5
    while place.left_behind():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert place.journal("end") == ["generate round_000", "score round_000"]


def test_a_stage_that_ended_unnoticed_is_not_repeated(whole, place):
    """Killed between the end of training and the note that it has ended."""
    assert place.run(rounds=1)[0] == 0
    path = place.work / "round_000" / "stages.json"
    stages = json.loads(path.read_text())
    del stages["train"]["seconds"]
    path.write_text(json.dumps(stages))
    (place.work / "rounds.jsonl").unlink()
    assert place.run()[0] == 0
    assert place.journal("begin").count("train round_000") == 1
    assert place.results() == whole[0].results()


LEFT = {"generate": "rollouts.jsonl", "score": "scores.jsonl", "train": "run/iter_0000001/train_state.json"}
CHANGES = [
    ("generate", ["--samples-per-tag", "2"], "generate", "--samples-per-tag 1 and not --samples-per-tag 2"),
    ("generate", ["--generate-args", "--temperature 1"], "generate", "nothing more and not --temperature"),
    ("generate", ["--questions-per-round", "3"], "questions", "nothing more and not 3"),
    ("train", ["--seed", "7"], "generate", "--seed 1234 and not --seed 7"),
    ("score", ["--verifier", "math"], "score", "--verifier exact and not --verifier math"),
    ("train", ["--lr", "0.2"], "train", "--lr 0.1 and not --lr 0.2"),
    ("train", ["--train-args", "--objective grpo"], "train", "nothing more and not --objective"),
]


@pytest.mark.parametrize(("stage", "flags", "named", "text"), CHANGES)
def test_other_flags_for_a_round_that_has_begun_are_refused(place, stage, flags, named, text):
    assert place.run(STUB_FAIL=f"{stage}:round_000")[0] == 7
    made = place.work / "round_000" / LEFT[stage]
    made.parent.mkdir(parents=True, exist_ok=True)
    made.touch()
    before = place.results()
    status, _, err = place.run(*flags)
    assert status == 2 and err.count("\n") == 1
    assert f"stages.json: {named} was begun with {text}; give the flags of then" in err
    assert place.results() == before


@pytest.mark.parametrize(
    ("stage", "flags"),
    [
        ("generate", ["--generate-args", "--temperature 1"]),
        ("score", ["--score-args", "--timeout 3"]),
        ("train", ["--lr", "0.2"]),
    ],
)
def test_a_stage_that_left_nothing_is_not_bound_by_its_flags(place, stage, flags):
    """Or a flag that made training fail would cost the round's samples."""
    assert place.run(STUB_FAIL=f"{stage}:round_000", rounds=1)[0] == 7
    status, _, err = place.run(*flags, rounds=1)
    assert status == 0, err
    begun = json.loads((place.work / "round_000" / "stages.json").read_text())[stage]
    assert flags[-1].split()[-1] in begun["arguments"]
    assert place.journal("begin").count("generate round_000") == 1 + (stage == "generate")


def test_flags_of_stages_to_come_may_change(place):
    assert place.run(STUB_FAIL="score:round_000")[0] == 7
    status, _, err = place.run("--lr", "0.2", rounds=1, ranks=("--launcher", sys.executable))
    assert status == 0, err


def test_a_folder_belongs_to_one_run(place):
    assert place.run(rounds=1)[0] == 0
    (place.folder / "start").rename(place.folder / "other")
    status, _, err = place.run("--load", str(place.folder / "other"))
    assert status == 2 and err.count("\n") == 1 and "was started with --load" in err


def test_a_moved_folder_goes_on(whole, place):
    process = place.start(STUB_HOLD="score:round_001")
    place.wait_for(process, "hold", "score round_001")
    process.kill()
    place.finish(process)
    place.kill_left_behind()
    place.work = place.work.rename(place.folder / "elsewhere")
    status, _, err = place.run()
    assert status == 0, err
    assert place.results() == whole[0].results()


def test_two_loops_in_one_folder(place):
    process = place.start(STUB_HOLD="generate:round_000")
    place.wait_for(process, "hold", "generate round_000")
    status, _, err = place.run()
    assert status == 2 and err.count("\n") == 1
    assert f"is in use by process {process.pid} on " in err
    assert place.left_behind() != []  # the other one's programs are left alone
    process.kill()
    place.finish(process)
