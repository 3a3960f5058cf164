import multiprocessing
import random
import sys
import time

import numpy as np
import pytest
import tiny
import torch
import toy
import warm
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import DataLoader

from hfft.data.images.batches import (
    FILLER,
    IGNORED,
    Collator,
    EpochOrder,
    Examples,
    chances_of,
    dead_workers_named,
)
from hfft.data.images.transforms import evaluation_transform, training_transform
from hfft.data.sources.reading import load_data
from hfft.errors import DataError, TrainingError
from hfft.recipe.augment import AugmentSpec
from hfft.recipe.spec import DataSpec, SplitSpec
from hfft.training.failures import failures_explained

AUGMENT = AugmentSpec(crop=(0.3, 1.0), flip="both", randaugment=9)
OTHERS = AugmentSpec(rotate90=True, trivialaugment=True, color=0.4, erasing=0.5)
MIXED = AugmentSpec(augmix=3)


@pytest.fixture
def rows(photos):
    folder = photos({"ant": 4, "bee": 4})
    return load_data(DataSpec(source=str(folder), splits=SplitSpec(validation=None, test=None)), 0).splits["train"]


@pytest.fixture(params=[AUGMENT, OTHERS, MIXED], ids=["crop, flip, RandAugment", "others", "AugMix"])
def make(rows, request):
    """Augmented examples of the eight photos at an epoch."""

    def examples(seed=5, epoch=0):
        made = Examples(rows, training_transform(tiny.processor(), request.param), seed=seed)
        made.set_epoch(epoch)
        return made

    return examples


def stacked(examples, order=range(8)):
    """Pixels by index, read in any order."""
    pixels = {index: examples[index]["pixel_values"] for index in order}
    return torch.stack([pixels[index] for index in range(8)])


