#!/usr/bin/env bash
# Installs Debian's SLURM for tests/slurm, where it is not there yet. Needs root; elsewhere install slurm-wlm and munge.
set -euo pipefail
missing=()
for program in slurmctld slurmd munged; do
    command -v "$program" > /dev/null || missing+=("$program")
done
if [[ ${#missing[@]} -eq 0 ]]; then
    exit 0
fi
if [[ $(id -u) -ne 0 ]] || ! command -v apt-get > /dev/null; then
    echo "tests/slurm/install.sh: ${missing[*]} not installed, and neither root nor Debian to install them" >&2
    exit 0
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge > /dev/null
