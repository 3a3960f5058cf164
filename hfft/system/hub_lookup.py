"""Whether a Hub id can be had: asked once and quickly, where loading it would retry for half a minute per file."""

import httpx2
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from hfft.errors import first_line

_TIMEOUT = 10.0  # seconds


def hub_problem(repo_id: str, kind: str, revision: str | None) -> str | None:
    """Why a repository of a `model` or `dataset` can't be loaded, or None.

    Nothing is asked in offline mode (HF_HUB_OFFLINE=1), where the libraries answer from their cache at once.
    """
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        HfApi().repo_info(repo_id, repo_type=kind, revision=revision, timeout=_TIMEOUT)
    except GatedRepoError:
        return f"access to the {kind} is restricted: ask for it on its page, then `hf auth login`"
    except RevisionNotFoundError:
        return f"the {kind} has no revision {revision!r}"
    except RepositoryNotFoundError:
        return f"the Hub has no {kind} of that name, or it is private: then `hf auth login`"
    except HfHubHTTPError as error:
        return f"the Hub answered with an error: {first_line(error)}"
    except ValueError:
        return "it is no Hub id either (name, or owner/name)"
    except (httpx2.TransportError, OSError) as error:
        reason = str(error) or type(error).__name__
        return f"the Hub can't be reached ({reason}); HF_HUB_OFFLINE=1 loads what was downloaded before"
    return None
