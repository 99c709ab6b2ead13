"""Tests of a function `order(items)`, which returns a sorted list and raises ValueError for None, in many forms."""

from __future__ import annotations

RIGHT = """
def order(items):
    if items is None:
        raise ValueError('nothing')
    return sorted(items)
"""

WRONG = """
def order(items):
    return items
"""

SETS = {
    "lines": "assert order([2, 1]) == [1, 2]",
    "test function": """
def test_order():
    assert candidate([2, 1]) == [1, 2]
""",
    "second test function fails": """
def test_a():
    assert order([]) == []
def test_b():
    assert order([2, 1]) == [1, 2]
""",
    "test function that takes the candidate": """
def test(candidate):
    assert candidate([2, 1]) == [1, 2]
""",
    "test function with a helper": """
def test_case(given, expected):
    assert order(given) == expected
def test_all():
    test_case([2, 1], [1, 2])
""",
    "test functions and a runner of their own": """
def test_order():
    assert order([2, 1]) == [1, 2]
if __name__ == '__main__':
    test_order()
    print('ok')
""",
    "test functions behind a runner that is never true": """
def test_order():
    assert order([2, 1]) == [1, 2]
def test_a():
    assert order([]) == []
if __name__ == 'other':
    test_order()
""",
    "check": """
def check(f):
    assert f([2, 1]) == [1, 2]
""",
    "check with a space": """
def check (f) :
    assert f([2, 1]) == [1, 2]
""",
    "check without arguments": """
def check():
    assert order([2, 1]) == [1, 2]
""",
    "check beside the word": """
# call check(order) to run
NOTE = 'check('
def check(f):
    assert f([2, 1]) == [1, 2]
""",
    "check that returns whether": """
def check(candidate):
    return candidate([2, 1]) == [1, 2]
""",
    "main": """
def main():
    assert order([2, 1]) == [1, 2]

if __name__ == '__main__':
    main()
""",
    "script that exits": """
import sys
bad = sum(order(x) != sorted(x) for x in ([2, 1], [3, 1, 2]))
sys.exit(1 if bad else 0)
""",
    "class": """
class TestOrder:
    def setup_method(self):
        self.given = [2, 1]
    def test_it(self):
        assert order(self.given) == [1, 2]
""",
    "class with a nested one": """
class TestOrder:
    def test_none(self):
        assert order([]) == []
    class TestMore:
        @staticmethod
        def test_it():
            assert order([2, 1]) == [1, 2]
""",
    "module hooks": """
def setup_module(module):
    module.given = [2, 1]
def setup_function():
    global expected
    expected = [1, 2]
given = expected = None
def test_it():
    assert order(given) == expected
""",
    "unittest, not started": """
import unittest
class Order(unittest.TestCase):
    def setUp(self):
        self.f = candidate
    def test_it(self):
        self.assertEqual(self.f([2, 1]), [1, 2])
""",
    "unittest.main": """
from unittest import TestCase, main
class Order(TestCase):
    def test_it(self):
        self.assertListEqual(order([2, 1]), [1, 2])
if __name__ == '__main__':
    main()
""",
    "unittest.main without exit": """
import unittest
class Order(unittest.TestCase):
    def test_it(self):
        self.assertEqual(order([2, 1]), [1, 2])
    def test_two(self):
        self.assertEqual(order([]), [])
unittest.main(argv=['first-arg-is-ignored'], exit=False, verbosity=2)
""",
    "unittest.main with one name": """
import unittest
class A(unittest.TestCase):
    def test_it(self):
        self.assertEqual(order([]), [])
class B(unittest.TestCase):
    def test_it(self):
        self.assertEqual(order([2, 1]), [1, 2])
unittest.main(argv=['x', 'A'])
""",
    "unittest.main that finds nothing": """
import unittest, sys
class B(unittest.TestCase):
    def test_it(self):
        self.assertEqual(order([2, 1]), [1, 2])
unittest.main(module='sys', argv=['x'])
""",
    "runner of unittest": """
import unittest
class Order(unittest.TestCase):
    def test_it(self):
        for given in ([], [2, 1]):
            with self.subTest(given=given):
                self.assertEqual(order(given), sorted(given))
suite = unittest.TestLoader().loadTestsFromTestCase(Order)
unittest.TextTestRunner(verbosity=2).run(suite)
""",
    "inherited test case": """
import unittest
class Base(unittest.TestCase):
    given = []
    def test_it(self):
        self.assertEqual(order(list(self.given)), sorted(self.given))
class Sub(Base):
    given = [2, 1]
""",
    "load_tests": """
import unittest
class Order(unittest.TestCase):
    def runTest(self):
        assert order([2, 1]) == [1, 2]
def load_tests(loader, tests, pattern):
    return unittest.TestSuite([Order()])
""",
    "import of the solution": """
from solution import order
def test_it():
    assert order([2, 1]) == [1, 2]
""",
    "import under another name": """
from my_module import order as o
def test_it():
    assert o([2, 1]) == [1, 2]
""",
    "import inside a test": """
def test_it():
    from my_module import order
    assert order([2, 1]) == [1, 2]
""",
    "import of the module": """
import my_module as m
def test_it():
    assert m.order([2, 1]) == [1, 2]
""",
    "numpy's asserts": """
import numpy as np
np.testing.assert_array_equal(order([2, 1]), [1, 2])
""",
    "pytest": """
import pytest
@pytest.fixture
def given():
    return [2, 1]
def test_it(given):
    assert order(given) == [1, 2]
def test_none():
    with pytest.raises(ValueError, match='nothing'):
        order(None)
if __name__ == '__main__':
    pytest.main([__file__])
""",
    "pytest's parameters": """
from __future__ import annotations
import pytest
from solution import order
@pytest.mark.parametrize(('given', 'expected'), [([], []), ([2, 1], [1, 2])])
def test_it(given, expected):
    assert order(given) == expected
""",
    "pytest's class with the candidate": """
import pytest
class TestOrder:
    @pytest.mark.parametrize('given', [[2, 1]])
    def test_it(self, candidate, given, capsys):
        assert candidate(given) == [1, 2]
""",
    "pytest's raises in lines": """
import pytest
with pytest.raises(ValueError):
    order(None)
assert order([2, 1]) == [1, 2]
""",
    "pytest with a test case": """
import pytest, unittest
class Order(unittest.TestCase):
    def test_it(self):
        self.assertEqual(order([2, 1]), [1, 2])
""",
}
"""Each lets RIGHT pass, and neither WRONG nor a solution that is not there."""

