import io
import json

import numpy as np
import pytest
import tiny
import torch
import toy
from transformers import AutoModelForImageClassification, BitImageProcessor

from hfft.errors import DataError, ModelError, RunError
from hfft.inference.classifier import Classifier, Prediction
from hfft.inference.opening import model_source
from hfft.inference.reading import Skipped
from hfft.model.checkpoint import load_checkpoint, save_model
from hfft.recipe.spec import ModelSpec


@pytest.fixture
def folder(tmp_path):
    model = tiny.build("vit", 3)
    model.config.id2label = {0: "ant", 1: "bee", 2: "cat"}
    save_model(model, tiny.processor(), tmp_path / "model")
    return tmp_path / "model"


def test_paths_bytes_and_images_give_the_same_answer(folder, tmp_path):
    image = toy.picture(0, np.random.default_rng(0))
    image.save(tmp_path / "a.png")
    stream = io.BytesIO()
    image.save(stream, "PNG")
    classify = Classifier.from_pretrained(folder)
    answers = classify([tmp_path / "a.png", str(tmp_path / "a.png"), stream.getvalue(), image], top=3)
    assert [answer.file for answer in answers] == [str(tmp_path / "a.png")] * 2 + ["2", "3"]
    assert len({tuple(answer.top.items()) for answer in answers}) == 1


def test_probabilities_are_the_models(folder):
    image = toy.picture(1, np.random.default_rng(1))
    answer = Classifier.from_pretrained(folder)([image], top=3)[0]
    pixels = tiny.processor()(images=image, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        expected = tiny.build("vit", 3)(pixels).logits.softmax(dim=1)[0]
    by_label = dict(zip(("ant", "bee", "cat"), expected.tolist(), strict=True))
    assert answer.top == pytest.approx(by_label, abs=1e-6)
    assert list(answer.top) == sorted(by_label, key=by_label.__getitem__, reverse=True)
    assert answer.label == max(by_label, key=by_label.__getitem__)
    assert answer.probability == pytest.approx(max(by_label.values()), abs=1e-6)


def test_many_images_in_small_batches_keep_their_order(folder):
    images = [toy.picture(k % 2, np.random.default_rng(k)) for k in range(7)]
    classify = Classifier.from_pretrained(folder)
    together, apart = classify(images, batch_size=3), [classify([image])[0] for image in images]
    assert [answer.label for answer in together] == [answer.label for answer in apart]
    assert [answer.probability for answer in together] == pytest.approx([a.probability for a in apart], abs=1e-6)
    assert classify([]) == []


def test_a_broken_image_is_named(folder, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.png: not an image"):
        Classifier.from_pretrained(folder)([tmp_path / "broken.png"])


def test_a_run_folder_stands_for_its_model(tmp_path, folder):
    for name in ("recipe.yaml", "metrics.json"):
        (tmp_path / name).write_text("")
    assert model_source(tmp_path) == str(folder)
    (tmp_path / "metrics.json").unlink()
    with pytest.raises(RunError, match="this run is not finished"):
        model_source(tmp_path)


def test_one_image_gives_one_prediction(folder, tmp_path):
    image = toy.picture(0, np.random.default_rng(0))
    image.save(tmp_path / "a.png")
    classify = Classifier.from_pretrained(folder)
    (listed,) = classify([image])
    for single in (image, np.asarray(image), torch.from_numpy(np.asarray(image).copy())):
        assert classify(single) == listed
    assert classify(str(tmp_path / "a.png")).probability == listed.probability
    assert classify(tmp_path / "a.png").file == str(tmp_path / "a.png")
    assert len(classify(image, top=99).top) == 3


def test_a_stream_is_pulled_a_little_ahead_and_no_further(folder):
    pulled = 0

    def images():
        nonlocal pulled
        for k in range(3000):
            pulled += 1
            yield np.full((8, 8), k % 256, np.uint8)

    stream = Classifier.from_pretrained(folder).predict(images(), batch_size=8)
    assert pulled == 0
    for seen in range(1, 101):
        next(stream)
        assert pulled <= seen + 3 * 8  # a batch that was computed, two that wait
    last = max(enumerate(stream, start=100))[1]
    assert (pulled, last.file) == (3000, "2999")


def test_an_error_comes_after_the_predictions_before_it(folder, tmp_path):
    image = toy.picture(0, np.random.default_rng(0))
    stream = Classifier.from_pretrained(folder).predict([image, image, tmp_path, image], batch_size=8)
    assert [next(stream).file, next(stream).file] == ["0", "1"]
    with pytest.raises(DataError, match=r"is a folder; give the image files in it"):
        next(stream)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 50])
def test_what_is_skipped_keeps_its_place(batch_size, folder, tmp_path):
    pictures = [toy.picture(k % 2, np.random.default_rng(k)) for k in range(6)]
    classify = Classifier.from_pretrained(folder)
    expected = {str(k): prediction.probability for k, prediction in enumerate(classify(pictures))}
    images = [b"", pictures[1], None, tmp_path / "none.png", pictures[4], pictures[5]]
    answers = list(classify.predict(images, batch_size=batch_size, on_error="skip"))
    assert [type(answer) for answer in answers] == [Skipped, Prediction, Skipped, Skipped, Prediction, Prediction]
    assert [answer.file for answer in answers] == ["0", "1", "2", str(tmp_path / "none.png"), "4", "5"]
    assert answers[3].reason == "no such file"
    for answer in answers:
        if isinstance(answer, Prediction):
            assert answer.probability == pytest.approx(expected[answer.file], abs=1e-6)


