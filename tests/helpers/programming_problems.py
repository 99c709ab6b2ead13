"""Programming problems of our own in the forms of MBPP and LiveCodeBench, each with a right and wrong solutions."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tests.helpers.benchmark_rows import lcb


@dataclass(frozen=True)
class Asserted:
    """A function with three asserts, as MBPP has them."""

    name: str
    right: str
    wrong: tuple[str, ...]
    asserts: tuple[str, str, str]

    @property
    def question(self) -> dict[str, object]:
        """The row of the questions file."""
        tests = {"type": "function", "code": "\n".join(self.asserts), "entry_point": self.name}
        return {"id": self.name, "question": "?", "tests": tests}


@dataclass(frozen=True)
class Contest:
    """A problem of LiveCodeBench: a method of Solution, or a program if `name` is None."""

    name: str | None
    right: str
    wrong: tuple[str, ...]
    cases: tuple[tuple[str, str], ...]

    @property
    def row(self) -> dict[str, object]:
        """The row of the release."""
        kind = "stdin" if self.name is None else "functional"
        tests = json.dumps([{"input": given, "output": expected, "testtype": kind} for given, expected in self.cases])
        fields = {"public_test_cases": tests, "private_test_cases": "[]", "question_id": self.name or self.cases[0][1]}
        if self.name is None:
            return lcb(**fields)
        return lcb("functional", **fields, metadata=json.dumps({"func_name": self.name}))


ASSERTED = (
    Asserted(
        "second_largest",
        "def second_largest(xs):\n    return sorted(set(xs))[-2]",
        ("def second_largest(xs):\n    return sorted(xs)[-2]", "def second_largest(xs):\n    return max(xs)"),
        (
            "assert second_largest([1, 5, 5, 3]) == 3",
            "assert second_largest([2, 1]) == 1",
            "assert second_largest((7, 8, 9)) == 8",
        ),
    ),
    Asserted(
        "tally",
        "from collections import Counter\ndef tally(text):\n    return Counter(text.split())",
        ("def tally(text):\n    return {w: 1 for w in text.split()}", "def tally(text):\n    return text.split()"),
        ("assert tally('a b a') == {'a': 2, 'b': 1}", "assert tally('') == {}", "assert tally('x') == {'x': 1}"),
    ),
    Asserted(
        "split_pair",
        "def split_pair(xs):\n    return tuple(xs[::2]), tuple(xs[1::2])",
        ("def split_pair(xs):\n    return xs[::2], xs[1::2]", "def split_pair(xs):\n    return tuple(xs)"),
        (
            "assert split_pair([1, 2, 3]) == ((1, 3), (2,))",
            "assert split_pair([]) == ((), ())",
            "assert split_pair([4]) == ((4,), ())",
        ),
    ),
    Asserted(
        "mean_of",
        "def mean_of(xs):\n    return sum(xs) / len(xs)",
        ("def mean_of(xs):\n    return sum(xs) // len(xs)", "def mean_of(xs):\n    return round(sum(xs) / len(xs), 1)"),
        (
            "import math\nassert math.isclose(mean_of([1, 2]), 1.5)",
            "assert math.isclose(mean_of([1, 1, 2]), 4 / 3, rel_tol=1e-9)",
            "assert mean_of([3]) == 3",
        ),
    ),
    Asserted(
        "common",
        "def common(a, b):\n    return set(a) & set(b)",
        ("def common(a, b):\n    return set(a) | set(b)", "def common(a, b):\n    return [x for x in a if x in b]"),
        (
            "assert common([1, 2], [2, 3]) == {2}",
            "assert common('ab', 'cd') == set()",
            "assert common([], [1]) == set()",
        ),
    ),
    Asserted(
        "factorial",
        "def factorial(n):\n    return 1 if n < 2 else n * factorial(n - 1)",
        ("import math\ndef factorial(n):\n    return math.gamma(n + 1) if n < 100 else 0",),
        (
            "assert factorial(5) == 120",
            "assert factorial(0) == 1",
            "assert factorial(30) == 265252859812191058636308480000000",
        ),
    ),
    Asserted(
        "flip",
        "def flip(table):\n    return {v: k for k, v in table.items()}",
        ("def flip(table):\n    return table", "def flip(table):\n    return list(table.items())"),
        (
            "assert flip({1: 'a'}) == {'a': 1}",
            "assert flip({}) == {}",
            "assert flip({'x': (1,), 'y': 2}) == {(1,): 'x', 2: 'y'}",
        ),
    ),
    Asserted(
        "is_even",
        "def is_even(n):\n    return n % 2 == 0",
        ("def is_even(n):\n    return n % 2", "def is_even(n):\n    return True", "def is_even(n):\n    return 'True'"),
        ("assert is_even(2) == True", "assert is_even(3) == False", "assert is_even(0) is True"),
    ),
    Asserted(
        "ranks",
        "def ranks(xs):\n    return zip(sorted(xs), range(len(xs)))",
        ("def ranks(xs):\n    return zip(xs, range(len(xs)))",),
        (
            "assert list(ranks([3, 1])) == [(1, 0), (3, 1)]",
            "assert dict(ranks('ba')) == {'a': 0, 'b': 1}",
            "assert not list(ranks([]))",
        ),
    ),
    Asserted(
        "parse",
        "def parse(text):\n    if not text.isdigit():\n        raise ValueError(text)\n    return int(text)",
        (
            "def parse(text):\n    return int(text) if text.isdigit() else None",
            "def parse(text):\n    raise ValueError(text)",
        ),
        (
            "assert parse('12') == 12",
            "try:\n    parse('x')\nexcept ValueError as error:\n    assert str(error) == 'x'\nelse:\n    assert False",
            "assert parse('0') == 0",
        ),
    ),
)

CONTESTS = (
    Contest(
        None,
        "n = int(input())\nprint(sum(map(int, input().split())))",
        ("n = int(input())\nprint(n)", "print(6)", "n = int(input())\nprint(max(map(int, input().split())))"),
        (("3\n1 2 3\n", "6\n"), ("1\n-5\n", "-5\n")),
    ),
    Contest(
        None,
        "import sys\nfor line in sys.stdin:\n    a, b = map(int, line.split())\n    print(f'{a / b:.5f}')",
        ("while True:\n    a, b = map(int, input().split())\n    print(a // b)",),
        (("1 2\n3 4\n", "0.5\n0.75\n"), ("1 8\n", "0.12500\n")),
    ),
    Contest(
        None,
        "s = input()\nprint('YES' if s == s[::-1] else 'NO')",
        ("s = input()\nprint('Yes' if s == s[::-1] else 'No')", "print('YES')", "print('YES\\nNO')"),
        (("abba\n", "YES"), ("abc\n", "NO")),
    ),
    Contest(
        None,
        "n = int(input())\nprint(*[i for i in range(1, n + 1) if n % i == 0])",
        ("n = int(input())\nfor i in range(1, n + 1):\n    if n % i == 0:\n        print(i)", "print('1 2 3 6')"),
        (("6\n", "1 2 3 6\n"), ("7\n", "1 7\n")),
    ),
    Contest(
        None,
        "def main():\n    print(2 ** int(input()) % (10 ** 9 + 7))\n\nif __name__ == '__main__':\n    main()",
        ("print(2 ** int(input()))", "def main():\n    print(8)"),
        (("3\n", "8"), ("100\n", "976371285")),
    ),
    Contest(
        "twoSum",
        "class Solution:\n    def twoSum(self, xs: List[int], t: int) -> List[int]:\n        d = {}\n"
        "        for i, x in enumerate(xs):\n            if t - x in d:\n"
        "                return [d[t - x], i]\n            d[x] = i",
        ("class Solution:\n    def twoSum(self, xs, t):\n        return [0, 1]", "class Solution:\n    pass"),
        (("[2, 7, 11]\n9", "[0, 1]"), ("[3, 2, 4]\n6", "[1, 2]")),
    ),
    Contest(
        "count",
        "class Solution:\n    def count(self, s: str, k: int) -> int:\n"
        "        return sum(c >= k for c in Counter(s).values())",
        ("class Solution:\n    def count(self, s, k):\n        return len(s)", "def other(s, k):\n    return 1"),
        (('"aab"\n2', "1"), ('"abc"\n1', "3")),
    ),
    Contest(
        "reduce",
        "def reduce(xs):\n    return functools.reduce(operator.xor, xs, 0)",
        ("class Solution:\n    def reduce(self, xs):\n        return sum(xs)", "x = 1"),
        (("[1, 2]", "3"), ("[3, 3]", "0"), ("[]", "0")),
    ),
    Contest(
        "split",
        "class Solution:\n    def split(self, s):\n        return tuple(re.findall('[a-z]+', s))",
        ("class Solution:\n    def split(self, s):\n        return s.split()",),
        (('"ab-c"', '["ab", "c"]'), ('""', "[]")),
    ),
    Contest(
        "median",
        "class Solution:\n    def median(self, xs):\n        xs = sorted(xs)\n        n = len(xs)\n"
        "        return (xs[(n - 1) // 2] + xs[n // 2]) / 2",
        (
            "class Solution:\n    def median(self, xs):\n        return sorted(xs)[len(xs) // 2]",
            "from statistics import *",
        ),
        (("[1, 2]", "1.5"), ("[3, 1, 2]", "2.0")),
    ),
)
