import pytest
import tiny

from hfft.errors import ModelError
from hfft.training.recomputation import check_recomputation, end_recomputation, exact_recomputation


@pytest.mark.parametrize("family", ["vit", "swin", "siglip"])
@pytest.mark.parametrize("switch", ["activation_checkpointing", "gradient_checkpointing"])
def test_a_family_that_can(family, switch):
    network = tiny.build(family)
    check_recomputation(network, {})
    assert not network.is_activation_checkpointing
    check_recomputation(network, {switch: True})
    assert network.is_activation_checkpointing
    end_recomputation(network)
    assert not network.is_activation_checkpointing


@pytest.mark.parametrize("family", ["resnet", "convnext", "efficientnet", "levit"])
def test_a_family_that_can_not(family):
    with pytest.raises(ModelError, match=f"gradient_checkpointing: the architecture {family} can't"):
        check_recomputation(tiny.build(family), {"gradient_checkpointing": True})
    end_recomputation(tiny.build(family))


def test_options_that_change_a_gradient_are_set_back():
    assert exact_recomputation(None) == ({"use_reentrant": False, "preserve_rng_state": True}, [])
    options, changed = exact_recomputation({"use_reentrant": True, "every_n_layers": 2})
    assert options == {"use_reentrant": False, "preserve_rng_state": True, "every_n_layers": 2}
    assert changed == ["use_reentrant: false"]
