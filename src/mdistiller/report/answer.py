"""Answer of the page in one sentence: the best method, against which other, by how much, how surely."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mdistiller.report.runs import Row, RunRecord, find_baseline, teacher_names
from mdistiller.report.spread import MeanStd, welch_p
from mdistiller.runs.progress import counted
from mdistiller.types import Metric

Groups = Mapping[str, Sequence[RunRecord]]


@dataclass(frozen=True)
class Contest:
    """Rows whose results compare: the same student on the same test images.

    rows: the best first, those without a finished run last.
    teachers: metric of each teacher by its name, where it is known.
    alone: finished row of the student alone, of several that of the best row.
    """

    student: str
    test_set: str
    rows: list[Row]
    teachers: dict[str, float]
    alone: Row | None

    @property
    def rivals(self) -> list[Row]:
        """Rows of methods, and of students that were evaluated only."""
        return [row for row in self.rows if row.method != "none"]


@dataclass(frozen=True)
class Answer:
    """Result of a contest.

    best, against: labels of the best finished row and of the row that it is compared with: KD or else the
        next best of the same teacher, or the student alone.
    difference: best minus `against`. p: of Welch's two-sided test; None without one.
    closed: share of the gap between student alone and teacher that the best row closes, in percent.
    """

    sentence: str
    note: str
    best: str
    against: str | None
    difference: float | None
    p: float | None
    closed: float | None


def find_contests(groups: Groups, rows: Sequence[Row]) -> list[Contest]:
    """Returns the contests among rows, in order of appearance; a teacher's own run is in none."""
    by_label = {row.label: row for row in rows}
    keys: dict[tuple[str, str, str], list[str]] = {}
    for label, runs in groups.items():
        run = runs[0]
        key = run.student, str(run.config["student"].get("options")), run.test_set
        keys.setdefault(key, []).append(label)
    teachers = {runs[0].teacher for runs in groups.values()}
    names = teacher_names([runs[0] for runs in groups.values()])
    found = []
    for (student, _, test_set), labels in keys.items():
        own = sorted(
            (by_label[label] for label in labels), key=lambda row: (not row.finished, -row.last.mean)
        )
        taught = [row for row in own if groups[row.label][0].teacher is not None]
        if not taught and student in teachers and len(keys) > 1:
            continue
        metrics: dict[str, float] = {}
        for row in taught:
            if row.teacher is not None:
                metrics.setdefault(names[groups[row.label][0].taught_by], row.teacher)
        base = find_baseline(groups[taught[0].label][0], groups) if taught else None
        plain = [by_label[base]] if base is not None else [row for row in own if row.method == "none"]
        alone = plain[0] if plain and plain[0].finished else None
        found.append(Contest(student, test_set, own, metrics, alone))
    return found


