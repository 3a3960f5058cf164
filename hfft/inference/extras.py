"""Optional packages, asked for before any work is done with them."""

from importlib.util import find_spec

from hfft.errors import MissingPackageError


def require(extra: str, *packages: str) -> None:
    """Check that the packages of one of hfft's extras are there; imports none of them.

    Args:
        extra: Name of the extra, as pip takes it.
        packages: Top-level modules.

    Raises:
        MissingPackageError: If one is missing; says how to install it.
    """
    missing = [name for name in packages if not _is_there(name)]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise MissingPackageError(f'{", ".join(missing)} {are} not installed: pip install "hfft[{extra}]"')


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # a module that was blocked in sys.modules
        return False
