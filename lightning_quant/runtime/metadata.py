"""What a file says of itself, read without the file's runtime, and without running anything that is in it."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO
from xml.etree import ElementTree

from lightning_quant.errors import ArtifactError

#: What is written into every file. Files of a later version are refused, earlier ones are read.
FORMAT_VERSION = 1
METADATA_FILE = "lightning_quant.json"
METADATA_KEY = "lightning_quant"


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What a file of this package says of itself: format, versions, config, inputs, outputs, metrics.

    Args:
        path: A file of any format. Its suffix says how it is read; see :func:`lightning_quant.load`.

    Returns:
        JSON values; docs/deploy.md lists them.

    Raises:
        ArtifactError: There is no such file, it is damaged, this package did not write it, or a later version did.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file.")
    kind, read = _READERS.get(path.suffix, ("TorchScript", _of_torchscript))
    try:
        text = read(path)
    except _DAMAGED as error:
        raise ArtifactError(f"{path}: cannot be read as {kind}, it is damaged or foreign: {error}") from error
    if not text:
        raise ArtifactError(
            f"{path}: not written by lightning_quant (it has no metadata). Load it with its own runtime."
        )
    try:
        metadata: dict[str, Any] = json.loads(text)
        version = metadata["format_version"]
        is_later = version > FORMAT_VERSION
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: its metadata is damaged: {type(error).__name__}: {error}") from error
    if is_later:
        raise ArtifactError(
            f"{path}: format version {version}, and this lightning_quant reads up to {FORMAT_VERSION}. "
            "Update it: pip install -U lightning-quant"
        )
    return metadata


def files_of(path: Path) -> tuple[Path, ...]:
    """An artifact's files: those of OpenVINO have their weights in a second one."""
    return (path, path.with_suffix(".bin")) if path.suffix == ".xml" else (path,)


def is_aoti(path: Path) -> bool:
    """Whether an archive is a package of AOTInductor, and not one of ``torch.export``.

    Raises:
        zipfile.BadZipFile: It is none of both.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    # of an archive that was cut off, zipfile finds one that was stored in it
    if not any(name.endswith("archive_format") for name in names):
        raise zipfile.BadZipFile("it has no archive_format")
    return any("/aotinductor/" in name for name in names)


#: What the readers below raise for a file that is not what its suffix says. zipfile has no error of its own for members
#: with flags or compressions that it does not know.
_DAMAGED = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError, SyntaxError)


def _of_torchscript(path: Path) -> bytes | None:
    return _member(path, f"extra/{METADATA_FILE}")


def _of_pt2(path: Path) -> bytes | str | None:
    if not is_aoti(path):
        return _member(path, f"extra/{METADATA_FILE}")
    # torch/_inductor/codecache.py writes the setting ``aot_inductor.metadata`` beside each compiled part
    beside = _member(path, "_metadata.json")
    return json.loads(beside).get(METADATA_KEY) if beside else None


def _member(path: Path, end: str) -> bytes | None:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(end)]
        return archive.read(names[0]) if names else None


def _of_openvino(path: Path) -> str | None:
    root = ElementTree.parse(path).getroot()
    if root.tag != "net":
        raise ValueError(f"it is XML of another kind, <{root.tag}>")
    entry = root.find(f"rt_info/{METADATA_KEY}")
    return None if entry is None else entry.get("value")


#: Numbers of the fields of onnx.proto: ``ModelProto.graph`` and ``.metadata_props``, ``StringStringEntryProto``.
_GRAPH, _PROPS, _KEY, _VALUE = 7, 14, 1, 2


def _of_onnx(path: Path) -> bytes | None:
    """The entry of ``metadata_props``: a walk over the outermost fields, which skips the graph and its weights."""
    with path.open("rb") as file:
        fields = _fields(file, path.stat().st_size, (_PROPS,))
    if _GRAPH not in dict(fields):
        raise ValueError("it has no graph")
    entries = [dict(_fields(io.BytesIO(x), len(x), (_KEY, _VALUE))) for number, x in fields if number == _PROPS]
    return next((entry.get(_VALUE) for entry in entries if entry.get(_KEY) == METADATA_KEY.encode()), None)


def _fields(file: BinaryIO, end: int, wanted: tuple[int, ...]) -> list[tuple[int, bytes]]:
    """The number of each field of a protobuf message that ends at ``end``, and the content of those that are wanted.

    https://protobuf.dev/programming-guides/encoding: a tag ``number << 3 | kind``, and what the kind says.

    Raises:
        ValueError: This is no message.
    """
    fields = []
    while file.tell() < end:
        tag = _varint(file)
        number, kind = tag >> 3, tag & 7
        length = 0
        if kind == 0:
            _varint(file)
        elif kind == 2:
            length = _varint(file)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"it has a field of kind {kind}")
        start = file.tell()
        if not number or start + length > end:
            raise ValueError("it has a field that reaches beyond its end")
        fields.append((number, file.read(length) if number in wanted else b""))
        file.seek(start + length)
    return fields


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise ValueError("it ends within a number")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("a number is too long")


#: Suffix -> what such a file is, and its reader. All others are TorchScript.
_READERS: dict[str, tuple[str, Callable[[Path], str | bytes | None]]] = {
    ".onnx": ("ONNX", _of_onnx),
    ".pt2": ("a torch.export archive", _of_pt2),
    ".xml": ("OpenVINO IR", _of_openvino),
}
