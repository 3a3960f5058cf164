import io

import numpy as np
import pytest
import tiny
import torch
import toy

from hfft.errors import DataError, ModelError
from hfft.inference.classifier import Classifier, model_source
from hfft.model.checkpoint import save_model


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
    (tmp_path / "recipe.yaml").write_text("")
    assert model_source(tmp_path) == str(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="this run is not finished"):
        model_source(tmp_path)
