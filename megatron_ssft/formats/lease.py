"""The lease on a run folder: one job at a time writes it, over nodes and shared file systems.

A file in the folder names its owner, who touches it every few seconds. A lease is free where there is no file, where
its owner was killed on this machine, or where nobody touched it for two minutes. Clocks are not compared: whoever waits
watches for a change. Locks of the operating system are not used, since shared file systems often have none.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from pathlib import Path

import msgspec
import psutil
from msgspec import Struct

from megatron_ssft.errors import StillInUse, UserError
from megatron_ssft.formats.files import naming, sync_file

LEASE = ".lease.json"
BEAT_SECONDS = 10.0
"""An owner touches its lease this often."""
SILENCE_SECONDS = 120.0
"""An owner that did not for so long is gone."""
REMAINS_SECONDS = 300.0
"""So long a job waits for the end of what a lost node has left of its earlier attempt."""
_LOOK_SECONDS = 0.5


class Owner(Struct, frozen=True, kw_only=True):
    """Who holds the lease."""

    token: str
    host: str
    pid: int
    started: float
    """Of the process, in seconds since 1970; process ids are used again."""
    pid_space: str
    """Boot and namespace in which the process id means something."""
    job: str | None
    """SLURM's number."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (SLURM job {self.job})" if self.job else "")

    @property
    def runs_here(self) -> bool:
        """Whether its process id means something to this process."""
        return self.pid_space == _pid_space()

    def is_of_the_job_of(self, other: Owner) -> bool:
        """Whether both are of one SLURM job."""
        return self.job is not None and self.job == other.job

    @property
    def is_dead(self) -> bool:
        """Whether it ran here and does not run any more; False also where that cannot be known."""
        if not self.runs_here:
            return False
        try:
            process = psutil.Process(self.pid)
            return process.create_time() != self.started or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


class Lease:
    """A lease that this process holds, until `release`."""

    def __init__(self, folder: Path, owner: Owner, created: list[Path], beat_seconds: float) -> None:
        self._folder = folder
        self._path = folder / LEASE
        self._owner = owner
        self._created = created
        self._ended = threading.Event()
        self._beat = threading.Thread(target=self._touch, args=(beat_seconds,), name="lease", daemon=True)
        self._beat.start()

    def check(self) -> None:
        """Raise UserError where another job has taken the folder, or it is gone: nothing may be written any more."""
        owner = _owner(self._path)
        if owner is None:
            raise UserError(f"{self._path}: is gone; was the folder moved or deleted? Nothing more is written")
        if owner.token != self._owner.token:
            raise UserError(f"{self._folder}: was taken over by {owner}; nothing more is written")

    def release(self) -> None:
        """Give the lease back, and remove the folders that were made for it where they are still empty."""
        self._ended.set()
        self._beat.join()
        owner = _owner(self._path)
        if owner is not None and owner.token == self._owner.token:
            self._path.unlink(missing_ok=True)
            _remove_empty(self._created)  # of a folder that was moved, another may have the name

    def _touch(self, beat_seconds: float) -> None:
        while not self._ended.wait(beat_seconds):
            with contextlib.suppress(OSError):  # a file system that is away for a moment; touching needs no space
                owner = _owner(self._path)
                if owner is None or owner.token != self._owner.token:
                    return  # `check` says so
                os.utime(self._path)


def acquire(
    folder: Path,
    flag: str = "",
    beat_seconds: float = BEAT_SECONDS,
    silence_seconds: float = SILENCE_SECONDS,
    remains_seconds: float = REMAINS_SECONDS,
) -> Lease:
    """Take the lease on a folder, which is made where it is not there.

    Args:
        flag: by which the folder was given, for messages.

    Raises:
        UserError: another job holds it, whose owner is named; or a file is in the way.
        StillInUse: an earlier attempt of this job holds it, and has not ended in `remains_seconds`.
        OSError: the folder cannot be written.
    """
    try:
        created = _make(folder)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{flag}{folder}: {error.filename} is a file where a folder is needed") from error
    path, owner = folder / LEASE, this_process()
    deadline = None
    try:
        while not _claim(path, owner):
            content, holder = _content(path), _owner(path)
            if content is None:
                continue  # given back meanwhile
            if not (holder is not None and holder.is_dead) and not _is_silent(path, holder, silence_seconds):
                if holder is not None and holder.is_of_the_job_of(owner):
                    deadline = _wait_for_remains(path, holder, deadline, remains_seconds)
                    continue
                raise UserError(
                    f"{flag}{folder}: is in use by {holder or 'another job'}; wait for its end, stop it, or choose "
                    "another folder"
                )
            _remove(path, content, owner.token)
    except (UserError, OSError):
        _remove_empty(created)
        raise
    return Lease(folder, owner, created, beat_seconds)


