"""From facts to findings: what is right, what is wrong, and what to do about it. Pure."""

from collections.abc import Iterable

from cat_ray.doctor import network_findings, node_findings
from cat_ray.doctor.facts import Facts
from cat_ray.doctor.finding import Finding, answering
from cat_ray.doctor.storage_findings import storage


def findings(facts: Facts) -> tuple[Finding, ...]:
    """All findings, in the order in which a cluster is best put right."""
    checks = (
        node_findings.answers,
        node_findings.versions,
        node_findings.gpus,
        node_findings.tools,
        node_findings.shared_memory,
        node_findings.staging,
        node_findings.ray_temp,
        node_findings.open_files,
        network_findings.clocks,
        network_findings.ports,
        network_findings.all_reduce,
    )
    if not answering(facts):
        return (node_findings.answers(facts),)
    return (*(check(facts) for check in checks), *storage(facts.places))


def passed(found: Iterable[Finding]) -> bool:
    """Whether nothing failed; warnings are no failures."""
    return all(finding.verdict != "fail" for finding in found)
