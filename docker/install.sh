#!/usr/bin/env bash
# How stacey_dist is installed, for both Dockerfiles and for a virtual environment: install.sh STAGE, in this order.
#   torch         torch, from the index that PIP_INDEX_TORCH names; that is what differs between CPU and CUDA
#   dependencies  everything else that pyproject.toml of the current directory lists; not the package
#                 (both in the versions of constraints.txt, so that an image built again is the same)
#   package       the package of the current directory, with its C++ kernels
#   check         the kernels are there, and every program starts
# The first two read pyproject.toml and constraints.txt alone, so that their layers stay when the source changes.
set -euo pipefail

PYTHON=${PYTHON:-python3}
EXTRAS=${EXTRAS:-train,deepspeed,wandb,tensorboard}

# The requirements of pyproject.toml whose names match the pattern $1: the project's own, and those of the extra.
requirements() {
  "$PYTHON" - "$EXTRAS" "$1" <<'END'
import re, sys, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
listed = project["dependencies"] + [r for name in sys.argv[1].split(",") for r in project["optional-dependencies"][name]]
print(*(r for r in listed if re.match(sys.argv[2], r)), sep="\n")
END
}

install() {
  "$PYTHON" -m pip install --no-cache-dir -c constraints.txt "$@"
}

stage_torch() {
  mapfile -t wanted < <(requirements 'torch\b')
  install ${PIP_INDEX_TORCH:+--index-url "$PIP_INDEX_TORCH"} "${wanted[@]}"
}

stage_dependencies() {
  mapfile -t wanted < <(requirements '(?!torch\b)')
  # What builds the package, and what DeepSpeed builds its own kernels with.
  install 'setuptools>=77' ninja "${wanted[@]}"
}

stage_package() {
  install --no-deps --no-build-isolation .
}

stage_check() {
  cd / # where no source tree lies in the way of what was installed
  "$PYTHON" -m pip check
  "$PYTHON" - <<'END'
from stacey_dist.optim import kernels

print("kernel:", kernels.find("cpu").name)
END
  "$(dirname "$("$PYTHON" -c 'import sys; print(sys.executable)')")/stacey-dist" info
}

"stage_${1:?torch, dependencies, package or check}"
