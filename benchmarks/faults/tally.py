"""How often a fault was tried, and what was lost."""

from dataclasses import dataclass, field

__all__ = ["Tally"]


@dataclass
class Tally:
    """The trials of a fault.

    Attributes:
        fault: the fault, and what counts as surviving it.
        tried: the number of trials.
        lost: a description of each trial that was not survived.
    """

    fault: str
    tried: int = 0
    lost: list[str] = field(default_factory=list)

    def count(self, survived, what):
        """Count a trial."""
        self.tried += 1
        if not survived:
            self.lost.append(what)

    @property
    def row(self):
        """The row of the table."""
        return f"| {self.fault} | {self.tried} | {self.tried - len(self.lost)} | {len(self.lost)} |"
