"""What else went on while work was timed: real processes, cgroups from fixture texts, energy through a fake Zeus."""

import hashlib
import json
import mmap
import os
import subprocess
import sys
import threading
import time
import types
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import pytest

from portnet import watch
from portnet.watch import Energy, Watch, available_memory, busy_before

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's files")

# Ends by itself, whatever becomes of the test.
LEAVE = """
import subprocess, sys
# With our output it would keep whoever reads that waiting.
print(subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.DEVNULL).pid)
"""
BURN = "import time\nend = time.monotonic() + 20\nwhile time.monotonic() < end: pass"


def spent(pid):
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


@contextmanager
def stranger():
    """The pid of a process that keeps a processor busy and is no child of ours: its parent has left it."""
    command = [sys.executable, "-c", LEAVE, BURN]
    started = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    process = psutil.Process(int(started.stdout))
    try:
        while spent(process.pid) < 0.05:
            time.sleep(0.01)
        yield process.pid
    finally:
        process.kill()


@contextmanager
def child():
    process = subprocess.Popen([sys.executable, "-c", BURN])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def whole(cpu):
    """The processors accounted for."""
    return sum(cpu[name] or 0.0 for name in ("foreign", "own", "idle", "iowait", "steal"))


@linux
@pytest.mark.skipif(os.getpid() == 1, reason="orphans become children of this process")
def test_a_stranger_is_foreign_and_one_named_is_ours():
    """The same blocks by two watches, so that other load on this machine is in both."""
    with stranger() as pid:
        without, named = Watch(), Watch(pids=[pid])
        before, begin = spent(pid), time.perf_counter()
        for _ in range(8):
            with without, named:
                time.sleep(0.1)
        used = (spent(pid) - before) / (time.perf_counter() - begin)
    outside, ours = (w.summary()["foreign_cpu"] for w in (without, named))
    assert used > 0.2, "the stranger hardly ran"
    assert outside["foreign"] >= used - 0.15
    assert outside["own"] < 0.1
    assert outside["foreign"] - ours["foreign"] == pytest.approx(used, abs=0.15)
    assert ours["own"] - outside["own"] == pytest.approx(used, abs=0.15)
    assert whole(outside) == pytest.approx(outside["of"], rel=0.15)


@linux
def test_own_threads_are_not_foreign():
    stop, data = threading.Event(), bytes(1 << 20)

    def burn():
        while not stop.is_set():
            hashlib.sha256(data)  # lets go of the interpreter's lock

    threads = [threading.Thread(target=burn) for _ in range(2)]
    for thread in threads:
        thread.start()
    seen = Watch()
    begin, used = time.perf_counter(), time.process_time()
    for _ in range(8):
        with seen:
            time.sleep(0.1)
    used = (time.process_time() - used) / (time.perf_counter() - begin)
    stop.set()
    for thread in threads:
        thread.join()
    cpu = seen.summary()["foreign_cpu"]
    assert cpu["own"] == pytest.approx(used, abs=0.1)
    assert whole(cpu) == pytest.approx(cpu["of"], rel=0.15), "own time is not counted twice"


@linux
def test_a_child_is_ours_while_it_lives_and_once_it_has_ended():
    with child() as burner:
        time.sleep(0.5)
        seen = Watch()
        before, begin = spent(burner.pid), time.perf_counter()
        with seen:
            time.sleep(0.4)
            used = spent(burner.pid) - before
            burner.kill()
            burner.wait()
        seconds = time.perf_counter() - begin
    own = seen.summary()["foreign_cpu"]["own"] * seconds
    assert own == pytest.approx(used, abs=0.1), "what it had spent before does not count"


@linux
def test_a_child_that_starts_between_blocks_is_found(monkeypatch):
    monkeypatch.setattr(watch, "_RESCAN", 0.0)
    seen = Watch()
    with seen:
        pass
    with child() as burner:
        with seen:
            before = spent(burner.pid)
            time.sleep(0.4)
            used = spent(burner.pid) - before
        found = seen.summary()
    assert used > 0.05, "the child hardly ran"
    assert found["foreign_cpu"]["own"] * found["seconds"] == pytest.approx(used, abs=0.1)


def edge(**changed):
    usual = {"now": 0.0, "system": None, "own": 0.0, "reaped": 0.0, "live": {}, "usage": {}, "throttled": 0.0}
    return watch._Edge(**{**usual, **changed})


