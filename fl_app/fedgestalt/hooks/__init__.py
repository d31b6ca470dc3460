"""Plugin hooks: decorate with :data:`hookimpl`, look up with :func:`get_registry`."""

from fedgestalt.hooks.registry import Catalogue, Entry, Problem, Registry, get_registry
from fedgestalt.hooks.specs import ENTRY_POINT_GROUP, hookimpl, hookspec

__all__ = [
    "ENTRY_POINT_GROUP",
    "Catalogue",
    "Entry",
    "Problem",
    "Registry",
    "get_registry",
    "hookimpl",
    "hookspec",
]
