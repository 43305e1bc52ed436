#!/usr/bin/env bash
# Installs what tests/slurm start (Debian's and Ubuntu's packages, some 4 MB); no daemon is left running.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive PATH=$PATH:/usr/sbin:/sbin
if command -v slurmctld slurmd sbatch munged >/dev/null; then
    exit 0
fi
as_root=()
[ "$(id -u)" -eq 0 ] || as_root=(sudo --non-interactive)
if ! command -v apt-get >/dev/null || ! "${as_root[@]}" true; then
    echo "Slurm is not here and cannot be installed (no apt-get, or neither root nor sudo): tests/slurm are skipped" >&2
    exit 1
fi
# The packages start their services where there is an init system; the tests start their own.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee $policy >/dev/null
    "${as_root[@]}" chmod +x $policy
    trap '"${as_root[@]}" rm -f $policy' EXIT
fi
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge
