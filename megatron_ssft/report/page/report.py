"""The report: training runs and evaluations in, one HTML page and its pictures as PNG files out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_ssft.errors import UserError, reason_of
from megatron_ssft.formats.evaluation import EvaluationRecord, load_evaluation
from megatron_ssft.formats.files import write_durably
from megatron_ssft.formats.policy_evaluation import PolicyEvaluationRecord, load_policy_evaluation
from megatron_ssft.report.exhibits import Section, clean, join
from megatron_ssft.report.figures.evaluation import evaluation_section
from megatron_ssft.report.figures.matching import dynamics_section
from megatron_ssft.report.figures.policy import policy_section
from megatron_ssft.report.figures.policy_evaluation import add_evaluation
from megatron_ssft.report.figures.tags import tags_section
from megatron_ssft.report.figures.training import cost_section, training_section
from megatron_ssft.report.page.html import page
from megatron_ssft.report.page.summary import summary_section
from megatron_ssft.report.read.policy_runs import (
    PolicyRun,
    groups_of,
    is_policy_run,
    load_policy_runs,
)
from megatron_ssft.report.read.run_facts import RunFacts, load_facts

FOOTER = (
    "Tags are written <think1>, <think2>, ...; costs and losses are in nats. A matching, or configuration, is the set "
    "of edges between tags and sources chosen for one visit of a question. Learned matchings are those that have not "
    "lost their share in the last complete epoch. g* (equation 6) is the tag that they match to most sources. Sources "
    "are known to this report alone; the model never sees them."
)
POLICY_FOOTER = "Tags are written <think1>, <think2>, ...; rewards are shares of correct answers, losses are in nats."
"""Of a page on policies alone."""


def write_report(
    folders: Sequence[str | Path],
    output: str | Path,
    evaluation: str | Path | None = None,
    png_folder: str | Path | None = None,
    policy_evaluation: str | Path | None = None,
    groups: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write the report on the runs in `folders` to `output`, its pictures as PNG files to `png_folder`.

    Args:
        folders: of runs of megatron-ssft train and megatron-ssft gfpo, in any order.
        evaluation: the output folder of megatron-ssft evaluate.
        policy_evaluation: that of megatron-ssft evaluate-policy.
        groups: question's id -> its group, to show the policies' tags by; default: those of `policy_evaluation`.
        png_folder: by default `<output's name without its ending>_figures` beside the report.

    Returns:
        The files written, the page first. Equal input gives equal bytes.

    Raises:
        UserError: a folder is no run or no evaluation, a file of theirs is damaged, or the output cannot be written.
    """
    output = Path(output)
    png_folder = output.with_name(f"{output.stem}_figures") if png_folder is None else Path(png_folder)
    trained = [folder for folder in folders if is_policy_run(folder)]
    runs = load_facts([folder for folder in folders if folder not in trained])
    policies = load_policy_runs(trained, [facts.name for facts in runs])
    sections = build_sections(
        runs,
        load_evaluation(evaluation) if evaluation is not None else None,
        policies,
        load_policy_evaluation(policy_evaluation) if policy_evaluation is not None else None,
        groups,
    )
    count = len(runs) + len(policies)
    lead = f"{count} training run{'s' if count > 1 else ''}, read from {'their' if count > 1 else 'its'} logs."
    text = page(_title(runs, policies), lead, sections, FOOTER if runs else POLICY_FOOTER)
    exhibits = [exhibit for section in sections for exhibit in section.exhibits]
    paths = [output, *(png_folder / f"{exhibit.key}.png" for exhibit in exhibits)]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        png_folder.mkdir(parents=True, exist_ok=True)
        write_durably(output, text)
        for path, exhibit in zip(paths[1:], exhibits):
            path.write_bytes(exhibit.picture.png)
    except OSError as error:
        raise UserError(f"{error.filename or output}: {reason_of(error)}; give another --output") from error
    return paths


def _title(runs: Sequence[RunFacts], policies: Sequence[PolicyRun]) -> str:
    parts = [
        f"{what}: {join(clean(run.name) for run in some)}"
        for what, some in (("Set Supervised Fine-Tuning", runs), ("Forking policy", policies))
        if some
    ]
    return "; ".join(parts)


def build_sections(
    runs: Sequence[RunFacts],
    record: EvaluationRecord | None,
    policies: Sequence[PolicyRun] = (),
    policy_record: PolicyEvaluationRecord | None = None,
    groups: Mapping[str, str] | None = None,
) -> list[Section]:
    """All parts of the page, in reading order. A run looks the same in all of them; `groups` as in `write_report`."""
    known = [facts.name for facts in runs]
    known += [run["name"] for run in record["runs"] if run["name"] not in known] if record is not None else []
    sections = [summary_section(runs, record, policies, policy_record)]
    if runs:
        sections += [
            training_section(runs, known),
            dynamics_section(runs, known),
            tags_section(runs),
            cost_section(runs, known),
        ]
    if policies or policy_record is not None:
        groups = groups_of(policy_record) if groups is None else groups
        sections.append(policy_section(policies, groups, [*known, *(run.name for run in policies)]))
        if policy_record is not None:
            add_evaluation(sections[-1], policy_record)
    if record is not None:
        sections.append(evaluation_section(record, known))
    elif runs:
        sections.append(
            Section(
                "evaluation", "Generated answers", "No evaluation was given (--eval), so there are no pictures of it."
            )
        )
    return sections
