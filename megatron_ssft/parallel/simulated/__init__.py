"""A rank of a cluster, simulated in one process on the CPU: what its step takes, without a GPU.

simulate.py    runs an engine on a simulated GPU; start here
gpu.py         the GPU: tensors without memory, copies from and to a real host
groups.py      process groups of any size, in which the other ranks are made up
counters.py    counts what operators do, with simulated tensors or real ones
ledger.py      memory, by what it is for and by line of code
flops.py       FLOPs of operators
traffic.py     messages between ranks
sites.py       which line of code it was
checkpoints.py saving, loading and exporting, but for the files
torch_parts.py what of torch it is built on
records.py     what is counted
"""
