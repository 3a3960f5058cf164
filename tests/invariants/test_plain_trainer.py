"""The same job written by hand with transformers.Trainer gives the same weights, bit for bit."""

import pytest
import tiny
import torch
import toy
from transformers import Trainer, TrainingArguments, set_seed


@pytest.mark.parametrize(("family", "last"), [("vit", "vit.layers.3."), ("convnext", "convnext.encoder.stages.3.")])
def test_two_phases_by_hand(family, last, tmp_path):
    def by_hand(model, released, rate, folder):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(released))
        settings = TrainingArguments(
            str(folder), num_train_epochs=2, learning_rate=rate, remove_unused_columns=False, seed=0, use_cpu=True
        )
        set_seed(0)
        data = toy.phase_data(validation=0)
        Trainer(model, settings, train_dataset=data.train, data_collator=data.collate).train()
        return model

    def with_hfft(model, unfreeze, rate, folder):
        arguments = {"learning_rate": rate}
        data = toy.phase_data(validation=0)
        return toy.run(model, folder, data=data, unfreeze=unfreeze, arguments=arguments)[0]

    # by hand there is nothing that keeps dropout off in the frozen part: leave dropout out
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if family == "vit" else {}
    norm = f"{family}.layernorm."
    one = by_hand(tiny.build(family, **changes), ("classifier.",), 1e-2, tmp_path / "a")
    one = by_hand(one, (last, norm, "classifier."), 1e-3, tmp_path / "b")
    two = with_hfft(tiny.build(family, **changes), "head", 1e-2, tmp_path / "c")
    two = with_hfft(two, {"blocks": 1}, 1e-3, tmp_path / "d")
    expected, got, start = one.state_dict(), two.state_dict(), tiny.build(family, **changes).state_dict()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    moved = {name for name in got if not torch.equal(got[name], start[name])}
    assert any(name.startswith(last) for name in moved)
