"""The registry of services: what is one is said here, and everything that lists them reads it.

``python -m blockrag.services FILE…`` writes the applications into Serve configurations (``cluster/*.yaml`` and their
copy in ``k8s/base``), as `make services` does; a test holds the files equal to what it writes.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Service:
    """One Serve application: a folder of this package with a ``deployment.py`` whose ``build`` makes it."""

    name: str
    protobuf: tuple[str, ...] = ()
    """The services of ``blockrag.v1`` that it answers over gRPC."""
    route_prefix: str = ""
    """Where it answers over HTTP; empty: a path of its own name, at which it answers nothing."""

    @property
    def route(self) -> str:
        """Serve's ``route_prefix``, which every application must have."""
        return self.route_prefix or f"/{self.name}"

    @property
    def import_path(self) -> str:
        """Where Serve finds the application."""
        return f"blockrag.{self.name}.deployment:build"


SERVICES = (
    Service("encoder", ("EncoderService",)),
    Service("kv_cache", ("KvCacheService",)),
    Service("retriever", ("RetrieverService",)),
    Service("compressor", ("CompressorService",)),
    Service("decoder", ("DecoderService",)),
    Service("gateway", ("RagService", "CorpusService", "SystemService")),
    Service("http", route_prefix="/"),
)
"""All of them, in the order in which they are started."""

GRPC_SERVICER_FUNCTION = "blockrag.gateway.servicers.add_services_to_server"
"""What Serve's gRPC servers are told to import (``grpc_options.grpc_servicer_functions``)."""

_APPLICATIONS = re.compile(r"^( *)applications:\n(?:\1  .*\n)+", re.MULTILINE)
_SETTINGS_FILE = re.compile(r"settings_file: (\S+)")


def with_applications(config: str) -> str:
    """A Serve configuration's text with the registry's applications, indented as they were.

    Raises ValueError for a text that has not exactly one list of applications, with one settings file.
    """
    found = list(_APPLICATIONS.finditer(config))
    settings_files = set(_SETTINGS_FILE.findall(found[0].group())) if len(found) == 1 else set()
    if len(settings_files) != 1:
        raise ValueError("needs one list of applications whose settings_file is one and the same")
    indent, (settings_file,) = found[0].group(1), settings_files
    lines = ["applications:"]
    for service in SERVICES:
        lines += [
            f"  - name: {service.name}",
            f"    route_prefix: {service.route}",
            f"    import_path: {service.import_path}",
            "    args:",
            f"      settings_file: {settings_file}",
        ]
    written = "".join(f"{indent}{line}\n" for line in lines)
    return config[: found[0].start()] + written + config[found[0].end() :]


def main(paths: list[str]) -> int:
    """Rewrites the files. Returns the exit status."""
    for path in map(Path, paths):
        path.write_text(with_applications(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
