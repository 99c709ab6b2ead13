"""Inputs of a forking policy's evaluation: policy.jsonl, rewards, and scored files that belong together.

Scored files have a role each. `before` and `after` hold samples under every tag (mode each) of the model before and
after the training of its policy; `own` and `own_greedy` those that the model after began by itself, `own_before` and
`own_greedy_before` those of the model before; `grpo` and `grpo_before` answers of a baseline with and without
reinforcement learning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_ssft.errors import UserError
from megatron_ssft.evaluation.scored_runs import ScoredRun, load_runs
from megatron_ssft.formats.policy import Policy, read_policy
from megatron_ssft.formats.rewards import RewardTable, read_rewards
from megatron_ssft.formats.rollouts import differences
from megatron_ssft.formats.run_folder import checkpoint_folder
from megatron_ssft.hf.fingerprints import model_fingerprint
from megatron_ssft.hf.folder import is_hf_folder

PAIRS = {"after": "before", "own": "own_before", "own_greedy": "own_greedy_before", "grpo": "grpo_before"}
"""Roles after and before the training."""
_MODES = {
    **dict.fromkeys(("before", "after"), ("each",)),
    **dict.fromkeys(("own", "own_before"), ("own",)),
    **dict.fromkeys(("own_greedy", "own_greedy_before"), ("own-greedy",)),
    **dict.fromkeys(("grpo", "grpo_before"), ("none", "fixed", "own", "own-greedy")),
}
_SAME_MODEL = (("own", "after"), ("own_greedy", "after"), ("own_before", "before"), ("own_greedy_before", "before"))
_DRAWN = ("temperature", "top_p", "top_k", "max_new_tokens")
"""Sampling settings that change how often an answer is right."""


@dataclass(frozen=True)
class Inputs:
    """Files that fit each other: the same questions in all of `runs`, all of them under every tag where asked for."""

    runs: Mapping[str, ScoredRun]
    """Role -> its file."""
    rewards: RewardTable
    policy: Policy | None
    remarks: tuple[str, ...]
    """Sentences on what does not fit but need not be wrong."""

    @property
    def ids(self) -> list[str]:
        return [question.id for question in self.runs["before"].questions]

    @property
    def tags(self) -> tuple[int, ...]:
        return tuple(tag for tag in self.runs["before"].tags if tag is not None)


def load_inputs(scored: Mapping[str, Path], rewards: Path, policy: Path | None = None) -> Inputs:
    """Read and compare. `scored`: role -> scored file, at least before, after, own and own_greedy. Raises UserError."""
    runs = dict(zip(scored, load_runs(list(scored.values()))))
    _check_modes(runs)
    _check_models(runs)
    _check_questions(runs)
    _check_tags(runs)
    _check_sampling(runs)
    table = read_rewards(rewards, len(runs["before"].tags))
    inputs = Inputs(runs, table, None if policy is None else read_policy(policy), ())
    _check_rewards(inputs)
    if policy is not None:
        _check_policy(inputs, policy)
    remarks = [*_remarks(inputs), *([] if policy is None else _check_policy_models(inputs, policy))]
    return Inputs(inputs.runs, inputs.rewards, inputs.policy, tuple(remarks))


def flag(role: str) -> str:
    """The option of megatron-ssft evaluate-policy that names the file of a role."""
    return "--" + role.replace("_", "-")


def _model(run: ScoredRun) -> str:
    return run.rows[0].model


def _check_modes(runs: Mapping[str, ScoredRun]) -> None:
    for role, run in runs.items():
        mode, modes = run.rows[0].mode, _MODES[role]
        if mode not in modes:
            advice = f"give one generated with --tags {'|'.join(modes)}"
            raise UserError(f"{run.file}: generated with --tags {mode}, which is no {flag(role)}; {advice}")


def _check_models(runs: Mapping[str, ScoredRun]) -> None:
    for role, other in PAIRS.items():
        if role in runs and other in runs and _model(runs[role]) == _model(runs[other]):
            raise UserError(
                f"{runs[role].file}: of the same model as {flag(other)} ({_model(runs[role])[:12]}); "
                f"{flag(role)} and {flag(other)} must be of the model after and before the training"
            )
    for role, other in _SAME_MODEL:
        if role in runs and _model(runs[role]) != _model(runs[other]):
            raise UserError(
                f"{runs[role].file}: of another model ({_model(runs[role])[:12]}) than {flag(other)} "
                f"({_model(runs[other])[:12]}); {flag(role)} and {flag(other)} must be of one model"
            )


def _check_questions(runs: Mapping[str, ScoredRun]) -> None:
    before = {question.id for question in runs["before"].questions}
    for role, run in runs.items():
        ids = {question.id for question in run.questions}
        if ids != before:
            lacks, more = sorted(before - ids), sorted(ids - before)
            parts = [f"{len(lacks)} of its questions are missing, such as {lacks[0]!r}"] if lacks else []
            parts += [f"{len(more)} are not in it, such as {more[0]!r}"] if more else []
            text = f"{run.file}: not the questions of --before: {', '.join(parts)}"
            raise UserError(f"{text}; generate and score {flag(role)} for the same questions")
        _check_prompts(role, run, runs["before"])


def _check_prompts(role: str, run: ScoredRun, before: ScoredRun) -> None:
    """Raise UserError where the same ids stand for other prompts; under two tokenizers they cannot be compared."""
    if run.rows[0].tokenizer != before.rows[0].tokenizer:
        return
    prompts, expected = prompts_of(run), prompts_of(before)
    others = [id for id in prompts if id in expected and prompts[id] != expected[id]]
    if others:
        raise UserError(
            f"{run.file}: {len(others)} of its questions were asked with another prompt than in {before.file}, such as "
            f"{others[0]!r}; generate and score {flag(role)} for the same questions"
        )


def prompts_of(run: ScoredRun) -> dict[str, str]:
    """Question's id -> mark of its prompt, of those that say it."""
    return {row.id: row.prompt for row in run.rows if row.prompt is not None}


