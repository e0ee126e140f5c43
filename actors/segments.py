"""The log of the replay store: numbered segment files of checksummed frames, and how they are read again after a crash.

A frame is a header of 20 bytes (magic, kind, payload length, CRC32 of the payload, CRC32 of the header) and its payload.
The header's checksum is seeded with the segment's random nonce and the frame's own offset, so that no frame is valid in
another place or file. Records are Arrow IPC record batches, changes of state JSON; see `store_state`.

A tear and damage look alike where a frame does not check: DURABLE frames tell them apart. One is written after every
fsync and states how many bytes of the file that fsync had made safe. A bad frame below the highest such statement that
can be found in the file, be it behind the bad frame, is damage: StoreDamaged names it and nothing is touched. A bad
frame above it was never acknowledged: the file is cut there. A segment that has a successor must end with END.

Beside the segments lies `0.rolled`, the commit of the last roll into Parquet (store_tables.py): replaced by an atomic
rename, it states the last segment rolled and which Parquet files count.
"""

from __future__ import annotations

import json
import os
import secrets
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from raygent.records import SCHEMAS

SHARD = 0  # the store's only shard today: all of a rollout lives in one, and files carry its number in their names
HEADER, DURABLE, END, STATE = 1, 2, 3, 4
RECORDS = {"calls": 5, "spans": 6, "rewards": 7}
KINDS = {HEADER: "header", DURABLE: "durable", END: "end", STATE: "state"} | {kind: t for t, kind in RECORDS.items()}

CLOSED = "closed"  # why a segment takes nothing more: it was let go of, nothing is wrong with it

_MAGIC = b"RGF1"
_FRAME = struct.Struct("<4sIIII")
_OFFSET = struct.Struct("<Q")


class StoreDamaged(Exception):
    """Bytes of the store that were safe on disk are not what was written: the file, the offset in it, and what is wrong."""

    def __init__(self, file: str, offset: int, what: str) -> None:
        super().__init__(file, offset, what)
        self.file, self.offset, self.what = file, offset, what

    def __str__(self) -> str:
        return f"{self.file}: damaged at byte {self.offset}: {self.what}; restore this file from a copy"


class Rolled(NamedTuple):
    """The commit of a roll: up to `segment` (0: none) the rows are in Parquet, in `files` ("TABLE/NAME.parquet") alone."""

    segment: int
    files: frozenset[str]


class Frame(NamedTuple):
    offset: int
    kind: int
    payload: pa.Buffer
    end: int  # offset of the byte after it


@dataclass
class Contents:
    """What a segment file holds: its frames up to `end`; `torn` bytes after that were never acknowledged."""

    path: Path
    number: int
    nonce: bytes
    frames: list[Frame]
    end: int
    torn: int
    ended: bool  # by END: closed for good
    durable: int  # bytes stated to be safe by the highest DURABLE frame


def _header(kind: int, payload_size: int, payload_crc: int, nonce: bytes, offset: int) -> bytes:
    head = _FRAME.pack(_MAGIC, kind, payload_size, payload_crc, 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(head, zlib.crc32(nonce + _OFFSET.pack(offset))))


def _pack(kind: int, payload: bytes | pa.Buffer, nonce: bytes, offset: int) -> list[bytes | pa.Buffer]:
    return [_header(kind, len(payload), zlib.crc32(payload), nonce, offset), payload]


def _frame_at(data: pa.Buffer, view: memoryview, offset: int, nonce: bytes) -> Frame | str:
    """The frame at `offset`, or what is wrong with it."""
    start = offset + _FRAME.size
    if start > len(view):
        return "the file ends inside a frame's header"
    _, kind, size, payload_crc, _ = _FRAME.unpack_from(view, offset)
    if _header(kind, size, payload_crc, nonce, offset) != view[offset:start]:
        return "a frame's header does not match its checksum"
    if start + size > len(view):
        return f"the file ends inside a {KINDS.get(kind, kind)} frame of {size} bytes"
    if zlib.crc32(view[start : start + size]) != payload_crc:
        return f"the {size} bytes of a {KINDS.get(kind, kind)} frame do not match their checksum"
    return Frame(offset, kind, data.slice(start, size), start + size)


