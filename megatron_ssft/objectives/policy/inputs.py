"""What a policy learns from: questions, the rewards of their tags, stored completions. All of it checked first."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ssft.config import GFPOConfig, PolicyConfig
from megatron_ssft.errors import UserError
from megatron_ssft.formats.rewards import RewardSource, RewardTable, read_rewards, read_source, without_signal
from megatron_ssft.formats.rollouts import mark
from megatron_ssft.hf.fingerprints import model_fingerprint
from megatron_ssft.hf.folder import is_hf_folder
from megatron_ssft.objectives.formulas.forking_policy import has_signal
from megatron_ssft.objectives.policy.completions import Completion, StoredCompletions
from megatron_ssft.objectives.policy.draws import first_draws
from megatron_ssft.objectives.policy.prompts import read_prompts
from megatron_ssft.records import Assignment, QuestionBatch, QuestionVisit, TokenizedSet
from megatron_ssft.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class PolicyInputs:
    """Everything a run reads. Q questions, N tags, C completions."""

    questions: tuple[TokenizedSet, ...]
    """Prompts; without completions."""
    n_QN: np.ndarray
    """float64: samples under each tag; empty for grpo."""
    sum_QN: np.ndarray
    """float64: sum of their rewards."""
    samples_Q: np.ndarray
    """float64: samples that a question's rewards come from."""
    truncated_Q: np.ndarray
    """float64: how many of them ended at their token limit."""
    completions: tuple[Completion, ...]
    """Those that the run uses, in random order."""
    rescored: int
    """How many of them, from the first, are scored again to see how the model drifts. The anchor holds others fast, as
    long as there are others."""
    tagged: bool
    """Whether completions follow a tag."""
    held_out: tuple[TokenizedSet, ...]
    """Prompts of --eval-data."""
    model: str | None
    """Fingerprint of the model that made the samples."""
    notes: tuple[str, ...]
    """Lines for the log: what was left out, what is unusual."""
    fingerprint: str
    """Digest of all of the above that a step depends on, and of the seed."""

    @property
    def anchors(self) -> range:
        """Completions for the anchor: those that are not scored again, or all where there are no others."""
        return range(self.rescored if self.rescored < len(self.completions) else 0, len(self.completions))

    @property
    def reward_QN(self) -> np.ndarray:
        """Mean reward of each tag."""
        return self.sum_QN / self.n_QN

    def truncated_share(self, chosen: Sequence[int]) -> float:
        """Share of the samples behind these questions' rewards that ended at their token limit."""
        which = list(chosen)
        return float(self.truncated_Q[which].sum() / self.samples_Q[which].sum())

    def completion_batch(self, which: Sequence[int]) -> tuple[QuestionBatch, list[Assignment], list[list[int]]]:
        """Completions as a batch: questions with them as traces, their tags, and which completion each trace is."""
        by_question: dict[int, list[int]] = {}
        for number in which:
            by_question.setdefault(self.completions[number].question, []).append(number)
        sets, assignments = [], []
        for question, numbers in by_question.items():
            completions = [self.completions[number] for number in numbers]
            sets.append(_with_completions(self.questions[question], [c.ids for c in completions]))
            assignments.append(Assignment(tuple(c.tag for c in completions)))
        visits = tuple(QuestionVisit(question, 0) for question in by_question)
        return QuestionBatch(visits, tuple(sets)), assignments, list(by_question.values())


def fork_batch(questions: Sequence[TokenizedSet], tag_ids: Sequence[Sequence[int]]) -> QuestionBatch:
    """Each question with the N tags themselves as its completions: what the policy chooses between."""
    ids = [np.asarray(tag, dtype=np.int32) for tag in tag_ids]
    visits = tuple(QuestionVisit(i, 0) for i in range(len(questions)))
    return QuestionBatch(visits, tuple(_with_completions(q, ids) for q in questions))


def _with_completions(question: TokenizedSet, ids: list[np.ndarray]) -> TokenizedSet:
    return TokenizedSet(question.id, question.file, question.line, question.prompt_ids, tuple(ids), (None,) * len(ids))


@dataclass(frozen=True)
class _Lesson:
    """What an objective takes from its files; fields as in PolicyInputs."""

    questions: tuple[TokenizedSet, ...]
    n_QN: np.ndarray
    sum_QN: np.ndarray
    samples_Q: np.ndarray
    truncated_Q: np.ndarray
    completions: tuple[Completion, ...]
    tagged: bool
    model: str


