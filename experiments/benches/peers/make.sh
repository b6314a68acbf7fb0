#!/usr/bin/env bash
# The Python in which the peers of benches/ run, with the versions that LOG.md's numbers are of:
#
#     experiments/benches/peers/make.sh [FOLDER]     # target/peers where none is given; then FOLDER/bin/python is PYTHON
set -euo pipefail
folder=${1:-"$(dirname "$0")/../../../target/peers"}
python3 -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
  'torch==2.11.0' 'transformers==5.23.0' 'trl==1.16.0' 'accelerate==1.15.0' 'datasets==5.2.0' 'numpy==2.4.6' 'pillow==12.0.0'
echo "$folder/bin/python"
