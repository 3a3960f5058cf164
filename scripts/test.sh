#!/usr/bin/env bash
# Installs what the tests need and runs them, with --all the nightly ones too; other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/install.sh
install_extra test

[[ ${1:-} == --all ]] && set -- -m "" "${@:2}"
python -m pytest --numprocesses auto --dist worksteal "$@"