def read_inputs(config: GFPOConfig, vocabulary: Vocabulary, planned_iters: int) -> PolicyInputs:
    """Read and check everything. Raises UserError.

    `planned_iters`: steps that the run was started for, which decide how many completions it uses.
    """
    policy, seed = config.policy, config.run.training.seed
    notes: list[str] = []
    prompts = read_prompts(Path(policy.data), config, vocabulary, notes)
    held_out: tuple[TokenizedSet, ...] = ()
    if policy.eval_data is not None:
        remarks: list[str] = []
        held_out = read_prompts(Path(policy.eval_data), config, vocabulary, remarks)
        notes += [f"--eval-data: {remark}" for remark in remarks]
    if policy.objective == "grpo":
        lesson = _for_tokens(config, vocabulary, prompts, notes)
    else:
        lesson = _for_tags(config, vocabulary, prompts, planned_iters, notes)
    trained = {question.prompt_ids.tobytes() for question in lesson.questions}
    both = sum(question.prompt_ids.tobytes() in trained for question in held_out)
    if both:
        notes.append(f"{both} of {len(held_out)} questions of --eval-data are trained on")
    return PolicyInputs(
        questions=lesson.questions,
        n_QN=lesson.n_QN,
        sum_QN=lesson.sum_QN,
        samples_Q=lesson.samples_Q,
        truncated_Q=lesson.truncated_Q,
        completions=lesson.completions,
        rescored=min(policy.rescore_completions, len(lesson.completions)) if policy.rescore_interval else 0,
        tagged=lesson.tagged,
        held_out=held_out,
        model=lesson.model,
        notes=tuple(notes),
        fingerprint=_fingerprint(lesson, seed),
    )


# -- gfpo: rewards of tags -------------------------------------------------------------------------------------------


def _for_tags(
    config: GFPOConfig,
    vocabulary: Vocabulary,
    prompts: tuple[TokenizedSet, ...],
    planned_iters: int,
    notes: list[str],
) -> _Lesson:
    """Rewards of every question and tag, and completions for the anchor and for rescoring. Raises UserError."""
    policy = config.policy
    assert policy.rewards is not None, "refused by the configuration"
    table = read_rewards(Path(policy.rewards), vocabulary.tags.num_tags)
    questions = _rewarded(prompts, table, notes)
    rows = [table.rows[question.id] for question in questions]
    n_QN, sum_QN = np.stack([row.n_N for row in rows]), np.stack([row.sum_N for row in rows])
    samples_Q, truncated_Q = n_QN.sum(axis=1), np.array([row.truncated_N.sum() for row in rows])
    _account_truncated(table.path, samples_Q, truncated_Q, config.run.tokenizer.max_truncated_share, notes)
    unjudged = int(sum(row.unjudged_N.sum() for row in rows))
    if unjudged:
        notes.append(f"{unjudged} of {int(samples_Q.sum())} samples got no verdict, and count as not correct")
    signal = int(has_signal(sum_QN / n_QN).sum())
    if not signal:
        raise UserError(without_signal(table.path, len(questions)))
    if signal < len(questions):
        notes.append(f"{len(questions) - signal} of {len(questions)} questions have the same reward under every tag")
    completions: tuple[Completion, ...] = ()
    path = _file_to_watch(policy, table, notes)
    if path is not None:
        store = StoredCompletions(path, questions, vocabulary, config.run.tokenizer.seq_length)
        if not store.tagged:
            raise UserError(f"{path}: completions without tags, of which there is nothing to choose; --tags each has")
        _check_store(store, table, notes)
        places = [store.places[i] for i in _pool(policy, len(store.places), planned_iters, config.run.training.seed)]
        completions = tuple(Completion(p.question, p.tag, ids, 0.0) for p, ids in zip(places, store.token_ids(places)))
    return _Lesson(questions, n_QN, sum_QN, samples_Q, truncated_Q, completions, True, table.model)


def _rewarded(questions: tuple[TokenizedSet, ...], table: RewardTable, notes: list[str]) -> tuple[TokenizedSet, ...]:
    """The questions that have rewards. Raises UserError for rewards of unknown questions."""
    ids = {question.id for question in questions}
    unknown = [name for name in table.rows if name not in ids]
    if unknown:
        raise UserError(
            f"{table.path}:{table.rows[unknown[0]].line}: id {unknown[0]!r} is not in --data, as {len(unknown)} of "
            f"{len(table.rows)}; give the questions that the rewards were made from"
        )
    rewarded = tuple(question for question in questions if question.id in table.rows)
    _check_prompts(rewarded, table, notes)
    if len(rewarded) < len(questions):
        notes.append(f"{len(questions) - len(rewarded)} of {len(questions)} questions have no rewards and are left out")
    return rewarded