def test_an_item_has_pixels_label_and_key(make):
    examples = make(seed=5, epoch=2)
    assert len(examples) == 8
    item = examples[6]
    assert item["pixel_values"].shape == (3, tiny.SIDE, tiny.SIDE)
    assert (item["label"], item["key"]) == (1, (5, 2, 6))
    assert [examples[index]["label"] for index in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_without_a_seed_the_transform_alone_decides(rows):
    transform = evaluation_transform(tiny.processor())
    examples = Examples(rows, transform)
    with_epoch = Examples(rows, transform)
    with_epoch.set_epoch(3)
    assert torch.equal(stacked(examples), stacked(with_epoch))
    assert examples[0]["key"] is None


def test_an_item_is_the_same_in_another_order_and_after_other_random_numbers(make):
    expected = stacked(make())
    examples = make()
    torch.manual_seed(99)
    assert torch.equal(stacked(examples, reversed(range(8))), expected)
    torch.rand(7), np.random.default_rng().random(7), random.random()
    assert torch.equal(stacked(examples, [3, 1, 4, 0, 5, 2, 6, 7]), expected)
    assert torch.equal(examples[np.int64(3)]["pixel_values"], expected[3])


def test_an_item_is_the_same_in_another_process(make):
    expected = stacked(make(epoch=1))
    for workers in (1, 2):
        loader = DataLoader(make(epoch=1), batch_size=2, num_workers=workers, collate_fn=Collator())
        assert torch.equal(torch.cat([batch["pixel_values"] for batch in loader]), expected)


def test_living_workers_see_the_next_epoch(make):
    examples = make()
    loader = DataLoader(examples, batch_size=4, num_workers=1, collate_fn=Collator(), persistent_workers=True)
    for epoch in (0, 1, 2):
        examples.set_epoch(epoch)
        assert torch.equal(torch.cat([batch["pixel_values"] for batch in loader]), stacked(make(epoch=epoch)))


def test_items_differ_between_epochs_seeds_and_images(make):
    first = stacked(make())
    for other in (stacked(make(epoch=1)), stacked(make(seed=6))):
        assert sum(not torch.equal(a, b) for a, b in zip(first, other, strict=True)) >= 7  # few decisions may be alike


def test_one_image_twice_takes_different_decisions(rows):
    twice = Examples(rows.select([0, 0]), training_transform(tiny.processor(), AUGMENT), seed=1)
    assert not torch.equal(twice[0]["pixel_values"], twice[1]["pixel_values"])


def test_the_global_random_state_stays(make):
    examples = make()
    torch.manual_seed(3)
    np_before, python_before, torch_before = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
    for index in range(8):
        examples[index]
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert random.getstate() == python_before
    assert np.array_equal(np.random.get_state()[1], np_before)


def test_a_broken_image_is_named(photos, rows):
    (photos({}) / "ant" / "002.png").write_text("words")
    examples = Examples(rows, evaluation_transform(tiny.processor()))
    with pytest.raises(DataError, match=r"^ant/002.png: not an image"):
        examples[2]


# Collator


def example(index, label, *, seed=5, epoch=0):
    pixels = torch.full((3, 2, 2), float(index))
    return {"pixel_values": pixels, "label": label, "key": None if seed is None else (seed, epoch, index)}


BATCH = [example(0, 0), example(1, 2), example(2, 1), example(3, 2)]


def test_without_mixup_examples_are_stacked():
    batch = Collator()(BATCH)
    assert set(batch) == {"pixel_values", "labels"}
    assert batch["pixel_values"].shape == (4, 3, 2, 2)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert batch["labels"].tolist() == [0, 2, 1, 2]
    assert batch["labels"].dtype == torch.int64


def test_mixup_mixes_each_image_with_its_mirror():
    batch = Collator(mixup=0.4, classes=4)(BATCH)
    assert torch.allclose(batch["labels"].sum(dim=1), torch.ones(4))
    share = batch["labels"][0, 0].item()  # of image 0, class 0, in the mixture with image 3, class 2
    assert 0 < share < 1
    rest = 1 - share
    expected = [[share, 0, rest, 0], [0, rest, share, 0], [0, share, rest, 0], [rest, 0, share, 0]]
    assert torch.allclose(batch["labels"], torch.tensor(expected), atol=1e-6)
    mixed = [0 * share + 3 * rest, 1 * share + 2 * rest, 2 * share + 1 * rest, 3 * share + 0 * rest]
    assert torch.allclose(batch["pixel_values"], torch.tensor(mixed)[:, None, None, None].expand(4, 3, 2, 2))


@pytest.fixture
def bytewise(rows):
    """Transform, and examples with 8-bit pixels and with floats, of the same random decisions."""
    transform = training_transform(tiny.processor(), AUGMENT)
    return transform, Examples(rows, transform.pixels, seed=5), Examples(rows, transform, seed=5)


def test_eight_bits_become_the_same_floats_as_a_batch(bytewise):
    transform, small, large = bytewise
    batch = Collator()([small[0], small[6]])
    assert batch["pixel_values"].dtype == torch.uint8
    assert torch.equal(transform.floats(batch["pixel_values"]), Collator()([large[0], large[6]])["pixel_values"])


@pytest.mark.parametrize("chosen", [[0, 6, 3], [FILLER, FILLER]], ids=["images", "fillers"])
def test_eight_bits_are_mixed_as_floats(bytewise, chosen):
    transform, small, large = bytewise
    found = Collator(0.4, 2, transform.floats)([small[index] for index in chosen])
    expected = Collator(0.4, 2)([large[index] for index in chosen])
    assert all(torch.equal(found[key], expected[key]) for key in ("pixel_values", "labels"))


def test_eight_bits_that_are_not_mixed_stay(bytewise, rows):
    transform, _, _ = bytewise
    examples = Examples(rows, transform.pixels)
    assert Collator(0.4, 2, transform.floats)([examples[1]])["pixel_values"].dtype == torch.uint8


def test_mixup_follows_the_keys_alone():
    def share(examples, alpha=0.4):
        return Collator(mixup=alpha, classes=3)(examples)["labels"][0, 0].item()

    first = share(BATCH)
    torch.manual_seed(1)
    assert share(BATCH) == first
    later = [{**entry, "key": (5, 1, entry["key"][2])} for entry in BATCH]
    other_seed = [{**entry, "key": (6, 0, entry["key"][2])} for entry in BATCH]
    other_batch = [BATCH[0], example(7, 2), BATCH[2], BATCH[3]]
    assert len({first, share(later), share(other_seed), share(other_batch)}) == 4


def test_shares_follow_the_beta_distribution():
    collate = Collator(mixup=2.0, classes=3)
    shares = [
        collate([example(0, 0, epoch=epoch), example(1, 1, epoch=epoch)])["labels"][0, 0].item()
        for epoch in range(2000)
    ]
    # Beta(2, 2): mean 1/2, variance 1/20
    assert np.mean(shares) == pytest.approx(0.5, abs=0.02)
    assert np.var(shares) == pytest.approx(0.05, abs=0.005)


def images_of(count, epoch=0, side=10):
    """Images of one level each, their number, of as many classes."""
    pixels = [torch.full((3, side, side + 4), index, dtype=torch.uint8) for index in range(count)]
    return [{"pixel_values": one, "label": index, "key": (5, epoch, index)} for index, one in enumerate(pixels)]


def test_cutmix_gives_each_image_a_rectangle_of_its_mirror_and_the_share_of_its_label():
    shares = set()
    for epoch in range(40):
        batch = Collator(classes=5, cutmix=1.0)(images_of(5, epoch))
        pixels, labels = batch["pixel_values"], batch["labels"]
        assert (pixels.dtype, labels.dtype) == (torch.uint8, torch.float32)
        assert torch.allclose(labels.sum(dim=1), torch.ones(5))
        for index in range(5):
            own = (pixels[index] == index).float().mean()
            assert own + (pixels[index] == 4 - index).float().mean() * (index != 2) == pytest.approx(1)
            assert labels[index, index].item() == pytest.approx(own.item(), abs=1e-6)
        rows, columns = torch.nonzero(pixels[0, 0] == 4, as_tuple=True)
        if len(rows):
            assert len(rows) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        shares.add(round(labels[0, 0].item(), 3))
    assert len(shares) > 15


def test_with_both_each_batch_takes_one():
    collate = Collator(0.4, 4, torch.Tensor.float, cutmix=1.0)
    kinds = [collate(images_of(4, epoch))["pixel_values"].dtype for epoch in range(60)]
    assert 15 < kinds.count(torch.uint8) < 45
    assert kinds == [collate(images_of(4, epoch))["pixel_values"].dtype for epoch in range(60)]


def test_labels_that_are_shares_are_mixed_too():
    examples = [{**one, "label": np.float32([one["label"] == 0, 1, 0])} for one in images_of(2)]
    labels = Collator(classes=3, cutmix=1.0)(examples)["labels"]
    assert labels[:, 1].tolist() == [1, 1]
    assert labels[0, 0] + labels[1, 0] == pytest.approx(1)


@pytest.mark.parametrize("mixing", [{"mixup": 0.4}, {"cutmix": 1.0}], ids=str)
def test_validation_images_are_never_mixed(mixing):
    plain = [example(index, index, seed=None) for index in range(3)]
    batch = Collator(**mixing, classes=3)(plain)
    assert batch["labels"].tolist() == [0, 1, 2]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(("multiple", "fillers"), [(1, 0), (4, 0), (6, 4), (16, 8)])
def test_an_epoch_has_each_image_once_and_then_fillers(make, multiple, fillers):
    examples = make()
    order = EpochOrder(examples, seed=7, multiple=multiple)
    indices = list(order)
    assert len(order) == len(indices) == 8 + fillers
    assert sorted(indices[:8]) == list(range(8))
    assert indices[8:] == [FILLER] * fillers
    assert list(order) == indices
    examples.set_epoch(1)
    assert list(order) != indices


def test_the_order_is_that_of_accelerate(make):
    examples = make()
    order = EpochOrder(examples, seed=7, multiple=1)
    theirs = SeedableRandomSampler(range(8), data_seed=7)
    for epoch in range(3):
        examples.set_epoch(epoch)
        theirs.set_epoch(epoch)
        assert list(order) == list(theirs)


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_a_batch_leaves_fillers_out(make, mixup):
    examples = make()
    collate = Collator(mixup, 2)
    real, padded = collate([examples[3], examples[5]]), collate([examples[3], examples[5], examples[FILLER]])
    assert all(torch.equal(real[key], padded[key]) for key in real)


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.4}, {"cutmix": 1.0}], ids=str)
def test_a_batch_of_nothing_else_counts_for_nothing(make, mixing):
    examples = make()
    batch = Collator(classes=2, **mixing)([examples[FILLER], examples[FILLER]])
    assert batch["pixel_values"].shape == (1, 3, tiny.SIDE, tiny.SIDE)
    assert set(batch["labels"].flatten().tolist()) == {IGNORED}


