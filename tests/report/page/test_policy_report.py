"""The report on runs that trained a forking policy: which pictures there are, and what they say."""

from __future__ import annotations

import json
import math
import random
import re

import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.report.page.report import write_report
from megatron_ssft.report.read.policy_runs import is_policy_run, load_policy_runs
from tests.helpers.pages import HOSTILE, Page, check_safe, pictures
from tests.helpers.policy_evaluations import GROUPS, write_lines
from tests.helpers.report_data import (
    make_policy_evaluation,
    make_policy_run,
    make_run,
)

TAGS = 3


def report(folders, output, **options):
    files = write_report(folders, output, **options)
    page = Page(files[0].read_text(encoding="utf-8"))
    check_safe(page)
    assert {f.stem for f in files[1:]} == {figure["id"] for figure in page.all("figure")} and len(pictures(page)) > 0
    assert all(len(img["alt"]) > 40 and any(map(str.isdigit, img["alt"])) for img in page.all("img"))
    return page


def figures(page):
    return {figure["id"] for figure in page.all("figure")}


def sections(page):
    return [attrs["id"] for attrs in page.all("h2")]


def part(path, key):
    return re.search(f'<section aria-labelledby="{key}">.*?</section>', path.read_text(encoding="utf-8"), re.S)[0]


GROUPED = {f"q{k}": "abc"[k % TAGS] for k in range(12)}


def test_a_policy_alone(tmp_path):
    run = make_policy_run(tmp_path / "gfpo", effective_sample_size=[None, 0.9], rescored_nll_shift=[None, 0.1])
    page = report([run], tmp_path / "p.html", groups=GROUPED)
    assert sections(page) == ["summary", "policy"] and "Choosing the tag (GFPO)" in page.words
    assert figures(page) == {
        "policy_reward_gfpo", "policy_mass", "policy_entropy", "policy_kl", "completion_nll_shift", "anchor_kl",
        "effective_sample_size", "rescored_nll_shift", "policy_tags_before_gfpo", "policy_tags_after_gfpo",
        "policy_entropies_gfpo",
    }  # fmt: skip
    for said in (
        "Forking policy: gfpo 1 training run, read from its logs.",
        "gfpo: 8 steps of gfpo-exact, reward 0.450 at first and 0.800 in the end, probability inside the tags 90.0% at "
        "first and 90.0% in the end, entropy 1 at first and 0.125 in the end, NLL of stored completions +0.08 nats",
        "policy: 0.450 at step 1, 0.800 at step 8.",
        "best fixed tag: 0.500 throughout",
        "uniform tags: 0.400 throughout",
        "Likeliest tag: a <think1> (90%), b <think2> (90%) and c <think3> (90%).",
        "over 12 held-out questions",
        f"at step 0 mean {math.log(3):.2f} nats, one tag above 90% in 0% of the questions; at step 8 mean 0.394",
        "a 4 0.900 0.050 0.050",
    ):
        assert said in page.words, said
    assert "matching" not in page.words.replace("whichever the matchings chose", "")


def test_policies_beside_other_runs_change_nothing_there(tmp_path):
    before = [make_run(tmp_path / name, matching=name) for name in ("optimal", "single")]
    alone = write_report(before, tmp_path / "alone.html", png_folder=tmp_path / "alone")
    assert "policy" not in sections(Page(alone[0].read_text(encoding="utf-8")))
    policies = [make_policy_run(tmp_path / name, name) for name in ("gfpo-sampled", "grpo")]
    mixed = [before[0], policies[0], before[1], policies[1]]
    page = report(mixed, tmp_path / "mixed.html", png_folder=tmp_path / "mixed")
    assert sections(page) == ["summary", "training", "matching", "tags", "efficiency", "policy", "evaluation"]
    for key in ("training", "matching", "tags", "efficiency", "evaluation"):
        assert part(tmp_path / "mixed.html", key) == part(tmp_path / "alone.html", key)
    for path in alone[1:]:
        assert (tmp_path / "mixed" / path.name).read_bytes() == path.read_bytes()
    assert "Fine-Tuning: optimal and single; Forking policy: gfpo-sampled and grpo 4 training runs" in page.words


