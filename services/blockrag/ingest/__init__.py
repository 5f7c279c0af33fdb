"""Documents become passages: parsing, splitting, versions. Pure: no Ray, no gRPC, no index."""

from blockrag.ingest.pipeline import PreparedDocument, SourceDocument, prepare_documents
from blockrag.ingest.splitting import PassageSplitter

__all__ = ["PassageSplitter", "PreparedDocument", "SourceDocument", "prepare_documents"]
