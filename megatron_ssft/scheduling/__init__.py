"""Plans: which sequence runs in which microbatch on which data-parallel rank. Plain data, no execution.

Start at `planner.py`: it picks one of four planners, each (batch, what to run, tags, limits, work) -> MicrobatchPlan.

- `rows.py`: both planners of the padded layout. `train_streams.py`, `cost_streams.py`: those of token streams.
- `limits.py`: the limits a plan keeps to, and the layouts of token streams. `sequences.py`: what a step has to run.
- `pad_bound.py`: the PAD lower bound, with its proof.
- `balance.py`: how ranks are balanced, by exchanging microbatches; `spread_questions.py`: by dividing questions.
- `pack_streams.py`: packing sequences into streams; `search_streams.py`: the exact search where PADs depend on it.
- `shared_nodes.py`: what sequences have in common, in numbers. `assembly.py`: the finished plan with its figures.
- `work.py`: how much work a sequence is. `accounting.py`: FLOPs of a plan.
- `pipeline_time.py`: how long a rank's microbatches take in a pipeline.
"""

from megatron_ssft.scheduling.cost_streams import plan_cost_streams
from megatron_ssft.scheduling.limits import CONCATENATED, PACKED, RowLimits, StreamLayout, StreamLimits
from megatron_ssft.scheduling.pad_bound import pad_lower_bound
from megatron_ssft.scheduling.pipeline_time import PipelineTime, pipeline_time
from megatron_ssft.scheduling.rows import plan_cost_rows, plan_train_rows
from megatron_ssft.scheduling.sequences import distinct_traces
from megatron_ssft.scheduling.train_streams import plan_train_streams
from megatron_ssft.scheduling.work import WorkModel

__all__ = [
    "CONCATENATED",
    "PACKED",
    "PipelineTime",
    "RowLimits",
    "StreamLayout",
    "StreamLimits",
    "WorkModel",
    "distinct_traces",
    "pad_lower_bound",
    "pipeline_time",
    "plan_cost_rows",
    "plan_cost_streams",
    "plan_train_rows",
    "plan_train_streams",
]
