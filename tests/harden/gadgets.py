"""Pickles that would run code, read files or open connections where they are loaded.

Each is written opcode by opcode, so that making one imports and calls nothing.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path

# module, name and arguments of what is called; "MARK" stands for a file that must not appear.
CALLS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("os", "system", ("touch MARK",)),
    ("posix", "system", ("touch MARK",)),
    ("os", "popen", ("touch MARK",)),
    ("os", "mkdir", ("MARK",)),
    ("os", "remove", ("MARK",)),
    ("os", "execvp", ("touch", "MARK")),
    ("os", "putenv", ("LD_PRELOAD", "MARK")),
    ("nt", "system", ("touch MARK",)),
    ("subprocess", "Popen", ("touch MARK",)),
    ("subprocess", "getoutput", ("touch MARK",)),
    ("subprocess", "check_output", ("touch MARK",)),
    ("builtins", "eval", ("open('MARK','w')",)),
    ("builtins", "exec", ("open('MARK','w')",)),
    ("builtins", "compile", ("1", "MARK", "eval")),
    ("builtins", "__import__", ("antigravity",)),
    ("builtins", "getattr", ("MARK", "upper")),
    ("builtins", "open", ("MARK", "w")),
    ("builtins", "breakpoint", ()),
    ("__builtin__", "eval", ("open('MARK','w')",)),
    ("importlib", "import_module", ("antigravity",)),
    ("runpy", "run_path", ("MARK",)),
    ("code", "interact", ()),
    ("pdb", "run", ("open('MARK','w')",)),
    ("timeit", "timeit", ("open('MARK','w')",)),
    ("cProfile", "run", ("open('MARK','w')",)),
    ("bdb", "Bdb.run", ("open('MARK','w')",)),
    ("webbrowser", "open", ("http://localhost:9/MARK",)),
    ("urllib.request", "urlopen", ("http://localhost:9/MARK",)),
    ("socket", "create_connection", ("localhost",)),
    ("ftplib", "FTP", ("localhost",)),
    ("shutil", "rmtree", ("MARK",)),
    ("shutil", "copyfile", ("/etc/hostname", "MARK")),
    ("pathlib", "Path", ("MARK",)),
    ("pty", "spawn", ("touch MARK",)),
    ("ctypes", "CDLL", ("MARK",)),
    ("marshal", "loads", ("MARK",)),
    ("pickle", "loads", ("MARK",)),
    ("_pickle", "loads", ("MARK",)),
    ("copyreg", "_reconstructor", ("MARK",)),
    ("operator", "attrgetter", ("system",)),
    ("operator", "methodcaller", ("system", "touch MARK")),
    ("functools", "partial", ("MARK",)),
    ("types", "FunctionType", ("MARK",)),
    ("logging.config", "dictConfig", ("MARK",)),
    ("numpy", "load", ("MARK",)),
    ("numpy", "fromfile", ("MARK",)),
    ("yaml", "unsafe_load", ("!!python/object/apply:os.mkdir [MARK]",)),
    ("torch", "load", ("MARK",)),
    ("torch.hub", "load", ("local", "MARK")),
    ("torch.jit", "load", ("MARK",)),
    ("torch.serialization", "load", ("MARK",)),
    ("torch._ops", "_OpNamespace.load_library", ("MARK",)),
    ("torch.utils.cpp_extension", "load_inline", ("MARK", "int x;")),
    ("torch.storage", "_load_from_bytes", ("MARK",)),
    ("argparse", "FileType", ("w",)),
    ("argparse", "Namespace.__init__.__globals__", ()),
    ("collections", "OrderedDict.__class__", ("MARK",)),
    ("torch", "Size.__class__", ("MARK",)),
    ("torch", "FloatStorage.from_file", ("MARK",)),
    ("torch._utils", "_rebuild_tensor_v2.__globals__", ()),
)


def _text(value: str) -> bytes:
    raw = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(raw)) + raw


def reduced(module: str, name: str, arguments: tuple[str, ...]) -> bytes:
    """``name(*arguments)`` by GLOBAL or STACK_GLOBAL and REDUCE."""
    pushed = b"".join(map(_text, arguments))
    called = pickle.MARK + pushed + pickle.TUPLE + pickle.REDUCE + pickle.STOP
    if "." in name:  # only protocol 4 follows dots
        return b"\x80\x04" + _text(module) + _text(name) + pickle.STACK_GLOBAL + called
    return b"\x80\x02" + pickle.GLOBAL + f"{module}\n{name}\n".encode() + called


def instantiated(module: str, name: str, arguments: tuple[str, ...]) -> bytes:
    """The same by the opcode INST of the first protocol."""
    pushed = b"".join(map(_text, arguments))
    return pickle.MARK + pushed + pickle.INST + f"{module}\n{name}\n".encode() + pickle.STOP


def objects(module: str, name: str, arguments: tuple[str, ...]) -> bytes:
    """The same by the opcode OBJ."""
    named = pickle.GLOBAL + f"{module}\n{name}\n".encode()
    pushed = b"".join(map(_text, arguments))
    return b"\x80\x02" + pickle.MARK + named + pushed + pickle.OBJ + pickle.STOP


FORMS: tuple[Callable[[str, str, tuple[str, ...]], bytes], ...] = (reduced, instantiated, objects)


def gadget(number: int, mark: Path) -> bytes:
    """A pickle by its number, in the three forms by turns; `mark` is what it would leave."""
    module, name, arguments = CALLS[number % len(CALLS)]
    arguments = tuple(each.replace("MARK", str(mark)) for each in arguments)
    form = reduced if "." in name else FORMS[number % len(FORMS)]
    return form(module, name, arguments)
