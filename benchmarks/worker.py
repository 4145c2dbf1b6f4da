"""A provider in a process of its own: nothing that happens to it happens to another.

The process runs a job, a generator function, as far as it is asked, and sleeps in between. What the
job yields comes back through a pipe.
"""

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from .timing import Failed, Others, why

LIMIT = 300  # seconds for an answer: the first may import and compile on a machine with much to do


class Worker:
    """The process, as its parent sees it. It is started when a job begins, and again if it died."""

    process = None

    def begin(self, job, *args):
        """Let job(*args) run until it yields: answer() has what."""
        if self.process is None:
            self._start()
        self.said = os.fstat(self.output.fileno()).st_size
        self._send(partial(job, *args))

    def answer(self):
        """What the job yielded; Failed if it raised, died or took too long."""
        try:
            if not self.connection.poll(LIMIT):
                self.close()
                raise Failed(f"gave no answer within {LIMIT:g} s")
            answer, failed = self.connection.recv()
        except (EOFError, OSError):
            raise Failed(self._death()) from None
        if failed:
            raise Failed(failed)
        return answer

    def ask(self):
        """What the job yields next."""
        self._send(None)
        return self.answer()

    def close(self):
        if self.process:
            # With what it started: a compiler, say.
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            Others.children.remove(self.process.pid)
            self.connection.close()
            self.output.close()
            self.process = None

    def _start(self):
        # The modules of this process, whatever the working directory holds: the source tree, say.
        run = f"import sys; sys.path = {sys.path}; from dlkernels.benchmarks import worker"
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 (close() closes it)
        self.connection, its = Pipe()
        with its:
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"{run}; worker.main({its.fileno()})"],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self.output,
                stderr=self.output,
                start_new_session=True,  # Ctrl-C is for the parent, which closes it
            )
        Others.children.add(self.process.pid)

    def _send(self, message):
        with suppress(OSError):  # it died: answer() says how
            self.connection.send(message)

    def _death(self):
        code = self.process.wait()
        how = f"exit status {code}" if code >= 0 else signal.Signals(-code).name
        if how == "SIGKILL":
            how += ", as when memory runs out"
        self.output.seek(self.said)
        lines = self.output.read().decode(errors="replace").splitlines()
        self.close()
        # Its last words, which may stand before a stack trace.
        said = [line for line in lines if line and not line.startswith((" ", "*"))]
        return ": ".join(["died", how, *said[-1:]])


class Workers(dict):
    """{provider: its worker}, made when it is first asked for."""

    def __missing__(self, provider):
        self[provider] = Worker()
        return self[provider]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for worker in self.values():
            worker.close()


def main(descriptor):
    """What the process does: a message is a job to begin, or None for what the last one yields."""
    connection, answers = Connection(descriptor), None
    while True:
        answer = failed = None
        try:
            job = connection.recv()
            if job:
                answers = None  # the last job's memory is free before this one takes some
                answers = job()
            answer = next(answers)
        except EOFError:  # the parent is gone
            return
        except BaseException as error:  # SystemExit, too
            failed = why(error)
        connection.send((answer, failed))
