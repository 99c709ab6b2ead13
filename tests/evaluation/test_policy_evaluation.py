"""tools/evaluate_policy.py: figures worked out by hand on four questions, errors by brute force, what is refused."""

from __future__ import annotations

import importlib.util
import json
import random
import statistics
from pathlib import Path

import numpy as np
import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.evaluation.policy_evaluation import Grouping, evaluate_policy
from megatron_ssft.evaluation.policy_inputs import load_inputs
from megatron_ssft.evaluation.policy_tables import policy_tables
from megatron_ssft.formats.policy import read_policy
from megatron_ssft.formats.rollouts import ScoredRollout, write_scored

ROOT = Path(__file__).resolve().parents[2]
MODES = {"own": "own", "own_greedy": "own-greedy", "own_before": "own", "own_greedy_before": "own-greedy",
         "grpo": "none", "grpo_before": "none"}  # fmt: skip
MODELS = {"before": "old", "own_before": "old", "own_greedy_before": "old", "grpo": "rl", "grpo_before": "mixed"}

# -- made-up files, also for test_policy_report.py -------------------------------------------------------------------

BEFORE = {"a": ["11", "00"], "b": ["10", "00"], "c": ["00", "11"], "d": ["01", "11"]}
AFTER = {**BEFORE, "a": ["11", "01"]}
"""Question -> for each tag whether its samples are right."""
OWN = {"a": "0+ 0+ -. 0+", "b": "0+ 0. 1. 0+", "c": "1+ 1+ 1+ 1+", "d": "1+ 1+ 1+ 0+"}
"""Question -> samples that the model began by itself: tag (- for none) and whether it is right."""
GREEDY = {"a": "0+ 0+", "b": "0+ 0.", "c": "1+ 1+", "d": "1+ 1+"}
OWN_BEFORE = {"a": "0+ 1.", "b": "0. 1.", "c": "0. 1+", "d": "-. -."}
POLICY = {0: {q: [0.5, 0.5] for q in "abcd"}, 5: {"a": [0.8, 0.2], "b": [1, 0], "c": [0.25, 0.75], "d": [0, 1]}}
MASS = {0: 0.75, 5: 1.0}
REWARDS = {"t1": [0, 2], "t2": [1, 1], "t3": [1, 2], "t4": [2, 1]}
"""Training question -> right ones of two samples a tag."""
GROUPS = {"a": "x", "b": "x", "c": "y", "d": "y"}
GROUPS_TRAIN = {"t1": "x", "t2": "x", "t3": "x", "t4": "y"}
"""By the rewards tag 1 is best in x and tag 0 in y, the other way round than on the held-out questions."""


def sample(id, tag, number, right, role, **fields):
    defaults = {
        "finish_reason": "stop",
        "seed": 1,
        "sampling": {"mode": MODES.get(role, "each"), "temperature": 0.7, "seed": 1},
        "model": MODELS.get(role, "new") * 16,
        "tokenizer": "t",
        "correct": right,
        "answer": "1",
        "verdict": "correct" if right else "wrong",
        "verifier": "exact",
        "num_tokens": 5,
        "truncated": False,
    }
    return ScoredRollout(id=id, tag=tag, sample=number, **{**defaults, **fields})


def each(role, table, **fields):
    return [
        sample(id, tag, number, right == "1", role, **fields)
        for id, by_tag in table.items()
        for tag, flags in enumerate(by_tag)
        for number, right in enumerate(flags)
    ]


def began(role, table, **fields):
    return [
        sample(id, None if text[0] == "-" else int(text[0]), number, text[1] == "+", role, **fields)
        for id, texts in table.items()
        for number, text in enumerate(texts.split())
    ]


def plain(table):
    return {id: " ".join("-" + text[1] for text in texts.split()) for id, texts in table.items()}


def rows_of_all():
    return {
        "before": each("before", BEFORE),
        "after": each("after", AFTER),
        "own": began("own", OWN),
        "own_greedy": began("own_greedy", GREEDY),
        "own_before": began("own_before", OWN_BEFORE),
        "own_greedy_before": began("own_greedy_before", OWN_BEFORE),
        "grpo": began("grpo", plain(GREEDY)),
        "grpo_before": began("grpo_before", plain(OWN_BEFORE)),
    }


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def reward_rows(rewards=None, model="old" * 16):
    return [
        {"id": id, "tags": [0, 1], "n": [2, 2], "sum": right, "truncated": [0, 0], "verifier": "exact", "model": model}
        for id, right in (rewards or REWARDS).items()
    ]


