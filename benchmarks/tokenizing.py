"""Measure the memory and the speed of tokenizing, at one, ten and a hundred times the data.

python benchmarks/tokenizing.py --tokenizer HF_DIR --folder DIR     # about 1 GB on the disk of DIR

Each size is tokenized by a process of its own. Memory is how much its peak resident set grows over that of tokenizing a
few rows. With several workers it is that of the process that starts them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import report

WORDS = ["so", "the", "sum", "of", "two", "even", "numbers", "is", "twice", "a", "whole", "number", "hence", "we"]
SIZES = (1, 10, 100)

MEASURED = """
import functools, json, sys, time
from pathlib import Path
from megatron_ssft.config import DataConfig, TokenizerConfig
from megatron_ssft.data.cache import SetDataset, build_dataset
from megatron_ssft.tokenizers.data_text import PromptRules
from megatron_ssft.tokenizers.forking_tokens import build_forking_tokens
from megatron_ssft.tokenizers.tokenizer import build_tokenizer

def tokenizer_of(folder):
    kind = "CharTokenizer" if folder is None else "HuggingFaceTokenizer"
    return build_tokenizer(kind, folder, PromptRules(None, TokenizerConfig.prompt_control_tokens))

def peak():
    # Not the system's own count, which a process takes over from the one that started it.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10

def build(path, cache, tokenizer, workers):
    tags = build_forking_tokens(tokenizer, 6, "special", None)
    data = DataConfig(data_path=[path], tokenizing_workers=workers)
    return build_dataset(
        [path], tokenizer, tags, data, 32768, check_num_tags=True, seed=1, cache_dir=Path(cache),
        rebuild=functools.partial(tokenizer_of, folder),
    )

if __name__ == "__main__":
    few, path, cache, folder, workers = json.loads(sys.argv[1])
    tokenizer = tokenizer_of(folder)
    build(few, cache, tokenizer, 1)
    before, begin = peak(), time.perf_counter()
    built = build(path, cache, tokenizer, workers)
    seconds, grown = time.perf_counter() - begin, peak() - before
    print(json.dumps([SetDataset.open(built).summary.total_tokens, seconds, grown]))
"""


def write_rows(path: Path, megabytes: float, seed: int) -> None:
    """Write questions with four traces of about 2,000 words, up to this size."""
    draw, number = random.Random(seed), 0
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            texts = [" ".join(draw.choices(WORDS, k=draw.randint(500, 3500))) for _ in range(4)]
            traces = [{"text": text, "source": f"t{j}"} for j, text in enumerate(texts)]
            file.write(json.dumps({"id": number, "question": f"Why {number}?", "traces": traces}) + "\n")
            number += 1


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="a Hugging Face folder; by default letters are the tokens")
    parser.add_argument("--folder", type=Path, help="where to write; the default is the system's temporary folder")
    parser.add_argument("--megabytes", type=float, default=4.0, help="text of the smallest size")
    parser.add_argument("--workers", type=int, nargs="+", default=[1])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        place = Path(folder)
        (place / "measured.py").write_text(MEASURED)
        write_rows(place / "few.jsonl", 0.1, 0)
        for size in SIZES:
            path = place / f"{size}.jsonl"
            write_rows(path, args.megabytes * size, size)
            for workers in args.workers:
                tokenizer = None if args.tokenizer is None else str(args.tokenizer)
                words = [
                    str(place / "few.jsonl"),
                    str(path),
                    str(place / f"cache {size} {workers}"),
                    tokenizer,
                    workers,
                ]
                done = subprocess.run(
                    [sys.executable, str(place / "measured.py"), json.dumps(words)], capture_output=True, check=True
                )
                tokens, seconds, grown = json.loads(done.stdout)
                rows.append(
                    {
                        "workers": workers,
                        "text_MB": os.path.getsize(path) / 1e6,
                        "tokens": tokens,
                        "peak_memory_MB": grown / 1e6,
                        "tokens_per_second": tokens / seconds,
                    }
                )
    report("tokenizing", rows, args.json)


if __name__ == "__main__":
    main()
