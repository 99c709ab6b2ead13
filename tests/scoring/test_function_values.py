"""What functions take and return crosses between processes with its type, and nothing that a program wrote with it."""

from __future__ import annotations

import pytest

from megatron_ssft.scoring.sandbox.function_tests import run_function_tests
from megatron_ssft.scoring.sandbox.programs import Limits
from megatron_ssft.scoring.verifiers import code
from megatron_ssft.scoring.verifiers.common import Settings


def verdict_of(source: str, tests: str, entry_point: str = "f", **options: object) -> str:
    return run_function_tests(source, tests, entry_point, Limits(seconds=30.0), None, **options)


VALUES = {
    "deque": ("deque(range(x), maxlen=3)", "from collections import deque", "v == deque([2, 3, 4]) and v.maxlen == 3"),
    "Fraction": ("Fraction(x, 3)", "from fractions import Fraction", "v == Fraction(5, 3) and v.denominator == 3"),
    "Decimal": ("Decimal('0.50') + x", "from decimal import Decimal", "str(v) == '5.50'"),
    "date": ("date(2024, 2, x)", "from datetime import date", "v == date(2024, 2, 5) and v.isoweekday() == 1"),
    "datetime": (
        "datetime(2024, 2, x, 7, 8, 9, 10, tzinfo=timezone(timedelta(hours=2)))",
        "from datetime import datetime, timedelta, timezone",
        "v == datetime(2024, 2, 5, 5, 8, 9, 10, tzinfo=timezone.utc) and v.hour == 7",
    ),
    "naive datetime": ("datetime(2024, 2, x, fold=1)", "from datetime import datetime", "v.tzinfo is None and v.fold"),
    "time": ("time(1, x, 3)", "from datetime import time", "v == time(1, 5, 3)"),
    "timedelta": ("timedelta(days=-x, seconds=3)", "from datetime import timedelta", "v == timedelta(-5, 3)"),
    "Counter": ("Counter('ab' * x + 'c')", "from collections import Counter", "v.most_common(1) == [('a', 5)]"),
    "OrderedDict": (
        "OrderedDict([(2, x), (1, 0)])",
        "from collections import OrderedDict",
        "v == OrderedDict([(2, 5), (1, 0)]) and v != OrderedDict([(1, 0), (2, 5)])",
    ),
    "defaultdict": ("defaultdict(list, {x: [1]})", "from collections import defaultdict", "v[5] == [1] and v[6] == []"),
    "defaultdict of a lambda": (
        "defaultdict(lambda: 7, {x: 1})",
        "from collections import defaultdict",
        "v == {5: 1} and 6 not in v",
    ),
    "array": ("array('d', [x, 1.5])", "from array import array", "v == array('d', [5.0, 1.5]) and v.typecode == 'd'"),
    "named tuple": (
        "namedtuple('Point', 'x y')(x, [2])",
        "from collections import namedtuple",
        "v == (5, [2]) and v.x == 5 and v._fields == ('x', 'y') and type(v).__name__ == 'Point'",
    ),
    "typed named tuple": (
        "NamedTuple('P', [('count', int)])(x)",
        "from typing import NamedTuple",
        "v.count == 5 and tuple(v) == (5,)",
    ),
    "set of dates": ("{date(2024, 1, 1), frozenset({x})}", "from datetime import date", "date(2024, 1, 1) in v"),
    "nested": (
        "{(Fraction(1, 2),): [deque([x])]}",
        "from fractions import Fraction\nfrom collections import deque",
        "v[(0.5,)][0][0] == 5",
    ),
    "UUID": ("uuid.UUID(int=x)", "import uuid", "v == uuid.UUID(int=5)"),
    "long integer": ("10 ** 5000 + x", "", "str(v).endswith('5') and len(str(v)) == 5001 and v == 10 ** 5000 + 5"),
    "text of a long integer": ("str(10 ** 5000 + x)", "", "v == str(10 ** 5000 + 5) and int(v) % 10 == 5"),
    "subclass of int": ("type('I', (int,), {'__eq__': lambda a, b: False})(x)", "", "v == 5"),
    "memoryview": ("memoryview(bytes([x]))", "", "v == b'\\x05'"),
    "numpy scalar": ("np.float64(x) / 2", "import numpy as np", "v == 2.5 and v.dtype == np.float64"),
    "numpy array": (
        "np.arange(x)[:4].reshape(2, 2)",
        "import numpy as np",
        "v.shape == (2, 2) and (v[1] == [2, 3]).all()",
    ),
    "empty numpy array": (
        "np.zeros((0, x), dtype='f4')",
        "import numpy as np",
        "v.shape == (0, 5) and v.dtype == 'f4'",
    ),
    "long double": ("np.longdouble(x)", "import numpy as np", "v == 5"),
    "boolean of numpy": ("np.bool_(x > 3)", "import numpy as np", "v"),
}
"""Expression of the argument x = 5, imports, what holds of the value v."""