PRINTS = {
    "redirected": """
import contextlib, io
text = io.StringIO()
with contextlib.redirect_stdout(text):
    show(3)
assert text.getvalue() == '3\\n'
""",
    "patched": """
import io, unittest
from unittest.mock import patch
class Show(unittest.TestCase):
    @patch('sys.stdout', new_callable=io.StringIO)
    def test_it(self, stdout):
        show(4)
        self.assertEqual(stdout.getvalue().strip(), '4')
""",
    "captured": """
import pytest
def test_it(capsys):
    show(5)
    assert capsys.readouterr().out == '5\\n'
""",
}
"""Tests of a function `show(x)`, which prints x and returns nothing."""

LENIENT = {
    "catches everything": """
def test_it():
    try:
        r = order(None)
    except Exception:
        return
    assert r
""",
    "expects an exception": """
import unittest
class T(unittest.TestCase):
    def test_it(self):
        with self.assertRaises(Exception):
            order(None)
""",
    "expects a failure": """
import unittest
class T(unittest.TestCase):
    @unittest.expectedFailure
    def test_it(self):
        self.assertEqual(order(None), [])
""",
    "tries again": """
for _ in range(2):
    try:
        order(None)
    except BaseException as e:
        assert e is not None
""",
}
"""Passed by RIGHT, and by whatever raises; a solution that is not there must not."""

