"""The methods of benchmark_accuracy.py without hfft: Trainer code as it is written by hand, and fastai."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accuracy_data import Job, Outcome, Row, flips_of, outcome_of, read_rows
from PIL import Image
from torch import nn

BATCH = 16
EVAL_BATCH = 32
PHASES = (  # as `blocks` of accuracy_methods.py
    {"blocks": 0, "num_train_epochs": 1, "learning_rate": 1e-2, "warmup_steps": 0},
    {"blocks": 5, "num_train_epochs": 3, "learning_rate": 3e-5, "warmup_steps": 0.1},
)


def plain(job: Job) -> Outcome:
    """The phases of `blocks` as they are written by hand with Trainer: the same epochs, rates and batch size."""
    from transformers import (
        AutoImageProcessor,
        AutoModelForImageClassification,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    set_seed(job.seed)
    rows = read_rows(job.table)
    classes = sorted({row.label for row in rows["train"]})
    processor = AutoImageProcessor.from_pretrained(job.checkpoint)
    model = AutoModelForImageClassification.from_pretrained(
        job.checkpoint,
        num_labels=len(classes),
        id2label=dict(enumerate(classes)),
        label2id={name: number for number, name in enumerate(classes)},
        ignore_mismatched_sizes=True,
    )
    flips = flips_of(job.table)
    splits = {
        split: _PlainImages(Path(job.table).parent, part, classes, processor, flips if split == "train" else False)
        for split, part in rows.items()
    }
    trainer, most = None, 0
    for number, phase in enumerate(PHASES):
        model.requires_grad_(False)
        for module in _last_modules(model, phase["blocks"]):
            module.requires_grad_(True)
        most = max(most, sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad))
        arguments = TrainingArguments(
            output_dir=str(Path(job.folder) / f"plain-{number}"),
            num_train_epochs=phase["num_train_epochs"],
            learning_rate=phase["learning_rate"],
            warmup_steps=phase["warmup_steps"],
            lr_scheduler_type="cosine",
            weight_decay=0.01,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=EVAL_BATCH,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=True,  # by the loss
            seed=job.seed,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model, args=arguments, train_dataset=splits["train"], eval_dataset=splits["validation"]
        )
        trainer.train()
    assert trainer is not None
    answers = trainer.predict(splits["test"]).predictions.argmax(axis=1)  # pyright: ignore[reportAttributeAccessIssue]
    return outcome_of(job, answers, classes, most, "")


class _PlainImages(torch.utils.data.Dataset):
    """Images of a table, as a careful user reads them."""

    def __init__(
        self, folder: Path, rows: Sequence[Row], classes: Sequence[str], processor: Any, flips: bool | str
    ) -> None:
        from torchvision import transforms

        self._folder, self._rows, self._classes, self._processor = folder, rows, classes, processor
        flipped = [transforms.RandomHorizontalFlip()] if flips else []
        self._change = transforms.Compose([*flipped, *([transforms.RandomVerticalFlip()] if flips == "both" else [])])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self._rows[number]
        image = self._change(Image.open(self._folder / row.path).convert("RGB"))
        pixels = self._processor(image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": self._classes.index(row.label)}


def _last_modules(model: Any, blocks: int) -> list[nn.Module]:
    """The head, and the last blocks with what stands between them and the head."""
    if model.config.model_type == "timm_wrapper":
        body = model.timm_model
        every = [block for stage in body.blocks for block in stage]
        return [*every[-blocks:], body.conv_head, body.bn2, body.classifier] if blocks else [body.classifier]
    if model.config.model_type == "dinov2":
        body = model.dinov2
        return [*body.encoder.layer[-blocks:], body.layernorm, model.classifier] if blocks else [model.classifier]
    body = getattr(model, model.base_model_prefix)
    return [*body.layers[-blocks:], body.layernorm, model.classifier] if blocks else [model.classifier]


def fastai(job: Job) -> Outcome:
    """The library's `fine_tune`, its own augmentation and rates, as many epochs as the second phase of `blocks`."""
    import pandas as pd
    from fastai.vision.all import (  # pyright: ignore[reportMissingImports]
        ImageDataLoaders,
        Learner,
        Normalize,
        Resize,
        aug_transforms,
        set_seed,
    )
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    from hfft.data.images.transforms import evaluation_transform

    set_seed(job.seed, reproducible=True)
    table = pd.read_csv(job.table, dtype=str)
    known = table[table["split"] != "test"].assign(is_valid=lambda rows: rows["split"] == "validation")
    processor = AutoImageProcessor.from_pretrained(job.checkpoint)
    dark, light = (evaluation_transform(processor)(Image.new("RGB", (300, 300), gray)) for gray in ("black", "white"))
    spread = 1 / (light - dark).mean(dim=(1, 2))  # (3,), as are the means
    statistics = (-dark.mean(dim=(1, 2)) * spread).tolist(), spread.tolist()
    loaders = ImageDataLoaders.from_df(
        known,
        path=Path(job.table).parent,
        fn_col="path",
        label_col="label",
        valid_col="is_valid",
        item_tfms=Resize(dark.shape[-1]),
        batch_tfms=[*aug_transforms(flip_vert=flips_of(job.table) == "both"), Normalize.from_stats(*statistics)],
        bs=BATCH,
        num_workers=0,
    )
    network = AutoModelForImageClassification.from_pretrained(
        job.checkpoint, num_labels=len(loaders.vocab), ignore_mismatched_sizes=True
    )
    head = _last_modules(network, 0)[0]
    own = {id(tensor) for tensor in head.parameters()}

    def split(model: Any) -> list[list[nn.Parameter]]:
        return [[tensor for tensor in model.parameters() if id(tensor) not in own], list(head.parameters())]

    learner = Learner(loaders, _Logits(network), loss_func=nn.CrossEntropyLoss(), splitter=split)
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(PHASES[-1]["num_train_epochs"])
        test = table[table["split"] == "test"]
        answers = learner.get_preds(dl=loaders.test_dl(test))[0].argmax(dim=1).tolist()
    predictions = dict(zip(test["path"], [str(loaders.vocab[number]) for number in answers], strict=True))
    return Outcome(predictions, sum(tensor.numel() for tensor in network.parameters()))


class _Logits(nn.Module):
    """A classifier of transformers as fastai takes it: pixels to logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.network(pixel_values=pixels).logits
