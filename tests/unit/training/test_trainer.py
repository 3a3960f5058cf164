"""The traps of transformers.Trainer: each shown on plain Trainer code, and closed here."""

import dataclasses
import json

import pytest
import tiny
import torch
import toy
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from hfft.errors import TrainingError
from hfft.recipe.augment import AugmentSpec
from hfft.recipe.spec import AdapterSpec, ReplaySpec
from hfft.training.trainer import newest_checkpoint


class Snapshots(TrainerCallback):
    """Copies of all weights after each step."""

    def __init__(self):
        self.by_step = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.by_step[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}


class Watch(TrainerCallback):
    """Optimizer state and training flags at the end of training."""

    def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        held = getattr(optimizer, "optimizer", optimizer)
        self.state = {id(parameter) for parameter in held.state}
        self.trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def plain_trainer(model, folder, data, **arguments):
    settings = TrainingArguments(
        str(folder),
        num_train_epochs=arguments.pop("num_train_epochs", 2),
        learning_rate=1e-2,
        eval_strategy="epoch",
        save_strategy="epoch",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        label_names=["labels"],
        **arguments,
    )
    return Trainer(
        model,
        settings,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=data.collate,
        compute_metrics=data.measure,
        preprocess_logits_for_metrics=data.reduce,
    )


@pytest.mark.parametrize(
    ("family", "phase"),
    [
        ("vit", {"unfreeze": {"blocks": 2}}),
        ("vit", {"adapter": AdapterSpec(on="mlp")}),
        ("swin", {"unfreeze": "all"}),
        ("convnext", {"unfreeze": {"blocks": 2}}),
        ("resnet", {"unfreeze": "all"}),
        ("resnet", {"adapter": AdapterSpec(on="mlp")}),
    ],
    ids=str,
)
def test_the_phase_ends_with_its_best_weights_tensor_by_tensor(family, phase, tmp_path):
    """Trap A, for load_best_model_at_end; the metric is the worst epoch's, so that best is not last."""
    snapshots = Snapshots()
    arguments = {"num_train_epochs": 3, "metric_for_best_model": "log_loss", "greater_is_better": True}
    model, result = toy.run(tiny.build(family), tmp_path, callbacks=[snapshots], arguments=arguments, **phase)
    assert result.best_step < result.steps
    best, last = snapshots.by_step[result.best_step], snapshots.by_step[result.steps]
    now = model.state_dict()
    assert all(torch.equal(now[name], best[name]) for name in best)
    assert not all(torch.equal(now[name], last[name]) for name in last)


def test_plain_trainer_keeps_the_last_encoder_of_a_vit(tmp_path):
    """Trap A as it stands in the installed transformers."""
    model, snapshots = tiny.build("vit"), Snapshots()
    trainer = plain_trainer(
        model,
        tmp_path,
        toy.phase_data(),
        num_train_epochs=3,
        load_best_model_at_end=True,
        metric_for_best_model="log_loss",
        greater_is_better=True,
    )
    trainer.add_callback(snapshots)
    trainer.train()
    best = snapshots.by_step[trainer.state.best_global_step]
    same = [torch.equal(value, best[name]) for name, value in model.state_dict().items()]
    assert sum(same) < len(same) / 2


def test_frozen_batchnorm_does_not_move_and_the_result_says_so(tmp_path):
    """Trap D."""
    model = tiny.build("resnet")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model, result = toy.run(model, tmp_path, unfreeze="head")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"classifier.1.weight", "classifier.1.bias"}
    assert result.frozen["changed"] == 0
    assert result.frozen["tensors"] == len(before) - 2
    assert json.loads((tmp_path / "result.json").read_text())["frozen"] == result.frozen


def test_plain_trainer_moves_frozen_batchnorm(tmp_path):
    """Trap D as it stands: no gradient and `eval()` before training are not enough."""
    model = tiny.build("resnet").requires_grad_(False)
    model.classifier.requires_grad_(True)
    before = {name: value.clone() for name, value in model.named_buffers()}
    plain_trainer(model.eval(), tmp_path, toy.phase_data()).train()
    moved = [name for name, value in model.named_buffers() if not torch.equal(value, before[name])]
    assert len(moved) == len(before)


