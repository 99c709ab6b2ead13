"""What each verifier takes for the answer, what it calls equal, and that any text gets its verdict in time."""

from __future__ import annotations

import time

import pytest

from megatron_ssft.boxed import last_boxes
from megatron_ssft.demo.data import make_demo_sets
from megatron_ssft.scoring.verifiers import choice, exact, mathematics
from megatron_ssft.scoring.verifiers.common import Settings, UnusableQuestion
from tests.helpers.math_pairs import DIFFERENT, EQUAL, HUGE, KNOWN_DEVIATIONS

PLAIN = Settings()


# ---- exact


def test_exact_judges_the_demo_as_the_demo_does():
    rows, _ = make_demo_sets(train=64, held_out=16)
    for row in rows:
        for trace in row["traces"]:
            assert exact.judge(trace["text"], row, PLAIN).correct == trace["correct"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3>7>7#7", "7"),
        ("so it is\n#### 1,234.", "1234"),
        ("#### $5 \nthat was it", "5"),
        (r"thus \boxed{42}", "42"),
        (r"# Title\n so \boxed{  a   b } done", "a b"),
        (r"\boxed{1} #2", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("<think>#1</think>it is #2", "2"),
        ("<think3>#1</think3>", "1"),
        ("#### **45**", "45"),
        ("**#### 45.**", "45"),
        (r"\boxed{45{,}678}", "45678"),
        (r"\boxed{45\,678}", "45678"),
        (r"\boxed{\mathbf{45}}", "45"),
        (r"\boxed{45}" + "\n\n## Proof\nas above", "45"),
        ("#### 45\n## Proof\nas above", "45"),
        ("## Work\n3+4\n#### 45", "45"),
        ("<think>#1</think> <answer> 45 </answer>", "45"),
        ("#### −45", "-45"),
        ("no marker 7", None),
        ("7#", None),
        ("", None),
        ("#" * 10, None),
    ],
)
def test_exact_extraction(text, answer):
    assert exact.extract(text, None) == answer


def test_answer_after_takes_the_last_place_or_nothing():
    assert exact.extract("Answer: 3\nAnswer: 4", "Answer:") == "4"
    assert exact.extract("it is 4", "Answer:") is None
    assert exact.extract("it is 4", "") == "it is 4"
    assert mathematics.extract("x\nAnswer: $\\frac12$", "Answer:") == "$\\frac12$"
    assert mathematics.extract("<think>a</think> <answer> 12 </answer> bye", "<answer>") == "12"
    assert exact.extract("<result>12</result>", "<result>") == "12"
    assert choice.extract("C\nANSWER >> B", "ABCD", ">>") == "B"


@pytest.mark.parametrize(
    "answer", ["1,000", "$1000", "1000.", " 1000 ", "1000.0", "1,000.00", "+1000", "01000", "1e3", "1.0E+3", "**1000**"]
)
def test_exact_forgives_how_a_number_is_written(answer):
    assert exact.judge(f"#{answer}", {"answer": "1000"}, PLAIN).correct
    assert exact.judge("#1000", {"answer": answer}, PLAIN).correct


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("1,2", "12"),
        ("1.5", "15"),
        ("a b", "ab"),
        ("7", "-7"),
        ("1,23", "123"),
        ("1.10", "1.01"),
        ("70", "70%"),
        ("1/2", "0.5"),
        ("7", "7 dollars"),
        ("1 234", "1234"),
        ("7.0.0", "7.0"),
    ],
)
def test_exact_forgives_nothing_else(gold, answer):
    judged = exact.judge(f"#{answer}", {"answer": gold}, PLAIN)
    assert (judged.verdict, judged.correct) == ("wrong", False)


# ---- boxes


def test_boxes_are_found_in_one_pass():
    assert last_boxes(r"\boxed{1} then \boxed{2}") == (15, ["2"])
    assert last_boxes(r"\boxed{1} and \boxed{2}")[1] == ["1", "2"]
    assert last_boxes(r"$\boxed{1}$, $\boxed{2}$ and $\boxed{3}$.")[1] == ["1", "2", "3"]
    assert last_boxes(r"\boxed{\boxed{4}}")[1] == [r"\boxed{4}"]
    assert last_boxes(r"\boxed{\{1\}}")[1] == [r"\{1\}"]
    assert last_boxes(r"\boxed{5} but \boxed{6")[1] == ["5"]
    assert last_boxes(r"{ \boxed{5}")[1] == ["5"]
    assert last_boxes(r"\boxed 5")[1] == ["5"]
    assert last_boxes("none") == (-1, [])
    assert last_boxes(r"\boxed{9}, I leave \boxed{ } out")[1] == ["9"]
    began = time.monotonic()
    last_boxes("\\boxed{" * 100_000 + "}" * 50_000)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        (r"\[ \boxed{-7} \quad \text{or} \quad \boxed{7} \]", ["-7", "7"]),
        (r"\boxed{4};\; \boxed{5}", ["4", "5"]),
        (r"\(\boxed{4}\), \(\boxed{5}\), and \(\boxed{6}\)", ["4", "5", "6"]),
        (r"\(m = \boxed{4}\) and \(n = \boxed{5}\)", ["4", "5"]),
        (r"\boxed{(0,4)} \text{ for part (b) and } \boxed{(0,5)}", ["(0,4)", "(0,5)"]),
        (r"\boxed{4} boys and \boxed{5} girls", ["4", "5"]),
        ("\\boxed{4}.\n\n\\boxed{5}", ["5"]),
        (r"\boxed{4} is the first step and \boxed{5} the last", ["5"]),
        (r"\boxed{4}, but no, \boxed{5}", ["5"]),
        (r"\boxed{4} plus one is \boxed{5}", ["5"]),
        (r"\boxed{4}. \boxed{4}", ["4"]),
    ],
)
def test_boxes_of_one_answer(text, contents):
    assert last_boxes(text)[1] == contents


