#!/usr/bin/env bash
# Runs the trainer as one srun step of a SLURM job, one task per GPU, and lets the job go on after its time limit.
# The batch scripts beside this file call it; its arguments are the trainer's flags.
#
#   USR1 (sent by `#SBATCH --signal=B:USR1@300`): the trainer saves a checkpoint and ends, the job is requeued.
#   TERM (scancel, preemption): the trainer saves a checkpoint and ends; whether the job runs again is SLURM's decision.
#
# Environment:
#   DATA, TOKENIZER, RUN_DIR  JSONL file, tokenizer folder, folder of the run (on a file system that all nodes share)
#   SSFT_HOME                 this repository; default: the folder the job was submitted from
#   PYTHON                    interpreter; default: python
#   CONTAINER_IMAGE           run in this image (pyxis: an image URI or a .sqsh file)
#   CONTAINER_MOUNTS          mounts beside those of the folders above, as pyxis writes them: SRC:DST,SRC:DST
set -euo pipefail

home=$(realpath "${SSFT_HOME:-$SLURM_SUBMIT_DIR}")
data=$(realpath "${DATA:?the JSONL file to train on}")
tokenizer=$(realpath "${TOKENIZER:?the tokenizer folder}")
mkdir -p "${RUN_DIR:?the folder of the run}"
run=$(realpath "$RUN_DIR")

# Rendezvous: every task derives its rank from SLURM_PROCID, SLURM_LOCALID and SLURM_NTASKS. The port depends on the job,
# so jobs that share a node do not meet, and stays below the range from which kernels hand out ports.
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"  # keeps Megatron's overlapped kernels in order
# Compiled kernels: many ranks writing to a home folder on a shared file system is slow and fails now and then.
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-/tmp/triton-$SLURM_JOB_ID}"

step=(srun --kill-on-bad-exit=1)
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    step+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")  # srun does not take it over from sbatch
fi
if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    mounts=$home:$home,$run:$run,$tokenizer:$tokenizer,${data%/*}:${data%/*}
    step+=("--container-image=$CONTAINER_IMAGE" "--container-workdir=$home"
        "--container-mounts=$mounts${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
fi

trainer=("${PYTHON:-python}" "$home/pretrain_ssft.py" "$@"
    --data-path "$data" --tokenizer-model "$tokenizer" --save "$run")
if [[ -e $run/latest_checkpointed_iteration.txt ]]; then
    trainer+=(--load "$run" --no-finetune)  # whatever it started from, it goes on from its own checkpoint
fi

interrupted=
requeue=
stop() {
    interrupted=yes
    echo "launch.sh: got $1, asking the trainer to save and stop" >&2
    # Without --batch or --full this reaches the tasks of the steps and not this shell. A TERM to the srun process would
    # kill the step instead. It fails when SLURM cancels the job: the tasks then have their TERM already.
    scancel --signal=TERM "$SLURM_JOB_ID" || echo "launch.sh: no running step to signal" >&2
}
on_usr1() {
    requeue=yes
    stop USR1
}
on_term() {
    requeue=
    trap '' USR1
    stop TERM
}
trap on_usr1 USR1
trap on_term TERM

echo "launch.sh: ${step[*]} ${trainer[*]}"
"${step[@]}" "${trainer[@]}" &
srun_pid=$!
while true; do
    interrupted=
    status=0
    wait "$srun_pid" || status=$?
    [[ -n $interrupted ]] || break  # a trap ends `wait` early, with the signal's status instead of srun's
done

if [[ $status -eq 0 && -n $requeue ]]; then
    echo "launch.sh: stopped cleanly, requeueing job $SLURM_JOB_ID" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
