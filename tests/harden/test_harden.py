"""What the hardening itself rests on: its registry, records, page and reading of sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.harden import accuracy, contract, mutations, page, record, routing
from tests.harden.draws import LAYOUTS, Draw, arrange, laid_out
from tests.harden.lock import locked
from tests.harden.operators import REGISTRY, missing
from tests.harden.parts import PARTS
from tests.harden.public import PUBLIC
from tests.harden.supply import unsafe_uses, without_hash


def test_every_operator_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing() == []
    assert PUBLIC.keys() == REGISTRY.keys()
    monkeypatch.delitem(REGISTRY, "aomoa")
    assert missing() == ["aomoa"]


def test_the_same_seed_draws_the_same() -> None:
    for entry in REGISTRY.values():
        one, two = (entry.draw(Draw(5)) for _ in range(2))
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_layouts_keep_values_and_change_strides() -> None:
    value = torch.arange(48.0).reshape(2, 3, 4, 2)
    strides = set()
    for layout in LAYOUTS:
        found = laid_out(value, layout)
        assert torch.equal(found, value)
        strides.add((found.stride(), found.storage_offset()))
    assert len(strides) == len(LAYOUTS)
    (leaf,) = arrange([value], ["every second"], torch.bfloat16, grad=True)
    assert leaf.is_leaf
    assert leaf.requires_grad
    assert not leaf.is_contiguous()


def test_a_wrong_operator_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 1, 3 and 4 see a kernel that aliases, is off by a part in a thousand, breaks ties."""
    number = next(n for n in range(27) if contract.case_of(n)[0].name == "add_weighted_halves")
    operator = REGISTRY["add_weighted_halves"].operator
    right = type(operator).__call__

    def off(self, *args, backend=None):
        out = right(self, *args, backend=backend)
        return out * 1.001 if self is operator and backend == "cpp" else out

    assert not accuracy.sample(number)[1]
    monkeypatch.setattr(type(operator), "__call__", off)
    assert any("output 0: error" in each for each in accuracy.sample(number)[1])

    gating = REGISTRY["noisy_topk_gating"].operator

    def last(self, *args, backend=None):
        out = right(self, *args, backend=backend)
        return (out[0].flip(-1), *out[1:]) if self is gating and backend == "cpp" else out

    monkeypatch.setattr(type(operator), "__call__", last)
    assert any("experts other than" in each for n in range(0, 36, 9) for each in
               routing.failures_of(n))  # fmt: skip


