"""Errors of functions become errors of settings at the launcher's edge."""

import pytest

from stacey_dist.errors import InputError, SettingsError, settings_errors

SETTINGS = {"files": "data.files", "on_bad_record": "data.on_bad_record"}


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("files: 'x*' matches no file", "data.files: 'x*' matches no file"),
        (
            "a.txt: line 3 is no JSON; skip it with `on_bad_record`",
            "a.txt: line 3 is no JSON; skip it with data.on_bad_record",
        ),
        ("files that are not there", "files that are not there"),
        ("size: 0 is not allowed; `other` has it", "size: 0 is not allowed; `other` has it"),
    ],
)
def test_arguments_are_told_by_the_names_of_their_settings(message, told):
    with pytest.raises(SettingsError) as error, settings_errors(SETTINGS):
        raise InputError(message)
    assert str(error.value) == told
    assert isinstance(error.value.__cause__, InputError)


@pytest.mark.parametrize("defect", [ValueError("files: of numpy"), SettingsError("files: as it is")])
def test_other_errors_stay_as_they_are(defect):
    with pytest.raises(ValueError, match="files: ") as error, settings_errors(SETTINGS):
        raise defect
    assert error.value is defect
