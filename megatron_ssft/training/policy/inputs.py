"""What a policy learns from: questions, the rewards of their tags, stored completions. All of it checked first."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ssft.config import GFPOConfig, PolicyConfig
from megatron_ssft.data.jsonl import RowError, WrongRows
from megatron_ssft.data.prompt import encode_prompt
from megatron_ssft.errors import UserError
from megatron_ssft.inference.questions import read_questions
from megatron_ssft.inference.reward_table import RewardTable, read_rewards
from megatron_ssft.inference.rollouts import OWN_MODES, mark, read_rollouts, read_scored
from megatron_ssft.records import Assignment, QuestionBatch, QuestionVisit, TokenizedSet
from megatron_ssft.training.policy.draws import first_draws
from megatron_ssft.training.setup import Vocabulary


@dataclass(frozen=True)
class Completion:
    """One stored completion."""

    question: int
    """Position among the questions."""
    tag: int
    """0-based; 0 for a model without tags."""
    ids: np.ndarray
    """int32 [L], the stop token included."""
    reward: float
    """grpo: 1 if its answer is right, else 0."""


@dataclass(frozen=True)
class PolicyInputs:
    """Everything a run reads. Q questions, N tags, C completions."""

    questions: tuple[TokenizedSet, ...]
    """Prompts; without completions."""
    n_QN: np.ndarray
    """float64: samples under each tag; empty for grpo."""
    sum_QN: np.ndarray
    """float64: sum of their rewards."""
    completions: tuple[Completion, ...]
    """Those that the run uses, ordered by their number in `pool`."""
    tagged: bool
    """Whether completions follow a tag."""
    held_out: tuple[TokenizedSet, ...]
    """Prompts of --eval-data."""
    model: str | None
    """Fingerprint of the model that made the samples."""
    notes: tuple[str, ...]
    """Lines for the log: what was left out, what is unusual."""
    fingerprint: str
    """Digest of all of the above that a step depends on."""

    @property
    def reward_QN(self) -> np.ndarray:
        """Mean reward of each tag."""
        return self.sum_QN / self.n_QN

    def completion_batch(self, which: Sequence[int]) -> tuple[QuestionBatch, list[Assignment], list[list[int]]]:
        """Completions as a batch: questions with them as traces, their tags, and which completion each trace is."""
        by_question: dict[int, list[int]] = {}
        for number in which:
            by_question.setdefault(self.completions[number].question, []).append(number)
        sets, assignments = [], []
        for question, numbers in by_question.items():
            chosen = [self.completions[number] for number in numbers]
            sets.append(_with_completions(self.questions[question], [c.ids for c in chosen]))
            assignments.append(Assignment(tuple(c.tag for c in chosen)))
        visits = tuple(QuestionVisit(question, 0) for question in by_question)
        return QuestionBatch(visits, tuple(sets)), assignments, list(by_question.values())


def fork_batch(questions: Sequence[TokenizedSet], tag_ids: Sequence[Sequence[int]]) -> QuestionBatch:
    """Each question with the N tags themselves as its completions: what the policy chooses between."""
    ids = [np.asarray(tag, dtype=np.int32) for tag in tag_ids]
    visits = tuple(QuestionVisit(i, 0) for i in range(len(questions)))
    return QuestionBatch(visits, tuple(_with_completions(q, ids) for q in questions))


def _with_completions(question: TokenizedSet, ids: list[np.ndarray]) -> TokenizedSet:
    return TokenizedSet(question.id, question.file, question.line, question.prompt_ids, tuple(ids), (None,) * len(ids))


def read_inputs(config: GFPOConfig, vocabulary: Vocabulary, planned_iters: int) -> PolicyInputs:
    """Read and check everything. Raises UserError.

    `planned_iters`: steps that the run was started for, which decide how many completions it uses.
    """
    policy, seed = config.policy, config.training.seed
    notes: list[str] = []
    questions = _read_prompts(Path(policy.data), config, vocabulary)
    table = None
    if policy.rewards is not None:
        # grpo takes rewards from the scores; of this file it wants no more than the names of the others.
        num_tags = max(vocabulary.tags.num_tags, 1)
        table = read_rewards(Path(policy.rewards), num_tags) if policy.objective != "grpo" else _names_only(policy)
    grpo = policy.objective == "grpo"
    if not grpo:
        questions = _rewarded(questions, table, notes)
    wanted = _wants_completions(policy)
    rollouts = _companion(policy.rollouts, table and table.rollouts)
    scores = _companion(policy.scores, table and table.scores) if grpo else None
    if policy.anchor == "kl" and rollouts is None:
        raise UserError(
            f"{policy.rewards}: does not say where its completions are, and --anchor kl needs them; give --rollouts "
            "R.jsonl, or --anchor none"
        )
    completions: tuple[Completion, ...] = ()
    tagged, model = True, table and table.model
    if wanted and rollouts is not None:
        store = _Completions(rollouts, questions, vocabulary, config.data.seq_length)
        tagged = store.tagged
        if grpo:
            store.take_rewards(scores, rollouts)
            questions = store.only_informative(questions, policy, notes)
            chosen = range(len(store.places))
        else:
            chosen = _pool(policy, len(store.places), planned_iters, seed)
        model = store.model
        if table is not None and not grpo and table.model != model:
            raise UserError(f"{rollouts}: completions of another model than the rewards in {policy.rewards}")
        completions = store.read(chosen)
        notes += store.notes
    elif not grpo and policy.rescore_interval:
        notes.append(
            "how stale the rewards become is not measured: --rewards names no rollouts, and --rollouts is absent"
        )
    held_out = _read_prompts(Path(policy.eval_data), config, vocabulary) if policy.eval_data else ()
    n_QN, sum_QN = _counts(questions, table) if not grpo else (np.zeros((0, 0)),) * 2
    if table is not None and not grpo:
        share = sum(table.rows[q.id].truncated_N.sum() for q in questions) / n_QN.sum()
        if share > 0.1:
            notes.append(
                f"{share:.0%} of the samples ended at their token limit and count as wrong; consider a larger one"
            )
    return PolicyInputs(
        questions, n_QN, sum_QN, completions, tagged, held_out, model, tuple(notes),
        _fingerprint(questions, n_QN, sum_QN, completions),
    )  # fmt: skip


def _wants_completions(policy: PolicyConfig) -> bool:
    return policy.objective == "grpo" or policy.anchor == "kl" or policy.rescore_interval > 0


def _companion(given: str | None, named: Path | None) -> Path | None:
    """The file given by a flag, else the one that the rewards name, if it is there."""
    if given is not None:
        return Path(given)
    return named if named is not None and named.is_file() else None


def _names_only(policy: PolicyConfig) -> RewardTable:
    """The rewards file for what it says of other files: tags without samples do not matter. Raises UserError."""
    path = Path(policy.rewards)
    wrong, row = WrongRows(), {}
    try:
        with open(path, "rb") as file:
            from megatron_ssft.data.jsonl import parse_json

            row = parse_json(file.readline())
    except OSError as error:
        wrong.add_unreadable(path, error)
    except RowError as error:
        wrong.add(path, 1, error)
    wrong.raise_if_any()
    names = [row.get(name) if isinstance(row, dict) else None for name in ("rollouts", "scores")]
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}:1: does not say where rollouts and scores are; give --rollouts and --scores")
    return RewardTable(path, {}, str(row.get("model")), *(path.parent / name for name in names))


def _read_prompts(path: Path, config: GFPOConfig, vocabulary: Vocabulary) -> tuple[TokenizedSet, ...]:
    """Questions in token ids. Raises one UserError for all wrong rows."""
    wrong, sets = WrongRows(), []
    longest = max(map(len, vocabulary.tags.ids), default=0)
    for example in read_questions(path):
        try:
            ids = np.asarray(encode_prompt(example, vocabulary.tokenizer), dtype=np.int32)
            if not len(ids):
                raise RowError("the prompt has no tokens, so nothing precedes the tag")
            if len(ids) + longest > config.data.seq_length:
                raise RowError(f"the prompt is {len(ids)} tokens, --seq-length is {config.data.seq_length}")
            sets.append(TokenizedSet(example.id, example.file, example.line, ids, (), ()))
        except UserError as error:
            wrong.add(example.file, example.line, error)
    wrong.raise_if_any()
    return tuple(sets)


def _rewarded(questions: tuple[TokenizedSet, ...], table: RewardTable, notes: list[str]) -> tuple[TokenizedSet, ...]:
    """The questions that have rewards. Raises UserError for rewards of unknown questions."""
    known = {question.id for question in questions}
    for name, row in table.rows.items():
        if name not in known:
            raise UserError(
                f"{table.path}:{row.line}: id {name!r} is not in --data; give the questions it was made from"
            )
    kept = tuple(question for question in questions if question.id in table.rows)
    if len(kept) < len(questions):
        notes.append(f"{len(questions) - len(kept)} of {len(questions)} questions have no rewards and are left out")
    return kept


def _counts(questions: Sequence[TokenizedSet], table: RewardTable) -> tuple[np.ndarray, np.ndarray]:
    rows = [table.rows[question.id] for question in questions]
    return np.stack([row.n_N for row in rows]), np.stack([row.sum_N for row in rows])


def _pool(policy: PolicyConfig, count: int, planned_iters: int, seed: int) -> list[int]:
    """Which of the stored completions a run uses: those of its anchor, and those that are scored again."""
    anchored = 0 if policy.anchor == "none" else policy.anchor_completions * planned_iters
    rescored = policy.rescore_completions if policy.rescore_interval else 0
    return first_draws(count, max(anchored, rescored), seed, "completions")


class _Completions:
    """A rollout file: first its places and lengths, then the token ids of those that are wanted."""

    def __init__(self, path: Path, questions: Sequence[TokenizedSet], vocabulary: Vocabulary, seq_length: int) -> None:
        """Read what is needed to choose. Raises UserError."""
        self.path, self.vocabulary = path, vocabulary
        self.number = {question.id: i for i, question in enumerate(questions)}
        self.places: list[tuple[object, int, int]] = []  # key, question, tag
        self.rewards: list[float] = []
        self.notes: list[str] = []
        self.model: str | None = None
        self.tagged = True
        marks = [mark(question.prompt_ids.tolist()) for question in questions]
        without = longest = 0
        for rollout in read_rollouts(path):
            question = self.number.get(rollout.id)
            self.model, self.tagged = rollout.model, rollout.sampling["mode"] != "none"
            if question is None:
                continue
            if rollout.prompt not in (None, marks[question]):
                raise UserError(
                    f"{path}: id {rollout.id!r}: another prompt than the question in --data has; generate again"
                )
            if (rollout.tag is None) == self.tagged or not rollout.token_ids:
                without += 1
                continue
            tag = rollout.tag or 0
            if tag >= max(vocabulary.tags.num_tags, 1) or max(rollout.token_ids) >= vocabulary.size:
                raise UserError(f"{path}: id {rollout.id!r}: a tag or token that the model does not have")
            length = len(questions[question].prompt_ids) + len(vocabulary.tags.ids[tag] if self.tagged else ())
            longest = max(longest, length + len(rollout.token_ids))
            self.places.append((rollout.key, question, tag))
        if not self.places:
            raise UserError(f"{path}: holds no completion of the questions in --data")
        if longest > seq_length:
            raise UserError(f"{path}: its longest completion needs --seq-length {longest}, not {seq_length}")
        if without:
            self.notes.append(f"{without} completions without a tag or without tokens are left out")

    def take_rewards(self, scores: Path | None, rollouts: Path) -> None:
        """The reward of each completion from the scored file. Raises UserError."""
        if scores is None:
            raise UserError(f"{rollouts}: where are its scores? give --scores S.jsonl")
        scored = read_scored(scores)
        if any(row.sampling["mode"] in OWN_MODES for row in scored[:1]):
            raise UserError(
                f"{scores}: in mode {scored[0].sampling['mode']} the model wrote its tag itself, and what it wrote "
                "before is not stored; generate with --tags fixed, each or none"
            )
        if scored[0].model != self.model:
            raise UserError(f"{scores}: scores of another model than {rollouts}")
        reward = {row.key: float(row.correct) for row in scored}
        missing = [key for key, _, _ in self.places if key not in reward]
        if missing:
            raise UserError(f"{scores}: {len(missing)} completions of {rollouts} have no score; finish score.py first")
        self.rewards = [reward[key] for key, _, _ in self.places]

    def only_informative(
        self, questions: tuple[TokenizedSet, ...], policy: PolicyConfig, notes: list[str]
    ) -> tuple[TokenizedSet, ...]:
        """Questions whose completions differ in reward; the others have no advantage and, without a KL, no gradient."""
        groups: dict[int, set[float]] = {}
        counts: dict[int, int] = {}
        for (_, question, _), reward in zip(self.places, self.rewards):
            groups.setdefault(question, set()).add(reward)
            counts[question] = counts.get(question, 0) + 1
        if policy.kl_coef == 0:
            kept = [i for i, found in groups.items() if len(found) > 1]
            if len(kept) < len(questions):
                notes.append(
                    f"{len(questions) - len(kept)} of {len(questions)} questions have no completions, or all of one "
                    "reward: nothing to learn from them"
                )
        else:
            kept = list(groups)
        if not kept:
            raise UserError(f"{self.path}: every question has completions of one reward only: nothing to learn from")
        renumbered = {old: new for new, old in enumerate(sorted(kept))}
        both = [(p, r) for p, r in zip(self.places, self.rewards) if p[1] in renumbered]
        self.places = [(key, renumbered[question], tag) for (key, question, tag), _ in both]
        self.rewards = [reward for _, reward in both]
        return tuple(questions[old] for old in sorted(kept))

    def read(self, chosen: Sequence[int]) -> tuple[Completion, ...]:
        """The chosen ones, in that order."""
        wanted = {self.places[number][0]: place for place, number in enumerate(chosen)}
        found: dict[int, Completion] = {}
        for rollout in read_rollouts(self.path):
            place = wanted.get(rollout.key)
            if place is not None:
                _, question, tag = self.places[chosen[place]]
                reward = self.rewards[chosen[place]] if self.rewards else 0.0
                found[place] = Completion(question, tag, np.asarray(rollout.token_ids, dtype=np.int32), reward)
        return tuple(found[place] for place in range(len(chosen)))


def _fingerprint(
    questions: Sequence[TokenizedSet], n_QN: np.ndarray, sum_QN: np.ndarray, completions: Sequence[Completion]
) -> str:
    digest = hashlib.sha256()
    for question in questions:
        digest.update(f"{question.id}\0".encode() + question.prompt_ids.tobytes())
    digest.update(n_QN.tobytes() + sum_QN.tobytes())
    for completion in completions:
        digest.update(f"{completion.question} {completion.tag} {completion.reward}\0".encode())
        digest.update(completion.ids.tobytes())
    return digest.hexdigest()
