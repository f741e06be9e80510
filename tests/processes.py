"""`vitrail` in processes that can be killed, limited and signalled.

Unusual: to import torch takes longer than to train a tiny model. So one process imports everything, computes nothing, and
forks a child for each command; the child is a process like any other.
"""

import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SECONDS = 60
"""After which a process counts as hung; the slowest takes a few."""


@dataclass
class Child:
    """A running `vitrail`; its output goes to files."""

    nursery: "Nursery"
    pid: int
    out: Path
    err: Path

    def until(self, happened: Callable[[], bool]) -> "Child":
        """Waits for something that this process brings about."""
        end = time.monotonic() + SECONDS
        while not happened():
            assert time.monotonic() < end, f"it did not happen: {self.err.read_text()}"
            time.sleep(0.002)
        return self

    def signal(self, number: int, group: bool = False) -> "Child":
        (os.killpg if group else os.kill)(self.pid, number)
        return self

    def code(self) -> int:
        """The exit code, minus the signal's number where one killed it."""
        return self.nursery.ask({"wait": self.pid})


@cache
def _server() -> subprocess.Popen:
    """Started once for all tests; it ends when they do, and so close its input."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


class Nursery:
    """Starts children that work in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def ask(self, request: dict) -> int:
        server = _server()
        print(json.dumps(request), file=server.stdin, flush=True)
        assert server.stdout is not None
        return int(server.stdout.readline())

    def start(self, *arguments: object, first: str = "", memory: int = 0) -> Child:
        """first: Python to run in the child before the command. memory: of its address space at most, in bytes."""
        self.count += 1
        out, err = self.folder / f"{self.count}.out", self.folder / f"{self.count}.err"
        request = {"arguments": list(map(str, arguments)), "out": str(out), "err": str(err), "first": first}
        pid = self.ask({**request, "memory": memory, "folder": str(self.folder)})
        return Child(self, pid, out, err)

    def run(self, *arguments: object, first: str = "", memory: int = 0) -> tuple[int, str, str]:
        """(exit code, standard output, standard error)"""
        child = self.start(*arguments, first=first, memory=memory)
        return child.code(), child.out.read_text(), child.err.read_text()

    def together(self, *arguments: object, first: tuple[str, str] = ("", "")) -> list[Child]:
        """Two processes, as torchrun starts them, without the seconds that it takes itself."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        settings = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        return [
            self.start(*arguments, first=f"import os\nos.environ.update({setting!r})\n" + more)
            for setting, more in zip(settings, first, strict=True)
        ]


def _wait(pid: int) -> int:
    end = time.monotonic() + SECONDS
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def _serve() -> None:
    from vitrail.cli import main

    imported = (
        "vitrail.commands.train",
        "vitrail.commands.predict",
        "torch._dynamo",
        "torch.utils.tensorboard",
        "tyro",
    )
    for heavy in imported:
        importlib.import_module(heavy)
    # A job in the background inherits that Ctrl-C is ignored; a command of a person at a terminal does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(_wait(request["wait"]), flush=True)
            continue
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        os.setpgrp()
        os.chdir(request["folder"])
        for path, number in ((os.devnull, 0), (request["out"], 1), (request["err"], 2)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), number)
        sys.argv = ["vitrail", *request["arguments"]]
        exec(request["first"], {"folder": request["folder"]})
        if request["memory"]:
            resource.setrlimit(resource.RLIMIT_AS, (request["memory"], request["memory"]))
        sys.exit(main(request["arguments"]))


if __name__ == "__main__":
    _serve()