# ---- choice


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"so \boxed{C}", "C"),
        (r"\boxed{\text{(B)}}", "B"),
        (r"\boxed{D. 12 m}", "D"),
        (r"\boxed{\textbf{Answer: A}}", "A"),
        (r"\boxed{12}. Answer: B", "B"),
        (r"\boxed{A} or \boxed{B}", None),
        ("The answer is (A).", "A"),
        ("Answer: c", "C"),
        ("Answer:A", "A"),
        ("**Answer: B**", "B"),
        ("Answer: $C$", "C"),
        ("Answer:\n\nC", "C"),
        ("answer (D)", "D"),
        ("The correct answer is **D**", "D"),
        ("correct option: A.", "A"),
        ("the answer is option C", "C"),
        ("Answer: A\nAnswer: C", "C"),
        ("Answer: C, since A is wrong", "C"),
        ("the answer is D, A is false", "D"),
        ("Answer: A because it is", "A"),
        ("I think\n\nC", "C"),
        ("I think\n(C)", "C"),
        ("Option (B) is the correct one", "B"),
        ("Thus D is correct.", "D"),
        ("A is the answer", "A"),
        ("C. because", "C"),
        ("<think>Answer: A</think>\nThe answer is B", "B"),
        ("The answer is a matter of taste.", None),
        ("Answer: A proton moves", None),
        ("A large mass is there", None),
        ("A is not correct", None),
        ("Answer: B and C", None),
        ("The answer is B or C.", None),
        ("Answer: A, B", None),
        ("The options are A, B, C, D.", None),
        ("Answer: E", None),
        ("the answer is Albert", None),
        ("Answer: Dog", None),
        ("Answer: None of these", None),
        ("I'd pick something.", None),
        ("", None),
    ],
)
def test_choice_extraction(text, letter):
    assert choice.extract(text) == letter


CHOICES = ["a proton", "bicyclo", "12 m", "ene"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        # a stated answer stands, whatever is said of others behind it
        ("Answer: D\n\nOption A: ignores friction.\nOption B is not aromatic.", "D"),
        ("The answer is B.\nChoice C would be right in a vacuum.", "B"),
        ("Answer: C\nIf the answer were A, energy would be lost.", "C"),
        ("Answer: C. The answer would be A if the pressure was constant.", "C"),
        ("The answer is C. Why is the answer B wrong?", "C"),
        ("Answer: D" + "\nOption A is wrong." * 2000, "D"),
        ("The answer is A, not B.", "A"),
        ("Answer: B\n\nThe answer is either A or C.", None),
        ("Answer: A\nNo. The correct option is D.", "D"),
        # the first letter is read as the others are
        ("Answer: A) twelve", "A"),
        ("Answer: A. twelve", "A"),
        ("Answer: A a proton", "A"),
        ("Answer: D ene", "D"),
        ("Answer: A neutron", None),
        ("The correct answer is:\n\n**A)** twelve", "A"),
        # wrapped letters
        ("<answer>(B) bicyclo</answer>", "B"),
        ("<think>Answer: A</think><answer>\nThe answer is C\n</answer> since A is wrong", "C"),
        ("<answer>A and B</answer>", None),
        ("The answer is ‘B’.", "B"),
        ("Final answer: “c”", "C"),
        ('{"reasoning": "option A fails", "final_answer": "B", "confidence": 0.9}', "B"),
        ("{'answer': 'A'}", "A"),
        ('{"answer": ["A", "B"]}', None),
        ("故选：Ｃ。", "C"),
        ("正确选项是（B）", "B"),
        ("### Answer：（A）", "A"),
        ("The answer is the letter A.", "A"),
        # the text of a choice
        ("The answer is bicyclo.", "B"),
        ("Answer: $12$ m", "C"),
        # conclusions and what is none
        ("I would choose B.\nThanks for reading!", "B"),
        ("Option B is the correct answer.\nIt is the only one with friction.", "B"),
        ("Therefore, option D.\n\nDone.", "D"),
        ("It's not C, so I think it's B", "B"),
        ("The answer is for sure D, as A and C fail", "D"),
        ("I would not choose A.", None),
        ("Option A is wrong.", None),
        ("Option A fails and option B is impossible.", None),
        ("Statement A is correct.", None),
    ],
)
def test_choice_reads_what_is_stated(text, letter):
    assert choice.extract(text, "ABCD", choices=CHOICES) == letter


