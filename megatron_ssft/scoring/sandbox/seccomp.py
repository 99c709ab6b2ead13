"""The system calls that a program under test may make, as a seccomp filter (classic BPF, see seccomp(2)).

The list names what is allowed: computing, files that are already reachable, threads, clocks. What is not on it fails
with EPERM, most of all starting processes, sockets, signals to anyone, tracing, mounting, changing modes and owners,
and every call that acts on another process. The filter needs no privileges and cannot be taken off again.
"""

from __future__ import annotations

import platform
import struct

# fmt: off
_X86_64 = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
    "ioctl": 16, "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "pipe": 22, "select": 23,
    "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32, "dup2": 33, "nanosleep": 35, "getitimer": 36,
    "alarm": 37, "setitimer": 38, "getpid": 39, "sendfile": 40, "clone": 56, "exit": 60, "uname": 63, "fcntl": 72,
    "fsync": 74, "fdatasync": 75, "ftruncate": 77, "getdents": 78, "getcwd": 79, "chdir": 80, "rename": 82,
    "unlink": 87, "readlink": 89, "umask": 95, "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "sysinfo": 99,
    "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "getgroups": 115,
    "getresuid": 118, "getresgid": 120, "rt_sigtimedwait": 128, "sigaltstack": 131, "prctl": 157, "arch_prctl": 158,
    "setrlimit": 160, "gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204, "getdents64": 217,
    "set_tid_address": 218, "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229,
    "clock_nanosleep": 230, "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233, "openat": 257, "newfstatat": 262,
    "unlinkat": 263, "renameat": 264, "readlinkat": 267, "faccessat": 269, "pselect6": 270, "ppoll": 271,
    "set_robust_list": 273, "epoll_pwait": 281, "eventfd2": 290, "epoll_create1": 291, "dup3": 292, "pipe2": 293,
    "prlimit64": 302, "getcpu": 309, "renameat2": 316, "getrandom": 318, "membarrier": 324, "statx": 332, "rseq": 334,
    "clone3": 435, "close_range": 436, "faccessat2": 439,
}
_AARCH64 = {
    "getcwd": 17, "eventfd2": 19, "epoll_create1": 20, "epoll_ctl": 21, "epoll_pwait": 22, "dup": 23, "dup3": 24,
    "fcntl": 25, "ioctl": 29, "unlinkat": 35, "renameat": 38, "ftruncate": 46, "faccessat": 48, "chdir": 49,
    "openat": 56, "close": 57, "pipe2": 59, "getdents64": 61, "lseek": 62, "read": 63, "write": 64, "readv": 65,
    "writev": 66, "pread64": 67, "pwrite64": 68, "sendfile": 71, "pselect6": 72, "ppoll": 73, "readlinkat": 78,
    "newfstatat": 79, "fstat": 80, "fsync": 82, "fdatasync": 83, "exit": 93, "exit_group": 94, "set_tid_address": 96,
    "futex": 98, "set_robust_list": 99, "nanosleep": 101, "getitimer": 102, "setitimer": 103, "clock_gettime": 113,
    "clock_getres": 114, "clock_nanosleep": 115, "sched_getaffinity": 123, "sched_yield": 124, "restart_syscall": 128,
    "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigtimedwait": 137, "rt_sigreturn": 139,
    "getresuid": 148, "getresgid": 150, "times": 153, "getgroups": 158, "uname": 160, "getrlimit": 163,
    "setrlimit": 164, "getrusage": 165, "umask": 166, "prctl": 167, "getcpu": 168, "gettimeofday": 169, "getpid": 172,
    "getppid": 173, "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178, "sysinfo": 179,
    "brk": 214, "munmap": 215, "mremap": 216, "clone": 220, "mmap": 222, "mprotect": 226, "madvise": 233,
    "prlimit64": 261, "renameat2": 276, "getrandom": 278, "membarrier": 283, "statx": 291, "rseq": 293,
    "clone3": 435, "close_range": 436, "faccessat2": 439,
}
# fmt: on

_ARCHITECTURES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}
"""Machine name -> (AUDIT_ARCH_*, system call numbers)."""

_EPERM, _ENOSYS = 1, 38
_ALLOW = 0x7FFF0000
_ERRNO = 0x00050000
_KILL_PROCESS = 0x80000000
_LOAD, _AND, _EQUAL, _GREATER_OR_EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE, _OFFSET_ARGUMENTS = 0, 4, 16

_CLONE_THREAD = 0x00010000
_TRUNCATING_READ = (0o1003, 0o1000)
"""open flags (mask, value): O_TRUNC without write access, which empties a file that may only be read."""
_ALLOWED_VALUES = {
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
    "ioctl": (1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),
    # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC; not F_SETOWN, which sends signals to anyone
    "fcntl": (1, (0, 1, 2, 3, 4, 1030)),
    # PR_SET_NAME, PR_SET_VMA; not PR_SET_PDEATHSIG, which ties the program to the life of its parent
    "prctl": (0, (15, 0x53564D41)),
    # the process itself; its hard limits stay where they are because it has no capabilities
    "prlimit64": (0, (0,)),
}
"""System call -> (argument, its allowed values)."""

Instruction = tuple[int, int, int, int]


def is_supported() -> bool:
    """Whether the system call numbers of this machine are known."""
    return platform.machine() in _ARCHITECTURES


def build_filter() -> bytes:
    """The filter for this machine as an array of `struct sock_filter`. Needs `is_supported()`."""
    architecture, numbers = _ARCHITECTURES[platform.machine()]
    deny = (_RETURN, 0, 0, _ERRNO | _EPERM)
    program: list[Instruction] = [
        (_LOAD, 0, 0, _OFFSET_ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _OFFSET_NUMBER),
        (_GREATER_OR_EQUAL, 0, 1, 0x40000000),  # the x32 calls of x86
        deny,
    ]
    for name, number in numbers.items():
        body = _body(name)
        program += [(_EQUAL, 0, len(body), number), *body]
    program.append(deny)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _body(name: str) -> list[Instruction]:
    """What happens once the call is known to be `name`; always ends in a return."""
    allow, deny = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | _EPERM)
    if name == "clone3":  # its flags lie in memory, out of a filter's sight; the C library falls back to clone
        return [(_RETURN, 0, 0, _ERRNO | _ENOSYS)]
    if name == "clone":
        return [_argument(0), (_AND, 0, 0, _CLONE_THREAD), (_EQUAL, 0, 1, _CLONE_THREAD), allow, deny]
    if name in ("open", "openat"):
        mask, value = _TRUNCATING_READ
        return [_argument(1 if name == "open" else 2), (_AND, 0, 0, mask), (_EQUAL, 0, 1, value), deny, allow]
    if name in _ALLOWED_VALUES:
        position, values = _ALLOWED_VALUES[name]
        tests = [(_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
        return [_argument(position), *tests, deny, allow]
    return [allow]


def _argument(position: int) -> Instruction:
    """Load the low half of an argument (both machines are little-endian)."""
    return (_LOAD, 0, 0, _OFFSET_ARGUMENTS + 8 * position)