def policy_rows(policy=None, split="eval"):
    return [
        {"iteration": step, "split": split, "id": id, "policy": pi, "mass": MASS.get(step, 1.0)}
        for step, of in (policy or POLICY).items()
        for id, pi in of.items()
    ]


def make_files(folder, roles=("before", "after", "own", "own_greedy"), **replaced):
    """Scored files of `roles`, rewards, policy; `replaced`: other rows for some of them."""
    folder.mkdir(parents=True, exist_ok=True)
    scored = {role: folder / f"{role}.jsonl" for role in roles}
    rows = {**rows_of_all(), **replaced}
    for role, path in scored.items():
        write_scored(path, rows[role])
    rewards = write_lines(folder / "rewards.jsonl", replaced.get("rewards", reward_rows()))
    policy = write_lines(folder / "policy.jsonl", replaced.get("policy", policy_rows()))
    return scored, rewards, policy


def evaluated(folder, roles=tuple(MODES) + ("before", "after"), grouped=True, **replaced):
    scored, rewards, policy = make_files(folder, roles, **replaced)
    grouping = Grouping("operation", GROUPS, GROUPS_TRAIN) if grouped else None
    record = evaluate_policy(load_inputs(scored, rewards, policy), grouping)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    for table in policy_tables(record):
        assert all(len(row) == len(table.header) for row in table.rows)
    return record


# -- by hand ---------------------------------------------------------------------------------------------------------


def test_every_row_by_hand(tmp_path):
    record = evaluated(tmp_path)
    found = {row["key"]: (row["before"]["value"], row["after"]["value"]) for row in record["rows"]}
    assert record["fixed_tag"] == {"tag": 1, "mean_reward": [0.5, 0.75]}
    assert record["group_tags"] == {"before": {"x": [0], "y": [1]}, "rewards": {"x": [1], "y": [0]}}
    assert found == {
        "own": pytest.approx(((0.5 + 0 + 0.5 + 0) / 4, (0.75 + 0.5 + 1 + 1) / 4)),
        "own_greedy": pytest.approx((0.25, (1 + 0.5 + 1 + 1) / 4)),
        "expected": pytest.approx(((0.5 + 0.25 + 0.5 + 0.75) / 4, (0.8 + 0.2 * 0.5 + 0.5 + 0.75 + 1) / 4)),
        "fixed": pytest.approx(((0 + 0 + 1 + 1) / 4, (0.5 + 0 + 1 + 1) / 4)),
        "uniform": pytest.approx(((0.5 + 0.25 + 0.5 + 0.75) / 4, (0.75 + 0.25 + 0.5 + 0.75) / 4)),
        "group": pytest.approx(((1 + 0.5 + 1 + 1) / 4,) * 2),
        "group_rewards": pytest.approx(((0 + 0 + 0 + 0.5) / 4, (0.5 + 0 + 0 + 0.5) / 4)),
        "oracle": pytest.approx(((1 + 0.5 + 1 + 1) / 4,) * 2),
        # b: first samples choose tag 0, which then fails; second ones tie, and the first of both is right in one
        "other_samples": pytest.approx(((1 + 0.25 + 1 + 0.75) / 4, (0.75 + 0.25 + 1 + 0.75) / 4)),
        "grpo": pytest.approx((0.25, 0.875)),
    }
    assert record["samples_per_tag"] == {"before": [2, 2], "after": [2, 2]} and record["questions"] == 4
    notes = {row["key"]: row["note"] for row in record["rows"]}
    assert "<think2>" in notes["fixed"] and "4 training questions" in notes["fixed"]
    assert "held-out samples before" in notes["group"] and "same 2 samples" in notes["oracle"]
    assert {row["before"]["questions"] for row in record["rows"]} == {4} and not record["remarks"]


