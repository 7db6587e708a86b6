from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from spectralx import checkpoints
from spectralx.averaging import AverageWeights
from spectralx.cli import InputError
from spectralx.finished import FINISHED
from spectralx.fit import fit
from spectralx.lightning_modules import ReconstructionStage
from spectralx.logs import METRICS, SPEED, CsvLog, check_wandb, take_back
from spectralx.machine import check_machine, checkpoint_blocks, prepare_model
from spectralx.pictures import read_curves
from spectralx.resume import load_state
from spectralx.run_settings import TrainerSettings
from spectralx.train import main
from tests.spectralx.tiny import tiny_config, tiny_settings

QUICK = ("--stage1.run.pictures=0", "--stage1.run.steps=2")


def _metrics(scenes: Path, folder: Path, *options: str) -> bytes:
    result = fit("stage1", tiny_settings(scenes, folder, *QUICK, *options))
    return (result.folder / METRICS).read_bytes()


def test_computing_blocks_again_changes_no_figure(tiny_scenes: Path, tmp_path: Path) -> None:
    plain = _metrics(tiny_scenes, tmp_path / "plain")
    again = _metrics(tiny_scenes, tmp_path / "again", "--trainer.gradient_checkpointing=true")
    assert again == plain


def test_blocks_are_computed_again() -> None:
    calls = []

    class Block(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(torch.rand(1))
            return x * calls[-1]

    model = nn.Module()
    model.blocks = nn.ModuleList([Block(), Block()])
    assert checkpoint_blocks(model) == 2
    x = torch.ones(1, requires_grad=True)
    model.blocks[1](model.blocks[0](x)).backward()
    assert len(calls) == 4
    torch.testing.assert_close(x.grad, calls[0] * calls[1])
    with torch.no_grad():
        model.blocks[0](x)
    assert len(calls) == 5


def test_the_average_follows_the_weights() -> None:
    layer = nn.Linear(2, 1, bias=False)
    stage: Any = SimpleNamespace(model=layer)
    trainer: Any = SimpleNamespace(global_step=0)
    average = AverageWeights(0.75)
    average.on_fit_start(trainer, stage)
    start = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight += 4.0
    average.on_train_batch_end(trainer, stage)  # no step: a batch that is accumulated
    torch.testing.assert_close(average.average["weight"], start)
    trainer.global_step = 1
    average.on_train_batch_end(trainer, stage)
    torch.testing.assert_close(average.average["weight"], start + 1)
    trained = layer.weight.detach().clone()
    with average.in_place(layer):
        torch.testing.assert_close(layer.weight.detach(), start + 1)
        with average.in_place(layer):
            torch.testing.assert_close(layer.weight.detach(), start + 1)
        torch.testing.assert_close(layer.weight.detach(), start + 1)
    assert torch.equal(layer.weight, trained)


def test_the_average_is_what_is_kept(tiny_scenes: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny_scenes, tmp_path, *QUICK, "--stage1.optimizer.ema=0.5")
    result = fit("stage1", settings)
    state = load_state(result.folder / "resume")
    assert state is not None
    kept = checkpoints.load(result.last).tensors
    averages = {k.removeprefix("average/"): v for k, v in state.tensors.items() if "average/" in k}
    assert averages
    for name, average in averages.items():
        assert torch.equal(kept[name], average)
    assert any(not torch.equal(kept[n], state.tensors[f"model/{n}"]) for n in averages)


def test_a_run_that_gets_no_better_stops(
    tiny_scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def constant(self: ReconstructionStage, name: str, value: Any, size: int) -> None:
        self.means[name].update(1.0, size)

    monkeypatch.setattr(ReconstructionStage, "log_validation", constant)
    settings = tiny_settings(
        tiny_scenes,
        tmp_path,
        "--stage1.run.steps=12",
        "--stage1.run.early_stopping=2",
        "--stage1.run.pictures=0",
    )
    result = fit("stage1", settings)
    finished = json.loads((result.folder / FINISHED).read_text())
    assert finished["step"] == 6
    assert finished["stopped"]
    assert checkpoints.load(result.best).manifest["extra"]["step"] == 2
    capsys.readouterr()
    fit("stage1", settings)
    assert "finished before, 6 steps" in capsys.readouterr().out


def test_early_stopping_is_for_the_source_domain(tiny_scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"stage2\.run\.early_stopping: found 3"):
        tiny_settings(
            tiny_scenes, tmp_path, "--data.official=true", "--stage2.run.early_stopping=3"
        )


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_half_precision_trains_and_keeps_its_scale(
    tiny_scenes: Path, tmp_path: Path, precision: str
) -> None:
    settings = tiny_settings(
        tiny_scenes,
        tmp_path,
        *QUICK,
        f"--trainer.precision={precision}",
        "--stage1.run.accumulate=2",
        "--stage1.optimizer.clip=1",
    )
    result = fit("stage1", settings)
    state = load_state(result.folder / "resume")
    assert state is not None
    scale = state.values["precision"].get("scale")
    assert scale == (65536.0 if precision == "16-mixed" else None)
    single = _metrics(tiny_scenes, tmp_path / "single", "--stage1.run.accumulate=2")
    (tmp_path / "single.csv").write_bytes(single)
    exact = read_curves(tmp_path / "single.csv")["train/loss"]
    half = read_curves(result.folder / METRICS)["train/loss"]
    assert half[0] == exact[0] == [0, 1]
    assert half[1] == pytest.approx(exact[1], rel=0.05)
    assert half[1] != exact[1]


def test_a_compiled_model_keeps_its_names_and_values() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.GELU())
    names = list(model.state_dict())
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    prepare_model(model, TrainerSettings(compile="aot_eager"))
    assert model._compiled_call_impl is not None
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x), expected)


