import json
from types import SimpleNamespace

import peft
import pytest
import timm
import tiny
import torch
import torchvision
from accelerate import PartialState
from families import ALL_AT_NIGHT
from torch import nn
from transformers import ViTModel

from hfft.errors import ModelError
from hfft.model.config import labels_of, set_labels
from hfft.model.given import align_labels, check_reopens, fingerprints, take_model

PartialState()  # which loggers ask
PIXELS = torch.linspace(-1, 1, 3 * tiny.SIDE**2).reshape(1, 3, tiny.SIDE, tiny.SIDE)


def with_adapter():
    return peft.get_peft_model(tiny.build("vit"), peft.LoraConfig(target_modules=["q_proj"], r=2))


def with_nan():
    model = tiny.build("vit")
    with torch.no_grad():
        model.vit.layernorm.weight[3] = torch.nan
    return model


def made_for_inference():
    with torch.inference_mode():
        return tiny.build("vit")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of PEFT
@pytest.mark.parametrize(
    ("make", "found"),
    [
        (with_adapter, "PEFT"),
        (lambda: torch.compile(tiny.build("vit"), backend="eager"), "compiled"),
        (lambda: nn.DataParallel(tiny.build("vit")), "DataParallel"),
        (lambda: torchvision.models.resnet18(num_classes=2), "torchvision's ResNet"),
        (lambda: timm.create_model("resnet10t", num_classes=2), "timm's ResNet"),
        (lambda: tiny.build("vit").to("meta"), "without values"),
        (lambda: "google/vit", "found str"),
        (with_nan, "vit.layernorm.weight"),
        (made_for_inference, "inference_mode"),
    ],
)
def test_what_is_no_plain_classifier_is_refused(make, found):
    with pytest.raises(ModelError, match=found):
        take_model(make())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_in_another_precision_trains_in_float32(dtype):
    model = tiny.build("resnet").to(dtype)
    take_model(model)
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert model.config.dtype == torch.float32
    check_reopens(model, PIXELS, trust_remote_code=False)


def test_a_model_answers_with_logits_alone():
    model = tiny.build("clip")
    model.config.output_hidden_states = model.config.vision_config.output_hidden_states = True
    take_model(model)
    assert set(model(pixel_values=PIXELS)) == {"logits"}


@pytest.mark.parametrize("family", ALL_AT_NIGHT)
def test_a_model_of_each_family_can_be_opened_again(family):
    model = tiny.build(family, 3)
    take_model(model)
    align_labels(model, ("a", "b", "c"))
    set_labels(model.config, ("a", "b", "c"))
    check_reopens(model, PIXELS, trust_remote_code=False)


def other_head(model):
    model.classifier = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))


def other_forward(model):
    model.vit.layernorm.register_forward_hook(lambda module, inputs, output: output * 2)


def other_activation(model):
    model.vit.layers[1].mlp.activation_fn = nn.ReLU()


def shared_weights(model):
    model.vit.layers[1].mlp.fc2.weight = model.vit.layers[0].mlp.fc2.weight


@pytest.mark.parametrize("change", [other_head, other_forward, other_activation, shared_weights])
def test_what_the_config_does_not_say_is_refused(change):
    model = tiny.build("vit", 2)
    change(model)
    with pytest.raises(ModelError, match="opened again from its config"):
        check_reopens(model, PIXELS, trust_remote_code=False)


def test_a_network_without_a_head_is_refused():
    with pytest.raises(ModelError, match="ViTForImageClassification with other tensors"):
        check_reopens(ViTModel(tiny.build("vit").config), PIXELS, trust_remote_code=False)


@pytest.mark.parametrize("family", ["vit", "resnet", "levit+teacher", "swiftformer", "perceiver", "timm_wrapper"])
@pytest.mark.parametrize("names", [("cow", "ant", "bee"), ("Cow", "ANT", "bee ")])
def test_outputs_follow_their_names(family, names):
    model = tiny.build(family, 3)
    set_labels(model.config, names)
    with torch.no_grad():
        before = model(pixel_values=PIXELS).logits
        align_labels(model, ("ant", "bee", "cow"))
        after = model(pixel_values=PIXELS).logits
    torch.testing.assert_close(after, before[:, [1, 2, 0]], rtol=0, atol=1e-6)
    assert not torch.equal(after, before)


def test_outputs_are_numbered_from_0_in_words_or_numbers():
    model = tiny.build("vit", 3)
    model.config.id2label = {"2": "ant", "0": "bee", "1": "cow"}
    assert labels_of(model.config) == ("bee", "cow", "ant")
    model.config.id2label = {1: "ant", 2: "bee", 3: "cow"}
    with pytest.raises(ModelError, match="0 to 2"):
        align_labels(model, ("ant", "bee", "cow"))


@pytest.mark.parametrize("names", [("LABEL_0", "LABEL_1", "LABEL_2"), ("0", "1", "2"), ("ant", "bee", "cow")])
def test_outputs_whose_names_say_nothing_else_stay(names):
    model = tiny.build("vit", 3)
    set_labels(model.config, names)
    before = model.classifier.weight.clone()
    align_labels(model, ("ant", "bee", "cow"))
    assert torch.equal(model.classifier.weight, before)


@pytest.mark.parametrize(("names", "problem"), [(("ant", "bee", "dog"), "only 2"), (("ant", "bee"), "2 classes")])
def test_other_classes_are_refused(names, problem):
    model = tiny.build("vit", len(names))
    set_labels(model.config, names)
    with pytest.raises(ModelError, match=problem):
        align_labels(model, ("ant", "bee", "cow"))


def test_fingerprints_tell_weights_from_others():
    model = tiny.build("vit")
    before = json.loads(json.dumps(fingerprints(model)))
    assert before == fingerprints(tiny.build("vit"))
    with torch.no_grad():
        model.vit.layernorm.weight[0] += 1e-6
    now = fingerprints(model)
    assert (now["weights"] != before["weights"], now["config"]) == (True, before["config"])


def test_labels_are_no_part_of_a_fingerprint():
    model = tiny.build("vit", 2)
    before = fingerprints(model)
    set_labels(model.config, ("a", "b"), is_multi_label=True)
    assert fingerprints(model) == before
    assert labels_of(SimpleNamespace(id2label=model.config.id2label)) == ("a", "b")
