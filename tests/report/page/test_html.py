"""The page needs nothing else, is safe whatever the names in the data, and is always the same."""

from __future__ import annotations

import json

import pytest

from megatron_ssft.report.exhibits import (
    Exhibit,
    Picture,
    Section,
    TableData,
)
from megatron_ssft.report.page.html import LARGEST_SVG, page
from megatron_ssft.report.page.report import write_report
from tests.helpers.pages import HOSTILE, Page, check_safe, pictures
from tests.helpers.report_data import (
    make_evaluation,
    make_run,
)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three runs, an evaluation of two of them, and the report."""
    folder = tmp_path_factory.mktemp("report")
    runs = [make_run(folder / name, matching=name, questions=60) for name in ("optimal", "random", "single")]
    evaluation = make_evaluation(folder / "eval", {"optimal": [0.2, 0.7], "single": [0.5]}, group=True)
    files = write_report(runs, folder / "page.html", evaluation)
    return folder, runs, evaluation, files, Page(files[0].read_text(encoding="utf-8"))


def test_the_page_needs_nothing_else(three):
    *_, page = three
    check_safe(page)
    assert len(pictures(page)) == len(page.all("img")) >= 15
    assert page.all("html")[0]["lang"] == "en" and len(page.all("h1")) == len(page.all("title")) == 1
    assert any(m.get("name") == "viewport" and "width=device-width" in m["content"] for m in page.all("meta"))
    assert "prefers-color-scheme:dark" in page.text and "color-scheme:light dark" in page.text
    assert len(page.text) < 3e6


def test_headings_links_and_ids(three):
    *_, page = three
    ids = [attrs["id"] for _, attrs, _ in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and {a["href"][1:] for a in page.all("a")} <= set(ids)
    levels = [int(tag[1]) for tag, _, _ in page.tags if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:]))
    assert [a["href"] for a in page.all("a")] == [
        "#summary", "#training", "#matching", "#tags", "#efficiency", "#evaluation",
    ]  # fmt: skip


def test_every_picture_has_words_and_numbers(three):
    *_, page = three
    for img in page.all("img"):
        assert len(img["alt"]) > 40 and any(letter.isdigit() for letter in img["alt"])
    assert len(page.all("figure")) == len(page.all("img")) == len(page.all("figcaption"))
    for tag, attrs, above in page.tags:
        if tag == "table":  # scrolls by itself, within reach of the keyboard
            assert above[-1] == "div"
        if attrs.get("class") == "scroll":
            assert attrs["tabindex"] == "0" and attrs["role"] == "region" and attrs["aria-label"]
    tables = len(page.all("table"))
    assert tables == len(page.all("caption")) == len([a for a in page.all("div") if a.get("class") == "scroll"])
    assert all(th["scope"] in ("row", "col") for th in page.all("th"))


def test_the_summary_says_what_was_trained_and_what_came_of_it(three):
    words = three[-1].words
    for part in (
        "g* of optimal is <think1>: tied with <think2> in distinct sources (1)",
        "single has no g*: all traces were trained under one tag",
        "With random matching the tags were given out blindly, so this means nothing.",
        "3 layers, 64 wide",
        "train.jsonl",
        "Answers of optimal to 40 questions: pass@1 0.450",
        "best tag's pass@1 (chosen on the same samples) 0.700",
        "best tag per question, chosen on other samples 0.",
        "oracle: chosen and measured on the same samples",
        "Accuracy of g* of optimal, <think1>: 0.200; the most accurate tag, <think2>, has 0.700.",
        "best tag of each parity",
        "ties by expectation",
        "± is the standard error over questions",
    ):
        assert part in words, part
    assert "some/where" not in words


def test_pngs_beside_the_page(three, tmp_path):
    folder, runs, _, files, page = three
    assert files[0] == folder / "page.html" and {f.parent for f in files[1:]} == {folder / "page_figures"}
    assert len(files) == len(set(files)) == 1 + len(page.all("img"))
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files[1:])
    assert {"loss.png", "matching_costs_optimal.png", "tag_sources_random.png"} <= {f.name for f in files}
    written = write_report(runs[2:], tmp_path / "deep" / "er" / "r.html", png_folder=tmp_path / "pictures")
    assert {f.parent for f in written[1:]} == {tmp_path / "pictures"} and written[0].exists()


def test_the_same_input_gives_the_same_bytes(three, tmp_path):
    _, runs, evaluation, files, _ = three
    again = write_report(runs, tmp_path / "page.html", evaluation)
    assert [f.read_bytes() for f in again] == [f.read_bytes() for f in files]


def test_hostile_names(tmp_path):
    """In sources, ids, settings, group and run names: shown as text, drawn as text, and in no file's name."""
    name = '<b>"run"&\'$x$'
    run = make_run(tmp_path / "a" / name, sources=HOSTILE[:5], questions=60)
    (run / "config.yaml").write_text(
        "matching: '<script>alert(2)</script>'\nnum_layers: [1, {a: '<i>'}]\nhidden_size: '<u>'\n"
        "num_forking_tokens: many\nload: '/x/<img src=y>'\ndata_path: ['/d/</table><script>.jsonl', 7]\n"
    )
    evaluation = make_evaluation(tmp_path / "e", {HOSTILE[0]: [0.5, 0.5], HOSTILE[5]: [0.5], "../../up": [0.1]})
    text = (evaluation / "evaluation.json").read_text()
    record = json.loads(text)
    record["answers"] = HOSTILE[1]
    for each in record["runs"]:
        each["sampling"] = {"mode": HOSTILE[1], "temperature": HOSTILE[0]}
        each["verifiers"], each["ours"]["rule"] = HOSTILE[:4], HOSTILE[2]
        names = [{"group": HOSTILE[k], "questions": 1, "accuracy_N": [None] * len(each["tags"]), "best": [0],
                  "best_same": 0.5, "best_held_out": None} for k in range(5)]  # fmt: skip
        each["groups"] = {"field": HOSTILE[1], "best_same": 0.5, "best_held_out": None, "groups": names}
    (evaluation / "evaluation.json").write_text(json.dumps(record))
    files = write_report([run], tmp_path / "page.html", evaluation)
    page = Page(files[0].read_text(encoding="utf-8"))
    check_safe(page)
    assert pictures(page) and len(page.all("b")) == len(page.all("i")) == len(page.all("u")) == 0
    for shown in ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "\\frac{1}{0$", name, "\ufffdevil"):
        assert shown in page.words
    assert (
        "\x00" not in page.text and "\x1b" not in page.text and "\u202e" not in page.text and "x" * 200 not in page.text
    )
    assert {f.parent for f in files[1:]} == {tmp_path / "page_figures"}
    assert all(f.name.replace("_", "a").replace(".png", "").isalnum() for f in files[1:])


