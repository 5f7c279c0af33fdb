"""The retriever as a Serve application."""

from __future__ import annotations

from ray import serve
from ray.serve import Application
from ray.serve.grpc_util import RayServegRPCContext

from blockrag.access import Access, Caller, show_own
from blockrag.grpc_status import rpc
from blockrag.limits import HEALTH_CHECK_PERIOD_S, HEALTH_CHECK_TIMEOUT_S
from blockrag.retriever.opening import check_settings, open_service
from blockrag.settings import Settings, load_application_settings
from blockrag.telemetry import setup_telemetry
from blockrag.v1 import retriever_pb2 as pb


class Retriever:
    """Serves ``blockrag.v1.RetrieverService``."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]
        import torch  # with the replica alone, not with who builds the application

        setup_telemetry("retriever", settings)
        self.access = Access(settings)
        torch.set_num_threads(settings.retriever.threads)
        self._service = open_service(settings, self.access.limits)
        await self._service.start()

    @rpc
    async def Search(
        self, request: pb.SearchRequest, grpc_context: RayServegRPCContext | None = None
    ) -> pb.SearchResponse:
        """Finds the passages nearest to a query."""
        return await self._service.Search(request)

    @rpc
    async def AddPassages(
        self, request: pb.AddPassagesRequest, grpc_context: RayServegRPCContext | None = None
    ) -> pb.AddPassagesResponse:
        """Stages passages of a version that is not visible yet."""
        return await self._service.AddPassages(request)

    @rpc
    async def CommitDocument(
        self, request: pb.CommitDocumentRequest, grpc_context: RayServegRPCContext | None = None
    ) -> pb.CommitDocumentResponse:
        """Makes a staged version visible and removes the older one."""
        return await self._service.CommitDocument(request)

    @rpc
    async def RemoveDocument(
        self, request: pb.RemoveDocumentRequest, grpc_context: RayServegRPCContext | None = None
    ) -> pb.RemoveDocumentResponse:
        """Removes a document."""
        return await self._service.RemoveDocument(request)

    @rpc
    async def RemoveCollection(
        self, request: pb.RemoveCollectionRequest, grpc_context: RayServegRPCContext | None = None
    ) -> pb.RemoveCollectionResponse:
        """Removes a collection."""
        return await self._service.RemoveCollection(request)

    @rpc
    async def ScanDocuments(
        self, request: pb.ScanDocumentsRequest, grpc_context: RayServegRPCContext | None = None
    ) -> pb.ScanDocumentsResponse:
        """Pages through documents."""
        return await self._service.ScanDocuments(request)

    @rpc
    async def ScanPassages(
        self, request: pb.ScanPassagesRequest, grpc_context: RayServegRPCContext | None = None
    ) -> pb.ScanPassagesResponse:
        """Gives documents' passages."""
        return await self._service.ScanPassages(request)

    @rpc
    async def ScanCollections(
        self, request: pb.ScanCollectionsRequest, grpc_context: RayServegRPCContext | None = None
    ) -> pb.ScanCollectionsResponse:
        """Lists a tenant's collections."""
        return await self._service.ScanCollections(request)

    @rpc
    async def GetRetrieverStatus(
        self,
        request: pb.GetRetrieverStatusRequest,
        grpc_context: RayServegRPCContext | None = None,
        *,
        caller: Caller,
    ) -> pb.GetRetrieverStatusResponse:
        """Describes the index, as far as the caller may see."""
        status = await self._service.GetRetrieverStatus(request)
        show_own(status, caller)
        return status


def build(args: dict[str, str]) -> Application:
    """The application, as named in a Serve configuration file. Raises ``SettingsError``."""
    settings = load_application_settings(args)
    check_settings(settings)
    return serve.deployment(
        num_replicas=settings.retriever.replicas,
        max_ongoing_requests=256,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        ray_actor_options={"num_cpus": 0.2},
    )(Retriever).bind(settings)
