from __future__ import annotations

import csv
import dataclasses
import json
import math
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from spectralx import checkpoints
from spectralx.build import segmentation_model
from spectralx.cli import InputError, write_folder
from spectralx.data import task_names
from spectralx.data.scenes import write_scenes
from spectralx.datamodule import TaskData, describe_normalisation
from spectralx.evaluate import GAP_TASKS, evaluate_tasks, main, run_tests
from spectralx.evaluation.page import Page
from spectralx.evaluation.published import FIGURES, published
from spectralx.evaluation.report import confusion_csv, rules
from spectralx.evaluation.results import POOLED, Figure, SeedResult, TaskResult
from spectralx.evaluation.tables import Table
from spectralx.evaluation.trained import DATA_SETS, Trained, by_task, find_checkpoints
from spectralx.metrics import Protocol
from spectralx.segmentation import Segmentation
from spectralx.settings import Settings
from tests.spectralx.tiny import tiny_settings

VOID = {"meta", "img", "br", "link"}


class StrictPage(HTMLParser):
    """Refuses tags that do not match; keeps images, texts and everything that would be fetched."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.images: list[tuple[str, bytes]] = []
        self.fetched: list[str] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert tag != "script"
        for name in ("src", "href", "data", "srcset", "action"):
            url = values.get(name) or ""
            if url.startswith("data:image/png;base64,"):
                self.images.append((values["alt"] or "", b64decode(url.split(",", 1)[1])))
            elif url:
                self.fetched.append(url)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        assert "url(" not in data
        assert "@import" not in data
        self.texts.append(data)


def result(
    *seeds: dict[str, list[list[int]]], protocol: Protocol = "proper", task: str = "spring"
) -> TaskResult:
    """The same matrices at both sizes."""
    each = []
    for seed, tests in enumerate(seeds):
        matrices = {name: torch.tensor(matrix) for name, matrix in tests.items()}
        each.append(SeedResult(f"runs/{seed}", seed, 10, {"native": matrices, "model": matrices}))
    return TaskResult(
        task, task, "a model", False, ("unlabelled", "a", "b"), (8, 8), ((16, 16),), protocol, each
    )


def test_targets_are_pooled_by_pixels() -> None:
    one = {
        "source": [[0, 0, 0], [0, 4, 0], [0, 0, 4]],
        "target x": [[0, 0, 0], [0, 8, 0], [0, 0, 0]],
        "target y": [[0, 0, 0], [0, 0, 0], [0, 2, 2]],
    }
    found = result(one)
    assert found.tests == ["source", "target x", "target y", POOLED]
    assert found.main_test == POOLED
    assert found.figure("native", "target x", "miou").mean == 1.0
    assert found.figure("native", "target y", "miou").mean == pytest.approx((0 + 2 / 4) / 2)
    assert found.figure("native", POOLED, "miou").mean == pytest.approx((8 / 10 + 2 / 4) / 2)
    assert found.class_figures("native", POOLED, "recall")[2].mean == pytest.approx(0.5)


def test_figures_over_seeds_are_mean_and_sample_deviation() -> None:
    good, poor = [[0, 0, 0], [0, 4, 0], [0, 0, 4]], [[0, 0, 0], [0, 4, 0], [0, 4, 0]]
    found = result({"source": good}, {"source": poor}, {"source": poor})
    accuracy = found.figure("native", "source", "overall_accuracy")
    assert accuracy.values == (1.0, 0.5, 0.5)
    assert accuracy.mean == pytest.approx(2 / 3)
    assert accuracy.deviation == pytest.approx(math.sqrt((1 / 9 + 1 / 36 + 1 / 36) / 2))
    assert accuracy.percent() == "66.7 ± 28.9"
    assert Figure((0.5,)).percent() == "50.0"
    assert Figure((0.5,)).deviation is None
    assert Figure((math.nan, 0.5, 0.5)).percent() == "50.0 ± 0.0"
    assert Figure((math.nan,)).percent() == "-"
    assert Figure((math.nan,)).as_dict() == {"mean": None, "deviation": None, "values": [None]}


def test_the_published_protocol_averages_over_true_classes_at_the_models_size() -> None:
    matrix = {"source": [[0, 0, 0], [2, 4, 2], [0, 0, 0]]}  # b does not occur
    proper, official = result(matrix), result(matrix, protocol="official")
    assert proper.headline == "native"
    assert official.headline == "model"
    assert proper.figure("native", "source", "miou").mean == pytest.approx((4 / 8 + 0) / 2)
    assert official.figure("model", "source", "miou").mean == pytest.approx(4 / 6)
    assert any("also chooses the checkpoint on the target" in line for line in rules(official))


def test_published_figures_are_of_known_tasks() -> None:
    assert set(FIGURES) <= set(task_names())
    assert published("WS-WD") == "SpectralX 15.6"
    assert published("folder") == "-"


def test_a_table_in_every_format() -> None:
    table = Table(["class", "x|y"], [["a<b", "1"], ["c,d", "22"]], "caption & more")
    assert table.markdown().splitlines()[2:] == [
        "| class | x\\|y |", "| --- | ---: |", "| a<b | 1 |", "| c,d | 22 |",
    ]  # fmt: skip
    assert list(csv.reader(table.csv().splitlines())) == [
        ["class", "x|y"],
        ["a<b", "1"],
        ["c,d", "22"],
    ]
    assert table.plain().splitlines()[-1] == "c,d     22"
    page = StrictPage(table.html())
    assert {"a<b", "caption & more"} <= set(page.texts)
    with pytest.raises(ValueError, match="found 1 cells"):
        Table(["a", "b"], [["1"]])


def test_a_page_escapes_what_it_shows() -> None:
    page = Page("<script>alert(1)</script>")
    page.text("a & b")
    page.items(["<b>", "c"])
    shown = StrictPage(page.html())
    assert "<script>alert(1)</script>" in shown.texts
    assert {"a & b", "<b>"} <= set(shown.texts)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def fill(text: str, fails: bool = False) -> None:
        with write_folder(out, "marker") as folder:
            (folder / "marker").write_text(text)
            if fails:
                raise RuntimeError("no")

    fill("first")
    with pytest.raises(RuntimeError):
        fill("second", fails=True)
    assert (out / "marker").read_text() == "first"
    fill("third")
    assert (out / "marker").read_text() == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "marker").rename(out / "own")
    with pytest.raises(InputError, match="found other files"):
        fill("fourth")
    assert (out / "own").read_text() == "third"


def save_untrained(settings: Settings, folder: Path) -> Path:
    """An untrained segmentation, saved as training saves one."""
    torch.manual_seed(settings.seed)
    data = TaskData(settings.data, settings.stage2.run)
    model = segmentation_model(settings, data.task.wavelengths, data.task.num_classes)
    return checkpoints.save(
        folder / "stage2" / "best",
        model,
        wavelengths=list(data.task.wavelengths),
        class_names=list(data.task.class_names),
        normalisation=describe_normalisation(data.task.train),
        extra={"stage": "stage2", "settings": settings.as_dict(), "step": 4},
    )


@pytest.fixture(scope="module")
def experiments(tiny_scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of one experiment below one folder. Its images are half as large as its files."""
    root = tmp_path_factory.mktemp("experiments")
    for seed in (1, 0):
        options = ["--data.image_size=16", "--model.adapter=lora", f"--seed={seed}"]
        save_untrained(tiny_settings(tiny_scenes, root, *options), root / f"seed{seed}")
    return root


