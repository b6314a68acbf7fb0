#!/usr/bin/env bash
# Makes the environment of the benches' peers: peers/make.sh [FOLDER], target/peers where none is given.
set -euo pipefail
cd "$(dirname "$0")/../../.."
folder=${1:-target/peers}
python3 -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check -r experiments/benches/peers/requirements.txt
echo "$folder/bin/python"
