"""Findings for people, as a table, and for programs, as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from cat_ray.doctor.facts import Facts
from cat_ray.doctor.finding import Finding
from cat_ray.doctor.findings import passed

STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red"}


def findings_table(found: Sequence[Finding]) -> Table:
    """A row for each check; below what is wrong stands what to do."""
    table = Table("check", "", "found", show_lines=False)
    for finding in found:
        told = finding.found + (f"\n-> {finding.advice}" if finding.advice else "")
        style = STYLES[finding.verdict]
        table.add_row(finding.check, f"[{style}]{finding.verdict}[/{style}]", Text(told))
    return table


def to_json(facts: Facts, found: Sequence[Finding]) -> str:
    """The findings, and the facts they follow from; bytes, seconds, bytes per second."""
    content = {
        "passed": passed(found),
        "findings": [asdict(finding) for finding in found],
        "facts": asdict(facts),
    }
    return json.dumps(content, indent=2)
