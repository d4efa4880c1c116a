"""The closed forms under the name by which tests import them; they live in `theory_checks`."""

from theory_checks.closed_forms import CLOSED_FORMS, ClosedForm

__all__ = ["CLOSED_FORMS", "ClosedForm"]
