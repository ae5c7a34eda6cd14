"""jobs/bench_peers.py: what is refused. The race itself is what the job is for."""

from __future__ import annotations

import pytest
from bench_peers import _chosen

from opd_ray.errors import InputError


def test_an_unknown_row_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="there is no row '5'; take of 1, 2, 3, 4"):
        _chosen("1,5")
