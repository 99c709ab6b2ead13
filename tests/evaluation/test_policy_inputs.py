"""Inputs of a policy's evaluation that do not belong together, and the program itself."""

from __future__ import annotations

import importlib.util
import json

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from megatron_ssft.data.questions import question_mark, read_questions
from megatron_ssft.errors import UserError
from megatron_ssft.evaluation.policy_evaluation import Grouping, evaluate_policy
from megatron_ssft.evaluation.policy_inputs import load_inputs
from megatron_ssft.evaluation.scored_runs import read_golds, read_groups
from megatron_ssft.formats.rollouts import mark
from megatron_ssft.hf.fingerprints import model_fingerprint
from tests.helpers.paths import ROOT
from tests.helpers.policy_evaluations import (
    AFTER,
    BEFORE,
    GREEDY,
    GROUPS,
    GROUPS_TRAIN,
    MODES,
    OWN,
    OWN_BEFORE,
    POLICY,
    REWARDS,
    began,
    each,
    evaluated,
    make_files,
    plain,
    policy_rows,
    reward_rows,
    rows_of_all,
    write_lines,
)

TEMPERATURE = {"mode": "each", "temperature": 1.0, "seed": 1}
REFUSED = {
    "a question is missing": ({"own": began("own", {q: OWN[q] for q in "abc"})}, "own.jsonl: .*missing, such as 'd'"),
    "a question is new": ({"after": each("after", {**AFTER, "e": ["1", "1"]})}, "after.jsonl: .* in it, such as 'e'"),
    "all questions differ": (
        {"before": each("before", {"z": ["1", "1"]})},
        "own.jsonl: .*1 of its .* 'z', 4 are not in it, such as 'a'",
    ),
    "before and after swapped": (
        {"before": each("after", AFTER), "after": each("before", BEFORE)},
        "own.jsonl: of another model .* than --after",
    ),
    "the same file twice": ({"after": each("before", BEFORE)}, "after.jsonl: of the same model as --before"),
    "own of the model before": ({"own": began("own", OWN, model="old" * 16)}, "own.jsonl: of the same model as --own"),
    "own of a third model": ({"own_greedy": began("own_greedy", GREEDY, model="x")}, "own_greedy.jsonl: of another"),
    "own before of the model after": (
        {"own_before": began("own_before", OWN_BEFORE, model="new" * 16)},
        "own.jsonl: of the same model as --own-before",
    ),
    "own and greedy swapped": (
        {"own": began("own_greedy", GREEDY), "own_greedy": began("own", OWN)},
        "own.jsonl: generated with --tags own-greedy, which is no --own; give one generated with --tags own$",
    ),
    "each in place of own": ({"own": each("after", AFTER)}, "own.jsonl: generated with --tags each"),
    "own in place of each": ({"before": began("own_before", OWN_BEFORE)}, "before.jsonl: generated with --tags own,"),
    "grpo under every tag": ({"grpo": each("grpo_x", AFTER, model="rl")}, "grpo.jsonl: generated with --tags each"),
    "grpo that did not train": ({"grpo": began("grpo_before", plain(GREEDY))}, "same model as --grpo-before"),
    "a tag is missing": ({"after": each("after", {q: [t[0]] for q, t in AFTER.items()})}, "after.jsonl: has tags"),
    "a tag is missing once": ({"after": each("after", {**AFTER, "c": ["11", ""]})}, "'c' has no samples under tag 1"),
    "own knows more tags": ({"own": began("own", {**OWN, "a": "2+"})}, "own.jsonl: has samples of tag 2"),
    "hotter after": ({"after": each("after", AFTER, sampling=TEMPERATURE)}, "temperature 0.7 before and 1.0"),
    "another verifier": ({"after": each("after", AFTER, verifier="math")}, "after.jsonl: not made like --before: v"),
    "rewards of held-out questions": ({"rewards": reward_rows({"a": [1, 1]})}, "rewards.jsonl: 1 of the questions are"),
    "rewards of three tags": (
        {"rewards": [{**reward_rows()[0], "tags": [0, 1, 2], "n": [1] * 3, "sum": [1] * 3, "truncated": [0] * 3}]},
        "rewards.jsonl",
    ),
    "no rewards": ({"rewards": []}, "rewards.jsonl:1: the file is empty"),
    "no policy": ({"policy": []}, "policy.jsonl:1: the file is empty"),
    "a policy of training questions": ({"policy": policy_rows(split="train")}, "no policy of held-out questions"),
    "a policy that never ended": ({"policy": policy_rows({0: POLICY[0]})}, "the policy at step 0 alone"),
    "a policy of other questions": (
        {"policy": policy_rows({0: POLICY[0], 5: {"a": [1, 0]}})},
        "step 5 lacks 3 of the questions of --before, such as 'b'",
    ),
    "a policy of the same ids but other prompts": (
        {"policy": [row | {"prompt": "0" * 16} if row["id"] == "c" else row for row in policy_rows()]},
        "policy.jsonl: step 0 is of another prompt than .*before.jsonl for 1 questions, such as 'c'",
    ),
    "a policy of another run": (
        {"policy": policy_rows(model="odd" * 16)},
        "policy.jsonl: of a run that began with another model .oddoddoddodd. than that of .*before.jsonl .oldold",
    ),
    "other questions under the same ids": (
        {"own": began("own", OWN, prompt="0" * 16)},
        "own.jsonl: 4 of its questions were asked with another prompt than in .*before.jsonl, such as 'a'",
    ),
    "one other question under the same id": (
        {"after": [*each("after", {q: AFTER[q] for q in "abc"}), *each("after", {"d": AFTER["d"]}, prompt="1" * 16)]},
        "after.jsonl: 1 of its questions were asked with another prompt than in .*before.jsonl, such as 'd'",
    ),
    "a policy of three tags": (
        {"policy": policy_rows({k: dict.fromkeys("abcd", [1, 0, 0]) for k in (0, 1)})},
        "a policy of 3 tags",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_do_not_belong_together(tmp_path, case):
    replaced, said = REFUSED[case]
    with pytest.raises(UserError, match=said) as error:
        evaluated(tmp_path, **replaced)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_question_without_a_group(tmp_path):
    scored, rewards, policy = make_files(tmp_path)
    inputs = load_inputs(scored, rewards, policy)
    for grouping, said in (
        (Grouping("g", {"a": "x"}), "'b' is not in --data;"),
        (Grouping("g", GROUPS, {"t1": "x"}), "'t2' is not in --data-train"),
        (Grouping("g", GROUPS, dict.fromkeys(REWARDS, "x")), "no question of the rewards is of g 'y'"),
    ):
        with pytest.raises(UserError, match=said):
            evaluate_policy(inputs, grouping)


def test_what_need_not_be_wrong_is_remarked(tmp_path):
    own = began("own", OWN, sampling={"mode": "own", "temperature": 1.0})
    record = evaluated(tmp_path, ("before", "after", "own", "own_greedy"), own=own, rewards=reward_rows(model="b" * 9))
    assert any("rewards are of another model" in line for line in record["remarks"])
    assert any(line.startswith("--own was generated with temperature 1.0 instead of 0.7") for line in record["remarks"])
    assert any(line.startswith("Not checked: whether the policy's run ended") for line in record["remarks"])
    assert len(record["remarks"]) == 3


def test_files_of_earlier_versions_are_joined_by_ids_and_that_is_said_once(tmp_path):
    def older(rows):
        return [msgspec.structs.replace(row, prompt=None) for row in rows]

    rows = {role: older(of) for role, of in rows_of_all().items()}
    policy = [{name: row[name] for name in row if name not in ("prompt", "model")} for row in policy_rows()]
    record = evaluated(tmp_path, ("before", "after", "own", "own_greedy"), policy=policy, **rows)
    (marks, policy_model, _) = record["remarks"]
    assert marks == "4 of 4 scored files lack marks of prompts (older version): compared by ids."
    assert (
        policy_model == "The policy was written by an earlier version and does not say with which model its run began."
    )
    assert record["rows"] == evaluated(tmp_path / "new", ("before", "after", "own", "own_greedy"))["rows"]


def test_two_tokenizers_mark_the_same_question_differently(tmp_path):
    """A baseline of another family is no other set of questions."""
    grpo = began("grpo", plain(GREEDY), prompt="0" * 16, tokenizer="u")
    baseline = began("grpo_before", plain(OWN_BEFORE), prompt="0" * 16, tokenizer="u")
    evaluated(tmp_path, grpo=grpo, grpo_before=baseline)
    with pytest.raises(UserError, match="grpo.jsonl: 4 of its questions were asked with another prompt"):
        evaluated(tmp_path, grpo=began("grpo", plain(GREEDY), prompt="0" * 16))


def test_the_policy_is_that_of_the_run_that_ended_with_the_model_after(tmp_path):
    """Two runs from one model over the same questions: only the export tells them apart."""
    hf = tmp_path / "iter_0000005" / "hf"
    hf.mkdir(parents=True)
    (hf / "config.json").write_text('{"model_type": "llama"}')
    save_file({"weight": torch.arange(6.0).reshape(3, 2)}, hf / "model.safetensors")
    with pytest.raises(
        UserError, match=r"policy.jsonl: its run ended with another model .* than that of .*after.jsonl"
    ):
        evaluated(tmp_path)
    new = model_fingerprint(hf)
    roles = ("before", "after", "own", "own_greedy")
    rows = {role: [msgspec.structs.replace(r, model=new) for r in rows_of_all()[role]] for role in roles[1:]}
    assert evaluated(tmp_path, roles, **rows)["remarks"] == []


def test_rewarded_prompts_among_the_held_out_ones_are_remarked(tmp_path):
    rewards = [row | {"prompt": mark("b")} if row["id"] == "t2" else row for row in reward_rows()]
    record = evaluated(tmp_path, rewards=rewards)
    assert (
        "1 of the rewarded questions have the prompt of a held-out one: g* was chosen on them too." in record["remarks"]
    )


def test_groups_and_references_of_other_questions_under_the_same_ids(tmp_path):
    rows = [{"id": id, "question": f"what is {id}?", "operation": GROUPS[id], "answer": "1"} for id in "abcd"]
    data = write_lines(tmp_path / "H.jsonl", rows)
    asked = {e.id: question_mark(e) for e in read_questions(data)}
    before = [msgspec.structs.replace(row, question=asked[row.id]) for row in rows_of_all()["before"]]
    scored, rewards, policy = make_files(tmp_path, before=before)
    runs = list(load_inputs(scored, rewards, policy).runs.values())
    assert read_groups(data, "operation", runs) == GROUPS
    write_lines(data, [row | {"question": "what else?"} if row["id"] == "c" else row for row in rows])
    with pytest.raises(UserError, match=r"H.jsonl:3: id 'c' is another question than in .*before.jsonl"):
        read_groups(data, "operation", runs)
    with pytest.raises(UserError, match=r"H.jsonl:3: id 'c' is another question than in .*before.jsonl"):
        read_golds(data, runs)
    assert read_groups(data, "operation") == GROUPS  # where there is nothing to compare with
    assert read_golds(data) == dict.fromkeys("abcd", "1")


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("evaluate_policy_tool", ROOT / "tools" / "evaluate_policy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(folder, roles=tuple(MODES) + ("before", "after"), **replaced):
    scored, rewards, policy = make_files(folder, roles, **replaced)
    found = ["--rewards", str(rewards), "--policy", str(policy), "--output", str(folder / "out")]
    for role, path in scored.items():
        found += ["--" + role.replace("_", "-"), str(path)]
    return found


def test_the_command(tool, tmp_path, capsys):
    held, train = (
        write_lines(tmp_path / f"{name}.jsonl", [{"id": id, "operation": group} for id, group in groups.items()])
        for name, groups in (("H", GROUPS), ("Q", GROUPS_TRAIN))
    )
    group = ["--data", str(held), "--data-train", str(train), "--group-by", "operation"]
    tool.main([*arguments(tmp_path / "files"), *group])
    out = capsys.readouterr().out
    record = json.loads((tmp_path / "files" / "out" / "policy_evaluation.json").read_text())
    assert record["group_by"] == "operation" and record["groups"] == GROUPS
    for said in ("own choice, sampled", "0.812 ±0.120", "best tag per operation", "recovered headroom", "83%", "+0.062",
                 "<think1> 90%"):  # fmt: skip
        assert said in out, said
    assert max(map(len, out.splitlines()[:-1])) <= 100


def test_nothing_is_written_for_files_that_do_not_fit(tool, tmp_path):
    for case in ("a question is missing", "before and after swapped"):
        with pytest.raises(UserError):
            tool.main(arguments(tmp_path, **REFUSED[case][0]))
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="give another --output"):
        tool.main(arguments(tmp_path))
    for more in (["--data", "x"], ["--group-by", "x"], ["--data-train", "x"]):
        with pytest.raises(UserError, match="--data"):
            tool.main([*arguments(tmp_path / "b"), *more])