def test_differences_and_headroom_by_hand(tmp_path):
    record = evaluated(tmp_path)
    found = {entry["key"]: entry for entry in record["differences"]}
    assert {key: entry["value"] for key, entry in found.items()} == pytest.approx(
        {
            "own-fixed": 0.8125 - 0.625,
            "own_greedy-fixed": 0.875 - 0.625,
            "own-fixed_before": 0.8125 - 0.5,
            "own-uniform": 0.8125 - 0.5625,
            "own-own_before": 0.8125 - 0.25,
            "uniform-uniform_before": 0.0625,
            "own-grpo": 0.8125 - 0.875,
            "grpo-grpo_before": 0.875 - 0.25,
        }
    )
    assert found["uniform-uniform_before"]["stderr"] == pytest.approx(0.0625)  # one of four questions moved, by 1/4
    assert found["own-fixed"]["stderr"] == pytest.approx(statistics.stdev([0.25, 0.5, 0, 0]) / 2)
    headroom = {entry["key"]: entry for entry in record["headroom_recovered"]}
    assert list(headroom) == ["group_before", "group_after", "group_rewards_before", "group_rewards_after"]
    assert headroom["group_before"]["value"] == pytest.approx(0.3125 / 0.375)
    assert (headroom["group_before"]["gain"], headroom["group_before"]["headroom"]) == pytest.approx((0.3125, 0.375))
    assert headroom["group_after"]["value"] == pytest.approx(0.1875 / 0.25)
    assert headroom["group_rewards_before"]["headroom"] == pytest.approx(0.125 - 0.5)
    assert headroom["group_rewards_before"]["value"] is None


def test_choices_by_hand(tmp_path):
    record = evaluated(tmp_path)
    of = {(c["source"], c["state"]): {g["group"]: g for g in c["groups"]} for c in record["choices"]}
    assert set(of) == {(s, t) for s in ("policy", "own", "own_greedy") for t in ("before", "after")}
    assert of["policy", "before"][None] == {"group": None, "questions": 4, "share": [0.5, 0.5], "outside": 0.25}
    assert of["policy", "after"]["x"]["share"] == pytest.approx([0.9, 0.1])
    assert of["policy", "after"]["y"]["share"] == pytest.approx([0.125, 0.875])
    # x: 3 of 4 and 3 of 4 with tag 0, 0 and 1 with tag 1, 1 of 8 with none
    assert of["own", "after"]["x"]["share"] == pytest.approx([6 / 7, 1 / 7])
    assert of["own", "after"]["x"]["outside"] == pytest.approx(1 / 8)
    assert of["own", "after"][None]["outside"] == pytest.approx(1 / 16)
    assert of["own", "before"]["y"] == {"group": "y", "questions": 2, "share": [0.5, 0.5], "outside": 0.5}
    assert record["policy"]["iterations"] == [0, 5]
    assert record["policy"]["mass"]["before"]["value"] == 0.75
    assert record["policy"]["entropy"]["before"]["value"] == pytest.approx(np.log(2))
    after = [-(0.8 * np.log(0.8) + 0.2 * np.log(0.2)), 0, -(0.25 * np.log(0.25) + 0.75 * np.log(0.75)), 0]
    assert record["policy"]["entropy"]["after"]["value"] == pytest.approx(np.mean(after))


def test_the_tags_of_a_group_are_chosen_before_and_shared_where_they_tie(tmp_path):
    """In x tag 0 leads before and tag 1 after; in y both tie before."""
    before = {"a": ["11", "00"], "b": ["11", "00"], "c": ["11", "00"], "d": ["00", "11"]}
    after = {"a": ["00", "11"], "b": ["10", "11"], "c": ["11", "10"], "d": ["00", "11"]}
    record = evaluated(tmp_path, before=each("before", before), after=each("after", after))
    (row,) = [row for row in record["rows"] if row["key"] == "group"]
    assert record["group_tags"]["before"] == {"x": [0], "y": [0, 1]}
    assert row["before"]["value"] == pytest.approx((1 + 1 + 0.5 + 0.5) / 4)
    assert row["after"]["value"] == pytest.approx((0 + 0.5 + 0.75 + 0.5) / 4)


