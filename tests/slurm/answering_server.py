"""In vLLM's place on each node of gfpo_loop.sbatch: every other answer is right.

python -m tests.slurm.answering_server MODEL PORT FOLDER: listens at this node's address and writes the number of
questions that it has answered into FOLDER/NODE.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from megatron_ssft.tokenizers.tokenizer import HuggingFaceTokenizer
from tests.helpers.completion_server import Server
from tests.slurm.cluster import ADDRESSES


def main(model: str, port: str, folder: str) -> None:
    tokenizer = HuggingFaceTokenizer(model)
    node = os.environ["SLURMD_NODENAME"]
    answers = [tokenizer.encode(text) for text in ("#1", "#2")]
    server = Server(models=(model,), port=int(port), tokenizer=tokenizer, host=ADDRESSES[node],
                    writes=lambda seed: answers[seed % 2])  # fmt: skip
    with server:
        while True:
            (Path(folder) / node).write_text(str(len(server.bodies)))
            time.sleep(0.2)


if __name__ == "__main__":
    main(*sys.argv[1:])
