"""record.py - plain values: named fields, equal by type and content, never changed.

Theory      What a frozen dataclass is, for the classes that control makes before it can answer its
            first message. There each of them cost 0.4 ms, as six methods are written out and
            compiled at every start, and the module 8 ms, as it takes the source code tools along:
            together a sixth of the time from exec to the answer. A NamedTuple costs half of that
            and equals every tuple of the same numbers, a RingStop(1) a RingChanged(1).
            The fields are the annotations of the class, their defaults its attributes; ClassVar is
            left out. Type checkers take a Record for a frozen dataclass (PEP 681).
Limits      Defaults are shared by all: immutable ones only. Annotations are strings (`from
            __future__ import annotations`). A class inherits from Record and nothing else.
Errors      TypeError for fields that are missing, unknown or given twice; AttributeError for a
            change.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self, dataclass_transform


@dataclass_transform(frozen_default=True)
class Record:
    """The base class; FIELDS are their names, in their order."""

    FIELDS: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        kinds = cls.__dict__.get("__annotations__", {})
        cls.FIELDS = tuple(name for name in kinds if not kinds[name].startswith("ClassVar"))
        cls.__match_args__ = cls.FIELDS  # type: ignore[attr-defined, misc]

    def __init__(self, *values: Any, **named: Any) -> None:
        given = dict(zip(self.FIELDS, values, strict=False))
        if len(values) > len(self.FIELDS) or given.keys() & named.keys():
            raise TypeError(f"{type(self).__name__}: more values than fields {self.FIELDS}")
        given |= named
        for name in self.FIELDS:
            if name not in given:
                try:
                    given[name] = getattr(type(self), name)
                except AttributeError:
                    raise TypeError(f"{type(self).__name__}: no value for {name}") from None
        if len(given) > len(self.FIELDS):
            raise TypeError(f"{type(self).__name__}: {sorted(named)} beside {self.FIELDS}")
        self.__dict__.update(given)
        self.__post_init__()

    def __post_init__(self) -> None:
        """For a class with demands on its values."""

    def replaced(self, **changes: Any) -> Self:
        """The same with other values for some fields."""
        return type(self)(**self._content() | changes)

    def _content(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in self.FIELDS}

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._content() == other._content()

    def __hash__(self) -> int:
        return hash((type(self), *self._content().values()))

    def __repr__(self) -> str:
        content = ", ".join(f"{name}={value!r}" for name, value in self._content().items())
        return f"{type(self).__name__}({content})"

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a {type(self).__name__} is never changed: {name}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a {type(self).__name__} is never changed: {name}")
