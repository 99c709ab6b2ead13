#!/usr/bin/env bash
# Has the batch shell of gfpo_loop.sbatch start a step of the job, and stands for it: shows what it prints, hands a TERM on,
# ends with its status. The loop runs this, and may do so in a container, where there is no SLURM.
#
#   on_host.sh ranks WORD...     one task per GPU on all nodes
#   on_host.sh servers WORD...   one task per node
#
# A request is a few files in the folder SSFT_REQUESTS: ID.request (the words), ID.alive (touched as long as somebody
# waits), ID.stop (a TERM came); in return ID.output and ID.status.
set -uo pipefail

request=$SSFT_REQUESTS/$(date +%s%N)-$$
trap ': > "$request.stop"' TERM
: > "$request.output"
: > "$request.alive"
printf '%s\0' "$@" > "$request.words"
mv "$request.words" "$request.request"  # it is there as a whole
tail -n +1 -f "$request.output" &
shown=$!
while [[ ! -e $request.status ]]; do
    : > "$request.alive"
    sleep 0.5
done
sleep 0.5  # for the last lines
kill "$shown"
status=$(< "$request.status")
rm -f "$request".*
exit "$status"
