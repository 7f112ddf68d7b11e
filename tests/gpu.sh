#!/usr/bin/env bash
# What only a GPU can show, in under eight minutes: tests/gpu.sh [--out FOLDER]. Without one: tests/gpu.sh --device cpu --quick
# On a machine without a network, put wheels of what is missing into a folder and name it: WHEELS=folder tests/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c 'import torch, torchvision' || { echo "this needs torch and torchvision, built for the GPU at hand"; exit 1; }
for package in torch_pruning safetensors pandas tqdm PIL; do
    "$python" -c "import $package" 2>/dev/null && continue
    name=${package/PIL/pillow}
    "$python" -m pip install -q --no-deps ${WHEELS:+--no-index --find-links "$WHEELS"} "${name/_/-}"
done
PYTHONPATH=. exec "$python" tests/gpu.py "$@"
