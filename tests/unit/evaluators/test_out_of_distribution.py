import numpy as np
import pytest

from hfft.errors import ModelError
from hfft.evaluators.out_of_distribution import FILE, Novelty, choose_balanced


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_unseen_images_of_the_same_kind_are_spread_evenly_and_others_are_far(rng):
    train, validation, others = rng.normal(size=(3, 500, 16)) + 3
    novelty = Novelty.of(train, validation)
    assert novelty.scores(validation).mean() == pytest.approx(0.5, abs=0.01)
    assert novelty.scores(others).mean() == pytest.approx(0.5, abs=0.05)
    assert novelty.scores(-others).min() == 1  # the opposite direction
    assert novelty.scores(train[:1])[0] < 0.5


def test_the_distance_is_that_to_the_kth_nearest_of_unit_vectors():
    angles = np.radians(np.arange(150))  # so the second nearest counts
    train = 7 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    beyond = np.array([[np.cos(np.radians(152)), np.sin(np.radians(152))]])
    novelty = Novelty.of(train, np.concatenate([beyond, train[[20]]]))
    one, four = 2 * np.sin(np.radians([1, 4]) / 2)  # beside itself, and beyond the last two
    assert novelty.distances == pytest.approx([one, four], rel=0.05)  # float16


def test_a_file_keeps_it_small_and_whole(rng, tmp_path):
    novelty = Novelty.of(*rng.normal(size=(2, 100, 16)))
    novelty.save(tmp_path)
    again = Novelty.load(tmp_path)
    probe = rng.normal(size=(20, 16))
    assert (again.scores(probe) == novelty.scores(probe)).all()
    assert (tmp_path / FILE).stat().st_size < 100 * 16 * 2 + 100 * 8 + 500
    (tmp_path / FILE).write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="can't be read"):
        Novelty.load(tmp_path)
    with pytest.raises(ModelError, match=r"no novelty.safetensors, which a run with `novelty: true` keeps"):
        Novelty.load(tmp_path / "elsewhere")


def test_classes_are_taken_evenly_as_far_as_they_have_images():
    labels = np.repeat([0, 1, 2], [500, 40, 3])
    chosen = choose_balanced(labels, 60, 0)
    assert len(set(chosen.tolist())) == 60
    counts = np.bincount(labels[chosen])
    assert counts[2] == 3
    assert abs(counts[0] - counts[1]) <= 1
    assert choose_balanced(labels, 60, 0).tolist() == chosen.tolist()
    assert choose_balanced(labels, 60, 1).tolist() != chosen.tolist()
    assert sorted(choose_balanced(labels, 10_000, 0).tolist()) == list(range(543))
