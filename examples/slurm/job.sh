#!/usr/bin/env bash
# What launch.sh and gfpo_loop.sbatch share: where a job's files are, how its steps start, and how it ends.
# Sourced, with `home` set to the repository's folder, `run` to the folder that the job writes to, and `what` to what runs.
: "${home:?}" "${run:?}" "${what:?}"

# For a task of a job array SLURM_JOB_ID alone would address it too, but for one of them it is the id of the whole array.
job=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi
script=${0##*/}
records=$run/slurm
attempts=$records/attempts-$job
bad_input=$records/bad-input-$job
stopped_early=$records/stopped-early-$job
max_restarts=${MAX_RESTARTS:-3}
margin=${STOP_MARGIN:-20}  # seconds before the time limit at which a step that still has not ended is killed

say() {
    echo "$script: $*" >&2
}

refuse() {
    say "$*"
    exit 2
}

# The full path in the variable NAME: of a link itself, whose name tells what it is.
place() {
    realpath -es -- "${!1}" 2> /dev/null || refuse "$1=${!1}: there is no such file or folder"
}

if [[ ! $max_restarts =~ ^[0-9]+$ ]]; then
    refuse "MAX_RESTARTS=$max_restarts: is no number"
fi
if [[ ! $margin =~ ^[0-9]+$ ]]; then
    refuse "STOP_MARGIN=$margin: is no number of seconds"
fi

# What WORDS print. Asked again for a while where they fail: the controller of a large cluster is too busy now and then.
ask() {
    local try
    for try in 1 2 3 4 5; do
        if "$@"; then
            return 0
        fi
        sleep "$try" || true
    done
    return 1
}

# A field of what scontrol says: `field NodeAddr node n1`; nothing where it does not answer.
field() {
    local answer
    answer=$(ask scontrol show "$2" "$3" --oneliner) || return 0
    grep -o "\b$1=[^ ]*" <<< "$answer" | cut -d= -f2 || true
}

# The id of the job's step of this name; nothing where there is none.
step_named() {
    local answer
    answer=$(ask squeue --steps --noheader --job "$job" --format '%i %j') || return 0
    awk -v name="$1" '$2 == name { print $1 }' <<< "$answer"
}

# SLURM ends this shell as soon as it has heard of it.
requeue() {
    until scontrol requeue "$job"; do
        say "cannot requeue the job, asking again"
        sleep 5 || true
    done
    exit 0
}

# Whether somebody listens at a port of this host, which is the job's first node.
is_taken() {
    (exec 3<> "/dev/tcp/127.0.0.1/$1") 2> /dev/null
}

# -- attempts ------------------------------------------------------------------------------------------------------------
# A line `begin` for each start of the ranks, with the progress until then, one where they are told to stop, and one that
# says how it ended. They outlive a requeue. Where SLURM kills the batch shell there is no end: that is a failure, unless
# the ranks were told to stop and have got on in the attempt. So a job that gets nowhere is not tried for ever.

failures() {
    awk -v now="$(progress)" '
        function close_without_end(progress) { if (open && !(told && progress > since)) n++ }
        $1 == "begin" { close_without_end($NF); open = 1; told = 0; since = $NF }
        $1 == "stopping" { told = 1 }
        $1 == "stopped" || $1 == "finished" || $1 == "refused" { open = 0 }
        $1 == "failed" { open = 0; n++ }
        END { close_without_end(now); print n + 0 }' "$attempts" 2>/dev/null || echo 0
}

begin_attempt() {
    mkdir -p "$records/logs" "$records/flight"
    if [[ $(failures) -gt $max_restarts ]]; then
        say "$(failures) attempts of job $job failed, MAX_RESTARTS=$max_restarts allows no further one; see $attempts"
        exit 1
    fi
    rm -f "$bad_input" "$stopped_early"
    echo "begin $(date -Is) restart ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST at $(progress)" >> "$attempts"
    attempt=$(grep -c '^begin' "$attempts")
    # Rendezvous: every task derives its rank from the variables of its SLURM step. The port depends on the job and the
    # attempt, so that none meets the remains of another, and stays below the range from which kernels hand out ports.
    local first
    read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MASTER_ADDR=$(field NodeAddr node "$first")  # its name need not be known to the resolver
    MASTER_ADDR=${MASTER_ADDR:-$first}
    MASTER_PORT=$((10000 + (SLURM_JOB_ID + 1009 * attempt) % 20000))
    while is_taken "$MASTER_PORT"; do
        say "port $MASTER_PORT is in use on $first, taking the next one"
        MASTER_PORT=$((MASTER_PORT + 1))
    done
    export MASTER_ADDR MASTER_PORT
    # NCCL's flight recorder: what the ranks' last collectives were, written where one of them times out.
    flight=$records/flight/$job.$attempt-rank
    export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
    export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
    export TORCH_NCCL_DEBUG_INFO_TEMP_FILE="$flight" TORCH_FR_DUMP_TEMP_FILE="$flight"
    export SSFT_LOGS="${LOG_DIR:-$records/logs}/$job.$attempt" SSFT_BAD_INPUT="$bad_input" \
        SSFT_STOPPED_EARLY="$stopped_early"
}

name_dumps() {
    local dumps=("$flight"*)
    if [[ -e ${dumps[0]} ]]; then
        say "the job hung; the flight recorder wrote ${#dumps[@]} files: $flight*" \
            "(read them with torchfrtrace)"
    fi
}

# -- settings of every step ------------------------------------------------------------------------------------------------

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"  # keeps Megatron's overlapped kernels in order
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"  # microbatches differ in length
# Compiled kernels: many ranks writing to a home folder on a shared file system is slow and fails now and then.
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-/tmp/triton-$SLURM_JOB_ID}"

