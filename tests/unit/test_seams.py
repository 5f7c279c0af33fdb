"""Private parts of other packages that this one reaches into: named here, so that an upgrade shows what left."""

from __future__ import annotations

import grpc
import pytest
import torch


def test_grpc_handlers_can_be_replaced() -> None:
    """``gateway/servicers.py`` wraps the parsers of a generic handler's methods."""
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
    generic = grpc.method_handlers_generic_handler("service", {"Method": handler})

    assert list(generic._method_handlers) == ["/service/Method"]
    assert handler._replace(request_deserializer=bytes.decode).request_deserializer is bytes.decode


def test_torch_has_onednn_s_linear() -> None:
    """``modeling/linear_layers.py`` calls it where the processor has bfloat16."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    product = torch.ops.mkldnn._linear_pointwise(torch.ones(2, 3), torch.ones(4, 3), None, "none", [], "")

    assert product.tolist() == [[3.0] * 4] * 2


def test_ray_tells_where_objects_are_and_replicas_hand_them_over() -> None:
    """``kv_cache/remote.py`` and ``kv_cache/shard_actor.py``."""
    from ray import ObjectRef
    from ray.experimental import get_local_object_locations
    from ray.serve.handle import DeploymentResponse

    assert callable(ObjectRef._on_ready)
    assert callable(get_local_object_locations)
    assert callable(DeploymentResponse._to_object_ref)


def test_ray_says_which_of_its_processes_have_ended() -> None:
    """``local/ray_life.py``."""
    from ray._private import ray_constants, worker
    from ray._private.node import Node

    assert hasattr(worker, "_global_node")
    assert callable(Node.dead_processes)
    assert (ray_constants.PROCESS_TYPE_GCS_SERVER, ray_constants.PROCESS_TYPE_RAYLET) == ("gcs_server", "raylet")


def test_handles_may_go_by_value_and_blocks_stay_with_a_replica() -> None:
    """``handles.py`` and ``encoder/deployment.py``."""
    from ray.serve._private.handle_options import DynamicHandleOptions, InitHandleOptions
    from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

    fields = {*InitHandleOptions.__dataclass_fields__, *DynamicHandleOptions.__dataclass_fields__}
    assert "_by_reference" in fields
    assert ConsistentHashRouter.__name__ == "ConsistentHashRouter"


def test_serve_s_grpc_servers_take_another_maker_of_handlers() -> None:
    """``gateway/servicers.py`` puts ``DiscreetHandlers`` in the place of the server's own."""
    from ray.serve._private.grpc_util import gRPCGenericServer

    server = gRPCGenericServer.__new__(gRPCGenericServer)
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
    made: list[object] = []
    server.service_handler_factory = lambda **options: made.append(options["service_method"])
    server._override_method_handler("/service/Method", handler)
    assert made == ["/service/Method"] * 4


def test_serve_s_grpc_context_and_streams() -> None:
    """Every ``deployment.py`` takes them; ``rpc`` sets their status."""
    from ray.serve.grpc_util import RayServegRPCContext, gRPCInputStream

    for name in ("set_code", "set_details", "invocation_metadata", "peer"):
        assert hasattr(RayServegRPCContext, name), name
    assert hasattr(gRPCInputStream, "is_cancelled")
