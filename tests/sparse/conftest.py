"""Fixtures for models that several processes train."""

import socket

import pytest
from torch import distributed


@pytest.fixture
def alone():
    """Makes this process a group of one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()