def test_without_what_may_be_left_out(tmp_path):
    scored, rewards, _ = make_files(tmp_path)
    record = evaluate_policy(load_inputs(scored, rewards))
    rows = {row["key"]: row for row in record["rows"]}
    assert list(rows) == ["own", "own_greedy", "fixed", "uniform", "oracle", "other_samples"]
    assert rows["own"]["before"] is None and rows["own"]["after"]["value"] == 0.8125
    assert record["headroom_recovered"] == [] and record["policy"] is record["groups"] is record["group_tags"] is None
    assert {c["source"] for c in record["choices"]} == {"own", "own_greedy"}


def test_no_tag_ever_written(tmp_path):
    never = dict.fromkeys("abcd", "-. -.")
    record = evaluated(tmp_path, own=began("own", never))
    (own,) = [c for c in record["choices"] if (c["source"], c["state"]) == ("own", "after")]
    assert own["groups"][0]["share"] is None and own["groups"][0]["outside"] == 1


def test_no_headroom_is_no_share(tmp_path):
    same = {id: ["00", "11"] for id in "abcd"}
    record = evaluated(tmp_path, before=each("before", same), after=each("after", same))
    entry = record["headroom_recovered"][0]
    assert entry["value"] is entry["stderr"] is None and entry["headroom"] == 0
    assert "no headroom" in str(policy_tables(record)[1].rows)


def test_single_samples_have_no_halves_and_single_questions_no_error(tmp_path):
    one = {"a": ["1", "0"]}
    rows = {"before": each("before", one), "after": each("after", one), "own": began("own", {"a": "0+"}),
            "own_greedy": began("own_greedy", {"a": "0+"})}  # fmt: skip
    record = evaluated(tmp_path, tuple(rows), False, **rows, policy=policy_rows({0: {"a": [1, 0]}, 1: {"a": [1, 0]}}))
    found = {row["key"]: row for row in record["rows"]}
    assert found["other_samples"]["after"] is None and found["oracle"]["after"]["value"] == 1
    assert found["own"]["after"] == {"value": 1, "stderr": None, "questions": 1}


# -- errors by brute force -------------------------------------------------------------------------------------------


def random_files(folder, questions=300, seed=0):
    draw = random.Random(seed)

    def flags(share):
        return "".join("01"[draw.random() < share] for _ in range(2))

    ids = [f"q{k}" for k in range(questions)]
    groups = {id: "xyz"[k % 3] for k, id in enumerate(ids)}
    easy = {id: draw.random() for id in ids}
    tables = [
        {id: [flags(easy[id] * (0.9 if t == "xyz".index(groups[id]) else 0.4)) for t in range(3)] for id in ids}
        for _ in range(2)
    ]
    own = {
        id: " ".join(f"{'xyz'.index(groups[id])}{'+.'[draw.random() > easy[id] * 0.9]}" for _ in range(4)) for id in ids
    }
    rewards = [
        {**row, "tags": [0, 1, 2], "n": [2] * 3, "sum": [1, 2, 1], "truncated": [0] * 3} for row in reward_rows()
    ]
    roles = {"before": each("before", tables[0]), "after": each("after", tables[1]), "own": began("own", own),
             "own_greedy": began("own_greedy", own)}  # fmt: skip
    scored, rewards, _ = make_files(folder, tuple(roles), **roles, rewards=rewards)
    share = {
        (state, id, t): table[id][t].count("1") / 2
        for state, table in zip(("before", "after"), tables)
        for id in ids
        for t in range(3)
    }
    return scored, rewards, groups, share, {id: texts.count("+") / 4 for id, texts in own.items()}


def test_standard_errors_by_brute_force(tmp_path):
    scored, rewards, groups, share, own = random_files(tmp_path)
    record = evaluate_policy(load_inputs(scored, rewards), Grouping("g", groups))
    assert record["group_tags"]["before"] == {"x": [0], "y": [1], "z": [2]}
    by_id = {id: [own[id], share["before", id, 1], share["before", id, "xyz".index(groups[id])]] for id in groups}
    gain, room = [o - f for o, f, _ in by_id.values()], [g - f for _, f, g in by_id.values()]
    found = {entry["key"]: entry for entry in record["differences"]}["own-fixed_before"]
    assert found["value"] == pytest.approx(statistics.mean(gain))
    assert found["stderr"] == pytest.approx(statistics.stdev(gain) / len(gain) ** 0.5)
    entry = {entry["key"]: entry for entry in record["headroom_recovered"]}["group_before"]
    assert entry["value"] == pytest.approx(sum(gain) / sum(room))
    left_out = [(sum(gain) - a) / (sum(room) - b) for a, b in zip(gain, room)]  # the jackknife
    jackknife = ((len(gain) - 1) ** 2 / len(gain)) ** 0.5 * statistics.stdev(left_out)
    assert entry["stderr"] == pytest.approx(jackknife, rel=0.02)
    oracle = {row["key"]: row for row in record["rows"]}["oracle"]["after"]
    best = [max(share["after", id, t] for t in range(3)) for id in groups]
    assert oracle == pytest.approx(
        {"value": statistics.mean(best), "stderr": statistics.stdev(best) / len(best) ** 0.5, "questions": 300}
    )


