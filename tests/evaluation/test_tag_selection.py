"""tools/select_tag.py on small runs written by hand: the choice, its reasons, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.evaluation import tag_selection
from tests.helpers.paths import ROOT

TOOL = ROOT / "tools" / "select_tag.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("select_tag", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["select_tag"] = module
    spec.loader.exec_module(module)
    return module


EPOCH = [([0, 1], "ab"), ([1, 0], "ab"), ([1, 2], "bc")]
"""Tags and sources of three questions: tag 0 got a, b; tag 1 b, a, b; tag 2 c."""


def make_run(folder, epochs=(EPOCH, EPOCH), settings="matching: optimal\nnum_forking_tokens: 4\n", questions=3):
    """A run's folder with these epochs."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"iteration": e + 1, "epoch": e, "id": f"q{k}", "tags": tags, "sources": list(sources), "cost": None}
        for e, visits in enumerate(epochs)
        for k, (tags, sources) in enumerate(visits)
    ]
    (folder / "metrics.jsonl").write_text('{"iteration": 1, "loss": 2.0}\n')
    (folder / "assignments.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if settings is not None:
        (folder / "config.yaml").write_text(settings)
    if questions is not None:
        state = folder / "iter_0000002" / "train_state.json"
        state.parent.mkdir(exist_ok=True)
        state.write_text(json.dumps({"queue": {"num_questions": questions}}))
    return folder


def write_scored(path, correct, model="m1", mode="each", first_id=0):
    """`correct[tag]`: one list of flags a question."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "id": f"v{first_id + q}", "tag": tag, "sample": k, "finish_reason": "stop", "seed": 1,
            "sampling": {"mode": mode, "temperature": 0.7}, "model": model, "tokenizer": "t1", "correct": bool(flag),
            "answer": "7", "verdict": "correct" if flag else "wrong", "verifier": "exact", "num_tokens": 5,
            "truncated": False,
        }
        for tag, questions in correct.items()
        for q, flags in enumerate(questions)
        for k, flag in enumerate(flags)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_json(tool, capsys, *arguments):
    tool.main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def text(tool, capsys, *arguments):
    """What is printed, with lines joined again."""
    tool.main(list(map(str, arguments)))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    return " ".join(printed.split())


def refused(tool, *arguments):
    with pytest.raises(UserError) as error:
        tool.main(list(map(str, arguments)))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_choice_by_hand(tool, tmp_path, capsys):
    run = make_run(tmp_path / "run")
    found = as_json(tool, capsys, run)
    assert (found["g_star"], found["chosen"], found["epoch"], found["most_accurate"]) == (1, 1, 1, None)
    assert found["persistent_configurations"] == found["distinct_configurations"] == 3
    assert [(t["tag"], t["distinct_sources"], t["weighted_degree"], t["sources"]) for t in found["tags"]] == [
        (1, 2, 3, {"b": 2, "a": 1}),
        (0, 2, 2, {"a": 1, "b": 1}),
        (2, 1, 1, {"c": 1}),
        (3, 0, 0, {}),
    ]
    printed = text(tool, capsys, run)
    assert "g* = <think2>: as many distinct sources as <think1> (2), matched more often: 3 to 2." in printed
    assert "b 67%, a 33%" in printed and "Counting rewards a tag that is matched to everything" in printed
    assert "accuracy" not in printed.split("Counting")[0] and "All tags have" not in printed


def test_the_order_of_traces_and_questions_does_not_matter(tool, tmp_path, capsys):
    one = as_json(tool, capsys, make_run(tmp_path / "run"))
    shuffled = [(tags[::-1], sources[::-1]) for tags, sources in EPOCH[::-1]]
    assert as_json(tool, capsys, make_run(tmp_path / "run", (shuffled, EPOCH[::-1]))) == one


def test_counts_are_of_the_last_complete_epoch_and_of_what_persists(tool, tmp_path, capsys):
    early = [([2, 3], "ab")] * 18
    late = [([2, 3], "ab")] * 2 + [([0, 1], "ab")] * 16
    begun = [([3, 2], "ab")] * 5
    run = make_run(tmp_path / "run", (early, late, begun), questions=18)
    found = as_json(tool, capsys, run)
    assert found["epoch"] == 1 and found["g_star"] == 0
    assert (found["persistent_configurations"], found["distinct_configurations"]) == (1, 2)
    assert found["tags"][2]["sources"] == {}
    assert as_json(tool, capsys, run, "--tolerance", "inf")["persistent_configurations"] == 2
    assert as_json(tool, capsys, run, "--tolerance", "inf", "--min-count", 3)["persistent_configurations"] == 1
    assert "lower --min-count" in refused(tool, run, "--min-count", 17)
    for wrong in (["--tolerance", "-1"], ["--tolerance", "nan"], ["--min-count", "0"]):
        assert "must" in refused(tool, run, *wrong)


def test_a_run_without_checkpoint_or_configuration(tool, tmp_path, capsys):
    run = make_run(tmp_path / "run", settings=None, questions=None)
    found = as_json(tool, capsys, run)
    assert found["g_star"] == 1 and len(found["tags"]) == 3 and found["matching"] is None


def test_a_checkpoint_without_a_queue_is_passed_over(tool, tmp_path, capsys):
    run = make_run(tmp_path / "run", (EPOCH,))
    for name, content in (("iter_0000003", '{"iteration": 3}'), ("iter_0000004", "{")):
        (run / name).mkdir()
        (run / name / "train_state.json").write_text(content)
    found = as_json(tool, capsys, run)
    assert found["epoch"] == 0 and any("Only one epoch is complete" in note for note in found["notes"])


def test_what_counting_cannot_tell_is_said(tool, tmp_path, capsys):
    everything = [([0, 1], "ab"), ([1, 0], "ab"), ([1, 0], "ba")]
    settings = "matching: {}\nnum_forking_tokens: 2\n"
    printed = text(tool, capsys, make_run(tmp_path / "all", (everything,) * 2, settings.format("optimal")))
    assert "All tags have 2 of 2 sources" in printed and "tied with <think2>" in printed
    assert "given out blindly" not in printed and "place in the data file" not in printed
    for matching in ("random", "fixed"):
        run = make_run(tmp_path / matching, (everything,) * 2, settings.format(matching))
        assert f"--matching {matching}: the tags were given out blindly" in text(tool, capsys, run)
    slots = [([0, 1], [None, None])] * 3
    printed = text(tool, capsys, make_run(tmp_path / "slots", (slots, slots)))
    assert "place in the data file" in printed and "trace 1 100%" in printed


def test_accuracy_stands_beside_g_star_and_can_choose(tool, tmp_path, capsys):
    run = make_run(tmp_path / "run")
    # tag 1 (g*): .25 on every question; tag 2: all right; tag 0: none; tag 3: no samples
    scored = {0: [[0, 0]] * 12, 1: [[1, 0, 0, 0]] * 12, 2: [[1]] * 12}
    write_scored(run / "eval" / "scored.jsonl", scored)
    (run / "eval" / "rollouts.jsonl").write_text('{"id": "v0", "text": "he said {\\"correct\\": true}"}\n')
    found = as_json(tool, capsys, run)
    assert (found["g_star"], found["chosen"], found["most_accurate"]) == (1, 1, 2)
    assert found["scored"] == [str(run / "eval" / "scored.jsonl")]
    by_tag = {t["tag"]: t["accuracy"] for t in found["tags"]}
    assert by_tag[0]["value"] == 0 and by_tag[1]["value"] == 0.25 and by_tag[2]["value"] == 1 and by_tag[3] is None
    assert found["difference"]["value"] == 0.75 and found["difference"]["p_value"] < 0.01
    assert as_json(tool, capsys, run, "--by", "accuracy")["chosen"] == 2
    printed = text(tool, capsys, run, "--by", "accuracy")
    assert "Most accurate: <think3>, 100.0% ± 0.0% (standard error over 12 questions): better than g*" in printed
    assert "Chosen by accuracy: <think3>" in printed and "no samples" in printed


def test_standard_errors_are_over_questions(tool, tmp_path, capsys):
    run = make_run(tmp_path / "run")
    # four questions, shares 1, 0, .5, .5: mean .5, standard error sqrt(.5 / 3 / 4)
    write_scored(tmp_path / "s.jsonl", {1: [[1, 1], [0, 0], [1, 0], [0, 1]]})
    found = as_json(tool, capsys, run, "--scored", tmp_path / "s.jsonl")
    accuracy = found["tags"][0]["accuracy"]
    assert accuracy["value"] == 0.5 and accuracy["stderr"] == pytest.approx((0.5 / 12) ** 0.5)
    assert accuracy["questions"] == 4 and found["difference"] is None
    printed = text(tool, capsys, run, "--scored", tmp_path / "s.jsonl")
    assert "50.0% ± 20.4% (standard error over 4 questions): g* itself" in printed


def test_a_difference_within_noise_is_called_so(tool, tmp_path, capsys):
    run = make_run(tmp_path / "run")
    mixed = {0: [[1]] * 11 + [[0]] * 9, 1: [[0]] * 9 + [[1]] * 10 + [[0]], 2: [[0]] * 20, 3: [[0]] * 20}
    write_scored(tmp_path / "s.jsonl", mixed)
    printed = text(tool, capsys, run, "--by", "accuracy", "--scored", tmp_path / "s.jsonl")
    assert "within noise of g*, by 5.0%" in printed and "on 20 common questions" in printed
    assert "Chosen by accuracy: <think1>" in printed
    few = {0: [[1]] * 3, 1: [[0]] * 3}
    write_scored(tmp_path / "few.jsonl", few)
    assert "within noise" in text(tool, capsys, run, "--scored", tmp_path / "few.jsonl")


def test_equal_accuracy_stays_with_g_star(tool, tmp_path, capsys):
    run = make_run(tmp_path / "run")
    write_scored(tmp_path / "s.jsonl", {t: [[1], [0]] for t in range(4)})
    assert as_json(tool, capsys, run, "--by", "accuracy", "--scored", tmp_path / "s.jsonl")["chosen"] == 1


def test_no_common_question(tool, tmp_path, capsys):
    run = make_run(tmp_path / "run")
    one = write_scored(tmp_path / "1.jsonl", {1: [[0]]})
    two = write_scored(tmp_path / "2.jsonl", {2: [[1]]}, first_id=5)
    printed = text(tool, capsys, run, "--scored", one, two)
    assert "g* has no samples on the same questions" in printed and "100.0% (standard error" in printed
    found = as_json(tool, capsys, run, "--scored", one, two)
    assert found["tags"][0]["accuracy"]["stderr"] is None  # of one question; not NaN, which is no JSON


def test_files_add_up_and_none_counts_twice(tool, tmp_path, capsys):
    run = make_run(tmp_path / "run")
    one = write_scored(tmp_path / "1.jsonl", {1: [[1, 1]]})
    two = write_scored(tmp_path / "2.jsonl", {1: [[0, 0], [0, 0]]})
    found = as_json(tool, capsys, run, "--scored", one, two, one, tmp_path / "." / "1.jsonl")
    assert found["scored"] == [str(one), str(two)]
    assert found["tags"][0]["accuracy"]["value"] == 0.25 and found["tags"][0]["accuracy"]["questions"] == 2


def test_tags_that_the_model_chose_are_left_out(tool, tmp_path, capsys):
    run = make_run(tmp_path / "run")
    own = write_scored(tmp_path / "own.jsonl", {1: [[1]] * 5}, mode="own")
    assert "--by accuracy needs samples" in refused(tool, run, "--by", "accuracy", "--scored", own)
    found = as_json(tool, capsys, run, "--scored", own)
    assert found["most_accurate"] is None and "5 samples are left out" in found["notes"][-1]


def test_folders_that_cannot_be_used(tool, tmp_path):
    assert "metrics.jsonl: cannot read the run" in refused(tool, tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "cannot read the run" in refused(tool, tmp_path / "empty")
    assert "cannot read the run" in refused(tool, __file__)
    assert "no step was trained" in refused(tool, make_run(tmp_path / "new", ()))
    single = [([0, 0], "ab")] * 3
    with_flag = make_run(tmp_path / "single", (single,) * 2, "matching: single\n")
    without = make_run(tmp_path / "one", (single,) * 2, None)
    one_trace = make_run(tmp_path / "one_trace", ([([0], "a")] * 3,) * 2, "matching: single\n")
    for run in (with_flag, without, one_trace):
        assert "trained with --matching single" in refused(tool, run)
    short = make_run(tmp_path / "short", (EPOCH,), questions=4)
    assert "no epoch of 4 questions is complete after 3 visits" in refused(tool, short)
    assert "no epoch is complete" in refused(tool, make_run(tmp_path / "unknown", (EPOCH,), questions=None))
    fewer = make_run(tmp_path / "fewer", settings="num_forking_tokens: 2\n")
    assert "not of one run" in refused(tool, fewer)
    broken = make_run(tmp_path / "broken", settings="matching: [\n")
    assert refused(tool, broken).startswith(f"{broken / 'config.yaml'}:")


def test_one_trace_a_question_under_one_tag_may_be_a_collapse(tool, tmp_path, capsys):
    run = make_run(tmp_path / "run", ([([0], "a"), ([0], "b")],) * 2, None, None)
    assert as_json(tool, capsys, run)["g_star"] == 0


def test_scores_that_cannot_be_used(tool, tmp_path):
    run = make_run(tmp_path / "run")
    assert "--by accuracy needs samples" in refused(tool, run, "--by", "accuracy")
    assert "cannot read the file" in refused(tool, run, "--scored", tmp_path / "no.jsonl")
    high = write_scored(tmp_path / "high.jsonl", {4: [[1]]})
    assert "tag 4, the run's are 0 to 3" in refused(tool, run, "--scored", high)
    one = write_scored(tmp_path / "1.jsonl", {1: [[1]]})
    two = write_scored(tmp_path / "2.jsonl", {1: [[1]]}, model="m2")
    assert "another model" in refused(tool, run, "--scored", one, two)
    (tmp_path / "bad.jsonl").write_text(one.read_text() + "{}\n")
    assert refused(tool, run, "--scored", tmp_path / "bad.jsonl").startswith(f"{tmp_path / 'bad.jsonl'}:2:")


def test_the_command_as_a_user_runs_it(tmp_path):
    def command(*arguments):
        return subprocess.run(
            [sys.executable, str(TOOL), *map(str, arguments)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )

    good = command(make_run(tmp_path / "run"))
    assert good.returncode == 0 and "g* = <think2>" in good.stdout and good.stderr == ""
    bad = command(tmp_path / "nothing")
    assert bad.returncode == 2 and bad.stdout == "" and bad.stderr.count("\n") == 1 and "Traceback" not in bad.stderr


def test_samples_of_another_model_are_refused(tool, tmp_path, capsys, monkeypatch):
    """Where the run has an export to compare with; where not, it says that it did not check."""
    run = make_run(tmp_path / "run")
    scored = write_scored(run / "eval" / "s.jsonl", {0: [[1, 1]], 1: [[1, 0]]}, model="m1")
    assert any("Not checked" in note for note in as_json(tool, capsys, run)["notes"])
    (run / "iter_0000002" / "hf").mkdir()
    monkeypatch.setattr(tag_selection, "model_fingerprint", lambda folder: "m1")
    assert not any("Not checked" in note for note in as_json(tool, capsys, run)["notes"])
    monkeypatch.setattr(tag_selection, "model_fingerprint", lambda folder: "m2")
    assert refused(tool, run).startswith(f"{scored}: samples of another model")
    monkeypatch.setattr(tag_selection, "MAX_FINGERPRINTED", -1)
    assert any("Not checked" in note for note in as_json(tool, capsys, run)["notes"])


def test_without_scores_it_says_how_to_give_them(tool, tmp_path, capsys):
    run = make_run(tmp_path / "run")
    assert "give them with --scored S.jsonl" in text(tool, capsys, run)
    assert "not fallen by more than 2 standard deviations" in text(tool, capsys, run)
    assert "not fallen by more than 0.5 standard deviations" in text(tool, capsys, run, "--tolerance", 0.5)
