"""Figures of a policy's evaluation worked out by hand on four questions, and errors by brute force."""

from __future__ import annotations

import json
import random
import statistics

import numpy as np
import pytest

from megatron_ssft.evaluation.policy_evaluation import Grouping, evaluate_policy
from megatron_ssft.evaluation.policy_inputs import load_inputs
from megatron_ssft.evaluation.policy_tables import policy_tables
from tests.helpers.policy_evaluations import began, each, evaluated, make_files, policy_rows, reward_rows, rows_of_all


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
    assert {row["before"]["questions"] for row in record["rows"]} == {4}
    (remark,) = record["remarks"]
    assert remark.startswith("Not checked: whether the policy's run ended with --after's model")


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
