"""Which models are served: their versions and states, loaded and replaced while calls go on."""

from pullback_server.registry.curator import Curator, Mode
from pullback_server.registry.registry import Registry
from pullback_server.registry.state_dir import StateDir
from pullback_server.registry.table import Table, Version, VersionState
from pullback_server.registry.uploads import UploadStore
from pullback_server.registry.versions import Versions

__all__ = ["Curator", "Mode", "Registry", "StateDir", "Table", "UploadStore", "Version", "VersionState", "Versions"]
