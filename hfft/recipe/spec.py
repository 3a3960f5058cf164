"""The recipe as frozen dataclasses: one section, one class; the values of a YAML file after validation."""

from dataclasses import field, replace
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from hfft.recipe.augment import AugmentSpec
from hfft.recipe.values import (
    STRICT,
    Average,
    Color,
    Fraction,
    License,
    Name,
    RepoId,
    Size,
    Split,
    Unfreeze,
    UserPath,
)

STEPPING = {
    *("learning_rate", "num_train_epochs", "max_steps", "optim", "optim_args", "lr_scheduler_type"),
    *("lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm", "gradient_accumulation_steps"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "eval_strategy", "eval_steps", "eval_delay", "auto_find_batch_size"),
}
"""Fields of TrainingArguments that say how a phase takes its steps; a solved head takes none."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ModelSpec:
    """The checkpoint to start from.

    Attributes:
        checkpoint: Local folder or Hub id with a config, safetensors weights and an image processor; or what hfft
            wrote: a run folder, a finished phase's, the weights in it, or an adapter folder. The head is always new.
        revision: Branch, tag or commit of a Hub id.
        image_size: Side in pixels that replaces the processor's; for networks that take any size.
        head: Start values of the new head's last layer: `zero`, so that the first step's loss is ln(number of
            classes) whatever the features' scale (as in big_vision), or `normal` (standard deviation 0.02).
        memory_format: `channels_last` is faster for convolutional networks; `contiguous` is PyTorch's own default;
            `auto` takes the first for networks of many convolutions.
        trust_remote_code: Lets the checkpoint bring Python code of its own.
    """

    checkpoint: UserPath
    revision: str | None = None
    image_size: Annotated[int, Field(gt=0)] | None = None
    head: Literal["zero", "normal"] = "zero"
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True, config=STRICT, kw_only=True)
class SplitSpec:
    """Where each split comes from; `auto` takes the source's split of that name, else a fraction of train.

    Attributes:
        train: Name of the source's split to train on.
        validation: Name of a split, a fraction of train, `{fold: I, of: N}`, or null for none.
        test: Likewise.
    """

    train: str = "train"
    validation: Split | None = "auto"
    test: Split | None = "auto"


@dataclass(frozen=True, config=STRICT, kw_only=True)
class DataSpec:
    """The images.

    Attributes:
        source: Folder of class folders (with or without split folders), table of images or of their paths (CSV, TSV,
            JSON lines, Parquet; a file or a folder of them), tar shards, what `save_to_disk` wrote, or Hub id.
        config: Configuration name of a Hub data set.
        revision: Branch, tag or commit of a Hub data set.
        task: Whether an image has one label (`single_label`) or any number of them (`multi_label`); `auto` takes it
            from the labels: lists of classes, and several columns of 0 and 1, are multi-label.
        image_folder: Folder that paths in a table begin at; null is the table's own.
        image_column: Column with the image or its path; found by its type, else by its name, when null.
        label_column: Column with the label, with a list of labels, or with a list of shares of all classes; or a list
            of columns, one for each class, with 0 and 1 (multi-label) or its share (soft labels, summing to 1).
            `class_folder` is the folder that an image lies in. Found by its type, else by its name, when null.
        weight_column: Column with the weight of each training image in the loss, on average 1; null weighs all alike.
        split_column: Column with the name of each row's split; null is one that holds such names alone.
        group_column: Column that tells what belongs together (a patient, a video): no split divides it. For files,
            `parent_folder` is the folder they lie in.
        max_per_class: Most training images of a class, for few-shot training; validation and test stay as they are.
        fit: How an image is brought to the size that the network takes: as the `checkpoint` does, which most often
            cuts off its edges; `squash` resizes all of it, whatever its shape; `letterbox` keeps its shape between
            bars. Saved with the model.
        background: Color that transparent pixels are laid over: `white`, `black`, `gray`, or [red, green, blue] from
            0 to 255; null takes the colors that the file holds below them, as transformers' pipelines do. Saved with
            the model.
        bad_images: What happens to images that can't be read: `skip` leaves them out and lists them, `stop` ends the
            run before it begins.
        audit: What is looked at before training: `full` decodes every image and finds near duplicates, `quick` reads
            files and their headers, `off` looks at nothing.
        leaks: What happens when images of the training split are in another split too: `warn` or `stop`.
    """

    source: UserPath
    config: str | None = None
    revision: str | None = None
    task: Literal["auto", "single_label", "multi_label"] = "auto"
    image_folder: UserPath | None = None
    image_column: str | None = None
    label_column: str | Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    weight_column: str | None = None
    split_column: str | None = None
    group_column: str | None = None
    max_per_class: Annotated[int, Field(gt=0)] | None = None
    splits: SplitSpec = field(default_factory=SplitSpec)
    augment: AugmentSpec = field(default_factory=AugmentSpec)
    fit: Literal["checkpoint", "squash", "letterbox"] = "checkpoint"
    background: Color | None = None
    bad_images: Literal["skip", "stop"] = "skip"
    audit: Literal["full", "quick", "off"] = "full"
    leaks: Literal["warn", "stop"] = "warn"


@dataclass(frozen=True, config=STRICT, kw_only=True)
class LossSpec:
    """The training loss; the metrics are always those of the unchanged logits.

    Attributes:
        name: `cross_entropy`; `focal` counts images less that are predicted well already
            (https://hf.co/papers/1708.02002); `logit_adjusted` makes up for rare classes
            (https://hf.co/papers/2007.07314).
        gamma: Of the focal loss; 0 would be cross entropy.
        tau: Of the logit adjustment; 0 would be cross entropy.
    """

    name: Literal["cross_entropy", "focal", "logit_adjusted"] = "cross_entropy"
    gamma: Annotated[float, Field(gt=0)] | None = None
    tau: Annotated[float, Field(gt=0)] | None = None


@dataclass(frozen=True, config=STRICT, kw_only=True)
class AdapterSpec:
    """A PEFT adapter; `r`, `lora_alpha` and `lora_dropout` are peft.LoraConfig's, null where the method has none.

    Attributes:
        method: `lora` (https://hf.co/papers/2106.09685), `dora` (https://hf.co/papers/2402.09353) or `rslora`
            (https://hf.co/papers/2312.03732), `pissa` (https://hf.co/papers/2404.02948), `ia3`
            (https://hf.co/papers/2205.05638) or `vera` (https://hf.co/papers/2310.11454).
        on: Role of the layers it is attached to.
        blocks: The last N blocks, or all.
        r: Rank; 8 when null, 256 for vera.
        lora_alpha: Scale; the update is multiplied by lora_alpha / r. 16 when null.
        lora_dropout: Dropout in front of the adapter; 0 when null.
        merge: Adds the adapter to the network's weights and writes a plain model. With false, in the last phase, the
            adapter folder is the result: small, and it needs the checkpoint it was trained on.
    """

    method: Literal["lora", "dora", "rslora", "pissa", "ia3", "vera"] = "lora"
    on: Literal["attention", "mlp", "all"] = "attention"
    blocks: Annotated[int, Field(gt=0)] | Literal["all"] = "all"
    r: Annotated[int, Field(gt=0)] | None = None
    lora_alpha: Annotated[int, Field(gt=0)] | None = None
    lora_dropout: Fraction | None = None
    merge: bool = True


@dataclass(frozen=True, config=STRICT, kw_only=True)
class GradualSpec:
    """One phase written for several: each releases some more of the last blocks than the one before.

    Attributes:
        blocks_per_phase: Blocks that each phase adds.
        blocks: How many are released in the end.
    """

    blocks_per_phase: Annotated[int, Field(gt=0)]
    blocks: Annotated[int, Field(gt=0)] | Literal["all"] = "all"


@dataclass(frozen=True, config=STRICT, kw_only=True)
class PhaseSpec:
    """What is unfrozen, for how long, at which learning rate.

    Attributes:
        name: Of the phase's folder, too.
        unfreeze: `head`, `norm`, `bias`, `all`, `{blocks: N}`, `{stages: N}`, `{layers: N}` (the last N),
            `{blocks: first N}` (https://hf.co/papers/2210.11466) or `{parts: [...]}`.
        gradual: Stands for several phases, called NAME-1, NAME-2, ..., that release more blocks each
            (gradual unfreezing, https://hf.co/papers/1801.06146).
        adapter: An adapter to train together with the head, instead of a deeper `unfreeze`.
        layer_decay: The learning rate is multiplied by this once per block from the head down, in (0, 1].
        head_learning_rate: Rate of the head, which is newer than the rest; null is `learning_rate`.
        solver: `lbfgs` finds the head of least loss by L-BFGS, for a path of weight decays, from what enters it as
            replay records that; the best on validation images, or over 5 folds without any, stays. `steps` is the
            Trainer's optimizer. `auto` is `lbfgs` for a phase that trains a linear head alone and has no learning
            rate, number of epochs or other key of an optimizer, else `steps`.
        batchnorm: `eval` keeps the running statistics of every BatchNorm; `train` updates those of released parts;
            `sync` does so over the batches of all processes (GPUs only).
        early_stopping: Evaluations without improvement after which the phase ends; null is never.
        average: What the phase is measured by and ends with in the place of the weights that it trains: `{ema: D}`, a
            moving average with decay D; the mean of the checkpoints of `{last: K}` or `{best: K}` evaluations; or
            `{soup: K}`, those of the K best that don't make the mean worse (https://hf.co/papers/2203.05482). Of the
            mean of the best and the best one alone, the better on the validation images is kept.
        arguments: Fields of transformers.TrainingArguments: the recipe's `training`, then the phase's own.
        inherited: Those of them that a Recipe has put there from its `training`; no key of a recipe.
    """

    name: Name
    unfreeze: Unfreeze = "head"
    gradual: GradualSpec | None = None
    adapter: AdapterSpec | None = None
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    head_learning_rate: Annotated[float, Field(gt=0)] | None = None
    solver: Literal["auto", "lbfgs", "steps"] = "auto"
    batchnorm: Literal["eval", "train", "sync"] = "eval"
    early_stopping: Annotated[int, Field(gt=0)] | None = None
    average: Average | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    inherited: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def own_arguments(self) -> dict[str, Any]:
        """The arguments without those that come from the recipe's `training`."""
        inherited = self.inherited.items()
        return {name: value for name, value in self.arguments.items() if (name, value) not in inherited}

    def inheriting(self, training: dict[str, Any]) -> "PhaseSpec":
        """The phase in a recipe with this `training`, in the place of that of the recipe it may come from."""
        own = self.own_arguments
        inherited = {name: value for name, value in training.items() if name not in own}
        return replace(self, arguments={**training, **own}, inherited=inherited)

    @property
    def precision(self) -> str:
        """What it computes in, with autocast where that isn't `float32`."""
        return "bfloat16" if self.arguments.get("bf16") else "float16" if self.arguments.get("fp16") else "float32"

    @property
    def is_solved(self) -> bool:
        """Whether its head is solved, as far as the phase itself tells."""
        if self.solver != "auto":
            return self.solver == "lbfgs"
        takes_steps = (
            STEPPING & self.arguments.keys() or self.early_stopping or self.head_learning_rate or self.average
        )
        return self.trains_head_alone and not takes_steps

    @property
    def trains_head_alone(self) -> bool:
        """Whether the encoder stays as it is."""
        return self.unfreeze == "head" and self.adapter is None and self.gradual is None


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ReplaySpec:
    """Whether phases are fed with activations of the frozen part that were computed once.

    Attributes:
        mode: `auto` replays where that saves time and the disk allows it, `off` never, `force` wherever that is
            possible.
        views: Augmented versions of each training image that are kept; epochs take turns with them. As many as epochs
            is what a run without replay sees. `auto` is as many as epochs, but 2 at most.
        budget: Most bytes that the folder may hold; the recordings used longest ago make room.
        folder: Where they are kept for later phases and runs; null is `.replay` in `output_dir`.
        engine: What computes the frozen part: `torch`, as training does; `onnxruntime` (extra `fast`); or the fastest
            on this machine that agrees with torch.
        dtype: How activations are kept; `auto` is as they were computed.
    """

    mode: Literal["auto", "off", "force"] = "auto"
    views: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    budget: Size = "20GB"
    folder: UserPath | None = None
    engine: Literal["auto", "torch", "onnxruntime"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    @property
    def budget_bytes(self) -> int:
        """The budget as a number."""
        return int(TypeAdapter(ByteSize).validate_python(self.budget))


@dataclass(frozen=True, config=STRICT, kw_only=True)
class HubSpec:
    """Where on the Hub the result goes. The token is never part of it: `hf auth login`, or HF_TOKEN.

    Attributes:
        repo_id: `owner/name`, or `name` for an own repository; null pushes nothing.
        private: Who may see a new repository: its owner alone, or everybody. A repository that is there and public is
            not pushed to with true.
        what: `model`, `adapter`, or `both` (the adapter in the folder `adapter`); null is what the run ends with.
        revision: Branch to push to, made if it isn't there; null is `main`.
        create_pr: Opens a pull request instead of changing the branch.
        commit_message: Title of the commit; one that names the run when null.
        hub_strategy: `end` pushes the result, `every_save` also each checkpoint's model while it trains (as
            transformers.TrainingArguments calls it).
        base_model: Hub id of what the adapter sits on, where it was trained on a folder with the same weights.
    """

    repo_id: RepoId | None = None
    private: bool = True
    what: Literal["model", "adapter", "both"] | None = None
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    hub_strategy: Literal["end", "every_save"] = "end"
    base_model: RepoId | None = None


@dataclass(frozen=True, config=STRICT, kw_only=True)
class RetainSpec:
    """What the pretrained network knew: how much of it is left, and how much of it to take back.

    Attributes:
        measure: Compares the encoder after each phase with the pretrained one, on 128 images at most.
        interpolate: Weight of the final model in the average of its weights and those of the head phase's model
            (WiSE-FT, https://hf.co/papers/2109.01903); `auto` chooses it on validation images, null keeps the final
            model.
    """

    measure: bool = True
    interpolate: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] | None = None


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Recipe:
    """One experiment; changed by `dataclasses.replace`, it is what a file with the change would be.

    In every key that is a path, `~` is the user's folder.

    Attributes:
        name: Names the run folder.
        phases: At least one; run in order, each from the best weights of the one before.
        training: Fields of transformers.TrainingArguments for all phases.
        class_weights: Factor of each class in the loss: `balanced` (all classes count the same, however many images
            they have), or class name to number; null is 1 for all.
        sampler: How training images are drawn: `shuffle` takes each once per epoch; `balanced` as many as there are
            images, from all classes alike, so that those of rare classes come several times; `sqrt` is between.
        precision: `bfloat16` trains in bfloat16 autocast, `float32` does not, `auto` does where the processor has
            native bfloat16 and is faster with it; a phase that sets bf16 or fp16 itself is left alone.
        folds: Cross-validation: that many runs, each tested on another part of the training images; null for one run.
        license: Of the model, for its card: one of the Hub's identifiers, such as `apache-2.0`; null is unknown.
        widget: Held-out images that are stored with the model as examples for the widget of its page; null is none, as
            who gets the model gets them too.
        keep: `best` ends with the model of the phase that is best on the validation images, by the later phase's
            `metric_for_best_model`; `last` with that of the last phase, as runs without validation images do.
        novelty: Stores features of 2,000 training images at most with the model, which measure how unlike them an
            image is.
        label_hints: Lists the training labels that look wrong, after a first phase that trains the head alone
            (label_issues.json).
        report: Draws figures and writes report.html when the run ends; with false, `hfft report RUN` does so later.
        seed: Seeds the split, the head, the order of the images and the augmentation.
        output_dir: Folder that the run folder is made in.
    """

    name: Name
    model: ModelSpec
    data: DataSpec
    phases: Annotated[tuple[PhaseSpec, ...], Field(min_length=1)]
    training: dict[str, Any] = field(default_factory=dict)
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]] | None = None
    loss: LossSpec = field(default_factory=LossSpec)
    sampler: Literal["shuffle", "balanced", "sqrt"] = "shuffle"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    replay: ReplaySpec = field(default_factory=ReplaySpec)
    folds: Annotated[int, Field(ge=2)] | None = None
    license: License | None = None
    widget: Annotated[int, Field(gt=0, le=20)] | None = None
    hub: HubSpec = field(default_factory=HubSpec)
    keep: Literal["best", "last"] = "best"
    retain: RetainSpec = field(default_factory=RetainSpec)
    novelty: bool = False
    label_hints: bool = True
    report: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    output_dir: UserPath = "runs"

    def __post_init__(self) -> None:
        """Hand `training` on to the phases, also where another recipe's were taken over."""
        object.__setattr__(self, "phases", tuple(phase.inheriting(self.training) for phase in self.phases))
