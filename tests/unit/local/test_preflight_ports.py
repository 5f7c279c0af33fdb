"""Two systems on one machine get ports of their own."""

from __future__ import annotations

import socket

from blockrag.local import preflight


def test_a_block_with_a_listener_in_it_is_not_taken() -> None:
    taken = []
    first = preflight.free_block()
    for offset in (0, preflight.BLOCK // 2, preflight.BLOCK - 1):
        listener = socket.create_server(("127.0.0.1", first + offset), reuse_port=True)
        taken.append(listener)
        assert not preflight._is_free(first + offset)
    for listener in taken:
        listener.close()
    assert preflight._is_free(first)


def test_ranges_and_ports_do_not_overlap() -> None:
    ports_of = {name.removeprefix("RAY_SERVE_"): int(port) for name, port in preflight.serve_port_environment().items()}
    taken: set[int] = set()
    for protocol in ("HTTP", "GRPC"):
        # Serve's upper end is exclusive.
        replicas = range(
            ports_of[f"DIRECT_INGRESS_MIN_{protocol}_PORT"], ports_of[f"DIRECT_INGRESS_MAX_{protocol}_PORT"]
        )
        fallback = ports_of[f"FALLBACK_PROXY_{protocol}_PORT"]
        assert len(replicas) > 50
        assert taken.isdisjoint({*replicas, fallback})
        assert fallback not in replicas
        taken |= {*replicas, fallback}
