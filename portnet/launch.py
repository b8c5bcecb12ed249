"""One fresh process per measurement, so that none inherits another's memory, caches, threads or broken driver."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event, Thread, Timer

from portnet import measure, record
from portnet.record import Record, Spec

TUNABLES = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"
"""Without it glibc gives large arrays back to the system when they are freed, and every step pays for their pages
again. Set for every stack alike, recorded, and without meaning outside Linux; a user's own setting stands."""


def run(spec: Spec, *, timeout: float = 600.0, say: Callable[[str], None] = lambda _: None) -> Record:
    """Measure `spec` in a process of its own and return its record, whatever becomes of the process.

    One that takes longer than `timeout` seconds is killed with its children (``timeout``); one that dies without a
    record has outcome ``failed``, with the end of what it wrote. `say` is told its progress line by line.
    """
    with tempfile.TemporaryDirectory(prefix="portnet-") as folder, tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", "portnet.launch", json.dumps(asdict(spec)), folder]
        # A session of its own, so that what the process starts can be killed with it.
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # never written to: its end tells the process that we are gone
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            env={**os.environ, "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", TUNABLES)},
        ) as process:
            late = Event()

            def stop() -> None:
                late.set()
                _kill(process)

            timer = Timer(timeout, stop)
            timer.start()
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    say(line.rstrip())
                process.wait()
            finally:
                timer.cancel()
                _kill(process)
        written, _ = record.read_all([folder])
        if written:
            return written[0]
        lost = Record(spec=spec, outcome="failed", environment=measure.environment())
        if late.is_set():
            return replace(lost, outcome="timeout", reason=f"not finished after {timeout:.0f} s")
        errors.seek(0)
        end = " ".join(errors.read().split())[-500:]
        how = f"signal {-process.returncode}" if process.returncode < 0 else f"status {process.returncode}"
        return replace(lost, reason=f"the process ended with {how} and left no record: {end or 'no message'}")


def _kill(process: "subprocess.Popen[str]") -> None:
    try:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    except ProcessLookupError:
        pass


def _main(spec: str, folder: str) -> None:
    measure.measure(Spec(**json.loads(spec)), lambda line: print(line, flush=True)).write(Path(folder))


def _die_with_parent() -> None:
    """Wait for the parent's end of our standard input to close, then end this process and all that it started."""
    os.read(0, 1)
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    Thread(target=_die_with_parent, daemon=True).start()
    _main(*sys.argv[1:])
