"""The cause behind a finding and what to do about it, from a documented decision table.

`symptoms` says what is looked at, `table` which symptoms mean which cause, `causes` how each cause is worded and
treated.
"""

from gradwatch.diagnosis.causes import CAUSES, Cause
from gradwatch.diagnosis.symptoms import Symptoms
from gradwatch.diagnosis.table import TABLE, Row, cause_of, diagnosed

__all__ = ["CAUSES", "TABLE", "Cause", "Row", "Symptoms", "cause_of", "diagnosed"]
