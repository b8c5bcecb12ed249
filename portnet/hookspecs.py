"""Every hook a plug-in can implement. Mark an implementation with `hookimpl` and name the module in an entry point of
the group ``portnet``."""

from collections.abc import Iterable

import pluggy

from portnet.contract import Backend

hookspec = pluggy.HookspecMarker("portnet")
hookimpl = pluggy.HookimplMarker("portnet")


@hookspec
def portnet_backends() -> Iterable[Backend]:  # type: ignore[empty-body]
    """The backends this plug-in offers. Must not load a vendor's software: `Backend.probe` does that when asked."""
