"""The protocol is documented, follows buf's STANDARD rules, and its committed stubs are up to date."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)

REPOSITORY = Path(__file__).resolve().parents[2]
PROTOS = REPOSITORY / "protos"
STUBS = REPOSITORY / "services" / "blockrag" / "v1"
SOURCES = sorted(PROTOS.glob("**/*.proto"))

LOWER_SNAKE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
UPPER_SNAKE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")
PASCAL = re.compile(r"([A-Z][a-z0-9]+|[A-Z](?=[A-Z]))+[A-Z]?")

# Field numbers within descriptor.proto, of which paths in the source information are made.
MESSAGES, ENUMS, SERVICES = 4, 5, 6
FIELDS, NESTED, NESTED_ENUMS, ONEOFS, VALUES, METHODS = 2, 3, 4, 8, 2, 2


def protoc(*arguments: str) -> str:
    """Runs the compiler over all protocol files; returns its warnings."""
    includes = [f"-I{PROTOS}", f"-I{resources.files('grpc_tools') / '_proto'}"]
    command = [sys.executable, "-m", "grpc_tools.protoc", *includes, *arguments, *map(str, SOURCES)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[FileDescriptorProto]:
    """Our files with their comments; the compiler has nothing to warn of."""
    out = tmp_path_factory.mktemp("protos") / "descriptors.bin"
    warnings = protoc("--include_source_info", f"--descriptor_set_out={out}")
    assert warnings == "", "an unused import, for one"
    return list(FileDescriptorSet.FromString(out.read_bytes()).file)


def declarations(file: FileDescriptorProto) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Everything that must have a comment: its name and its path in the source information."""
    for index, service in enumerate(file.service):
        yield service.name, (SERVICES, index)
        for number, method in enumerate(service.method):
            yield f"{service.name}.{method.name}", (SERVICES, index, METHODS, number)
    for index, message in enumerate(file.message_type):
        yield from _message_declarations(message, message.name, (MESSAGES, index))
    for index, enum in enumerate(file.enum_type):
        yield from _enum_declarations(enum, enum.name, (ENUMS, index))


def _message_declarations(
    message: DescriptorProto, name: str, path: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield name, path
    for index, field in enumerate(message.field):
        yield f"{name}.{field.name}", (*path, FIELDS, index)
    for index, nested in enumerate(message.nested_type):
        if not nested.options.map_entry:
            yield from _message_declarations(nested, f"{name}.{nested.name}", (*path, NESTED, index))
    for index, enum in enumerate(message.enum_type):
        yield from _enum_declarations(enum, f"{name}.{enum.name}", (*path, NESTED_ENUMS, index))
    for index, oneof in enumerate(message.oneof_decl):
        # An optional field is a oneof of the compiler's own.
        if not any(field.proto3_optional and field.oneof_index == index for field in message.field):
            yield f"{name}.{oneof.name}", (*path, ONEOFS, index)


def _enum_declarations(
    enum: EnumDescriptorProto, name: str, path: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield name, path
    for index, value in enumerate(enum.value):
        yield f"{name}.{value.name}", (*path, VALUES, index)


def messages(files: list[FileDescriptorProto]) -> Iterator[DescriptorProto]:
    pending = list(itertools.chain.from_iterable(file.message_type for file in files))
    while pending:
        message = pending.pop()
        if not message.options.map_entry:
            pending += message.nested_type
            yield message


def enums(files: list[FileDescriptorProto]) -> Iterator[EnumDescriptorProto]:
    yield from itertools.chain.from_iterable(file.enum_type for file in files)
    yield from itertools.chain.from_iterable(message.enum_type for message in messages(files))


class TestComments:
    def test_every_declaration_has_one(self, files: list[FileDescriptorProto]) -> None:
        missing = []
        for file in files:
            commented = {
                tuple(location.path)
                for location in file.source_code_info.location
                if (location.leading_comments or location.trailing_comments).strip()
            }
            missing += [name for name, path in declarations(file) if path not in commented]

        assert missing == []

    def test_comments_begin_with_the_name_of_service_rpc_message_and_enum(
        self, files: list[FileDescriptorProto]
    ) -> None:
        for file in files:
            comments = {
                tuple(location.path): location.leading_comments.strip() for location in file.source_code_info.location
            }
            tops = [(name, path) for name, path in declarations(file) if len(path) == 2]
            tops += [
                (name.split(".")[1], path) for name, path in declarations(file) if path[0] == SERVICES and path[2:]
            ]
            for name, path in tops:
                assert comments[path].split()[0] == name

    def test_every_file_says_what_it_is_for(self) -> None:
        assert all(source.read_text(encoding="utf-8").startswith("// ") for source in SOURCES)


class TestStandardRules:
    def test_packages_have_a_version_and_match_their_folder(self, files: list[FileDescriptorProto]) -> None:
        for file in files:
            folder, _, name = file.name.rpartition("/")
            assert file.package == folder.replace("/", ".")
            assert re.search(r"\.v\d+$", file.package)
            assert LOWER_SNAKE.fullmatch(name.removesuffix(".proto"))
            assert file.syntax == "proto3"

    def test_names(self, files: list[FileDescriptorProto]) -> None:
        services = [service for file in files for service in file.service]
        pascal = [service.name for service in services]
        pascal += [method.name for service in services for method in service.method]
        pascal += [message.name for message in messages(files)] + [enum.name for enum in enums(files)]
        snake = [field.name for message in messages(files) for field in message.field]
        snake += [oneof.name.removeprefix("_") for message in messages(files) for oneof in message.oneof_decl]

        assert [name for name in pascal if not PASCAL.fullmatch(name)] == []
        assert [name for name in snake if not LOWER_SNAKE.fullmatch(name)] == []

    def test_services_end_in_service(self, files: list[FileDescriptorProto]) -> None:
        names = [service.name for file in files for service in file.service]

        assert names
        assert all(name.endswith("Service") for name in names)

    def test_each_rpc_has_its_own_request_and_response(self, files: list[FileDescriptorProto]) -> None:
        used: Counter[str] = Counter()
        for file in files:
            for method in (method for service in file.service for method in service.method):
                assert method.input_type == f".{file.package}.{method.name}Request"
                assert method.output_type == f".{file.package}.{method.name}Response"
                used.update([method.input_type, method.output_type])

        assert [name for name, count in used.items() if count > 1] == []

    def test_enum_values_have_the_enums_prefix_and_an_unspecified_zero(self, files: list[FileDescriptorProto]) -> None:
        found = list(enums(files))

        assert found
        for enum in found:
            prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper()
            assert (enum.value[0].number, enum.value[0].name) == (0, f"{prefix}_UNSPECIFIED")
            for value in enum.value:
                assert value.name.startswith(f"{prefix}_")
                assert UPPER_SNAKE.fullmatch(value.name)
            assert not enum.options.allow_alias


class TestStubs:
    def test_committed_stubs_are_what_the_compiler_writes(self, tmp_path: Path) -> None:
        protoc(f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}")

        written = {path.name: path.read_bytes() for path in (tmp_path / "blockrag" / "v1").iterdir()}
        committed = {
            path.name: path.read_bytes()
            for path in STUBS.iterdir()
            if path.suffix in {".py", ".pyi"} and path.name != "__init__.py"
        }

        assert committed.keys() == written.keys()
        assert [name for name in written if written[name] != committed[name]] == [], "run: make stubs"
