"""Every command of the README is known here, and executed or planned; what the text claims of files is true."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import tiny

import hfft
from hfft.cli import main
from hfft.recipe.spec import ReplaySpec

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    lines = [line.partition("   #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture
def workplace(tmp_path, photos, monkeypatch):
    """A tiny checkpoint and few photos where the README expects the real ones."""
    photos({f"{split}/{name}": 6 for split in ("train", "validation", "test") for name in ("rose", "tulip")})
    photos({"a": 1, "b": 1}, name="new_photos")
    (tmp_path / "new_photos" / "a" / "000.png").rename(tmp_path / "new_photos" / "0.jpg")
    tiny.save(tmp_path / "checkpoints/efficientnet_lite0", "convnext", depths=[1, 1, 2, 2])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "elpv").symlink_to(tmp_path / "photos")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_line_of_hfft_runs(workplace, capsys):
    lines = [shlex.split(line)[1:] for line in commands() if line.startswith("hfft ")]
    assert len(lines) == 11
    for line in lines:
        few = ["training.per_device_train_batch_size=1"] if "--processes" in line else []  # images stand in for more
        assert main([*line, *few]) == 0, (line, capsys.readouterr().err)


def test_the_other_commands_name_scripts_that_exist_and_recipes_that_load():
    others = [line for line in commands() if not line.startswith("hfft ")]
    assert len(others) == 4
    for line in others:
        words = shlex.split(line)
        for path in (word for word in words if "/" in word):
            assert (ROOT / path).is_file(), line
        for recipe in (word for word in words if word.startswith("recipes/") and "accelerate/" not in word):
            hfft.load_recipe(ROOT / recipe)
        if words[0] == "bash":
            subprocess.run(["bash", "-n", str(ROOT / words[1])], check=True)


def test_the_recipe_in_the_readme_is_planned(workplace, tmp_path):
    recipe, replay = blocks("yaml")
    (tmp_path / "flowers.yaml").write_text(recipe + replay)
    assert hfft.load_recipe(tmp_path / "flowers.yaml").replay == ReplaySpec()  # they are called the defaults
    small = [f"model.checkpoint={tmp_path / 'vit'}", "phases.last-blocks.unfreeze={blocks: 2}"]
    tiny.save(tmp_path / "vit", "vit")
    assert main(["plan", "flowers.yaml", *small]) == 0


@pytest.mark.slow
def test_the_python_lines_run(workplace, capsys):
    (block,) = blocks("python")
    image = next((workplace / "photos/test/rose").iterdir())
    image.rename(workplace / "cell.png")
    exec(compile(block, "README.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "'value'" in shown
    assert "Prediction(file='cell.png'" in shown


def test_the_families_are_those_that_the_tests_build():
    section = README.partition("## Which checkpoints")[2]
    (rows,) = re.findall(r"^`[^\n]+`\n\n", section.replace("`\n`", "` `"), re.MULTILINE)
    listed = re.findall(r"`([^`]+)`", rows)
    assert sorted(listed) == sorted({name.partition("+")[0] for name in tiny.CONFIGS} - {"timm_wrapper"})
    assert f"these {len(listed)} families" in section.replace("\n", " ")
