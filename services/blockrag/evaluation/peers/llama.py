"""llama.cpp as a peer: where it is, and files of the types that it multiplies."""

from __future__ import annotations

import shutil
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, Keys
from gguf.quants import dequantize, quantize

INSTALL = "not installed: npm install --ignore-scripts node-llama-cpp, then --llama node_modules/node-llama-cpp"
_SCRIPT = Path(__file__).with_name("llama.mjs")


class MissingPeerError(Exception):
    """A peer that cannot be had here; the message says why."""


def llama_command(package: Path | None, gguf: Path, threads: int) -> list[str]:
    """The command of llama.cpp's process. ``package``: the folder of node-llama-cpp. Raises MissingPeerError."""
    node = shutil.which("node")
    if package is None or node is None:
        raise MissingPeerError(INSTALL if node else f"{INSTALL}; it needs Node.js")
    if not (package / "dist" / "index.js").is_file():
        raise MissingPeerError(f"{package} holds no node-llama-cpp; {INSTALL}")
    return [node, str(_SCRIPT), str(package), str(gguf), str(threads)]


def requantised(source: Path, kind: GGMLQuantizationType, target: Path) -> Path:
    """Write the model of ``source`` to ``target`` with its matrices in another type; what is no matrix stays."""
    reader = GGUFReader(source)
    architecture = str(reader.fields[Keys.General.ARCHITECTURE].contents())
    writer = GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name == Keys.General.ARCHITECTURE or field.name.startswith("GGUF."):
            continue
        sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        if len(tensor.shape) < 2:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        else:
            wide = dequantize(tensor.data, tensor.tensor_type)
            writer.add_tensor(tensor.name, quantize(wide, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def type_of(source: Path) -> str:
    """The type that most matrices of a GGUF file are in, like "Q4_1"."""
    kinds = [tensor.tensor_type for tensor in GGUFReader(source).tensors if len(tensor.shape) > 1]
    return max(set(kinds), key=kinds.count).name
