from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from spectralx import checkpoints
from spectralx.cli import InputError, write_text
from spectralx.compare import main
from spectralx.comparison import runs
from spectralx.comparison.methods import METHODS, chosen_methods, method_settings
from spectralx.comparison.optical import optical_copy
from spectralx.comparison.report import reached, verdict, write_report
from spectralx.comparison.runs import Plan, run_all
from spectralx.comparison.work import record_path, work
from spectralx.data import TileDataset, build_task, raster_info, read_raster
from spectralx.fit import Stage
from tests.spectralx.test_evaluation import StrictPage
from tests.spectralx.tiny import tiny_config, tiny_settings

QUICK = ["--stage1.run.steps=1", "--stage2.run.steps=1"]
QUICK += ["--stage1.run.pictures=0", "--stage2.run.pictures=0"]


def plan_for(root: Path, out: Path, names: str, *overrides: str, pretrain: int = 0) -> Plan:
    settings = tiny_settings(root, out, *QUICK, *overrides)
    return Plan(settings, chosen_methods(names.split(",")), [0], pretrain)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Stage]]:
    """Stages are trained in this process; what was trained, in order."""
    done: list[tuple[str, Stage]] = []

    def here(folder: Path, stage: Stage, what: str, lock: int) -> None:
        work(folder, stage)
        done.append((folder.name, stage))

    monkeypatch.setattr(runs, "_work", here)
    return done


def test_methods_differ_in_what_adapts_and_trains_alone(tiny_scenes: Path, tmp_path: Path) -> None:
    base = tiny_settings(tiny_scenes, tmp_path, "--model.adapter_options={experts: 3}")
    for method in METHODS:
        own = method_settings(base, method, seed=7, out=tmp_path / "x").as_dict()
        assert (own["model"].pop("adapter"), own["model"].pop("trainable")) == (
            method.adapter,
            method.trainable,
        )
        assert own["model"].pop("adapter_options") == (
            {"experts": 3} if method.adapter == "aomoa" else {}
        )
        expected = base.as_dict()
        for key in ("adapter", "trainable", "adapter_options"):
            del expected["model"][key]
        assert own == {**expected, "seed": 7, "out": str(tmp_path / "x")}
    assert [method.name for method in chosen_methods(["full", "lora"])] == ["lora", "full"]
    with pytest.raises(InputError, match="found 'lorra'; expected one of lora"):
        chosen_methods(["lorra"])


def test_an_optical_copy_holds_red_green_and_blue(tiny_scenes: Path, tmp_path: Path) -> None:
    task = build_task("WS-WD", tiny_scenes)
    root = optical_copy(task, tmp_path / "optical", progress=False)
    images = sorted((root / "images").iterdir())
    assert len(images) == len(task.train) + len(task.validation) + len(task.source_test)
    assert raster_info(images[0]).wavelengths == (0.64, 0.55, 0.466)
    assert isinstance(task.train, TileDataset)
    first = task.train.pairs[0]
    bands = [task.wavelengths.index(band) for band in (0.64, 0.55, 0.466)]
    copied = read_raster(root / "images" / "train-000000.tif")
    assert np.array_equal(copied, read_raster(first.image)[bands].astype(np.float32))
    copy = build_task("folder", root)
    assert len(copy.train) == len(task.train)
    assert np.array_equal(copy.train.read_classes(0), task.train.read_classes(0))


def test_all_methods_from_one_backbone(
    tiny_scenes: Path, tmp_path: Path, in_process: list[tuple[str, Stage]]
) -> None:
    names = ",".join(method.name for method in METHODS)
    short = "--stage2.init_from=null"
    plan = plan_for(tiny_scenes, tmp_path, names, short, pretrain=1)
    run_all(plan)
    own = [(f"{method.name}-seed0", "stage2") for method in METHODS]
    assert in_process == [("pretraining", "stage1"), *own]
    backbone = next((plan.folder / "pretraining/stage1/best").glob("*.safetensors"))
    for run in plan.runs:
        base = checkpoints.read_manifest(run.folder / "stage2" / "best")["base"]
        assert base["file"] == backbone.name
    found = {one.run.method.name: one for one in reached(plan)}
    decoders = {one.decoder for one in found.values()}
    assert len(decoders) == 1
    assert found["frozen"].trainable == found["frozen"].decoder
    assert all(
        found["frozen"].trainable < found[name].trainable < found["full"].trainable
        for name in ("lora", "slr", "ia3")
    )
    assert all(one.seconds > 0 and one.memory > 2**20 for one in found.values())
    # Again: nothing is repeated. Another seed: only that.
    in_process.clear()
    run_all(plan)
    assert in_process == []
    run_all(Plan(plan.settings, chosen_methods(["frozen"]), [0, 1], 1))
    assert in_process == [("frozen-seed1", "stage2")]
    longer = plan_for(tiny_scenes, tmp_path, names, short, "--stage2.run.steps=2", pretrain=1)
    with pytest.raises(InputError, match=r"stage2\.run\.steps: found 2; expected 1"):
        run_all(longer)


def test_time_that_is_over_starts_nothing(
    tiny_scenes: Path, tmp_path: Path, in_process: list[tuple[str, Stage]]
) -> None:
    plan = plan_for(tiny_scenes, tmp_path, "lora,frozen", "--stage2.init_from=null")
    with pytest.raises(KeyboardInterrupt, match="0 of 2 stages are finished; the same command"):
        run_all(plan, minutes=0)
    assert in_process == []


