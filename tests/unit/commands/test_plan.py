from dataclasses import replace

import numpy as np
import pytest
import tiny
import toy
from shards import write_tar
from transformers import EarlyStoppingCallback, TrainerCallback

from hfft.cli import main
from hfft.commands.cross_validate import cross_validate
from hfft.commands.finetune import finetune
from hfft.commands.plan import check_callbacks, plan_recipe
from hfft.data.sources.reading import load_data
from hfft.errors import ModelError, RecipeError
from hfft.recipe.loading import dump_recipe, load_recipe
from hfft.recipe.spec import SplitSpec
from hfft.training.losses import class_weights
from hfft.training.precision import phases_in

HEAD = {"name": "head", "learning_rate": 0.1}


@pytest.fixture
def recipe(tmp_path, photos):
    tiny.save(tmp_path / "vit", "vit")
    source = photos({"train/ant": 6, "train/bee": 2, "validation/ant": 1, "validation/bee": 1})

    def make(*phases, **keys):
        model = {"checkpoint": str(tmp_path / "vit")}
        data = {"source": str(source), "splits": {"test": None}}
        return load_recipe({"name": "r", "model": model, "data": data, "phases": [HEAD, *phases], **keys})

    return make


def test_balanced_weights_make_up_for_the_counts(recipe):
    asked = recipe(class_weights="balanced")
    images = load_data(asked.data, asked.seed)
    ant, bee = class_weights(asked, images)
    assert (6 * ant, 2 * bee) == (4, 4)  # each class half of 8 images


def test_weights_by_name_are_put_in_the_order_of_the_classes(recipe):
    asked = recipe(class_weights={"bee": 3, "ant": 0.5})
    assert class_weights(asked, load_data(asked.data, asked.seed)) == (0.5, 3)


def test_weights_of_other_classes_are_refused_in_the_plan(recipe):
    with pytest.raises(RecipeError, match="class_weights: found ant, cat"):
        plan_recipe(recipe(class_weights={"ant": 1, "cat": 1}))


def test_a_gradual_phase_is_planned_as_the_phases_that_it_stands_for(recipe):
    _, plans = plan_recipe(recipe({"name": "more", "gradual": {"blocks_per_phase": 3}, "learning_rate": 0.01}))
    assert [(plan.phase, plan.trains) for plan in plans] == [
        ("head", "head"),
        ("more-1", "blocks 1-3 of 4, norm, head"),
        ("more-2", "blocks 0-3 of 4, norm, head"),
    ]


def test_a_gradual_phase_can_not_take_the_name_of_another(recipe):
    with pytest.raises(RecipeError, match="more-1, more-1, more-2"):
        plan_recipe(recipe({"name": "more-1"}, {"name": "more", "gradual": {"blocks_per_phase": 2}}))


def test_the_plan_estimates_memory(recipe):
    _, (head, blocks) = plan_recipe(recipe({"name": "blocks", "unfreeze": {"blocks": 2}}))
    assert 0 < head.activation_bytes < blocks.activation_bytes
    assert head.state_bytes < blocks.state_bytes


def test_a_precision_is_that_of_phases_that_name_none(recipe):
    asked = recipe({"name": "own", "fp16": True}, {"name": "full", "bf16": False})
    assert phases_in(asked, "float32") == asked.phases
    flags = [phase.arguments.get("bf16") for phase in phases_in(asked, "bfloat16")]
    assert flags == [True, None, False]


def test_a_head_that_is_solved_is_planned_without_rates(recipe):
    (plan,) = plan_recipe(recipe(phases=[{"name": "head"}]))[1]
    assert (plan.solver, plan.groups, plan.batch) == ("lbfgs", (), plan.images)
    assert plan.steps_in_words == f"solved by L-BFGS for up to {plan.steps} weight decays"
    (plan,) = plan_recipe(recipe(phases=[HEAD]))[1]
    assert (plan.solver, plan.steps) == ("steps", 3)


def test_processes_that_would_see_no_image_are_refused(recipe):
    asked = recipe(training={"per_device_train_batch_size": 4})
    assert plan_recipe(asked, processes=2)[1][0].shares == (4, 4)
    with pytest.raises(RecipeError, match=r"phases\.head: 8 training images .* 2 batches of 4"):
        plan_recipe(asked, processes=3)


def test_a_batch_can_be_found_by_one_process_only(recipe):
    asked = recipe(training={"per_device_train_batch_size": 2, "auto_find_batch_size": True})
    assert plan_recipe(asked)[1][0].device_batch == 2
    with pytest.raises(RecipeError, match=r"phases\.head\.auto_find_batch_size: is for"):
        plan_recipe(asked, processes=2)


