"""Python code that a model brings along: it runs where a recipe or a user trusts it, or the model isn't opened."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfft.errors import ModelError
from hfft.recipe.spec import ModelSpec
from hfft.system.files import read_json


def check_code(folder: Path, *, trust_remote_code: bool) -> None:
    """Refuse a model whose own Python code isn't trusted, whatever a recipe in the same folder says.

    transformers 5.24 then takes its own class wherever it knows the `model_type`, which answers something else.

    Raises:
        ModelError: If the model brings code, and it isn't trusted.
    """
    code = None if trust_remote_code else code_of(folder)
    if code is not None:
        raise ModelError(
            f"{folder}: the model brings Python code of its own ({code}.py), without which it isn't the one that was "
            "trained; if you trust that code, open it with trust_remote_code=True (--trust-remote-code)"
        )


def code_of(folder: Path) -> str | None:
    """The module that defines the model in a folder, or its image processor; None where those are transformers'."""
    for name, find in (("config.json", own_code), ("preprocessor_config.json", processor_code)):
        path = folder / name
        if path.is_file() and (code := find(read_json(path))) is not None:
            return code
    return None


def own_code(config: Mapping[str, Any]) -> str | None:
    """The module that defines a config's model, if it isn't transformers'.

    A reference to another repository (`owner/name--module.Class`) doesn't count where the config says that the model
    is of another class: one that was trained as transformers' own class may have kept it from its checkpoint.
    """
    reference = (config.get("auto_map") or {}).get("AutoModelForImageClassification", "")
    module, _, name = reference.rpartition(".")
    classes = config.get("architectures") or (name,)
    return None if not module or ("--" in module and name not in classes) else module.rpartition("--")[2]


def processor_code(config: Mapping[str, Any]) -> str | None:
    """The module that defines an image processor, if the config doesn't say that it is of a class of transformers."""
    found = (config.get("auto_map") or {}).get("AutoImageProcessor")
    if isinstance(found, dict):
        found = list(found.values())  # one for each backend
    kind = str(config.get("image_processor_type") or "").removesuffix("Fast")
    for reference in found if isinstance(found, list) else [found]:
        module, _, name = str(reference or "").rpartition(".")
        if module and kind in ("", name.removesuffix("Fast")):
            return module.rpartition("--")[2]
    return None


def refuse_untrusted(spec: ModelSpec, code: str | None) -> None:
    """Refuse a checkpoint with code, of `own_code` or `processor_code`, that the recipe's model section doesn't trust.

    Raises:
        ModelError: If so: trained as transformers' class, it would be something else than it is.
    """
    if code is not None and not spec.trust_remote_code:
        raise ModelError(
            f"model.checkpoint: {spec.checkpoint} brings Python code of its own ({code}.py), and transformers' own "
            "class would compute something else; read that code, and if you trust it, say "
            "model.trust_remote_code: true"
        )


def name_own_class(config: Any, kind: type) -> None:
    """Take the reference to other code out of a config, where a class of transformers was loaded and will be saved."""
    if kind.__module__.startswith("transformers."):
        vars(config).pop("auto_map", None)
