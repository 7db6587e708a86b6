"""Row 6: configurations, lists and command lines that cannot be used, or must not be.

Each sample is one mistake or one attempt: an unknown or misspelt option, a value of another type,
YAML with tags, bombs or broken text, lists of tiles that leave the data set, paths of GDAL's
virtual file systems and URLs, output where none can be, manifests that point elsewhere. The command
must end with status 2 and one line on stderr that starts with its name, and write nothing: no file
beside the output folder changes, and that folder does not appear.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from spectralx import evaluate, train
from spectralx.checkpoints import save
from spectralx.data import manifest
from spectralx.options import _option_names, make_parser
from tests.harden.record import Outcome
from tests.harden.tiny import tiny_model
from tests.spectralx.test_cli import make_folder
from tests.spectralx.tiny import tiny_config

Main = Callable[[list[str]], int]
Sample = tuple[str, Main, list[str]]

OUTSIDE = (
    "../outside.tif", "images/../../outside.tif", "/etc/hostname", "{sandbox}/outside.tif",
    "images/linked.tif", "/vsizip/x.zip/a.tif", "/vsicurl/http://localhost:9/a.tif",
    "/vsimem/a.tif", "/vsistdin/", "http://localhost:9/a.tif", "s3://bucket/a.tif",
    "file:///etc/hostname", "images/a.tif\x00.txt", "images", "images/nothing.tif", "", ".", "~",
    "NETCDF:images/a.tif", "GTIFF_DIR:1:images/a.tif", "images/" + "a" * 300 + ".tif",
)  # fmt: skip
ROOTS = (
    "{sandbox}/nowhere", "{sandbox}/outside.tif", "/vsizip/{sandbox}/x.zip", "/vsimem/x",
    "/vsicurl/http://localhost:9/", "http://localhost:9/tiles", "s3://bucket/tiles", "",
    "{sandbox}/empty", "\x00", "a" * 5000, "{sandbox}/tiles/../nowhere", "~nobody", "NUL:",
)  # fmt: skip
OUTS = ("{sandbox}/outside.tif", "{sandbox}/outside.tif/run", "/proc/run", "\x00", "a" * 5000)
DOCUMENTS = (
    "!!python/object/apply:os.system ['touch {sandbox}/mark']",
    "data: !!python/object/apply:os.mkdir ['{sandbox}/mark']",
    "data: {root: !!python/name:os.system ''}",
    "!!python/module:os",
    "data: !!python/object/new:subprocess.Popen [['touch', '{sandbox}/mark']]",
    "data: {root: !<tag:yaml.org,2002:python/object/apply:os.getcwd> []}",
    "data: {root: !include /etc/hostname}",
    "data: !!set {a, b}",
    "data: !!binary aGVsbG8=",
    "- a\n- b",
    "null",
    "''",
    "3",
    "data",
    "data: [1, 2]",
    "data: {roots: x}",
    "dta: {root: x}",
    "data: {image_size: large}",
    "data: {image_size: 1.5}",
    "data: {image_size: -4}",
    "data: {image_size: 99999999999999999999999999}",
    "data: {workers: [0]}",
    "data: {workers: -1}",
    "data: {flips: perhaps}",
    "data: {crop: square}",
    "data: {wavelengths: 0.5}",
    "data: {wavelengths: [a, b]}",
    "data: {class_names: 3}",
    "model: {family: resnet}",
    "model: {depth: 0}",
    "model: {embed_dim: -16}",
    "model: {num_heads: 0}",
    "model: {adapter: pickle}",
    "model: {adapted_blocks: [99]}",
    "model: {adapter_options: {rank: -3}}",
    "model: {adapter_options: {ranks: 3}}",
    "model: {patch_size: 0}",
    "model: {low_rank: x}",
    "stage1: {run: {steps: -1}}",
    "stage1: {run: {batch_size: 0}}",
    "stage1: {optimizer: {lr: fast}}",
    "stage1: {optimizer: {lr: -1}}",
    "stage1: {optimizer: {schedule: sometimes}}",
    "data: {root: x",
    "data: {root: 'x}",
    "data:\n\t- tab",
    "data: *nothing",
    "data: &a {root: *a}",
    "a: &a [x, x]\nb: &b [*a, *a]\ndata: *b",
    "%YAML 9.9\n---\ndata: {}\n...\n---\ndata: {}",
    "\x00",
    "data: {root: \x07}",
    "? [a]\n: b",
    "1: 2",
    "true: false",
    "data: {null: x}",
    "[" * 5000,
    "{a: " * 5000,
)
WRONG_VALUES = ("[", "{", "null", "[1, {a: b}]", "!!python/name:os.system", "\x00", "nan", "-inf")
MANIFESTS: tuple[dict[str, Any], ...] = (
    {"tensors": {"file": "../model.safetensors", "sha256": "0" * 64}},
    {"tensors": {"file": "/etc/hostname", "sha256": "0" * 64}},
    {"tensors": {"file": "missing.safetensors", "sha256": "0" * 64}},
    {"tensors": {"file": 3, "sha256": None}},
    {"tensors": {"file": "", "sha256": "0" * 64}},
    {"tensors": {"file": ".", "sha256": "0" * 64}},
    {"tensors": "model.safetensors"},
    {"model": "os.system"},
    {"model": 3},
    {"config": []},
    {"config": {"family": "scalemae", "evil": 1}},
    {"format": "pickle"},
    {"format_version": 99},
)


class Sandbox:
    """Everything that the commands see: data, a configuration, a checkpoint, and what they must
    leave alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "tiny.yaml"
        self.out = folder / "out"
        self.manifest = json.loads((folder / "checkpoint/manifest.json").read_text())

    @staticmethod
    def make(folder: Path) -> None:
        """What the sandbox of every sample is a copy of."""
        make_folder(folder / "tiles")
        (folder / "outside.tif").write_bytes((folder / "tiles/images/a.tif").read_bytes())
        (folder / "tiles/images/linked.tif").symlink_to("../../outside.tif")
        (folder / "empty").mkdir()
        (folder / "work").mkdir()
        tiny_config(folder)
        save(folder / "checkpoint", tiny_model())

    def filled(self, text: str) -> str:
        return text.replace("{sandbox}", str(self.folder))

    def listing(self) -> dict[str, tuple[int, int]]:
        """Size and time of every file."""
        found = {}
        for path in self.folder.rglob("*"):
            status = path.lstat()
            found[str(path)] = (status.st_size, status.st_mtime_ns)
        return found

    def training(self, *options: str, stage: str = "stage1") -> list[str]:
        return [
            stage, f"--config={self.config}", "--data.task=folder",
            f"--data.root={self.folder / 'tiles'}", f"--out={self.out}", *options,
        ]  # fmt: skip


