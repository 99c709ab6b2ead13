"""Peak host memory of loading from and exporting to a Hugging Face folder, one line per rank.

python benchmarks/hf_memory.py --make-model DIR         # a random Llama of 1.1B parameters in bf16, 2.2 GB
python benchmarks/hf_memory.py HF_DIR OUTPUT_DIR
torchrun --nproc-per-node 4 benchmarks/hf_memory.py HF_DIR OUTPUT_DIR --tensor-model-parallel-size 4
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
from pathlib import Path

from megatron_ssft.cli.entry import run_command

MIB = 1024


def peak() -> float:
    """Peak resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB


def make_model(folder: Path) -> None:
    """A random model with a byte-level tokenizer beside it, so that it can be converted."""
    import tokenizers
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    letters = {letter: i for i, letter in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def main() -> None:
    """Load, export, and print the peak after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("target", type=Path, nargs="?")
    parser.add_argument("--make-model", type=Path)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.make_model is not None:
        make_model(arguments.make_model)
        return
    from megatron_ssft.config import SSFTConfig
    from megatron_ssft.config.flags import build_config
    from megatron_ssft.parallel.checkpoint.hf import export_hf_weights, load_hf_weights
    from megatron_ssft.parallel.collectives import barrier, on_first_rank
    from megatron_ssft.parallel.engine import Engine
    from megatron_ssft.parallel.topology import destroy_topology, initialize_topology
    from megatron_ssft.tokenizers.vocabulary import build_vocabulary
    from megatron_ssft.training.startup import complete_values

    values = {
        "load": str(arguments.source),
        "bf16": True,
        "num_forking_tokens": 0,
        "tensor_model_parallel_size": arguments.tensor_model_parallel_size,
        "data_path": ["-"],
        "train_iters": 1,
    }
    config = build_config(complete_values(values), SSFTConfig)
    topology = initialize_topology(config.run)
    vocabulary = build_vocabulary(config.run)
    start = peak()
    engine = Engine(config.run, topology, vocabulary.size, vocabulary.tags.row_ids)
    shard = 2 * engine.num_parameters / MIB**2
    load_hf_weights(engine, arguments.source)
    loaded = peak()
    on_first_rank(lambda: prepare(arguments.target), topology)
    export_hf_weights(engine, arguments.target)
    exported = peak()
    barrier(topology)
    print(
        f"rank {topology.rank}: program {start:.0f} MiB, shard {shard:.0f} MiB; above both, peak while loading "
        f"{loaded - start - shard:.0f} MiB, while exporting {exported - start - shard:.0f} MiB",
        flush=True,
    )
    destroy_topology()


def prepare(folder: Path) -> None:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
