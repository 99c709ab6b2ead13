"""Programs for the sandbox: hostile ones with the verdict they must get, and honest ones that must not be hindered."""

from __future__ import annotations

_LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
_RAISE = "raise OSError(ctypes.get_errno(), 'refused')"
_TO_EVERYONE = "import os\nfor d in range(3, 50):\n    try: os.write(d, {data!r})\n    except OSError: pass\n"

HONEST = {
    "input": ("a, b = map(int, input().split()); print(a + b)", "7\n"),
    "as the main module": ("if __name__ == '__main__': print('yes')", "yes\n"),
    "own files": ("open('x','w').write('hi'); import os; print(open('x').read(), os.listdir()); os.remove('x')", None),
    "temporary files": ("import tempfile; f = tempfile.TemporaryFile(dir='.'); f.write(b'x'); print('ok')", "ok\n"),
    "threads": (
        "import threading, sys\nsys.setrecursionlimit(10**5)\nthreading.stack_size(32 << 20)\n"
        "def f(n): return 0 if n == 0 else 1 + f(n - 1)\n"
        "t = threading.Thread(target=lambda: print(f(20000))); t.start(); t.join()",
        "20000\n",
    ),
    "standard library": ("import heapq, bisect, re, decimal, fractions, itertools, datetime; print('ok')", "ok\n"),
    "resource limits of its own": (
        "import resource as r; r.setrlimit(r.RLIMIT_STACK, (1 << 20, r.getrlimit(r.RLIMIT_STACK)[1])); print('ok')",
        "ok\n",
    ),
    "numpy": ("import numpy as np; print(int((np.ones((50, 50)) @ np.ones((50, 50))).sum()))", "125000\n"),
    "environment": ("import os; print(sorted(os.environ))", "['LANG', 'PATH']\n"),
    "large output": ("print('x' * 2_000_000)", "x" * 2_000_000 + "\n"),
}

CONTAINED = {
    "endless loop": ("while True: pass", "timeout"),
    "endless sleep": ("import time\ntime.sleep(1000)", "timeout"),
    "ignores signals": (
        "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except OSError: pass\n"
        "while True: pass",
        "timeout",
    ),
    "swallows every exception": ("while True:\n    try: bytearray(1 << 40)\n    except BaseException: pass", "timeout"),
    "10 GB at once": ("x = bytearray(10 << 30)", "memory"),
    "10 GB bit by bit": ("x = []\nwhile True: x.append(bytearray(1 << 20))", "memory"),
    "big integer": ("x = 1 << (1 << 36)", "memory"),
    "endless regular expression": ("import re; re.match('(a*)*$', 'a' * 40 + 'b')", "timeout"),
    "fork": (
        "import os\nfor _ in range(50):\n    if os.fork() == 0: import time; time.sleep(20)",
        "crash: PermissionError",
    ),
    "fork by vfork and spawn": ("import subprocess; subprocess.run(['/bin/true'])", "crash: PermissionError"),
    "other process by multiprocessing": (
        "import multiprocessing as m\nif __name__ == '__main__': m.Process(target=print).start()",
        "crash: PermissionError",
    ),
    "exec": ("import os; os.execv('/bin/sh', ['sh', '-c', 'echo 7'])", "crash: PermissionError"),
    "many threads": (
        "import threading, time\nthreading.stack_size(65536)\n"
        "for _ in range(3000): threading.Thread(target=time.sleep, args=(20,)).start()",
        "crash: too many threads",
    ),
    "socket": ("import socket; socket.socket()", "crash: PermissionError"),
    "unix socket": ("import socket; socket.socket(socket.AF_UNIX)", "crash: PermissionError"),
    "kills its parent": ("import os; os.kill(os.getppid(), 0)", "crash: PermissionError"),
    "kills everyone": ("import os; os.kill(-1, 0)", "crash: PermissionError"),
    "limits its parent": (
        "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
        "crash: PermissionError",
    ),
    "signals its parent by a descriptor": (
        "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())",
        "crash: PermissionError",
    ),
    "outlives its parent": (
        _LIBC + "if libc.prctl(1, 0, 0, 0, 0): " + _RAISE,
        "crash: PermissionError",
    ),
    "raises its memory limit": (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
        "crash: ValueError",
    ),
    "traces its parent": (
        _LIBC + "if libc.ptrace(16, os.getppid(), 0, 0): " + _RAISE,
        "crash: PermissionError",
    ),
    "mounts": (
        _LIBC + "if libc.mount(b'none', b'/tmp', b'tmpfs', 0, None): " + _RAISE,
        "crash: PermissionError",
    ),
    "new namespace": (
        _LIBC + "if libc.unshare(0x10000000): " + _RAISE,
        "crash: PermissionError",
    ),
    "one large file": ("f = open('x', 'wb')\nfor _ in range(100): f.write(bytes(1 << 20)); f.flush()", "disk"),
    "many files": ("for i in range(3000): open(str(i), 'w').close()\nimport time; time.sleep(9)", "disk"),
    "fills the disk": (
        "for i in range(40):\n    with open(str(i), 'wb') as f: f.write(bytes(8 << 20))\nimport time; time.sleep(9)",
        "disk",
    ),
    "endless output": ("while True: print('x' * 10000)", "disk"),
    "many open files": ("x = [open('f', 'w') for _ in range(100)]", "crash: OSError"),
    "folders": ("import os; os.mkdir('d')", "crash: PermissionError"),
    "links": ("import os; os.symlink('/etc/passwd', 'p')", "crash: PermissionError"),
    "crash of the interpreter": ("import ctypes; ctypes.string_at(0)", "crash: SIGSEGV"),
    "abort": ("import os; os.abort()", "crash: SIG"),
    "nested brackets": ("x = " + "(" * 100_000, "crash: SyntaxError"),
    "null bytes": ("x = '\0'", "crash: SyntaxError|crash: ValueError"),
    "exit status": ("import sys; sys.exit(3)", "crash: exit status 3"),
    "misleading last words": ("import sys; print('MemoryError', file=sys.stderr); sys.exit(1)", "crash: exit status 1"),
    "closes everything": ("import os; os.closerange(0, 100); raise ValueError", "crash: "),
}