@pytest.mark.parametrize(
    ("first", "last", "own"),
    [
        ({"own": 1.0}, {"own": 1.5}, 0.5),
        ({"live": {7: 10.0}}, {"live": {7: 10.5}}, 0.5),
        ({"live": {7: 10.0}}, {"reaped": 10.5}, 0.5),
        ({"live": {7: 10.0, 8: 5.0}}, {"live": {7: 15.5}}, 0.5),  # 8 was 7's, which waited for it
        ({"own": 1.0, "live": {7: 10.0}}, {"own": 1.5}, 0.5),  # nobody waited
        ({}, {"live": {7: 10.0}}, 0.0),  # found at the second edge
        ({}, {"reaped": 0.5}, 0.5),
    ],
)
def test_own_time_from_edge_to_edge(first, last, own):
    assert watch._own(edge(**first), edge(**last)) == pytest.approx(own)


@dataclass
class FakeTimes:
    """The fake system's processor times: every call goes on by `step` in each state."""

    step: dict
    calls: int = 0

    def __call__(self):
        self.calls += 1
        return types.SimpleNamespace(**{name: value * self.calls for name, value in self.step.items()})


def watched(monkeypatch, step, of=2):
    """The processor times of one block of 0.2 s on a fake system."""
    monkeypatch.setattr(psutil, "cpu_times", FakeTimes(step))
    monkeypatch.setattr(psutil, "cpu_count", lambda: of)
    seen = Watch()
    with seen:
        time.sleep(0.2)
    return seen.summary()["foreign_cpu"]


def test_states_are_told_apart(monkeypatch):
    step = {"user": 0.1, "nice": 0.02, "system": 0.04, "irq": 0.01, "softirq": 0.01, "guest": 0.05}
    cpu = watched(monkeypatch, {**step, "idle": 0.12, "iowait": 0.04, "steal": 0.06})
    expected = {"foreign": 0.9, "idle": 0.6, "iowait": 0.2, "steal": 0.3}
    assert {name: cpu[name] for name in expected} == pytest.approx(expected, rel=0.1)
    assert (cpu["of"], cpu["reason"]) == (2, "")
    assert cpu["error"] == pytest.approx(0.01 * (2 / 6) ** 0.5 / 0.2, rel=0.1)


def test_what_the_system_does_not_tell_is_none(monkeypatch):
    cpu = watched(monkeypatch, {"user": 0.2, "nice": 0.0, "system": 0.0, "idle": 0.2})
    assert (cpu["iowait"], cpu["steal"]) == (None, None)
    assert cpu["idle"] == pytest.approx(1, rel=0.1)


def test_a_system_of_zeros_is_not_an_idle_one(monkeypatch):
    cpu = watched(monkeypatch, {"user": 0.0, "nice": 0.0, "system": 0.0, "idle": 0.0, "steal": 0.0})
    assert (cpu["foreign"], cpu["own"], cpu["error"]) == (None, None, None)
    assert "does not account" in cpu["reason"]


def test_a_system_that_refuses(monkeypatch):
    def refuse():
        raise PermissionError(13, "Permission denied", "/proc/stat")

    monkeypatch.setattr(psutil, "cpu_times", refuse)
    assert busy_before(0.15) is None


def test_no_block_and_one_too_short():
    seen = Watch()
    assert seen.summary()["foreign_cpu"]["reason"] == "no block was watched"
    with seen:
        pass
    cpu = seen.summary()["foreign_cpu"]
    assert (cpu["foreign"], seen.summary()["blocks"]) == (None, 1)
    assert "too few" in cpu["reason"]


@linux
def test_busy_before():
    busy = busy_before(0.15)
    assert busy is not None
    assert 0 <= busy <= psutil.cpu_count() + 0.5


def test_an_edge_is_cheap():
    seen, took = Watch(), []
    for _ in range(41):
        begin = time.perf_counter()
        with seen:
            pass
        took.append(time.perf_counter() - begin)
    assert median(took) < 1e-3


def test_starts_and_stops_by_turns():
    seen = Watch()
    with pytest.raises(RuntimeError, match="start it first"):
        seen.stop()
    seen.start()
    with pytest.raises(RuntimeError, match="stop it first"):
        seen.start()


def test_a_process_that_is_not_there():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with pytest.raises(ValueError, match=f"no process {gone.pid} to watch"):
        Watch(pids=[gone.pid])