def answer(contest: Contest, groups: Groups) -> Answer:
    """Returns the answer that a contest gives."""
    rivals, alone = contest.rivals, contest.alone
    best = rivals[0] if rivals else contest.rows[0]
    metric, run = groups[best.label][0].main_metric, groups[best.label][0]
    if not best.finished:
        so_far = f"{best.label[0].upper()}{best.label[1:]} is at {_value(best.last, 1, metric)} so far"
        sentence = f"{so_far}; no {'method' if rivals else 'run'} has finished."
        return Answer(sentence, _note(contest, groups, None), best.label, None, None, None, None)
    near = [row for row in rivals[1:] if groups[row.label][0].taught_by == run.taught_by]
    others = [row for row in near if row.finished]
    kd = next((row for row in others if row.method == "kd"), None)
    other = kd or (others[0] if others else alone if alone is not best else None)
    closed, teacher = None, best.teacher
    digits = 1 if other is None or abs(best.last.mean - other.last.mean) >= 0.1 else 2
    result = f"{best.label} {_value(best.last, digits, metric)}"
    if alone is not None and alone is not best and best.last.mean < alone.last.mean:
        other = alone
        result = (
            f"Nothing beats the student alone ({_value(alone.last, digits, metric)}): the best method, "
            f"{best.label}, reaches {_value(best.last, digits, metric)}"
        )
    if other is None and best.seeds == 1:
        result += " (one seed)"
    parts = [result[0].upper() + result[1:]]
    difference, p, tested = None, None, ""
    if other is not None:
        difference = best.last.mean - other.last.mean
        p = welch_p(best.values, other.values)
        tested = f"({_test(best, other, p)})"
        side = "above" if difference >= 0 else "below"
        whom = "it" if result.startswith("Nothing") else "the " * (other is alone) + other.label
        points = f"{abs(difference):.{digits}f} points" if metric.unit else metric.text(abs(difference))
        parts.append(f"{points} {side} {whom} {tested}")
    if teacher is not None and alone is not None and alone is not best and teacher > alone.last.mean:
        closed = 100 * (best.last.mean - alone.last.mean) / (teacher - alone.last.mean)
        if closed > 100:
            parts.append(f"and passes its teacher ({metric.text(teacher, '.1f')})")
        elif closed > 0:
            parts.append(f"closes {closed:.0f} % of the gap between student and teacher")
    elif teacher is not None:
        parts.append(f"while its teacher reaches {metric.text(teacher, '.1f')}")
    sentence = ", ".join(parts).replace(", and passes", " and passes") + "."
    note = _note(contest, groups, p)
    if result.startswith("Nothing"):
        hint = "Usual causes: too few epochs, a weak teacher, or a distillation weight that is too high."
        note = f"{note} {hint}".lstrip()
    against = None if other is None else other.label
    return Answer(sentence, note, best.label, against, difference, p, closed)


def _value(value: MeanStd, digits: int, metric: Metric) -> str:
    if value.std is not None and value.std < 0.05:
        digits = 2
    return metric.text(value, f".{digits}f")


def p_text(p: float) -> str:
    """Returns `p = 0.012`, or `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def _test(one: Row, other: Row, p: float | None) -> str:
    seeds = f"n = {one.seeds}" if one.seeds == other.seeds else f"n = {one.seeds} and {other.seeds}"
    if p is not None:
        return f"{p_text(p)}, {seeds}"
    return f"{seeds}, so no test" if min(one.seeds, other.seeds) < 2 else f"{seeds}, no spread, so no test"


def _note(contest: Contest, groups: Groups, p: float | None) -> str:
    parts, rivals = [], len(contest.rivals)
    if p is not None:
        doubt = "The difference may be chance. " * (p >= 0.05)
        chosen = f", not corrected for the choice of the best of {rivals}" if rivals > 2 else ""
        parts.append(
            f"{doubt}±: standard deviation over seeds. p: Welch's t-test over seeds, two-sided{chosen}."
        )
    elif min(row.seeds for row in contest.rows) < 2 and len(contest.rows) > 1:
        parts.append("One seed cannot show whether a difference is chance; three or more can.")
    late = sum(run.summary is None for row in contest.rows for run in groups[row.label])
    if late:
        parts.append(f"{counted(late, 'run')} under way.")
    return " ".join(parts)


def shown_rows(contests: Sequence[Contest], rows: Sequence[Row], most: int = 8) -> list[str]:
    """Returns the labels of at most `most` rows that charts show first.

    In turn from each contest: the best method, the student alone, KD, DKD, then the others by result.
    """
    queues = []
    for contest in contests:
        known = [contest.rows[0], contest.alone, *contest.rivals[:1]]
        known += [row for row in contest.rivals if row.method in ("kd", "dkd")]
        queues.append(list(dict.fromkeys(row.label for row in (*known, *contest.rows) if row is not None)))
    found: dict[str, None] = {}
    for i in range(max(map(len, queues), default=0)):
        found |= dict.fromkeys(queue[i] for queue in queues if i < len(queue))
    found |= dict.fromkeys(row.label for row in rows)
    chosen = set(list(found)[:most])
    return [row.label for row in rows if row.label in chosen]