# Words that start one task per GPU: `step_words MOUNT...` puts them into the array `step`. With CONTAINER_IMAGE the
# tasks run in it, with the folders MOUNT, the run's and the repository's at their own paths, and with the variables of
# the job rather than those of the image.
step_words() {
    step=(srun --kill-on-bad-exit=1)
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
        step+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")  # srun does not take it over from sbatch
    fi
    container_words "$@"
    step+=("${outside[@]}" bash "$home/examples/slurm/rank.sh" "${inside[@]}")
}

# As step_words, into the arrays `outside` (options of srun) and `inside` (words before the program).
container_words() {
    outside=()
    inside=()
    if [[ -z ${CONTAINER_IMAGE:-} ]]; then
        return 0
    fi
    local mount mounts=("$home:$home" "$run:$run") names=() name
    for mount; do
        mounts+=("$mount:$mount")
    done
    if [[ -n ${CONTAINER_MOUNTS:-} ]]; then
        local further
        IFS=, read -ra further <<< "$CONTAINER_MOUNTS"
        mounts+=("${further[@]}")
    fi
    while IFS= read -r name; do
        case $name in
            MASTER_* | OMP_* | CUDA_* | NVIDIA_* | NCCL_* | GLOO_* | UCX_* | UCC_* | FI_* | TORCH* | PYTORCH_* | TRITON_* | \
                NVTE_* | CUBLAS_* | VLLM_* | HF_* | WANDB_* | SSFT_* | SLURM_*)
                names+=("$name") ;;
        esac
    done < <(compgen -e)
    if [[ -n ${CONTAINER_ENV:-} ]]; then
        local more
        IFS=, read -ra more <<< "$CONTAINER_ENV"
        names+=("${more[@]}")
    fi
    case ${CONTAINER_RUNTIME:-pyxis} in
        pyxis)
            local IFS=,
            outside=("--container-image=$CONTAINER_IMAGE" "--container-workdir=$home" "--container-mounts=${mounts[*]}"
                "--container-env=${names[*]}")
            ;;
        enroot)
            inside=(enroot start)
            for mount in "${mounts[@]}"; do
                inside+=(--mount "$mount")
            done
            # Those of the step differ from task to task, and are not set here yet.
            for name in "${names[@]}" SLURM_STEP_ID SLURM_PROCID SLURM_LOCALID SLURM_NTASKS SLURM_NODEID; do
                inside+=(--env "$name")
            done
            inside+=("$CONTAINER_IMAGE")
            ;;
        apptainer)
            for name in "${names[@]}"; do
                case $name in SLURM_*) ;; *) export "APPTAINERENV_$name=${!name-}" ;; esac  # images have none of SLURM's
            done
            inside=(apptainer exec --pwd "$home")
            if [[ -e /dev/nvidiactl ]]; then
                inside+=(--nv)
            fi
            for mount in "${mounts[@]}"; do
                inside+=(--bind "$mount")
            done
            inside+=("$CONTAINER_IMAGE")
            ;;
        *) refuse "CONTAINER_RUNTIME=$CONTAINER_RUNTIME: choose pyxis, enroot or apptainer" ;;
    esac
}

# -- stops -----------------------------------------------------------------------------------------------------------------
#   USR1 (sent by `#SBATCH --signal=B:USR1@300`, before the time limit): what runs saves and ends, the job is requeued.
#   TERM (scancel, preemption): what runs saves and ends; whether the job runs again is SLURM's decision.