def _check_tags(runs: Mapping[str, ScoredRun]) -> None:
    before = runs["before"]
    if before.tags != tuple(range(len(before.tags))):
        raise UserError(f"{before.file}: has tags {list(before.tags)}, not all from 0; generate with --tags each")
    for role in ("before", "after"):
        run = runs[role]
        if run.tags != before.tags:
            raise UserError(f"{run.file}: has tags {list(run.tags)}, --before has {list(before.tags)}; give one set")
        for question in run.questions:
            for tag, samples in zip(run.tags, question.by_tag):
                if not samples:
                    advice = "finish generating and scoring it"
                    raise UserError(f"{run.file}: question {question.id!r} has no samples under tag {tag}; {advice}")
    for role in PAIRS:
        for own in (role, PAIRS[role]):
            in_use = runs[own].tags if own in runs and own.startswith("own") else ()
            strange = [tag for tag in in_use if tag is not None and tag not in before.tags]
            if strange:
                raise UserError(
                    f"{runs[own].file}: has samples of tag {min(strange)}, which --before has not; give all tags there"
                )


def _check_sampling(runs: Mapping[str, ScoredRun]) -> None:
    """Raise UserError where before and after were not measured alike."""
    for role, other in PAIRS.items():
        if role in runs and other in runs:
            unlike = differences(_settings(runs[other]), _settings(runs[role]))
            if unlike:
                raise UserError(f"{runs[role].file}: not made like {flag(other)}: {unlike}; generate both alike")


def _settings(run: ScoredRun) -> dict[str, object]:
    row = run.rows[0]
    drawn = {name: row.sampling[name] for name in (*_DRAWN, "mode") if name in row.sampling}
    return {**drawn, "verifiers": sorted({row.verifier for row in run.rows}), "tokenizer": row.tokenizer[:12]}


def _check_rewards(inputs: Inputs) -> None:
    both = sorted(set(inputs.rewards.rows) & set(inputs.ids))
    if both:
        raise UserError(
            f"{inputs.rewards.path}: {len(both)} of the questions are held out, such as {both[0]!r}; a tag chosen on "
            "them would be too good, so give the rewards of the training questions"
        )