@pytest.mark.parametrize("name", VALUES)
def test_values_arrive_with_their_types(name):
    expression, imports, check = VALUES[name]
    tests = f"{imports}\nv = f(5)\nassert {check}"
    assert verdict_of(f"{imports}\ndef f(x):\n    return {expression}", tests) == "correct"


@pytest.mark.parametrize("name", ["deque", "Fraction", "date", "Counter", "array", "named tuple", "numpy array"])
def test_arguments_arrive_with_their_types(name):
    expression, imports, check = VALUES[name]
    tests = f"{imports}\nx = 5\nv = f({expression}, type({expression}).__name__)\nassert {check}"
    assert verdict_of("def f(v, kind):\n    assert type(v).__name__ == kind\n    return v", tests) == "correct"


def test_what_a_function_does_to_its_arguments_is_seen():
    tests = (
        "from collections import deque, Counter\nfrom array import array\nimport numpy as np\n"
        "for v in (deque([3, 1, 2]), array('i', [3, 1, 2]), np.array([3, 1, 2]), [3, 1, 2]):\n"
        "    f(v)\n    assert list(v) == [1, 2, 3], v\nc = Counter('a')\ng = c\nf(c)\nassert g['b'] == 1"
    )
    source = """
def f(v):
    if isinstance(v, dict):
        v["b"] += 1
    else:
        for i, x in enumerate(sorted(v)):
            v[i] = x
"""
    assert verdict_of(source, tests) == "correct"


def test_arrays_are_lists_where_tests_do_not_know_numpy():
    source = "import numpy as np\ndef f(n):\n    return np.arange(n), np.int64(n), np.float32(0.5)"
    assert verdict_of(source, "assert f(3) == ([0, 1, 2], 3, 0.5) and type(f(3)[1]) is int") == "correct"


