import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import toy
from accelerate import PartialState
from families import ALL_AT_NIGHT
from sklearn.neighbors import KNeighborsClassifier
from transformers import AutoModelForImageClassification

from hfft.data.sources.reading import ImageData
from hfft.evaluators.features import HEAD_INPUT
from hfft.evaluators.retention import (
    Retention,
    agreement,
    choose_sample,
    cosine_drift,
    kl_divergence,
    knn_accuracy,
    linear_cka,
)
from hfft.model.anatomy import dissect
from hfft.model.checkpoint import load_checkpoint
from hfft.recipe.spec import ModelSpec, PhaseSpec
from hfft.training.phase_data import PhaseRun

CLASSES = 10  # of the checkpoint's own head


@pytest.fixture(autouse=True)
def _state():
    PartialState()


def images(validation=12):
    splits = {"train": toy.rows(20), **({"validation": toy.rows(validation, seed=1)} if validation else {})}
    return ImageData(splits, toy.CLASSES)


def checkpoint(folder, family):
    spec = ModelSpec(checkpoint=str(tiny.save(folder, family, CLASSES)))
    return spec, *load_checkpoint(spec, toy.CLASSES)


def begun(folder, network, processor, spec=None):
    recipe = SimpleNamespace(seed=0, model=spec, retain=SimpleNamespace(interpolate=None))
    phase = SimpleNamespace(folder=folder)
    job = SimpleNamespace(recipe=recipe, images=images(), processor=processor, phases=[phase], load=spec)
    return Retention(job, network)


def measured(retention, network, folder):
    phase = PhaseRun(number=0, spec=PhaseSpec(name="p"), folder=folder, title="phase", seed=0)
    retention.after_phase(None, phase, network)
    return json.loads((folder / "retention.json").read_text())


def move(network, part, amount=0.5):
    generator, tensors = torch.Generator().manual_seed(3), dissect(network).part(part).tensors
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in tensors:
                parameter += amount * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("family", ALL_AT_NIGHT)
def test_the_old_head_answers_as_the_checkpoint_did_and_as_it_would_now(family, tmp_path):
    """Compared with the checkpoint's own classifier, before and after one block of its encoder was moved."""
    spec, network, processor = checkpoint(tmp_path / family, family)
    retention = begun(tmp_path, network, processor, spec)
    move(network, "head")
    move(network, "block 0")
    found = measured(retention, network, tmp_path)

    sample = choose_sample(images(), processor, 0)
    pixels = torch.stack([sample.floats(sample.examples[k]["pixel_values"]) for k in range(12)])
    original = AutoModelForImageClassification.from_pretrained(spec.checkpoint).eval()
    answers = []
    for _ in range(2):
        with torch.no_grad():
            answers.append(original(pixel_values=pixels).logits.numpy())
        move(original, "block 0")
    assert answers[0].shape == (12, CLASSES)
    assert found["old_task"]["classes"] == CLASSES
    assert found["old_task"]["agreement"] == np.mean(answers[0].argmax(1) == answers[1].argmax(1))
    assert found["old_task"]["kl_divergence"] == pytest.approx(kl_divergence(*answers), rel=1e-2, abs=1e-6)
    assert found["changed"] == ["block 0"]
    assert list(found["blocks"]) == [*(block.name for block in tiny.anatomy(family).blocks), HEAD_INPUT]


def test_a_phase_of_the_head_alone_changes_nothing(tmp_path):
    spec, network, processor = checkpoint(tmp_path / "vit", "vit")
    retention = begun(tmp_path, network, processor, spec)
    move(network, "head")
    found = measured(retention, network, tmp_path)
    assert found["changed"] == []
    assert found["old_task"] == {"classes": CLASSES, "agreement": 1, "kl_divergence": 0}
    assert found["knn_accuracy"]["before"] == found["knn_accuracy"]["after"] is not None
    assert list(found["blocks"]) == ["block 0", "block 1", "block 2", "block 3", HEAD_INPUT]
    for block in found["blocks"].values():
        assert block["cosine_drift"] == 0
        assert block["cka"] == pytest.approx(1)


def test_drift_begins_at_the_first_block_that_changed(tmp_path):
    spec, network, processor = checkpoint(tmp_path / "vit", "vit")
    retention = begun(tmp_path, network, processor, spec)
    move(network, "block 2")
    found = measured(retention, network, tmp_path)
    assert found["changed"] == ["block 2"]
    drifts = [block["cosine_drift"] for block in found["blocks"].values()]
    assert drifts[:2] == [0, 0]
    assert min(drifts[2:]) > 0.001
    assert found["blocks"]["block 2"]["cka"] < 0.999
    assert found["old_task"]["kl_divergence"] > 0
    assert found["sample"] == {"split": "validation", "images": 12}
    summary = retention.after_run(None, None)
    assert summary["sample"] == found["sample"]
    assert summary["phases"]["p"]["head_input"] == found["blocks"][HEAD_INPUT]
    assert summary["phases"]["p"]["old_task"] == found["old_task"]
    assert "blocks" not in summary["phases"]["p"]


def test_the_network_is_left_as_it_was(tmp_path):
    spec, network, processor = checkpoint(tmp_path / "resnet", "resnet")
    network.train()
    head, modes = network.classifier[1], [module.training for module in network.modules()]
    before = copy.deepcopy(network.state_dict())
    retention = begun(tmp_path, network, processor, spec)
    measured(retention, network, tmp_path)
    assert network.classifier[1] is head
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_checkpoint_without_a_head_has_no_old_task(tmp_path):
    tiny.save(tmp_path / "vit", "vit")
    processor = tiny.processor()
    tiny.build("vit").vit.save_pretrained(tmp_path / "body")
    processor.save_pretrained(tmp_path / "body")
    spec = ModelSpec(checkpoint=str(tmp_path / "body"))
    network, _ = load_checkpoint(spec, toy.CLASSES)
    found = measured(begun(tmp_path, network, processor, spec), network, tmp_path)
    assert found["old_task"] is None
    assert found["blocks"]["block 3"]["cosine_drift"] == 0


