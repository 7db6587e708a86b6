"""Row 10: files of tensors made to do harm, read in a process of their own.

The first samples are the pickles of `gadgets`, then tensors that are not dense, huge, or of sizes
that are lies; the rest are mutations of a sound safetensors file and of both kinds of `torch.save`.
A file must be read or refused with a `CheckpointError` of one line. The reading process must live
on, call nothing that starts a program, writes, or connects, and need at most twice the file's bytes
and 200 MB.
"""

from __future__ import annotations

import encodings.cp437  # noqa: F401  zipfile's, for names that are not UTF-8
import multiprocessing
import pickle
import random
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from spectralx.checkpoints import CheckpointError, inspect
from spectralx.checkpoints.reading import read_file
from tests.harden.gadgets import CALLS, gadget
from tests.harden.record import Outcome
from tests.spectralx.test_tensor_files import forged, saved, state

ALLOWANCE = 200 << 20
BATCH = 50  # files a message to the reading process
HUGE = 1 << 40
# Of Python's audit events: what reading tensors never does.
FORBIDDEN = (
    "os.", "subprocess.", "socket.", "shutil.", "ctypes.dlopen", "ftplib.", "urllib.",
    "webbrowser.", "code.__new__", "exec", "tempfile.", "pty.",
)  # fmt: skip
HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")

_events: list[str] = []
_watching = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching or event in HARMLESS:
        return
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writes or event.startswith(FORBIDDEN):
        _events.append(f"{event} {arguments!r}"[:200])


def start() -> None:
    """Once in the reading process: everything is imported and watched from here on."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for file in sound_files(Path(folder)):
            read_file(file)
            inspect(file)
    sys.addaudithook(_audit)


def peak() -> int:
    """Bytes this process had in memory at most since `reset_peak`."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    )
    return int(line.split()[1]) << 10


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def read_all(files: list[tuple[int, str]]) -> list[tuple[int, str | None, bool]]:
    """(sample, what is wrong, whether the file was refused) of each file."""
    global _watching
    found = []
    for number, name in files:
        file = Path(name)
        reset_peak()
        before, refused, wrong = peak(), False, None
        _events.clear()
        _watching = True
        try:
            for read in (read_file, inspect):
                try:
                    read(file)
                except CheckpointError as error:
                    refused = True
                    if "\n" in str(error) or str(file) not in str(error):
                        wrong = f"an error that is not one line with the file: {str(error)[:200]!r}"
        except Exception as error:
            wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        finally:
            _watching = False
        used = peak() - before
        if _events:
            wrong = f"reading does {_events[0]}"
        if used > 2 * file.stat().st_size + ALLOWANCE:
            wrong = f"{used >> 20} MB for a file of {file.stat().st_size} bytes"
        found.append((number, wrong, refused))
    return found


def sound_files(folder: Path) -> list[Path]:
    """safetensors, the zip of torch.save, and what it wrote before."""
    plain = {name: value.detach().clone().contiguous() for name, value in state().items()}
    save_file(plain, folder / "sound.safetensors")
    value = {"model": state(), "epoch": 3, "args": {"lr": 1e-4, "names": ["a", "b"]}}
    return [
        folder / "sound.safetensors",
        saved(folder / "sound.pth", value),
        saved(folder / "old.pth", value, False),
    ]


def safetensors_of(path: Path, header: bytes, body: bytes = b"\0" * 16) -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)
    return path


def _entry(shape: str, offsets: str, dtype: str = "F32") -> bytes:
    text = f'{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}'
    return text.encode()


def _zip_of(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    return path


def _not_dense(made: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], Path]:
    return lambda path: saved(path, {"w": made(torch.eye(3))})


