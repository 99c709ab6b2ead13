#!/usr/bin/env bash
# Trains a small GPT from scratch on grade-school mathematics with a SentencePiece tokenizer.
# Four processes as TP2 x PP2, 30 steps, a few minutes on two CPU cores.
#
#   examples/gsm8k_sentencepiece.sh DATA.jsonl tokenizer.model RUN_FOLDER [more flags]
#
# DATA.jsonl: traces of several teachers on GSM8K, which are not shipped; docs/training.md has the format. Traces that
# are marked as incorrect are left out. examples/data/arithmetic_teachers.jsonl has this format too.
# tokenizer.model: any SentencePiece model, such as the one inside the package mistral-common.
set -euo pipefail
DATA=${1:?DATA: JSONL file of questions with several traces}
TOKENIZER=${2:?TOKENIZER: SentencePiece model file}
RUN=${3:?RUN: folder for logs and checkpoints}
shift 3

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="$root/.venv/bin:$PATH"  # what make installed, where there is one

exec torchrun --nproc-per-node 4 "$root/pretrain_ssft.py" \
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 \
    --num-layers 4 --hidden-size 128 --num-attention-heads 4 --num-query-groups 2 \
    --seq-length 512 --micro-batch-size 4 --global-batch-size 32 --train-iters 30 --lr 1e-3 --seed 1 \
    --data-path "$DATA" --trace-filter correct=true \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$TOKENIZER" \
    --num-forking-tokens 8 --matching optimal --matching-tokens 64 \
    --save "$RUN" "$@"
