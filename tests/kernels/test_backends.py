"""Choice of backends: what exists, what is forced, what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from spectralx_kernels import _backends, noisy_topk_gating, show_backends, use_backend


def test_show_backends_lists_every_operator(capsys: pytest.CaptureFixture[str]) -> None:
    text = show_backends()
    assert capsys.readouterr().out.strip() == text.strip()
    rows = [line.split()[0] for line in text.splitlines()]
    for operator in _backends.operators():
        assert operator in rows


def test_forced_backend_that_is_missing_raises() -> None:
    clean = torch.zeros(1, 2, 3)
    with use_backend("cuda"), pytest.raises(RuntimeError, match="backend 'cuda'"):
        noisy_topk_gating(clean, top_k=1)
    with use_backend("cuda", required=False):
        noisy_topk_gating(clean, top_k=1)
    with pytest.raises(ValueError, match="backend: got 'fast', expected one of eager"):
        noisy_topk_gating(clean, top_k=1, backend="fast")
    with pytest.raises(ValueError, match="backend: got 'fast'"), use_backend("fast"):
        pass


def test_argument_beats_context_beats_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRALX_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="cuda"):
        _backends.choose("noisy_topk_gating", "cpu")
    with use_backend("eager"):
        assert _backends.choose("noisy_topk_gating", "cpu") == "eager"
        with pytest.raises(RuntimeError, match="cuda"):
            _backends.choose("noisy_topk_gating", "cpu", "cuda")
    monkeypatch.setenv("SPECTRALX_BACKEND", "quick")
    with pytest.raises(ValueError, match="quick"):
        _backends.choose("noisy_topk_gating", "cpu")


def test_context_is_restored_after_an_error() -> None:
    before = _backends.choose("noisy_topk_gating", "cpu")
    with pytest.raises(KeyError), use_backend("eager"):
        raise KeyError
    assert _backends.choose("noisy_topk_gating", "cpu") == before


def test_works_and_says_so_once_without_the_extension() -> None:
    code = (
        "import sys; sys.modules['spectralx_kernels._C'] = None\n"
        "import torch, spectralx_kernels as sk\n"
        "print(sk.noisy_topk_gating(torch.zeros(1, 1, 3), top_k=1)[0].sum().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1.0"
    assert done.stderr.count("runs on 'eager' only") == 1
