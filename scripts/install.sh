# Sourced by quickstart.sh and test.sh: an environment with hfft and one of its extras; nothing to do the second time.
# Uses the active virtual environment or conda environment; makes and activates .venv when there is none.

install_extra() {
    local extra=$1 python=${PYTHON:-python3} wanted stamp
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "hfft needs Python 3.10 or newer; $("$python" --version) found. Set PYTHON=/path/to/python3" >&2
            return 2
        }
        [ -x .venv/bin/python ] || "$python" -m venv .venv
        # shellcheck disable=SC1091
        source .venv/bin/activate
    fi
    stamp="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}/.hfft-$extra"
    wanted="$(pwd) $(cksum pyproject.toml)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing hfft[$extra] into ${VIRTUAL_ENV:-${CONDA_PREFIX:-}}; PyTorch is large, this takes some minutes"
        python -m pip install --quiet --editable ".[$extra]"
        python -c 'import torch, torchvision' || {
            echo "torch and torchvision don't match; try again in a new virtual environment" >&2
            return 1
        }
        echo "$wanted" > "$stamp"
    fi
}