def fake(plan: Plan, figures: dict[tuple[str, int], float]) -> None:
    """Records as finished runs leave them: (method, seed) -> mIoU on the target."""
    for run in plan.runs:
        if (run.method.name, run.seed) not in figures:
            continue
        for stage in plan.stages:
            record = {
                "seconds": 10.0, "interrupted": run.seed == 2,
                "peak_memory_bytes": 2**30, "peak_memory_of": "the process",
                "device": "CPU", "trainable": 1000, "trainable_decoder": 900,
                "tests": {
                    "source": {"miou": 0.5},
                    "target": {"miou": figures[run.method.name, run.seed]},
                },
            }  # fmt: skip
            write_text(record_path(run.folder, stage), json.dumps(record))


def test_the_report_says_who_is_ahead_seed_by_seed(tiny_scenes: Path, tmp_path: Path) -> None:
    methods = chosen_methods(["spectralx", "lora", "frozen"])
    plan = Plan(tiny_settings(tiny_scenes, tmp_path), methods, [0, 1, 2])
    assert write_report(plan) == "no run is finished yet"
    ours = {("spectralx", 0): 0.4, ("spectralx", 1): 0.5, ("spectralx", 2): 0.6}
    lora = {("lora", 0): 0.3, ("lora", 1): 0.45, ("lora", 2): 0.4}
    fake(plan, ours | lora | {("frozen", 0): 0.39, ("frozen", 1): 0.51})
    printed = write_report(plan)
    rows = {line.split("  ")[0]: line.split() for line in printed.splitlines() if line}
    assert rows["SpectralX"][1:7] == ["3", "50.0", "±", "0.0", "50.0", "±"]
    lines = [line for line in printed.splitlines() if line.startswith(("LoRA", "frozen"))]
    assert ["≥ 20" in line for line in lines[:2]] == [True, False]  # frozen's seed 2 is not there
    assert rows["LoRA"] == ["LoRA", "11.7", "±", "7.6", "3", "of", "3", "ahead"]
    assert rows["frozen"][4:] == ["1", "of", "2", "not", "told", "apart"]
    folder = plan.folder
    page = StrictPage((folder / "report.html").read_text())
    assert page.fetched == []
    assert "unfinished: 8 of 9 runs" in page.texts
    assert any("random start" in text for text in page.texts)
    assert len(page.images) == 1
    height, width = imread(folder / "report.png").shape[:2]
    assert width > 2 * height
    table = list(csv.DictReader((folder / "report.csv").open()))
    assert [float(row["miou target"]) for row in table[:3]] == [0.4, 0.5, 0.6]
    assert table[0]["trainable_beside_decoder"] == "100"
    assert table[0]["seconds"] == "20.0"
    assert len(json.loads((folder / "report.json").read_text())["runs"]) == 8
    assert "| LoRA | 3 |" in (folder / "report.md").read_text()
    assert [verdict(*case) for case in ((1, 1), (0, 3), (2, 3), (3, 3))] == [
        "not told apart (one seed)", "behind", "not told apart", "ahead",
    ]  # fmt: skip


def test_the_command_goes_on_after_a_kill(tiny_scenes: Path, tmp_path: Path, capsys: Any) -> None:
    """Real processes: what is locked is refused, what was killed half way is done again."""
    out = tmp_path / "out"
    command = ["--config", str(tiny_config(tmp_path)), f"--data.root={tiny_scenes}"]
    command += [f"--out={out}", "--stage2.init_from=null", *QUICK, "--seeds=0"]
    started = subprocess.Popen(
        [sys.executable, "-m", "spectralx.compare", *command, "--methods=frozen,full"]
    )
    log = out / "runs" / "frozen-seed0" / "stage2.log"
    while not log.is_file():
        assert started.poll() is None
        time.sleep(0.05)
    with pytest.raises(InputError, match="found another comparison at work"), runs._alone(out):
        pass
    started.terminate()
    assert started.wait() == 130
    assert not record_path(log.parent, "stage2").is_file()
    assert main([*command, "--methods=frozen"]) == 0
    printed = capsys.readouterr().out
    assert "frozen" in printed
    record = json.loads(record_path(log.parent, "stage2").read_text())
    assert record["tests"]["target"]["miou"] >= 0
    assert (out / "report.html").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--methods=lora,x"], "methods: found 'x'"),
        (["--seeds=0,0"], "seeds: found '0,0'"),
        (["--pretrain=-1"], "pretrain: found -1"),
        (["--pretrain=5", "--model.backbone_weights=x"], "pretrain: found 5; expected 0 with"),
        (["--data.root=nowhere"], "nowhere: found no such folder"),
    ],
)
def test_wrong_options_end_in_one_line_with_nothing_written(
    tiny_scenes: Path, tmp_path: Path, capsys: Any, options: list[str], words: str
) -> None:
    out = tmp_path / "out"
    base = ["--config", str(tiny_config(tmp_path)), f"--data.root={tiny_scenes}", f"--out={out}"]
    assert main([*base, "--methods=frozen", *options]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert words in printed
    assert not out.exists()


def test_a_plan_of_another_folder_is_refused(tiny_scenes: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_scenes, tmp_path, "frozen")
    plan.folder.mkdir()
    (plan.folder / "own.txt").touch()
    with pytest.raises(InputError, match="run: found files; expected a comparison"):
        run_all(plan)