def test_a_frozen_tensor_that_is_changed_in_training_stops_the_run(tmp_path):
    class Meddler(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.vit.embeddings.cls_token.data += 1

    with pytest.raises(TrainingError, match=r"the first is vit\.embeddings\.cls_token"):
        toy.run(tiny.build("vit"), tmp_path, unfreeze="head", callbacks=[Meddler()])
    assert not (tmp_path / "result.json").exists()


FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}
RECOMPUTE = "activation_checkpointing" if "activation_checkpointing" in FIELDS else "gradient_checkpointing"


class Modes(TrainerCallback):
    """Modules of a frozen block in training mode while the network runs."""

    def __init__(self, name):
        self.name = name
        self.seen = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        block = next(module for name, module in model.named_modules() if name.endswith(self.name))
        block.register_forward_pre_hook(lambda *_: self.seen.append(any(part.training for part in block.modules())))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("phase", [{"unfreeze": {"blocks": 2}}, {"adapter": AdapterSpec(blocks=2)}], ids=str)
def test_recomputed_activations_change_nothing(phase, tmp_path):
    """Dropout included, and frozen blocks in evaluation mode each time that they run."""
    frozen, released = Modes("vit.layers.0"), Modes("vit.layers.3")
    plain, _ = toy.run(tiny.build("vit"), tmp_path / "plain", **phase)
    model, _ = toy.run(
        tiny.build("vit"),
        tmp_path / "recomputed",
        callbacks=[frozen, released],
        arguments={RECOMPUTE: True},
        **phase,
    )
    assert len(frozen.seen) > 6
    assert not any(frozen.seen)
    assert any(released.seen)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


@pytest.mark.parametrize("phase", [{"unfreeze": {"blocks": 1}}, {"adapter": AdapterSpec()}], ids=str)
def test_no_optimizer_state_for_frozen_parameters(phase, tmp_path):
    watch = Watch()
    toy.run(tiny.build("vit"), tmp_path, callbacks=[watch], **phase)
    assert watch.state == watch.trainable


def test_checkpoints_appear_whole(tmp_path):
    """Trap I: every checkpoint folder that exists at any moment can be continued from."""
    seen = []

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen.append({path.name for path in tmp_path.iterdir()})

    toy.run(tiny.build("vit"), tmp_path, unfreeze="head", callbacks=[Look()], arguments={"num_train_epochs": 3})
    assert seen[0] >= {"checkpoint-3"}
    assert newest_checkpoint(tmp_path) is not None
    left = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert len(left) == 1  # save_total_limit 1 keeps the best at the end
    assert newest_checkpoint(tmp_path, also=["scaler.pt"]) is None  # float16's loss scale
    torch.save({"scale": 65536.0}, tmp_path / left[0] / "scaler.pt")
    assert newest_checkpoint(tmp_path, also=["scaler.pt"]) is not None


def test_plain_trainer_takes_a_half_written_checkpoint_for_the_last(tmp_path):
    """Trap I as it stands."""
    from transformers.trainer_utils import get_last_checkpoint

    (tmp_path / "checkpoint-3").mkdir()
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-3")
    assert newest_checkpoint(tmp_path) is None


def test_checkpoints_are_transformers_folders(tmp_path):
    toy.run(tiny.build("vit"), tmp_path, unfreeze="head")
    folder = next(tmp_path.glob("checkpoint-*"))
    assert (folder / "config.json").is_file()
    assert "classifier.weight" in load_file(folder / "model.safetensors")


def test_early_stopping_ends_the_phase(tmp_path):
    arguments = {"num_train_epochs": 8, "metric_for_best_model": "log_loss", "greater_is_better": True}
    _, result = toy.run(tiny.build("vit"), tmp_path, unfreeze="head", early_stopping=2, arguments=arguments)
    assert result.steps == result.best_step + 2 * 3  # three steps per epoch
    assert result.steps < 8 * 3


def test_without_validation_the_last_weights_stay(tmp_path):
    snapshots = Snapshots()
    data = toy.phase_data(validation=0)
    model, result = toy.run(tiny.build("vit"), tmp_path, data=data, unfreeze="head", callbacks=[snapshots])
    assert (result.best_step, result.metrics) == (6, {})
    assert torch.equal(model.classifier.weight, snapshots.by_step[6]["classifier.weight"])