def test_seeds_are_scored_at_both_sizes_and_reported(experiments: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    options = ["--checkpoint", str(experiments), "--out", str(out), "--pictures", "1"]
    assert main([*options, "--device", "cpu"]) == 0
    kept = json.loads((out / "results.json").read_text())
    (task,) = kept["tasks"]
    assert [seed["seed"] for seed in task["seeds"]] == [0, 1]
    assert task["native_sizes"] == [[32, 32]]
    assert task["image_size"] == [16, 16]
    # The same as loading by hand: labels at the files' size, and resized as the paper's code does.
    for position, seed in enumerate((0, 1)):
        model = checkpoints.load(experiments / f"seed{seed}" / "stage2" / "best").build()
        assert isinstance(model, Segmentation)
        for size, official in (("native", False), ("model", True)):
            settings = tiny_settings(
                Path(task_root(experiments)), tmp_path, "--data.image_size=16",
                f"--data.official={str(official).lower()}",
            )  # fmt: skip
            scores = run_tests(model, TaskData(settings.data, settings.stage2.run)).scores
            for test in ("source", "target"):
                matrix = torch.tensor(task["confusion"][size][test][position])
                assert torch.equal(matrix, scores[test].matrix)
                own = task["overall"][size][test]["miou"]["values"][position]
                assert own == pytest.approx(scores[test].miou)
    report = (out / "report.html").read_text()
    page = StrictPage(report)
    assert page.fetched == []
    assert len(page.images) == 4  # confusion and predictions of source and target
    for words, png in page.images:
        assert imread(BytesIO(png), format="png").shape[1] > 300, words
    figure = task["overall"]["native"]["target"]["miou"]
    text = f"{100 * figure['mean']:.1f} ± {100 * figure['deviation']:.1f}"
    assert text in page.texts
    assert text in (out / "report.md").read_text()
    assert "SpectralX 15.6" in page.texts
    assert "paddy field" in page.texts
    rows = list(csv.DictReader((out / "classes.csv").open()))
    assert len(rows) == 2 * 2 * 2 * (len(task["class_names"]) - 1)
    confusion = out / "WS-WD" / "confusion"
    assert (confusion / "target-native.png").is_file()
    table = list(csv.reader((confusion / "target-model-seed1.csv").open()))
    assert table[0][1:] == task["class_names"]
    assert [[int(x) for x in row[1:]] for row in table[1:]] == task["confusion"]["model"]["target"][
        1
    ]


def task_root(experiments: Path) -> str:
    """Where the data of `experiments` are."""
    found = Trained.read(experiments / "seed0" / "stage2" / "best")
    return found.settings.data.root


def test_checkpoints_that_do_not_belong_together_are_refused(experiments: Path) -> None:
    first, second = (Trained.read(path) for path in find_checkpoints([experiments]))
    assert first.settings.seed == 0
    with pytest.raises(InputError, match="found seed 0, which"):
        by_task([first, first], None)
    model = dataclasses.replace(second.settings.model, adapter="slr")
    other = dataclasses.replace(second, settings=dataclasses.replace(second.settings, model=model))
    with pytest.raises(InputError, match=r"found model.adapter 'slr'; expected 'lora'"):
        by_task([first, other], None)
    with pytest.raises(InputError, match="found none trained on WD-WS, spring"):
        by_task([first, second], "all")


def test_a_report_that_fails_leaves_nothing(experiments: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "report"
    options = ["--checkpoint", str(experiments), "--out", str(out)]
    assert main([*options, "--root", "nowhere"]) == 2
    assert "nowhere: found no such folder" in capsys.readouterr().err
    assert main([*options, "--root", "whu=somewhere"]) == 2
    assert "found data set 'whu'; expected one of whu-ohs" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_all_eight_tasks_in_one_call(tiny_scenes: Path, tmp_path: Path, capsys: Any) -> None:
    roots = {"whu-ohs": tiny_scenes}
    for layout in ("dfc2020", "mts12"):
        roots[layout] = tmp_path / layout
        write_scenes(layout, roots[layout], size=32, count=5, progress=False)
    for name, tasks in DATA_SETS.items():
        for task in tasks[:-1]:
            options = [f"--data.task={task}", "--data.image_size=16", "--model.adapter=ia3"]
            settings = tiny_settings(roots[name], tmp_path / "runs", *options)
            save_untrained(settings, tmp_path / "runs" / task)
    found = evaluate_tasks(
        [tmp_path / "runs"],
        task="all",
        roots=[f"{name}={root}" for name, root in roots.items()],
        protocol="official",
        progress=False,
        device="cpu",
    )
    assert tuple(result.task for result in found) == GAP_TASKS
    assert len(GAP_TASKS) == 8
    autumn = found[GAP_TASKS.index("autumn")]
    assert autumn.targets == ["target spring", "target summer", "target winter"]
    assert autumn.class_names[1] == "forest"
    assert all(result.figure("model", result.main_test, "miou").mean >= 0 for result in found)


def test_confusion_has_names() -> None:
    text = confusion_csv(torch.tensor([[0, 0], [3, 4]]), ["unlabelled", "water, still"])
    assert list(csv.reader(text.splitlines()))[2] == ["water, still", "3", "4"]
