"""Processes that start with everything imported: forks of a server that only imports.

A short process of the package spends most of its time importing torch and transformers. So it is forked here
from a process that has imported them once. It is still a separate process, with its own environment,
folder, streams and session; signals and waiting work as usual. `Popen` replaces
`subprocess.Popen` (by the fixture `forked`); commands that it cannot fork are started as usual. Linux only.
"""

import atexit
import ctypes
import gc
import importlib
import io
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

_PR_SET_CHILD_SUBREAPER = 36
_LIBRARIES = (
    *("torch", "numba", "pyarrow.parquet", "datasets", "sentence_transformers", "accelerate", "peft"),
    *("matplotlib.backends.backend_svg", "transformers.models.llama.modeling_llama"),
    *("transformers.models.bert.modeling_bert", "transformers.models.auto.modeling_auto"),
)


class Server:
    """Forks processes that become children of this process, as `subprocess` expects."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words = [sys.executable, __file__, str(theirs.fileno())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a process with threads cannot fork safely
        self._process = subprocess.Popen(words, pass_fds=[theirs.fileno()], env=environment)
        theirs.close()

    def fork(self, job: dict[str, Any], streams: list[int]) -> int:
        """Start a process. Returns its id."""
        with self._lock, _adopting():
            socket.send_fds(self._socket, [json.dumps(job).encode()], streams)
            return int(self._socket.recv(32))

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


@contextmanager
def _adopting() -> Iterator[None]:
    """Make orphans among our descendants our children. The server makes an orphan by forking twice."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """`subprocess.Popen` that runs commands of this Python as forks of `server`, or else of this process."""

    server: Server | None = None

    def _execute_child(self, args: Any, *rest: Any) -> None:
        (_, preexec_fn, _, pass_fds, cwd, env, _, _, shell, *pipes), more = rest[:15], rest[15:]
        words = _words(args)
        if preexec_fn or pass_fds or shell or not words:
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        environment = dict(os.environ if env is None else env)
        job = {
            "words": words,
            "folder": os.fspath(cwd or Path.cwd()),
            "environment": environment | ({"PYTHONUNBUFFERED": "1"} if "-u" in args else {}),
            "session": bool(more[5]),
        }
        streams = [number if fd == -1 else fd for number, fd in enumerate((pipes[0], pipes[3], pipes[5]))]
        if self.server:
            self.pid = self.server.fork(job, streams)
        else:
            sys.stdout.flush()
            sys.stderr.flush()
            if (pid := os.fork()) == 0:
                _end(job, streams)
            self.pid = pid
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def _words(args: Any) -> list[str]:
    """The words after `python`, if it is this Python with `-m`, `-c` or a file; else an empty list."""
    if isinstance(args, (str, bytes)):
        return []
    python, *words = map(os.fspath, args)
    words = words[words[:1] == ["-u"] :]
    known = words[:1] in (["-m"], ["-c"]) or (words[:1] and words[0].endswith(".py"))
    return words if known and python == sys.executable else []


def _end(job: dict[str, Any], streams: list[int]) -> NoReturn:
    """Run as the process that `job` describes, and exit."""
    for number, fd in enumerate([os.dup(fd) for fd in streams]):
        os.dup2(fd, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    at_once = bool(job["environment"].get("PYTHONUNBUFFERED"))
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = _output(1, "strict", write_through=at_once)
    sys.stderr = sys.__stderr__ = _output(2, "backslashreplace", write_through=True)
    if job["session"]:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    import fsspec
    import torch

    from scaledown.devices import choice

    fsspec.config.set_conf_env(fsspec.config.conf)  # as when it is imported, which was before
    choice.multiplies_bfloat16 = lambda: False  # as in the tests themselves
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    status = 1
    try:
        status = _run(job["words"])
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _output(fd: int, errors: str, *, write_through: bool) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.FileIO(fd, "w", closefd=False), "utf-8", errors, write_through=write_through)


def _run(words: list[str]) -> int:
    """Run a command of Python. Returns its exit status."""
    kind, target = (words[0], words[1]) if words[0].startswith("-") else ("", words[0])
    sys.argv = [target, *words[2 if kind else 1 :]]
    sys.path[0] = "" if kind else str(Path(target).parent)
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    try:
        if kind == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(target, "<string>", "exec"), vars(sys.modules["__main__"]))
        elif kind == "-m":
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
                runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(target, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


def _serve(requests: socket.socket) -> NoReturn:
    import scaledown

    subprocess.Popen = Popen  # type: ignore[misc]  # before a library takes its own reference
    for name in _LIBRARIES:
        importlib.import_module(name)
    for module in pkgutil.walk_packages(scaledown.__path__, "scaledown."):
        if module.name != "scaledown.__main__":
            try:
                importlib.import_module(module.name)
            except ImportError:  # of an extra that is not here
                continue
    gc.freeze()  # else a collection in a child writes to, and so copies, all of its memory
    while True:
        message, fds, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:
            os._exit(0)
        read, write = os.pipe()
        if (between := os.fork()) == 0:
            if (pid := os.fork()) == 0:
                _end(json.loads(message), fds)
            os.write(write, str(pid).encode())
            os._exit(0)
        os.waitpid(between, 0)  # by now its child has a new parent, who can wait for it
        requests.send(os.read(read, 32))
        for fd in (read, write, *fds):
            os.close(fd)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
