"""Inputs of policy learning that are refused, in one line that names the file."""

from __future__ import annotations

import msgspec
import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.formats.rollouts import read_rollouts
from megatron_ssft.objectives.policy import completions as completions_module
from tests.helpers.policy_files import edit_lines, read, write_files


def refusal(files, **changes):
    with pytest.raises(UserError) as caught:
        read(files, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(field, value, tag=1):
    """A change of q3's completions under one tag."""
    return lambda r: msgspec.structs.replace(r, **{field: value}) if r.id == "q3" and r.tag == tag else r


BAD_ROLLOUTS = {
    "another prompt": (
        lambda r: msgspec.structs.replace(r, prompt="0" * 16) if r.id == "q3" else r,
        "id 'q3', tag 0, sample 0: made from another prompt",
    ),
    "two prompts": (changed("prompt", "0" * 16), ":21: id 'q3' has another prompt here than on line 19"),
    "token beyond the vocabulary": (changed("token_ids", (65, 600)), "token 600, the vocabulary has 260"),
    "foreign tag": (changed("tag", 7), "tag 7, sample 0: not one of the model's 3 tags"),
    "tag missing": (changed("tag", None), "tag None, sample 0: not one of the model's 3 tags"),
    "too long": (changed("token_ids", (65,) * 64), "--seq-length 76, not 64"),
}


@pytest.mark.parametrize("name", BAD_ROLLOUTS)
def test_bad_rollout(tmp_path, name):
    change, inside = BAD_ROLLOUTS[name]
    good = write_files(tmp_path / "good")
    bad = write_files(tmp_path / "bad", change=change)
    for extra in ({}, {"objective": "grpo", "scores": str(bad.scores)}):
        line = refusal(good, rollouts=str(bad.rollouts), **extra)
        assert line.startswith(str(bad.rollouts)) and inside in line


@pytest.mark.parametrize("objective", ["gfpo-exact", "gfpo-sampled"])
def test_rewards_that_say_nothing_about_the_choice(tmp_path, objective):
    """Questions that every tag solves, that none does, and that all solve as often."""
    files = write_files(tmp_path)
    sums = {"q0": [0, 0, 0], "q1": [1, 1, 1]}
    edit_lines(files.rewards, lambda row: row | {"sum": sums.get(row["id"], [2, 2, 2])})
    line = refusal(files, objective=objective)
    assert line.startswith(f"{files.rewards}: all of its 6 questions have the same reward under every tag")
    edit_lines(files.rewards, lambda row: row | {"n": [2, 4, 6], "sum": [1, 2, 3]})
    assert "the same reward under every tag" in refusal(files, objective=objective)
    edit_lines(files.rewards, lambda row: row | {"sum": [1, 2, 3] if row["id"] != "q4" else [1, 2, 4]})
    assert "5 of 6 questions have the same reward under every tag" in read(files, objective=objective).notes


def test_longest_completion_that_fits(tmp_path):
    files = write_files(tmp_path, change=changed("token_ids", (65,) * 52))  # prompt 11, tag 1
    assert len(read(files).completions) == 36
    assert "--seq-length 64, not 63" in refusal(files, seq_length=63)


@pytest.mark.parametrize("anchor", ["none", "kl"])
@pytest.mark.parametrize("objective", ["gfpo-exact", "gfpo-sampled"])
def test_other_questions_under_the_same_ids(tmp_path, anchor, objective):
    files = write_files(tmp_path)
    edit_lines(files.data, lambda row: row | {"question": "how much is this?"} if row["id"] in ("q2", "q3") else row)
    changes = {"anchor": anchor, "objective": objective} | ({"rescore_interval": 0} if anchor == "none" else {})
    line = refusal(files, **changes)
    assert line.startswith(
        f"{files.rewards}:3: id 'q2' was measured with another prompt than {files.data}:3 gives, as 2 of 6"
    )


def test_rewards_of_an_earlier_version_do_not_say_which_questions_they_are_of(tmp_path):
    files = write_files(tmp_path)
    older = {"q1", "q4"}

    def without_prompt(row):
        return {name: row[name] for name in row if name != "prompt" or row["id"] not in older}

    edit_lines(files.rewards, without_prompt)
    (note,) = [note for note in read(files, anchor="none", rescore_interval=0).notes if "earlier version" in note]
    assert note.startswith(f"{files.rewards}: 2 of 6 rewards were written by an earlier version")
    edit_lines(files.rollouts, without_prompt)
    notes = [note for note in read(files).notes if "earlier version" in note]
    assert len(notes) == 2 and notes[1].startswith(f"{files.rollouts}: 12 completions were written by an earlier")
    edit_lines(files.data, lambda row: row | {"question": "another?"} if row["id"] == "q0" else row)
    assert "id 'q0' was measured with another prompt" in refusal(files)


def test_scores_of_other_completions(tmp_path):
    """Made by the same model with the same settings, at the same places: of another seed, length or question."""
    files = write_files(tmp_path / "a")
    changes = {"seed": 4000, "token_ids": (65, 66, 67, 256), "prompt": "0" * 16}
    for name, value in changes.items():

        def change(rollout, name=name, value=value):
            return msgspec.structs.replace(rollout, **{name: value}) if rollout.id == "q3" else rollout

        other = write_files(tmp_path / name, change=change)
        line = refusal(files, objective="grpo", scores=str(other.scores))
        assert line.startswith(f"{other.scores}: id 'q3', tag 0, sample 0: scored for another completion than ")
        assert str(files.rollouts) in line
    older = edit_lines(files.scores, lambda row: {k: v for k, v in row.items() if k != "prompt"})
    assert len(read(files, objective="grpo", scores=str(older)).completions) > 0


def test_rollouts_of_another_model(tmp_path):
    files, other = write_files(tmp_path / "a"), write_files(tmp_path / "b", model="model-b")
    for extra in ({}, {"objective": "grpo", "scores": str(other.scores)}):
        line = refusal(files, rollouts=str(other.rollouts), **extra)
        assert line.startswith(f"{other.rollouts}: completions of another model (model-b)")


def test_rollouts_of_other_questions(tmp_path):
    files = write_files(tmp_path)
    edit_lines(files.rollouts, lambda row: row | {"id": "x" + row["id"]})
    assert "holds no completion of the questions" in refusal(files)


def test_rollouts_without_tags_or_with_tags_of_the_models_choice(tmp_path):
    files, none = write_files(tmp_path / "a"), write_files(tmp_path / "b", mode="none")
    own = write_files(tmp_path / "c", mode="own")
    assert "completions without tags" in refusal(files, rollouts=str(none.rollouts))
    assert "in mode own" in refusal(files, rollouts=str(own.rollouts))
    assert "in mode own" in refusal(own, objective="grpo")


@pytest.mark.parametrize("torn", [True, False])
def test_rollouts_torn_empty_or_twice(tmp_path, torn):
    files = write_files(tmp_path)
    whole = files.rollouts.read_bytes()
    files.rollouts.write_bytes(whole[:-9])
    assert refusal(files).startswith(f"{files.rollouts}:36: not valid JSON; its writer was stopped: resume it")
    files.rollouts.write_bytes(b"")
    assert refusal(files).startswith(f"{files.rollouts}:1: the file is empty")
    files.rollouts.write_bytes(whole + whole.splitlines(keepends=True)[3])
    assert "is already on line 4" in refusal(files)


def test_rollouts_that_change_between_the_passes(tmp_path, monkeypatch):
    files = write_files(tmp_path)
    passes = []

    def shrinking(path):
        passes.append(path)
        rows = list(read_rollouts(path))
        return iter(rows if len(passes) == 1 else rows[:-5])

    monkeypatch.setattr(completions_module, "read_rollouts", shrinking)
    assert "changed while it was read" in refusal(files)


def test_rollouts_that_are_gone_or_not_named(tmp_path):
    files = write_files(tmp_path)
    files.rollouts.unlink()
    line = refusal(files)
    assert line.startswith(f"{files.rewards}: names {files.rollouts}") and "gone" in line
    assert "--rollouts R.jsonl, or --anchor none" in line
    assert "--on-stale-rewards stop" in refusal(files, anchor="none", on_stale_rewards="stop")
    assert "; give --rollouts" in refusal(files, objective="grpo")
    assert refusal(files, rollouts=str(files.rollouts)).startswith(f"{files.rollouts}: cannot read the file")
    edit_lines(files.rewards, lambda row: {k: v for k, v in row.items() if k not in ("rollouts", "scores")})
    assert "does not say where its rollouts are" in refusal(files)


def test_scores_that_are_gone_incomplete_or_of_others(tmp_path):
    files = write_files(tmp_path / "a")
    other = write_files(
        tmp_path / "b", change=lambda r: msgspec.structs.replace(r, sampling={"mode": "each", "seed": 2})
    )
    line = refusal(files, objective="grpo", scores=str(other.scores))
    assert line.startswith(f"{other.scores}: not the scores of {files.rollouts}") and "temperature" in line
    edit_lines(files.scores, lambda row: None if row["id"] == "q1" and row["tag"] else row)
    assert "4 of 36 completions" in refusal(files, objective="grpo")
    files.scores.write_bytes(b"")
    assert refusal(files, objective="grpo").startswith(f"{files.scores}:1: the file is empty")
    files.scores.unlink()
    line = refusal(files, objective="grpo")
    assert line.startswith(f"{files.rewards}: names {files.scores}") and line.endswith("give --scores")


@pytest.mark.parametrize("right", [True, False])
def test_grpo_with_all_rewards_equal(tmp_path, right):
    files = write_files(tmp_path)
    edit_lines(files.scores, lambda row: row | {"correct": right})
    for kl in (0.0, 0.1):
        assert "completions of one reward only" in refusal(files, objective="grpo", kl_coef=kl)


def test_rewards_of_samples_without_tags(tmp_path):
    files = write_files(tmp_path, mode="none")
    assert refusal(files, objective="grpo").startswith(f"{files.rewards}:1: the file is empty, as with samples that")


def test_rewards_of_other_questions(tmp_path):
    files = write_files(tmp_path)
    edit_lines(files.rewards, lambda row: row | {"id": "x" + row["id"]} if row["id"] > "q3" else row)
    line = refusal(files)
    assert line.startswith(f"{files.rewards}:5: id 'xq4' is not in --data, as 2 of 6")


def test_questions_that_are_absent_wrong_or_too_long(tmp_path):
    files = write_files(tmp_path)
    assert refusal(files, eval_data=str(tmp_path / "none")).startswith(f"{tmp_path}/none:1: cannot read the file")
    edit_lines(files.data, lambda row: row | {"question": "x" * 63} if row["id"] == "q2" else row)
    line = refusal(files)
    assert line.startswith(f"{files.data}:3: the prompt is 64 tokens and a tag up to 1") and "--seq-length 64" in line
    files.data.write_text("")
    assert refusal(files).startswith(f"{files.data}:1: the file is empty")
    files.data.unlink()
    assert refusal(files).startswith(f"{files.data}:1: cannot read the file")
