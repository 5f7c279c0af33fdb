"""Two systems on one machine get ports of their own."""

from __future__ import annotations

import socket

from blockrag.local import ports


def test_a_block_with_a_listener_in_it_is_not_taken() -> None:
    taken = []
    first = ports.free_block()
    for offset in (0, ports.BLOCK // 2, ports.BLOCK - 1):
        listener = socket.create_server(("127.0.0.1", first + offset), reuse_port=True)
        taken.append(listener)
        assert not ports._is_free(first + offset)
    for listener in taken:
        listener.close()
    assert ports._is_free(first)


def test_ranges_do_not_overlap() -> None:
    environment = ports.replica_port_environment()
    low, high, grpc_low, grpc_high = (int(value) for value in environment.values())
    assert high - low == grpc_high - grpc_low == ports.BLOCK
    assert high <= grpc_low or grpc_high <= low