def test_a_head_whose_weights_are_not_in_the_file_is_none(tmp_path):
    tiny.build("vit").vit.save_pretrained(tmp_path / "body")
    tiny.processor().save_pretrained(tmp_path / "body")
    config = json.loads((tmp_path / "body/config.json").read_text())
    (tmp_path / "body/config.json").write_text(json.dumps({**config, "architectures": ["ViTForImageClassification"]}))
    spec = ModelSpec(checkpoint=str(tmp_path / "body"))
    network, processor = load_checkpoint(spec, toy.CLASSES)
    found = measured(begun(tmp_path, network, processor, spec), network, tmp_path)
    assert found["old_task"] is None


def test_a_network_that_the_caller_brought_has_no_old_task_that_is_known(tmp_path):
    network = tiny.build("convnext")
    found = measured(begun(tmp_path, network, tiny.processor()), network, tmp_path)
    assert found["old_task"] is None


def test_what_was_measured_is_read_and_not_measured_again(tmp_path):
    spec, network, processor = checkpoint(tmp_path / "vit", "vit")
    found = measured(begun(tmp_path, network, processor, spec), network, tmp_path)
    move(network, "block 1")
    again = begun(tmp_path, network, processor, spec)
    assert measured(again, network, tmp_path) == found
    assert again.after_run(None, None)["phases"]["p"]["changed"] == []


def test_the_sample_is_at_most_128_images_chosen_by_the_seed():
    data = images(validation=300)
    first, again, other = (choose_sample(data, tiny.processor(), seed) for seed in (0, 0, 1))
    assert len(first.examples) == len(first.labels) == 128
    assert first.examples.rows["file"] == again.examples.rows["file"] != other.examples.rows["file"]
    assert len(set(first.examples.rows["file"])) == 128
    assert first.labels.tolist() == first.examples.rows["label"]


def test_without_validation_images_the_sample_is_of_train():
    sample = choose_sample(images(validation=0), tiny.processor(), 0)
    assert (sample.split, len(sample.examples)) == ("train", 20)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_cka_is_1_up_to_rotation_scale_and_shift(rng):
    features = rng.normal(size=(50, 8))
    turned, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    assert linear_cka(features, features) == pytest.approx(1)
    assert linear_cka(features, 3 * features @ turned + 5) == pytest.approx(1)


def test_cka_of_unrelated_features_is_near_0_even_with_many_dimensions(rng):
    """The biased estimate of these is about 0.95."""
    assert abs(linear_cka(rng.normal(size=(100, 2000)), rng.normal(size=(100, 2000)))) < 0.1


def test_cka_lies_in_between_when_half_of_the_features_stay(rng):
    shared, one, other = (rng.normal(size=(400, 20)) for _ in range(3))
    mixed = linear_cka(np.hstack([shared, one]), np.hstack([shared, other]))
    assert mixed == pytest.approx(0.5, abs=0.05)  # of the squared covariance, half is shared


def test_cka_says_nothing_of_constant_features_or_three_images(rng):
    assert linear_cka(np.ones((9, 4)), rng.normal(size=(9, 4))) is None
    assert linear_cka(*rng.normal(size=(2, 3, 4))) is None


def test_cosine_drift():
    before = np.array([[1.0, 0], [0, 2]])
    assert cosine_drift(before, before) == 0
    assert cosine_drift(before, np.array([[0, 5.0], [0, 1]])) == pytest.approx(0.5)  # a right angle, and none
    assert cosine_drift(before, -before) == pytest.approx(2)
    assert cosine_drift(np.zeros((2, 2)), before) == pytest.approx(1)


def test_knn_accuracy_is_scikit_learns_with_each_image_left_out(rng):
    labels = rng.integers(0, 2, 81)
    features = rng.normal(size=(81, 5)) + labels[:, None]
    right = []
    for left_out in range(81):
        kept = np.arange(81) != left_out
        knn = KNeighborsClassifier(9, metric="cosine").fit(features[kept], labels[kept])  # the square root of 81
        right.append(knn.predict(features[[left_out]])[0] == labels[left_out])
    assert knn_accuracy(features, labels) == pytest.approx(np.mean(right))


def test_knn_accuracy_of_clusters_and_of_lonely_images():
    features = np.array([[1, 0], [1, 0.1], [0.9, 0], [0, 1], [0.1, 1], [0, 0.9]])
    assert knn_accuracy(features, np.array([0, 0, 0, 7, 7, 7])) == 1
    assert knn_accuracy(features[2:], np.array([5, 7, 7, 7])) == 1  # the lonely one doesn't count
    assert knn_accuracy(features, np.arange(6)) is None


def test_agreement_and_divergence_of_answers(rng):
    before, after = rng.normal(size=(2, 30, 4))
    assert agreement(before, before + 1) == 1
    assert agreement(np.eye(4), np.eye(4)[[0, 1, 3, 2]]) == 0.5
    expected = torch.nn.functional.kl_div(
        torch.tensor(after).log_softmax(1), torch.tensor(before).softmax(1), reduction="batchmean"
    )
    assert kl_divergence(before, after) == pytest.approx(float(expected))
    assert kl_divergence(before, before + 1) == pytest.approx(0, abs=1e-12)