def test_names_that_matplotlib_would_take_amiss(tmp_path, recwarn):
    """A leading underscore hides a line from a legend; dollars are mathematics; Chinese letters are not in the font."""
    names = ["_hidden", "$a$", "模型"]
    runs = [make_run(tmp_path / name, sources=["_a", "$\\x$", "教师", None]) for name in names]
    files = write_report(runs, tmp_path / "p.html")
    check_safe(Page(files[0].read_text(encoding="utf-8")))
    assert not recwarn.list


MISSING = {
    "one epoch": ({"epochs": 1}, "Matchings by epoch are not drawn for run: "),
    "single": ({"matching": "single"}, "nothing was matched"),
    "no sources": ({"sources": [None] * 3}, "The data names no sources."),
    "no settings": ({"settings": False}, "steps"),
    "one step": ({"questions": 8, "epochs": 1}, "its only value"),
    "one trace": ({"sources": ["a"]}, "1 edges between"),
    "one tag": ({"sources": ["a"], "tags": 1}, "it is the only tag"),
    "nothing logged": (
        dict.fromkeys(("loss", "lr", "seconds", "matching_gap", "makespan_over_bound", "pad_sequences"), [None]),
        "Training loss is not drawn for run: the log has no value of it.",
    ),
    "not a number": ({"loss": [float("nan"), float("inf")], "lr": [float("inf")]}, "Training loss is not drawn"),
    "no time": ({"seconds": [0.0], "matching_seconds": [0.0]}, "Tokens per second is not drawn"),
    "negative gaps": ({"matching_gap": [-1e-17, 0.0]}, "Matching gap is not drawn"),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_is_missing_is_said(tmp_path, case):
    changes, said = MISSING[case]
    run = make_run(tmp_path / "run", **changes)
    page = Page(write_report([run], tmp_path / "p.html")[0].read_text(encoding="utf-8"))
    check_safe(page)
    assert said in page.words and "no pictures of it" in page.words
    assert " nan" not in page.words.lower().replace("nan nats", "") and " inf" not in page.words.replace(
        " information", ""
    )


def test_a_run_without_matching_has_no_pictures_of_tags(three):
    names = {figure["id"] for figure in three[-1].all("figure")}
    for kind in ("tag_sources", "learned_matchings", "matchings", "matching_costs"):
        assert {n for n in names if n.startswith(kind + "_")} == {f"{kind}_optimal", f"{kind}_random"}


def test_runs_without_costs_and_without_matching_say_so(tmp_path):
    run = make_run(tmp_path / "run", matching="random")
    lines = [json.loads(line) for line in (run / "assignments.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(line | {"cost": None}) + "\n" for line in lines)
    (run / "assignments.jsonl").write_text(text + '{"torn')
    page = Page(write_report([run], tmp_path / "p.html")[0].read_text(encoding="utf-8"))
    assert "none were evaluated (--log-matching-interval evaluates them now and then)" in page.words


def test_equal_folder_names_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / parent / "run") for parent in ("a", "b")]
    page = Page(write_report([*runs, make_run(tmp_path / "c")], tmp_path / "p.html")[0].read_text(encoding="utf-8"))
    assert page.words.startswith("Set Supervised Fine-Tuning: a/run, b/run and c ")


def test_a_large_svg_becomes_a_png():
    def shown(size):
        picture = Picture(b"<svg " + b" " * size + b"/>", b"\x89PNG")
        section = Section("s", "S", exhibits=[Exhibit("k", "T", picture, "alt", "text")])
        return Page(page("t", "", [section], "")).all("img")[0]["src"]

    assert shown(10).startswith("data:image/svg+xml") and shown(LARGEST_SVG).startswith("data:image/png")


def test_everything_in_a_page_is_escaped():
    bad = "<b>&\"'</b>"
    table = TableData(bad, [bad, bad], [[bad, bad]], rule=bad)
    exhibit = Exhibit("k", bad, Picture(b"<svg/>", b""), bad, f"{bad}\n{bad}", (table,))
    section = Section("s", bad, bad, [exhibit], [bad], [table], [table])
    found = Page(page(bad, bad, [section], bad))
    assert not found.all("b") and found.words.count(bad) == 4 + 3 + 3 + 1 + 3 * 6
    assert found.all("img")[0]["alt"] == bad
