"""Whether a TIFF file still has all that its directory points to.

GDAL reads a file whose tags were cut off (band descriptions, georeference, nodata value lie behind
the pixels) as if it had none. This walks the first directory of a classic or Big TIFF and tells
whether the values of its tags lie inside the file; missing pixels GDAL reports by itself.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

# Bytes a value takes, by TIFF field type.
_FIELD_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8,
                13: 4, 16: 8, 17: 8, 18: 8}  # fmt: skip
_CLASSIC, _BIG = 42, 43


def missing_bytes(path: Path) -> int:
    """Bytes that the tags of a TIFF need behind its end: 0 for a whole file.

    Files that are no TIFF, or whose directory itself is cut, are left to GDAL and count as whole.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        return max(0, _end_of_tags(stream, size) - size)


def _end_of_tags(stream: BinaryIO, size: int) -> int:
    """Offset behind the last value that a tag of the first directory points to."""
    head = stream.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 8:
        return 0
    (version,) = struct.unpack_from(order + "H", head, 2)
    if version == _CLASSIC:
        (start,) = struct.unpack_from(order + "I", head, 4)
        count_format, entry_format, inline = order + "H", order + "HHII", 4
    elif version == _BIG and len(head) == 16:
        (start,) = struct.unpack_from(order + "Q", head, 8)
        count_format, entry_format, inline = order + "Q", order + "HHQQ", 8
    else:
        return 0
    stream.seek(start)
    counted = stream.read(struct.calcsize(count_format))
    if len(counted) < struct.calcsize(count_format):
        return 0
    (entries,) = struct.unpack(count_format, counted)
    width = struct.calcsize(entry_format)
    directory = stream.read(min(entries * width, size))
    end = 0
    for place in range(0, len(directory) - width + 1, width):
        _, field, values, offset = struct.unpack_from(entry_format, directory, place)
        length = _FIELD_BYTES.get(field, 0) * values
        if length > inline:
            end = max(end, offset + length)
    return end