def test_choosing_on_other_samples_has_no_luck_in_it(tmp_path):
    """All tags alike: the oracle on the same samples is far above what any tag is worth, the other figure is not."""
    draw = random.Random(3)
    table = {f"q{k}": ["".join(draw.choice("01") for _ in range(4)) for _ in range(6)] for k in range(400)}
    own = dict.fromkeys(table, "0+")
    rewards = [
        {**row, "tags": list(range(6)), "n": [2] * 6, "sum": [1] * 6, "truncated": [0] * 6} for row in reward_rows()
    ]
    roles = {"before": each("before", table), "after": each("after", table), "own": began("own", own),
             "own_greedy": began("own_greedy", own)}  # fmt: skip
    scored, rewards, _ = make_files(tmp_path, tuple(roles), **roles, rewards=rewards)
    record = evaluate_policy(load_inputs(scored, rewards))
    rows = {row["key"]: row["before"] for row in record["rows"]}
    assert rows["oracle"]["value"] > 0.75
    assert abs(rows["other_samples"]["value"] - 0.5) < 4 * rows["other_samples"]["stderr"]
    assert record["fixed_tag"]["tag"] == 0  # of those that tie


def test_the_order_of_lines_does_not_matter(tmp_path):
    first = evaluated(tmp_path / "a")
    rows = rows_of_all()
    for of in rows.values():
        random.Random(1).shuffle(of)
    second = evaluated(tmp_path / "b", **rows, rewards=reward_rows()[::-1], policy=policy_rows()[::-1])
    for key in ("fixed_tag", "group_tags", "differences", "headroom_recovered", "choices", "policy"):
        assert json.dumps(first[key]) == json.dumps(second[key]) or first[key] == pytest.approx(second[key]), key
    for one, other in zip(first["rows"], second["rows"]):
        assert one["after"] == pytest.approx(other["after"]) and one["before"] == pytest.approx(other["before"])


# -- what is refused -------------------------------------------------------------------------------------------------

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
    assert len(record["remarks"]) == 2


GOOD = policy_rows()[0]


@pytest.mark.parametrize(
    "change",
    [{"iteration": -1}, {"iteration": None}, {"split": "test"}, {"id": 3}, {"policy": []}, {"policy": [1.5, -0.5]},
     {"policy": [0.5, 0.4]}, {"policy": [0.5, "x"]}, {"policy": None}, {"mass": 2}, {"mass": None},
     {"policy": [0.2, 0.3, 0.5]}, {"policy": [float("nan"), 1.0]}],
)  # fmt: skip
def test_damaged_policies(tmp_path, change):
    path = write_lines(tmp_path / "policy.jsonl", [GOOD, {**GOOD, **change}, GOOD])
    with pytest.raises(UserError) as error:
        read_policy(path)
    assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)


def test_a_policy_cut_off_by_a_kill(tmp_path):
    path = write_lines(tmp_path / "policy.jsonl", [GOOD])
    whole = path.read_bytes()
    for cut in (1, 10, 40):
        path.write_bytes(whole + whole[:cut])
        assert len(read_policy(path)["eval"][0]) == 1
    path.write_bytes(whole[:-5] + b"\n" + whole)
    with pytest.raises(UserError, match=r"policy.jsonl:1: not valid JSON"):
        read_policy(path)
    path.write_bytes(whole + whole.replace(b"0.5, 0.5", b"0.1, 0.9"))  # written again: the later one counts
    assert read_policy(path)["eval"][0]["a"].policy_N.tolist() == [0.1, 0.9]


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
