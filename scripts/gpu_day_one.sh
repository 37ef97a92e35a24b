#!/bin/bash
# The first minutes on a GPU: everything that no CPU could show, in order of worth, in at most twelve minutes, without network.
#
#   scripts/gpu_day_one.sh              # all steps; a table, and docs/performance/<device>.json
#   scripts/gpu_day_one.sh --rehearse   # on a CPU, every step that can; runs/gpu_day_one/rehearsal.json
#   scripts/gpu_day_one.sh prepare      # beforehand, where there are packages and nvcc: build/gpu_day_one.tar.xz to bring along
#
# --help lists the options. PYTHON names the interpreter: default .venv's, else python3. What `prepare` made is unpacked here.

set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-.venv/bin/python}"
command -v "${PYTHON}" > /dev/null || PYTHON=python3
BROUGHT=build/gpu_day_one
if [[ -f "${BROUGHT}.tar.xz" && "${1:-}" != prepare && ! "${BROUGHT}" -nt "${BROUGHT}.tar.xz" ]]; then
  mkdir -p "${BROUGHT}" && tar -xJf "${BROUGHT}.tar.xz" -C "${BROUGHT}" && touch "${BROUGHT}"
fi
PYTHONPATH="${PWD}${PYTHONPATH:+:${PYTHONPATH}}"
[[ "${1:-}" == prepare || ! -d "${BROUGHT}/site" ]] || PYTHONPATH="${PWD}/${BROUGHT}/site:${PYTHONPATH}"
export PYTHONPATH
if [[ "${1:-}" == prepare ]]; then
  exec "${PYTHON}" -m scripts.gpu_bring "${@:2}"
fi
exec "${PYTHON}" -m scripts.gpu_day_one "$@"