def option_names() -> list[str]:
    """Every option of a training command."""
    return _option_names(make_parser("spectralx"))


def unknown_option(sandbox: Sandbox, choose: random.Random) -> Sample:
    name = list(choose.choice(option_names()))
    place = choose.randrange(2, len(name))
    name[place : place + 1] = choose.choice(["", "x", "__", "..", "-"])
    option = "".join(name)
    if option in option_names():
        option += "x"
    return option, train.main, sandbox.training(f"{option}=1")


def wrong_value(sandbox: Sandbox, choose: random.Random) -> Sample:
    numbers = [
        name
        for name in option_names()
        if name.endswith(("size", "steps", "lr", "depth", "heads", "dim", "workers", "every"))
    ]
    option = f"{choose.choice(numbers)}={choose.choice(WRONG_VALUES)}"
    return option, train.main, sandbox.training(option)


def document(sandbox: Sandbox, choose: random.Random) -> Sample:
    text = choose.choice(DOCUMENTS)
    path = sandbox.folder / "hostile.yaml"
    path.write_bytes(sandbox.filled(text).encode())
    if choose.random() < 0.1:
        text, _ = "not UTF-8", path.write_bytes(b"data: {root: '\xff\xfe'}")
    return f"YAML {text[:60]!r}", train.main, [*sandbox.training(), f"--config={path}"]


def list_of_tiles(sandbox: Sandbox, choose: random.Random) -> Sample:
    name = sandbox.filled(choose.choice(OUTSIDE))
    row = f"{name},labels/a.tif" if choose.random() < 0.7 else f"images/a.tif,{name}"
    split = choose.choice(["train", "validation", "test"])
    (sandbox.folder / "tiles" / f"{split}.csv").write_text(f"image,mask\n{row}\n")
    return f"list {split} {row[:80]!r}", train.main, sandbox.training()


