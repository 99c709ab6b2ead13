#!/usr/bin/env bash
# The loop of gfpo_loop.sbatch, which explains its environment. The loop runs on the first node, in the container if there
# is one, and asks this shell for the steps of its stages (on_host.sh).
set -euo pipefail

home=$(realpath "${SSFT_HOME:-$SLURM_SUBMIT_DIR}")
: "${LOAD:?the folder of the SSFT run}" "${QUESTIONS:?the JSONL file of questions with gold answers}"
RECIPE=${RECIPE:-$home/examples/recipes/gfpo-32b.yaml}
mkdir -p "${WORK:?the folder of the loop}"
run=$(realpath "$WORK")
what="the loop"
# shellcheck source=examples/slurm/job.sh
source "$home/examples/slurm/job.sh"
load=$(place LOAD)
questions=$(place QUESTIONS)
recipe=$(place RECIPE)

# How many stages have been finished.
progress() {
    cat "$run"/round_*/stages.json 2> /dev/null | grep -o '"seconds"' | wc -l || true
}

how_it_ended() {
    :  # the loop's status tells
}

export SSFT_REQUESTS=$records/requests-$job
declare -A srun_of=()   # request -> pid of the shell around its step
silence=60              # seconds after which nobody waits for a request any more

# Above the ports of launch.sh and below the range from which kernels hand out ports.
port=$((30000 + SLURM_JOB_ID % 2700))
urls=()
while read -r node; do
    urls+=("http://$(field NodeAddr node "$node"):$port/v1")
done < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

server=${SERVER:-$(printf '%q' "${VLLM:-vllm}") serve {model\} --host 0.0.0.0 --port {port\} --tensor-parallel-size 8}
on_host="bash $(printf '%q' "$home/examples/slurm/on_host.sh")"
loop=("${PYTHON:-python}" "$home/tools/run_gfpo.py" --load "$load" --data "$questions" --save "$run"
    --rounds 1 --train-iters 10 --lr 1e-6 --verifier math --samples-per-tag 4 --questions-per-round 1000
    --backend openai --base-url "${urls[@]}" --serve "$on_host servers ${server//\{port\}/$port}"
    --generate-args "--temperature 0.7 --top-p 0.95 --max-new-tokens 30000 --concurrency 256"
    --launcher "$on_host ranks $(printf '%q' "${PYTHON:-python}")" --train-args "--config $(printf '%q' "$recipe")"
    "$@")

# A step of the loop's: its words are in FILE. Runs in a shell of its own.
run_request() {
    local request=$1 words
    mapfile -d '' -t words < "$request.taken"
    local kind=${words[0]} program=("${words[@]:1}")
    step_words "$load" "${questions%/*}" "${recipe%/*}"
    case $kind in
        ranks) ;;
        servers) step=(srun "--ntasks=$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 "${outside[@]}" "${inside[@]}") ;;
        *) say "on_host.sh $kind: choose ranks or servers"; return 2 ;;
    esac
    step=("${step[0]}" --overlap "--job-name=${request##*/}" "${step[@]:1}")
    printf '%s:' "$script" && printf ' %q' "${step[@]}" "${program[@]}" && echo
    trap 'kill -TERM "$srun_pid" || true' TERM
    "${step[@]}" "${program[@]}" >> "$request.output" 2>&1 &
    srun_pid=$!
    local status=0
    while kill -0 "$srun_pid" 2> /dev/null; do
        sleep 0.5 || true
    done
    wait "$srun_pid" || status=$?
    echo "$status" > "$request.result"
    mv "$request.result" "$request.status"
}

# Start what is asked for, stop what is to stop, and end what nobody waits for.
answer_requests() {
    local file request step_id
    for file in "$SSFT_REQUESTS"/*.request; do
        [[ -e $file ]] || continue
        request=${file%.request}
        mv "$file" "$request.taken"
        run_request "$request" &
        srun_of[$request]=$!
    done
    for request in "${!srun_of[@]}"; do
        if [[ -e $request.status || ! -e $request.taken ]]; then
            unset "srun_of[$request]"
        elif [[ -e $request.stop ]]; then
            rm -f "$request.stop"
            step_id=$(step_named "${request##*/}")
            if [[ $(head -z -n 1 "$request.taken" | tr -d '\0') == ranks && -n $step_id ]]; then
                scancel --signal=TERM "$step_id" || say "step $step_id is gone"
            else
                kill -TERM "${srun_of[$request]}" || true  # srun ends its step by force
            fi
        elif [[ -n $(find "$request.alive" -not -newermt "-$silence seconds" 2> /dev/null) ]]; then
            say "nobody waits for step ${request##*/} any more: ending it"
            kill -TERM "${srun_of[$request]}" || true
        fi
    done
}

ask_to_stop() {
    if [[ -z ${CONTAINER_IMAGE:-} ]]; then
        kill -TERM "$child" || true
        return 0
    fi
    local step_id
    step_id=$(step_named loop)
    scancel --signal=TERM "$step_id" || say "the loop is gone"
}
kill_now() {
    kill -KILL "$child" || true
    kill -TERM "${srun_of[@]}" || true
}

while true; do
    begin_attempt
    rm -rf "$SSFT_REQUESTS"
    mkdir -p "$SSFT_REQUESTS"
    first=()
    if [[ -n ${CONTAINER_IMAGE:-} ]]; then
        container_words "$load" "${questions%/*}" "${recipe%/*}"
        first=(srun --overlap --job-name=loop --nodes=1 --ntasks=1 "${outside[@]}" "${inside[@]}")
    fi
    printf '%s:' "$script" && printf ' %q' "${first[@]}" "${loop[@]}" && echo
    run_to_the_end "${first[@]}" "${loop[@]}"
    end_attempt || break
done
