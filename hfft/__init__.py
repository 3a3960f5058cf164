"""Fine-tune image classifiers of the Hugging Face ecosystem, in phases.

The public names load on first use, so that `import hfft` and the command line start without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hfft._version import __version__
from hfft.errors import DataError, HfftError, HubError, ModelError, PushError, RecipeError, RunError, TrainingError

if TYPE_CHECKING:
    from hfft.commands.choose import Choice, choose
    from hfft.commands.compare import compare
    from hfft.commands.cross_validate import Folds, cross_validate
    from hfft.commands.evaluate import evaluate
    from hfft.commands.find_lr import find_lr
    from hfft.commands.finetune import finetune
    from hfft.commands.run import Run
    from hfft.hub.pushing import push
    from hfft.inference.classifier import Classifier
    from hfft.recipe.loading import load_recipe
    from hfft.recipe.spec import Recipe

_HOMES = {
    "Choice": "hfft.commands.choose",
    "Classifier": "hfft.inference.classifier",
    "Folds": "hfft.commands.cross_validate",
    "Recipe": "hfft.recipe.spec",
    "Run": "hfft.commands.run",
    "cross_validate": "hfft.commands.cross_validate",
    "choose": "hfft.commands.choose",
    "compare": "hfft.commands.compare",
    "evaluate": "hfft.commands.evaluate",
    "find_lr": "hfft.commands.find_lr",
    "finetune": "hfft.commands.finetune",
    "load_recipe": "hfft.recipe.loading",
    "push": "hfft.hub.pushing",
}

__all__ = [
    "Choice",
    "Classifier",
    "DataError",
    "Folds",
    "HfftError",
    "HubError",
    "ModelError",
    "PushError",
    "Recipe",
    "RecipeError",
    "Run",
    "RunError",
    "TrainingError",
    "__version__",
    "choose",
    "compare",
    "cross_validate",
    "evaluate",
    "find_lr",
    "finetune",
    "load_recipe",
    "push",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hfft' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