def root(sandbox: Sandbox, choose: random.Random) -> Sample:
    option = f"--data.root={sandbox.filled(choose.choice(ROOTS))}"
    return option[:80], train.main, sandbox.training(option)


def output(sandbox: Sandbox, choose: random.Random) -> Sample:
    option = f"--out={sandbox.filled(choose.choice(OUTS))}"
    return option[:80], train.main, sandbox.training(option)


def configuration(sandbox: Sandbox, choose: random.Random) -> Sample:
    names = ("nowhere.yaml", "../outside", "/etc/hostname", "/dev/null", "http://x/y.yaml", "",
             "quickstart.json", "{sandbox}/empty", "{sandbox}/outside.tif", "\x00")  # fmt: skip
    option = f"--config={sandbox.filled(choose.choice(names))}"
    return option[:80], train.main, [*sandbox.training(), option]


def checkpoint(sandbox: Sandbox, choose: random.Random) -> Sample:
    changes = choose.choice(MANIFESTS)
    (sandbox.folder / "checkpoint/manifest.json").write_text(
        json.dumps({**sandbox.manifest, **changes})
    )
    given = ["--checkpoint", str(sandbox.folder / "checkpoint"), "--task", "folder", "--root",
             str(sandbox.folder / "tiles")]  # fmt: skip
    if choose.random() < 0.5:
        return f"manifest {changes}", evaluate.main, given
    started = f"--stage2.init_from={sandbox.folder / 'checkpoint'}"
    return f"manifest {changes}", train.main, sandbox.training(started, stage="stage2")


def checksums(sandbox: Sandbox, choose: random.Random) -> Sample:
    text = choose.choice(["nothing", "0" * 64, "0" * 63 + "  images/a.tif", "\x00", "a  b"])
    (sandbox.folder / "tiles/sha256sums.txt").write_text(text + "\n")
    return f"checksums {text[:20]!r}", manifest.main, [str(sandbox.folder / "tiles"), "--check"]


MAKERS = (
    unknown_option, document, list_of_tiles, wrong_value, root, document, list_of_tiles, output,
    configuration, checkpoint, document, checksums,
)  # fmt: skip


@contextlib.contextmanager
def captured(folder: Path) -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """stdout and stderr, in a working directory that must stay empty."""
    before, out, err = os.getcwd(), io.StringIO(), io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield out, err
    finally:
        os.chdir(before)


def status_of(main: Main, argv: list[str]) -> int | str:
    """Exit status, or the name of what escaped."""
    try:
        return main(argv)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else str(error.code)
    except BaseException as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def failure_of(number: int, folder: Path) -> str | None:
    """What a command did with a sample that it should not have."""
    sandbox = Sandbox(folder)
    what, main, argv = MAKERS[number % len(MAKERS)](sandbox, random.Random(number))
    where = f"sample {number}: {what}"
    before = sandbox.listing()
    with captured(folder / "work") as (_, err):
        status = status_of(main, argv)
    lines = [line for line in err.getvalue().splitlines() if line.strip()]
    # Progress bars and warnings end before the error; it is what the user reads last.
    errors = [line for line in lines if ": error: " in line]
    if status != 2:
        return f"{where}: status {status}, expected 2; {lines[-1][:200] if lines else ''}"
    if len(errors) != 1 or lines[-1] != errors[0]:
        return f"{where}: {len(lines)} lines: {' / '.join(lines)[:300]}"
    after = sandbox.listing()
    changed = sorted(path for path in {*before, *after} if before.get(path) != after.get(path))
    if changed:
        return f"{where}: written: {', '.join(changed)[:200]}"
    return None


def run(numbers: Iterable[int]) -> Outcome:
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as name:
        Sandbox.make(Path(name, "sound"))
        for number in numbers:
            folder = Path(name, str(number))
            shutil.copytree(Path(name, "sound"), folder, symlinks=True)
            failure = failure_of(number, folder)
            outcome.failures += [failure] if failure else []
            outcome.checked += 1
            shutil.rmtree(folder)
    return outcome