def test_examples_can_be_listed(make):
    assert [example["label"] for example in make()] == [0] * 4 + [1] * 4


# Sampling by class


def test_chances_of_classes():
    labels = [0, 0, 0, 0, 1]
    assert chances_of(labels, "shuffle") is None
    balanced, half = chances_of(labels, "balanced"), chances_of(labels, "sqrt")
    assert balanced[:4].sum() == pytest.approx(float(balanced[4]))
    assert half[:4].sum() == pytest.approx(2 * float(half[4]))


def test_a_balanced_epoch_draws_classes_alike():
    examples = Examples(toy.rows(20), lambda image: image, seed=0)
    labels = [0] * 18 + [1] * 2
    order = EpochOrder(examples, seed=0, multiple=8, chances=chances_of(labels, "balanced"))
    drawn: list[int] = []
    for epoch in range(100):
        examples.set_epoch(epoch)
        indices = list(order)
        assert len(indices) == len(order) == 24
        assert indices[20:] == [FILLER] * 4
        drawn += indices[:20]
    share = sum(labels[index] for index in drawn) / len(drawn)
    assert share == pytest.approx(0.5, abs=0.05)  # 2,000 draws: 4.5 standard deviations
    assert set(drawn) == set(range(20))


# Processes that are killed

DIES = """
import os, signal, sys
from torch.utils.data import DataLoader
from hfft.errors import TrainingError
from hfft.training.failures import failures_explained

class Rows(list):
    def __getitem__(self, number):
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

try:
    with failures_explained("phase 1/2 head"):
        list(DataLoader(Rows(range(8)), num_workers=2))
except TrainingError as error:
    print(error)
    sys.stdout.flush()
    os._exit(3)
"""


