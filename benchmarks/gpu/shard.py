"""A pytest plugin: of the tests that are selected, the part `GPU_SHARD` = "i/n", in one piece so that neighbours, which use
the same kernels, are compiled for once.
"""

from __future__ import annotations

import os

import pytest

VARIABLE = "GPU_SHARD"


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    number, count = map(int, os.environ[VARIABLE].split("/"))
    first, last = (len(items) * edge // count for edge in (number, number + 1))
    config.hook.pytest_deselected(items=items[:first] + items[last:])
    items[:] = items[first:last]