def test_nothing_but_broken_images_are_streamed_too(folder):
    stream = Classifier.from_pretrained(folder).predict((b"" for _ in range(3000)), batch_size=4, on_error="skip")
    assert next(stream).file == "0"
    assert sum(1 for _ in stream) == 2999


@pytest.mark.parametrize("wrong", [{"top": 0}, {"batch_size": 0}, {"on_error": "ignore"}])
def test_arguments_are_checked_at_once(wrong, folder):
    with pytest.raises(ValueError, match="allowed: "):
        Classifier.from_pretrained(folder).predict([], **wrong)


def test_images_of_different_sizes_after_the_processor(folder):
    """A network that takes any size, and a processor that keeps the aspect ratio."""
    model = tiny.build("convnext", 2)
    keeping = BitImageProcessor(size={"shortest_edge": 32}, do_center_crop=False)
    classify = Classifier(model, keeping)
    shapes = [(32, 32), (32, 48), (32, 48), (64, 32)]
    pictures = [np.random.default_rng(k).integers(0, 256, (*shape, 3), np.uint8) for k, shape in enumerate(shapes)]
    apart = [classify(picture).probability for picture in pictures]
    assert [p.probability for p in classify(pictures)] == pytest.approx(apart, abs=1e-6)
    assert len(set(apart)) == 4


def test_labels_that_occur_twice_are_told_apart():
    model = tiny.build("vit", 4)
    model.config.id2label = {0: "crane", 1: "ant", 2: "crane", 3: "bee"}
    classify = Classifier(model, tiny.processor())
    assert classify.classes == ("crane (0)", "ant", "crane (2)", "bee")
    assert sum(classify(np.zeros((8, 8), np.uint8), top=4).top.values()) == pytest.approx(1)


def kept(folder, **content):
    """The folder with what a run puts into config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hfft": content}))
    return folder


def test_calibrated_probabilities_are_the_softmax_of_the_divided_logits(folder):
    image = toy.picture(1, np.random.default_rng(1))
    kept(folder, temperature=0.02, thresholds={})
    plain = Classifier.from_pretrained(folder)([image], top=3)[0]
    answer = Classifier.from_pretrained(folder, calibrated=True)([image], top=3)[0]
    pixels = tiny.processor()(images=image, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        expected = (tiny.build("vit", 3)(pixels).logits / 0.02).softmax(dim=1)[0]
    assert list(answer.top) == list(plain.top)
    assert list(answer.top.values()) == pytest.approx(sorted(expected.tolist(), reverse=True), abs=1e-5)
    assert answer.probability > plain.probability + 0.1


def test_answers_below_the_kept_threshold_are_unsure(folder):
    images = [toy.picture(k % 2, np.random.default_rng(k)) for k in range(8)]
    plain = Classifier.from_pretrained(folder)(images)
    middle = float(np.median([answer.probability for answer in plain]))
    kept(folder, temperature=1.0, thresholds={"0.9": middle, "0.99": None})
    answers = Classifier.from_pretrained(folder, precision=0.9)(images)
    assert [answer.label == "unsure" for answer in answers] == [answer.probability < middle for answer in plain]
    assert {answer.label for answer in answers} > {"unsure"}
    assert [answer.top for answer in answers] == [answer.top for answer in plain]
    with pytest.raises(ModelError, match=r"precision: 0.99 was"):
        Classifier.from_pretrained(folder, precision=0.99)
    with pytest.raises(ModelError, match=r"precision: 0.5"):
        Classifier.from_pretrained(folder, precision=0.5)


@pytest.mark.parametrize("asked", [{"calibrated": True}, {"precision": 0.9}])
def test_a_model_without_a_temperature_says_so(folder, asked):
    with pytest.raises(ModelError, match=r"config.json has no hfft.temperature"):
        Classifier.from_pretrained(folder, **asked)


def test_a_class_called_unsure_can_not_be_told_from_the_mark(tmp_path):
    model = tiny.build("vit", 2)
    model.config.id2label = {0: "sure", 1: "unsure"}
    save_model(model, tiny.processor(), tmp_path / "model")
    kept(tmp_path / "model", temperature=1.0, thresholds={"0.9": 0.5})
    with pytest.raises(ModelError, match="is called 'unsure' itself"):
        Classifier.from_pretrained(tmp_path / "model", precision=0.9)


def test_transformers_keeps_what_config_json_says_and_a_new_run_does_not(folder, tmp_path):
    kept(folder, temperature=1.5, thresholds={"0.9": None})
    model = AutoModelForImageClassification.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    tiny.processor().save_pretrained(tmp_path / "again")
    assert Classifier.from_pretrained(tmp_path / "again", calibrated=True).temperature == 1.5
    network, processor = load_checkpoint(ModelSpec(checkpoint=str(folder)), ("a", "b"))
    save_model(network, processor, tmp_path / "new")
    assert "hfft" not in json.loads((tmp_path / "new" / "config.json").read_text())


def test_a_processor_that_takes_no_image_is_found_when_a_model_is_opened():
    processor = tiny.processor()
    processor.image_mean = None
    with pytest.raises(ModelError, match="ViTImageProcessor, can't take an image"):
        Classifier(tiny.build("vit", 3), processor)