def test_missing_columns_are_normal(tmp_path):
    runs = [make_policy_run(tmp_path / "full"), make_policy_run(tmp_path / "grpo", "grpo", clip_fraction=[0.1])]
    absent = ("completion_nll_shift", "anchor_kl", "reward", "reward_uniform", "reward_best_fixed", "mass")
    runs.append(make_policy_run(tmp_path / "bare", policy=False, **dict.fromkeys(absent, [None])))
    page = report(runs, tmp_path / "p.html")
    shown = figures(page)
    assert {"policy_reward_full", "policy_reward_grpo", "policy_reward", "policy_mass", "clip_fraction"} <= shown
    assert not {"policy_reward_bare", "policy_entropies_grpo", "policy_entropies_bare", "effective_sample_size"} & shown
    for said in (
        "The reward of bare is not drawn: the log has no value of it.",
        "Probability inside the tags is not drawn for bare: the log has no value of it.",
        "KL of the anchor is not drawn for bare",
        "The tags chosen by bare are not drawn: it has no policy.jsonl, or an empty one.",
        "samples of the step: 0.450 at step 1",
    ):
        assert said in page.words, said
    assert "inside the tags is not drawn for grpo" not in page.words and "chosen by grpo" not in page.words
    assert " nan" not in page.words.lower()


def test_tags_without_groups(tmp_path):
    run = make_policy_run(tmp_path / "gfpo", split="train")
    page = report([run], tmp_path / "p.html")
    assert "policy_mean_gfpo" in figures(page) and "policy_tags_after_gfpo" not in figures(page)
    assert "Means over 12 training questions. Likeliest tag: <think1> 33.3% at step 0" in page.words
    page = report([run], tmp_path / "p.html", groups={"other": "x"})
    assert "No question of the policy of gfpo has a known group" in page.words
    page = report([run], tmp_path / "p.html", groups={f"q{k}": "x" for k in range(10)})
    assert "2 questions of the policy of gfpo have no known group" in page.words


def test_a_run_that_has_only_begun(tmp_path):
    run = make_policy_run(tmp_path / "gfpo", steps=0)
    (run / "metrics.jsonl").unlink()
    page = report([run], tmp_path / "p.html", groups=GROUPED)
    assert "gfpo has not trained a step of its policy yet." in page.words
    assert "has written its policy at step 0 alone; there is no after yet." in page.words
    assert figures(page) == {"policy_tags_before_gfpo", "policy_entropies_gfpo"}
    (run / "policy.jsonl").write_text("")
    assert is_policy_run(run) and load_policy_runs([run])[0].snapshots() == []
    write_report([run], tmp_path / "p.html")


def test_why_it_ended_is_said_where_it_is_not_the_regular_end(tmp_path):
    runs = [make_policy_run(tmp_path / name) for name in ("one", "two")]
    (runs[0] / "finished.json").write_text('{"iteration": 8, "reason": "stale rewards"}')
    (runs[1] / "finished.json").write_text('{"iteration": 8, "reason": "done"}')
    page = report(runs, tmp_path / "p.html")
    assert page.words.count("ended because of") == 1 and "ended because of stale rewards." in page.words


def test_more_tags_and_groups_than_there_is_room_for(tmp_path):
    run, draw, rows = make_policy_run(tmp_path / "gfpo", policy=False), random.Random(0), []
    for step, k in [(step, k) for step in (0, 8) for k in range(80)]:
        weights = [draw.random() for _ in range(40)]
        pi = [w / sum(weights) for w in weights]
        rows.append({"iteration": step, "split": "eval", "id": f"q{k}", "policy": pi, "mass": 1.0})
    write_lines(run / "policy.jsonl", rows)
    groups = {f"q{k}": f"{HOSTILE[k % len(HOSTILE)]} {k % 20}" for k in range(80)}
    page = report([run], tmp_path / "p.html", groups=groups)
    assert "The picture has room for 16 of 60 groups. The picture has room for 12 of 40 tags." in page.words
    assert "room for 16 of 40 tags" in report([run], tmp_path / "p.html").words


def test_equal_names_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / "a" / "run"), make_policy_run(tmp_path / "b" / "run"), make_policy_run(tmp_path / "c")]
    page = report(runs, tmp_path / "p.html")
    assert page.words.startswith("Set Supervised Fine-Tuning: run; Forking policy: b/run and c ")


