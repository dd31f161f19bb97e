"""Which ring formats a test runs with: a decorator for each choice.

A test so marked runs once per format: `make_guest` and all that is built on it add the bits of the
fixture `rings` to the features. All other tests have split rings.
"""

from __future__ import annotations

import pytest
from driver import IN_ORDER, RING_PACKED

LACKS = pytest.mark.passt_lacks("split rings only, and not in order")
SPLIT = pytest.param(0, id="split")
PACKED = pytest.param(RING_PACKED, id="packed", marks=LACKS)
SPLIT_IN_ORDER = pytest.param(IN_ORDER, id="split-in-order", marks=LACKS)
PACKED_IN_ORDER = pytest.param(RING_PACKED | IN_ORDER, id="packed-in-order", marks=LACKS)

both_formats = pytest.mark.parametrize("rings", [SPLIT, PACKED], indirect=True)
all_formats = pytest.mark.parametrize(
    "rings", [SPLIT, PACKED, SPLIT_IN_ORDER, PACKED_IN_ORDER], indirect=True
)
packed_formats = pytest.mark.parametrize("rings", [PACKED, PACKED_IN_ORDER], indirect=True)