TESTS = "assert f(2) == 4\nassert f(3) == 9\nassert f([1]) == [1, 1]"

RIGHT = "def f(x):\n    return x * x if isinstance(x, int) else x + x\n"

CHEATS = {
    "equal to everything": (
        "class E:\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\ndef f(x): return E()",
        "wrong",
    ),
    "a number equal to everything": (
        "class E(int):\n    def __eq__(self, o): return True\n    __hash__ = int.__hash__\ndef f(x): return E(5)",
        "wrong",
    ),
    "patched builtins": (
        "import builtins\nbuiltins.isinstance = lambda *a: True\nbuiltins.AssertionError = ValueError\n"
        "builtins.compile = None\ndef f(x): return 5",
        "wrong|crash: ",
    ),
    "early exit at import": ("import sys\nsys.exit(0)", "crash: ended early"),
    "early exit in the call": ("import sys\ndef f(x): sys.exit(0)", "crash: SystemExit"),
    "hard exit in the call": ("import os\ndef f(x): os._exit(0)", "crash: ended early"),
    "says that it passed": (
        'print("passed")\n' + _TO_EVERYONE.format(data=b'{"outcome": "passed", "error": ""}') + "def f(x): return 5",
        "crash: ",
    ),
    "closes its channel": ("import os, time\nos.closerange(3, 50)\ntime.sleep(60)", "crash: |timeout"),
    "answers nonsense": (
        _TO_EVERYONE.format(data=b"\0\0\0\0\0\0\0\x02[]" * 100) + "def f(x): return 5",
        "crash: ",
    ),
    "announces a huge answer": (_TO_EVERYONE.format(data=b"\x7f" * 8) + "def f(x): return 5", "crash: "),
    "raises the tests' own error": ("def f(x): raise AssertionError", "crash: AssertionError"),
    "loops in the call": ("def f(x):\n    while True: pass", "timeout"),
    "memory in the call": ("def f(x): return bytearray(10 << 30)", "memory"),
    "endless iterator": ("import itertools\ndef f(x): return itertools.count()", "wrong"),
    "a list that holds itself": ("def f(x):\n    y = []\n    y.append(y)\n    return y", "crash: RecursionError"),
    "looks for the tests": (
        "import gc, sys, inspect\ndef f(x):\n    for o in gc.get_objects():\n"
        "        if isinstance(o, str) and 'assert f(' in o: return 4\n"
        "    for frame in inspect.stack():\n"
        "        if 'assert f(2)' in str(frame.frame.f_locals): return 4\n"
        "    return 0",
        "wrong",
    ),
    "reads standard input": ("x = input()", "crash: EOFError"),
    "not there": ("def g(x): return x", "crash: NameError"),
    "not Python": ("def f(x", "crash: SyntaxError"),
}

HONEST_FUNCTIONS = {
    "plain": (RIGHT, TESTS, "f"),
    "humaneval": (
        "def inc(x):\n    return x + 1",
        "METADATA = {}\n\ndef check(candidate):\n    assert candidate(1) == 2",
        "inc",
    ),
    "humaneval, called": ("def inc(x):\n    return x + 1", "def check(c):\n    assert c(1) == 2\ncheck(inc)", "inc"),
    "method": ("class Solution:\n    def f(self, x): return x + 1", "assert f(1) == 2 and candidate(2) == 3", "f"),
    "dotted": ("class Box:\n    def f(self, x): return x + 1", "assert f(1) == 2", "Box.f"),
    "in place": ("def f(x): x.sort()", "y = [3, 1]\nf(y)\nassert y == [1, 3]", "f"),
    "exceptions": (
        "def f(x): raise ValueError('no')",
        "try:\n    f(1)\nexcept ValueError as e:\n    assert str(e) == 'no'\nelse:\n    assert False",
        "f",
    ),
    "types": (
        "def f(x): return x",
        "for v in [None, True, 1, 1 << 400, -(1 << 70), 1.5, float('inf'), 2j, 'é\\ud800', b'x', (1, [2]), {1, 2},\n"
        "          frozenset([3]), {(1, 2): [3]}, range(3), [[]], {}]:\n"
        "    assert f(v) == v and type(f(v)) is type(v)",
        "f",
    ),
    "keywords": ("def f(x, *, y): return x - y", "assert f(3, y=1) == 2", "f"),
    "generator": ("def f(n): yield from range(n)", "assert list(f(3)) == [0, 1, 2]", "f"),
    "numpy": ("import numpy as np\ndef f(x): return np.int64(x)", "assert f(3) == 3", "f"),
    "tolerance": ("def f(x): return x / 3", "import math\nassert math.isclose(f(1), 1 / 3)", "f"),
    "prints": ("print('hello')\ndef f(x):\n    print('x' * 10**6)\n    return x", "assert f(3) == 3", "f"),
    "main guard": ("def f(x): return x\nif __name__ == '__main__': f(input())", "assert f(3) == 3", "f"),
}
