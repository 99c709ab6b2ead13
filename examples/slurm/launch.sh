#!/usr/bin/env bash
# Trains as one srun step of a SLURM job, one task per GPU. The batch scripts beside this file call it; its arguments are
# the trainer's flags, and override the recipe's.
#
#   MODEL=Qwen2.5-32B-Instruct DATA=sets.jsonl RUN_DIR=runs/32b sbatch examples/slurm/multi_node.sbatch --lr 2e-5
#
# Before the time limit the run saves a checkpoint and the job is requeued; it goes on from there. Where a rank or a node
# is lost it is tried again. A job array trains in RUN_DIR/task_ID, and {task} in an argument stands for that ID.
#
# Environment:
#   MODEL             Hugging Face folder: weights, tokenizer, shape
#   DATA              JSONL file to train on; more of them: --data-path FILE
#   EVAL_DATA         JSONL file of held-out questions [none]
#   RUN_DIR           folder of the run, on a file system that all nodes share
#   RECIPE            YAML file of settings; default: as the batch script says
#   SSFT_HOME         this repository; default: the folder the job was submitted from
#   PYTHON            interpreter [python]
#   MAX_RESTARTS      how often the job goes on after a failure, over all its requeues [3]; never after bad input
#   STOP_MARGIN       seconds before the time limit at which ranks that are still saving are killed [20]
#   LOG_DIR           folder of the ranks' logs [RUN_DIR/slurm/logs]
#   CONTAINER_IMAGE   run in this image: for pyxis a URI or .sqsh file, for enroot a .sqsh file, for apptainer a .sif file
#   CONTAINER_RUNTIME pyxis, enroot or apptainer [pyxis]
#   CONTAINER_MOUNTS  mounts beside those of the folders above: SRC:DST,SRC:DST
#   CONTAINER_ENV     names of further variables that the container gets from the job: NAME,NAME
set -euo pipefail

home=$(realpath "${SSFT_HOME:-$SLURM_SUBMIT_DIR}")
: "${MODEL:?the Hugging Face folder to start from}" "${DATA:?the JSONL file to train on}" "${RECIPE:?the YAML file of settings}"
folder=${RUN_DIR:?the folder of the run}${SLURM_ARRAY_TASK_ID:+/task_$SLURM_ARRAY_TASK_ID}
mkdir -p "$folder"
run=$(realpath "$folder")
what="the trainer"
# shellcheck source=examples/slurm/job.sh
source "$home/examples/slurm/job.sh"
model=$(place MODEL)
data=$(place DATA)
recipe=$(place RECIPE)

# The step of the newest checkpoint.
progress() {
    cat "$run/latest_checkpointed_iteration.txt" 2> /dev/null || echo 0
}

# What the trainer says of its end; nothing where it did not get so far as to say something.
how_it_ended() {
    if [[ $(heartbeat) != "$last_heartbeat" ]]; then
        heartbeat | sed -n 's/.*"state": *"\([a-z]*\)".*/\1/p'
    fi
}
heartbeat() {
    cat "$run/heartbeat.json" 2> /dev/null || true
}

for argument; do
    case $argument in
        --save | --save=*) refuse "--save: is RUN_DIR, $run" ;;
        --load | --load=*) refuse "--load: is MODEL, $model, until RUN_DIR holds a checkpoint" ;;
        --config | --config=*) refuse "--config: is RECIPE, $recipe" ;;
        *'{task}'*)
            if [[ -z ${SLURM_ARRAY_TASK_ID:-} ]]; then
                refuse "$argument: {task} stands for the id of a job array's task; submit with --array"
            fi
            ;;
    esac
done

# A download cache is a folder of links to files elsewhere.
mapfile -t linked < <(find "$model/" "$data" "$recipe" -maxdepth 1 -type l -exec realpath {} + | sed 's:/[^/]*$::' | sort -u)
mounts=("$model" "${data%/*}" "${recipe%/*}" "${linked[@]}")
inputs=(--config "$recipe" --data-path "$data")
if [[ -n ${EVAL_DATA:-} ]]; then
    eval_data=$(place EVAL_DATA)
    mounts+=("${eval_data%/*}")
    inputs+=(--eval-data-path "$eval_data")
fi

ask_to_stop() {
    # Without --batch or --full this reaches the tasks of the steps and not this shell. A TERM to the srun process would
    # kill the step instead. It fails when SLURM cancels the job: the tasks then have their TERM already.
    scancel --signal=TERM "$job" || say "no running step to signal"
}
kill_now() {
    kill -TERM "$child" || true  # srun ends its step by force
}

while true; do
    begin_attempt
    step_words "${mounts[@]}"
    trainer=("${PYTHON:-python}" "$home/pretrain_ssft.py" "${inputs[@]}" "${@//\{task\}/${SLURM_ARRAY_TASK_ID:-}}" --save "$run")
    if [[ -e $run/latest_checkpointed_iteration.txt ]]; then
        trainer+=(--load "$run" --no-finetune)  # whatever it started from, it goes on from its own checkpoint
    else
        trainer+=(--load "$model")
    fi
    printf '%s:' "$script" && printf ' %q' "${step[@]}" "${trainer[@]}" && echo
    last_heartbeat=$(heartbeat)  # of an earlier attempt
    run_to_the_end "${step[@]}" "${trainer[@]}"
    end_attempt || break
done
