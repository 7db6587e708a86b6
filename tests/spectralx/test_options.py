from __future__ import annotations

from pathlib import Path

import pytest

from spectralx.cli import InputError
from spectralx.options import (
    find_config,
    load_settings,
    make_parser,
    packaged_configs,
    parse_settings,
    settings_from_dict,
)
from spectralx.settings import Settings


def test_options_override_the_file_wherever_they_stand(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("data: {root: here, image_size: 64}\nstage2: {optimizer: {lr: 1e-5}}\n")
    argv = ["--data.root", "there", "--config", str(config), "--stage1.run.steps=7"]
    settings, _ = parse_settings(make_parser("test"), argv)
    assert settings.data.root == "there"
    assert settings.data.image_size == 64
    assert settings.stage1.run.steps == 7
    assert settings.stage2.optimizer.lr == 1e-5
    assert settings.stage2.optimizer.betas == (0.9, 0.95)


def test_later_files_override_earlier_ones(tmp_path: Path) -> None:
    for name, text in (("a", "seed: 1\nout: a"), ("b", "seed: 2")):
        (tmp_path / f"{name}.yaml").write_text(text)
    argv = [f"--config={tmp_path / name}.yaml" for name in "ab"]
    settings, _ = parse_settings(make_parser("test"), argv)
    assert (settings.seed, settings.out) == (2, "a")


def test_defaults_are_the_papers() -> None:
    settings = load_settings()
    assert settings == Settings()
    assert settings.stage1.optimizer.schedule == "plateau"
    assert settings.stage2.optimizer.schedule == "constant"
    for stage in (settings.stage1, settings.stage2):
        assert stage.optimizer.lr == 1e-4
        assert stage.optimizer.betas == (0.9, 0.95)
        assert stage.optimizer.weight_decay == 1e-4


@pytest.mark.parametrize("name", packaged_configs())
def test_packaged_configurations_load(name: str) -> None:
    settings = load_settings(name)
    assert settings == load_settings(f"{name}.yaml")
    assert settings.out.startswith("runs/")
    assert settings_from_dict(settings.as_dict(), "test") == settings


def test_every_packaged_configuration_is_described() -> None:
    described = find_config("quickstart").with_name("README.md").read_text()
    assert [name for name in packaged_configs() if f"`{name}.yaml`" not in described] == []
    assert len(packaged_configs()) >= 11


def test_a_file_goes_before_a_packaged_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "quickstart.yaml").write_text("seed: 5")
    monkeypatch.chdir(tmp_path)
    assert load_settings("quickstart.yaml").seed == 5
    assert load_settings("quickstart").seed == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {rot: x}", "found unknown key data.rot; expected one of root"),
        ("dta: {}", "found unknown key dta; expected one of data"),
        ("stage1: {optimizer: {lr: fast}}", "stage1.optimizer.lr: found fast; expected float"),
        ("data: {scaling: 3", "not YAML: "),
        ("true: false", "found unknown key True; expected one of"),
        ("{a: " * 5000, "found YAML nested too deeply; expected settings"),
        ("", "found nothing as the whole; expected keys"),
        ("data: 3", "found 3 as data; expected keys"),
        ("model: {embed_dim: 10, num_heads: 3}", "model.embed_dim: found 10; expected a multiple"),
        ("model: {depth: 4, feature_blocks: [1, 2, 3, 4]}", "model.feature_blocks: found"),
    ],
)
def test_mistakes_in_a_file_name_it(tmp_path: Path, text: str, message: str) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text(text)
    with pytest.raises(InputError) as error:
        load_settings(config)
    assert message in str(error.value)
    assert str(config) in str(error.value) or text.startswith("model")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data.rot=1"], "found unknown option --data.rot; expected one of --data.root"),
        (["--seed", "x"], "seed: found x; expected int"),
        (["--stage2.optimizer.lr=-1"], "optimizer.lr: found -1.0; expected a positive number"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such configuration; expected a YAML"),
        (["--config"], "--config: found nothing; expected a file"),
        (["--stage1.run.steps=0"], "run.steps: found 0; expected at least 1"),
        (["--stage2.cutmix=2"], "stage2.cutmix: found 2.0; expected 0 to 1"),
        (["--stage2.decoder_kernel=3"], "stage2.decoder_kernel: found 3; expected an odd number"),
        (
            ["--stage2.decoder=linear", "--stage2.neck_channels=8"],
            "stage2.neck_channels: found 8; expected null",
        ),
        (["--stage1.optimizer.warmup=3"], "optimizer.warmup: found 3; expected 0 with"),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], message: str) -> None:
    with pytest.raises(InputError) as error:
        parse_settings(make_parser("test"), argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