def _check_policy(inputs: Inputs, path: Path) -> None:
    if not inputs.policy:
        raise UserError(f"{path}:1: the file is empty; only gfpo-exact and gfpo-sampled write a policy")
    snapshots = inputs.policy.get("eval")
    if not snapshots:
        raise UserError(f"{path}: no policy of held-out questions; train with --eval-data, or leave --policy out")
    if len(snapshots) < 2:
        raise UserError(f"{path}: the policy at step {min(snapshots)} alone; let the training end, or leave it out")
    for iteration in (min(snapshots), max(snapshots)):
        lacks = [id for id in inputs.ids if id not in snapshots[iteration]]
        if lacks:
            raise UserError(
                f"{path}: step {iteration} lacks {len(lacks)} of the questions of --before, such as {lacks[0]!r}; "
                "give the policy of the same questions"
            )
        prompts = prompts_of(inputs.runs["before"])
        others = [id for id in inputs.ids if _differ(snapshots[iteration][id].prompt, prompts.get(id))]
        if others:
            raise UserError(
                f"{path}: step {iteration} is of another prompt than {inputs.runs['before'].file} for {len(others)} "
                f"questions, such as {others[0]!r}; give the policy of the same questions"
            )
        num_tags = len(snapshots[iteration][inputs.ids[0]].policy_N)
        if num_tags != len(inputs.tags):
            raise UserError(
                f"{path}: a policy of {num_tags} tags, --before has {len(inputs.tags)}; give that of its run"
            )


def _differ(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and one != other


def _check_policy_models(inputs: Inputs, path: Path) -> Iterator[str]:
    """Remarks where nothing tells whose policy it is. Raises UserError for that of another run than --before, --after.

    The lines name the model that the run began with. The model that it ended with is its export, where that is there.
    """
    assert inputs.policy is not None
    before, after = inputs.runs["before"], inputs.runs["after"]
    steps = inputs.policy["eval"]
    began = next((row.model for row in steps[min(steps)].values() if row.model is not None), None)
    if began is None:
        yield "The policy was written by an earlier version and does not say with which model its run began."
    elif began != _model(before):
        raise UserError(
            f"{path}: of a run that began with another model ({began[:12]}) than that of {before.file} "
            f"({_model(before)[:12]}); give the policy of the run between --before and --after"
        )
    export = checkpoint_folder(path.parent, max(steps)) / "hf"
    if not is_hf_folder(export):
        yield "Not checked: whether the policy's run ended with --after's model; its export is not beside it."
    elif (ended := model_fingerprint(export)) != _model(after):
        raise UserError(
            f"{path}: its run ended with another model ({ended[:12]}) than that of {after.file} "
            f"({_model(after)[:12]}); give the policy of the run between --before and --after"
        )


def _remarks(inputs: Inputs) -> Iterator[str]:
    before = inputs.runs["before"]
    unmarked = sum(len(prompts_of(run)) < len(run.questions) for run in inputs.runs.values())
    if unmarked:
        yield f"{unmarked} of {len(inputs.runs)} scored files lack marks of prompts (older version): compared by ids."
    asked = set(prompts_of(before).values())
    both = sum(row.prompt in asked for row in inputs.rewards.rows.values() if row.prompt is not None)
    if both:
        yield f"{both} of the rewarded questions have the prompt of a held-out one: g* was chosen on them too."
    if inputs.rewards.model != _model(before):
        yield "The rewards are of another model than --before, so g* was chosen on answers of that one."
    for role, run in inputs.runs.items():
        own, other = _settings(run), _settings(before)
        unlike = [
            f"{key} {own.get(key)} instead of {other.get(key)}" for key in _DRAWN if own.get(key) != other.get(key)
        ]
        if unlike and role not in ("before", "after"):
            yield f"{flag(role)} was generated with {', '.join(unlike)}: it does not compare with --before and --after."
