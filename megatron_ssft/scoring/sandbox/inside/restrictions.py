"""Restrictions of a program under test, applied by its own process before the program's first line.

Two ways to shut off the file system, each without privileges: Landlock (Linux 5.13) and, where the kernel lacks it, a
mount namespace of its own that holds nothing but the interpreter. In both the program reads the interpreter's folders
and writes its own folder, nothing else. On top: no capabilities, hard resource limits, the system call filter.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
import struct
from collections.abc import Sequence

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 38, 22
_SECCOMP_MODE_FILTER = 2
_SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
_SYS_LANDLOCK_CREATE, _SYS_LANDLOCK_ADD, _SYS_LANDLOCK_RESTRICT = 444, 445, 446
_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT = 1, 2, 4, 8, 32
_MS_NOATIME, _MS_NODIRATIME, _MS_BIND, _MS_REC, _MS_PRIVATE, _MS_RELATIME = 1024, 2048, 4096, 16384, 1 << 18, 1 << 21

DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_FILE, _MAKE_REG, _REFER, _TRUNCATE = (
    1 << bit for bit in (0, 1, 2, 3, 5, 8, 13, 14)
)
_RIGHTS_OF_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
_RIGHTS_OF_LATER_ABIS = (1 << 16) - 1


def die_with_parent(parent: int) -> None:
    """Be killed when the process that started this one ends."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(1)


def limit_resources(*, cpu_seconds: int, memory: int, file_size: int, open_files: int, stack: int) -> None:
    """Hard limits; memory, file_size and stack in bytes. The stack may grow to `stack` where the machine allows it."""
    hard_stack = resource.getrlimit(resource.RLIMIT_STACK)[1]
    stack = stack if hard_stack == resource.RLIM_INFINITY else min(stack, hard_stack)
    resource.setrlimit(resource.RLIMIT_STACK, (stack, hard_stack))
    for name, value in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file_size),
        (resource.RLIMIT_NOFILE, open_files),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(name)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def use_one_processor(number: int) -> None:
    """Run on one of the allowed processors, so that a library does not start a thread for each of them."""
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {allowed[number % len(allowed)]})


def drop_privileges(seccomp_filter: bytes) -> None:
    """Drop all capabilities and privileges to come, and install the system call filter. Raises OSError."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    nothing = (ctypes.c_uint32 * 6)()
    number = _SYS_CAPSET[os.uname().machine]
    _checked(_libc.syscall(ctypes.c_long(number), header, nothing), "capset")
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    instructions = ctypes.create_string_buffer(seccomp_filter, len(seccomp_filter))
    address = ctypes.addressof(instructions)
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(seccomp_filter) // 8, address))
    _checked(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0), "prctl(PR_SET_SECCOMP)")


def enter_landlock(folder: str, readable: Sequence[str]) -> None:
    """Read `readable` (files and folders), read and write `folder`, nothing else. Raises OSError."""
    abi = _libc.syscall(ctypes.c_long(_SYS_LANDLOCK_CREATE), None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    _checked(abi, "landlock_create_ruleset")
    handled = _RIGHTS_OF_ABI.get(abi, _RIGHTS_OF_LATER_ABIS)
    attributes = ctypes.c_uint64(handled)
    ruleset = _libc.syscall(
        ctypes.c_long(_SYS_LANDLOCK_CREATE), ctypes.byref(attributes), ctypes.c_size_t(8), ctypes.c_uint32(0)
    )
    _checked(ruleset, "landlock_create_ruleset")
    own = _READ_FILE | _READ_DIR | _WRITE_FILE | _MAKE_REG | _REMOVE_FILE | _TRUNCATE
    for path in readable:
        _allow(ruleset, path, (_READ_FILE | _READ_DIR | _EXECUTE) & handled)
    for path in DEVICES:
        _allow(ruleset, path, _READ_FILE | _WRITE_FILE)
    _allow(ruleset, folder, own & handled)
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    restricted = _libc.syscall(ctypes.c_long(_SYS_LANDLOCK_RESTRICT), ctypes.c_int(ruleset), ctypes.c_uint32(0))
    _checked(restricted, "landlock_restrict_self")
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    """Add one rule for `path` and what lies under it; a path that does not exist needs none."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    if not os.path.isdir(path):
        rights &= _READ_FILE | _WRITE_FILE | _EXECUTE | _TRUNCATE
    rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, descriptor))
    added = _libc.syscall(
        ctypes.c_long(_SYS_LANDLOCK_ADD), ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint32(0)
    )
    _checked(added, f"landlock_add_rule for {path}")
    os.close(descriptor)


def enter_namespaces(folder: str, root: str, readable: Sequence[str]) -> None:
    """Change to a file system of bind mounts under `root`, an empty folder: `readable` read-only and `folder`.

    The process must have one thread. Network and System V IPC are new and empty too. Raises OSError.
    """
    user, group = os.geteuid(), os.getegid()
    new = _CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWNET | _CLONE_NEWIPC
    _checked(_libc.unshare(new), "unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC)")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        # The kernel takes these by /proc alone; and only the standard library can be imported here.
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE, None)
    _mount("none", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=700")
    for path in (*readable, *DEVICES):
        if os.path.islink(path):  # /lib on most systems
            _make_parents(root + path)
            os.symlink(os.readlink(path), root + path)
        elif os.path.exists(path) and not os.path.exists(root + path):
            _bind(path, root + path)
    for mounted, flags in _mounts_under(root):
        _mount("none", mounted, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | flags, None)
    _bind(folder, root + folder)
    _mount("none", root, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV, None)
    _checked(_libc.chroot(root.encode()), "chroot")
    os.chdir(folder)


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        _make_parents(target)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o600))
    _mount(source, target, None, _MS_BIND | _MS_REC, None)


def _make_parents(path: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)


def _mounts_under(root: str) -> list[tuple[str, int]]:
    """Mount points below `root` with those of their flags that a remount must keep."""
    flag_of_option = {
        "nodev": _MS_NODEV,
        "noexec": _MS_NOEXEC,
        "noatime": _MS_NOATIME,
        "nodiratime": _MS_NODIRATIME,
        "relatime": _MS_RELATIME,
    }
    mounts = []
    # Not in the standard library; psutil, which cannot be imported here, does not know a bind mount's own flags.
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            fields = line.split(b" ")
            path = os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), fields[4]))
            if path.startswith(root + "/"):
                options = os.fsdecode(fields[5]).split(",")
                mounts.append((path, sum(flag_of_option.get(option, 0) for option in options)))
    return mounts


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    result = _libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])
    _checked(result, f"mount {target}")


def _checked(result: int, what: str) -> None:
    """Raises OSError for a system call that returned -1."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
