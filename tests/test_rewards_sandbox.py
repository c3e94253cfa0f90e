"""The sandbox: each limit is met by code that goes for it."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from posttrain.rewards import sandbox
from posttrain.rewards.sandbox import Limits, Ran, run

SHORT = Limits(seconds=3.0, memory_mb=256, output_bytes=4096)


def refused(ran: Ran, what: bytes) -> bool:
    return ran.ended == "exit" and ran.code == 1 and ran.stderr.strip().splitlines()[-1].startswith(what)


def test_a_program_runs_with_its_input() -> None:
    ran = run("import sys, json\nprint(sys.stdin.read().upper(), __name__, sys.argv)\nraise SystemExit(3)", b"ab\n")
    assert ran == Ran("exit", 3, b"AB\n __main__ ['program.py']\n", b"")
    assert run("print('über')").stdout == "über\n".encode()


def test_errors_are_those_of_the_program() -> None:
    ran = run("1 / 0")
    assert (ran.ended, ran.code) == ("exit", 1)
    assert b'File "program.py", line 1' in ran.stderr
    assert ran.stderr.endswith(b"ZeroDivisionError: division by zero\n")
    assert b"SyntaxError" in run("def").stderr


@pytest.mark.parametrize(
    "code", ["while True: pass", "import time; time.sleep(60)", "(lambda f: f(f))(lambda f: f(f))"]
)
def test_what_does_not_end_is_ended(code: str) -> None:
    ran = run("import sys; sys.setrecursionlimit(100); print('begun', flush=True)\n" + code, limits=SHORT)
    assert ran.stdout == b"begun\n"
    assert ran.ended == "timeout" or b"RecursionError" in ran.stderr


def test_memory_is_limited() -> None:
    assert refused(run("x = bytearray(10**9)", limits=SHORT), b"MemoryError")


def test_output_is_limited() -> None:
    ran = run("print('x' * 10**7)", limits=SHORT)
    assert len(ran.stdout) <= 4096
    assert ran.code != 0
    assert b"File too large" in run("open('big', 'w').write('x' * 10**6)", limits=SHORT).stderr


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.create_connection(('127.0.0.1', PORT), 1)",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:PORT', timeout=1)",
        "import os; os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('touch TARGET')",
        "import os; os.kill(os.getppid(), 9)",
        "import ctypes; ctypes.CDLL(None).system(b'touch TARGET')",
        "import multiprocessing as m; p = m.Process(target=print); p.start(); p.join()",
        "open('TARGET', 'w')",
        "open('TARGET', 'a')",
        "import os; os.open('TARGET', os.O_CREAT | os.O_WRONLY)",
        "import os; os.chdir('/'); open('TARGET', 'w')",
        "import os; os.symlink('TARGET', 'link'); open('link', 'w')",
        "import os; os.remove('KEPT')",
        "import os; os.rename('KEPT', 'mine')",
        "import shutil; shutil.rmtree('FOLDER')",
        "print(open('KEPT').read())",
        "print(open('/etc/passwd').read())",
        "import os; print(os.listdir('FOLDER'))",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); x = bytearray(10**9)",
    ],
)
def test_what_reaches_outside_is_refused(code: str, tmp_path: Path) -> None:
    kept, target = tmp_path / "kept", tmp_path / "target"
    kept.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        for name, value in {
            "PORT": server.getsockname()[1],
            "TARGET": target,
            "KEPT": kept,
            "FOLDER": tmp_path,
        }.items():
            code = code.replace(name, str(value))
        ran = run(code)
        assert ran.code != 0
        assert b"Error" in ran.stderr
        assert b"secret" not in ran.stdout
        with pytest.raises(BlockingIOError):
            server.accept()
    assert kept.read_text() == "secret"
    assert not target.exists()


def test_its_own_folder_is_its_own_and_gone_afterwards() -> None:
    ran = run("import os, tempfile\nopen('a', 'w').write('1')\nos.rename('a', 'b')\nos.mkdir('c')\n"
              "tempfile.NamedTemporaryFile('w', delete=False)\nos.listdir('.')\nprint(os.getcwd())")  # fmt: skip
    assert (ran.ended, ran.code, ran.stderr) == ("exit", 0, b"")
    assert not Path(ran.stdout.decode().splitlines()[-1]).exists()


def test_the_environment_stays_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_ENDPOINT_KEY", "secret")
    ran = run("import os; print(sorted(os.environ))")
    assert b"secret" not in ran.stdout
    assert b"POSTTRAIN" not in ran.stdout


def test_packages_and_plain_libraries_work() -> None:
    ran = run("import asyncio, collections, dataclasses, decimal, itertools, math, random, re, statistics, typing\n"
              "import numpy\n"
              "async def f(): return numpy.arange(4).sum()\n"
              "print(asyncio.run(f()), collections.namedtuple('P', 'x')(1))", limits=Limits(10.0, 2048))  # fmt: skip
    assert (ran.stdout, ran.code) == (b"6 P(x=1)\n", 0), ran.stderr


def test_nothing_is_left_running() -> None:
    ran = run("import os\nprint(os.getpid(), flush=True)\nwhile True: pass", limits=SHORT)
    with pytest.raises(ProcessLookupError):
        os.kill(int(ran.stdout), 0)


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or not os.path.exists("/usr/bin/python3"),
    reason="only root may become nobody, and needs a Python that nobody can read",
)
def test_without_the_hook_the_kernel_still_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    monkeypatch.setattr(sandbox, "_LAUNCH", sandbox._LAUNCH.replace("    sys.addaudithook(watch)\n", ""))
    assert run("import os; print(os.getuid())").stdout == b"65534\n"
    assert b"BlockingIOError" in run("import os; os.fork()").stderr
    assert b"Network is unreachable" in run("import socket; socket.create_connection(('127.0.0.1', 9), 1)").stderr
    assert b"PermissionError" in run("open('/etc/shadow')").stderr
