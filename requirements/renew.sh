#!/usr/bin/env bash
# Writes the lock: python-X.Y.txt with the newest versions that setup.py allows, oldest.txt with the oldest ones.
# megatron-core stays with the version that the GPU image's TransformerEngine is made for. Called by `make lock`.
# Arguments: the torch of the lock and the oldest torch, as pip requirements.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

compile() { # FILE TORCH FLAGS...
    local file=$1 torch=$2
    shift 2
    {
        echo "# Made by \`make lock\` from setup.py. torch stands in the Makefile, since its build depends on the machine."
        "${UV:-uv}" pip compile --quiet --no-header --no-annotate --extra dev --extra wandb --extra parquet "$@" \
            --constraints <(printf '%s\n' "$torch" 'megatron-core<0.17') --no-emit-package torch setup.py |
            grep --invert-match --extended-regexp '^(nvidia|cuda|triton)'
    } >"$file.partial"
    mv "$file.partial" "$file"
}

for version in 3.11 3.12 3.13; do
    compile "requirements/python-$version.txt" "$1" --python-version "$version"
done
compile requirements/oldest.txt "$2" --python-version 3.11 --resolution lowest-direct
