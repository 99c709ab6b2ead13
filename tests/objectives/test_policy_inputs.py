"""What policy learning reads: nothing is lost, nothing counts twice, and the order of lines decides nothing."""

from __future__ import annotations

import dataclasses
import random
import tracemalloc

import msgspec
import numpy as np
import pytest

from megatron_ssft.formats.rollouts import read_rollouts
from megatron_ssft.objectives.policy.inputs import fork_batch
from tests.helpers.policy_files import TAGS, edit_lines, is_right, read, write_files


def told(inputs):
    """Completions as plain values, in their order: (question's id, tag, ids)."""
    return [(inputs.questions[c.question].id, c.tag, tuple(c.ids.tolist())) for c in inputs.completions]


def shuffled(path, seed=1):
    lines = path.read_text().splitlines(keepends=True)
    random.Random(seed).shuffle(lines)
    path.write_text("".join(lines))


# -- rewards of tags -------------------------------------------------------------------------------------------------


def test_rewards_stand_beside_their_questions(tmp_path):
    files = write_files(tmp_path, samples=2)
    inputs = read(files)
    assert [q.id for q in inputs.questions] == [f"q{i}" for i in range(6)]
    expected = [[sum(is_right(i, tag, s) for s in range(2)) / 2 for tag in range(TAGS)] for i in range(6)]
    np.testing.assert_array_equal(inputs.reward_QN, expected)
    assert (inputs.n_QN == 2).all() and inputs.model == "model-a"


def test_order_of_lines_does_not_matter(tmp_path):
    files = write_files(tmp_path)
    before = read(files, anchor_completions=3)
    shuffled(files.rewards)
    shuffled(files.rollouts)
    after = read(files, anchor_completions=3)
    assert told(after) == told(before) and len(told(after)) > 8
    np.testing.assert_array_equal(after.reward_QN, before.reward_QN)
    assert after.fingerprint == before.fingerprint


def test_questions_without_rewards_are_left_out_and_counted(tmp_path):
    files = write_files(tmp_path)
    edit_lines(files.rewards, lambda row: None if row["id"] in ("q0", "q3") else row)
    inputs = read(files)
    assert [q.id for q in inputs.questions] == ["q1", "q2", "q4", "q5"]
    np.testing.assert_array_equal(inputs.reward_QN[0], read(write_files(tmp_path / "all")).reward_QN[1])
    assert {id for id, _, _ in told(inputs)} <= {"q1", "q2", "q4", "q5"}
    assert "2 of 6 questions have no rewards and are left out" in inputs.notes


def test_completions_are_those_of_the_file(tmp_path):
    files = write_files(tmp_path)
    stored = {(r.id, r.tag, r.token_ids) for r in read_rollouts(files.rollouts)}
    assert set(told(read(files))) == stored


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"anchor_completions": 2, "rescore_interval": 0}, 6),  # 2 x 3 steps
        ({"anchor_completions": 2, "rescore_completions": 10}, 16),  # those of the anchor are others
        ({"anchor_completions": 100}, 36),
        ({"anchor": "none", "rescore_completions": 4}, 4),
        ({"anchor": "none", "rescore_interval": 0}, 0),
    ],
)
def test_no_more_completions_are_kept_than_the_run_uses(tmp_path, changes, expected):
    assert len(read(write_files(tmp_path), **changes).completions) == expected


