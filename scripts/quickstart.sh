#!/usr/bin/env bash
# From a bare machine to a solar-cell inspector: installs, prepares images and checkpoint, trains, says what to try next.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/install.sh
install_extra quickstart

python scripts/prepare_quickstart.py
hfft train recipes/quickstart.yaml

image=$(find data/elpv/test/defective -name '*.png' | sort | head -n 1)
activate=""
[ "${VIRTUAL_ENV:-}" != "$(pwd)/.venv" ] || activate="source .venv/bin/activate && "
echo
echo "The trained model is in runs/quickstart/model, all about it on the page runs/quickstart/report.html. Try it:"
echo "  ${activate}hfft predict runs/quickstart $image"
