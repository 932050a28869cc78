"""Alerts: what is wrong with a run, before a person would have seen it in the curves.

The rules (``rules.py``) read each line of ``metrics.jsonl`` as it is written. An alert is repeated after a pause, each longer
than the one before, or when it has become twice as bad. Resume is exact without a checkpoint: alerts are a function of the lines,
so a run that goes on replays the file (``replay``). Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from osler.monitor.history import History, RunSettings
from osler.monitor.policy_rules import POLICY_RULES
from osler.monitor.rules import RULES, Finding, ended_badly
from osler.records.jsonl import read_metrics

PAUSE, MUCH_WORSE = 100, 2.0  # lines of silence about the same thing at first; how much worse breaks it


@dataclass(frozen=True)
class Alert:
    """One thing that a person should know now."""

    step: int
    name: str
    severity: str  # warning or critical
    message: str

    @property
    def in_words(self) -> str:
        """The alert as a line, with its severity."""
        return f"{self.severity.capitalize()}: step {self.step}: {self.message}"


class Alerter:
    """Reads a run's lines one by one and returns the alerts that each raises."""

    def __init__(self, settings: RunSettings) -> None:
        self.history = History(settings)
        self.said: dict[str, tuple[int, int, float]] = {}  # name -> line from which it may be said again, pause, badness
        self.firing: dict[int, list[Alert]] = {}  # number of a rule -> what it found in the newest line with its metric

    def observe(self, step: int, tokens: float, metrics: Mapping[str, float]) -> list[Alert]:
        """Take in the next line and return its alerts."""
        past = self.history
        past.add(step, tokens, metrics)
        news = []
        for number, (metric, rule) in enumerate((*RULES, *POLICY_RULES)):
            if not past.has(metric):
                continue
            found = [(finding, Alert(step, finding.name, finding.severity, finding.message)) for finding in rule(past)]
            self.firing[number] = [alert for _, alert in found]
            news += [alert for finding, alert in found if self._is_news(finding)]
        return news

    def unresolved(self) -> list[Alert]:
        """Return what still holds at the end of the run, each name once, the gravest first."""
        past, firing = self.history, [alert for alerts in self.firing.values() for alert in alerts]
        if not any(alert.name == "learning-rate" for alert in firing):  # which says the same
            firing += [Alert(past.step, finding.name, finding.severity, finding.message) for finding in ended_badly(past)]
        firing.sort(key=lambda alert: alert.severity != "critical")
        return list({alert.name: alert for alert in reversed(firing)}.values())[::-1]

    def _is_news(self, finding: Finding) -> bool:
        again, pause, badness = self.said.get(finding.name, (0, 0, 0.0))
        if self.history.lines < again and finding.badness < MUCH_WORSE * badness:
            return False
        pause = 2 * pause if pause else PAUSE
        self.said[finding.name] = (self.history.lines + pause, pause, max(badness, finding.badness))
        return True


def replay(settings: RunSettings, path: Path) -> Alerter:
    """Return an alerter that has seen the lines of a metrics file; their alerts were given by the process that wrote them."""
    alerter = Alerter(settings)
    for line in read_metrics(path):
        alerter.observe(line.step, line.tokens, line.values)
    return alerter
