"""One fresh process per measurement, so that none inherits another's memory, caches, threads or broken driver.

Processes that are to be compared are alive at once and take turns, block by block, the idle ones blocked in a read.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any, Self, TextIO

import numpy as np

from portnet import measurement, plugins, record, stats, workload
from portnet.contract import Backend, Device
from portnet.errors import PortNetError, Unavailable
from portnet.record import Record, Spec
from portnet.workload import Say

TUNABLES = ":".join(
    f"glibc.malloc.{setting}" for setting in ("mmap_threshold=4294967296", "trim_threshold=8589934592", "hugetlb=1")
)
"""Without it glibc gives large arrays back to the system when they are freed, and every step pays for their pages
again; and a process is as fast as the small pages that it happens to be given, where huge ones are had for the asking.
Set for every stack alike, recorded, and without meaning outside Linux; a user's own setting stands."""

SETTLE = 0.015
"""Seconds between two processes' blocks: thread pools spin a while before they sleep."""
PROBING = 60.0
"""Seconds in which the probes of all backends must have answered."""
RERUNS = 2
"""How often a round is run again whose probe differed between its sides; after that it stands, and says so."""


class Worker:
    """A measurement in a process of its own, told over its standard input what to do next.

    A worker that gives no sign of life for `timeout` seconds is killed with its children (``timeout``). One that dies
    leaves a record too: ``out of memory`` where the system killed a process for it meanwhile, else ``failed``, with
    the end of what it wrote.
    """

    def __init__(self, spec: Spec, *, detail: bool, timeout: float, say: Say) -> None:
        self.spec, self.timeout, self.say = spec, timeout, say
        self.record: Record | None = None
        self.probes: list[float] = []
        self.ready = False
        self._late = False
        self._kills = _memory_kills()
        self._stack = ExitStack()
        self._folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="portnet-"))
        self._errors = self._stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))  # noqa: SIM115
        command = [sys.executable, "-m", "portnet.launch", json.dumps(asdict(spec)), self._folder, str(int(detail))]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # its end also tells the process that we are gone
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            errors="replace",
            start_new_session=True,  # so that what the process starts can be killed with it
            env={
                **os.environ,
                "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", TUNABLES),
                **(_cold(spec, self._folder) if detail else {}),
                **_environment(spec),
            },
        )
        self._lines: Queue[str | None] = Queue()
        Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # what was still to be sent
                pipe.close()
        self._stack.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _ask(self, **command: Any) -> Any:
        """The answer to a command; None where the process is gone, and `record` then says how."""
        if self.record is not None:
            return None
        if command:
            try:
                assert self._process.stdin is not None
                self._process.stdin.write(json.dumps(command) + "\n")
                self._process.stdin.flush()
            except OSError:  # it is gone; what follows finds out how
                pass
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                self._late = True
                self._kill()
                line = None
            if line is None:
                self.record = self._lost()
                return None
            try:
                answer = json.loads(line)
                if "say" in answer:
                    deadline = time.monotonic() + self.timeout
                    self.say(answer["say"])
                else:
                    return answer["answer"]
            except (ValueError, KeyError, TypeError):
                continue  # not ours: some library's, written past Python

    def prepare(self) -> bool:
        """Wait until the process has passed its gates. False where there is nothing to time."""
        return bool(self._ask())

    def block(self) -> float | None:
        """Seconds of one timed block."""
        seconds: float | None = self._ask(do="block")
        return seconds

    def again(self) -> None:
        """One block that is not counted."""
        self._ask(do="again")

    def finish(self, round_: Mapping[str, Any]) -> Record:
        """The record of what was measured, or of how it came to nothing."""
        self._ask(do="finish", beside=self.probes, round=dict(round_))
        if self.record is None:
            written, problems = record.read_all(Path(self._folder).glob("*.json"))
            self.record = written[0] if written else replace(self._lost(), reason=f"no record: {problems}")
        if not self.record.round:
            self.record = replace(self.record, round=dict(round_))
        return self.record

    def _lost(self) -> Record:
        lost = Record(spec=self.spec, outcome="failed", environment=measurement.environment())
        if self._late:
            return replace(lost, outcome="timeout", reason=f"no sign of life for {self.timeout:.0f} s")
        self._process.wait()
        self._errors.seek(0)
        end = " ".join(self._errors.read().split())[-500:] or "no message"
        code = self._process.returncode
        if code == -signal.SIGKILL and _memory_kills() > self._kills:
            return replace(lost, outcome="out of memory", reason=f"the system killed a process for memory: {end}")
        return replace(lost, reason=f"the process ended with {_status(code)} and left no record: {end}")

    def _kill(self) -> None:
        try:
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        except (ProcessLookupError, PermissionError):  # gone already; macOS says it the second way
            pass


