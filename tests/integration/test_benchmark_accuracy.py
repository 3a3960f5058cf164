"""scripts/benchmark_accuracy.py: runs that go on where they stopped, and the tables of docs/results.md."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import accuracy_data
import accuracy_methods
import benchmark_accuracy
from accuracy_data import Picture, split_pictures


def pictures(count, classes="abc"):
    rng = np.random.default_rng(0)
    for number in range(count):
        label = classes[number % len(classes)]
        pixels = rng.integers(0, 60, (12, 12), dtype=np.uint8) + np.uint8(80 * (number % len(classes)))
        yield Picture(f"{number}.png", label, label, pixels, kind="even" if number % 2 else "odd")


# Data


def test_splits_are_stratified_seeded_and_of_their_shares():
    every = list(pictures(120))
    first, again, other = (split_pictures(every, number) for number in (0, 0, 1))
    assert first == again != other
    assert Counter((one.label, split) for one, split in first) == {
        **{(label, "test"): 10 for label in "abc"},
        **{(label, "validation"): 6 for label in "abc"},
        **{(label, "train"): 24 for label in "abc"},
    }
    assert len({one.name for one, _ in first}) == 120


def test_a_test_split_of_its_own_stays_and_the_rest_is_thinned():
    every = [Picture(f"{n}.png", "ab"[n % 2], "ab"[n % 2], Path(), is_test=n < 20) for n in range(100)]
    found = split_pictures(every, 0, most=10)
    assert [one.name for one, split in found if split == "test"] == [f"{n}.png" for n in range(20)]
    assert Counter(split for _, split in found) == {"test": 20, "train": 16, "validation": 4}
    assert {one.name for one, _ in found} != {one.name for one, _ in split_pictures(every, 1, most=10)}


def test_idx_files_are_read(tmp_path):
    import gzip

    content = bytes([0, 0, 8, 2]) + (2).to_bytes(4, "big") + (3).to_bytes(4, "big") + bytes(range(6))
    (tmp_path / "x.gz").write_bytes(gzip.compress(content))
    assert accuracy_data._idx(tmp_path / "x.gz").tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(accuracy_data.PreparationError, match="dataset-fashion-mnist"):
        accuracy_data._idx(tmp_path / "y.gz")


# Runs


def test_runs_are_made_once_and_rendered(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(accuracy_data.SETS, "digits", (lambda _: pictures(60), None))
    in_own_process = benchmark_accuracy.in_own_process
    monkeypatch.setattr(benchmark_accuracy, "in_own_process", lambda job, log: accuracy_methods.run(job) or 1.5)
    checkpoint = tiny.save(tmp_path / "vit", "vit", classes=5)
    results, output = tmp_path / "results.jsonl", tmp_path / "results.md"
    words = ["run", "--data", "digits", "--networks", str(checkpoint), "--methods", "probe,plain", "--splits"]
    places = ["--results", str(results), "--work", str(tmp_path / "work")]
    benchmark_accuracy.main([*words, "1", *places])
    assert [json.loads(line)["method"] for line in results.read_text().splitlines()] == ["probe", "plain"]
    results.write_text(results.read_text()[:-40])  # as a killed run leaves it
    benchmark_accuracy.main([*words, "2", *places])
    found = benchmark_accuracy.read_results(results)
    keys = Counter((one["method"], one["split"]) for one in found)
    assert keys == {(method, split): 1 for method in ("probe", "plain") for split in range(2)}
    assert all(len(one["predictions"]) == one["images"]["test"] == 15 for one in found)
    assert all(set(one["by_kind"]) == {"even", "odd"} for one in found)
    assert [one["accuracy"] for one in found if one["method"] == "probe"] == [1.0, 1.0]
    before = results.read_bytes()
    benchmark_accuracy.main([*words, "2", *places])
    assert results.read_bytes() == before
    benchmark_accuracy.main(["render", "--results", str(results), "--output", str(output)])
    assert "| probe | 2 | 100.0 ± 0.0 |" in output.read_text()
    # A process of its own that fails, as its checkpoint is gone, leaves a log and no line.
    monkeypatch.setattr(benchmark_accuracy, "in_own_process", in_own_process)
    (checkpoint / "model.safetensors").unlink()
    benchmark_accuracy.main([*words, "3", *places])
    assert results.read_bytes() == before
    assert "digits, vit, plain, split 2: failed, see" in capsys.readouterr().err


def test_what_cannot_run(tmp_path, capsys):
    with pytest.raises(SystemExit, match="no checkpoint in nowhere"):
        benchmark_accuracy.main(["run", "--networks", "nowhere"])
    with pytest.raises(SystemExit):
        benchmark_accuracy.main(["run", "--methods", "magic"])
    assert "found magic; allowed: knn, probe, blocks" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="holds no results"):
        benchmark_accuracy.main(["render", "--results", str(tmp_path / "none.jsonl")])


# Tables


def result(method, split, accuracy, **changes):
    right = round(100 * accuracy)
    return {
        **{"data": "solar", "network": "lite0", "method": method, "split": split, "table": "x"},
        **{"seconds": 60.0, "cpu_seconds": 100.0, "quiet": True, "accuracy": accuracy, "by_kind": {"mono": accuracy}},
        **{"images": {"train": 200, "validation": 100, "test": 100}, "trainable": 1000, "retention": None},
        **{"truth": ["a"] * 100, "predictions": ["a"] * right + ["b"] * (100 - right), "versions": {"hfft": "1"}},
        **changes,
    }


def row_of(text, method):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {method} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_table_with_missing_cells():
    plain = [result("plain", split, accuracy) for split, accuracy in enumerate((0.80, 0.82, 0.84))]
    others = [
        *(result("blocks", split, accuracy, retention=0.9) for split, accuracy in ((0, 0.84), (2, 0.86))),
        result("lora", 7, 0.9),
        result("probe", 0, 0.7, network="vit_small"),
    ]
    text = benchmark_accuracy.render([*plain, *others])
    assert text.index("solar: EfficientNet-Lite0") < text.index("solar: ViT-S/14")
    assert row_of(text, "plain") == ["plain", "3", "82.0 ± 5.0", "", "82.0", "60", "100", "1,000", "-"]
    # 4 and 2 points: mean 3, t 12.7, corrected by the share of test images: 1.414 * sqrt(1 / 2 + 100 / 300)
    assert row_of(text, "blocks")[1:4] == ["2", "85.0 ± 12.7", "+3.0 (-13.4 to +19.4)"]
    assert row_of(text, "blocks")[-1] == "90.0"
    assert row_of(text, "lora")[3] == "-"  # no split in common
    assert row_of(text, "probe")[3] == "-"  # no plain run of this network
    assert "Seconds were measured on a quiet machine." in text


def test_one_split_is_compared_image_by_image():
    text = benchmark_accuracy.render([result("plain", 0, 0.80), result("blocks", 0, 0.90, quiet=False)])
    assert row_of(text, "blocks")[3] == "+10.0 (+5.0 to +16.0)"
    assert "during 1 of 2 runs" in text
