"""The models of one session."""

from __future__ import annotations

from pullback_server.rpc.catalogue import Catalogue
from pullback_server.rpc.security import caller
from pullback_server.rpc.signature import SignatureView


class Kept:
    """Finds models as the catalogue does, and keeps them: a session goes on with the versions that it has once named,
    whatever is loaded or unloaded meanwhile, and "the latest" is to it what it was when it first asked.

    `release` must be called when the session has ended.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._views: dict[tuple[str, str], SignatureView] = {}
        self._held: set[tuple[str, str]] = set()

    def find(self, name: str, version: str, field: str = "") -> SignatureView:
        """Raises Fault as `Catalogue.find`, and PERMISSION_DENIED for a model that is not the caller's."""
        caller().need_model(name, f"{field}model" if field else "name")
        view = self._views.get((name, version))
        if view is not None:
            return view
        view = self._catalogue.find(name, version, field)
        number = view.signature.version
        view = self._views.setdefault((name, number), view)
        self._views[name, version] = view
        caller().models.add(name)
        key = (name, view.signature.id)
        if key not in self._held:
            self._held.add(key)
            self._catalogue.table.hold(*key)
        return view

    def release(self) -> None:
        """The session needs none of them any more."""
        while self._held:
            self._catalogue.table.release(*self._held.pop())
