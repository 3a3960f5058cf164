"""A value other than the default for each field of transformers.TrainingArguments, and what hfft makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hfft.recipe.arguments import OWNED, training_argument_types


@dataclass(frozen=True)
class Trial:
    """One field.

    Attributes:
        value: Not the default.
        does: What it is for, in few words; of a field that is refused, nothing.
        outcome: `same`: a phase ends with the weights that it ends with without; `other`: with other ones;
            `refused`: the plan says why.
        beside: Other fields that it needs.
        replays: Whether it was tried with replay; it was without, always.
    """

    value: Any
    does: str = ""
    outcome: Literal["same", "other", "refused"] = "same"
    beside: Mapping[str, Any] = field(default_factory=dict)
    replays: bool = True


def _other(value: Any, does: str, **beside: Any) -> Trial:
    return Trial(value, does, "other", beside)


def _same(value: Any, does: str, **beside: Any) -> Trial:
    return Trial(value, does, "same", beside)


def _refused(value: Any, **beside: Any) -> Trial:
    return Trial(value, outcome="refused", beside=beside)


_HERE = {
    "per_device_train_batch_size": _other(2, "images per forward pass and process"),
    "num_train_epochs": _other(1, "passes over the training images"),
    "max_steps": _other(3, "optimizer steps, in the place of epochs"),
    "learning_rate": _other(0.02, "highest rate of the schedule; `auto` in a head phase"),
    "lr_scheduler_type": _other("cosine", "the schedule; `reduce_lr_on_plateau`, `greedy`: by the phase's metric"),
    "lr_scheduler_kwargs": _other({"power": 2.0}, "options of the schedule", lr_scheduler_type="polynomial"),
    "warmup_steps": _other(2, "steps, or a share of them, in which the rate rises"),
    "optim": _other("sgd", "the optimizer, over groups with rates of their own"),
    "optim_args": _other("momentum=0.5", "options that the optimizer reads; others are refused", optim="sgd"),
    "weight_decay": _other(0.5, "of kernels alone"),
    "adam_beta1": _other(0.5, "the decay of the mean gradient, in Adam optimizers"),
    "adam_beta2": _other(0.9, "the decay of the mean squared gradient, in Adam optimizers"),
    "adam_epsilon": _other(1e-3, "added to the divisor, in Adam optimizers"),
    "optim_target_modules": _refused("all-linear"),
    "gradient_accumulation_steps": _other(2, "batches per optimizer step; the loss is that of all their images"),
    "average_tokens_across_devices": _same(False, "how several processes weigh an uneven last batch"),
    "max_grad_norm": _other(0.01, "gradients are clipped to it; 0 is never"),
    "label_smoothing_factor": _other(0.2, "of the loss, also with class weights and multi-label"),
    "bf16": _other(True, "bfloat16 autocast in this phase, whatever `precision` says"),
    "fp16": _refused(True),
    "bf16_full_eval": _refused(True),
    "fp16_full_eval": _refused(True),
    "tf32": _refused(True),
    "activation_checkpointing": _same(True, "computes activations again, for less memory"),
    "activation_checkpointing_kwargs": _same(
        {"use_reentrant": False}, "options of activation_checkpointing", activation_checkpointing=True
    ),
    "gradient_checkpointing": _same(True, "the older name of activation_checkpointing"),
    "gradient_checkpointing_kwargs": _same(
        {"use_reentrant": False}, "options of gradient_checkpointing", gradient_checkpointing=True
    ),
    "torch_compile": _same(True, "compiles the network", torch_compile_backend="eager"),
    "torch_compile_backend": _same("eager", "compiles the network with this backend"),
    "torch_compile_mode": _same("default", "compiles the network in this mode", torch_compile_backend="eager"),
    "use_liger_kernel": _refused(True),
    "liger_kernel_config": _refused({"rope": True}),
    "use_cache": _refused(True),
    "neftune_noise_alpha": _refused(5.0),
    "torch_empty_cache_steps": _same(1, "steps after which the device's cache is freed"),
    "auto_find_batch_size": _same(True, "halves the batch where memory lacks, and accumulates"),
    "logging_strategy": _same("epoch", "when the loss is logged"),
    "logging_steps": _same(1, "steps between two logged losses; 50 where a recipe doesn't say"),
    "logging_first_step": _same(True, "logs the loss of the first step too"),
    "log_on_each_node": _same(False, "whether each machine logs, or the first alone"),
    "include_num_input_tokens_seen": _refused("all"),
    "log_level": _same("error", "level of transformers' own log"),
    "log_level_replica": _same("error", "level of transformers' own log in processes other than the main one"),
    "disable_tqdm": _same(True, "shows no progress bars"),
    "report_to": _same("tensorboard", "where the run is shown: [watching.md](watching.md)"),
    "run_name": _same("x", "the name that report_to shows"),
    "project": _refused("x"),
    "trackio_space_id": _refused("a/b"),
    "trackio_bucket_id": _refused("a/b"),
    "trackio_static_space_id": _refused("a/b"),
    "eval_strategy": _other("steps", "when validation images are measured and a checkpoint is saved"),
    "eval_steps": _other(1, "steps between two evaluations, with eval_strategy: steps", eval_strategy="steps"),
    "eval_delay": _same(1, "the first evaluation comes no earlier"),
    "per_device_eval_batch_size": _same(1, "images per forward pass of an evaluation; 32 where a recipe doesn't say"),
    "eval_on_start": _same(True, "evaluates before the first step too"),
    "eval_do_concat_batches": _refused(False),
    "eval_use_gather_object": _same(True, "how processes gather answers"),
    "eval_accumulation_steps": _same(1, "batches after which an evaluation moves logits to the CPU"),
    "save_total_limit": _same(3, "checkpoints that are kept, the best one always; 1 where a recipe doesn't say"),
    "enable_jit_checkpoint": _refused(True),
    "metric_for_best_model": _other("log_loss", "what a phase is judged by"),
    "greater_is_better": _other(
        True,
        "whether a larger metric_for_best_model is better; by its name, where a recipe doesn't say",
        metric_for_best_model="log_loss",
    ),
    "full_determinism": _same(True, "deterministic kernels, or an error"),
    "use_cpu": _same(True, "says that there is no accelerator; refused where there is one"),
    "accelerator_config": _same({"non_blocking": True}, "`non_blocking` alone; what changes batches is refused"),
    "parallelism_config": _refused({"dp_replicate_size": 2}),
    "dataloader_drop_last": _other(True, "leaves out a last batch that isn't full"),
    "dataloader_num_workers": _same(1, "processes that read images; as cores, 8 at most, where a recipe doesn't say"),
    "dataloader_pin_memory": _same(False, "pins batches; true where there is an accelerator"),
    "dataloader_persistent_workers": _same(
        True, "keeps the processes that read images from epoch to epoch", dataloader_num_workers=1
    ),
    "dataloader_prefetch_factor": _same(3, "batches that each process reads ahead", dataloader_num_workers=1),
    "dataloader_multiprocessing_context": _same(
        "fork", "how processes that read images are started", dataloader_num_workers=1
    ),
    "dataloader_in_order": _same(False, "whether batches keep their order", dataloader_num_workers=1),
    "length_column_name": _refused("x"),
    "ddp_find_unused_parameters": _same(
        True, "whether DistributedDataParallel looks for parameters without gradients"
    ),
    "ddp_bucket_cap_mb": _same(5, "megabytes of gradients that DistributedDataParallel exchanges at once"),
    "ddp_broadcast_buffers": _same(False, "whether DistributedDataParallel gives all processes the same buffers"),
    "ddp_static_graph": _same(True, "whether DistributedDataParallel takes each step for the same graph"),
    "ddp_backend": _refused("gloo"),
    "ddp_timeout": _same(600, "seconds that processes wait for each other"),
    "debug": Trial("underflow_overflow", "stops where a module computes NaN or infinity", replays=False),
    "skip_memory_metrics": _same(False, "false writes memory use to the log"),
}
TRIALS: Mapping[str, Trial] = {**{name: _refused("x") for name in OWNED if name in training_argument_types()}, **_HERE}
