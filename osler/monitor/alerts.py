"""Alerts: they report what is wrong with a run before a person would see it in the curves.

The rules (``rules.py``) read each line of ``metrics.jsonl`` as it is written. An alert is repeated after a pause, and each pause
is twice as long as the one before. Alerts depend on the lines alone, so a resumed run replays the file (``replay``), and resume
is exact without a checkpoint. Torch-free.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from osler.monitor.history import History, RunSettings
from osler.monitor.rules import RULES, RULES_OF_THE_END, Rule
from osler.records.jsonl import read_metrics

PAUSE = 100  # lines before an alert is repeated for the first time


@dataclass(frozen=True)
class Alert:
    """One thing that a person should know now."""

    step: int
    name: str
    severity: str  # warning or critical
    message: str


class Alerter:
    """Reads a run's lines one by one and returns the alerts that each raises."""

    def __init__(self, settings: RunSettings) -> None:
        self.history = History(settings)
        self.said: dict[str, tuple[int, int]] = {}  # name -> line from which the alert may be repeated, and the next pause
        self.firing: dict[Rule, list[Alert]] = {}  # each rule's alerts in the newest line with its metric

    def observe(self, step: int, tokens: float, metrics: Mapping[str, float]) -> list[Alert]:
        """Take in the next line and return its alerts."""
        self.history.add(step, tokens, metrics)
        news: list[Alert] = []
        for rule in RULES:
            if self.history.has(rule.metric):
                self.firing[rule] = self._found(rule)
                news += filter(self._is_news, self.firing[rule])
        return news

    def _found(self, rule: Rule) -> list[Alert]:
        return [Alert(self.history.step, rule.name, rule.severity, message) for message in rule.find(self.history)]

    def _is_news(self, alert: Alert) -> bool:
        again, pause = self.said.get(alert.name, (0, PAUSE))
        if self.history.lines < again:
            return False
        self.said[alert.name] = (self.history.lines + pause, 2 * pause)
        return True

    def unresolved(self) -> list[Alert]:
        """Return the alerts that still hold at the end of the run, each name once, the gravest first."""
        firing = [alert for alerts in self.firing.values() for alert in alerts]
        if not any(alert.name == "learning-rate" for alert in firing):  # learning-rate says the same
            firing += [alert for rule in RULES_OF_THE_END for alert in self._found(rule)]
        firing.sort(key=lambda alert: alert.severity != "critical")
        return list({alert.name: alert for alert in reversed(firing)}.values())[::-1]


def replay(settings: RunSettings, path: Path) -> Alerter:
    """Return an alerter that has seen the lines of a metrics file. The process that wrote them raised their alerts."""
    alerter = Alerter(settings)
    for line in read_metrics(path):
        alerter.observe(line.step, line.tokens, line.values)
    return alerter