UNKNOWN = {
    "function": ("lambda y: x + y", "assert f(1)(2) == 3", "function"),
    "pattern": ("__import__('re').compile('a')", "import re\nassert f(1) == re.compile('a')", "Pattern"),
    "set of functions": ("{len}", "assert f(1) == {len}", "builtin_function_or_method"),
    "own class": ("Own()", "assert f(1).value == 1", "Own"),
    "own class, called": ("Own()", "assert f(1)(3) == 4", "Own"),
    "own class in a condition": ("Own()", "if f(1):\n    assert False", "Own"),
    "own class as text": ("Own()", "assert str(f(1)) == 'own'", "Own"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_results_that_cannot_be_passed_on_are_named(name):
    """They may be right, so they are not called wrong."""
    expression, tests, kind = UNKNOWN[name]
    source = f"class Own:\n    value = 1\n    def __str__(self): return 'own'\ndef f(x):\n    return {expression}"
    assert verdict_of(source, tests) == f"unsupported result: {kind}"


EQUAL = "    def __eq__(s, o): return True\n    __ne__ = lambda s, o: False\n    __hash__ = None\n"
CHEATS = {
    "a deque equal to everything": f"class E(deque):\n{EQUAL}def f(x): return E([9])",
    "a fraction equal to everything": f"class E(Fraction):\n{EQUAL}def f(x): return E(9)",
    "a named tuple equal to everything": f"class E(namedtuple('E', 'a')):\n{EQUAL}def f(x): return E(9)",
    "a date equal to everything": f"class E(date):\n{EQUAL}def f(x): return E(1, 1, 1)",
    "an array equal to everything": (
        "import numpy as np\nclass E(np.ndarray):\n    def __eq__(s, o): return np.array(True)\n"
        "def f(x): return np.ones(1).view(E)"
    ),
    "a patched library": (
        "import fractions\nclass E:\n    numerator = denominator = property(lambda s: 1 / 0)\n"
        "fractions.Fraction = E\ndef f(x): return E()"
    ),
    "parts that are no numbers": "class E(Fraction):\n    numerator, denominator = [1], 'x'\ndef f(x): return E(9)",
    "a zone of its own": (
        "from datetime import datetime, tzinfo\nclass Z(tzinfo):\n    def utcoffset(s, d): return None\n"
        f"{EQUAL}def f(x): return datetime(1, 1, 1, tzinfo=Z())"
    ),
    "ends the tests": "def f(x): raise SystemExit(0)",
    "ends the process": "import os\ndef f(x): os._exit(0)",
    "ends the process on its way": "import os\nos._exit(0)",
    "asks to stop with success": "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit(0)",
}
CHEATS_OF_RUNNERS = {
    "skips the tests": "import unittest\ndef f(x): raise unittest.SkipTest('no')",
    "skips the tests of pytest": "import pytest\ndef f(x): pytest.skip('no')",
    "ends the tests": "def f(x): raise SystemExit(0)",
    "patched unittest": (
        "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\n"
        "unittest.main = lambda *a, **k: None\ndef f(x): return 0"
    ),
    "a module in place of the tests": (
        "import sys, types\nsys.modules['__main__'] = types.ModuleType('x')\ndef f(x): return 0"
    ),
}
FORMS = {
    "unittest": (
        "import unittest\nclass T(unittest.TestCase):\n    def test_it(self):\n"
        "        self.assertEqual(f(1), [1])\nunittest.main()"
    ),
    "pytest": "import pytest\ndef test_it():\n    assert f(1) == [1]",
}
NO_PASS = ("wrong", "crash: ", "unsupported result: ")
IMPORTS = "from collections import deque, namedtuple\nfrom fractions import Fraction\nfrom datetime import date"


@pytest.mark.parametrize("name", CHEATS)
def test_no_value_is_equal_by_its_own_word(name):
    verdict = verdict_of(CHEATS[name], "assert f(1) == [1]", preamble=IMPORTS)
    assert verdict.startswith(NO_PASS), verdict


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CHEATS_OF_RUNNERS)
def test_no_runner_is_tricked(name, form):
    verdict = verdict_of(CHEATS_OF_RUNNERS[name], FORMS[form])
    assert verdict.startswith(NO_PASS), verdict


STARS = "".join(f"from {name} import *\n" for name in ("itertools", "functools", "operator", "math", "heapq", "bisect"))


@pytest.mark.parametrize("name", ["count", "accumulate", "reduce", "add", "gcd", "merge", "insort"])
def test_a_preamble_does_not_stand_in_for_the_solution(name):
    """LiveCodeBench imports everything from sixteen modules; itertools' `count` is not the solution's."""
    tests = "assert candidate(2) == 3"
    method = f"class Solution:\n    def {name}(self, x):\n        return x + 1"
    assert verdict_of(method, tests, name, preamble=STARS) == "correct"
    assert verdict_of(f"from itertools import *\n{method}", tests, name, preamble=STARS) == "correct"
    assert verdict_of(f"def {name}(x):\n    return x + 1", tests, name, preamble=STARS) == "correct"
    assert verdict_of(f"{name} = lambda x: x + 1", tests, name, preamble=STARS) == "correct"
    assert verdict_of("def other(x):\n    return x + 1", tests, name, preamble=STARS) == "crash: NameError"


def test_star_imports_of_the_tests_do_not_hide_the_function():
    for tests in (
        "from itertools import *\n{}",
        "'''Tests.'''\nfrom __future__ import annotations\nif True:\n    from itertools import *\n{}",
    ):
        tests = tests.format("assert count(2) == 3")
        assert verdict_of("def count(x):\n    return x + 1", tests, "count") == "correct"
        assert verdict_of("def count(x):\n    return x", tests, "count") == "wrong"


def test_a_solution_may_give_what_the_preamble_imports_too():
    tests = "assert gcd(4, 6) == 2"
    assert verdict_of("from math import gcd", tests, "gcd", preamble=STARS) == "correct"
    assert verdict_of("import math\ngcd = math.gcd", tests, "gcd", preamble=STARS) == "correct"


@pytest.mark.parametrize("entry_point", ["Solution().grow", "Solution.grow", "grow"])
def test_methods_are_entry_points(entry_point):
    source = "class Solution:\n    def grow(self, x):\n        return x + 1"
    question = {"tests": {"type": "function", "code": "assert candidate(1) == 2", "entry_point": entry_point}}
    code.check_question(question)
    assert code.judge(f"```python\n{source}\n```", question, Settings(timeout=30.0)).correct


def test_floats_of_functions_have_the_tolerance_that_is_given():
    tests = "assert f(1) == [0.3, {'a': (2.0, 1)}] and 0.3 == f(1)[0] and not f(1)[0] != 0.3"
    source = "def f(x):\n    return [0.1 + 0.2, {'a': (2.0 * (1 + 1e-8), x)}]"
    assert verdict_of(source, tests) == "wrong"
    assert verdict_of(source, tests, float_tolerance=1e-6) == "correct"
    assert verdict_of(source, tests, float_tolerance=1e-9) == "wrong"
    assert verdict_of(source.replace(", x)", ", x + 1)"), tests, float_tolerance=1e-1) == "wrong"
    huge = "assert f(1) != 10 ** 400 and f(1) == float('inf')"
    assert verdict_of("def f(x):\n    return float('inf')", huge, float_tolerance=1e-6) == "correct"