def probes(backends: Sequence[Backend], *, timeout: float = PROBING) -> dict[str, Device | Unavailable]:
    """What each of those backends finds here, or why nothing, by its name.

    Asked in a process of its own: a driver that hangs or crashes takes nobody else along, and while others measure no
    device is held by this one. The backend that such a process dies of is not available; the rest are asked again.
    """
    found: dict[str, Device | Unavailable] = {}
    waiting = [backend.name for backend in backends]
    while waiting:
        command = [sys.executable, "-m", "portnet.launch", "--probe", *waiting]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, start_new_session=True
            )
            told, end = done.stdout, f"ended its process with {_status(done.returncode)}"
        except subprocess.TimeoutExpired as late:
            told, end = late.stdout or b"", f"gave no answer within {timeout:.0f} s"
        for line in told.splitlines():
            answer = json.loads(line)
            device, name = answer["device"], answer["name"]
            if device is None:
                found[name] = Unavailable(answer["reason"], answer["remedy"])
            else:
                lists = {key: tuple(device[key]) for key in ("precisions", "emulated")}
                found[name] = Device(**{**device, **lists})
        waiting = [name for name in waiting if name not in found]
        if waiting:
            found[waiting.pop(0)] = Unavailable(f"its probe {end}", "see whether its driver and its software work")
    return found


def run(spec: Spec, *, timeout: float = 600.0, say: Say = lambda _: None) -> Record:
    """Measure `spec` once, in a process of its own, and return its record, whatever becomes of the process."""
    return next(series([spec], rounds=1, timeout=timeout, say=lambda _, line: say(line)))[0]


def series(
    specs: Sequence[Spec],
    *,
    rounds: int,
    timeout: float = 600.0,
    say: Callable[[Spec, str], None] = lambda spec, line: None,
    deadline: float = float("inf"),
) -> Iterator[list[Record]]:
    """Measure specs beside one another, `rounds` times; yields the records of each round when it is over, in the
    order of `specs`.

    Every round starts a fresh process for each spec. They pass their gates one after the other, and then take turns
    block by block, forwards and backwards (`backwards`), with a short probe of the host before each block. Where the
    probe's medians on two sides differ by more than 10%, the round is run again whole, blind to what was measured;
    the records of the first try stay, marked as rejected. A spec that did not come to be timed is not started again,
    unless it was only that the machine was too crowded to tell.
    No round begins after `deadline` (of `time.monotonic`), or that would by the last one's length end after it.
    """
    name = uuid.uuid4().hex
    alive, reruns, number, longest = list(specs), 0, 0, 0.0
    while number < rounds and alive:
        began = time.monotonic()
        if began + (longest if number else 0.0) > deadline:
            return
        # The first to pass its gates waits longest for its turn: every other round begins at the other end.
        step = 1 if number % 2 == 0 else -1
        place = {"series": name, "number": number, "reruns": reruns}
        done = _round(alive[::step], place, timeout, say, first=number == 0)[::step]
        uneven = not _even(done)
        rejected = uneven and reruns < RERUNS
        yield [
            replace(one, round={**one.round, "rejected": rejected and timed, "uneven": uneven}) for one, timed in done
        ]
        still = [one.spec for one, timed in done if timed or one.outcome == "not measured"]
        alive = [spec for spec in alive if spec in still]
        number, reruns = (number, reruns + 1) if rejected else (number + 1, 0)
        longest = max(longest, time.monotonic() - began)