@linux
def test_faults_switches_and_peak_memory_of_the_blocks_alone():
    pages, seen = 2048, Watch()
    for touched in (False, True):  # the first outside of a block
        with mmap.mmap(-1, pages * mmap.PAGESIZE) as shared:
            if touched:
                seen.start()
            for page in range(pages):
                shared[page * mmap.PAGESIZE] = 1
            if touched:
                for _ in range(5):
                    time.sleep(0.001)
                seen.stop()
    found = seen.summary()
    assert pages / 2 < found["faults"]["minor"] < 1.5 * pages
    assert found["faults"]["major"] >= 0
    assert found["switches"]["voluntary"] >= 5
    assert found["switches"]["involuntary"] >= 0


@linux
def test_counts_are_not_mixed_up(monkeypatch):
    """Nothing makes major faults and preemptions happen for sure, so the system is a fake one."""
    calls = []

    def usage(who):
        n = len(calls)
        calls.append(who)
        counts = {"ru_minflt": n, "ru_majflt": 10 * n, "ru_nvcsw": 100 * n, "ru_nivcsw": 1000 * n}
        return types.SimpleNamespace(**counts, ru_utime=0.0, ru_stime=0.0)

    monkeypatch.setattr(watch.resource, "getrusage", usage)
    seen = Watch()
    with seen:
        pass
    found = seen.summary()
    assert found["faults"] == {"minor": 2, "major": 20}
    assert found["switches"] == {"voluntary": 200, "involuntary": 2000}


@linux
def test_peak_memory_is_our_own():
    """Linux hands ru_maxrss down to children."""
    large = np.ones(40_000_000)
    code = "from portnet import watch\nprint(watch.peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert watch.peak_memory() > large.nbytes
    assert 5e6 < int(done.stdout) < large.nbytes


# Telemetry.


def test_telemetry_is_summed_up():
    told = iter(
        [
            {"core_clock": 1.9e9, "temperature": np.float32(40), "throttling": [], "state": "P0"},
            {"core_clock": 1.2e9, "temperature": 71, "throttling": ["power cap"], "state": "P2", "odd": float("nan")},
            {"core_clock": 1.5e9, "temperature": 60, "throttling": ("thermal", "power cap"), "locked": True},
            {"core_clock": 1.4e9, "temperature": 65, "throttling": "thermal"},
        ]
    )
    seen = Watch(lambda: next(told))
    for _ in range(2):
        with seen:
            pass
    found = seen.summary()["telemetry"]
    assert found == {
        "samples": 4,
        "values": {
            "core_clock": {"first": 1.9e9, "last": 1.4e9, "min": 1.2e9, "max": 1.9e9},
            "temperature": {"first": 40, "last": 65, "min": 40, "max": 71},
            "state": {"first": "P0", "last": "P2"},
            "locked": {"first": "True", "last": "True"},
        },
        "throttling": ["power cap", "thermal"],
        "failed": 0,
        "error": "",
    }
    json.dumps(seen.summary(), allow_nan=False)


def test_telemetry_that_fails_ends_nothing():
    calls = []

    def telemetry():
        calls.append(1)
        if len(calls) > 1:
            raise OSError(f"sensor lost, call {len(calls)}")
        return {"power": 30}

    seen = Watch(telemetry)
    for _ in range(2):
        with seen:
            pass
    found = seen.summary()["telemetry"]
    assert (found["samples"], found["failed"], found["error"]) == (1, 3, "OSError: sensor lost, call 2")
    assert found["values"]["power"]["last"] == 30


def test_a_block_that_fails_is_still_watched():
    seen = Watch()
    with pytest.raises(KeyError), seen:
        raise KeyError("x")
    assert seen.summary()["blocks"] == 1


# Cgroups.


