"""Logging to Weights & Biases, with a stand-in for its package that Lightning's logger drives."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spectralx.fit import fit
from tests.spectralx.tiny import tiny_settings

# As much of the package as the logger uses; every call goes into a file.
STAND_IN = '''
import json, os, sys, types
run = None

def note(**values):
    with open(os.environ["STAND_IN_CALLS"], "a") as file:
        file.write(json.dumps(values, default=str) + "\\n")

class Config:
    def update(self, values, allow_val_change=None):
        note(call="config", run=run.id, values=values)

class Run:
    def __init__(self, id, name):
        self.id, self.name, self.config = id, name, Config()
    def log(self, values):
        note(call="log", run=self.id, values=values)
    def define_metric(self, *names, **options):
        pass
    def finish(self):
        global run
        note(call="finish", run=self.id)
        run = None

def require(what):
    pass

def init(**options):
    global run
    assert run is None
    note(call="init", mode=os.environ.get("WANDB_MODE"), options=options)
    run = Run(options["id"], options["name"])
    return run

class RunDisabled:
    pass

for name, held in (("wandb.sdk", {}), ("wandb.sdk.lib", {"RunDisabled": RunDisabled}),
                   ("wandb.wandb_run", {"Run": Run})):
    module = sys.modules[name] = types.ModuleType(name)
    vars(module).update(held)
'''  # fmt: skip


def install(folder: Path) -> Path:
    """The stand-in, as an installed package."""
    (folder / "wandb").mkdir(parents=True)
    (folder / "wandb" / "__init__.py").write_text(STAND_IN)
    about = folder / "wandb-0.20.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: wandb\nVersion: 0.20.0\n")
    return folder


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of calls, with the stand-in on the path for as long as the test runs."""
    monkeypatch.syspath_prepend(str(install(tmp_path / "packages")))
    monkeypatch.setenv("STAND_IN_CALLS", str(tmp_path / "calls.jsonl"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield tmp_path / "calls.jsonl"
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        del sys.modules[name]


def read(calls: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in calls.read_text().splitlines()]


def test_each_stage_is_a_run_of_its_own_that_goes_on(
    tiny_scenes: Path, tmp_path: Path, calls: Path
) -> None:
    options = ("--trainer.wandb=project", "--stage1.run.pictures=0", "--stage2.run.pictures=0")
    settings = tiny_settings(tiny_scenes, tmp_path, *options)
    fit("stage1", settings)
    fit("stage2", settings)
    done = read(calls)
    begun = [call for call in done if call["call"] == "init"]
    assert [call["call"] for call in done if call["call"] in ("init", "finish")] == [
        "init", "finish", "init", "finish",
    ]  # fmt: skip
    assert {call["mode"] for call in begun} == {"offline"}  # what the user said holds
    for call, stage in zip(begun, ("stage1", "stage2"), strict=True):
        given = call["options"]
        folder = tmp_path / "run" / stage
        assert given["project"] == "project"
        assert given["resume"] == "allow"
        assert given["id"] == (folder / "wandb-run").read_text()
        assert given["name"] == given["dir"] == str(folder)
        of_run = [each for each in done if each.get("run") == given["id"]]
        (config,) = [each["values"] for each in of_run if each["call"] == "config"]
        assert config["stage2"]["run"]["steps"] == 4
        logged = [each["values"] for each in of_run if each["call"] == "log"]
        losses = {
            each["trainer/global_step"]: each["train/loss"]
            for each in logged
            if "train/loss" in each
        }
        rows = (folder / "metrics.csv").read_text().splitlines()
        columns = rows[0].split(",")
        kept = [dict(zip(columns, row.split(","), strict=True)) for row in rows[1:]]
        written = {int(row["step"]): row["train/loss"] for row in kept if row["train/loss"]}
        assert len(losses) == 4
        assert {step: str(value) for step, value in losses.items()} == written
        assert any("val/loss" in each for each in logged)
        assert any("speed/data_wait_share" in each for each in logged)
    # Going on takes up the same run.
    fit("stage2", tiny_settings(tiny_scenes, tmp_path, *options, "--stage2.run.steps=5"))
    (more,) = [call["options"] for call in read(calls)[len(done) :] if call["call"] == "init"]
    assert more["id"] == begun[1]["options"]["id"]