def _check_prompts(questions: tuple[TokenizedSet, ...], table: RewardTable, notes: list[str]) -> None:
    """Raise UserError for rewards of other questions under the same ids; note where the rewards do not say."""
    marked = [(q, table.rows[q.id]) for q in questions if table.rows[q.id].prompt is not None]
    others = [(q, row) for q, row in marked if row.prompt != mark(q.prompt_ids.tolist())]
    if others:
        question, row = others[0]
        raise UserError(
            f"{table.path}:{row.line}: id {question.id!r} was measured with another prompt than {question.file}:"
            f"{question.line} gives, as {len(others)} of {len(questions)}; give the questions that the rewards were "
            "made from, and the same tokenizer and chat template"
        )
    if len(marked) < len(questions):
        notes.append(
            f"{table.path}: {len(questions) - len(marked)} of {len(questions)} rewards were written by an earlier "
            "version and do not say with which prompt they were measured: that the questions are the same is not "
            "checked. Generate and score again to have it checked"
        )


def _file_to_watch(policy: PolicyConfig, table: RewardTable, notes: list[str]) -> Path | None:
    """The rollout file, if the run has a use for it. Raises UserError if it cannot do without one that is not there."""
    if policy.anchor == "none" and policy.rescore_interval == 0:
        return None
    path, lacks = _companion(policy.rollouts, table, "rollouts")
    if path is not None:
        return path
    if policy.anchor == "kl":
        raise UserError(f"{lacks}, and --anchor kl needs them; give --rollouts R.jsonl, or --anchor none")
    if policy.on_stale_rewards == "stop":
        raise UserError(f"{lacks}, and --on-stale-rewards stop needs them; give --rollouts R.jsonl")
    notes.append(f"{lacks}: how stale the rewards become is not measured; --rollouts R.jsonl would do it")
    return None


def _pool(policy: PolicyConfig, count: int, planned_iters: int, seed: int) -> list[int]:
    """Which of the stored completions a run uses: those that are scored again, and those of its anchor."""
    anchored = 0 if policy.anchor == "none" else (policy.anchor_completions or 0) * planned_iters
    rescored = policy.rescore_completions if policy.rescore_interval else 0
    return first_draws(count, rescored + anchored, seed, "completions")


# -- grpo: rewards of completions ------------------------------------------------------------------------------------


def _for_tokens(
    config: GFPOConfig, vocabulary: Vocabulary, prompts: tuple[TokenizedSet, ...], notes: list[str]
) -> _Lesson:
    """All scored completions of the questions that there is something to learn from. Raises UserError."""
    policy = config.policy
    source = read_source(Path(policy.rewards)) if policy.rewards is not None else None
    files = []
    for name in ("rollouts", "scores"):
        path, lacks = _companion(getattr(policy, name), source, name)
        if path is None:
            raise UserError(f"{lacks}; give --{name}")
        files.append(path)
    store = StoredCompletions(files[0], prompts, vocabulary, config.run.tokenizer.seq_length)
    _check_store(store, source, notes)
    reward_C = store.rewards(files[1])
    question_C = np.array([place.question for place in store.places])
    numbers = _instructive(question_C, reward_C, policy, files[1])
    if len(numbers) < len(prompts):
        others = "" if policy.kl_coef else ", or all of them with the same reward,"
        notes.append(
            f"{len(prompts) - len(numbers)} of {len(prompts)} questions without completions{others} are left out"
        )
    renumbered = {old: new for new, old in enumerate(numbers)}
    of_kept = np.flatnonzero(np.isin(question_C, numbers))
    order = of_kept[first_draws(len(of_kept), len(of_kept), config.run.training.seed, "completions")]
    places = [store.places[i] for i in order]
    completions = tuple(
        Completion(renumbered[place.question], place.tag, ids, reward, place in store.truncated)
        for place, ids, reward in zip(places, store.token_ids(places), reward_C[order].tolist())
    )
    samples_Q = np.bincount([c.question for c in completions], minlength=len(numbers)).astype(np.float64)
    weights = [float(c.truncated) for c in completions]
    truncated_Q = np.bincount([c.question for c in completions], weights, minlength=len(numbers))
    _account_truncated(store.path, samples_Q, truncated_Q, config.run.tokenizer.max_truncated_share, notes)
    questions, empty = tuple(prompts[i] for i in numbers), np.zeros((0, 0))
    return _Lesson(questions, empty, empty, samples_Q, truncated_Q, completions, store.tagged, store.model)