def _stated(frame: Frame) -> int:
    """The number of bytes a DURABLE frame says are safe."""
    return int(_OFFSET.unpack(frame.payload.to_pybytes())[0])


def read_segment(path: Path) -> Contents:
    """Every good frame of the file. Raises StoreDamaged where bytes that had been safe are not what was written."""
    raw = path.read_bytes()
    data, view = pa.py_buffer(raw), memoryview(raw)
    first = _frame_at(data, view, 0, b"")
    if isinstance(first, str) or first.kind != HEADER:
        raise StoreDamaged(str(path), 0, first if isinstance(first, str) else "the first frame is no segment header")
    header = json.loads(first.payload.to_pybytes())
    if header["schemas"] != _schemas():
        raise StoreDamaged(
            str(path), 0, "the segment was written with other schemas than this raygent's records.py has"
        )
    nonce = bytes.fromhex(header["nonce"])
    frames, offset, durable, wrong = [], first.end, first.end, ""
    while offset < len(view):
        frame = _frame_at(data, view, offset, nonce)
        if isinstance(frame, str):
            wrong = frame
            break
        if frame.kind == DURABLE:
            durable = max(durable, _stated(frame))
        frames.append(frame)
        offset = frame.end
    if wrong:
        durable = max(durable, _durable_beyond(raw, data, view, offset, nonce))
    if durable > offset:
        raise StoreDamaged(
            str(path), offset, wrong or f"the file ends here, though {durable} bytes of it had been safe"
        )
    ended = bool(frames) and frames[-1].kind == END
    return Contents(path, header["segment"], nonce, frames, offset, len(view) - offset, ended, durable)


def _durable_beyond(raw: bytes, data: pa.Buffer, view: memoryview, offset: int, nonce: bytes) -> int:
    """The most bytes that any whole DURABLE frame after `offset` states to be safe."""
    best = 0
    found = raw.find(_MAGIC, offset + 1)
    while found >= 0:
        frame = _frame_at(data, view, found, nonce)
        if isinstance(frame, Frame) and frame.kind == DURABLE:
            best = max(best, _stated(frame))
        found = raw.find(_MAGIC, found + 1)
    return best


def _schemas() -> dict[str, str]:
    return {table: SCHEMAS[table].to_string() for table in RECORDS}


def segment_path(folder: Path, number: int) -> Path:
    return folder / f"{SHARD}-{number:06d}.log"


def read_rolled(folder: Path) -> Rolled:
    """The last commit. Raises StoreDamaged."""
    path = folder / f"{SHARD}.rolled"
    if not path.exists():
        return Rolled(0, frozenset())
    text, _, crc = path.read_bytes().rpartition(b" ")
    if crc != b"%08x\n" % zlib.crc32(text):
        raise StoreDamaged(str(path), 0, "its text does not match its checksum")
    commit = json.loads(text)
    return Rolled(commit["segment"], frozenset(commit["files"]))


def write_rolled(folder: Path, rolled: Rolled) -> None:
    """Commit a roll: from here on segments up to `rolled.segment` count for nothing, and its files for all."""
    text = json.dumps({"segment": rolled.segment, "files": sorted(rolled.files)}).encode()
    write_atomically(folder / f"{SHARD}.rolled", [text, b" %08x\n" % zlib.crc32(text)])


def read_log(folder: Path) -> list[Contents]:
    """The segments that are not rolled yet, oldest first (none for a new store). Raises StoreDamaged."""
    rolled = read_rolled(folder).segment
    numbers = sorted(int(path.stem.partition("-")[2]) for path in folder.glob(f"{SHARD}-*.log"))
    live = [number for number in numbers if number > rolled]
    for expected in range(rolled + 1, (live[-1] if live else rolled + (rolled > 0)) + 1):
        if expected not in live:
            raise StoreDamaged(str(segment_path(folder, expected)), 0, "the segment is missing")
    contents = [read_segment(segment_path(folder, number)) for number in live]
    for found, number in zip(contents, live, strict=True):
        if found.number != number:
            raise StoreDamaged(str(found.path), 0, f"this file holds segment {found.number}")
    for found in contents[:-1]:
        if not found.ended or found.torn:
            raise StoreDamaged(str(found.path), found.end, "a closed segment lacks its end")
    return contents


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: Iterable[bytes | pa.Buffer]) -> None:
    """`path` holds its old content or all of the new, and the new for good once this returns."""
    publish(write_beside(path, content), path)


