"""The registry over entry points of fake distributions in temporary folders."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adadfq_plugin.errors import AdaDFQError, BrokenPluginError, UnknownNameError
from adadfq_plugin.registry import Registry, RegistryEntry

GROUP = "adadfq_plugin.test_group"

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path) -> Iterator[Install]:
    """Puts a fake distribution, with importable modules, into a folder on ``sys.path``."""
    path, modules = list(sys.path), set(sys.modules)
    sites: list[str] = []

    def install(
        name: str,
        entry_points: str,
        *,
        folder: str = "site",
        version: str = "1.0",
        metadata: str | None = None,
        **sources: str,
    ) -> Path:
        site = tmp_path / folder
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" if metadata is None else metadata
        if text:
            (info / "METADATA").write_text(text)
        (info / "entry_points.txt").write_text(entry_points)
        for module, source in sources.items():
            (site / f"{module}.py").write_text(source)
        if str(site) not in sites:
            # Ahead of the real installation of this package, in the order of the calls.
            sys.path.insert(len(sites), str(site))
            sites.append(str(site))
        importlib.invalidate_caches()
        return site

    yield install
    sys.path[:] = path
    for module in set(sys.modules) - modules:
        del sys.modules[module]
    importlib.invalidate_caches()


def points(**values: str) -> str:
    return f"[{GROUP}]\n" + "".join(f"{name} = {value}\n" for name, value in values.items())


def number(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"must be an int; got {type(value).__name__}")
    return value


def registry() -> Registry[int]:
    return Registry[int](GROUP, "method", validate=number)


class TestNames:
    def test_empty(self) -> None:
        assert registry().names() == ()
        assert registry().entries() == []
        with pytest.raises(UnknownNameError, match=r"^unknown method 'x': no method is installed$"):
            registry().get("x")

    def test_nothing_is_imported_for_a_name(self, install: Install) -> None:
        install("reg-lazy", points(two="reg_lazy:two", one="reg_lazy:one"), reg_lazy="one, two = 1, 2")
        assert registry().names() == ("one", "two")
        assert "reg_lazy" not in sys.modules

    def test_other_groups_are_not_ours(self, install: Install) -> None:
        install("reg-other", f"[{GROUP}_2]\nx = reg_other:x\n[console_scripts]\ny = reg_other:y\n")
        assert registry().names() == ()

    def test_our_own_methods_are_found_where_we_are_installed(self, install: Install) -> None:
        install("adadfq_plugin", points(own="reg_own:value"), reg_own="value = 7")
        assert registry().get("own") == 7


class TestGet:
    def test_loads_and_remembers(self, install: Install) -> None:
        install("reg-good", points(one="reg_good:holder.one"), reg_good="class holder:\n    one = 1\n")
        calls: list[object] = []

        def validate(value: object) -> int:
            calls.append(value)
            return number(value) + 10

        counting = Registry[int](GROUP, "method", validate=validate)
        assert (counting.get("one"), counting.get("one")) == (11, 11)
        assert calls == [1]

    def test_without_validation_anything_passes(self, install: Install) -> None:
        install("reg-any", points(any="reg_any:value"), reg_any="value = 'text'")
        assert Registry[str](GROUP, "method").get("any") == "text"

    def test_unknown_name_names_the_nearest_and_all(self, install: Install) -> None:
        values = dict.fromkeys(("noise", "adadfq", "bn_stats"), "reg_names:x")
        install("reg-names", points(**values), reg_names="x = 1")
        with pytest.raises(UnknownNameError) as caught:
            registry().get("adafq")
        assert str(caught.value) == (
            "unknown method 'adafq', did you mean 'adadfq'? (available: adadfq, bn_stats, noise)"
        )
        with pytest.raises(UnknownNameError) as caught:
            registry().get("zzz")
        assert str(caught.value) == "unknown method 'zzz' (available: adadfq, bn_stats, noise)"
        assert isinstance(caught.value, AdaDFQError)


BROKEN = {
    "import": ("reg_broken:x", "raise ImportError('no engine')", ImportError, "ImportError: no engine"),
    "syntax": ("reg_broken:x", "x = = 1", SyntaxError, "SyntaxError: invalid syntax"),
    "exit": ("reg_broken:x", "raise SystemExit(3)", SystemExit, "SystemExit: 3"),
    "missing": ("reg_nowhere:x", "", ModuleNotFoundError, "No module named 'reg_nowhere'"),
    "attribute": ("reg_broken:x", "y = 1", AttributeError, "has no attribute 'x'"),
    "type": ("reg_broken:x", "x = 'text'", TypeError, "TypeError: must be an int; got str"),
}


class TestBroken:
    @pytest.mark.parametrize("case", BROKEN)
    def test_culprit_is_named_and_survived(self, case: str, install: Install) -> None:
        value, source, kind, reason = BROKEN[case]
        install("reg-neighbour", points(good="reg_neighbour:x"), reg_neighbour="x = 1")
        install("reg-broken", points(bad=value), version="2.1", reg_broken=source)
        methods = registry()
        with pytest.raises(BrokenPluginError) as caught:
            methods.get("bad")
        assert isinstance(caught.value, AdaDFQError)
        assert f"the method 'bad' of reg-broken 2.1 ({value}) can't be loaded: " in str(caught.value)
        assert reason in str(caught.value)
        assert type(caught.value.__cause__) is kind
        assert methods.get("good") == 1
        bad, good = methods.entries()
        assert good == RegistryEntry("good", "reg-neighbour", "1.0", "reg_neighbour:x", "ok")
        assert (bad.name, bad.distribution, bad.version, bad.value) == ("bad", "reg-broken", "2.1", value)
        assert reason in bad.status

    def test_unreadable_file_is_named_and_survived(self, install: Install) -> None:
        install("reg-unreadable", f"[{GROUP}]\nno equals sign\n")
        install("reg-neighbour", points(good="reg_neighbour:x"), reg_neighbour="x = 1")
        methods = registry()
        assert methods.names() == ("good",)
        assert methods.get("good") == 1
        unreadable, good = methods.entries()
        assert (unreadable.name, unreadable.distribution) == ("(entry_points.txt)", "reg-unreadable")
        assert unreadable.status != "ok"
        assert good.status == "ok"

    def test_file_that_is_not_text(self, install: Install) -> None:
        site = install("reg-binary", "")
        (site / "reg_binary-1.0.dist-info" / "entry_points.txt").write_bytes(b"\xff\xfe\xfa")
        (entry,) = registry().entries()
        assert entry.distribution == "reg-binary"
        assert entry.status.startswith("UnicodeDecodeError: ")

    @pytest.mark.parametrize("metadata", ["", "Metadata-Version: 2.1\n"])
    def test_half_removed_distribution(self, metadata: str, install: Install) -> None:
        install("reg-half", points(bad="reg_gone:x"), metadata=metadata)
        (entry,) = registry().entries()
        assert (entry.distribution, entry.version) == ("unknown distribution", "of unknown version")
        assert "No module named 'reg_gone'" in entry.status

    def test_folder_of_another_name(self, install: Install) -> None:
        text = "Metadata-Version: 2.1\nName: reg-renamed\nVersion: 3\n"
        install("reg-folder", points(one="reg_folder:x"), metadata=text, reg_folder="x = 1")
        assert registry().entries() == [RegistryEntry("one", "reg-renamed", "3", "reg_folder:x", "ok")]


class TestDuplicates:
    def test_own_package_wins_and_the_other_is_named(self, install: Install) -> None:
        install("a-stranger", points(adadfq="reg_stranger:x"), version="4", reg_stranger="x = 1")
        install("adadfq_plugin", points(adadfq="reg_own:x"), version="0.1", reg_own="x = 2")
        methods = registry()
        message = "the method 'adadfq' of a-stranger 4 is ignored: adadfq_plugin 0.1 registers the same name"
        with pytest.warns(UserWarning, match=f"^{message}$"):
            assert methods.names() == ("adadfq",)
        assert methods.get("adadfq") == 2
        assert [(entry.distribution, entry.status) for entry in methods.entries()] == [
            ("a-stranger", "shadowed by adadfq_plugin 0.1"),
            ("adadfq_plugin", "ok"),
        ]

    @pytest.mark.parametrize("order", [("reg-a", "reg-b"), ("reg-b", "reg-a")])
    def test_among_strangers_the_order_of_installation_is_irrelevant(
        self, order: tuple[str, str], install: Install
    ) -> None:
        for name in order:
            module = name.replace("-", "_")
            install(name, points(x=f"{module}:x"), folder=name, **{module: f"x = {ord(name[-1])}"})
        methods = registry()
        with pytest.warns(
            UserWarning, match="'x' of reg-b 1.0 is ignored: reg-a 1.0 registers the same name"
        ):
            assert methods.get("x") == ord("a")

    def test_warns_once(self, install: Install) -> None:
        for name in ("reg-a", "reg-b"):
            install(name, points(x="reg_x:x"), reg_x="x = 1")
        methods = registry()
        with pytest.warns(UserWarning, match="registers the same name") as caught:
            methods.names()
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert methods.names() == ("x",)
            assert methods.get("x") == 1

    def test_older_copy_further_along_the_path_is_no_duplicate(self, install: Install) -> None:
        install("reg-copy", points(x="reg_new:x"), folder="first", version="2", reg_new="x = 2")
        install("reg_copy", points(x="reg_old:x"), folder="second", version="1", reg_old="x = 1")
        assert registry().entries() == [RegistryEntry("x", "reg-copy", "2", "reg_new:x", "ok")]


class TestRefresh:
    def test_new_distribution_is_found_on_request(self, install: Install) -> None:
        install("reg-first", points(one="reg_first:x"), reg_first="x = 1")
        methods = registry()
        assert methods.names() == ("one",)
        install("reg-second", points(two="reg_second:x"), reg_second="x = 2")
        assert methods.names() == ("one",)
        methods.refresh()
        assert methods.names() == ("one", "two")
        assert methods.get("two") == 2

    def test_finding_nothing_is_remembered_too(self, install: Install) -> None:
        methods = registry()
        assert methods.names() == ()
        install("reg-late", points(one="reg_late:x"), reg_late="x = 1")
        assert methods.names() == ()
        methods.refresh()
        assert methods.get("one") == 1

    def test_loaded_objects_are_forgotten(self, install: Install) -> None:
        site = install("reg-first", points(one="reg_first:x"), reg_first="x = 1")
        methods = registry()
        assert methods.get("one") == 1
        (site / "reg_first_b.py").write_text("x = 22")
        (site / "reg_first-1.0.dist-info" / "entry_points.txt").write_text(points(one="reg_first_b:x"))
        assert methods.get("one") == 1
        methods.refresh()
        assert methods.get("one") == 22