def _instructive(question_C: np.ndarray, reward_C: np.ndarray, policy: PolicyConfig, scores: Path) -> list[int]:
    """Questions whose completions differ in reward: the others have no advantage, so no gradient but that of a KL.

    With a KL, all questions that have completions. `question_C` ascends. Raises UserError where none differs.
    """
    starts = np.flatnonzero(np.diff(question_C, prepend=-1))
    present = question_C[starts]
    differ = present[np.maximum.reduceat(reward_C, starts) > np.minimum.reduceat(reward_C, starts)]
    if not len(differ):
        raise UserError(f"{scores}: every question has completions of one reward only, so there is nothing to learn")
    return (present if policy.kl_coef else differ).tolist()


# -- both ------------------------------------------------------------------------------------------------------------


def _companion(given: str | None, source: RewardSource | None, name: str) -> tuple[Path | None, str]:
    """The file given by a flag, else the one that the rewards name, if it is there; else what they lack."""
    if given is not None:
        return Path(given), ""
    assert source is not None, "the configuration asks for --rewards, or for both files"
    named = getattr(source, name)
    if named is None:
        return None, f"{source.path}: does not say where its {name} are"
    return (named, "") if named.is_file() else (None, f"{source.path}: names {named} as its {name}, which is gone")


def _check_store(store: StoredCompletions, source: RewardSource | None, notes: list[str]) -> None:
    """Raise UserError where completions and rewards are of two models."""
    if source is not None and source.model != store.model:
        raise UserError(
            f"{store.path}: completions of another model ({store.model[:12]}) than the rewards in {source.path} "
            f"({source.model[:12]}); give the file that the rewards were counted in"
        )
    if store.unmarked:
        notes.append(
            f"{store.path}: {store.unmarked} completions were written by an earlier version and do not say from which "
            "prompt they were made: that the questions are the same is not checked"
        )
    if store.left_out:
        total = store.left_out + len(store.places)
        share = store.left_out / total
        notes.append(f"{store.left_out} of {total} completions without tokens ({share:.1%}) are left out")


def _account_truncated(
    path: Path, samples_Q: np.ndarray, truncated_Q: np.ndarray, most: float, notes: list[str]
) -> None:
    """Say how many samples ended at their token limit. Raises UserError where it is a larger share than `most`."""
    cut, total = int(truncated_Q.sum()), int(samples_Q.sum())
    if cut > most * total:
        raise UserError(
            f"{path}: {cut} of {total} samples ({cut / total:.1%}) ended at their token limit, more than "
            f"--max-truncated-share {most:g} allows; generate with more --max-new-tokens, or give a larger share"
        )
    if cut:
        notes.append(f"{cut / total:.0%} of the samples ended at their token limit ({cut} of {total})")


def _fingerprint(lesson: _Lesson, seed: int) -> str:
    digest = hashlib.sha256(f"{seed} {lesson.tagged} {lesson.n_QN.shape}".encode())
    for question in lesson.questions:
        digest.update(f"\0{question.id!r} {len(question.prompt_ids)} ".encode() + question.prompt_ids.tobytes())
    digest.update(lesson.n_QN.tobytes() + lesson.sum_QN.tobytes())
    for c in lesson.completions:
        digest.update(f"\0{c.question} {c.tag} {c.reward} {len(c.ids)} ".encode() + c.ids.tobytes())
    return digest.hexdigest()


def check_rewards_model(policy: PolicyConfig, export: Path, model: str | None) -> str | None:
    """Refuse rewards of another model than the run starts from.

    Args:
        export: the Hugging Face folder of the weights that it starts from, where there is one.
        model: fingerprint of the model that made the samples.

    Returns:
        A remark where nothing tells: the run has no export beside its weights.

    Raises:
        UserError: they are of another model.
    """
    if model is None or not is_hf_folder(export):
        return "no exported model beside the weights: whether the rewards are theirs is not checked"
    fingerprint = model_fingerprint(export)
    if fingerprint != model:
        raise UserError(
            f"{policy.rewards or policy.scores}: measured under another model ({model[:12]}) than "
            f"{export} ({fingerprint[:12]}); generate and score with this one"
        )
    return None
