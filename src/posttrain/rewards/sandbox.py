"""Python written by a model, run in a process of its own: limited, without network, in a folder that is gone after it.

What it is good for: code that hangs, eats memory, writes floods, exits, forks, opens sockets or tampers with files, as
models write it by accident or find it by trial. What it is not: a wall against someone who wants out. The code runs in
the interpreter that watches it, on the kernel of this machine; where that matters, run the whole job in a container or
a virtual machine that may be lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from posttrain.records import UserError


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may take before it is ended."""

    seconds: float = 5.0
    """Of wall-clock time; its processor time is limited to the next whole second above."""
    memory_mb: int = 512
    """Address space, MiB."""
    output_bytes: int = 64 * 2**10
    """Of stdout, of stderr, and of each file it writes."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of a program, and the beginning of what it wrote."""

    ended: Literal["exit", "timeout", "signal"]
    code: int
    """Exit code, or the number of the signal that ended it."""
    stdout: bytes
    stderr: bytes


DEFAULT = Limits()


def run(source: str, stdin: bytes = b"", limits: Limits = DEFAULT) -> Ran:
    """Run `source` as a program of this Python, with its packages and none of this process's environment.

    It may write only into its own empty folder, read only that, Python and its packages, and start no process. Its
    whole process group is killed when its time is over.

    Raises:
        UserError: this operating system has no such limits.
    """
    if sys.platform == "win32":
        raise UserError("running a model's Python needs Linux or macOS, whose limits on processes it relies on")
    with tempfile.TemporaryDirectory(prefix="posttrain-", ignore_cleanup_errors=True) as folder:
        home = Path(folder, "home")
        home.mkdir()
        program, out, err = (Path(folder, name) for name in ("program.py", "stdout", "stderr"))
        program.write_text(source, encoding="utf-8", errors="replace")
        settings = {
            "program": str(program),
            "home": str(home),
            "seconds": int(limits.seconds) + 1,
            "memory": limits.memory_mb * 2**20,
            "output": limits.output_bytes,
        }
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", "-X", "utf8", "-c", _LAUNCH, json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=stderr,
                cwd=home,
                env={"HOME": str(home), "TMPDIR": str(home), "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,
            )
            try:
                process.communicate(stdin, timeout=limits.seconds)
                late = False
            except subprocess.TimeoutExpired:
                late = True
            finally:
                _end(process)
        code = process.returncode
        ended: Literal["exit", "timeout", "signal"] = "timeout" if late else "signal" if code < 0 else "exit"
        return Ran(ended, abs(code), _read(out, limits.output_bytes), _read(err, limits.output_bytes))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the process group, also where its leader is gone already."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)


# What the process does before the program: it gives up what it will not need, for there is no way back from a hard
# limit, a namespace or an audit hook. Root could raise its limits again, and passes the one on processes: it becomes
# nobody where Python stays readable to nobody, and elsewhere the hook is all that refuses processes.
_LAUNCH = r"""
def launch():
    import ctypes, json, os, resource, stat, sys

    settings = json.loads(sys.argv[1])
    sys.argv[:] = ["program.py"]
    with open(settings["program"], encoding="utf-8") as file:
        source = file.read()

    if sys.platform == "linux":  # a network of its own, with nothing in it; often refused to those who are not root
        newuser, newnet = 0x10000000, 0x40000000
        ctypes.CDLL(None).unshare(newnet if os.geteuid() == 0 else newuser | newnet)
    limits = {
        "RLIMIT_CPU": settings["seconds"], "RLIMIT_AS": settings["memory"], "RLIMIT_FSIZE": settings["output"],
        "RLIMIT_NOFILE": 64, "RLIMIT_CORE": 0, "RLIMIT_NPROC": 0,
    }

    def public(path):
        while path != os.path.dirname(path):
            if not os.stat(path).st_mode & stat.S_IXOTH:
                return False
            path = os.path.dirname(path)
        return True

    if os.geteuid() == 0:
        folder = os.path.dirname(settings["home"])
        if public(os.path.dirname(os.__file__)) and public(sys.prefix) and public(os.path.dirname(folder)):
            os.chmod(folder, 0o711)
            os.chown(settings["home"], 65534, 65534)
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
    for name, value in limits.items():
        if hasattr(resource, name):
            try:
                resource.setrlimit(getattr(resource, name), (value, value))
            except (ValueError, OSError):  # macOS knows no limit on address space
                pass

    home = os.path.realpath(settings["home"])
    python = filter(None, [sys.prefix, sys.base_prefix, *sys.path, "/usr/share/zoneinfo"])
    readable = (home, *map(os.path.realpath, python))
    refused = ("socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill",
               "os.setxattr", "pty.", "ctypes.", "signal.", "syslog.", "resource.", "gc.",
               "sys._current_frames", "sys.setprofile", "sys.settrace", "fcntl.", "mmap.")
    changing = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
                "os.chown", "os.utime", "shutil.")
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    real, fsdecode, devices = os.path.realpath, os.fsdecode, ("/dev/null", "/dev/urandom")

    def within(path, folders):
        path = real(fsdecode(path))
        return any(path == folder or path.startswith(folder + "/") for folder in folders)

    def watch(event, args):
        if event.startswith(refused) and not (event == "socket.__new__" and args[1] == 1):  # asyncio's own pair
            raise PermissionError(f"{event} is not allowed here")
        if event == "open":
            path, _, flags = args
            if not isinstance(path, int) and not (isinstance(path, str) and path in devices):
                if not within(path, (home,) if flags & writing else readable):
                    raise PermissionError(f"opening {path!r} is not allowed here")
        elif event in ("os.listdir", "os.scandir", "glob.glob"):
            if isinstance(args[0], (str, bytes)) and not within(args[0] or ".", readable):
                raise PermissionError(f"{event} is not allowed here")
        elif event.startswith(changing):
            for path in args:
                if isinstance(path, (str, bytes)) and not within(path, (home,)):
                    raise PermissionError(f"{event} is not allowed here")

    sys.addaudithook(watch)
    return compile(source, "program.py", "exec")

exec(launch(), {"__name__": "__main__", "__builtins__": __builtins__})
"""
