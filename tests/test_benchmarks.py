"""The benchmarks' own machinery: opponents, accuracy gate, turns, memory, floors, report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import dispatch, floors, report, shapes
from benchmarks.accuracy import by_part, compare, error
from benchmarks.bench_aomoa import weights
from benchmarks.case import Case, Draw, Runner, Setting, rotating
from benchmarks.clock import Replay, interleave
from benchmarks.harness import Budget, GroupKey, measure
from benchmarks.memory import SavedBytes, peak_bytes
from benchmarks.shapes import FORWARD, TRAINING, AomoaShape, Shape
from spectralx.decoder import ConvUnit, UPerNet
from spectralx_kernels import AoMoALinear, aomoa

ROOT = Path(__file__).parent.parent


# The per-expert opponent -------------------------------------------------------------------------


@pytest.mark.parametrize("with_noise", [True, False])
@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (4, 1), (3, 3), (1, 1)])
def test_dispatch_equals_the_reference(experts: int, top_k: int, with_noise: bool) -> None:
    shape = AomoaShape(
        name="", tokens=11, in_features=64, out_features=24, experts=experts, top_k=top_k
    )
    setting = Setting(dtype=torch.float64)
    results = []
    functions: tuple[Any, ...] = (aomoa, dispatch.aomoa)
    for function in functions:
        draw = Draw(setting, seed=3)
        frozen, trained = weights(shape, draw)
        for tensor in trained.values():
            tensor.requires_grad_()
        x = draw.normal(shape.tokens, shape.in_features).requires_grad_()
        noise = draw.normal(2, shape.tokens, experts) if with_noise else None
        out = function(x, **frozen, **trained, top_k=top_k, noise=noise)
        out = out if isinstance(out, Tensor) else out[0]
        out.backward(draw.normal(*out.shape))
        results.append([out.detach(), x.grad, *(tensor.grad for tensor in trained.values())])
    for exact, found in zip(*results, strict=True):
        # The opponent leaves parameters out that cannot matter (the noise gate without noise).
        found = torch.zeros_like(exact) if found is None else found
        torch.testing.assert_close(found, torch.zeros_like(found) if exact is None else exact)


def test_dispatch_counts_the_same_load() -> None:
    from spectralx_kernels import noisy_topk_gating

    draw = Draw(Setting(dtype=torch.float64), seed=5)
    z, gate, gate_noise = draw.normal(9, 8), draw.normal(8, 4), draw.normal(8, 4)
    noise = draw.normal(9, 4)
    gates, load = dispatch.route(z, gate, gate_noise, noise, 2)
    expected = noisy_topk_gating((z @ gate)[None], (z @ gate_noise)[None], noise[None], top_k=2)
    torch.testing.assert_close(gates, expected[0][0])
    torch.testing.assert_close(load, expected[1][0])


def test_whole_models_share_their_tensors_and_agree() -> None:
    from benchmarks.variants import with_dispatch, with_plain_decoder

    torch.manual_seed(0)
    model = UPerNet([16] * 4, 3, head_channels=8, dropout=0.0).eval()
    plain = with_plain_decoder(model)
    assert all(module.plain for module in plain.modules() if isinstance(module, ConvUnit))
    assert not any(module.plain for module in model.modules() if isinstance(module, ConvUnit))
    theirs = dict(plain.named_parameters())
    assert all(theirs[name] is tensor for name, tensor in model.named_parameters())
    features = [torch.randn(2, 16, 4, 4) for _ in range(4)]
    torch.testing.assert_close(plain(features), model(features))

    adapted = nn.Sequential(AoMoALinear(nn.Linear(64, 32)))
    dispatched = with_dispatch(adapted)
    x = torch.randn(5, 64)
    outputs = []
    for layer in (adapted, dispatched):
        torch.manual_seed(1)
        outputs.append(layer(x))
    torch.testing.assert_close(*outputs)


# No number without agreement ---------------------------------------------------------------------


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return grad @ weight.t(), 1.001 * x.t() @ grad


def _build(shape: Shape, mode: str, setting: Setting) -> Case:
    draw = Draw(setting, seed=0)
    weight = draw.normal(32, 24).requires_grad_(mode != FORWARD)

    def reference(x: Tensor) -> Tensor:
        return x @ weight

    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("this one cannot run")

    wrong_output = (lambda x: reference(x) * 1.001) if mode == FORWARD else fail
    return Case(
        functions={
            "eager": reference,
            "fused": reference,
            "dispatch": wrong_output,
            "compile": lambda x: _WrongGradient.apply(x, weight),
        },
        inputs=rotating(setting, lambda: (draw.normal(16, 32).requires_grad_(mode != FORWARD),)),
        parameters={"weight": weight},
        floor=lambda: {"products": lambda: None, "copy": lambda: sum(range(20000))},
        linear=lambda x: x @ weight.detach(),
    )


@pytest.mark.parametrize("mode", [FORWARD, TRAINING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_implementation_gets_no_number(mode: str, dtype: torch.dtype) -> None:
    shape = Shape(name="x")
    names = ("fused", "eager", "dispatch", "compile", "floor")
    rows = measure(_build, shape, mode, Setting(dtype=dtype), names, Budget(0.0, (3, 3)))
    assert [len(rows[name].samples) for name in ("fused", "eager", "floor")] == [3, 3, 3]
    if mode == TRAINING:
        assert "this one cannot run" in rows["dispatch"].refused
        assert not rows["dispatch"].samples
    if dtype == torch.float32:
        refused = "compile" if mode == TRAINING else "dispatch"
        what = "gradient of weight: error" if mode == TRAINING else "output 0: error"
        assert what in rows[refused].refused
        assert not rows[refused].samples
    assert rows["fused"].facts["error"] < 1e-2
    assert rows["floor"].facts["floor"] == "copy"
    assert set(rows["floor"].facts) == {"floor", "products_ms", "copy_ms", "linear_ms"}


def test_errors_are_seen() -> None:
    exact = torch.arange(1.0, 9.0)
    assert error(exact, exact) == 0
    assert error(exact.clone().fill_(torch.nan), exact) == float("inf")
    assert error(exact[:4], exact) == float("inf")
    assert error(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.25

    truth = {"output 0": exact, "gradient of a.b": exact, "gradient of a.c": 1e-9 * exact}
    assert all(each.holds for each in compare(truth, truth, truth, torch.float32))
    # A gradient that is nothing but round-off is measured against the others.
    noise = {**truth, "gradient of a.c": -1e-9 * exact}
    assert all(each.holds for each in compare(noise, truth, truth, torch.float32))
    lacking = {"output 0": exact, "gradient of a.b": exact, "gradient of d": exact}
    wrong = [each.name for each in compare(lacking, truth, truth, torch.float32) if not each.holds]
    assert wrong == ["gradient of d (unexpected)", "gradient of a.c (missing)"]
    assert by_part(truth).keys() == {"output 0", "gradient of a"}


# Taking turns ------------------------------------------------------------------------------------


def test_implementations_take_turns() -> None:
    calls: list[tuple[str, int]] = []
    runs = {
        name: lambda turn, name=name: calls.append((name, turn))  # type: ignore[misc]
        for name in "abc"
    }
    spent = iter(range(100))

    def stopwatch(run: Any) -> float:
        run()
        return float(next(spent)) / 1e3

    samples = interleave(runs, stopwatch, seconds=0.012, rounds=(1, 9))
    # A warm-up round of 0 + 1 + 2 ms gives 4 rounds; each begins with the next name.
    assert [name for name, _ in calls] == list("abcbcacababcbca")
    assert [turn for _, turn in calls] == list(range(15))
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 4, "b": 4, "c": 4}
    assert samples["b"] == [0.003, 0.008, 0.010, 0.012]


def test_slow_rounds_count_from_the_first() -> None:
    samples = interleave({"a": lambda turn: None}, lambda run: 11.0, seconds=1.0, rounds=(3, 9))
    assert samples == {"a": [11.0, 11.0]}


def test_replay_hands_over_the_samples() -> None:
    replay, found = Replay(), []
    replay.load([0.5, 0.25, 2.0])
    for _ in range(3):
        begin = replay.interleaved_samples()
        replay.advance()
        found.append(replay.interleaved_samples() - begin)
    assert found == [0.5, 0.25, 2.0]


# Memory, inputs, floors --------------------------------------------------------------------------


def test_saved_bytes_leave_out_inputs_and_count_storages_once() -> None:
    x, weight = torch.randn(8, 16, requires_grad=True), torch.randn(16, 4, requires_grad=True)
    with SavedBytes([x, weight]) as saved:
        hidden = (x @ weight).exp()  # keeps its output
        out = hidden * hidden  # keeps the same tensor twice
    assert saved.bytes == 8 * 4 * 4
    out.sum().backward()


def test_peak_bytes_on_a_cpu() -> None:
    def run() -> None:
        first = torch.ones(1000, 250)
        second = first + 1
        del first
        second.add_(1)

    # Two maps, and a few bytes of scalars.
    assert 0 <= peak_bytes(run, "cpu") - 2 * 1000 * 250 * 4 < 100


def test_inputs_rotate_and_are_never_zero() -> None:
    setting = Setting()
    draw = Draw(setting, seed=0)
    sets = rotating(setting, lambda: (draw.normal(4, 5),))
    assert len(sets) == 16
    assert all(bool((tensor != 0).all()) for (tensor,) in sets)
    assert len({tuple(tensor.flatten().tolist()) for (tensor,) in sets}) == 16
    assert len(rotating(setting.exact(), lambda: (draw.normal(4, 5),))) == 1

    layer = draw.fill(AoMoALinear(nn.Linear(64, 32)))
    assert all(bool((tensor != 0).any()) for tensor in layer.parameters())

    # The float64 twin holds the rounded values.
    narrow = Setting(dtype=torch.bfloat16)
    twin = Draw(narrow.exact(), seed=1).normal(7)
    assert torch.equal(Draw(narrow, seed=1).normal(7).double(), twin)


def test_runner_names_outputs_and_gradients() -> None:
    case = _build(Shape(name="x"), TRAINING, Setting())
    found = Runner(case, TRAINING, Setting()).results(case.functions["eager"])
    assert found.keys() == {"output 0", "gradient of input 0", "gradient of weight"}


def test_floors_count_the_work() -> None:
    fc1 = shapes.find(shapes.AOMOA, "fc1-vitl-b2")
    operations = {mode: sum(p.operations for p in floors.aomoa(fc1, mode)) for mode in shapes.MODES}
    frozen = 2 * 394 * 1024 * 4096
    low_rank = 2 * 788 * (512 * 128 + 128 * 2048 + 2 * 2 * 128 * 16)
    assert operations[FORWARD] == frozen + low_rank
    assert operations[TRAINING] == 2 * frozen + 3 * low_rank
    # The nine products on the small map: a sixteenth of the convolution of the large one.
    conv = shapes.find(shapes.UPSAMPLE_CONV, "neck-14-56-b1")
    (nine,) = floors.upsample_conv(conv, FORWARD)
    assert nine.operations * 16 == 2 * 56 * 56 * 1024 * 1024 * 9
    # One ViT-L/16 block of the step: 12 D^2 a token, forward and to the input.
    layers = floors.block(197, 1024, 16, batch=2)
    assert sum(p.operations for p in layers if p.batch == 1) == 2 * 2 * 197 * 12 * 1024**2
    made = floors.floor_of([floors.Product(3, 4, 5, batch=2, count=3)], 60, Setting())
    assert made.keys() == {"products", "copy"}
    for run in made.values():
        run()


# The registry ------------------------------------------------------------------------------------


def test_the_registry_covers_every_operator() -> None:
    for op, all_shapes in shapes.SHAPES.items():
        names = [shape.name for shape in all_shapes]
        assert len(set(names)) == len(names)
        assert not any("/" in name for name in names)
        assert any(shape.small for shape in all_shapes)
        assert all(shape.small or shape.full for shape in all_shapes)
        rows = {
            impl
            for shape in shapes.selected(op, full=False)
            for mode in shape.modes
            for impl in shapes.implementations(op, shape, mode, full=False)
        }
        assert rows >= {"fused", "eager", "floor"}
        assert ("compile" in rows) == (op != "step")
        assert ("dispatch" in rows) == (op in ("aomoa", "step"))
    assert all(shape.name.startswith(("fc1", "fc2")) for shape in shapes.AOMOA)
    full = shapes.implementations("aomoa", shapes.AOMOA[0], FORWARD, full=True)
    assert full == shapes.IMPLEMENTATIONS
    assert str(GroupKey("aomoa", "fc1-vitl-b2", FORWARD, "float32")) == (
        "aomoa/fc1-vitl-b2/fwd/float32"
    )
    with pytest.raises(ValueError, match="shape: got 'no', expected one of fc1-vitl-b2"):
        shapes.find(shapes.AOMOA, "no")


# The report --------------------------------------------------------------------------------------

FACTS = {"device": "A CPU (R) 3.0", "device_type": "cpu", "threads": 2, "torch": "2.13",
         "python": "3.12", "spectralx_kernels": "0.1", "commit": "abc"}  # fmt: skip


def _recorded(rows: dict[tuple[str, str], tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    return {
        "datetime": "2026-01-02T03:04:05.6+00:00",
        "machine_info": {"node": "secret-host"},
        "benchmarks": [
            {
                "group": group,
                "params": {"impl": impl},
                "stats": {"median": milliseconds / 1e3, "data": [milliseconds / 1e3] * 3},
                "extra_info": {**FACTS, **facts},
            }
            for (group, impl), (milliseconds, facts) in rows.items()
        ],
    }


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide, narrow = "aomoa/fc1-vitl-b2/fwd+bwd/float32", "aomoa/fc1-vitl-b2/fwd+bwd/bfloat16"
    file = tmp_path / "run.json"
    file.write_text(
        json.dumps(
            _recorded(
                {
                    (wide, "fused"): (10.0, {"saved_bytes": 2**20, "peak_bytes": 3 * 2**20}),
                    (wide, "eager"): (25.0, {"saved_bytes": 8 * 2**20}),
                    (wide, "dispatch"): (30.0, {"saved_bytes": 2**24}),
                    (wide, "floor"): (8.0, {"linear_ms": 5.0}),
                    (narrow, "fused"): (4.0, {}),
                    (narrow, "eager"): (6.0, {}),
                    ("match/spatial-b2/fwd/float32", "fused"): (1.0, {}),
                }
            )
        )
    )
    assert report.main([str(file), "--out", str(tmp_path / "results")]) == 0
    printed = capsys.readouterr().out
    assert "A CPU (R) 3.0, 2 threads, torch 2.13" in printed

    groups, facts = report.load(file)
    assert [group.name for group in groups] == [wide, narrow, "match/spatial-b2/fwd/float32"]
    assert facts["date"] == "2026-01-02 03:04:05"
    header, *rows = report.table(groups)
    first = dict(zip(header, rows[0], strict=True))
    assert first["fused ms"] == "10.00"
    assert (first["eager/fused"], first["dispatch/fused"]) == ("2.50", "3.00")
    assert (first["fused/floor"], first["fused/linear"]) == ("1.25", "2.00")
    assert (first["saved MiB fused"], first["saved MiB dispatch"]) == ("1.0", "16.0")
    assert "compile ms" not in first  # not a single number
    second = dict(zip(header, rows[1], strict=True))
    assert second["float32 dispatch/fused"] == "7.50"
    assert second["fused/floor"] == ""

    page = tmp_path / "results" / "a-cpu-r-3-0-2-threads.md"
    text = page.read_text()
    assert "## aomoa" in text
    assert "- commit: abc" in text
    assert f"| {wide} | 10.00 | 25.00 | 30.00 |" in text
    kept = page.with_suffix(".json")
    assert "secret-host" not in kept.read_text()
    # What is kept reads like the run.
    assert report.table(report.load(kept)[0]) == [header, *rows]


def test_report_refuses_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {"no.json": None, "bad.json": "{", "list.json": "[]", "none.json": '{"benchmarks": []}'}
    for name, text in texts.items():
        file = tmp_path / name
        if text is not None:
            file.write_text(text)
        assert report.main([str(file), "--out", str(tmp_path / "out")]) == 2
        message = capsys.readouterr().err
        assert message.startswith(str(file))
        assert "expected a file that --benchmark-json wrote" in message
        assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


# Through pytest ----------------------------------------------------------------------------------


def test_a_group_through_pytest(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [
        sys.executable, "-m", "pytest", "benchmarks/bench_match.py", "-q", "-k",
        "spatial and (fused or floor)", f"--benchmark-json={out}",
    ]  # fmt: skip
    # A worker of parallel tests would pass its role on, and benchmarks do not run inside one.
    environment = {key: value for key, value in os.environ.items() if "XDIST" not in key}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(out.read_text())["benchmarks"]
    assert [row["params"]["impl"] for row in written] == ["fused", "floor"]
    for row in written:
        assert row["group"] == "match/spatial-b2/fwd/float32"
        assert row["stats"]["rounds"] == len(row["stats"]["data"]) >= 3
        assert row["extra_info"]["threads"] >= 1
        assert row["options"]["timer"] == "interleaved_samples"
    assert written[0]["extra_info"]["peak_bytes"] > 0
