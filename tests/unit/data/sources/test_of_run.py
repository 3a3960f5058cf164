import finished
import pytest

from hfft.data.sources import reading
from hfft.data.sources.of_run import images_of_run
from hfft.errors import DataError


def test_a_folder_that_has_moved_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    source = {"kind": "local", "name": "photos", "revision": None}
    run = finished.make_run(
        tmp_path / "run", origin={"checkpoint": source, "data": source}, data={"source": "somebody/photos"}
    )
    monkeypatch.setattr(reading, "hub_problem", lambda *_: pytest.fail("the Hub is asked"))
    with pytest.raises(
        DataError, match=r"data.source of .*run: the folder somebody/photos does not exist; looked for"
    ):
        images_of_run(run)


def test_images_that_the_run_left_out_are_left_out(tmp_path, photos):
    run = finished.make_run(tmp_path / "run", data={"source": str(photos()), "splits": {"test": 0.2}})
    whole = images_of_run(run)
    gone = whole.splits["train"]["file"][0]
    (run / "data.json").write_text(f'{{"skipped": [{{"file": "{gone}"}}]}}')
    files = [file for rows in images_of_run(run).splits.values() for file in rows["file"][:]]
    assert gone not in files
    assert len(files) == sum(map(len, whole.splits.values())) - 1
