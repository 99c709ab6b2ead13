#!/usr/bin/env bash
# What each task of a step runs: the program that its arguments name. job.sh puts it before them.
#
# A task's output goes to rankN.log in the folder SSFT_LOGS. The job's own output shows the first task's, what other tasks
# say of themselves ("[rank N] ..."), and the last lines of one that crashes. Where the program ends with status 2,
# SSFT_BAD_INPUT is created, where a TERM ends it before it listens for one, SSFT_STOPPED_EARLY: they tell the batch shell what
# SLURM's status of a step cannot, which may be that of another rank.
set -uo pipefail

rank=${SLURM_PROCID:-0}
mkdir -p "$SSFT_LOGS"
log=$SSFT_LOGS/rank$rank.log
: >> "$log"
# A TERM to the whole step is for the program, which saves and ends; its last lines are to arrive.
readers=()
if [[ $rank -eq 0 ]]; then
    exec {output}> >(trap '' TERM; exec tee -a "$log")
    readers+=($!)
    exec {errors}> >(trap '' TERM; exec tee -a "$log" >&2 {output}>&-)
else
    exec {output}>> "$log"
    exec {errors}> >(trap '' TERM; tee -a "$log" | grep --line-buffered -E '^\[rank [0-9]+\]' >&2)
fi
readers+=($!)

trap : TERM  # taken note of when the program has ended; not ignored, which the program would inherit
"$@" >&"$output" 2>&"$errors" {output}>&- {errors}>&-
status=$?
exec {output}>&- {errors}>&-
wait "${readers[@]}"

case $status in
    0 | 75) ;;
    143) : > "$SSFT_STOPPED_EARLY" ;;
    2) : > "$SSFT_BAD_INPUT" ;;
    *)
        if [[ $rank -ne 0 ]]; then
            tail -n 30 "$log" | sed "s/^/[rank $rank] /" >&2
        fi
        echo "[rank $rank] $(hostname): ended with status $status; all it printed: $log" >&2
        ;;
esac
exit "$status"
