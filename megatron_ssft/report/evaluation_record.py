"""evaluation.json for the report; its schema and reader are in formats/evaluation.py."""

from megatron_ssft.formats.evaluation import EvaluationRecord as Record
from megatron_ssft.formats.evaluation import load_evaluation

__all__ = ["Record", "load_evaluation"]