def test_outputs_that_are_no_numbers_stop_the_run(tmp_path):
    with pytest.raises(TrainingError, match=r"the loss is nan at step 2, learning rate \d"):
        toy.run(tiny.build("vit"), tmp_path, unfreeze="all", arguments={"learning_rate": 1e38, "max_grad_norm": 0})


def test_history_has_every_evaluation(tmp_path):
    toy.run(tiny.build("vit"), tmp_path, unfreeze="head", arguments={"num_train_epochs": 3})
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in history if "eval_accuracy" in entry] == [1, 2, 3]
    assert {"eval_accuracy", "eval_macro_f1", "eval_balanced_accuracy", "eval_log_loss"} <= set(history[0])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory with per_device_train_batch_size=8; less is"),
        (OSError(28, "No space left on device"), "No space left on device; the same command continues"),
    ],
)
def test_what_the_machine_lacks_is_said_in_one_line(error, words, tmp_path):
    class Fail(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise error

    with pytest.raises(TrainingError, match=words):
        toy.run(tiny.build("vit"), tmp_path, unfreeze="head", callbacks=[Fail()])


def test_mixed_precision_leaves_nothing_on_the_model(tmp_path):
    model, _ = toy.run(tiny.build("vit"), tmp_path, unfreeze="head", arguments={"bf16": True})
    assert not hasattr(model.forward, "__wrapped__")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("arguments", [{"eval_delay": 9}, {"eval_strategy": "steps", "eval_steps": 99}], ids=str)
def test_a_phase_that_ends_before_its_first_evaluation_keeps_its_last_weights(arguments, tmp_path):
    snapshots = Snapshots()
    model, result = toy.run(tiny.build("vit"), tmp_path, unfreeze="head", callbacks=[snapshots], arguments=arguments)
    assert result.best_step == 6
    assert torch.equal(model.classifier.weight, snapshots.by_step[6]["classifier.weight"])
    assert (tmp_path / result.checkpoint / "model.safetensors").is_file()


def test_every_phase_computes_in_mixed_precision(tmp_path):
    """Accelerate 1.15 prepares a model once; the second phase would be trained in float32."""
    model, seen = tiny.build("vit"), []
    block = model.vit.layers[3]
    block.register_forward_pre_hook(lambda module, _: seen.append(torch.is_autocast_enabled("cpu")))
    for number in range(2):
        phase = {"unfreeze": {"blocks": 1}, "arguments": {"bf16": True, "num_train_epochs": 1}}
        seen.clear()
        model, _ = toy.run(model, tmp_path / str(number), **phase)
        assert sum(seen) == 3 + 1  # training steps and the evaluation; preparations have none
    seen.clear()
    model(pixel_values=torch.zeros(1, 3, tiny.SIDE, tiny.SIDE))
    assert seen == [False]


@pytest.mark.parametrize("augment", [AugmentSpec(), AugmentSpec(flip="both", mixup=0.4)], ids=["still", "mixed"])
def test_pixels_of_8_bits_train_the_same(augment, tmp_path):
    weights = []
    for eight_bit in (False, True):
        data = toy.phase_data(augment=augment, eight_bit=eight_bit)
        assert (data.train[0]["pixel_values"].dtype == torch.uint8) == eight_bit
        model, _ = toy.run(tiny.build("vit"), tmp_path / str(eight_bit), data=data, unfreeze="all")
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("replay", [None, ReplaySpec(mode="force", engine="torch")], ids=["images", "replayed"])
def test_dropping_the_last_training_batch_drops_no_validation_image(replay, tmp_path):
    """24 training images in batches of 8: nothing to drop; 12 validation images in batches of 8 or 32."""
    found = []
    for number, (drops, batch) in enumerate([(False, 8), (True, 8), (True, 32)]):
        arguments = {"dataloader_drop_last": drops, "per_device_eval_batch_size": batch}
        _, result = toy.run(
            tiny.build("vit"), tmp_path / str(number), unfreeze="head", arguments=arguments, replay=replay
        )
        found.append(result.metrics)
    assert found[1] == pytest.approx(found[0], abs=1e-6)
    assert found[2] == pytest.approx(found[0], abs=1e-6)
