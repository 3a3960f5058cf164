import json
import shutil

import pytest

from hfft.errors import RunError
from hfft.recipe.loading import load_recipe
from hfft.runs.opening import (
    _may_differ,
    card_changes,
    check_same_images,
    describe_start,
    has_other_source,
    is_done,
    open_folder,
    other_model,
)
from hfft.runs.record import RunRecord


def recipe(**changes):
    phases = [{"name": "head"}]
    content = {"name": "r", "model": {"checkpoint": "c"}, "data": {"source": "d"}, "phases": phases, **changes}
    return load_recipe(content)


def opened(folder, *, fingerprint="f", precision="float32", overwrite=False, **changes):
    asked = recipe(**changes)
    data = {"labels": ["a", "b"], "splits": {"train": {"images": 2, "fingerprint": fingerprint}}}
    open_folder(folder, asked, describe_start(asked, precision=precision), data, overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_left_alone(overwrite, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(RunError, match="exists and is no run folder"):
        is_done(tmp_path / "photos", recipe(), overwrite=overwrite)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="exists and is no run folder"):
        is_done(tmp_path / "file", recipe(), overwrite=overwrite)


def test_a_run_that_was_killed_while_it_wrote_its_first_file_begins_again(tmp_path):
    (tmp_path / ".recipe.yaml.partial").write_text("name: ")
    assert not is_done(tmp_path, recipe())
    (tmp_path / "notes.txt").touch()
    with pytest.raises(RunError, match="exists and is no run folder"):
        is_done(tmp_path, recipe())


def test_an_empty_folder_is_taken(tmp_path):
    assert not is_done(tmp_path, recipe())


def test_a_folder_below_a_file_can_not_be_made(tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(RunError, match="no folder can be made in"):
        is_done(tmp_path / "runs" / "r", recipe())


def test_where_a_result_is_pushed_to_makes_no_other_run(tmp_path):
    opened(tmp_path / "r", hub={"repo_id": "me/cells"})
    assert not is_done(tmp_path / "r", recipe())
    assert not is_done(tmp_path / "r", recipe(hub={"repo_id": "me/others", "private": False}))
    with pytest.raises(RunError, match="holds a run of another recipe"):
        is_done(tmp_path / "r", recipe(hub={"repo_id": "me/cells"}, seed=1))
    text = (tmp_path / "r" / "recipe.yaml").read_text()
    (tmp_path / "r" / "recipe.yaml").write_text(text + "from_the_future: 1\n")
    with pytest.raises(RunError, match="holds a run of another recipe"):
        is_done(tmp_path / "r", recipe())


@pytest.mark.parametrize("changes", [{"license": "mit"}, {"license": None}, {"widget": 2}])
def test_what_only_the_card_shows_makes_no_other_run(changes, tmp_path):
    opened(tmp_path / "r", license="apache-2.0")
    asked = recipe(**{"license": "apache-2.0", **changes})
    assert not is_done(tmp_path / "r", asked)
    (tmp_path / "r" / "metrics.json").write_text("{}")
    assert is_done(tmp_path / "r", asked)
    assert card_changes(RunRecord(tmp_path / "r"), asked) == list(changes)
    assert card_changes(RunRecord(tmp_path / "r"), recipe(license="apache-2.0")) == []


def test_nor_does_whether_figures_are_drawn(tmp_path):
    opened(tmp_path / "r", report=False)
    assert not is_done(tmp_path / "r", recipe())
    assert card_changes(RunRecord(tmp_path / "r"), recipe()) == []


def test_nor_does_a_license_that_was_never_one(tmp_path):
    """Earlier versions took any word."""
    opened(tmp_path / "r", license="apache-2.0")
    text = (tmp_path / "r" / "recipe.yaml").read_text()
    (tmp_path / "r" / "recipe.yaml").write_text(text.replace("apache-2.0", "apache2"))
    asked = recipe(license="apache-2.0")
    assert not is_done(tmp_path / "r", asked)
    assert card_changes(RunRecord(tmp_path / "r"), asked) == ["license"]


def test_a_run_is_done_when_it_has_metrics_and_is_not_to_be_overwritten(tmp_path):
    opened(tmp_path / "r")
    assert not is_done(tmp_path / "r", recipe())
    (tmp_path / "r" / "metrics.json").write_text("{}")
    assert is_done(tmp_path / "r", recipe())
    assert not is_done(tmp_path / "r", recipe(), overwrite=True)


def test_another_recipe_is_refused_with_the_difference_unless_it_is_to_overwrite(tmp_path):
    opened(tmp_path / "r")
    with pytest.raises(RunError, match=r"holds a run of another recipe.*\n(.*\n)*  \+seed: 1"):
        is_done(tmp_path / "r", recipe(seed=1))
    assert not is_done(tmp_path / "r", recipe(seed=1), overwrite=True)


def test_other_images_are_refused_and_nothing_is_written(tmp_path):
    opened(tmp_path / "r")
    before = {path: path.read_bytes() for path in (tmp_path / "r").iterdir()}
    with pytest.raises(RunError, match="the images have changed since this run began; --overwrite"):
        opened(tmp_path / "r", fingerprint="g")
    assert {path: path.read_bytes() for path in (tmp_path / "r").iterdir()} == before


def test_another_number_of_processes_is_refused(tmp_path):
    opened(tmp_path / "r")
    path = tmp_path / "r" / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "processes": 2}))
    with pytest.raises(RunError, match="began on 2 processes and can't go on with 1; --overwrite"):
        opened(tmp_path / "r")


