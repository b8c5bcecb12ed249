"""Finding back ends, keeping broken ones apart, and saying whose fault it is.

Entry points of the group ``portnet`` name modules whose hooks (see `portnet.hookspecs`) offer backends; PortNet's own
are found the same way. Nothing is probed, and no vendor imported, to list them. Each plug-in is loaded, checked and
asked on its own: what is wrong with one becomes a `Problem`, and the others work.
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import Distribution, EntryPoint, distribution, distributions
from textwrap import shorten
from typing import Any

import pluggy

from portnet import hookspecs
from portnet.contract import Backend, Device
from portnet.errors import PluginError, PortNetError, Unavailable, UnknownName

__all__ = ["DISABLE", "Problem", "Registry", "backends", "choose", "probe", "require"]

GROUP = "portnet"
RUNNER = "onnxruntime-cpu"
"""The backend that verifies, quantises and runs ONNX files where none is named."""
DISABLE = "PORTNET_DISABLE_PLUGINS"
"""Set to anything but 0, this environment variable keeps other distributions' plug-ins from being loaded."""

# A plug-in that exits must not end the listing; KeyboardInterrupt must.
_FAULTS = (Exception, SystemExit)
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is wrong with one plug-in, or with one name that several claim.

    `plugin` is the entry point's name, or the name in dispute; `message` starts with the exception's type where there
    was one.
    """

    plugin: str
    distribution: str
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.plugin} ({self.distribution}): {self.message}; {self.remedy}"


class Registry(Mapping[str, Backend]):
    """Backends by name, those ``auto`` prefers first, and the `problems` met in finding them.

    A name that cannot be handed out raises `PluginError` if a plug-in is at fault, otherwise `UnknownName`.
    """

    def __init__(self, found: Iterable[Backend], problems: Iterable[Problem]):
        self._found = {b.name: b for b in sorted(found, key=lambda b: (-b.priority, b.name))}
        self.problems = tuple(problems)

    def __getitem__(self, name: str) -> Backend:
        if name in self._found:
            return self._found[name]
        for problem in self.problems:
            # An entry point may offer several backends, named after it (onnxruntime-cpu).
            if not self._found or name == problem.plugin or name.startswith(f"{problem.plugin}-"):
                raise PluginError(f"no backend {name!r}, because of a plug-in: {problem}")
        raise UnknownName("backend", name, self._found)

    def __contains__(self, name: object) -> bool:
        return name in self._found

    def get(self, name: str, default: Any = None) -> Any:
        return self._found.get(name, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __repr__(self) -> str:
        return f"Registry({', '.join(self._found)}; {len(self.problems)} problems)"


@dataclass(frozen=True, kw_only=True)
class _Source:
    """An entry point, and the distribution it comes from."""

    entry: EntryPoint
    distribution: str

    @property
    def key(self) -> str:
        return f"{self.distribution}:{self.entry.name}"

    def problem(self, message: str, remedy: str = "") -> Problem:
        author = f"report it to the author of {self.distribution}, or uninstall it"
        if self.distribution == GROUP:
            author = "reinstall portnet, and report it if that does not help"
        return Problem(
            plugin=self.entry.name,
            distribution=self.distribution,
            message=message,
            remedy=f"{remedy}; {author}" if remedy else author,
        )


@cache
def backends() -> Registry:
    """Every backend that a plug-in offers. Probes none and imports no vendor.

    Made once per process: ``backends.cache_clear()`` makes the next call look again.
    """
    sources, problems = _sources()
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    claims: dict[str, list[tuple[Backend, _Source]]] = {}
    for source in sources:
        try:
            for item in _offers(manager, source):
                if fault := _fault(item):
                    problems.append(source.problem(fault))
                else:
                    claims.setdefault(item.name, []).append((item, source))
        except pluggy.PluginValidationError as error:
            hooks = ", ".join(name for name in vars(hookspecs) if name.startswith("portnet_"))
            problems.append(source.problem(_describe(error), f"the hooks are {hooks}"))
        except _FAULTS as error:
            problems.append(source.problem(_describe(error)))
    problems += [_dispute(name, [source for _, source in claim]) for name, claim in claims.items() if len(claim) > 1]
    return Registry((claim[0][0] for claim in claims.values() if len(claim) == 1), problems)


def choose(name: str = "auto") -> Backend:
    """The backend of that name, or for ``auto`` the one of highest priority whose probe succeeds.

    Raises `UnknownName`, `PluginError`, or, if ``auto`` finds none, `Unavailable` with every reason.
    """
    registry = backends()
    if name != "auto":
        return registry[name]
    reasons = []
    for backend in registry.values():
        if backend.priority <= 0:
            continue
        try:
            probe(backend)
        except Unavailable as error:
            reasons.append(f"{backend.name}: {error}")
        else:
            return backend
    reasons += map(str, registry.problems)
    raise Unavailable(
        f"no backend is available ({' | '.join(reasons) or 'none is installed'})",
        "follow one of the remedies, or name a backend: portnet backends lists them",
    )


def probe(backend: Backend) -> Device:
    """The device that `backend` finds. Whatever goes wrong in its probe is raised as `Unavailable`, by name."""
    remedy = "report it to the plug-in's author"
    try:
        device = backend.probe()
    except Unavailable:
        raise
    except _FAULTS as error:
        raise Unavailable(f"the probe of {backend.name} raised {_describe(error)}", remedy) from error
    if not isinstance(device, Device):
        raise Unavailable(f"the probe of {backend.name} returned {device!r}, not a Device", remedy)
    return device


def require(name: str) -> None:
    """Exit with status 1 and one line that says why, unless the backend of that name can be used here."""
    try:
        device = probe(backends()[name])
    except PortNetError as error:
        sys.exit(f"portnet: {name}: {error}")
    print(f"portnet: {name}: {device.name}")


def _sources() -> tuple[list[_Source], list[Problem]]:
    """The entry points to load, PortNet's own first, and what was wrong in finding them."""
    only_ours = os.environ.get(DISABLE, "0") not in ("", "0")
    sources: list[_Source] = []
    problems: list[Problem] = []
    seen = set()
    for candidate in distributions():
        try:
            # Reading every distribution's metadata for its name would take most of the time that a listing has.
            if f"[{GROUP}]" not in (candidate.read_text("entry_points.txt") or ""):
                continue
            name = _normalised(candidate)
            if name in seen or (only_ours and name != GROUP):
                continue
            seen.add(name)
            # The first on the path counts, as for imports: an old copy further down must not offer everything twice.
            active = distribution(name)
            sources += [_Source(entry=e, distribution=name) for e in active.entry_points.select(group=GROUP)]
        except Exception as error:
            problems.append(_unreadable(candidate, error))
    if not any(s.distribution == GROUP for s in sources):
        problems.append(
            Problem(
                plugin=GROUP,
                distribution=GROUP,
                message="its own back ends cannot be found, because it is imported without being installed",
                remedy="pip install it (with -e for a checkout)",
            )
        )
    return sorted(sources, key=lambda s: (s.distribution != GROUP, s.key)), problems


