"""TCP where the kernel does not move the peek offset (before Linux 6.9): bytes in flight are read
past, and every rule of retransmission, window and closing holds all the same.
"""

from __future__ import annotations

import pytest
from test_dataplane_tcp import (  # noqa: F401
    test_bulk,
    test_fin_is_sent_again,
    test_guest_closes_first,
    test_host_closes_first,
    test_host_resets,
    test_many_connections,
    test_random_segments,
    test_small_mss,
)
from test_dataplane_tcp_loss import (  # noqa: F401
    test_acknowledgement_in_the_middle_of_a_segment,
    test_lost_window_update,
    test_scattered_loss,
    test_stuck_connections_cost_nothing,
    test_tail_loss,
    test_tiny_windows,
    test_unacknowledged_data_is_sent_again,
    test_whole_flight_lost,
    test_zero_window_and_reopening,
)

OPTIONS = {"program": ("tests/old_kernel.py",)}
pytestmark = pytest.mark.passt_lacks("it has a path of its own for this")
