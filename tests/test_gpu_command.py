"""`make gpu` as far as it goes without a GPU: what it would run, and what it does with failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.shapes import SHAPES
from tests.gpu import conftest, run
from tests.gpu.run import Command, Outcome, merge, run_all, write
from tests.harden import record
from tests.harden.parts import PARTS


def test_dry_run_names_every_part_within_nine_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--dry-run"]) == 0
    shown = capsys.readouterr().out
    for wanted in ("FORCE_CUDA=1", "TORCH_CUDA_ARCH_LIST=9.0a", "-m gpu", "--device cuda",
                   "bfloat16", "--graphs", "bench_step", "memcheck", "racecheck"):  # fmt: skip
        assert wanted in shown
    everything = run.commands(Path("out"))
    assert {command.part for command in everything} == set(run.PARTS)
    assert sum(command.limit for command in everything if not command.alone) < 540
    assert len({(command.part, command.name) for command in everything}) == len(everything)
    assert run.main(["--dry-run", "--part", "tune", "--plan", "float16:8", "bfloat16:1"]) == 0
    build, tune = capsys.readouterr().out.splitlines()
    assert build.startswith("build ")
    assert "benchmarks.tune" in tune
    assert "--plan float16:8 bfloat16:1" in tune


@pytest.mark.parametrize("part", run.PARTS[1:])
def test_a_part_by_name_takes_less_than_nine_minutes(
    part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["--dry-run", "--part", part]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {"build", part}
    assert sum(int(line.split()[1]) for line in lines) < 540


def test_timed_commands_find_what_they_name() -> None:
    """Collected as on a GPU, but for the device: every operator, or every step, has its rows."""
    names = ("graphs", "steps", "steps compiled")
    chosen = {command.name: command for command in run.commands(Path("out"))}
    asked = []
    for name in names:
        words = ["cpu" if word == "cuda" else word for word in chosen[name].words[3:]]
        kept = [w for w in words if w != "--graphs" and not w.startswith("--benchmark-json")]
        asked.append([*kept, "--collect-only"])
    code = (
        "import json, sys, pytest\n"
        "for words in json.loads(sys.argv[1]): print('==', int(pytest.main(words)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(asked)], capture_output=True, text=True,
        cwd=run.ROOT, env={key: value for key, value in os.environ.items() if "XDIST" not in key},
    )  # fmt: skip
    assert done.stdout.count("== 0") == len(names), done.stdout + done.stderr
    for name, listed in zip(names, done.stdout.split("== 0"), strict=False):
        found = [line.split("::")[1] for line in listed.splitlines() if "::" in line]
        impls = {row.removesuffix("]").rsplit("-", 1)[1] for row in found}
        if name == "graphs":
            operators = {row.split("[")[0].removeprefix("test_") for row in found}
            assert operators == set(SHAPES) - {"step"}
            assert impls == {"fused", "eager", "floor"}
            continue
        batches = [f"{stage}scalemae-vitl-dfc-b{batch}-step-bfloat16-fused"
                   for stage in ("", "stage1-") for batch in (1, 8, 32)]  # fmt: skip
        assert {f"test_step[{row}]" for row in batches} <= set(found)
        assert ("compile" in impls) == (name == "steps compiled")
        reference = "test_step[scalemae-vitl-dfc-b32-step-float32-eager]"
        assert (reference in found) == (name == "steps")


def test_the_sanitizers_have_their_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "FOLDER", tmp_path)
    outcomes = [
        Outcome(command.part, command.name, "", 1 if "initcheck" in command.name else 0, 1.0, 9, [])
        for command in run.commands(Path("out"), part="sanitize")
    ]
    run.record_sanitizers(outcomes)
    found = record.total("gpu")
    assert found is not None
    assert found.checked == PARTS["gpu"].count
    assert found.failures == ["initcheck, every operator: failed with status 1"]


def test_everything_is_importable_without_the_data_libraries() -> None:
    """What `make gpu` runs needs torch, pytest and what lightning brings; not rasterio."""
    left_out = {"benchmarks.prediction", "benchmarks.data_loading", "benchmarks.data_wait"}
    code = (
        "import importlib, sys\n"
        "from importlib.machinery import PathFinder\n"
        "plain = PathFinder.find_spec\n"
        "def find_spec(name, path=None, target=None):\n"
        "    missing = name.split('.')[0] in ('rasterio', 'jsonargparse', 'scipy', 'sklearn')\n"
        "    return None if missing else plain(name, path, target)\n"
        "PathFinder.find_spec = staticmethod(find_spec)\n"
        "import tests.conftest\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
    )
    found = [path for folder in ("benchmarks", "tests/gpu") for path in
             sorted((run.ROOT / folder).glob("*.py"))]  # fmt: skip
    names = {".".join(path.relative_to(run.ROOT).with_suffix("").parts) for path in found}
    done = subprocess.run(
        [sys.executable, "-c", code, *sorted(names - left_out)],
        capture_output=True, text=True, cwd=run.ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_so_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.count("\n") == 1
    assert "no CUDA GPU" in found.err


def test_goes_on_after_a_failure_and_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(name: str, code: str, limit: int = 20) -> Command:
        return Command("tests", name, [sys.executable, "-c", code], limit, {"MARK": "here"})

    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    hangs = "import subprocess, sys; print('begun', flush=True);" + (
        f"{deaf}subprocess.run([sys.executable, '-c', '{deaf}time.sleep(60)'])"
    )
    # Interrupted, a command may still write what it has.
    slow = "import time\ntry: time.sleep(60)\nfinally: print('written', flush=True)"
    monkeypatch.setattr(run, "GRACE", 1)
    outcomes, status = run_all(
        [
            command("breaks", "import sys; print('why'); sys.exit(3)"),
            command("hangs", hangs, limit=1),
            command("slow", slow, limit=3),
            Command("sanitize", "is missing", ["no-such-tool-here"], 5),
            command("works", "import os; print(os.environ['MARK'])"),
        ]
    )
    assert status == 1
    verdicts = [outcome.verdict for outcome in outcomes]
    assert verdicts == [
        "failed with status 3", "over its limit of 1 s", "over its limit of 3 s",
        "failed with status 127", "passed",
    ]  # fmt: skip
    assert [outcomes[place].tail[-1] for place in (0, 4)] == ["why", "here"]
    assert "written" in outcomes[2].tail
    assert outcomes[1].tail[0] == "begun"
    assert outcomes[1].seconds < 10
    shown = capsys.readouterr().out
    assert "FAILED tests: breaks, failed with status 3" in shown
    assert "FAILED sanitize: is missing" in shown
    assert "FAILED tests: works" not in shown
    noted: list[int] = []
    run_all([command("one", "pass"), command("two", "pass")], lambda done: noted.append(len(done)))
    assert noted == [1, 2]
    facts = {"device": "A GPU", "commit": "abc"}
    write([replace(outcomes[0], name="before", status=0)], facts, "a-gpu", tmp_path)
    path = write(outcomes, facts, "a-gpu", tmp_path)
    names = [command["name"] for command in json.loads(path.read_text())["commands"]]
    assert names == ["before", "breaks", "hangs", "slow", "is missing", "works"]
    write(outcomes[:1], {**facts, "commit": "other"}, "a-gpu", tmp_path)
    assert len(json.loads(path.read_text())["commands"]) == 1
    write(outcomes, facts, "a-gpu", tmp_path)
    assert json.loads(path.read_text())["facts"]["commit"] == "abc"
    assert "| tests | hangs | over its limit of 1 s |" in path.with_suffix(".md").read_text()


def test_benchmark_files_are_joined(tmp_path: Path) -> None:
    facts = {"device": "A GPU", "device_type": "cuda", "commit": "abc"}
    for name, groups in (("one", ["a"]), ("two", ["b", "c"])):
        rows = [{"group": group, "of": name, "extra_info": facts} for group in groups]
        (tmp_path / name).write_text(json.dumps({"datetime": name, "benchmarks": rows}))
    sources = [tmp_path / name for name in ("one", "two", "missing")]
    assert merge(sources, tmp_path / "out") == 3
    joined = json.loads((tmp_path / "out").read_text())
    assert [row["group"] for row in joined["benchmarks"]] == ["a", "b", "c"]
    assert merge([tmp_path / "missing"], tmp_path / "none") == 0
    # Results of the same commit stay, but for the rows that are measured anew.
    kept = [{"group": group, "of": "kept", "extra_info": facts} for group in ("a", "d")]
    (tmp_path / "a-gpu.json").write_text(json.dumps({"benchmarks": kept}))
    assert merge(sources, tmp_path / "out", tmp_path) == 4
    joined = json.loads((tmp_path / "out").read_text())
    assert {row["group"]: row["of"] for row in joined["benchmarks"]} == {
        "a": "one", "b": "two", "c": "two", "d": "kept",
    }  # fmt: skip
    kept[0]["extra_info"] = {**facts, "commit": "other"}
    (tmp_path / "a-gpu.json").write_text(json.dumps({"benchmarks": kept}))
    assert merge(sources, tmp_path / "out", tmp_path) == 3


@pytest.mark.parametrize("workers", [1, 4, 15, 60])
def test_every_stretch_of_the_gpu_tests_begins_with_a_long_one(workers: int) -> None:
    """All tests once; those of one dtype of a function side by side."""
    items: list[Any] = [
        SimpleNamespace(path=Path(name), originalname="test_it", name=f"test_it[{number}]",
                        callspec=SimpleNamespace(params={"dtype": number % 3}))
        for name, count in ((conftest.LONGEST, 15), ("test_a.py", 24), ("test_z.py", 21))
        for number in range(count)
    ]  # fmt: skip
    found: list[Any] = conftest.in_turn(items, workers)
    assert len(found) == len(items)
    assert {id(item) for item in found} == {id(item) for item in items}
    heads = [found[len(items) * worker // workers].path.name for worker in range(workers)]
    assert heads.count(conftest.LONGEST) == min(workers, 15)
    others = [(item.path.name, item.callspec.params["dtype"]) for item in found
              if item.path.name != conftest.LONGEST]  # fmt: skip
    assert others == sorted(others)


def test_a_failure_is_said_at_once() -> None:
    said: list[str] = []
    reporter = SimpleNamespace(write_line=said.append, flush=lambda: said.append("flushed"))
    plugins = SimpleNamespace(get_plugin=lambda name: reporter)
    failures = conftest.Failures(SimpleNamespace(pluginmanager=plugins))  # type: ignore[arg-type]
    where = SimpleNamespace(reprcrash="a.py:3: AssertionError: off")
    for failed, why in ((False, None), (True, where), (True, "NOT RUN: 9 s are over")):
        report: Any = SimpleNamespace(failed=failed, nodeid="a.py::test", longrepr=why)
        failures.pytest_runtest_logreport(report)
    assert said == [
        "\nFAILED a.py::test: a.py:3: AssertionError: off", "flushed",
        "\nFAILED a.py::test: NOT RUN: 9 s are over", "flushed",
    ]  # fmt: skip


def test_gpu_tests_skip_aloud() -> None:
    """All of tests/gpu is collected, marked, and without a GPU skipped with the reason."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"],
        capture_output=True, text=True, cwd=run.ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NOT RUN: torch sees no CUDA GPU" in done.stdout
    assert "passed" not in done.stdout.splitlines()[-1]
