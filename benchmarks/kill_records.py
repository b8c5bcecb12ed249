"""Processes that write records are killed at random moments: is a record ever there that is not whole?

    python benchmarks/kill_records.py [--kills 1000] [--size 1000000] [--seed 0] [--folder DIR]

Each process writes one record after another into one folder until SIGKILL ends it. After each kill every ``*.json`` in
the folder must be a record that verifies; every record whose writing had returned must be there; and nothing besides
but temporary files, which nobody reads. Exit status 1 if any of that fails, or if no kill hit the writing of a file,
since then nothing was shown. The records are large so that writing one takes a while; the larger, the more are hit
half-written.

What a kill cannot show is the loss of power: what the kernel was told to write, it writes when the process is gone.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from portnet import files, record

BEGUN = "begun"
LONGEST = 0.1
"""Seconds after the first record is begun, at most, at which the process is killed."""
KEPT = 20
"""Kills after which temporary files left behind are removed: writers work beside them, but a disk is finite."""
HALF, EMPTY, WHOLE, RENAMED, AROUND, BETWEEN = MOMENTS = (
    "half-written",
    "before a byte was written",
    "written, not renamed",
    "renamed, not returned",
    "preparing or tidying up",
    "between records",
)
"""What a kill can hit."""


def write(folder: str, size: int) -> None:
    """What is killed: records for ever, each announced before and after."""
    spec = record.Spec(backend="none")
    padding = "x" * size
    number = 0
    while True:
        number += 1
        made = record.Record(
            spec=spec, outcome="not measured", environment={"by": os.getpid(), "number": number, "padding": padding}
        )
        os.write(1, f"{BEGUN}\n".encode())
        os.write(1, f"{made.write(folder).stem}\n".encode())


def strike(command: Sequence[str], delay: float) -> list[str]:
    """Start a process, kill it `delay` seconds after its first line, and return all lines that it wrote."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(delay)
        process.kill()
        lines = [first, *process.stdout]
    if not first.endswith("\n"):
        raise SystemExit(f"the process ended by itself with status {process.returncode}: {' '.join(command)}")
    return [line.strip() for line in lines]


def judge(folder: Path, told: Sequence[str], left: set[Path], size: int) -> tuple[str, list[str], int]:
    """The moment that the kill hit, what is wrong with the folder, and how many records verified."""
    found, refused = record.search([folder])
    wrong = [str(error) for error in refused]
    there = {f.paths[0].stem for f in found}
    returned = {line for line in told if line != BEGUN}
    wrong += [f"{name} had been written and is not there" for name in returned - there]
    unannounced = there - returned
    open_ = told[-1] == BEGUN
    if len(unannounced) > open_:
        wrong.append(f"{len(unannounced)} records are there whose writing had not returned")
    temporary = [path for path in files.unfinished(folder) if path not in left]
    if len(temporary) > (open_ and not unannounced):
        wrong.append(f"{len(temporary)} temporary files of one writer")
    strange = {*folder.iterdir()} - {path for f in found for path in f.paths} - left - {*temporary}
    wrong += [f"{path.name} is there, and neither record nor temporary" for path in strange if not refused]
    if temporary:
        length = temporary[0].stat().st_size
        moment = EMPTY if not length else HALF if length < size else WHOLE
    else:
        moment = RENAMED if unannounced else AROUND if open_ else BETWEEN
    for f in found:
        f.paths[0].unlink()
    return moment, wrong, len(found)


def run(kills: int, size: int, seed: int, folder: Path) -> bool:
    """Kill that many writers, print what was seen; whether all was well."""
    chance, began = random.Random(seed), time.monotonic()
    moments: Counter[str] = Counter()
    wrong: list[str] = []
    left: set[Path] = set()
    verified = 0
    command = [sys.executable, str(Path(__file__).resolve()), "--write", str(folder), "--size", str(size)]
    for number in range(1, kills + 1):
        told = strike(command, chance.uniform(0, LONGEST))
        moment, errors, count = judge(folder, told, left, size)
        moments[moment] += 1
        verified += count
        wrong += [f"kill {number}, {moment}: {error}" for error in errors]
        left = {*files.unfinished(folder)}
        if number % KEPT == 0:
            for path in left:
                path.unlink()
            left = set()
        if number % 100 == 0:
            print(f"{number} kills, {verified} records verified, {len(wrong)} wrong", flush=True)
    print(f"{kills} kills in {time.monotonic() - began:.0f} s, {verified} records of {size} bytes or more verified")
    for moment in MOMENTS:
        print(f"{moments[moment]:6} {moment}")
    for line in wrong:
        print(line)
    hit = moments[HALF] + moments[EMPTY] + moments[WHOLE] > 0
    print("FAILED" if wrong else "passed" if hit else "FAILED: no kill hit the writing of a file; take a larger --size")
    return hit and not wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Kill processes while they write records.")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--size", type=int, default=1_000_000, help="bytes of padding in a record (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="an empty one on the disk to be tested; a temporary one by default")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.write:
        write(chosen.write, chosen.size)
    if chosen.kills < 1:
        parser.error(f"--kills is {chosen.kills}; expected 1 or more")
    if chosen.folder and (not chosen.folder.is_dir() or any(chosen.folder.iterdir())):
        parser.error(f"--folder {chosen.folder}: expected an empty folder")
    with tempfile.TemporaryDirectory(prefix="portnet-") as temporary:
        return 0 if run(chosen.kills, chosen.size, chosen.seed, chosen.folder or Path(temporary)) else 1


if __name__ == "__main__":
    sys.exit(main())
