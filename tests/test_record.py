"""Plain values (shm/record.py) do what frozen dataclasses do."""

from __future__ import annotations

import copy
import pickle
from typing import Any, ClassVar

import pytest

from shm.record import Record


class Point(Record):
    SCALE: ClassVar[int] = 7
    x: int
    index: int = 5

    def __post_init__(self) -> None:
        if self.x < 0:
            raise ValueError(self.x)


class Other(Record):
    x: int
    index: int = 5


class Nothing(Record):
    pass


def test_values() -> None:
    assert Point.FIELDS == ("x", "index") and Point.SCALE == 7
    assert (Point(1).x, Point(1).index) == (1, 5)
    assert Point(1, 2) == Point(x=1, index=2) == Point(1, index=2) == Point(index=2, x=1)
    assert repr(Point(1)) == "Point(x=1, index=5)"
    assert Point(1).replaced(index=9) == Point(1, 9)
    assert Nothing() == Nothing() and repr(Nothing()) == "Nothing()"


def test_equal_by_type_and_content() -> None:
    assert Point(1) != Other(1) and Point(1) != Point(2) and Point(1) != (1, 5)
    assert len({Point(1), Point(1, 5), Point(2), Other(1)}) == 3


def test_never_changed() -> None:
    point = Point(1)
    with pytest.raises(AttributeError):
        point.x = 2  # type: ignore[misc]
    with pytest.raises(AttributeError):
        point.y = 2  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        del point.x
    assert point == Point(1)


@pytest.mark.parametrize(
    "values, named",
    [((), {}), ((), {"index": 1}), ((1, 2, 3), {}), ((1,), {"x": 1}), ((1,), {"y": 1})],
)
def test_wrong_fields(values: tuple[int, ...], named: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        Point(*values, **named)


def test_demands() -> None:
    with pytest.raises(ValueError):
        Point(-1)
    with pytest.raises(ValueError):
        Point(1).replaced(x=-1)


def test_matched_and_moved() -> None:
    match Point(1, 2):
        case Other():
            raise AssertionError
        case Point(x, index):
            assert (x, index) == (1, 2)
    assert pickle.loads(pickle.dumps(Point(1, 2))) == copy.deepcopy(Point(1, 2)) == Point(1, 2)
