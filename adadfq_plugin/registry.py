"""Named objects that installed distributions offer: one typed view of one group of entry points.

Nothing is imported before it is asked for, and a distribution that fails to load costs nobody but itself.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from email import message_from_string
from importlib import metadata
from typing import Generic, TypeVar, cast

from adadfq_plugin.config import nearest
from adadfq_plugin.errors import BrokenPluginError, UnknownNameError

__all__ = ["Registry", "RegistryEntry"]

T = TypeVar("T")

_OWN_DISTRIBUTION = "adadfq-plugin"


@dataclass(frozen=True)
class RegistryEntry:
    """What one line of a distribution's entry points is good for."""

    name: str
    """The registered name; ``(entry_points.txt)`` where the file itself is unreadable."""
    distribution: str
    """Name of the distribution that registers it."""
    version: str
    """Version of that distribution."""
    value: str
    """Where the object is, as ``module:attribute``."""
    status: str
    """``ok``, or why the object can't be had."""


class Registry(Generic[T]):
    """The objects that installed distributions register under one group of entry points.

    The group is scanned at first use and remembered until :meth:`refresh`. Where two distributions register
    the same name a warning names both, and this package's own object wins; among others the first by
    distribution name.

    Args:
        group: The group of entry points, for instance ``adadfq_plugin.methods``.
        kind: What an object of the group is called in messages, for instance ``method``.
        validate: Takes the loaded object and returns it as a ``T``, or raises an error that says what is
            wrong with it. Without it any object passes.

    Example:
        >>> editors = Registry[object]("adadfq_plugin.no_such_group", "editor")
        >>> editors.names()
        ()
        >>> editors.get("vi")
        Traceback (most recent call last):
        adadfq_plugin.errors.UnknownNameError: unknown editor 'vi': no editor is installed
    """

    def __init__(self, group: str, kind: str, *, validate: Callable[[object], T] | None = None) -> None:
        self.group = group
        self.kind = kind
        self._validate = validate
        self._points: dict[str, _Point] | None = None
        self._failures: list[RegistryEntry] = []
        self._loaded: dict[str, T] = {}

    def names(self) -> tuple[str, ...]:
        """All registered names in alphabetical order; nothing is loaded, so some may turn out broken.

        Returns:
            The names.
        """
        return tuple(sorted(self._scan()))

    def get(self, name: str) -> T:
        """Load the object of a name, once.

        Args:
            name: A registered name.

        Returns:
            The object, as ``validate`` returned it.

        Raises:
            UnknownNameError: Nothing is registered under the name; the nearest and all others are listed.
            BrokenPluginError: The object can't be imported or fails validation; its distribution is named and
                the reason is the ``__cause__``.
        """
        points = self._scan()
        if not isinstance(name, str) or name not in points:
            raise UnknownNameError(self._unknown(name))
        if name not in self._loaded:
            point = points[name]
            try:
                loaded = point.entry.load()
                self._loaded[name] = cast(T, loaded) if self._validate is None else self._validate(loaded)
            # SystemExit too: a plugin that is a script must not end the program that lists it.
            except (Exception, SystemExit) as error:
                raise BrokenPluginError(
                    f"the {self.kind} {name!r} of {point.label} ({point.entry.value}) can't be loaded: "
                    f"{_reason(error)}"
                ) from error
        return self._loaded[name]

    def entries(self) -> list[RegistryEntry]:
        """Try to load everything, and report it: what works, what is broken or shadowed, and whose it is.

        Returns:
            One entry per registration, sorted by name and distribution.
        """
        loaded = [point.described(self._status(name)) for name, point in self._scan().items()]
        return sorted([*loaded, *self._failures], key=lambda entry: (entry.name, entry.distribution))

    def refresh(self) -> None:
        """Forget what was scanned and loaded, so that newly installed distributions are found."""
        importlib.invalidate_caches()
        self._points = None
        self._loaded.clear()

    def _status(self, name: str) -> str:
        try:
            self.get(name)
        except BrokenPluginError as error:
            return _reason(error.__cause__)
        return "ok"

    def _scan(self) -> dict[str, _Point]:
        if self._points is not None:
            return self._points
        found: list[_Point] = []
        failures: list[RegistryEntry] = []
        for distribution in metadata.distributions():
            # One malformed file makes metadata.entry_points() fail for everybody, so each is read by itself.
            try:
                text = distribution.read_text("entry_points.txt") or ""
                if self.group not in text or _is_hidden(distribution):
                    continue
                entries = [entry for entry in distribution.entry_points if entry.group == self.group]
            except Exception as error:
                broken = _Point(distribution, metadata.EntryPoint("(entry_points.txt)", "", self.group))
                failures.append(broken.described(_reason(error)))
            else:
                found.extend(_Point(distribution, entry) for entry in entries)
        points: dict[str, _Point] = {}
        for point in sorted(found, key=_Point.precedence):
            winner = points.setdefault(point.entry.name, point)
            if (
                winner is not point
                and winner.label == point.label
                and winner.entry.value == point.entry.value
            ):
                continue  # one distribution, found twice on the path
            if winner is not point:
                failures.append(point.described(f"shadowed by {winner.label}"))
                warnings.warn(
                    f"the {self.kind} {point.entry.name!r} of {point.label} is ignored: "
                    f"{winner.label} registers the same name",
                    UserWarning,
                    stacklevel=3,
                )
        self._points, self._failures = points, failures
        return points

    def _unknown(self, name: str) -> str:
        names = self.names()
        if not names:
            return f"unknown {self.kind} {name!r}: no {self.kind} is installed"
        return f"unknown {self.kind} {name!r}{nearest(str(name), names)} (available: {', '.join(names)})"


class _Point:
    """An entry point and the distribution that it comes from."""

    def __init__(self, distribution: metadata.Distribution, entry: metadata.EntryPoint) -> None:
        self.entry = entry
        self.name = _field(distribution, "Name") or "unknown distribution"
        self.version = _field(distribution, "Version") or "of unknown version"

    @property
    def label(self) -> str:
        return f"{self.name} {self.version}"

    def described(self, status: str) -> RegistryEntry:
        return RegistryEntry(self.entry.name, self.name, self.version, self.entry.value, status)

    def precedence(self) -> tuple[bool, str, str]:
        name = _normalized(self.name)
        return name != _OWN_DISTRIBUTION, name, self.entry.value


def _is_hidden(distribution: metadata.Distribution) -> bool:
    """Whether an earlier entry of ``sys.path`` holds the same distribution and so wins every import."""
    name = _field(distribution, "Name")
    if name is None:
        return False
    try:
        first = metadata.distribution(name)
    except metadata.PackageNotFoundError:  # its folder goes by another name than its METADATA
        return False
    return str(first.locate_file("")) != str(distribution.locate_file(""))


def _field(distribution: metadata.Distribution, field: str) -> str | None:
    # Read here, since distribution.metadata of a half-removed one is None, empty or an error, by Python version.
    text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    return message_from_string(text)[field]


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _reason(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}"
