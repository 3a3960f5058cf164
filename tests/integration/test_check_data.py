import json
import shutil

import hostile
import pytest
import tiny

from hfft.cli import main


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def check(capsys):
    def run(*arguments):
        code = main(["check-data", *map(str, arguments)])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return code, captured.out, captured.err

    return run


def test_a_clean_folder(tmp_path, check):
    hostile.make_clean(tmp_path / "photos")
    code, out, _ = check("photos")
    assert code == 0
    assert out.endswith("72 images, nothing found\n")
    assert [line.split() for line in out.splitlines()[1:4]] == [
        [split, str(3 * count), "3", "96", "x", "80", "96", "x", "80", "96", "x", "80"]
        for split, count in sorted(hostile.SPLITS.items())
    ]


def test_a_warning_is_not_nothing(photos, check):
    photos({f"{site}/{name}": 5 for site in ("north", "south") for name in ("cat", "dog")})
    code, out, err = check("photos")
    assert code == 0
    assert out.endswith("20 images, no findings; see the warnings above: 1\n")
    (warning,) = json.loads(check("photos", "--json")[1])["warnings"]
    assert warning in err


def test_a_hostile_folder_in_a_real_process(tmp_path, hfft_command):
    expected = hostile.make_hostile(tmp_path / "photos")
    done = hfft_command("check-data", "photos", "--max-shown", "0", fresh=True)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    for kind, files in expected:
        assert f"\n{kind} (" in done.stdout
        assert all(file in done.stdout for file in files)
    done = hfft_command("check-data", "photos", "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert {(one["kind"], frozenset(one["files"])) for one in found["findings"]} == expected
    assert {one["severity"] for one in found["findings"]} == {"harm", "note"}
    assert found["splits"]["train"]["images"] == sum(found["splits"]["train"]["counts"].values())


def test_notes_alone_are_no_failure(tmp_path, check):
    hostile.make_hostile(tmp_path / "photos", {name: hostile.ODD[name] for name in ("one pixel", "extra bytes")})
    code, out, _ = check("photos")
    assert code == 0
    assert "72" not in out.splitlines()[-1]
    assert out.endswith("74 images; findings that stop training or spoil its numbers: 0, to know of: 2\n")


def test_as_many_findings_as_were_asked_for(tmp_path, check):
    hostile.make_hostile(tmp_path / "photos", hostile.BROKEN)
    _, out, _ = check("photos", "--max-shown", "3")
    assert f"and {len(hostile.BROKEN) - 3} more; --max-shown 0 shows all" in out


def test_a_recipe_is_looked_at_as_it_would_train(tmp_path, check):
    hostile.make_clean(tmp_path / "photos")
    content = {
        "name": "r",
        "model": {"checkpoint": "none"},
        "data": {"source": "photos/train", "splits": {"validation": 0.25, "test": None}},
        "phases": [{"name": "head"}],
    }
    (tmp_path / "r.yaml").write_text(json.dumps(content))
    copy = (tmp_path / "photos/train/ant/000.jpg").read_bytes()
    for number in range(6):
        (tmp_path / f"photos/train/ant/copy{number}.jpg").write_bytes(copy)
    code, out, _ = check("r.yaml", "--json")
    found = json.loads(out)
    assert code == 1
    assert {split: part["images"] for split, part in found["splits"].items()} == {"train": 32, "validation": 10}
    assert [one["kind"] for one in found["findings"]] == ["leak"]  # copies on both sides of the carved split
    code, out, _ = check("photos/train", "--json")
    assert [one["kind"] for one in json.loads(out)["findings"]] == ["duplicate"]
    assert code == 0


def test_quick_and_columns(tmp_path, check):
    hostile.make_hostile(tmp_path / "photos", {"cut JPEG": hostile.BROKEN["cut JPEG"]})
    assert check("photos")[0] == 1
    assert check("photos", "data.audit=quick")[0] == 0
    rows = [f"photos/train/{name}/00{number}.jpg,{name}" for name in hostile.CLASSES for number in range(4)]
    (tmp_path / "table.csv").write_text("\n".join(["path,kind", *rows]))
    code, out, _ = check("table.csv", "data.label_column=kind", "--json")
    assert code == 0
    assert {one["kind"] for one in json.loads(out)["findings"]} == {"rare class"}


def test_what_train_refuses_is_refused(tmp_path, check):
    hostile.make_clean(tmp_path / "photos")
    for split in ("train", "test"):
        (tmp_path / "flat" / split).mkdir(parents=True)
        (tmp_path / "photos" / split / "ant/000.jpg").rename(tmp_path / "flat" / split / "0.jpg")
    code, out, err = check("flat")
    assert (code, out) == (2, "")
    assert "test, train" in err
    assert check("photos/train/ant")[0] == 2


def test_too_few_images_for_the_splits_that_train_would_carve(photos, check):
    photos({"ant": 1, "bee": 1})
    code, out, err = check("photos")
    assert (code, out) == (2, "")
    assert "data.splits.validation=null" in err
    assert check("photos", "data.splits.validation=null", "data.splits.test=null")[0] == 0


def test_what_is_left_out_is_no_failure(tmp_path, check):
    hostile.make_clean(tmp_path / "photos")
    (tmp_path / "photos/test/ant").rename(tmp_path / "photos/flat")
    for name in hostile.CLASSES[1:]:
        shutil.rmtree(tmp_path / "photos/test" / name)
    (tmp_path / "photos/flat").rename(tmp_path / "photos/test/images")
    code, out, err = check("photos")
    assert (code, "6 images, which lie in no class folder" in err) == (0, True)
    assert out.endswith("54 images, no findings; see the warnings above: 1\n")


def test_a_class_of_an_unused_split_that_is_called_almost_like_a_used_one(tmp_path, check):
    hostile.make_clean(tmp_path / "photos")
    first, second, third = hostile.CLASSES[:3]
    labels = {first: f"{first},train", second: f"{second},train", third: f"{first}: red,holdout"}
    rows = [f"photos/train/{name}/00{number}.jpg,{told}" for name, told in labels.items() for number in range(6)]
    (tmp_path / "photos.csv").write_text("\n".join(["file,class,part", *rows]))
    code, out, _ = check("photos.csv", "data.split_column=part", "--json")
    assert (code, [finding["kind"] for finding in json.loads(out)["findings"]]) == (0, ["left out"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere/at/all"], "error: data.source: the folder nowhere/at/all does not exist"),
        (["photos", "data.adit=quick"], "data.adit: unknown key; did you mean 'audit'?"),
        (["photos", "data.audit=slow"], "data.audit: found 'slow'; allowed: 'full', 'quick' or 'off'"),
        (["photos", "data.background=pink"], "allowed: white, black, gray, or [red, green, blue] from 0 to 255"),
    ],
)
def test_bad_requests(arguments, told, tmp_path, check):
    (tmp_path / "photos").mkdir()
    code, out, err = check(*arguments)
    assert (code, out) == (2, "")
    assert told in err


def test_the_run_says_at_its_end_what_it_left_out(tmp_path, capsys):
    hostile.make_hostile(tmp_path / "photos", {name: hostile.BROKEN[name] for name in ("cut JPEG", "cut WebP")})
    tiny.save(tmp_path / "checkpoint")
    content = {
        "name": "r",
        "model": {"checkpoint": "checkpoint"},
        "data": {"source": "photos", "background": "white", "fit": "letterbox"},
        "phases": [{"name": "head", "num_train_epochs": 1, "learning_rate": 0.01}],
    }
    (tmp_path / "r.yaml").write_text(json.dumps(content))
    assert main(["train", "r.yaml"]) == 0
    out = capsys.readouterr().out
    assert "left out: 2 images that can't be read; runs/r/data.json lists them\n" in out
    saved = json.loads((tmp_path / "runs/r/model/preprocessor_config.json").read_text())
    assert (saved["fit"], saved["background"]) == ("letterbox", [255, 255, 255])
    assert main(["evaluate", "runs/r"]) == 0
    assert main(["predict", "runs/r", "photos/test/ant", "--top", "2"]) == 0
