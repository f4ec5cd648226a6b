"""The exception tree: what catches what, and what the messages say."""

from __future__ import annotations

import inspect
import re

import pytest

from gradwatch import errors
from gradwatch.errors import ConfigurationError, GradwatchError, MissingDependencyError, UnknownNameError

TREE = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, Exception)]


@pytest.mark.parametrize("cls", TREE, ids=lambda cls: cls.__name__)
def test_every_error_is_a_gradwatch_error(cls: type[Exception]) -> None:
    assert issubclass(cls, GradwatchError)


def test_the_tree_in_the_docstring_is_the_tree_of_the_code() -> None:
    drawn = set(re.findall(r"^[\s│]*(?:[├└]── )?([A-Z]\w+)(?: |$)", inspect.getdoc(errors) or "", re.MULTILINE))

    assert {cls.__name__ for cls in TREE} <= drawn


@pytest.mark.parametrize(
    ("cls", "builtin"),
    [
        (errors.ConfigurationError, ValueError),
        (errors.UnknownNameError, ValueError),
        (errors.ModelError, TypeError),
        (errors.MissingDependencyError, ImportError),
        (errors.RunNotFoundError, FileNotFoundError),
        (errors.RunExistsError, FileExistsError),
        (errors.WatcherClosedError, RuntimeError),
    ],
)
def test_an_error_is_caught_as_the_builtin_that_a_user_expects(
    cls: type[GradwatchError], builtin: type[Exception]
) -> None:
    assert issubclass(cls, builtin)


def test_a_setting_is_refused_by_name_rule_and_value() -> None:
    with pytest.raises(ConfigurationError, match=r"^'max_norm' must be > 0: -1\.0$"):
        raise ConfigurationError.of("max_norm", "> 0", -1.0)


def test_an_unknown_name_gets_the_closest_known_one_and_the_list() -> None:
    error = UnknownNameError.among("rule", "explodng", ["vanishing", "exploding"])

    assert str(error) == "unknown rule 'explodng'; did you mean 'exploding'? Known: exploding, vanishing"


def test_an_unknown_name_like_no_other_gets_the_list_alone() -> None:
    error = UnknownNameError.among("rule", 7, ["vanishing"])

    assert str(error) == "unknown rule 7. Known: vanishing"


def test_a_missing_package_gets_the_command_that_installs_it() -> None:
    error = MissingDependencyError.of("lightning", extra="lightning")

    assert str(error) == "'lightning' is not installed: pip install \"gradwatch[lightning]\""
