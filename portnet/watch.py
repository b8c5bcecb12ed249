"""What else went on while work was timed: foreign load, throttling, faults, energy; and the memory that is left.

A `Watch` samples at the edges of blocks only, since a sampling thread would disturb what it watches. What rises and
falls within a block is seen where the system keeps a counter of it (processor time, faults, quota, energy), and
missed where it has only a state (clocks, temperatures).
"""

import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import psutil

if sys.platform != "win32":
    import resource

__all__ = ["TELEMETRY", "Energy", "Watch", "available_memory", "busy_before"]

TELEMETRY: Mapping[str, str] = {
    "core_clock": "clock of the compute units, Hz",
    "memory_clock": "clock of the device's memory, Hz",
    "temperature": "of the device's core, degrees Celsius",
    "memory_temperature": "of the device's memory, degrees Celsius",
    "power": "drawn, as the driver tells, W",
    "power_limit": "in force, W",
    "utilization": "share of the driver's last sampling period in which the device was busy, 0 to 1",
    "memory_used": "on the device, by all processes, bytes",
    "foreign_processes": "other processes that hold the device",
    "throttling": "reasons in force for clocks below their maximum, a sequence of names",
}
"""What a backend's `telemetry` may tell, all of it optional. Other keys are kept too."""

# A scan for children walks all processes: 0.5 ms on a small machine, tens of ms on one with thousands.
_RESCAN = 1.0  # seconds