def test_token_ids_of_other_completions_are_never_held(tmp_path):
    files = write_files(tmp_path, change=lambda r: msgspec.structs.replace(r, token_ids=tuple(range(250)) * 80))
    tracemalloc.start()
    inputs = read(files, seq_length=30000, anchor_completions=1, rescore_interval=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(inputs.completions) == 3
    assert peak < 20000 * 4 * 36 / 2  # of 36 completions as int32; the one being parsed is larger than as an array


def test_a_larger_pool_begins_with_the_smaller_and_seeds_differ(tmp_path):
    files = write_files(tmp_path)
    small = told(read(files, anchor_completions=2, rescore_interval=0))
    assert told(read(files, anchor_completions=2, rescore_interval=0, planned_iters=6))[:6] == small
    assert told(read(files, anchor_completions=2, rescore_interval=0, seed=6)) != small


def test_without_the_rollout_file_and_without_an_anchor_a_note_says_what_is_not_measured(tmp_path):
    files = write_files(tmp_path)
    files.rollouts.unlink()
    inputs = read(files, anchor="none")
    assert inputs.completions == ()
    assert any(str(files.rollouts) in note and "not measured" in note for note in inputs.notes)
    assert not any("not measured" in note for note in read(files, anchor="none", rescore_interval=0).notes)


def test_truncation_and_equal_rewards_are_noted(tmp_path):
    files = write_files(tmp_path)
    edit_lines(files.rewards, lambda row: row | {"truncated": [1, 0, 0]})
    edit_lines(files.rewards, lambda row: row | {"sum": [1, 1, 1]} if row["id"] in ("q1", "q2") else row)
    notes = read(files).notes
    assert any(note.startswith("17% of the samples ended at their token limit") for note in notes)
    assert "2 of 6 questions have the same reward under every tag" in notes


def test_empty_completions_are_left_out_and_counted(tmp_path):
    def empty(rollout):
        return msgspec.structs.replace(rollout, token_ids=()) if rollout.id == "q2" and rollout.tag == 1 else rollout

    inputs = read(write_files(tmp_path, change=empty))
    assert len(inputs.completions) == 34 and "2 of 36 completions without tokens (5.6%) are left out" in inputs.notes


def test_held_out_questions_that_are_trained_on_are_noted(tmp_path):
    files = write_files(tmp_path)
    inputs = read(files, eval_data=str(write_files(tmp_path / "more", questions=8).data))
    assert len(inputs.held_out) == 8 and "6 of 8 questions of --eval-data are trained on" in inputs.notes


# -- rewards of completions ------------------------------------------------------------------------------------------


def groups(inputs):
    """Question's id -> [(tag, ids, reward)], sorted."""
    found = {}
    for (id, tag, ids), completion in zip(told(inputs), inputs.completions):
        found.setdefault(id, []).append((tag, ids, completion.reward))
    return {id: sorted(group) for id, group in found.items()}


@pytest.mark.parametrize("mode", ["each", "none"])
def test_grpo_takes_every_completion_with_its_own_reward(tmp_path, mode):
    files = write_files(tmp_path, samples=3, mode=mode)
    inputs = read(files, objective="grpo", rewards=None, rollouts=str(files.rollouts), scores=str(files.scores))
    assert inputs.tagged == (mode == "each")
    expected = {}
    for r in read_rollouts(files.rollouts):
        reward = float(is_right(int(r.id[1:]), r.tag or 0, r.sample))
        expected.setdefault(r.id, []).append((r.tag or 0, r.token_ids, reward))
    assert groups(inputs) == {id: sorted(group) for id, group in expected.items()}


def test_grpo_leaves_out_questions_of_one_reward_unless_a_kl_holds_them(tmp_path):
    files = write_files(tmp_path)
    edit_lines(files.scores, lambda row: row | {"correct": True} if row["id"] in ("q0", "q4") else row)
    edit_lines(files.scores, lambda row: None if row["id"] == "q2" else row)
    edit_lines(files.rollouts, lambda row: None if row["id"] == "q2" else row)
    inputs = read(files, objective="grpo")
    assert [q.id for q in inputs.questions] == ["q1", "q3", "q5"] and set(groups(inputs)) == {"q1", "q3", "q5"}
    assert any(note.startswith("3 of 6 questions without completions") for note in inputs.notes)
    inputs = read(files, objective="grpo", kl_coef=0.1)
    assert [q.id for q in inputs.questions] == ["q0", "q1", "q3", "q4", "q5"]
    assert {reward for _, _, reward in groups(inputs)["q4"]} == {1.0}


def test_grpo_first_completions_are_a_sample_of_all_questions(tmp_path):
    inputs = read(write_files(tmp_path, questions=30), objective="grpo")
    assert len({c.question for c in inputs.completions[:30]}) > 12  # the first five questions have 30


def test_grpo_order_of_lines_does_not_matter(tmp_path):
    files = write_files(tmp_path)
    before = read(files, objective="grpo")
    for path in (files.rewards, files.rollouts, files.scores):
        shuffled(path)
    after = read(files, objective="grpo")
    assert told(after) == told(before) and after.fingerprint == before.fingerprint


def test_grpo_needs_of_the_rewards_only_where_the_others_are(tmp_path):
    files = write_files(tmp_path)
    before = read(files, objective="grpo").fingerprint
    edit_lines(files.rewards, lambda row: row | {"n": [0, 0, 0]})
    assert read(files, objective="grpo").fingerprint == before
    by_flags = {"rewards": None, "rollouts": str(files.rollouts), "scores": str(files.scores)}
    assert read(files, objective="grpo", **by_flags).fingerprint == before


# -- batches ---------------------------------------------------------------------------------------------------------


def test_completion_batch_keeps_what_belongs_together(tmp_path):
    inputs = read(write_files(tmp_path))
    which = [7, 0, 12, 3, 7]
    batch, assignments, numbers = inputs.completion_batch(which)
    assert sorted(n for group in numbers for n in group) == sorted(which)
    for visit, of_question, assignment, group in zip(batch.visits, batch.sets, assignments, numbers):
        assert of_question.id == inputs.questions[visit.index].id
        for ids, tag, number in zip(of_question.completion_ids, assignment.tags, group, strict=True):
            completion = inputs.completions[number]
            assert (completion.question, completion.tag) == (visit.index, tag)
            np.testing.assert_array_equal(ids, completion.ids)


def test_fork_batch_has_the_tags_as_completions(tmp_path):
    inputs = read(write_files(tmp_path))
    batch = fork_batch(inputs.questions, [(1, 2), (3,), (4, 5, 6)])
    assert [s.id for s in batch.sets] == [q.id for q in inputs.questions]
    assert all([c.tolist() for c in s.completion_ids] == [[1, 2], [3], [4, 5, 6]] for s in batch.sets)


# -- fingerprint -----------------------------------------------------------------------------------------------------


def replace_token(row):
    return row | {"token_ids": [65, *row["token_ids"][1:]]}


CHANGES = {
    "a question": (
        "data",
        lambda row: row | {"question": row["question"].replace("?", "!")},
        {"anchor": "none", "older": True},  # rewards that say which prompt they are of are refused
    ),
    "an id": ("data", lambda row: row, {"rename": True}),
    "a sum": ("rewards", lambda row: row | {"sum": [0, 0, 1]}, {}),
    "a count": ("rewards", lambda row: row | {"n": [2, 2, 3]}, {}),
    "a question less": ("rewards", lambda row: None if row["id"] == "q5" else row, {"anchor": "none"}),
    "a token": ("rollouts", replace_token, {}),
    "a score": ("scores", lambda row: row | {"correct": not row["correct"]}, {"objective": "grpo"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_fingerprint_changes_with_whatever_decides_a_step(tmp_path, name):
    file, edit, changes = CHANGES[name]
    files = write_files(tmp_path)
    changes = dict(changes)
    if changes.get("anchor") == "none":
        changes["rescore_interval"] = 0
    if changes.pop("older", False):
        edit_lines(files.rewards, lambda row: {key: value for key, value in row.items() if key != "prompt"})
    renamed = changes.pop("rename", False)
    before = read(files, **changes).fingerprint
    if renamed:
        for path in dataclasses.astuple(files):
            path.write_text(path.read_text().replace('"q3"', '"other"'))
    else:
        path, seen = getattr(files, file), []
        edit_lines(path, lambda row: row if seen or row["id"] != "q5" else (seen.append(1), edit(row))[1])
    assert read(files, **changes).fingerprint != before


def test_fingerprint_changes_with_what_is_drawn(tmp_path):
    files = write_files(tmp_path)
    assert read(files, anchor_completions=2, rescore_completions=1).fingerprint != read(files).fingerprint
    alone = {"anchor": "none", "rescore_interval": 0}
    assert read(files, seed=6, **alone).fingerprint != read(files, **alone).fingerprint


def test_fingerprint_changes_with_the_tag_of_a_completion(tmp_path):
    found = []
    for tag in range(2):

        def only(rollout, tag=tag):
            return msgspec.structs.replace(rollout, token_ids=(65,)) if rollout.tag == tag else None

        files = write_files(tmp_path / str(tag), change=only)
        rewards = str(write_files(tmp_path / "all").rewards)
        found.append(read(files, rewards=rewards, rollouts=str(files.rollouts)))
    assert [c.ids.tolist() for c in found[0].completions] == [c.ids.tolist() for c in found[1].completions]
    assert found[0].fingerprint != found[1].fingerprint


def test_fingerprint_does_not_change_with_paths_and_what_is_only_told(tmp_path):
    before = read(write_files(tmp_path / "a")).fingerprint
    files = write_files(tmp_path / "b" / "c")
    edit_lines(files.rewards, lambda row: row | {"truncated": [1, 1, 1], "verifier": "math"})
    edit_lines(files.rollouts, lambda row: row | {"text": "another spelling"})
    again = read(files, eval_data=str(files.data), lr=0.1, save=str(tmp_path / "elsewhere"))
    assert again.fingerprint == before


def test_completions_with_and_without_tags_are_told_apart(tmp_path):
    def only_first(rollout):
        return rollout if rollout.tag in (None, 0) else None

    each = write_files(tmp_path / "a", samples=3, change=only_first)
    none = write_files(tmp_path / "b", samples=3, mode="none")
    by_flags = [{"rewards": None, "rollouts": str(f.rollouts), "scores": str(f.scores)} for f in (each, none)]
    tagged, plain = (read(f, objective="grpo", **flags) for f, flags in zip((each, none), by_flags))
    assert told(tagged) == told(plain) and tagged.fingerprint != plain.fingerprint