def _wait_for_remains(path: Path, holder: Owner, deadline: float | None, seconds: float) -> float:
    """Let some time pass, and return until when that is done. Raises StillInUse after that."""
    if deadline is None:
        print(f"{path}: held by an earlier attempt of this job, {holder}; waiting up to {seconds:.0f} s", flush=True)
        deadline = time.monotonic() + seconds
    if time.monotonic() > deadline:
        raise StillInUse(f"{path.parent}: is in use by an earlier attempt of this job, {holder}; it has to end first")
    time.sleep(_LOOK_SECONDS)
    return deadline


def this_process() -> Owner:
    """This process as the owner of something, with a token of its own."""
    return Owner(
        token=secrets.token_hex(8),
        host=socket.gethostname(),
        pid=os.getpid(),
        started=psutil.Process().create_time(),
        pid_space=_pid_space(),
        job=os.environ.get("SLURM_JOB_ID"),
    )


def _pid_space() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {psutil.boot_time()}"


def _claim(path: Path, owner: Owner) -> bool:
    """Put the lease there unless there is one: whole, and by one process only."""
    temporary = path.with_name(f"{LEASE}.{owner.token}.tmp")  # by this ending the next start removes it
    try:
        with naming(path), open(temporary, "wb") as file:
            file.write(msgspec.json.encode(owner))
            sync_file(file)
        return _link(temporary, path) or (not path.exists() and _create(path, owner))
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> bool:
    """Whether the file got the second name, which another may have already."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:
        if not temporary.exists():  # whoever holds the folder has cleared it up
            return False
        return temporary.stat().st_nlink == 2  # done, and the answer was lost on its way; else there are no hard links
    return True


def _create(path: Path, owner: Owner) -> bool:
    try:
        with naming(path), open(path, "xb") as file:
            file.write(msgspec.json.encode(owner))
            sync_file(file)
    except FileExistsError:
        return False
    return True


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _owner(path: Path) -> Owner | None:
    """None for a lease that is not there, or cannot be read."""
    try:
        return msgspec.json.decode(_content(path) or b"", type=Owner)
    except (msgspec.DecodeError, RecursionError):
        return None


def _is_silent(path: Path, holder: Owner | None, seconds: float) -> bool:
    """Watch a lease whose owner may be anywhere; False as soon as a sign of life is seen."""
    if holder is not None and holder.runs_here:
        return False  # it runs here
    seen, deadline = _look(path), time.monotonic() + seconds
    print(f"{path}: held by {holder or 'another job'}; waiting up to {seconds:.0f} s for a sign of life", flush=True)
    while time.monotonic() < deadline:
        time.sleep(min(_LOOK_SECONDS, seconds))
        if _look(path) != seen:
            return False
    return True


def _look(path: Path) -> tuple[int, bytes] | None:
    """What changes with every touch. Opening makes a network file system ask its server."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns, file.read()
    except FileNotFoundError:
        return None


def _remove(path: Path, content: bytes, token: str) -> None:
    """Remove a dead owner's lease, but not one that another job took at the same moment."""
    aside = path.with_name(f"{LEASE}.{token}.dead")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if _content(aside) != content:
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()


def _make(folder: Path) -> list[Path]:
    """Make a folder and those above it; those that were not there, the deepest first."""
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):  # not empty, or gone
        for folder in folders:
            folder.rmdir()
