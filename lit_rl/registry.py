"""Names of trunks: entry points of installed packages to classes, without importing anyone's code.

A package offers a trunk with an entry point in the group ``lit_rl.trunks``::

    [project.entry-points."lit_rl.trunks"]
    gru = "lit_rl.trunks.recurrent:GRU"

Only package metadata is read here (the standard library is enough); a module is imported when its trunk
is chosen. So a broken plugin breaks nothing until somebody names it.
"""

from __future__ import annotations

import difflib
import importlib
import re
from configparser import ConfigParser
from configparser import Error as ConfigError
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions

from lit_rl.errors import UserError

GROUP = "lit_rl.trunks"
TARGET = re.compile(r"(?P<module>[\w.]+)\s*:\s*(?P<attribute>\w+)")
# By name, because the registry stands below the trunks and does not import them.
BASE_CLASS = "lit_rl.trunks.base.Trunk"


@dataclass(frozen=True)
class TrunkEntry:
    """One trunk that an installed package offers; `target` is ``"pkg.mod:Class"`` as written there."""

    name: str
    target: str
    package: str
    version: str

    def __str__(self) -> str:
        return f"trunk {self.name!r} of {self.package} {self.version} ({self.target})"


def normalise(package: str) -> str:
    """The package name as pip compares it: lower case, a run of ``-_.`` is one ``-`` (PEP 503)."""
    return re.sub(r"[-_.]+", "-", package).lower()


def entries() -> list[TrunkEntry]:
    """Every registered trunk, sorted by name then package; reads metadata only."""
    found: dict[str, list[TrunkEntry]] = {}
    for distribution in distributions():
        try:
            package = distribution.metadata["Name"]
        except UnicodeDecodeError:  # not even a name to show it by
            continue
        # One distribution can stand twice on sys.path (an editable install beside its egg-info): the first
        # is the one that Python imports.
        if package and normalise(package) not in found:
            found[normalise(package)] = _entries_of(distribution, package)
    return sorted((e for group in found.values() for e in group), key=lambda e: (e.name, e.package))


def _entries_of(distribution: Distribution, package: str) -> list[TrunkEntry]:
    version = distribution.metadata["Version"] or "unknown version"
    try:
        text = distribution.read_text("entry_points.txt") or ""
    except UnicodeDecodeError as error:
        return [TrunkEntry("(unreadable)", f"entry_points.txt: {_one_line(error)}", package, version)]
    if GROUP not in text:
        return []
    # Not importlib.metadata.entry_points: one malformed line in anybody's file makes it raise for everybody.
    parser = ConfigParser(delimiters="=", allow_no_value=True, interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # names keep their case
    try:
        parser.read_string(text)
    except ConfigError as error:
        return [TrunkEntry("(unreadable)", f"entry_points.txt: {_one_line(error)}", package, version)]
    if not parser.has_section(GROUP):
        return []
    return [TrunkEntry(name, target or "", package, version) for name, target in parser.items(GROUP)]


def find(name: str) -> TrunkEntry:
    """The one entry called `name`, or ``package/name`` where several packages use the name.

    Raises:
        UserError: nobody offers the name (with close matches), or several packages do.
    """
    package, _, bare = name.rpartition("/")
    known = entries()
    matches = [e for e in known if e.name == bare and normalise(package) in ("", normalise(e.package))]
    if len(matches) == 1:
        return matches[0]
    if matches:
        owners = " and ".join(f"{e.package} {e.version}" for e in matches)
        choices = " or ".join(f"{e.package}/{e.name}" for e in matches)
        raise UserError(f"trunk {name!r} is offered by {owners}; write {choices} to select one")
    names = sorted({e.name for e in known} | {f"{e.package}/{e.name}" for e in known if package})
    close = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise UserError(f"unknown trunk {name!r}; {hint}known: {', '.join(names)} (see `lit-rl trunks list`)")


def class_path(name: str) -> str:
    """``"pkg.mod.Class"`` of the trunk called `name`; a dotted name is a class path already.

    Raises:
        UserError: see `find`; also when the entry's target is not ``pkg.mod:Class``.
    """
    if is_class_path(name):
        return name
    module, attribute = split_target(find(name))
    return f"{module}.{attribute}"


def load(name: str) -> type:
    """Import and return the trunk class called `name` (or at a dotted class path).

    Raises:
        UserError: see `find`; also when the target cannot be imported or is not a trunk. The message
            names package, version, target and cause.
    """
    if is_class_path(name):
        module, _, attribute = name.rpartition(".")
        return _import(module, attribute, f"trunk {name!r}", "check the class path")
    entry = find(name)
    module, attribute = split_target(entry)
    return _import(module, attribute, str(entry), f"repair or uninstall {entry.package}")


def is_class_path(name: str) -> bool:
    """Whether `name` is dotted, like ``pkg.mod.Class``, and not ``package/name``."""
    return "." in name and "/" not in name


def split_target(entry: TrunkEntry) -> tuple[str, str]:
    """Module and attribute of an entry's target.

    Raises:
        UserError: the target is not of the form ``pkg.mod:Class``.
    """
    match = TARGET.fullmatch(entry.target.strip())
    if match is None:
        raise UserError(
            f"{entry} is broken: the target is not 'pkg.mod:Class'; repair or uninstall {entry.package}"
        )
    return match["module"], match["attribute"]


def _import(module: str, attribute: str, what: str, remedy: str) -> type:
    try:
        trunk = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a plugin's module may raise anything when it is imported
        raise UserError(f"{what} cannot be imported: {_one_line(error)}; {remedy}") from error
    bases = trunk.__mro__ if isinstance(trunk, type) else ()
    if BASE_CLASS not in (f"{base.__module__}.{base.__qualname__}" for base in bases):
        raise UserError(f"{what} is not a trunk: it does not subclass {BASE_CLASS}; {remedy}")
    return trunk


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