def test_the_evaluation_of_a_policy(tmp_path):
    run, evaluation = make_policy_run(tmp_path / "gfpo"), make_policy_evaluation(tmp_path / "eval")
    page = report([run], tmp_path / "p.html", policy_evaluation=evaluation)
    assert "policy_evaluation" in figures(page)
    for said in (
        "After GFPO, on 4 held-out questions: own choice, sampled 0.812 ±0.120, best fixed tag 0.625 ±0.239",
        "The model's own choice gains +0.188 ±0.120 over the best fixed tag, +0.250 ±0.102 over uniform tags",
        "Uniform choice moved by +0.062 ±0.062",
        "Recovered headroom of the model before: 83% of +0.375.",
        "g* is <think2>, chosen on the rewards of the training questions.",
        "chosen on 2 samples per tag",
        "best tag per operation",
        "recovered headroom of the model after",
        "No question of the policy of gfpo has a known group",  # the evaluation knows those of other questions
    ):
        assert said in page.words, said
    rows = [json.loads(line) for line in (run / "policy.jsonl").read_text().splitlines()]
    names = dict(zip((f"q{k}" for k in range(12)), "abcd" * 3))
    write_lines(run / "policy.jsonl", [row | {"id": names[row["id"]]} for row in rows])
    page = report([run], tmp_path / "p.html", policy_evaluation=evaluation)
    assert "policy_tags_after_gfpo" in figures(page) and set(GROUPS.values()) == {"x", "y"}


def test_an_evaluation_without_groups_beside_runs_of_another_kind(tmp_path):
    evaluation = make_policy_evaluation(
        tmp_path / "eval", roles=("before", "after", "own", "own_greedy"), grouped=False
    )
    page = report([make_run(tmp_path / "run")], tmp_path / "p.html", policy_evaluation=evaluation)
    assert sections(page)[-2:] == ["policy", "evaluation"] and "policy_evaluation" in figures(page)
    assert "Recovered headroom" not in page.words


def test_the_same_input_gives_the_same_bytes(tmp_path):
    run, evaluation = make_policy_run(tmp_path / "gfpo"), make_policy_evaluation(tmp_path / "eval")
    files = [write_report([run], tmp_path / n / "p.html", policy_evaluation=evaluation) for n in "ab"]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


def test_hostile_texts(tmp_path):
    run, evaluation = make_policy_run(tmp_path / '<b>"x"$y$'), make_policy_evaluation(tmp_path / "eval")
    lines = [json.loads(line) | {"objective": HOSTILE[0]} for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_lines(run / "metrics.jsonl", lines)
    (run / "finished.json").write_text(json.dumps({"reason": HOSTILE[1]}))
    path = evaluation / "policy_evaluation.json"
    record = json.loads(path.read_text())
    for place, row in enumerate([*record["rows"], *record["differences"], *record["headroom_recovered"]]):
        row["name"], row["note"] = HOSTILE[place % 6], HOSTILE[(place + 1) % 6]
    record["group_by"], record["remarks"] = HOSTILE[1], HOSTILE
    record["groups"] = {f"q{k}": HOSTILE[k % 6] for k in range(12)}
    path.write_text(json.dumps(record))
    page = report([run], tmp_path / "p.html", policy_evaluation=evaluation)
    assert not page.all("b") and "<script>alert(1)</script>" in page.words and "x" * 300 not in page.text


def test_what_cannot_be_read(tool, tmp_path):
    run = make_policy_run(tmp_path / "gfpo")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "policy_evaluation.json").write_text("{")
    for more, said in (
        (["--policy-eval", tmp_path], "megatron-ssft evaluate-policy"),
        (["--policy-eval", tmp_path / "bad"], "not valid JSON"),
        (["--data", tmp_path], "--group-by and --data go together"),
        (["--data", tmp_path / "none.jsonl", "--group-by", "x"], "cannot read the questions"),
    ):
        with pytest.raises(UserError, match=said):
            tool.main([str(run), *map(str, more), "--output", str(tmp_path / "r.html")])
    for name, text in (("finished.json", "{"), ("policy.jsonl", "{}\n"), ("metrics.jsonl", "{}\n")):
        whole = (run / name).read_text() if (run / name).exists() else None
        (run / name).write_text(text)
        with pytest.raises(UserError, match=name) as error:
            tool.main([str(run), "--output", str(tmp_path / "r.html")])
        assert "\n" not in str(error.value) and not (tmp_path / "r.html").exists()
        (run / name).unlink() if whole is None else (run / name).write_text(whole)


def test_the_command(tool, tmp_path, capsys):
    run, evaluation = make_policy_run(tmp_path / "gfpo"), make_policy_evaluation(tmp_path / "eval")
    data = write_lines(tmp_path / "H.jsonl", [{"id": id, "kind": group} for id, group in GROUPED.items()])
    more = ["--policy-eval", evaluation, "--data", data, "--group-by", "kind", "--png-dir", tmp_path / "png"]
    tool.main([str(run), *map(str, more), "--output", str(tmp_path / "r.html")])
    assert f"pictures: {len(list((tmp_path / 'png').iterdir()))} in" in capsys.readouterr().out
    assert {"policy_tags_after_gfpo.png", "policy_evaluation.png"} <= {p.name for p in (tmp_path / "png").iterdir()}