def write_beside(path: Path, content: Iterable[bytes | pa.Buffer]) -> Path:
    """A temporary file next to `path` that holds `content`, safe on disk."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.writelines(content)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def publish(temporary: Path, path: Path) -> None:
    temporary.rename(path)
    sync_folder(path.parent)


class Segment:
    """The segment being written. `size`: bytes in the file; `head`: of these, what it began with; `written`: end of its
    last frame that is no DURABLE; `durable`: bytes known to be safe. `broken` says why it takes nothing more."""

    def __init__(self, path: Path, number: int, nonce: bytes, size: int) -> None:
        self.path, self.number, self.nonce = path, number, nonce
        self.size = self.head = self.written = self.durable = size
        self.broken = ""
        self.fd = os.open(path, os.O_WRONLY | os.O_APPEND)

    @classmethod
    def create(
        cls, folder: Path, number: int, head: list[tuple[int, bytes | pa.Buffer]], before: Segment | None = None
    ) -> Segment:
        """A new segment that begins with the frames `head` (kind, payload), safe on disk before this returns.

        `before`, the segment it follows, is ended when all but the rename is done: on a full disk it stays as it was.
        """
        nonce = secrets.token_bytes(8)
        about = {"format": 1, "shard": SHARD, "segment": number, "nonce": nonce.hex(), "schemas": _schemas()}
        content = _pack(HEADER, json.dumps(about).encode(), b"", 0)
        size = sum(map(len, content))
        for kind, payload in head:
            frame = _pack(kind, payload, nonce, size)
            content += frame
            size += sum(map(len, frame))
        content += _pack(DURABLE, _OFFSET.pack(size), nonce, size)
        path = segment_path(folder, number)
        temporary = write_beside(path, content)
        if before:
            before.end()
        publish(temporary, path)
        return cls(path, number, nonce, path.stat().st_size)

    @classmethod
    def reopen(cls, contents: Contents) -> Segment:
        """Go on writing a segment that was read: the torn tail is cut off, the rest made safe.

        What no fsync is known to have made safe is written again: after one that failed, the system may hold these bytes
        for clean, and lose them in spite of the next fsync.
        """
        with contents.path.open("r+b") as file:
            file.truncate(contents.end)
            file.seek(contents.durable)
            tail = file.read()
            file.seek(contents.durable)
            file.write(tail)
        segment = cls(contents.path, contents.number, contents.nonce, contents.end)
        segment.sync()
        segment.state_durable(contents.end)
        return segment

    def append(self, kind: int, payload: bytes | pa.Buffer) -> None:
        """Write one frame at once: it outlives the process, and a power cut after the next sync().

        Raises OSError (disk full), and then the file is as it was before, or takes nothing more.
        """
        self._check()
        parts = _pack(kind, payload, self.nonce, self.size)
        wanted = sum(len(part) for part in parts)
        try:
            done = os.writev(self.fd, parts)
            while done < wanted:
                done += os.write(self.fd, b"".join(parts)[done:])
        except OSError:
            try:
                os.ftruncate(self.fd, self.size)
            except OSError:
                self.broken = self.broken or "half a frame could not be taken back"
            raise
        self.size += wanted
        if kind != DURABLE:
            self.written = self.size

    def sync(self) -> None:
        """fsync; may run in a thread beside append(). Afterwards call state_durable() with the size from before.

        A failed fsync may have lost pages that a second one would call clean: the segment takes nothing more.
        """
        self._check()
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            self.broken = f"fsync failed ({error})"
            raise

    def state_durable(self, size: int) -> None:
        """Note in the file that its first `size` bytes are safe."""
        self.append(DURABLE, _OFFSET.pack(size))
        self.durable = size

    def end(self) -> None:
        """Close the segment for good, safe on disk."""
        self.sync()
        self.state_durable(self.size)
        self.append(END, b"")
        self.sync()
        self.durable = self.size
        self.close()
        self.broken = "ended"

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd, self.broken = -1, CLOSED

    def _check(self) -> None:
        if self.broken:
            raise OSError(f"{self.path}: {self.broken}")