def control(tmp_path, cgroup, mounts, files):
    """A fake /proc/self, and the files of control groups; `{}` in the mounts is where those are."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup groups"
    proc.mkdir()
    (proc / "cgroup").write_text(cgroup)
    (proc / "mountinfo").write_text(mounts.replace("{}", str(groups).replace(" ", "\\040")))
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text)
    return proc, groups


V2 = (
    "22 27 0:21 / /proc rw - proc proc rw\n"
    "30 23 0:26 / {} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
    "31 23 0:26 / {}/again rw - cgroup2 cgroup2 rw\n"
)
V1 = (
    "32 31 0:29 / {}/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / {}/memory rw,relatime - cgroup cgroup rw,memory\n"
    "41 31 0:38 / {}/unified rw,relatime - cgroup2 cgroup2 rw\n"
)
V1_PATHS = "4:memory:/job\n2:cpu,cpuacct:/job/step\n0::/job\n"


def test_quota_of_version_2_is_the_tightest_above(tmp_path):
    files = {
        "slice/job/step/cpu.max": "max 100000\n",
        "slice/job/cpu.max": "150000 100000\n",
        "slice/cpu.max": "400000 100000\n",
    }
    proc, groups = control(tmp_path, "0::/slice/job/step\n", V2, files)
    version, limits = watch._cpu_limits(proc)
    assert (version, limits) == (2, {groups / "slice/job": 1.5, groups / "slice": 4.0})


def test_quota_of_version_1_in_a_hybrid_system(tmp_path):
    files = {
        "cpu,cpuacct/job/step/cpu.cfs_quota_us": "50000\n",
        "cpu,cpuacct/job/step/cpu.cfs_period_us": "100000\n",
        "cpu,cpuacct/job/cpu.cfs_quota_us": "-1\n",
        "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
        "unified/job/cpu.max": "10000 100000\n",
    }
    proc, groups = control(tmp_path, V1_PATHS, V1, files)
    assert watch._cpu_limits(proc) == (1, {groups / "cpu,cpuacct/job/step": 0.5})


@pytest.mark.parametrize(
    ("path", "root", "folder"),
    [
        ("/docker/ab", "/docker/ab", "."),  # a container that sees the host's paths
        ("/docker/ab/in", "/docker/ab", "in"),
        ("/docker/abc", "/docker/ab", "."),  # not below the root, though it begins alike
        ("/../../other", "/", "."),  # seen from a namespace below
        ("/", "/", "."),
    ],
)
def test_paths_are_those_below_the_mounts_root(tmp_path, path, root, folder):
    files = {f"{folder}/cpu.max": "200000 100000\n"}
    proc, groups = control(tmp_path, f"0::{path}\n", V2.replace(" / {}", f" {root} {{}}"), files)
    assert watch._cpu_limits(proc) == (2, {groups / folder: 2.0})
    assert watch._cgroups("cpu", proc)[1] == ([groups] if folder == "." else [groups / folder, groups])


def test_no_cgroups(tmp_path):
    assert watch._cpu_limits(tmp_path) == (2, {})
    assert available_memory(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


@pytest.mark.parametrize(
    ("version", "stat"),
    [(1, "nr_periods 9\nnr_throttled 3\nthrottled_time {}000\n"), (2, "usage_usec 5\nthrottled_usec {}\n")],
)
def test_throttling_by_the_quota(tmp_path, monkeypatch, version, stat):
    folders = [tmp_path / "job", tmp_path]
    (tmp_path / "job").mkdir()
    monkeypatch.setattr(watch, "_cpu_limits", lambda: (version, {folders[0]: 1.5, folders[1]: 4.0}))

    def throttled(so_far):
        for folder in folders:
            (folder / "cpu.stat").write_text(stat.format(so_far))

    throttled(1_000_000)
    seen = Watch()
    for total in (1_250_000, 1_300_000):
        with seen:
            throttled(total)
        throttled(total + 10)
    quota = seen.summary()["cpu_quota"]
    assert quota["limit"] == 1.5
    assert quota["throttled"] == pytest.approx(2 * 0.29999)


def test_without_a_quota(monkeypatch):
    monkeypatch.setattr(watch, "_cpu_limits", lambda: (2, {}))
    quota = Watch().summary()["cpu_quota"]
    assert (quota["limit"], quota["throttled"]) == (None, None)
    if sys.platform == "linux":
        assert quota["affinity"] == len(os.sched_getaffinity(0))
        assert quota["load"] >= 0


def test_memory_left_by_version_2(tmp_path):
    files = {
        "job/step/memory.max": "max\n",
        "job/step/memory.current": "1000\n",
        "job/memory.max": "8000000\n",
        "job/memory.current": "5000000\n",
        "job/memory.stat": "anon 4000000\ninactive_file 700000\nactive_file 300000\n",
    }
    proc, _ = control(tmp_path, "0::/job/step\n", V2, files)
    assert available_memory(proc) == 3_700_000


def test_memory_left_by_version_1(tmp_path):
    files = {
        "memory/job/memory.limit_in_bytes": "8000000\n",
        "memory/job/memory.usage_in_bytes": "9000000\n",
        "memory/job/memory.stat": "inactive_file 5\ntotal_inactive_file 1200000\n",
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/memory.usage_in_bytes": "9000000\n",
    }
    proc, groups = control(tmp_path, V1_PATHS, V1, files)
    assert available_memory(proc) == 200_000
    (groups / "memory/job/memory.stat").unlink()
    assert available_memory(proc) == 0


# Energy.


class AppleSiliconMeasurement(types.SimpleNamespace):
    """A fake of Zeus's, whose name tells the sensor."""


