"""Know before you book: will a job fit, how long will it take, which layout is best. Nothing here needs a GPU.

book.py          the answers for one layout; start here
survey.py        the steps of a run, planned: the heaviest one, and what an average one takes
simulations.py   that step on simulated GPUs, a process for each pipeline stage
memory.py        what a stage needs of its GPU's memory
longest.py       the longest sequences that would fit
step_time.py     seconds of a step, from FLOPs and bytes, by a stated model
records.py       what is found out
traps.py         known mistakes
advise.py        the search for a layout
slices.py        closed formulas for it, from a few layers of the model
policy.py        the same answers for policy learning
tables.py        answers in words
"""
