"""Python code that a model brings along: it runs where a recipe or a user trusts it, or the model isn't opened."""

from pathlib import Path
from typing import Any

from hfft.errors import ModelError
from hfft.files import read_json


def check_code(folder: Path, *, trust_remote_code: bool) -> None:
    """Refuse a model whose own Python code isn't trusted.

    transformers 5.24 then takes its own class wherever it knows the `model_type`, which answers something else.

    Raises:
        ModelError: If the model brings code, and it isn't trusted.
    """
    path = folder / "config.json"
    code = own_code(read_json(path)) if path.is_file() and not trust_remote_code else None
    if code is not None:
        raise ModelError(
            f"{folder}: the model brings Python code of its own ({code}.py), without which it isn't the one that was "
            "trained; if you trust that code, open it with trust_remote_code=True (--trust-remote-code)"
        )


def own_code(config: dict[str, Any]) -> str | None:
    """The module beside a config.json that defines the model, if it isn't transformers' or another repository's."""
    reference = (config.get("auto_map") or {}).get("AutoModelForImageClassification", "--")
    return None if "--" in reference else reference.partition(".")[0]