class JetsonMeasurement(types.SimpleNamespace):
    """A fake of Zeus's, whose name tells the sensor."""


class UnheardOf(types.SimpleNamespace):
    """A chip that a later Zeus might know."""


class FakeGPUs:
    """Stands for Zeus's managers of GPUs."""


class FakeMonitor:
    """A fake ZeusMonitor: the settings of a class say what sensors there are, and what each window gives."""

    gpus_there = 1
    sampled = False
    zones: tuple = ()
    chip = None
    windows = iter(())

    def __init__(self, gpu_indices=None, cpu_indices=None):
        type(self).made.append((gpu_indices, cpu_indices))
        if any(index >= self.gpus_there for index in gpu_indices or ()):
            raise ValueError("No GPUs available.")
        self.gpus, self.power_monitor = FakeGPUs(), object() if self.sampled else None
        self.gpu_indices = gpu_indices
        self.cpu_indices = list(range(len(self.zones))) if cpu_indices is None else cpu_indices
        self.cpus = types.SimpleNamespace(
            cpus=[types.SimpleNamespace(rapl_file=types.SimpleNamespace(name=name)) for name in self.zones]
        )
        self.open = False

    def begin_window(self, key, sync_execution=True):
        assert not self.open
        assert not sync_execution, "Zeus would import torch"
        self.open = True

    def end_window(self, key, sync_execution=True):
        assert self.open
        assert not sync_execution
        self.open = False
        joules = next(self.windows)
        if isinstance(joules, Exception):
            raise joules
        return types.SimpleNamespace(
            time=2.0,
            gpu_energy=dict.fromkeys(self.gpu_indices, joules),
            cpu_energy={n: joules * (n + 1) for n in self.cpu_indices} or None,
            dram_energy=dict.fromkeys(self.cpu_indices, 1.0) or None,
            soc_energy=self.chip,
        )


@pytest.fixture
def fake_zeus(monkeypatch):
    """Puts a fake Zeus in place; give it the sensors, and what its windows give, the first being the trial."""

    def put(windows, **sensors):
        monitor = type("ZeusMonitor", (FakeMonitor,), {"windows": iter(windows), "made": [], **sensors})
        monkeypatch.setitem(sys.modules, "zeus", types.ModuleType("zeus"))
        module = types.ModuleType("zeus.monitor")
        module.ZeusMonitor = monitor
        monkeypatch.setitem(sys.modules, "zeus.monitor", module)
        return monitor

    return put


def measured(energy, windows=1):
    for _ in range(windows):
        with energy:
            pass
    return energy.summary()


def test_a_gpus_counter(fake_zeus):
    zeus = fake_zeus([0.0, 10.0, 2.5], gpus_there=2)
    assert measured(Energy("gpu", devices=(0, 1)), windows=2) == {
        "joules": 25.0,
        "seconds": 4.0,
        "windows": 2,
        "sensor": "FakeGPUs 0, 1, energy counter",
        "class": "counter",
        "reason": "",
    }
    assert zeus.made == [([0, 1], [])], "RAPL would start a process"


def test_sampled_power_is_an_estimate(fake_zeus):
    """Before the first sample Zeus fails with a KeyError."""
    fake_zeus([KeyError(0), 10.0], sampled=True)
    found = measured(Energy("gpu"))
    assert (found["joules"], found["class"], found["sensor"]) == (10.0, "estimate", "FakeGPUs 0, power sampled")
    fake_zeus([KeyError(0), 10.0])
    assert measured(Energy("gpu"))["reason"] == "Zeus: KeyError: 0"


def test_packages_without_the_platform_that_holds_them(fake_zeus):
    zeus = fake_zeus([1.0, 10.0], zones=("package-0", "package-1", "psys"))
    found = measured(Energy("cpu"))
    assert (found["joules"], found["class"]) == (10.0 + 20.0 + 2.0, "counter")
    assert found["sensor"] == "RAPL packages 0, 1, memory 0, 1"
    assert zeus.made == [([], None)]


