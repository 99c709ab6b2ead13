"""Samples that ended at their token limit: counted, said, and refused where they are most of what is learned from."""

from __future__ import annotations

import re

import msgspec
import pytest

from megatron_ssft.errors import UserError
from tests.helpers.hf_models import CHATML, chatml_tokenizer
from tests.helpers.policy_files import edit_lines, read, write_files


def cut(of):
    """A change of rollouts: the samples for which `of(question, tag, sample)` holds ended at their limit."""

    def change(rollout):
        ends = of(int(rollout.id[1:]), rollout.tag, rollout.sample)
        return msgspec.structs.replace(rollout, finish_reason="length" if ends else "stop")

    return change


def by_objective(files, objective, **changes):
    return read(files, objective=objective, **changes)


OBJECTIVES = ("gfpo-exact", "gfpo-sampled", "grpo")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_complete_samples_need_no_word(tmp_path, objective):
    inputs = by_objective(write_files(tmp_path), objective)
    assert not any("limit" in note for note in inputs.notes)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_cut_samples_are_counted(tmp_path, objective):
    inputs = by_objective(write_files(tmp_path, change=cut(lambda q, tag, s: tag == 1 and s == 0)), objective)
    # of 6 questions, 3 tags and 2 samples each
    assert any(re.match(r"17% of the samples ended at their token limit \(6 of 36\)", n) for n in inputs.notes)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_cut_sample_is_counted_too(tmp_path, objective):
    inputs = by_objective(write_files(tmp_path, change=cut(lambda *place: place == (0, 0, 0))), objective)
    assert any("(1 of 36)" in note for note in inputs.notes)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_mostly_cut_samples_are_refused(tmp_path, objective):
    files = write_files(tmp_path, change=cut(lambda q, tag, s: tag > 0))
    with pytest.raises(UserError) as caught:
        by_objective(files, objective)
    line = str(caught.value)
    assert "24 of 36" in line and "--max-truncated-share 0.5" in line and "--max-new-tokens" in line
    assert line.startswith(str(files.rollouts if objective == "grpo" else files.rewards)) and "\n" not in line
    assert any("(24 of 36)" in note for note in by_objective(files, objective, max_truncated_share=0.7).notes)


def test_the_share_of_each_question_is_kept(tmp_path):
    files = write_files(tmp_path, change=cut(lambda q, tag, s: q == 2 and tag == 0))
    inputs = read(files)
    assert inputs.truncated_share([0, 1]) == 0.0
    assert inputs.truncated_share([2]) == pytest.approx(2 / 6) and inputs.truncated_share([2, 3]) == pytest.approx(
        1 / 6
    )


def test_completions_without_tokens_are_counted_with_their_share(tmp_path):
    def empty(rollout):
        return msgspec.structs.replace(rollout, token_ids=()) if rollout.id == "q2" and rollout.tag == 1 else rollout

    for objective in ("gfpo-exact", "grpo"):
        notes = by_objective(write_files(tmp_path / objective, change=empty), objective).notes
        assert any(note.startswith("2 of 36 completions without tokens (5.6%) are left out") for note in notes)


OPENED = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")


def test_what_the_template_does_to_the_questions_is_said(tmp_path):
    """As in SSFT: no template at all, or one that opens a thought before the tag."""
    files = write_files(tmp_path)
    assert "no chat template: 6 of 6 questions (100.0%) are rendered as plain text" in read(files).notes
    # measured with no mark of the prompt, since the prompts of these rewards were made by no template
    edit_lines(files.rewards, lambda row: {name: value for name, value in row.items() if name != "prompt"})
    for name, template in (("plain", CHATML), ("opened", OPENED)):
        chatml_tokenizer(tmp_path / name, template=template)
        kind = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tmp_path / name), "anchor": "none"}
        notes = read(files, **kind, rescore_interval=0, eval_data=str(files.data)).notes
        opened = [note for note in notes if "<think>" in note]
        assert len(opened) == (2 if name == "opened" else 0) and all("6 of 6 questions" in note for note in opened)
        assert sum(note.startswith("--eval-data: ") for note in opened) == len(opened) / 2
        assert not any("no chat template" in note for note in notes)


@pytest.mark.parametrize("objective", ["gfpo-exact", "gfpo-sampled"])
def test_samples_without_a_verdict_are_counted(tmp_path, objective):
    files = write_files(tmp_path)
    missing = {"sum": [0, 2, 0], "unjudged": [2, 0, 1]}
    edit_lines(files.rewards, lambda row: row | missing if row["id"] == "q0" else row)
    notes = by_objective(files, objective, anchor="none").notes
    assert "3 of 36 samples got no verdict, and count as not correct" in notes
