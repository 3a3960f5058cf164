"""Card and page of a real run: lines work when copied, `hfft report` renders them anew, and nothing else changes."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import warm
from huggingface_hub import ModelCard
from pages import Page
from PIL import Image

import hfft
from hfft.cli import main
from hfft.report.card import REPOSITORY

NASTY = "b|ee `x` <i> #"
RECIPE = """
name: bugs
model: {checkpoint: vit}
data: {source: photos}
license: Apache-2.0
widget: 3
training: {per_device_train_batch_size: 8, dataloader_num_workers: 0, num_train_epochs: 1, disable_tqdm: true}
precision: float32
replay: {mode: "off"}
phases:
  - {name: head, learning_rate: 1.0e-2}
  - {name: lora, adapter: {}, learning_rate: 1.0e-3}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two runs over the same photos: one ends in a model, the other in an adapter."""
    home = tmp_path_factory.mktemp("report")
    for split, count in (("train", 6), ("validation", 2), ("test", 3)):
        for number, name in enumerate(("ant", NASTY, "猫")):
            folder = home / "photos" / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                color = [40, 40, 40 + 10 * k]
                color[number] = 200
                exif = Image.Exif()
                exif[0x010E] = "taken by alice"
                Image.new("RGB", (1200, 40), tuple(color)).save(folder / f"{k}.jpg", exif=exif, comment=b"alice too")
    tiny.save(home / "vit", "vit")
    (home / "recipe.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        hfft.finetune(hfft.load_recipe("recipe.yaml"))
        apart = ["name=apart", "phases.lora.adapter.merge=false"]
        hfft.finetune(hfft.load_recipe("recipe.yaml", apart))
    return home


@pytest.fixture
def runs(home, tmp_path):
    return shutil.copytree(home / "runs", tmp_path / "runs")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def card_of(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("result", ["bugs/model", "apart/adapter"])
def test_the_lines_of_the_card_work_when_copied(home, tmp_path, result):
    (lines,) = re.findall(r"```python\n(.*?)```", card_of(home / "runs" / result), re.DOTALL)
    assert len(lines.splitlines()) == 3
    picture = next((home / "photos/test/ant").iterdir())
    shutil.copy(picture, tmp_path / "image.jpg")
    code = lines.replace(REPOSITORY, str(home / "runs" / result))
    done = warm.run([sys.executable, "-c", code], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    best = hfft.Classifier.from_pretrained(home / "runs" / result)([picture])[0]
    (label,) = best.top
    assert label in done.stdout
    assert f"{best.top[label]:.3f}"[:4] in done.stdout


def test_the_card_holds_the_numbers_of_the_run(home):
    run = hfft.Run(home / "runs/bugs")
    card = ModelCard.load(run.model_dir / "README.md")
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found["accuracy"] == run.metrics["test"]["accuracy"]["value"]
    assert found["f1"] == run.metrics["test"]["macro_f1"]["value"]
    assert card.data.license == "apache-2.0"
    assert card.data.base_model is None  # a folder of this disk
    assert str(home) not in card.content
    assert "(lora on attention, then added to the weights)" in card.text


def test_the_stored_confusion_is_that_of_the_predictions(home):
    run = hfft.Run(home / "runs/bugs")
    for split, table in run.predictions.groupby("split"):
        counts = table.groupby(["label", "prediction"]).size()
        stored = run.metrics["confusion"][split]
        assert {(a, b): n for a, row in stored.items() for b, n in row.items()} == counts.to_dict()


def test_examples_are_small_and_tell_nothing_of_the_camera(home):
    model = home / "runs/bugs/model"
    widget = ModelCard.load(model / "README.md").data.to_dict()["widget"]
    assert [entry["example_title"] for entry in widget] == ["ant", NASTY, "猫"]
    for entry in widget:
        content = (model / entry["src"]).read_bytes()
        assert Image.open(io.BytesIO(content)).size == (512, 17)
        assert b"alice" not in content


@pytest.mark.parametrize("name", ["bugs", "apart"])
def test_report_renders_the_same_in_a_fresh_process(home, runs, name, hfft_command):
    shutil.copytree(home / "photos", runs.parent / "photos")  # of which the first training images are drawn
    before = contents(runs / name)
    result = runs / name / ("model" if name == "bugs" else "adapter")
    (result / "README.md").write_text("spoiled")
    (runs / name / "report.html").write_text("spoiled")
    for figure in (runs / name / "figures").iterdir():
        if figure.name != "first_batch.png":  # of the training, and never drawn again
            figure.unlink()
    shutil.rmtree(result / "figures")
    done = hfft_command("report", runs / name, fresh=True)
    assert done.returncode == 0, done.stderr
    assert contents(runs / name) == before
    written = [Path(line) for line in done.stdout.splitlines()]
    assert written[:2] == [result / "README.md", runs / name / "report.html"]
    assert sorted(written[2:]) == sorted((runs / name / "figures").iterdir())


def test_a_run_that_draws_nothing_is_drawn_later(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    assert main(["train", "recipe.yaml", "name=quiet", "report=false"]) == 0
    assert "`hfft report runs/quiet` makes them" in capsys.readouterr().err
    quiet, drawn = Path("runs/quiet"), Path("runs/bugs")
    assert not any((quiet / name).exists() for name in ("report.html", "figures", "mistakes", "model/figures"))
    assert "![" not in card_of(quiet / "model")
    assert hfft.Run(quiet).metrics["test"] == hfft.Run(drawn).metrics["test"]
    assert main(["report", str(quiet)]) == 0
    files = [{path.relative_to(run).as_posix() for path in run.rglob("*")} for run in (quiet, drawn)]
    assert files[0] == files[1]
    for name in ("figures/confusion_test.png", "figures/learning_curves.svg", "mistakes/mistakes.json"):
        assert (quiet / name).read_bytes() == (drawn / name).read_bytes()


def test_report_follows_the_numbers_that_are_stored(runs, capsys):
    path = runs / "bugs/metrics.json"
    metrics = json.loads(path.read_text())
    metrics["test"]["accuracy"]["value"] = 0.123456
    path.write_text(json.dumps(metrics))
    assert main(["report", str(runs / "bugs")]) == 0
    assert "**0.1235 (" in card_of(runs / "bugs/model")


def mistakes_of(run):
    return json.loads((run / "mistakes/mistakes.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["bugs", "apart"])
def test_a_run_ends_with_its_page_and_the_pictures_of_its_mistakes(home, name):
    run = hfft.Run(home / "runs" / name)
    page = Page.of((run.folder / "report.html").read_text(encoding="utf-8"))
    found, answers = mistakes_of(run.folder), run.predictions
    wrong = answers[(answers["split"] == "test") & (answers["label"] != answers["prediction"])]
    assert (found["images"], found["wrong"]) == (9, len(wrong))
    assert len(wrong) > 0
    worst = wrong.sort_values("probability", ascending=False)
    assert [one["file"] for one in found["shown"]] == worst["file"].tolist()
    for one, (_, row) in zip(found["shown"], worst.iterrows(), strict=True):
        assert one["label_probability"] == pytest.approx(row[f"probability {row['label']}"])
        assert one["probability"] == pytest.approx(row[f"probability {row['prediction']}"])
        assert Image.open(run.folder / "mistakes" / one["picture"]).size == (224, 7)
        assert Image.open(run.folder / "mistakes" / one["overlay"]).size == (32, 32)  # what the network sees
    assert found["block"].startswith("block ")
    assert len(page.all("img")) == 2 * len(wrong) + 1  # and the first training images
    assert str(home) not in page.words
    assert "alice" not in (run.folder / "report.html").read_text(encoding="utf-8")


def test_a_page_keeps_its_pictures_when_the_images_are_gone(runs, hfft_command):
    before = (runs / "bugs/report.html").read_bytes()
    assert hfft_command("report", runs / "bugs").returncode == 0  # in a folder where there is no `photos`
    assert (runs / "bugs/report.html").read_bytes() == before
    shutil.rmtree(runs / "bugs/mistakes")
    done = hfft_command("report", runs / "bugs")
    assert done.returncode == 0
    assert "data.source of " in done.stderr
    page = Page.of((runs / "bugs/report.html").read_text(encoding="utf-8"))
    assert len(page.all("img")) == 1  # the first training images, drawn when the run began
    assert (
        page.words.count("No picture: the images can't be read where the recipe says")
        == mistakes_of(runs / "bugs")["wrong"]
    )


def test_pictures_that_were_missing_are_looked_for_again(home, runs, monkeypatch):
    shutil.rmtree(runs / "bugs/mistakes")
    monkeypatch.chdir(home)
    assert main(["report", str(runs / "bugs")]) == 0
    assert contents(runs / "bugs/mistakes") == contents(home / "runs/bugs/mistakes")


def test_images_that_were_changed_are_not_shown_as_those_that_were_measured(home, runs, monkeypatch):
    shutil.copytree(home / "photos", runs.parent / "photos")
    shutil.rmtree(runs / "bugs/mistakes")
    monkeypatch.chdir(runs.parent)
    Image.new("RGB", (1200, 40)).save(Path("photos") / mistakes_of(home / "runs/bugs")["shown"][0]["file"])
    assert main(["report", str(runs / "bugs")]) == 0
    found = mistakes_of(runs / "bugs")
    assert {one["missing"] for one in found["shown"]} == {found["no_overlay"]}
    assert found["no_overlay"] == "the test images aren't those of the run any more"


def test_report_of_an_unfinished_run_or_none_is_a_bad_request(runs, capsys):
    (runs / "bugs/metrics.json").unlink()
    before = contents(runs)
    assert main(["report", str(runs / "bugs")]) == 2
    assert "this run is not finished; run its `hfft train` command again to continue it" in capsys.readouterr().err
    assert main(["report", str(runs)]) == 2
    assert "is no run folder" in capsys.readouterr().err
    assert contents(runs) == before


def test_the_example_in_the_docs_is_such_a_card(home):
    page = Path(__file__).parents[2] / "docs/example_card.md"
    text, made = page.read_text(encoding="utf-8"), card_of(home / "runs/bugs/model")
    titles = r"^## .*$"
    assert re.findall(titles, text, re.MULTILINE) == re.findall(titles, made, re.MULTILINE)
    figures = re.findall(r"\]\((example_card/.*?)\)", text)
    assert len(figures) == 3
    assert all((page.parent / figure).is_file() for figure in figures)