stop=      # the signal that came
killed=    # whether the step was killed since the time was over
asked_at=  # when it was last asked to stop, in seconds of this shell
child=
killer=

on_signal() {
    if [[ $stop == TERM || $stop == "$1" ]]; then
        return 0
    fi
    stop=$1
    say "got $1, asking $what to save and stop"
    echo "stopping $(date -Is) by $1" >> "$attempts"
    asked_at=$SECONDS
    ask_to_stop
    if [[ $1 == USR1 ]]; then
        kill_in_time
    fi
}

# SLURM kills everything at the time limit, the batch shell too, and requeues nothing.
kill_in_time() {
    local end seconds
    end=$(field EndTime job "$job")
    if [[ -z $end ]] || ! end=$(date -d "$end" +%s 2>/dev/null); then
        return 0  # no time limit
    fi
    seconds=$((end - $(date +%s) - margin))
    if ((seconds < 1)); then
        seconds=1
    fi
    say "$what is killed in $seconds s if it has not ended by then; it goes on from its last checkpoint"
    shell_pid=$BASHPID
    (
        trap - USR1 USR2
        trap 'kill "$nap"; exit' TERM
        sleep "$seconds" > /dev/null 2>&1 &
        nap=$!
        wait "$nap"
        kill -USR2 "$shell_pid"
    ) &
    killer=$!
}

on_time_over() {
    killed=yes
    say "$what has not ended in time: killing it"
    kill_now
}

trap 'on_signal USR1' USR1
trap 'on_signal TERM' TERM
trap on_time_over USR2

# Run WORDS to their end, whatever signals come; their status is in `status`. A trap runs between two naps: bash may lose
# the status of a child for good whose end comes together with a signal that ends `wait`.
run_to_the_end() {
    status=143
    if [[ -n $stop ]]; then
        return 0  # the signal came before there was anything to stop
    fi
    "$@" &
    child=$!
    while kill -0 "$child" 2> /dev/null; do
        if [[ -n ${SSFT_REQUESTS:-} ]]; then
            answer_requests
        fi
        if [[ -n $stop && -z $killed ]] && ((SECONDS - asked_at >= 10)); then
            asked_at=$SECONDS
            ask_to_stop  # ranks that had not begun when it was asked first, as with an image that is still loaded
        fi
        sleep 0.5 || true  # a signal to all processes of the job ends it too
    done
    status=0
    wait "$child" || status=$?
    child=
    if [[ -n $killer ]]; then
        kill "$killer" 2>/dev/null || true
        killer=
    fi
}

# What is to become of the job after an attempt. Returns where it is to be tried again in this allocation.
end_attempt() {
    name_dumps
    local is_bad_input=
    if [[ $status -eq 2 || -e $bad_input ]]; then
        is_bad_input=yes  # a rank says what is wrong; SLURM's status may be that of another one, which was killed
    fi
    if [[ -n $is_bad_input ]]; then
        echo "refused" >> "$attempts"
        say "the input or a setting is at fault, see above; not tried again"
        exit 2
    fi
    if [[ -n $stop && ($status -eq 0 || $status -eq 143) && $(how_it_ended) == "done" ]]; then
        stop='' status=0  # it came after the work and met the ranks on their way out
    fi
    # 143: ended by TERM before it listened for it, so nothing was begun that could be lost. Where only some ranks did not
    # listen yet, the others are killed, and the step's status is theirs.
    if [[ -n $stop && ($status -eq 0 || $status -eq 143 || -n $killed || -e $stopped_early) ]]; then
        echo "stopped $(date -Is) by $stop, status $status" >> "$attempts"
        if [[ $stop == USR1 ]]; then
            say "stopped, requeueing job $job"
            requeue
        fi
        exit "$status"
    fi
    if [[ $status -eq 0 && $(how_it_ended) == stopped ]]; then
        echo "stopped $(date -Is) by somebody else" >> "$attempts"
        say "$what was stopped by a signal to it alone and is not finished; submit the job again to go on"
        exit 143
    fi
    if [[ $status -eq 0 ]]; then
        echo "finished $(date -Is)" >> "$attempts"
        return 1
    fi
    echo "failed $(date -Is) status $status" >> "$attempts"
    if [[ $stop == TERM ]]; then
        exit "$status"
    fi
    if [[ $(failures) -gt $max_restarts ]]; then
        say "status $status; $(failures) attempts failed, MAX_RESTARTS=$max_restarts allows no further one"
        exit "$status"
    fi
    say "status $status; restart $(failures) of at most $max_restarts (MAX_RESTARTS)"
    if [[ $stop == USR1 ]]; then
        requeue
    fi
}