def _normalised(found: Distribution) -> str:
    name: str | None = found.metadata["Name"]
    if not name:
        raise PluginError("its metadata has no name")
    return re.sub(r"[-_.]+", "-", name).lower()


def _unreadable(found: Distribution, error: Exception) -> Problem:
    place = str(getattr(found, "_path", found))
    name = re.split(r"[-.](?=\d)|\.dist-info|\.egg-info", os.path.basename(place))[0]
    return Problem(
        plugin=name,
        distribution=name,
        message=f"{place}: {_describe(error)}",
        remedy="uninstall it, or install it again",
    )


def _offers(manager: pluggy.PluginManager, source: _Source) -> Iterator[Any]:
    """Load one plug-in, check its hooks, and give what it offers, whatever that is. Unregisters it if a hook is bad."""
    plugin = source.entry.load()
    try:
        manager.register(plugin, source.key)
        manager.check_pending()
        if not manager.get_hookcallers(plugin):
            raise PluginError(f"{source.entry.value} implements no hook; mark them with portnet.hookspecs.hookimpl")
    except BaseException:
        if manager.has_plugin(source.key):
            manager.unregister(name=source.key)
        raise
    # Calling the hook itself would ask all plug-ins at once, and the first to raise would take the others' results.
    for implementation in manager.hook.portnet_backends.get_hookimpls():
        if implementation.plugin is plugin:
            offered: Any = implementation.function()
            yield from offered


def _fault(item: object) -> str:
    """What keeps `item` from being listed as a backend; empty if nothing does."""
    if not isinstance(item, Backend):
        hint = "; it must be an instance" if isinstance(item, type) and issubclass(item, Backend) else ""
        return f"portnet_backends gave {item!r}, which is no Backend{hint}"
    kind = f"the backend {type(item).__name__}"
    name = getattr(item, "name", None)
    if not (isinstance(name, str) and _NAME.fullmatch(name)) or name == "auto":
        return f"{kind} is named {name!r}; a name is lowercase letters, digits and hyphens, and not 'auto'"
    if not isinstance(getattr(item, "vendor", None), str):
        return f"{kind} ({name}) does not name its vendor"
    if not isinstance(priority := getattr(item, "priority", None), int):
        return f"{kind} ({name}) has priority {priority!r}; it must be an integer"
    return ""


def _dispute(name: str, sources: list[_Source]) -> Problem:
    remedy = "uninstall or correct one of them"
    if any(s.distribution != GROUP for s in sources):
        remedy += f", or set {DISABLE}=1 to do without other distributions' plug-ins"
    return Problem(
        plugin=name,
        distribution=", ".join(dict.fromkeys(s.distribution for s in sources)),
        message="the name is claimed by " + " and by ".join(f"{s.entry.value} of {s.distribution}" for s in sources),
        remedy=remedy,
    )


def _describe(error: BaseException) -> str:
    text = shorten(str(error), 300)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