@pytest.mark.parametrize("of", ["gpu", "cpu"])
@pytest.mark.parametrize(
    ("chip", "joules", "kind"),
    [
        (
            AppleSiliconMeasurement(cpu_total_mj=1500, gpu_mj=2000, dram_mj=500, ane_mj=None),
            4.0,
            "model",
        ),
        (JetsonMeasurement(cpu_energy_mj=1000.0, gpu_energy_mj=2000.0, total_energy_mj=5000.0), 5.0, "estimate"),
    ],
)
def test_a_whole_chip(fake_zeus, of, chip, joules, kind):
    fake_zeus([1.0, 1.0], gpus_there=0, chip=chip)
    found = measured(Energy(of))
    assert (found["joules"], found["class"]) == (joules, kind)
    assert found["sensor"].startswith(type(chip).__name__)


@pytest.mark.parametrize("chip", [None, UnheardOf(total_mj=5.0), JetsonMeasurement(total_energy_mj=None)])
@pytest.mark.parametrize("of", ["gpu", "cpu"])
def test_no_sensor_is_not_zero(fake_zeus, of, chip):
    """Zeus itself gives 0 J."""
    fake_zeus([1.0, 1.0], gpus_there=0, chip=chip)
    found = measured(Energy(of))
    assert (found["joules"], found["seconds"], found["windows"]) == (None, None, 0)
    assert found["reason"].startswith(f"Zeus found no energy sensor for the {of}; it needs")


def test_one_window_that_failed_leaves_no_sum(fake_zeus):
    fake_zeus([1.0, 10.0, 0.0, 10.0])
    found = measured(Energy("gpu"), windows=3)
    assert (found["joules"], found["windows"]) == (None, 1)
    assert found["reason"] == "the sensor did not move in a window of 2.000 s; use longer ones"
    fake_zeus([1.0, 10.0, OSError("GPU is lost")])
    found = measured(Energy("gpu"), windows=2)
    assert (found["joules"], found["reason"]) == (None, "Zeus: OSError: GPU is lost")


def test_work_that_failed_has_no_energy(fake_zeus):
    fake_zeus([1.0, 10.0])
    energy = Energy("gpu")
    with pytest.raises(MemoryError), energy:
        raise MemoryError("full")
    assert energy.summary()["reason"] == "the work in a window failed: MemoryError: full"
    assert energy.summary()["joules"] is None


def test_no_window(fake_zeus):
    fake_zeus([1.0])
    assert Energy("gpu").summary()["reason"] == "no window was measured"


def test_without_zeus(monkeypatch):
    monkeypatch.setitem(sys.modules, "zeus", None)
    monkeypatch.delitem(sys.modules, "zeus.monitor", raising=False)
    found = measured(Energy("gpu"))
    assert (found["joules"], found["class"]) == (None, None)
    assert found["reason"] == "Zeus is not installed; pip install 'portnet[energy]'"


# Zeus reads these in place of the system's; what the counters say is fake, the rest is Zeus. In a process of its own:
# Zeus keeps what it found, and starts processes.
REAL = """
import sys
from pathlib import Path
from portnet.watch import Energy

def zone(path, name, microjoules):
    path.mkdir(parents=True, exist_ok=True)
    for file, text in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", 262143328850)):
        (path / file).write_text(f"{text}\\n")

def at(microjoules):
    zone(root / "intel-rapl:0", "package-0", microjoules)
    zone(root / "intel-rapl:0" / "intel-rapl:0:0", "dram", microjoules // 2)
    zone(root / "intel-rapl:1", "psys", 5 * microjoules)

if __name__ == "__main__":
    root = Path(sys.argv[1])
    at(1_000_000)
    import zeus.device.cpu.rapl
    zeus.device.cpu.rapl.RAPL_DIR = str(root)
    energy = Energy("cpu")
    with energy:
        at(4_000_000)
    print(energy.summary()["joules"], energy.summary()["class"], energy.summary()["reason"])
"""


@linux
@pytest.mark.skipif(find_spec("zeus") is None, reason="Zeus is not installed; pip install 'portnet[energy]'")
def test_the_real_zeus_on_fake_counters(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(REAL)
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, script, tmp_path / "rapl"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert (done.stdout.strip(), done.stderr) == ("4.5 counter", "")