def test_the_shares_of_a_folder_of_shards_are_printed(recipe, tmp_path, monkeypatch, capsys):
    asked = recipe(data={"source": "shards", "splits": {"test": None, "validation": None}})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(asked))
    (tmp_path / "shards").mkdir()
    for number in range(3):  # 5, 5 and 3 images
        members = [
            (f"{n}.{ending}", content)
            for n in range(5 - number // 2 * 2)
            for ending, content in (
                ("png", toy.png(toy.picture(0, np.random.default_rng(n)))),
                ("cls", b"%d" % (n % 2)),
            )
        ]
        write_tar(tmp_path / "shards" / f"train-{number}.tar", members)
    assert main(["plan", "recipe.yaml", "--processes", "3", "training.per_device_train_batch_size=3"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "shards: 3; each process reads its images from all of them" in lines
    assert "6 steps of 9 images (3 at once on each of 3 processes), 3 epochs" in lines
    assert "each process sees 3 to 6 of 13 images per epoch" in lines
    assert main(["plan", "recipe.yaml"]) == 0
    assert "shards:" not in capsys.readouterr().out


def test_a_processor_and_a_network_of_different_sizes_are_refused(recipe, tmp_path):
    tiny.processor(48).save_pretrained(tmp_path / "vit")
    with pytest.raises(ModelError, match=r"\(1, 3, 48, 48\).*model.image_size"):
        plan_recipe(recipe())


def test_a_family_that_can_not_compute_activations_again_is_refused(recipe, tmp_path):
    plan_recipe(recipe(training={"activation_checkpointing": True}))
    tiny.save(tmp_path / "vit", "resnet")
    with pytest.raises(ModelError, match=r"phases\.head: activation_checkpointing: the architecture resnet"):
        plan_recipe(recipe(training={"activation_checkpointing": True}))


def test_weights_that_are_cut_or_gone_are_told_in_the_plan(recipe, tmp_path):
    path = tmp_path / "vit" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ModelError, match="cut or damaged"):
        plan_recipe(recipe())
    path.unlink()
    with pytest.raises(ModelError, match="has no weights"):
        plan_recipe(recipe())


def test_a_recipe_changed_in_python_is_planned_as_it_now_is(recipe):
    asked = recipe(training={"weight_decay": 0.1}, phases=[{"name": "head"}])
    (plan,) = plan_recipe(replace(asked, training={"learning_rate": 0.5}))[1]
    assert [(group.learning_rate, group.weight_decay) for group in plan.groups] == [(0.5, 0.0), (0.5, 0.0)]
    wrong = replace(asked, novelty=True, data=replace(asked.data, splits=SplitSpec(validation=None, test=None)))
    for use in (plan_recipe, finetune, cross_validate):
        with pytest.raises(RecipeError, match=r"novelty: needs data\.splits\.validation"):
            use(wrong)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"warmup_steps": 500}, "warmup_steps: found 500, and the phase has 3 steps"),
        ({"warmup_steps": 3}, "warmup_steps: found 3, and the phase has 3 steps"),
        ({"warmup_steps": 0.5, "max_steps": 1}, "warmup_steps: found 0.5, and the phase has 1 step:"),
        ({"eval_delay": 4}, "eval_delay: found 4, and the phase ends after 3 epochs"),
        ({"eval_delay": 4, "eval_strategy": "steps"}, "eval_delay: found 4, and the phase ends after 3 steps"),
    ],
    ids=str,
)
def test_a_phase_that_ends_before_its_warm_up_or_first_evaluation_is_refused(recipe, arguments, words):
    with pytest.raises(RecipeError) as caught:
        plan_recipe(recipe(phases=[{**HEAD, **arguments}]))  # 8 images, 3 epochs
    assert str(caught.value).startswith(f"phases.head.{words}")


def test_a_warm_up_for_other_phases(recipe):
    shared = {"warmup_steps": 4, "max_steps": 9}
    short = {"lr_scheduler_type": "constant", "max_steps": 2}
    assert [plan.steps for plan in plan_recipe(recipe({"name": "short", **short}, training=shared))[1]] == [9, 2]


@pytest.mark.parametrize("arguments", [{"warmup_steps": 2}, {"warmup_steps": 0.1}, {"eval_delay": 3}], ids=str)
def test_a_warm_up_or_a_delay_within_a_phase(recipe, arguments):
    assert plan_recipe(recipe(phases=[{**HEAD, **arguments}]))[1][0].steps == 3


def test_early_stopping_of_the_user_needs_evaluations(recipe):
    asked = recipe()
    images = load_data(asked.data, asked.seed)
    check_callbacks([EarlyStoppingCallback()], asked, images)
    check_callbacks([TrainerCallback()], recipe(training={"eval_strategy": "no"}), images)
    with pytest.raises(RecipeError, match=r"callbacks: EarlyStoppingCallback needs evaluations, and phases\.more has"):
        check_callbacks([EarlyStoppingCallback()], recipe({"name": "more", "eval_strategy": "no"}), images)


@pytest.mark.parametrize(
    ("family", "batch", "more", "is_refused"),
    [
        ("levit", 7, {}, True),  # 8 images: the last batch has one
        ("levit", 1, {}, True),
        ("levit", 4, {}, False),
        ("levit", 7, {"dataloader_drop_last": True}, False),
        ("levit", 7, {"batchnorm": "eval"}, False),
        ("mobilevitv2", 7, {}, False),  # its maps have several places
    ],
)
def test_batches_of_one_image_under_a_batchnorm_that_trains(recipe, tmp_path, family, batch, more, is_refused):
    tiny.save(tmp_path / family, family)
    phase = {"name": "all", "unfreeze": "all", "batchnorm": "train", "per_device_train_batch_size": batch, **more}
    asked = recipe(phases=[phase], model={"checkpoint": str(tmp_path / family)})
    if not is_refused:
        plan_recipe(asked)
        return
    with pytest.raises(RecipeError, match=r"phases\.all\.batchnorm: 'train' takes"):
        plan_recipe(asked)
