"""Text that comes in cuts, taken from its beginning: what is decided does not depend on the cuts."""

import re

SPACE = " \t\r\n"


class Scanner:
    """The text that has come and was not taken.

    Methods that may have to wait for more text return None then; once the text is final they never do.

    Attributes:
      text: what has come; more is added by its owner.
      is_final: nothing more will come.
    """

    def __init__(self):
        self.text = ""
        self.is_final = False
        self._searched = 0

    def take(self, count: int) -> str:
        """Takes and returns `count` characters."""
        taken, self.text, self._searched = self.text[:count], self.text[count:], 0
        return taken

    def space(self) -> str:
        """Returns the white space that the text begins with."""
        return self.text[: len(self.text) - len(self.text.lstrip(SPACE))]

    def skip_space(self) -> bool:
        """Takes the white space that the text begins with; returns whether there is anything after it."""
        self.take(len(self.space()))
        return bool(self.text)

    def starts_with(self, *markers: str | None, after: int = 0) -> str | bool | None:
        """Returns which marker stands after the first `after` characters, False if none does."""
        rest, given = self.text[after:], list(filter(None, markers))
        for marker in given:
            if rest.startswith(marker):
                return marker
        may_come = not self.is_final and any(marker.startswith(rest) for marker in given)
        return None if may_come else False

    def take_after_space(self, marker: str) -> bool | None:
        """Takes white space and `marker`, or nothing; returns whether the marker was there."""
        space = self.space()
        found = self.starts_with(marker, after=len(space))
        if found:
            self.take(len(space) + len(marker))
            return True
        return found

    def until(self, *markers: str | None, hold: str = "") -> tuple[str, str | None]:
        """Takes what comes before the first of some markers.

        Args:
          *markers: what to stop at, and to leave.
          hold: characters that are dropped before a marker and at the end of the text.

        Returns:
          The text, and the marker that comes next; None for no marker yet.
        """
        given = list(filter(None, markers))
        places = [(place, marker) for marker in given if (place := self.text.find(marker)) >= 0]
        if places:
            place, marker = min(places)
            return self.take(place).rstrip(hold), marker
        if self.is_final:
            return self.take(len(self.text)).rstrip(hold), None
        return self.take(len(self._certain(given).rstrip(hold))), None

    def _certain(self, markers):
        longest = max(map(len, markers), default=1) - 1
        for count in range(min(longest, len(self.text)), 0, -1):
            tail = self.text[-count:]
            if any(marker.startswith(tail) for marker in markers):
                return self.text[:-count]
        return self.text

    def find(self, marker: str) -> int | None:
        """Returns where `marker` begins, -1 if it is not to come."""
        place = self.text.find(marker, max(0, self._searched - len(marker)))
        self._searched = len(self.text)
        return None if place < 0 and not self.is_final else place

    def match(self, expression: re.Pattern, limit: int) -> re.Match | bool | None:
        """Returns the match of an expression at the beginning, within `limit` characters, False if none.

        What the expression matches must not depend on the characters after it.
        """
        found = expression.match(self.text[:limit])
        if found:
            return found
        return None if len(self.text) < limit and not self.is_final else False
