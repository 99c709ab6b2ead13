"""The training data: from rows of JSONL to the questions of a global batch.

    examples.py      rows -> SetExample, checked; trace_filter.py leaves traces out
    prompt.py        SetExample -> token ids, through the tokenizer's chat template
    cache.py         token ids -> memory-mapped arrays on disk, read back as TokenizedSet
    sampler.py       order of the questions, and the questions of each global batch
    questions.py     rows without traces, for generation and GFPO

Importers of public data sets are in megatron_ssft/datasets; they write rows that examples.py reads.
"""
