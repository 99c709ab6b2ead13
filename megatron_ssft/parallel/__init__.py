"""The model on its ranks. The only folder that imports megatron.core and torch.distributed.

engine.py          the model of this rank: scores, trains, evaluates
pipeline.py        sends between pipeline stages, with shapes from the plan
loss_terms.py      what a training step minimises, term by term
optimizer.py       AdamW, data parallelism, the tags' own learning rate
flat_shards.py     the distributed optimizer's state as parts of whole tensors
topology.py        process groups, and this rank's place in the parallel layout
collectives.py     small collectives on plain values
cuda_calls.py      calls of CUDA that another device answers
cpu_backend.py     megatron-core without CUDA

simulated/                      a rank of a cluster, on a GPU that is not there

watch/                          signs of life: no wait without a bound, and for whom it was

attention/choice.py             which attention kernel is used
attention/kernels.py            the kernels: torch SDPA, torch varlen, flash-attn, TransformerEngine
attention/segment_groups.py     segments of similar shape, grouped for one call

model/gpt.py                    megatron-core's GPT with explicit positions
model/forking_rows.py           the tags' input rows as a parameter of their own
model/loss_head.py              negative log-likelihood per token, without whole logits
model/norm.py                   RMSNorm and LayerNorm
model/initialization.py         initial weights, the same at every parallel layout
model/trainable.py              which parameters train
model/marks.py                  attributes that megatron-core reads off parameters

checkpoint/run_checkpoint.py    atomic checkpoints in megatron-core's format
checkpoint/writer.py            their files, written by threads of this process
checkpoint/loading.py           checkpoints loaded at any parallel layout
checkpoint/reader.py            their files, read once per replica
checkpoint/sharded_state.py     what of the engine a checkpoint holds
checkpoint/checkpoint_size.py   how large it is
checkpoint/pickle_scan.py       a checkpoint is looked at before it is opened
checkpoint/hf.py                weights from and to Hugging Face folders
checkpoint/hf_verification.py   proof that two formats hold the same model
"""
