"""Rows of a CSV whose cells are not their own: the file's quotes are wrong, and csv reads it all the same.

A quote that is never closed merges rows where an inch mark closes it; a line break outside quotes parts one;
a comma outside quotes shifts its cells. What has one word in each row, such as an id, tells them from notes
that hold a table or a list."""

import itertools
import re
from collections.abc import Sequence

_TOO_MANY_FIELDS = "more fields than the header has columns (a comma outside quotes?)"
_OTHER_ROWS = "a cell contains other rows (an unclosed quote?)"
PART_OF_A_ROW = "seems to be a part of a row (a line break outside quotes?)"


class RowCheck:
    """Takes the rows of a file one after the other. `line_end`: what ends its lines; `needed`: the places of
    the columns that are used."""

    def __init__(self, header: Sequence[str], delimiter: str, line_end: str, needed: Sequence[int]):
        self.n_columns = len(header)
        self.needed = needed
        # A note's own row ends with the label; a note alone does not tell whether its row is whole
        self.least = max(needed) + 1 if len(needed) > 1 else len(header)
        self.is_spaced = any(name[:1] == " " for name in header)
        self.n_named = sum(bool(name.strip()) for name in header)
        self.delimiter = delimiter
        self.line_end = line_end
        self.first_cell = ""  # of the last sound row
        self.was_short = False

    def problem(self, fields: Sequence[str]) -> str:
        """ "", or what is wrong with a row."""
        if any(field.strip() for field in fields[self.n_columns :]):
            return _TOO_MANY_FIELDS
        if any(self._has_other_rows(fields, place) for place in range(len(fields))):
            return _OTHER_ROWS
        # Programs leave out empty cells at a row's end, so a short row alone says little
        first = fields[0].strip()
        is_short = len(fields) < self.least
        has_comma = not self.is_spaced and " " in first and any(field[:1] == " " for field in fields[1:])
        lacks_needed = not all("".join(fields[place : place + 1]).strip() for place in self.needed)
        is_unlike = not _is_alike(self.first_cell, first) or (
            (is_short or lacks_needed) and self.first_cell and not first
        )
        if len(fields) == 1 < self.n_named or (is_unlike and (is_short or self.was_short or has_comma)):
            return PART_OF_A_ROW
        self.first_cell = first or self.first_cell
        self.was_short = is_short
        return ""

    def _has_other_rows(self, fields: Sequence[str], place: int) -> bool:
        """Whether a cell goes on over the ends of rows, as behind a quote that is closed by an inch mark: its
        last line begins as rows do, and the line before ends as they do. A table within a note does not."""
        lines = [line for line in fields[place].split(self.line_end) if line.strip()]
        n_after = self.n_columns - 1 - place
        n_before = place + self.n_columns - len(fields)
        if len(lines) < 2 or self.n_columns == 1 or n_before < 0:
            return False
        *starts, text = lines[-1].split(self.delimiter)
        ends = lines[-2].rsplit(self.delimiter, n_after)[1:]
        if len(starts) != n_before or len(ends) != n_after:
            return False
        pairs = [*zip(fields[:place], starts), *zip(fields[:place:-1], ends[::-1])]
        n_told = sum(bool(ours.strip() and theirs.strip()) for ours, theirs in pairs)
        if not n_told or not all(_is_alike(ours, theirs) for ours, theirs in pairs):
            return False
        rest = lines[-2].rsplit(self.delimiter, n_after)[0]
        # "fever,cough" may be a part of a note
        if not starts:
            return rest.endswith((".", "!", "?")) or any(ours and ours == theirs for ours, theirs in pairs)
        # So may "38,5 mmol/l" and "2,000 units"
        if starts[-1][-1:].isdigit() and re.match(r"\d[\d.]*(?![\w-])", text):
            return False
        # And "2,aspirin" behind "1,metformin"
        if n_told > 1 and n_after and not _is_alike(starts[0], rest):
            return True
        whole = itertools.takewhile(self._is_whole, reversed(lines[:-1]))
        ids = [starts[0], *(line.split(self.delimiter)[0] for line in whole), fields[0]]
        return all(itertools.starmap(_follows, itertools.pairwise(ids)))

    def _is_whole(self, line: str) -> bool:
        return line.count(self.delimiter) == self.n_columns - 1 and f"{self.delimiter} " not in line


def _is_alike(ours: str, theirs: str) -> bool:
    """Whether two cells may be of one column. A text is alike if it has letters; an id or another single word
    if it has the same punctuation, and digits if the other has some."""
    if not (ours.strip() and theirs.strip()):
        return True
    if " " not in ours.strip() and ours[0].isupper() and theirs[0].islower():
        return False
    if " " in ours.strip() or ours.strip().endswith((".", "!", "?")):
        return theirs[0] != " " and bool(re.search(r"[^\W\d_]", theirs))
    marks, digits = ([re.sub(kind, "", cell) for cell in (ours, theirs)] for kind in (r"\w", r"\D"))
    return marks[0] == marks[1] and bool(digits[0]) == bool(digits[1])


def _follows(later: str, earlier: str) -> bool:
    """Whether an id may come soon after another: p12 after p9, or any of the same length that is long."""
    if 5 <= len(later) == len(earlier) and re.fullmatch(r"\S*\d\S*", later):
        return True
    numbers = [re.sub(r"\D", "", cell[:40]) for cell in (later, earlier)]
    same_letters = re.sub(r"\d", "", later) == re.sub(r"\d", "", earlier)
    return same_letters and all(numbers) and 0 < int(numbers[0]) - int(numbers[1]) < 10