def test_a_sum_that_cancels_is_judged_by_its_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample 4240: -0.31 as a sum of 45 terms. Its order is free; a part in ten thousand is not."""
    entry = REGISTRY["batch_norm_relu"]
    operator = entry.operator
    monkeypatch.setattr(accuracy, "ENTRIES", (entry,) * 31)  # whatever the library has
    right = type(operator).__call__

    def off(self, x, moments, weight, *rest, backend=None):
        return right(self, x, moments, weight * 1.0001, *rest, backend=backend)

    assert not accuracy.sample(4240)[1]
    assert not accuracy.sample(30760)[1]  # so ill-conditioned that it says nothing
    monkeypatch.setattr(type(operator), "__call__", off)
    assert any("gradient of weight: error" in each for each in accuracy.sample(4240)[1])


def test_a_call_at_the_kink_of_a_relu_says_nothing() -> None:
    """One pixel of eight is zero but for round-off: its gradient is there or not."""
    x = torch.arange(1.0, 9.0, dtype=torch.float64).reshape(1, 1, 2, 4)
    args = [
        x,
        torch.tensor([[3.0], [1.0]]),
        torch.ones(1),
        torch.full((1,), 1e-9),
        0.0,
        True,
        False,
    ]
    call = accuracy.Call(
        REGISTRY["batch_norm_relu"], args, ["contiguous"] * len(args), accuracy.Kind(torch.float32)
    )
    name = "gradient of x"
    moved = call.moved[name]
    assert moved > 0.1
    assert call.says_nothing(name, moved, 3.0)
    assert not call.says_nothing(name, 4 * moved, 3.0)
    assert not call.says_nothing("output 0", 1e-5, 3.0)


def test_slices_add_up_and_replace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "FOLDER", tmp_path)
    part = PARTS["routing"]
    assert record.total("routing") is None
    assert page.verdict(part, None) == "not run"

    def outcome(count: int, ratio: float, *failures: str) -> record.Outcome:
        figures = {"worst ratio": {"a": ratio}, "read": count}
        return record.Outcome(count, list(failures), figures)

    record.append("routing", 0, 100, 1.0, outcome(100, 1.5))
    record.append("routing", 100, 50, 1.0, outcome(50, 1.0, "sample 120: wrong"))
    found = record.total("routing")
    assert found is not None
    assert (found.checked, found.figures) == (150, {"worst ratio": {"a": 1.5}, "read": 150})
    assert page.verdict(part, found) == "**failed**: 1 of 150"
    record.append("routing", 100, 50, 1.0, outcome(50, 1.0))
    assert page.verdict(part, record.total("routing")).startswith("partly run: 150 of 500")
    record.append("routing", 150, 350, 1.0, outcome(350, 1.0))
    assert page.verdict(part, record.total("routing")) == "passed: 500, 0 failures"
    record.append("routing", 0, 500, 1.0, outcome(500, 0.5))
    found = record.total("routing")
    assert found is not None
    assert found.figures["worst ratio"] == {"a": 0.5}
    text = page.text()
    assert "passed: 500, 0 failures" in text
    assert text.count("| not run |") == len(PARTS) - 1


def test_a_lock_is_what_pip_reports(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    digest = "ab" * 32

    def entry(name: str, **info: object) -> dict[str, object]:
        return {"metadata": {"name": name, "version": "1.0"}, "download_info": info}

    hashed = entry("Some_Package", archive_info={"hashes": {"sha256": digest}})
    report.write_text(json.dumps({"install": [hashed, entry("spectralx", dir_info={})]}))
    assert f"some-package==1.0 \\\n    --hash=sha256:{digest}\n" in locked(report)
    assert "spectralx" not in locked(report)
    report.write_text(json.dumps({"install": [entry("other", archive_info={})]}))
    with pytest.raises(ValueError, match=r"other 1\.0: no sha256"):
        locked(report)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("import pickle", "pickle"),
        ("from joblib import load", "joblib"),
        ("import torch\ntorch.load(x)", "torch.load without weights_only=True"),
        ("torch.load(x, weights_only=False)", "torch.load without weights_only=True"),
        ("from torch import load", "torch.load by a name of its own"),
        ("yaml.load(x)", "yaml.load"),
        ("from yaml import load", "yaml.load by a name of its own"),
        ("yaml.unsafe_load(x)", "yaml.unsafe_load"),
        ("eval(x)", "eval"),
        ("exec(x)", "exec"),
        ("np.load(x, allow_pickle=True)", "allow_pickle=True"),
        ("os.system(x)", "os.system through a shell"),
        ("subprocess.run(x, shell=True)", "subprocess.run through a shell"),
    ],
)
def test_unsafe_loading_is_found(text: str, what: str) -> None:
    assert what in [found for _, found in unsafe_uses(text)]


def test_safe_loading_is_not() -> None:
    assert not unsafe_uses(
        "torch.load(x, weights_only=True)\nyaml.safe_load(x)\nmodel.eval()\nnp.load(x)"
    )


def test_a_lock_without_a_hash_is_refused(tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text("a==1 \\\n    --hash=sha256:" + "0" * 64 + "\nb==2\n")
    assert without_hash(lock) == ["b: no hash"]
    lock.write_text("a>=1\n")
    with pytest.raises(ValueError, match="expected a pin or a hash"):
        without_hash(lock)


def test_every_planted_fault_has_its_place() -> None:
    """`python -m tests.harden mutations` runs them; here only that the list fits the sources."""
    found = mutations.faults()
    assert len(found) >= PARTS["mutations"].count
    assert len({fault["name"] for fault in found}) == len(found)
    for fault in found:
        text = (record.ROOT / fault["file"]).read_text()
        assert mutations.planted_in(text, fault) != text
        for test in fault["tests"]:
            assert not test.startswith("tests/") or (record.ROOT / test).exists()
    with pytest.raises(ValueError, match="0 places"):
        mutations.planted_in("", found[0])