def test_overwriting_removes_what_was_there(tmp_path):
    opened(tmp_path / "r")
    (tmp_path / "r" / "metrics.json").write_text("{}")
    opened(tmp_path / "r", fingerprint="g", overwrite=True, seed=1)
    assert {path.name for path in (tmp_path / "r").iterdir()} == {"recipe.yaml", "environment.json", "data.json"}
    assert "seed: 1" in (tmp_path / "r" / "recipe.yaml").read_text()


def test_a_run_does_not_go_on_in_another_precision(tmp_path):
    opened(tmp_path / "r", precision="bfloat16")
    opened(tmp_path / "r", precision="bfloat16")
    with pytest.raises(RunError, match="began in bfloat16"):
        opened(tmp_path / "r", precision="float32")


def origin(checkpoint, source, *, model_given=False, data_given=False, **data):
    asked = recipe(model={"checkpoint": checkpoint}, data={"source": source, **data})
    given = {"weights": "w", "config": "c"} if model_given else None
    found = describe_start(asked, precision="float32", model_given=given, data_given=data_given)["origin"]
    return [(part["kind"], part["name"], part["revision"]) for part in (found["checkpoint"], found["data"])]


def test_what_is_on_the_hub_is_told_from_what_is_on_this_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert origin("owner/base", "owner/photos", revision="v1") == [
        ("hub", "owner/base", None),
        ("hub", "owner/photos", "v1"),
    ]
    (tmp_path / "owner" / "base").mkdir(parents=True)
    (tmp_path / "owner" / "photos").mkdir()
    local = [("local", "base", None), ("local", "photos", None)]
    assert origin("owner/base", "owner/photos", revision="v1") == local  # folders come first, as in loading
    assert origin(f"{tmp_path}/owner/base/", "./owner/photos") == local
    assert origin("a/b/c", "photos/*.tar") == [("local", "c", None), ("local", "*.tar", None)]


def test_what_was_given_in_memory_is_neither():
    assert origin("owner/base", "owner/photos", model_given=True, data_given=True) == [
        ("memory", "owner/base", None),
        ("memory", "owner/photos", None),
    ]


def test_a_run_keeps_where_it_came_from(tmp_path):
    opened(tmp_path / "r")
    kept = json.loads((tmp_path / "r" / "environment.json").read_text())["origin"]
    assert kept == {
        "checkpoint": {"kind": "hub", "name": "c", "revision": None},
        "data": {"kind": "hub", "name": "d", "revision": None},
    }


@pytest.mark.parametrize(("full", "expected"), [((True, True), False), ((True, False), True), ((False, False), True)])
def test_kernels_of_a_gpu_may_differ_unless_every_phase_is_fully_deterministic(full, expected):
    phases = [{"name": name, "full_determinism": asked} for name, asked in zip(("head", "more"), full, strict=True)]
    asked = recipe(phases=phases, replay={"mode": "off"}, precision="float32")
    assert _may_differ(asked, "cpu") == []
    found = _may_differ(asked, "cuda:0")
    assert ["full_determinism" in line for line in found] == [True] * expected


NEUTRAL = {
    "dataloader_num_workers": 3,
    "dataloader_prefetch_factor": 4,
    "dataloader_persistent_workers": True,
    "dataloader_pin_memory": False,
    "per_device_eval_batch_size": 2,
    "eval_accumulation_steps": 1,
    "ddp_timeout": 60,
    "save_total_limit": 3,
    "disable_tqdm": True,
    "log_level": "error",
    "logging_steps": 7,
    "logging_first_step": True,
    "logging_strategy": "epoch",
    "report_to": "none",
    "run_name": "other",
}


@pytest.mark.parametrize("key", NEUTRAL)
@pytest.mark.parametrize("of_phase", [False, True])
def test_a_key_that_changes_no_number_makes_no_other_run(key, of_phase, tmp_path):
    opened(tmp_path / "r", training={"learning_rate": 0.1})
    asked = {"training": {"learning_rate": 0.1, **({} if of_phase else {key: NEUTRAL[key]})}}
    phases = [{"name": "head", **({key: NEUTRAL[key]} if of_phase else {})}]
    assert not is_done(tmp_path / "r", recipe(phases=phases, **asked))
    opened(tmp_path / "r", phases=phases, **asked)
    assert not is_done(tmp_path / "r", recipe(training={"learning_rate": 0.1}))