UNUSABLE = {
    "a function that nobody calls": (
        """
def verify_all():
    assert order([2, 1]) == [1, 2]
""",
        "'verify_all' is defined",
    ),
    "main that nobody calls": (
        """
def main():
    assert order([2, 1]) == [1, 2]
""",
        "'main' is defined and never called",
    ),
    "a method that nobody calls": (
        """
class Checks:
    def test_it(self):
        assert order([]) == []
""",
        "never calls",
    ),
    "a class with its own constructor": (
        """
class TestIt:
    def __init__(self, x):
        pass
    def test_it(self):
        assert order([]) == []
""",
        "__init__",
    ),
    "another function": (
        """
def order(x):
    return sorted(x)
assert order([2, 1]) == [1, 2]
""",
        "never calls 'order'",
    ),
    "nothing of the function": ("assert sorted([2, 1]) == [1, 2]", "never calls 'order'"),
    "no comparison": ("print(order([2, 1]) == [1, 2])", "nothing else that can fail"),
    "a comparison without assert": ("order([2, 1]) == [1, 2]", "nothing else that can fail"),
    "words instead of failures": (
        """
try:
    assert order([2, 1]) == [1, 2]
    print('passed')
except AssertionError:
    print('failed')
""",
        "drops its failures, which line 2 catches",
    ),
    "an argument that nothing gives": (
        """
def test_it(given):
    assert order(given) == [1]
""",
        "takes 'given'",
    ),
    "a method's argument": (
        """
class TestIt:
    def test_it(self, given):
        assert order(given) == [1]
""",
        "TestIt.test_it takes 'given'",
    ),
    "check with more": (
        """
def check(f, given):
    assert f(given) == []
""",
        "more than the function under test",
    ),
    "a generator": (
        """
def test_it():
    yield
    assert order([]) == []
""",
        "is a generator",
    ),
    "coroutines": (
        """
async def test_it():
    assert order([]) == []
""",
        "asynchronous",
    ),
    "asynchronous test case": (
        """
import unittest
class T(unittest.IsolatedAsyncioTestCase):
    async def test_it(self):
        self.assertEqual(order([]), [])
""",
        "asynchronous",
    ),
    "folders": (
        """
import pytest
def test_it(tmp_path):
    assert order([]) == []
""",
        "'tmp_path'",
    ),
    "failures that are expected": (
        """
import pytest
@pytest.mark.xfail(reason='later')
def test_it():
    assert order([2, 1]) == [1, 2]
""",
        "nothing else that can fail",
    ),
    "an exit that nobody sees": (
        """
import os
assert order([2, 1]) == [1, 2]
os._exit(0)
""",
        "os._exit",
    ),
    "a replaced input": (
        """
from unittest.mock import patch
with patch('builtins.input', return_value='3'):
    assert order([]) == []
""",
        "replace 'builtins.input', but the function runs in a process of its own",
    ),
    "another standard input": (
        """
import sys, io
sys.stdin = io.StringIO('3')
assert order([]) == []
""",
        "replace sys.stdin",
    ),
    "a relative import": (
        """
from .sorting import order
assert order([]) == []
""",
        "package of their own",
    ),
    "a library that a test imports": (
        """
def test_it():
    import no_such_library
    assert no_such_library.sort(order([1]))
""",
        "no_such_library",
    ),
    "doctests": (
        """
import doctest
assert order([]) == []
doctest.testmod()
""",
        "doctests",
    ),
    "a library that is not there": (
        """
import no_such_library
assert no_such_library.sort(order([1]))
""",
        "no_such_library",
    ),
    "more of the solution": (
        """
from solution import order, helper
assert helper(order([1]))
""",
        "'helper'",
    ),
    "more of its module": (
        """
import solution
assert solution.helper(solution.order([1]))
""",
        "'helper'",
    ),
}
"""Refused when read, with the reason."""