def test_choice_of_any_letter_is_read_alike():
    """No letter is favoured: the same sentence with each letter gives each letter."""
    for form in (
        "Answer: {}) of them",
        "answer is {}",
        "Answer: {}. of them",
        '{{"answer": "{}"}}',
        "so {} is correct",
    ):
        assert [choice.extract(form.format(letter)) for letter in "ABCD"] == list("ABCD"), form


def test_choice_knows_the_choices():
    question = {"choices": ["10 m", "20 m", "30 m"], "answer": "(b)"}
    assert choice.judge(r"\boxed{20 m}", question, PLAIN).correct
    assert choice.judge("Answer: C", question, PLAIN).verdict == "wrong"
    assert choice.judge("Answer: D", question, PLAIN).verdict == "no answer"
    choice.check_question(question)
    for wrong in ({"answer": "D", "choices": ["x", "y", "z"]}, {"answer": "7"}, {"answer": ""}, {}):
        with pytest.raises(UnusableQuestion):
            choice.check_question(wrong)


# ---- math


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_math_equal(gold, answer):
    assert mathematics.equal(gold, answer)


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_math_different(gold, answer):
    assert not mathematics.equal(gold, answer)


@pytest.mark.parametrize("gold", sorted({gold for gold, _ in (*EQUAL, *DIFFERENT)}))
def test_math_can_read_the_gold_answers(gold):
    mathematics.check_question({"answer": gold})


@pytest.mark.parametrize(("gold", "answer", "equal"), KNOWN_DEVIATIONS)
def test_math_known_deviations(gold, answer, equal):
    assert mathematics.equal(gold, answer) is equal


def test_there_are_enough_pairs():
    assert len(set(EQUAL)) + len(set(DIFFERENT)) >= 200
    assert len(set(EQUAL)) == len(EQUAL) and len(set(DIFFERENT)) == len(DIFFERENT)


@pytest.mark.parametrize(("gold", "answer"), HUGE)
def test_math_does_not_evaluate_huge_numbers(gold, answer):
    mathematics.equal("1", "2x")  # loads the library
    began = time.monotonic()
    assert not mathematics.equal(gold, answer)
    assert time.monotonic() - began < 3
    assert mathematics.equal(answer, answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"first \boxed{1}, finally \boxed{\frac{1}{2}} as said", r"\frac{1}{2}"),
        (r"$\boxed{1}$ and $\boxed{2}$", "1, 2"),
        ("She has 3.\n#### 42\n", "42"),
        ("The answer is $x+1$.", "x+1"),
        ("so the final answer is 12.", "12"),
        ("the answer 5 and 100% of 33.333...%\nA: 33", "33"),
        ("x = 4\n**Final Answer:** $x+1$", "$x+1$"),
        ("So there are **57** ways.", "57"),
        ("### Final Answer\n**57**", "57"),
        ("**Answer:**\n\n57", "57"),
        ("➡ Answer: **57**", "57"),
        ("#### **57**", "57"),
        ("#### Summary\nThe answer is 57.", "57"),
        ("#### 57\nchecked", "57"),
        ("The answer is −57.", "-57"),
        ("The answer is 2⁵.", "2^{5}"),
        ("Final answer: the least $k$ is 57.", "57."),
        ("Work.\nAnswer: The perimeter is $57$", "$57$"),
        (r"I get \boxed{3} first. Final Answer: The final answer is $57$. I hope it is correct.", "$57$"),
        (r"\boxed{57}, and \boxed{} as asked.", "57"),
        ("<think>\\boxed{1}</think><answer>57</answer>", "57"),
        (r"<answer>It is \boxed{57}</answer>", "57"),
        (r"$2-\frac{1}{\mathrm{e}}$", r"2-\frac{1}{ e }"),
        ("I cannot solve this", None),
        (r"\boxed{}", None),
        ("", None),
    ],
)
def test_math_extraction(text, answer):
    assert mathematics.extract(text) == answer


def test_gold_answers_of_whole_solutions_are_what_they_box():
    question = {"answer": r"Add $3$ and $4$ to get $\boxed{7}$, which is prime."}
    mathematics.check_question(question)
    assert mathematics.judge(r"\boxed{7}", question, PLAIN).correct
    assert not mathematics.judge(r"\boxed{3}", question, PLAIN).correct


@pytest.mark.parametrize("gold", [r"5i<x", r"-1<x \le 1:(-1,1]", r"4 = k = m"])
def test_relations_that_sympy_refuses_do_not_end_the_process(gold):
    mathematics.equal(gold, "x>2")


@pytest.mark.parametrize("gold", ["?", "", " ", "\\frac{", "----", None, True, ["7"], "the #### "])
def test_unreadable_gold_answers_are_refused(gold):
    for verifier in (mathematics, exact) if not (isinstance(gold, str) and gold.strip()) else (mathematics,):
        with pytest.raises(UnusableQuestion):
            verifier.check_question({"answer": gold})
