"""Plug-ins of other packages: found through entry points, loaded once, and refused by the package's name."""

from pathlib import Path
from typing import Protocol

import pytest

from lora_export.errors import InputError
from lora_export.plugins import Plugin, plugins
from tests.plugged import installed

GROUP = "lora_export.of_this_test"


class Sized(Protocol):
    size: int

    def grow(self) -> None: ...


def test_plugins_installed_package_loads_once_with_its_version(tmp_path: Path) -> None:
    assert plugins(GROUP) == ()
    with installed(tmp_path / "p", "b, a = [2], [1]", {GROUP: {"two": ":b", "one": ":a"}}):
        found = plugins(GROUP)
        assert found == (Plugin("one", [1], "tiny_plugin", "1.2"), Plugin("two", [2], "tiny_plugin", "1.2"))
        assert plugins(GROUP)[0].value is found[0].value
    assert plugins(GROUP) == ()


@pytest.mark.parametrize(
    ("code", "point", "told"),
    [
        ("raise ValueError('no wheel')", ":x", "cannot be loaded: ValueError: no wheel"),
        ("", ":x", "cannot be loaded: AttributeError"),
        ("", "missing_module", "cannot be loaded: ModuleNotFoundError"),
    ],
)
def test_plugins_import_fails_error_names_the_package(tmp_path: Path, code: str, point: str, told: str) -> None:
    with installed(tmp_path / "p", code, {GROUP: {"mine": point}}), pytest.raises(InputError) as caught:
        plugins(GROUP)
    assert caught.value.found.startswith(f"the plug-in 'mine' of the package tiny_plugin 1.2 {told}")


def test_plugins_two_packages_with_one_name_are_refused(tmp_path: Path) -> None:
    point = {GROUP: {"mine": ":x"}}
    with (
        installed(tmp_path / "p", "x = 1", point, "first"),
        installed(tmp_path / "q", "x = 2", point, "second"),
        pytest.raises(InputError, match="has the same name as one of"),
    ):
        plugins(GROUP)


def test_check_members_incomplete_protocol_names_what_is_missing() -> None:
    class Half:
        size = 1

    Plugin("whole", type("Whole", (Half,), {"grow": None})(), "tiny", "1.2").check_members(Sized)
    with pytest.raises(InputError, match=r"tiny 1\.2 lacks grow"):
        Plugin("half", Half(), "tiny", "1.2").check_members(Sized)