SPECIAL: tuple[Callable[[Path], Path], ...] = (
    _not_dense(torch.Tensor.to_sparse),
    _not_dense(torch.Tensor.to_sparse_csr),
    _not_dense(lambda dense: dense.to("meta")),
    lambda path: forged(path, (HUGE,), (1,)),
    lambda path: forged(path, (HUGE, HUGE), (0, 0)),
    lambda path: forged(path, (HUGE,), (1,), numel=HUGE),
    lambda path: forged(path, (2, 2), (2, 1), offset=1),
    lambda path: forged(path, (-2, 2), (2, 1)),
    lambda path: forged(path, (2,), (-1,)),
    lambda path: forged(path, (4,), (1,), held=3),
    lambda path: forged(path, (4,), (1,), compressed=True),
    lambda path: safetensors_of(path, _entry(f"[{HUGE}]", f"[0,{4 * HUGE}]")),
    lambda path: safetensors_of(path, _entry("[4]", "[0,12]")),
    lambda path: safetensors_of(path, _entry("[-4]", "[0,16]")),
    lambda path: safetensors_of(path, _entry("[4]", "[8,24]")),
    lambda path: safetensors_of(path, _entry(f"[{HUGE},{HUGE}]", "[0,16]")),
    lambda path: safetensors_of(path, _entry("[4]", "[0,16]", "F128")),
    lambda path: safetensors_of(path, b'{"w":' + b"[" * 50_000),
    lambda path: _zip_of(path, b"\x80\x02" + b"(" * 200_000 + b"."),
    lambda path: _zip_of(path, b"\x80\x02" + b"]" * 3000 + b"a" * 2999 + b"."),
)  # fmt: skip
FIRST_MUTATION = len(CALLS) + len(SPECIAL)


def mutated(content: bytes, choose: random.Random) -> bytes:
    """One to three of: a bit or byte changed, a piece cut, doubled, zeroed, moved, the end lost."""
    data = bytearray(content)
    for _ in range(choose.choice([1, 1, 2, 3])):
        if not data:
            break
        place, length = choose.randrange(len(data)), choose.choice([1, 4, 8, 64])
        kind = choose.randrange(7)
        if kind == 0:
            data[place] ^= 1 << choose.randrange(8)
        elif kind == 1:
            data[place] = choose.choice([0, 1, 0x7F, 0x80, 0xFF, choose.randrange(256)])
        elif kind == 2:
            del data[place : place + length]
        elif kind == 3:
            data[place:place] = data[place : place + length]
        elif kind == 4:
            data[place : place + length] = bytes(min(length, len(data) - place))
        elif kind == 5:
            other = choose.randrange(len(data))
            data[other : other + length] = data[place : place + length]
        else:
            del data[place:]
    return bytes(data)


def hostile(number: int, folder: Path, sound: list[Path]) -> Path:
    """The file of a sample."""
    path = folder / f"{number}.pth"
    if number < len(CALLS):
        content = gadget(number, folder / "mark")
        if number % 2:
            return _zip_of(path, content)
        magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
        path.write_bytes(magic + pickle.dumps(1001, 2) + pickle.dumps({}, 2) + content)
        return path
    if number < FIRST_MUTATION:
        return SPECIAL[number - len(CALLS)](path)
    source = sound[number % len(sound)]
    path = path.with_suffix(source.suffix)
    path.write_bytes(mutated(source.read_bytes(), random.Random(number)))
    return path


class Reader:
    """The reading process, started anew where it dies."""

    def __init__(self) -> None:
        self._pool = self._started()

    @staticmethod
    def _started() -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, mp_context=context, initializer=start)

    def read(self, files: list[tuple[int, str]]) -> list[tuple[int, str | None, bool]]:
        """`read_all` there; of files that it dies of, the one that did it is found by halving."""
        try:
            return self._pool.submit(read_all, files).result()
        except BrokenProcessPool:
            self._pool = self._started()
        if len(files) == 1:
            return [(files[0][0], "the reading process died", True)]
        half = len(files) // 2
        return self.read(files[:half]) + self.read(files[half:])

    def close(self) -> None:
        self._pool.shutdown()


def batches(numbers: Iterable[int]) -> Iterator[list[int]]:
    taken = iter(numbers)
    while batch := list(islice(taken, BATCH)):
        yield batch


def run(numbers: Iterable[int]) -> Outcome:
    outcome = Outcome(figures={"read": 0, "refused": 0, "gadgets": 0})
    reader = Reader()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sound").mkdir()
        sound = sound_files(folder / "sound")
        for batch in batches(numbers):
            files = [(number, str(hostile(number, folder, sound))) for number in batch]
            for number, wrong, refused in reader.read(files):
                outcome.checked += 1
                outcome.figures["refused" if refused else "read"] += 1
                outcome.figures["gadgets"] += number < len(CALLS)
                if number < FIRST_MUTATION and not refused:
                    wrong = wrong or "it was read"
                if wrong:
                    outcome.failures.append(f"sample {number}: {wrong}")
            for _, file in files:
                Path(file).unlink()
            if (folder / "mark").exists():
                outcome.failures.append(f"samples {batch[0]} to {batch[-1]}: code was run")
    reader.close()
    return outcome
