#!/usr/bin/env bash
# Installs Debian's SLURM for tests/slurm, where it is not there yet. Needs root; elsewhere install slurm-wlm and munge.
set -euo pipefail
if command -v slurmctld slurmd munged > /dev/null; then
    exit 0
fi
if [[ $(id -u) -ne 0 ]] || ! command -v apt-get > /dev/null; then
    echo "tests/slurm/install.sh: neither root nor Debian: SLURM is not installed, its tests are skipped" >&2
    exit 0
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge > /dev/null
