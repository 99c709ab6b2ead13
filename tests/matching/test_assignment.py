"""The matching is optimal, fair and reproducible; checked against every injection of traces into tags."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.matching import Matcher, assignment_gap, solve_assignment
from megatron_ssft.records import QuestionBatch, QuestionVisit, TokenizedSet


def injections(num_tags, num_traces):
    return np.array(list(itertools.permutations(range(num_tags), num_traces)))


def totals(cost, tags):
    """Extended-precision totals above the column minima, so that a common offset hides nothing."""
    cost = np.asarray(cost, dtype=np.longdouble)
    return (cost - cost.min(axis=0))[np.asarray(tags), np.arange(cost.shape[1])].sum(axis=-1)


def check_optimal(cost, seed=0):
    tags = solve_assignment(cost, seed=seed)
    num_tags, num_traces = cost.shape
    assert len(tags) == num_traces and len(set(tags)) == num_traces and set(tags) <= set(range(num_tags))
    assert all(type(tag) is int for tag in tags)
    best = totals(cost, injections(num_tags, num_traces)).min()
    assert totals(cost, tags) - best <= 1e-12 * best, (cost, tags)


SHAPES = [(n, m) for n in range(1, 7) for m in range(1, n + 1)]


@pytest.mark.parametrize("num_tags, num_traces", SHAPES)
def test_equals_brute_force(num_tags, num_traces):
    rng = np.random.default_rng([num_tags, num_traces])
    shape = (num_tags, num_traces)
    for seed in range(12):
        nll = rng.gamma(2.0, 1.0, shape)
        check_optimal(nll, seed)
        check_optimal(rng.integers(0, 3, shape), seed)  # ties
        check_optimal(1e-9 * nll + rng.normal(0, 5, num_traces), seed)  # nearly tied, each trace at its own level
        check_optimal(nll.astype(np.float32), seed)


@pytest.mark.parametrize("num_tags, num_traces", SHAPES)
def test_any_magnitude_is_exact(num_tags, num_traces):
    rng = np.random.default_rng([7, num_tags, num_traces])
    shape = (num_tags, num_traces)
    for seed in range(6):
        noise = rng.random(shape)
        for scale in (1e-300, 1e-30, 1e5, 1e6, 1e9, 1e150, 1e300):
            check_optimal(scale * noise, seed)
            check_optimal(-scale * noise, seed)
        check_optimal(1.7e308 * rng.uniform(-1, 1, shape), seed)
        check_optimal(10.0 ** rng.uniform(-12, 12, shape), seed)
        check_optimal(noise + 1e9 * rng.integers(0, 2, shape), seed)  # spread far beyond lap's 1e6
        check_optimal(noise + 1e12 * (np.arange(num_tags) == seed % num_tags)[:, None], seed)  # a tag to avoid
        check_optimal(noise + 1e8 * rng.random(num_traces), seed)  # a level of its own for each trace
        check_optimal(np.where(rng.random(shape) < 0.5, 1e15, noise), seed)  # small differences beside masks


def test_differences_of_opposite_huge_values_do_not_overflow():
    cost = np.array([[1.7e308, -1.7e308], [-1.7e308, 1.7e308], [0.0, 0.0]])
    assert solve_assignment(cost, seed=0) == (1, 0)


def test_memory_layout_does_not_matter():
    rng = np.random.default_rng(3)
    cost = rng.random((6, 4))
    expected = solve_assignment(cost, seed=5)
    wide = np.zeros((12, 8))
    wide[::2, 1::2] = cost
    read_only = cost.copy()
    read_only.flags.writeable = False
    for same in (wide[::2, 1::2], np.asfortranarray(cost), read_only, cost[::-1][::-1]):
        assert solve_assignment(same, seed=5) == expected
    assert np.array_equal(read_only, cost)


@pytest.mark.parametrize("draw", ["distinct", "tied", "identical columns"])
def test_permuting_the_traces_permutes_the_tags(draw):
    rng = np.random.default_rng(11)
    for seed in range(50):
        cost = rng.random((6, 5)) if draw == "distinct" else rng.integers(0, 2, (6, 5)).astype(float)
        if draw == "identical columns":
            cost[:, 3] = cost[:, 1]
        tags = solve_assignment(cost, seed=seed)
        order = rng.permutation(5)
        permuted = solve_assignment(cost[:, order], seed=seed)
        pairs = sorted((cost[:, j].tolist(), tags[j]) for j in range(5))
        assert sorted((cost[:, order[j]].tolist(), permuted[j]) for j in range(5)) == pairs


def test_permuting_the_tags_permutes_a_unique_optimum():
    rng = np.random.default_rng(12)
    for seed in range(50):
        cost, order = rng.random((6, 4)), rng.permutation(6)
        tags = solve_assignment(cost, seed=seed)
        assert tuple(order[list(solve_assignment(cost[order], seed=seed + 1))].tolist()) == tags


def test_equal_costs_favour_no_tag_and_no_pairing():
    draws = 1800
    for level in (0.0, 2.5):
        used = np.zeros((6, 4))
        for seed in range(draws):
            used[list(solve_assignment(np.full((6, 4), level), seed=seed)), range(4)] += 1
        deviation = np.sqrt(draws * (1 / 6) * (5 / 6))
        assert np.abs(used - draws / 6).max() < 4.5 * deviation, used


def test_partial_ties_are_broken_evenly():
    cost = np.ones((4, 2))
    cost[0] = 0.0  # both traces want tag 0, the loser is indifferent between the others
    wins = np.zeros((4, 2))
    for seed in range(1200):
        wins[list(solve_assignment(cost + [0.0, 1.0], seed=seed)), range(2)] += 1
    assert np.abs(wins[1:].sum(axis=1) - 400).max() < 90 and wins[0].sum() == 1200


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_what_is_not_finite(bad):
    cost = np.ones((4, 3))
    cost[2, 1] = bad
    with pytest.raises(ValueError, match="finite"):
        solve_assignment(cost, seed=0)
    with pytest.raises(ValueError, match="finite"):
        assignment_gap(cost)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (3, 0), (0, 0), (1, 2, 3)])
def test_refuses_wrong_shapes(shape):
    with pytest.raises(ValueError, match="shape"):
        solve_assignment(np.zeros(shape), seed=0)


@pytest.mark.parametrize("num_tags, num_traces", SHAPES)
def test_gap_is_the_mean_over_all_assignments_minus_the_least(num_tags, num_traces):
    rng = np.random.default_rng([9, num_tags, num_traces])
    for _ in range(5):
        cost = rng.normal(3, 2, (num_tags, num_traces))
        each = totals(cost, injections(num_tags, num_traces))
        assert assignment_gap(cost) == pytest.approx(float(each.mean() - each.min()), abs=1e-12)


def test_gap_is_never_negative():
    rng = np.random.default_rng(10)
    for _ in range(300):
        level = rng.normal(0, 1e3, 3)
        assert assignment_gap(np.tile(level, (6, 1))) == 0.0
        assert assignment_gap(np.tile(level, (6, 1)) * (1 + 1e-16 * rng.integers(-9, 9, (6, 3)))) >= 0.0
        assert assignment_gap(rng.normal(size=(1, 1))) == 0.0
        additive = rng.random((4, 1)) + rng.random(4)  # every assignment has the same total
        assert 0.0 <= assignment_gap(additive) < 1e-14


def question(name, num_traces, line=1):
    completions = tuple(np.array([sum(name.encode()), 7 * j % 11, j], dtype=np.int32) for j in range(num_traces))
    return TokenizedSet(name, "set.jsonl", line, np.arange(3, dtype=np.int32), completions, (None,) * num_traces)


def batch_of(*sets, epoch=0):
    return QuestionBatch(tuple(QuestionVisit(k, epoch) for k in range(len(sets))), tuple(sets))


def test_optimal_mode_solves_every_question():
    rng = np.random.default_rng(1)
    batch = batch_of(*(question(f"q{k}", 1 + k % 6) for k in range(12)))
    costs = [rng.random((6, s.num_traces)).astype(np.float32) for s in batch.sets]
    matcher = Matcher("optimal", 6, seed=1)
    assert matcher.needs_costs
    for cost, assignment in zip(costs, matcher.assign(batch, costs)):
        best = totals(cost, injections(*cost.shape)).min()
        assert totals(cost, assignment.tags) == pytest.approx(float(best), abs=1e-12)
        assert assignment.cost_NM.dtype == np.float64 and np.array_equal(assignment.cost_NM, cost)


def test_modes_without_costs():
    batch = batch_of(question("a", 3), question("b", 4))
    for mode in ("random", "fixed", "single"):
        assert not Matcher(mode, 4, 0).needs_costs
    fixed = Matcher("fixed", 4, 0).assign(batch, [None, None])
    assert [a.tags for a in fixed] == [(0, 1, 2), (0, 1, 2, 3)] and fixed[0].cost is None
    assert [a.tags for a in Matcher("single", 1, 0).assign(batch, [None, None])] == [(0,) * 3, (0,) * 4]
    cost = np.arange(12.0).reshape(4, 3)
    kept = Matcher("fixed", 4, 0).assign(batch, [cost, None])[0]
    assert kept.cost == cost[0, 0] + cost[1, 1] + cost[2, 2]


def test_random_mode_is_uniform_over_injections():
    matcher, seen = Matcher("random", 4, seed=3), {}
    for k in range(2400):
        (assignment,) = matcher.assign(batch_of(question(f"q{k}", 2)), [None])
        seen[assignment.tags] = seen.get(assignment.tags, 0) + 1
    assert len(seen) == 12 and max(abs(count - 200) for count in seen.values()) < 65


@pytest.mark.parametrize("mode", ["random", "optimal"])
def test_draws_depend_on_seed_epoch_and_question_only(mode):
    sets = [question(f"q{k}", 4) for k in range(20)]
    cost = np.zeros((6, 4))  # all tied: every outcome is a draw

    def tags(matcher, batch):
        return {s.id: a.tags for s, a in zip(batch.sets, matcher.assign(batch, [cost] * len(batch.sets)))}

    together = tags(Matcher(mode, 6, 1), batch_of(*sets))
    alone = [tags(Matcher(mode, 6, 1), batch_of(s)) for s in reversed(sets)]
    assert together == {k: v for each in alone for k, v in each.items()}
    assert len(set(together.values())) > 10
    assert tags(Matcher(mode, 6, 2), batch_of(*sets)) != together
    assert tags(Matcher(mode, 6, 1), batch_of(*sets, epoch=1)) != together


@pytest.mark.parametrize("mode", ["random", "optimal"])
def test_order_of_a_questions_traces_does_not_matter(mode):
    rng = np.random.default_rng(4)
    for k in range(30):
        example = question(f"q{k}", 5)
        cost = rng.integers(0, 2, (6, 5)).astype(float)
        cost[:, 2] = cost[:, 4]  # equal columns of different traces
        order = rng.permutation(5)
        shuffled = TokenizedSet(
            example.id,
            example.file,
            example.line,
            example.prompt_ids,
            tuple(example.completion_ids[j] for j in order),
            example.sources,
        )
        matcher = Matcher(mode, 6, seed=2)
        (tags,) = (a.tags for a in matcher.assign(batch_of(example), [cost]))
        (permuted,) = (a.tags for a in matcher.assign(batch_of(shuffled), [cost[:, order]]))
        assert permuted == tuple(tags[j] for j in order)


@pytest.mark.parametrize("mode", ["optimal", "random"])
def test_damaged_costs_name_the_question(mode):
    cost = np.ones((4, 3))
    cost[2, 1] = np.nan
    batch = batch_of(question("a", 3), question("b", 3, line=17))
    with pytest.raises(UserError) as caught:
        Matcher(mode, 4, 0).assign(batch, [np.ones((4, 3)), cost])
    assert str(caught.value) == (
        "set.jsonl:17: question 'b': the matching cost of trace 2 under tag 3 is not finite; "
        "the weights or the data are damaged"
    )


@pytest.mark.parametrize("mode", ["optimal", "random", "fixed"])
def test_more_traces_than_tags_is_refused(mode):
    with pytest.raises(UserError, match=r"^set.jsonl:9: question 'a' has 5 traces .* --max-traces 4$"):
        Matcher(mode, 4, 0).assign(batch_of(question("a", 5, line=9)), [None])


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="hungarian"):
        Matcher("hungarian", 4, 0)
