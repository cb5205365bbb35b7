"""Whether code writes to registers that tensor cores still read.

``wgmma`` works while the instructions behind it run. Where it takes a matrix from registers, these must not be written
until a ``wgmma.wait_group`` has waited for its group; what it computes is undefined otherwise (PTX ISA, section
"wgmma.wait_group").
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MOST_LEFT = 7  # groups that a wait_group can leave in flight
LABEL = re.compile(r"(\$?\w+):\s*")
STATEMENT = re.compile(r"(@!?%?\w+\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
READ = re.compile(r"\{[^}]*\},\s*\{([^}]*)\}")  # of a wgmma: its sums, and the registers of its left matrix
WRITTEN = re.compile(r"\{([^}]*)\}|(%[\w|%]+)")  # what most instructions name first

Registers = frozenset[str]
Groups = tuple[Registers, ...]  # what each group in flight reads, the oldest first; the last is not committed yet


@dataclass(frozen=True)
class Statement:
    """One instruction: whether a predicate guards it, its name, its operands."""

    text: str
    guarded: bool
    name: str
    operands: str

    def written(self) -> Registers:
        """The registers that it writes; those of a wgmma are sums, which have no part in this."""
        first = WRITTEN.match(self.operands)
        if first is None or self.name.startswith("wgmma"):
            return frozenset()
        return _names(first[1] or first[2].replace("|", ","))

    def read(self) -> Registers:
        """The registers that a wgmma reads while it is in flight."""
        found = READ.match(self.operands) if self.name.startswith("wgmma.mma_async") else None
        return _names(found[1]) if found else frozenset()

    def behind(self, groups: Groups) -> Groups:
        """What is in flight once it was issued."""
        if self.name.startswith("wgmma.mma_async"):
            return (*groups[:-1], groups[-1] | self.read())
        if self.name.startswith("wgmma.commit_group"):
            committed = (*groups, frozenset[str]())
            # The oldest are waited for together, whatever number is left.
            return committed if len(committed) <= MOST_LEFT + 2 else (committed[0] | committed[1], *committed[2:])
        if self.name.startswith("wgmma.wait_group"):
            return groups[-int(self.operands) - 1 :]
        return groups


def overwritten(ptx: str) -> list[str]:
    """The instructions that write a register while some wgmma may read it, on any way through the code.

    Among them are branches back to where the next wgmma of the kind begins: there nothing may be in flight. If what it
    reads is a copy, made in time, ptxas may leave the copy out, as it does with Triton 3.8.
    """
    if "wgmma" not in ptx:
        return []
    code, labels = _statements(ptx)
    found: set[int] = set()
    ways: list[tuple[int, Groups]] = [(0, (frozenset(),))]
    seen = set(ways)
    while ways:
        at, groups = ways.pop()
        here = code[at]
        # Blocks of inline assembly have labels of their own, which may have the same name.
        targets = labels[here.operands] if here.name.startswith("bra") else []
        follow = sorted(targets, key=lambda there: abs(there - at))[:1]
        again = any(step.read() for there in follow for step in code[there:at])
        if any(here.written() & group for group in groups) or (again and any(groups)):
            found.add(at)
        groups = here.behind(groups)
        if here.guarded or not here.name.startswith(("bra", "ret", "exit", "trap")):
            follow.append(at + 1)
        ways += {(there, groups) for there in follow if there < len(code)} - seen
        seen.update(ways)
    return [code[at].text for at in sorted(found)]


def _names(listed: str) -> Registers:
    return frozenset(name.strip() for name in listed.split(",") if name.strip())


def _statements(ptx: str) -> tuple[list[Statement], dict[str, list[int]]]:
    """The instructions, and the indices of those behind labels of each name."""
    code: list[Statement] = []
    labels: dict[str, list[int]] = {}
    for line in re.sub(r"//.*", "", ptx).splitlines():
        for part in line.split(";"):
            text = part.strip().lstrip("{} \t")  # no instruction begins with a brace, but inline assembly has blocks
            if label := LABEL.match(text):
                labels.setdefault(label[1], []).append(len(code))
                text = text[label.end() :]
            if statement := STATEMENT.fullmatch(text):
                code.append(Statement(text, statement[1] is not None, statement[2], statement[3]))
    return code, labels