def _round(
    specs: Sequence[Spec], place: Mapping[str, Any], timeout: float, say: Callable[[Spec, str], None], *, first: bool
) -> list[tuple[Record, bool]]:
    """The records of one round, and whether each spec was timed."""
    with ExitStack() as stack:
        workers = []
        for spec in specs:
            worker = Worker(spec, detail=first, timeout=timeout, say=lambda line, spec=spec: say(spec, line))  # type: ignore[misc]
            workers.append(stack.enter_context(worker))
            # One after the other: a gate, and what it times, must not run beside another's.
            worker.ready = worker.prepare()
        timed = [w for w in workers if w.ready and w.spec.mode != "serve" and w.spec.blocks]
        if len(timed) > 1:
            for worker in timed:
                worker.again()
        for turn in range(max((w.spec.blocks for w in timed), default=0)):
            for worker in reversed(timed) if backwards(turn) else timed:
                if turn >= worker.spec.blocks or worker.record is not None:
                    continue
                if turn % 5 == 0:
                    say(worker.spec, f"timing, block {turn + 1} of {worker.spec.blocks}")
                time.sleep(SETTLE)
                worker.probes.append(probe())
                worker.block()
        found = []
        for worker in workers:
            beside = [w.spec.stack for w in timed if w is not worker]
            done = worker.finish({**place, "beside": beside, "probe": worker.probes})
            found.append((done, worker.ready and done.outcome in ("works", "partial", "unsteady")))
        return found


def backwards(turn: int) -> bool:
    """Whether the last begins that turn: A B B A B A A B ..., the Thue-Morse sequence.

    Of every two, four, eight turns it takes a shift, a slope, a curve of the machine's speed out of the difference. By
    A B B A alone, what comes by every fourth block would fall upon the same side each time.
    """
    return turn.bit_count() % 2 == 1


def _even(done: Sequence[tuple[Record, bool]]) -> bool:
    """Whether the host gave every side the same speed."""
    probes = [one.round["probe"] for one, timed in done if timed and one.round.get("probe")]
    return all(stats.same_machine(a, b) for a, b in combinations(probes, 2))


_A = np.linspace(-1, 1, 160 * 160).reshape(160, 160)
_B = np.ones(1 << 20)


def probe() -> float:
    """Seconds of a fixed piece of work on one of the host's processors: a matrix product and a copy of 8 MiB.

    By NumPy's own loops, not by its BLAS, whose threads would go on spinning into what is timed next. Also says
    nothing of an accelerator; its ceilings do, measured at both ends of a process.
    """
    began = time.perf_counter()
    np.einsum("ij,jk->ik", _A, _A, optimize=False)
    _B.copy()
    return time.perf_counter() - began


def _environment(spec: Spec) -> dict[str, str]:
    """The process environment that takes the spec's library layers away. What is wrong with it, the process says."""
    try:
        return workload.effective(plugins.backends()[spec.backend], spec)[1]
    except PortNetError:
        return {}


def _cold(spec: Spec, folder: str) -> dict[str, str]:
    """Empty caches of compiled code, in a folder that goes with the process."""
    backend = plugins.backends().get(spec.backend)
    return {"PORTNET_COLD": "1"} | {k: str(Path(folder, k)) for k in (backend.caches if backend else ())}


def _memory_kills() -> int:
    """How many processes Linux has killed for memory since it started; 0 where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    except (OSError, StopIteration):
        return 0


def _status(code: int) -> str:
    return f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"status {code}"


def _answers() -> TextIO:
    """Where this process answers. What libraries print goes elsewhere, lest it be taken for an answer."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def _probe(*names: str) -> None:
    answers = _answers()
    for name in names:
        told: dict[str, Any] = {"name": name, "device": None}
        try:
            told["device"] = asdict(plugins.probe(plugins.backends()[name]))
        except Unavailable as error:
            told |= {"reason": error.reason, "remedy": error.remedy}
        print(json.dumps(told), file=answers)


def _main(spec: str, folder: str, detail: str) -> None:
    answers = _answers()
    commands: Queue[dict[str, Any]] = Queue()
    Thread(target=_listen, args=(commands,), daemon=True).start()
    measured = measurement.Measurement(
        Spec(**json.loads(spec)), lambda line: print(json.dumps({"say": line}), file=answers), detail=bool(int(detail))
    )
    answer: Any = measured.prepare()
    while True:
        print(json.dumps({"answer": answer}), file=answers)
        command = commands.get()
        if command["do"] == "finish":
            measured.finish(command["beside"], command["round"]).write(Path(folder))
            print(json.dumps({"answer": True}), file=answers)
            return
        answer = measured.block(counted=command["do"] == "block")


def _listen(commands: "Queue[dict[str, Any]]") -> None:
    """Take commands; when the parent's end of our standard input closes, end this process and all that it started."""
    for line in sys.stdin:
        commands.put(json.loads(line))
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    if sys.argv[1] == "--probe":
        _probe(*sys.argv[2:])
    else:
        _main(*sys.argv[1:])