def test_speed_is_logged_beside_the_figures(tiny_scenes: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny_scenes, tmp_path, "--stage1.run.pictures=0")
    settings.trainer.log_every = 2
    result = fit("stage1", settings)
    with (result.folder / SPEED).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "3"]
    for row in rows:
        assert float(row["images_per_second"]) > 0
        assert 0 <= float(row["data_wait_share"]) < 1
        assert 50 < float(row["peak_memory_mib"]) < 100_000


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused on a CPU alone")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trainer.cuda_graphs=true"], ["trainer.cuda_graphs", "CPU", "false"]),
        (["--trainer.accelerator=gpu"], ["trainer.accelerator", "no CUDA GPU"]),
        (["--trainer.compile=inducter"], ["trainer.compile", "inducter", "inductor"]),
        (["--trainer.devices=2"], ["trainer.devices", "torchrun --nproc-per-node 2"]),
        (["--trainer.strategy=fsdp2", "--trainer.precision=16-mixed"], ["bf16-mixed with fsdp2"]),
        (["--stage1.run.accumulate=0"], ["accumulate", "at least 1"]),
        (["--stage1.optimizer.ema=1"], ["ema", "between 0 and 1"]),
    ],
)
def test_what_the_machine_does_not_allow_is_refused_in_one_line(
    tiny_scenes: Path, tmp_path: Path, capsys: Any, options: list[str], words: list[str]
) -> None:
    out = tmp_path / "out"
    base = ["stage1", f"--config={tiny_config(tmp_path)}", f"--data.root={tiny_scenes}"]
    arguments = [option for option in base + options if option != "--trainer.accelerator=cpu"]
    assert main([*arguments, f"--out={out}"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    for word in words:
        assert word in printed
    assert not out.exists()


def test_machine_settings_that_contradict() -> None:
    check_machine(TrainerSettings(accelerator="cpu"))
    with pytest.raises(InputError, match=r"trainer\.precision: found 16-mixed"):
        check_machine(TrainerSettings(accelerator="cpu", strategy="fsdp2", precision="16-mixed"))


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_is_refused_where_it_is_not_installed() -> None:
    check_wandb(None)
    with pytest.raises(InputError, match="pip install wandb"):
        check_wandb("project")


def test_a_log_is_a_row_at_once_and_can_be_taken_back(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / METRICS, ("a", "b"))
    log.log_metrics({"a": 0.1, "epoch": 0, "speed/x": 3.0}, 1)
    mark = (tmp_path / METRICS).stat().st_size
    log.log_metrics({"b": 2.0}, 2)
    assert (tmp_path / METRICS).read_text() == "step,a,b\n1,0.1,\n2,,2.0\n"
    (tmp_path / "tensorboard" / "version_0").mkdir(parents=True)
    later = tmp_path / "tensorboard" / "version_0" / "events.later"
    later.write_bytes(b"x")
    take_back(tmp_path, {METRICS: mark})
    assert (tmp_path / METRICS).read_text() == "step,a,b\n1,0.1,\n"
    assert not later.exists()
    with pytest.raises(InputError, match=f"found {mark} bytes; expected {mark + 1} or more"):
        take_back(tmp_path, {METRICS: mark + 1})
    with pytest.raises(InputError, match="outside the run"):
        take_back(tmp_path, {"../x": 0})
    with pytest.raises(ValueError, match="c"):
        log.log_metrics({"c": 2.0}, 2)