_PROC = Path("/proc/self")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _cgroups(controller: str, proc: Path = _PROC) -> tuple[int, list[Path]]:
    """The cgroup version that has a controller, and this process's folders in it, its own first, then those above.

    On hybrid systems a controller is in one of the two hierarchies; version 1 names those it has. A path outside of
    the mount's root (seen from within some containers) is taken as the mount itself.
    """
    paths: dict[str, str] = {}
    for line in _read(proc / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    found: dict[int, list[Path]] = {}
    for line in _read(proc / "mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        root, mount = (part.replace("\\040", " ") for part in left.split()[3:5])
        kind, _, options = right.split(" ", 2)
        if kind not in ("cgroup", "cgroup2") or (kind == "cgroup" and controller not in options.split(",")):
            continue
        version, key = (1, controller) if kind == "cgroup" else (2, "")
        if key not in paths or version in found:
            continue
        path = paths[key]
        base = root.rstrip("/")
        below = path[len(base) :].strip("/") if f"{path}/".startswith(f"{base}/") and ".." not in path else ""
        parts = below.split("/") if below else []
        found[version] = [Path(mount, *parts[:depth]) for depth in range(len(parts), -1, -1)]
    return (1, found[1]) if 1 in found else (2, found.get(2, []))


def _number(text: str, key: str = "") -> int | None:
    """A file's number, or that of the line that starts with `key`; None where there is none (as in ``max``)."""
    for line in text.splitlines():
        words = line.split()
        if words and (not key or words[0] == key):
            try:
                return int(words[-1])
            except ValueError:
                return None
    return None


def _cpu_limits(proc: Path = _PROC) -> tuple[int, dict[Path, float]]:
    """The cgroup version, and the folders that limit processor time: at most so many processors on average."""
    version, folders = _cgroups("cpu", proc)
    limits = {}
    for folder in folders:
        if version == 1:
            quota = _number(_read(folder / "cpu.cfs_quota_us"))
            period = _number(_read(folder / "cpu.cfs_period_us"))
        else:
            words = _read(folder / "cpu.max").split()
            quota, period = (_number(word) for word in words) if len(words) == 2 else (None, None)
        if quota and period and quota > 0:
            limits[folder] = quota / period
    return version, limits


def _throttled(version: int, folders: Iterable[Path]) -> float:
    """Seconds, over all processors, for which these cgroups' quotas have kept runnable threads waiting so far."""
    key, unit = ("throttled_time", 1e-9) if version == 1 else ("throttled_usec", 1e-6)
    return sum((_number(_read(folder / "cpu.stat"), key) or 0) * unit for folder in folders)


def available_memory(proc: Path = _PROC) -> int:
    """Bytes of host memory that this process can still take without swapping.

    The system's estimate, or what the tightest cgroup leaves if that is less: its limit less its usage, where file
    cache that has not been used lately counts as free (the working set as Kubernetes defines it).
    """
    left = [int(psutil.virtual_memory().available)]
    version, folders = _cgroups("memory", proc)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    limit_name, usage_name, cache_name = names if version == 1 else ("memory.max", "memory.current", "inactive_file")
    for folder in folders:
        limit, usage = _number(_read(folder / limit_name)), _number(_read(folder / usage_name))
        if limit is not None and usage is not None:
            cache = _number(_read(folder / "memory.stat"), cache_name) or 0
            left.append(max(0, limit - usage + cache))
    return min(left)


def peak_memory() -> int | None:
    """Most bytes of host memory that this process has held at once since it started."""
    # Linux carries ru_maxrss over from the process that started this one; VmHWM starts anew.
    kib = next((int(line.split()[1]) for line in _read(_PROC / "status").splitlines() if line[:6] == "VmHWM:"), None)
    if kib is not None:
        return kib * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True, kw_only=True)
class _Edge:
    """Counters at one edge of a block; times in seconds. `live` has the time of each further process of ours."""

    now: float
    system: Mapping[str, float] | None
    own: float
    reaped: float
    live: Mapping[int, float]
    usage: Mapping[str, int]
    throttled: float


_BUSY = ("user", "nice", "system", "irq", "softirq")  # Linux counts guests' time in user and nice already
_REST = ("idle", "iowait", "steal")


def _system() -> dict[str, float] | None:
    """Seconds that all processors have spent in each state since the system started; None where it does not tell."""
    try:
        times = psutil.cpu_times()
    except (OSError, psutil.Error):
        return None
    told = {name: float(getattr(times, name)) for name in _REST if hasattr(times, name)}
    return {"busy": sum(float(getattr(times, name, 0.0)) for name in _BUSY), **told}


def _spent(process: psutil.Process) -> float | None:
    """Processor seconds of a process and of the children that it has waited for; None where it is gone."""
    try:
        times = process.cpu_times()
    except (OSError, psutil.Error):
        return None
    return float(times.user + times.system + times.children_user + times.children_system)


def _own(first: _Edge, last: _Edge) -> float:
    """Processor seconds that we spent from one edge to the other, our children included.

    A child that has ended meanwhile is in `reaped`, or in its parent's time, with its whole life; what it had spent
    before comes off again.
    """
    both, gone = first.live.keys() & last.live.keys(), first.live.keys() - last.live.keys()
    children = last.reaped - first.reaped + sum(last.live[pid] - first.live[pid] for pid in both)
    return last.own - first.own + max(0.0, children - sum(first.live[pid] for pid in gone))


@dataclass
class _Values:
    """What a telemetry function told, over time."""

    numbers: dict[str, dict[str, float]] = field(default_factory=dict)
    texts: dict[str, dict[str, str]] = field(default_factory=dict)
    throttling: set[str] = field(default_factory=set)
    samples: int = 0
    failed: int = 0
    error: str = ""

    def ask(self, telemetry: Callable[[], Mapping[str, Any]]) -> None:
        """One sample. One that fails is counted: what a driver cannot tell must not end a measurement."""
        try:
            told = dict(telemetry())
            reasons = told.pop("throttling", ())
            self.throttling.update([reasons] if isinstance(reasons, str) else map(str, reasons))
        except Exception as error:
            self.failed += 1
            self.error = self.error or f"{type(error).__name__}: {error}"
            return
        self.samples += 1
        for name, value in told.items():
            if isinstance(value, bool | str):
                self.texts.setdefault(name, {"first": str(value)})["last"] = str(value)
            elif isinstance(value, Real) and math.isfinite(value):
                number = int(value) if isinstance(value, Integral) else float(value)
                seen = self.numbers.setdefault(name, dict.fromkeys(("first", "last", "min", "max"), number))
                seen.update(last=number, min=min(seen["min"], number), max=max(seen["max"], number))

    def summary(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "values": {**self.numbers, **self.texts},
            "throttling": sorted(self.throttling),
            "failed": self.failed,
            "error": self.error,
        }


class Watch:
    """Notes what else goes on during blocks of timed work: ``with watch: ...``, or `start` and `stop`, any number.

    `telemetry` is asked at both edges of each block (see `TELEMETRY`). `pids` are processes whose work is ours,
    besides this one and its children. Children are looked for at the start of a block, at most once a second; one
    that starts later counts as foreign until it is found, and as ours again when it is waited for. An edge takes
    about 0.1 ms, plus the telemetry and, once a second, the search.
    """

    def __init__(self, telemetry: Callable[[], Mapping[str, Any]] = dict, *, pids: Iterable[int] = ()) -> None:
        self._telemetry = telemetry
        self._others: list[psutil.Process] = []
        for pid in pids:
            try:
                self._others.append(psutil.Process(pid))
            except psutil.Error as error:
                raise ValueError(f"there is no process {pid} to watch: {error}; give pids of running ones") from error
        self._family: list[psutil.Process] = []
        self._scanned = -math.inf
        self._first: _Edge | None = None
        self._blocks = 0
        self._seconds = self._own_seconds = self._throttled = 0.0
        self._states: dict[str, float] | None = {}
        self._usage: dict[str, int] = {}
        self._values = _Values()
        self._version, self._limits = _cpu_limits()
        self._affinity = len(os.sched_getaffinity(0)) if sys.platform == "linux" else None
        try:
            self._load: float | None = os.getloadavg()[0]
        except (AttributeError, OSError):  # Windows has none
            self._load = None

    def start(self) -> None:
        """Begin a block. Raises RuntimeError where one has begun and not ended."""
        if self._first is not None:
            raise RuntimeError("the watch has been started already; stop it first")
        if time.perf_counter() - self._scanned > _RESCAN:
            self._scan()
        self._values.ask(self._telemetry)
        self._first = self._edge()

    def stop(self) -> None:
        """End the block. Raises RuntimeError where none has begun."""
        if self._first is None:
            raise RuntimeError("the watch has not been started; start it first")
        first, last = self._first, self._edge()
        self._first = None
        self._values.ask(self._telemetry)
        self._blocks += 1
        self._seconds += last.now - first.now
        self._own_seconds += _own(first, last)
        self._throttled += last.throttled - first.throttled
        if first.system is None or last.system is None or self._states is None:
            self._states = None
        else:
            for name, value in last.system.items():
                self._states[name] = self._states.get(name, 0.0) + value - first.system[name]
        for name, count in last.usage.items():
            self._usage[name] = self._usage.get(name, 0) + count - first.usage[name]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def summary(self) -> dict[str, Any]:
        """All blocks so far as one JSON-ready mapping.

        - ``blocks``, and ``seconds`` that they took in all.
        - ``foreign_cpu``: where the processors' time went, each in processors (0 to ``of``), averaged over the blocks:
          ``own`` (this process, its children, `pids`), ``foreign`` (the rest of what was busy), ``idle``, ``iowait``
          and ``steal`` (None where the system does not tell); `_foreign` says what they mean in a container.
        - ``cpu_quota``: ``limit`` of the cgroup in processors (None: no limit), ``throttled``, the seconds over all
          threads for which it kept us waiting in the blocks (None without limit), ``affinity``, the processors that
          the calling thread could run on when the watch was made (OpenMP may have pinned it), and ``load``, the
          system's average over the minute before.
        - ``telemetry``: ``values`` with the first, last, least and greatest of each number (first and last of texts),
          all ``throttling`` reasons seen, and how many samples ``failed``, with the first ``error``.
        - ``faults`` (``minor``, ``major``) and ``switches`` (``voluntary``, ``involuntary``) of this process's threads
          in the blocks, and ``peak_memory`` in bytes since the process started; None where the system does not tell.
        """
        usage = self._usage
        return {
            "blocks": self._blocks,
            "seconds": self._seconds,
            "foreign_cpu": self._foreign(),
            "cpu_quota": {
                "limit": min(self._limits.values(), default=None),
                "throttled": self._throttled if self._limits else None,
                "affinity": self._affinity,
                "load": self._load,
            },
            "telemetry": self._values.summary(),
            "faults": {name: usage.get(name) for name in ("minor", "major")},
            "switches": {name: usage.get(name) for name in ("voluntary", "involuntary")},
            "peak_memory": peak_memory(),
        }

    def _foreign(self) -> dict[str, Any]:
        """Processor time by whose it was.

        The system's counts are those of the whole machine. In a container that is the host: neighbours' load is
        foreign, also on processors that we may not use. It contends with us for memory bandwidth, shared caches and
        boost clocks in any case, and for processors where ``idle`` nears 0 (or our `cpu_quota` bites). In a virtual
        machine it is the guest: neighbours on the host appear as ``steal`` alone, where the host tells.

        Linux counts in ticks of 10 ms, so single blocks say little, and only sums over them are given. ``error`` is
        the standard error of that rounding, at most: each processor's edge is off by up to a tick, evenly spread.
        """
        of, seconds, states = psutil.cpu_count() or 1, self._seconds, self._states
        names = ("foreign", "own", *_REST)
        reason = ""
        if not self._blocks:
            reason = "no block was watched"
        elif seconds < 0.1:
            reason = f"{seconds:.3f} s in all are too few for counters with ticks of 10 ms"
        elif states is None or sum(states.values()) < 0.5 * of * seconds:  # some sandboxes have a /proc/stat of zeros
            reason = "the system does not account for its processors' time"
        if reason or states is None:
            return {**dict.fromkeys(names), "of": of, "error": None, "reason": reason}
        # Own time is exact and the system's is not, and iowait may count backwards: both can fall just below 0.
        means = {name: max(0.0, value / seconds) for name, value in states.items()}
        return {
            "foreign": max(0.0, (states["busy"] - self._own_seconds) / seconds),
            "own": self._own_seconds / seconds,
            **{name: means.get(name) for name in _REST},
            "of": of,
            "error": 0.01 * math.sqrt(of * self._blocks / 6) / seconds,
            "reason": "",
        }

    def _scan(self) -> None:
        try:
            self._family = psutil.Process().children(recursive=True)
        except (OSError, psutil.Error):
            self._family = []
        self._scanned = time.perf_counter()

    def _edge(self) -> _Edge:
        reaped, usage = 0.0, {}
        if sys.platform != "win32":
            ours, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
            reaped = children.ru_utime + children.ru_stime
            usage = {
                "minor": ours.ru_minflt,
                "major": ours.ru_majflt,
                "voluntary": ours.ru_nvcsw,
                "involuntary": ours.ru_nivcsw,
            }
        live = {process.pid: _spent(process) for process in (*self._family, *self._others)}
        return _Edge(
            throttled=_throttled(self._version, self._limits),
            usage=usage,
            live={pid: spent for pid, spent in live.items() if spent is not None},
            reaped=reaped,
            now=time.perf_counter(),
            system=_system(),
            own=time.process_time(),
        )


def busy_before(seconds: float = 0.3) -> float | None:
    """Processors that others keep busy now, averaged over that many seconds; None where the system does not tell.

    For a warning before anything is measured. See `Watch.summary` for what it means in containers.
    """
    watch = Watch()
    with watch:
        time.sleep(seconds)
    foreign: float | None = watch.summary()["foreign_cpu"]["foreign"]
    return foreign


# What Zeus has besides GPUs and RAPL, by the type of its measurement: the fields that make up the whole chip, and the
# sensor's class. https://ml.energy/zeus; unlisted ones are taken as estimates.
_CHIPS: Mapping[str, tuple[tuple[str, ...], Literal["model", "estimate"]]] = {
    "AppleSiliconMeasurement": (("cpu_total_mj", "gpu_mj", "gpu_sram_mj", "dram_mj", "ane_mj"), "model"),
    "JetsonMeasurement": (("total_energy_mj",), "estimate"),
}

_WINDOW = "portnet"


class _Unmeasured(Exception):
    """Why a window gave no energy."""


class Energy:
    """Measures the energy of whole phases through Zeus: ``with energy: ...``, any number of times.

    `of` is ``gpu`` (the boards of these `devices`, numbered as the framework does) or ``cpu`` (all packages, with
    their memory where it has a counter). On a system on a chip, either is the whole chip. All that the device draws
    counts, idle power and other processes' share included.

    Make it before anything is timed, and outside of a module's top level: importing Zeus takes about a second, and
    RAPL and power sampling each start a process of Zeus's own, which imports the main module again. Work must be
    finished at both edges (`Session.synchronize`); Zeus is not asked to wait, as it would need the framework for it.
    Windows should last seconds: GPU counters move every 20 to 100 ms, and boards of the A100 and H100 sample only a
    quarter of the time [Yang, Adamek & Armour 2024, arXiv:2312.02741].

    Beware where GPUs are of several kinds: NVML numbers them by bus, CUDA by speed, unless CUDA_DEVICE_ORDER is
    PCI_BUS_ID. A slice of a GPU has the counter of the whole board.
    """

    def __init__(self, of: Literal["gpu", "cpu"] = "gpu", devices: Sequence[int] = (0,)) -> None:
        self._of = of
        self._monitor: Any = None
        self._sensor: str | None = None
        self._class: str | None = None
        self._joules = self._seconds = 0.0
        self._windows = 0
        self._reason = ""
        try:
            # Not at the top: Zeus is optional, and loads pandas and scikit-learn.
            from zeus.monitor import ZeusMonitor

            try:
                self._monitor = ZeusMonitor(
                    gpu_indices=list(devices) if of == "gpu" else [], cpu_indices=[] if of == "gpu" else None
                )
            except (IndexError, KeyError, ValueError):
                # Without GPUs Zeus accepts none of their numbers, but a whole chip may still have a sensor.
                self._monitor = ZeusMonitor(gpu_indices=[], cpu_indices=[])
            # Once for nothing: it starts Zeus's processes, and tells whether there is a sensor at all.
            self._open()
            try:
                self._read()
            except KeyError:  # Zeus's way to say that no power has been sampled yet
                if self._monitor.power_monitor is None:
                    raise
        except ModuleNotFoundError as error:
            missing = error.name and error.name.split(".")[0] == "zeus"
            self._fail("Zeus is not installed; pip install 'portnet[energy]'" if missing else error)
        except Exception as error:
            self._fail(error)

    def start(self) -> None:
        """Begin a window, once the work before it is finished."""
        if self._reason:
            return
        try:
            self._open()
        except Exception as error:
            self._fail(error)

    def stop(self) -> None:
        """End the window, once the work in it is finished, and add it up."""
        if self._reason:
            return
        try:
            joules, seconds = self._read()
            if joules <= 0:
                raise _Unmeasured(f"the sensor did not move in a window of {seconds:.3f} s; use longer ones")
        except Exception as error:
            self._fail(error)
            return
        self._joules += joules
        self._seconds += seconds
        self._windows += 1

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.stop()
        if kind is not None:
            self._fail(f"the work in a window failed: {kind.__name__}: {error}")

    def summary(self) -> dict[str, Any]:
        """``joules`` and ``seconds`` of all windows, the ``sensor`` and its ``class``, JSON-ready.

        The class is ``counter`` (the hardware adds up), ``model`` (the vendor computes it from activity) or
        ``estimate`` (sampled power, integrated); unlike ones are never to be compared. Where any window could not be
        measured, ``joules`` and ``seconds`` are None and ``reason`` says why; otherwise it is empty.
        """
        reason = self._reason or ("" if self._windows else "no window was measured")
        return {
            "joules": None if reason else self._joules,
            "seconds": None if reason else self._seconds,
            "windows": self._windows,
            "sensor": self._sensor,
            "class": self._class,
            "reason": reason,
        }

    def _fail(self, error: BaseException | str) -> None:
        text = str(error) if isinstance(error, str | _Unmeasured) else f"Zeus: {type(error).__name__}: {error}"
        self._reason = self._reason or text

    def _open(self) -> None:
        self._monitor.begin_window(_WINDOW, sync_execution=False)

    def _read(self) -> tuple[float, float]:
        """Ends the window. Joules and seconds; raises `_Unmeasured` where Zeus found no sensor for what was asked."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of zeros, which `stop` refuses
            window = self._monitor.end_window(_WINDOW, sync_execution=False)
        # Zeus's own total of no sensors is 0 J, hence the parts.
        chip = getattr(window, "soc_energy", None)  # Zeus 0.11 has none
        if self._of == "gpu" and window.gpu_energy:
            sampled = self._monitor.power_monitor is not None
            self._class = "estimate" if sampled else "counter"
            how = "power sampled" if sampled else "energy counter"
            self._sensor = f"{type(self._monitor.gpus).__name__} {_listed(window.gpu_energy)}, {how}"
            return sum(window.gpu_energy.values()), window.time
        if self._of == "cpu" and window.cpu_energy:
            # Laptops have a zone for the whole platform beside the packages, which holds those again.
            packages = [n for n in window.cpu_energy if self._zone(n).startswith("package")]
            memory = [n for n in window.dram_energy or {} if n in packages]
            if packages:
                self._class = "counter"
                self._sensor = f"RAPL packages {_listed(packages)}" + (f", memory {_listed(memory)}" if memory else "")
                joules = sum(window.cpu_energy[n] for n in packages) + sum(window.dram_energy[n] for n in memory)
                return joules, window.time
        if chip is not None:
            kind = type(chip).__name__
            names, self._class = _CHIPS.get(kind, ((), "estimate"))
            parts = {name: value for name in names if (value := getattr(chip, name, None)) is not None}
            if parts:
                self._sensor = f"{kind}: {', '.join(name.removesuffix('_mj') for name in parts)}"
                return sum(parts.values()) / 1e3, window.time
        # Zeus keeps to itself that RAPL is there and may not be read.
        needs = "NVML or AMD SMI" if self._of == "gpu" else "RAPL, which root or Zeus's daemon alone may read"
        raise _Unmeasured(f"Zeus found no energy sensor for the {self._of}; it needs {needs}")

    def _zone(self, index: int) -> str:
        """The name of a RAPL zone; what the daemon reads has none, and is taken for a package."""
        rapl = getattr(self._monitor.cpus.cpus[index], "rapl_file", None)
        return str(getattr(rapl, "name", "package"))


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