def test_a_killed_worker_is_named_with_its_advice():
    """In a process of its own: torch raises at any place there, as soon as a worker dies."""
    done = warm.run([sys.executable, "-c", DIES])
    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith("phase 1/2 head: DataLoader worker (pid")
    assert "fewer dataloader_num_workers need less, and the same command continues" in done.stdout


class Batches:
    """A DataLoader's iterator, of which the first worker dies while its batch is fetched."""

    def __init__(self, error, *, dies):
        fork = multiprocessing.get_context("fork")
        self._workers = [fork.Process(target=time.sleep, args=(60,), daemon=True) for _ in range(2)]
        for worker in self._workers:
            worker.start()
        self._error, self._dies = error, dies

    def broken(self):
        if self._dies:
            self._workers[0].kill()
        raise self._error

    exec(
        compile("def get(self):\n    self.broken()", "dataloader.py", "exec"),
        as_torch := {"__name__": "torch.utils.data.dataloader"},
    )
    get = as_torch["get"]

    def end(self):
        for worker in self._workers:
            worker.kill()
            worker.join()


SIGNS = [ConnectionResetError(104, "Connection reset by peer"), EOFError(), FileNotFoundError(2, "No such file")]


@pytest.mark.parametrize("sign", SIGNS, ids=lambda sign: type(sign).__name__)
def test_a_broken_connection_to_a_killed_worker_is_named_too(sign):
    batches = Batches(sign, dies=True)
    try:
        number = batches._workers[0].pid
        with (
            pytest.raises(RuntimeError, match=rf"DataLoader worker \(pid\(s\) {number}\) exited"),
            dead_workers_named(),
        ):
            batches.get()
        with pytest.raises(TrainingError, match="phase: DataLoader worker"), failures_explained("phase"):
            batches.get()
    finally:
        batches.end()


@pytest.mark.parametrize(
    ("error", "dies"),
    [
        (OSError("Caught OSError in DataLoader worker process 0.\n..."), True),
        (ConnectionResetError(104, "Connection reset by peer"), False),
    ],
)
def test_other_errors_stay_what_they_are(error, dies):
    batches = Batches(error, dies=dies)
    try:
        with pytest.raises(type(error)) as raised, dead_workers_named():
            batches.get()
        assert raised.value is error
    finally:
        batches.end()
    with pytest.raises(ConnectionResetError), dead_workers_named():
        raise ConnectionResetError