@pytest.mark.parametrize(
    "arguments",
    [{"per_device_train_batch_size": 4}, {"seed": 1}, {"dataloader_drop_last": True}, {"eval_strategy": "no"}],
)
def test_a_key_that_changes_numbers_does(arguments, tmp_path):
    opened(tmp_path / "r")
    asked = {"seed": 1} if "seed" in arguments else {"training": arguments}
    with pytest.raises(RunError, match="holds a run of another recipe"):
        is_done(tmp_path / "r", recipe(**asked))


def test_logging_steps_count_where_a_phase_evaluates_by_them(tmp_path):
    every = {"eval_strategy": "steps", "logging_steps": 5}
    opened(tmp_path / "r", training=every)
    assert not is_done(tmp_path / "r", recipe(training=every))
    with pytest.raises(RunError, match="another recipe"):
        is_done(tmp_path / "r", recipe(training={**every, "logging_steps": 6}))


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A checkpoint's folder, `ck`, and one of images, `photos`; the working directory and home are there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("ck", "photos"):
        (tmp_path / name).mkdir()
    (tmp_path / "ck/config.json").write_text("{}")
    (tmp_path / "ck/model.safetensors").write_bytes(b"weights")
    (tmp_path / "link").symlink_to("ck")
    return tmp_path


def asking(checkpoint="ck", source="photos", **changes):
    return {"model": {"checkpoint": checkpoint}, "data": {"source": source}, **changes}


@pytest.mark.parametrize("spelling", ["ck/", "./ck", "~/ck", "link", "photos/../ck"])
def test_another_spelling_of_a_place_makes_no_other_run(spelling, places):
    opened(places / "r", **asking())
    assert not is_done(places / "r", recipe(**asking(checkpoint=spelling)))
    assert not is_done(
        places / "r", recipe(**asking(source=spelling.replace("ck", "photos").replace("link", "photos")))
    )


def test_a_run_goes_on_elsewhere_with_copies_of_what_it_was_made_from(places):
    opened(places / "r", **asking())
    shutil.copytree("ck", "ck2")
    shutil.copytree("photos", "photos2")
    shutil.rmtree("ck")
    shutil.rmtree("photos")
    (places / "there").mkdir()
    shutil.move(places / "r", places / "there/s")
    there = asking("ck2", "photos2", output_dir="there", name="s", replay={"folder": "fast"})
    assert not is_done(places / "there/s", recipe(**there))
    assert has_other_source(RunRecord(places / "there/s"), recipe(**there))
    opened(places / "there/s", **there)
    assert not has_other_source(RunRecord(places / "there/s"), recipe(**there))
    with pytest.raises(RunError, match="the images have changed"):
        opened(places / "there/s", fingerprint="g", **there)


def test_another_checkpoint_is_another_run_wherever_it_lies(places):
    opened(places / "r", **asking())
    shutil.copytree("ck", "ck2")
    (places / "ck2/model.safetensors").write_bytes(b"Weights")
    with pytest.raises(RunError, match=r"holds a run of another recipe(.*\n)*.*\+  checkpoint: ck2"):
        is_done(places / "r", recipe(**asking("ck2")))
    with pytest.raises(RunError, match="holds a run of another recipe"):
        is_done(places / "r", recipe(**asking("owner/ck")))
    shutil.copy("ck2/model.safetensors", "ck")
    with pytest.raises(RunError, match="the files of the checkpoint have changed"):
        opened(places / "r", **asking())


def test_a_finished_run_is_not_taken_for_one_of_other_images(tmp_path):
    opened(tmp_path / "r")
    check_same_images(RunRecord(tmp_path / "r"), {"train": "f"})
    with pytest.raises(RunError, match="the images aren't those of this run"):
        check_same_images(RunRecord(tmp_path / "r"), {"train": "g"})


@pytest.mark.parametrize("is_link", [False, True])
def test_a_run_that_goes_is_gone_at_once_whatever_becomes_of_its_files(is_link, tmp_path, monkeypatch):
    folder = tmp_path / "r"
    if is_link:
        (tmp_path / "disk").mkdir()
        folder.symlink_to(tmp_path / "disk")
    opened(folder)
    (folder / "metrics.json").touch()
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", interrupted_by(shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            opened(folder, overwrite=True)
    assert folder.is_dir()
    assert not any(folder.iterdir())
    opened(folder, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["data.json", "environment.json", "recipe.yaml"]
    assert not list(tmp_path.rglob("*.old"))


def interrupted_by(remove):
    def interrupted(path, **options):
        if path.exists():
            raise KeyboardInterrupt
        remove(path, **options)

    return interrupted


def test_a_run_goes_on_with_the_model_object_that_it_began_with():
    now = {"weights": "w", "config": "c"}
    assert other_model(now, dict(now)) is None
    assert other_model(None, None) is None
    assert "checkpoint of its recipe" in str(other_model(now, None))
    assert "with a model object" in str(other_model(None, now))
    assert "other weights" in str(other_model(now, {**now, "weights": "v"}))
