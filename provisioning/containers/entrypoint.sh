#!/usr/bin/env bash
# Run the startup kit that is mounted under /user_config, which may be read-only: FLARE copies it
# into $NVFL_WORKSPACE and works there.
set -euo pipefail

kit="${FEDGESTALT_KIT:-/user_config}"
start="$kit/startup/sub_start.sh"
if [[ ! -r "$start" ]]; then
  echo "no startup kit can be read in $kit: mount one there, readable by uid $(id -u)" >&2
  exit 64
fi
if [[ ! -w "${NVFL_WORKSPACE:?names the folder that FLARE works in}" ]]; then
  echo "the workspace $NVFL_WORKSPACE cannot be written by uid $(id -u)" >&2
  exit 64
fi
umask 077

# As process 1 of a container FLARE itself would ignore SIGTERM: this shell stays and hands it on.
bash "$start" --once &
flare=$!
trap 'kill -TERM "$flare" 2>/dev/null || true' TERM INT
code=0
wait "$flare" || code=$?
while kill -0 "$flare" 2>/dev/null; do # the wait above was interrupted by a signal
  code=0
  wait "$flare" || code=$?
done
exit "$code"
