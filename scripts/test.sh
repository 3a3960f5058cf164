#!/usr/bin/env bash
# Installs what the tests need and runs them; arguments go to pytest, for example: bash scripts/test.sh -m 'not slow'
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/install.sh
install_extra test

python -m pytest --numprocesses auto --dist worksteal "$@"
