from __future__ import annotations

import subprocess
import sys
from importlib.metadata import Distribution

import pytest

from cl_core import plugins
from cl_core.plugins import Plugin


def install(folder, name, *, module="", version="1.2", **groups):
    """A distribution as an installer leaves it: a module and its metadata."""
    folder.mkdir(exist_ok=True)
    stem = name.replace("-", "_")
    (folder / f"{stem}.py").write_text(module)
    metadata = folder / f"{stem}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    sections = [
        f"[contrastive.{group}]\n" + "\n".join(f"{key} = {value}" for key, value in entries.items())
        for group, entries in groups.items()
    ]
    (metadata / "entry_points.txt").write_text("\n\n".join(sections) + "\n")


LOSS = """
class TheirLoss:
    pass
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("their_")]:
        del sys.modules[name]


def test_a_third_party_registers_a_loss_a_method_and_a_domain(site):
    install(
        site,
        "their-losses",
        module=LOSS,
        losses={"TheirLoss": "their_losses:TheirLoss"},
        methods={"TheirMethod": "their_losses : TheirLoss"},
        domains={"theirs": "their_losses"},
    )
    assert Plugin("TheirLoss", "their_losses:TheirLoss", "their-losses", "1.2") in plugins.available_losses()
    assert (
        Plugin("TheirMethod", "their_losses:TheirLoss", "their-losses", "1.2") in plugins.available_methods()
    )
    assert Plugin("theirs", "their_losses", "their-losses", "1.2") in plugins.available_domains()
    assert "their_losses" not in sys.modules
    loss = plugins.load_loss("TheirLoss")
    assert loss.__name__ == "TheirLoss"
    assert plugins.load_method("TheirMethod") is loss
    assert plugins.load_domain("theirs") is sys.modules["their_losses"]


def test_a_listing_reads_the_metadata_of_a_distribution_once(site, monkeypatch):
    """Reading parses a file: once a name made the listing of ours five times as slow."""
    install(site, "their-losses", losses={f"Their{number}": "their_losses:TheirLoss" for number in range(9)})
    parse, read = Distribution.metadata.fget, []
    monkeypatch.setattr(Distribution, "metadata", property(lambda one: read.append(one) or parse(one)))
    found = plugins.available_losses()
    assert sum(plugin.distribution == "their-losses" for plugin in found) == 9
    assert len(read) == len({plugin.distribution for plugin in found})


def test_lists_are_sorted(site):
    install(site, "their-losses", losses={"Zeta": "their_losses:Z", "Alpha": "their_losses:A"})
    names = [plugin.name for plugin in plugins.available_losses()]
    assert names == sorted(names)
    assert {"Alpha", "Zeta"} <= set(names)


def test_one_name_from_two_distributions_is_refused_naming_both(site):
    install(site, "their-losses", losses={"TheirLoss": "their_losses:TheirLoss"})
    install(site, "their-others", losses={"TheirLoss": "their_others:TheirLoss"})
    with pytest.raises(ValueError, match=r"'TheirLoss' is registered twice.*their-") as caught:
        plugins.available_losses()
    assert "their-losses" in str(caught.value)
    assert "their-others" in str(caught.value)


def test_one_distribution_on_two_paths_is_one(site, tmp_path_factory, monkeypatch):
    install(site, "their-losses", losses={"TheirLoss": "their_losses:TheirLoss"})
    other = tmp_path_factory.mktemp("other")
    install(other, "their-losses", losses={"TheirLoss": "their_losses:TheirLoss"})
    monkeypatch.syspath_prepend(str(other))
    assert [plugin.name for plugin in plugins.available_losses()].count("TheirLoss") == 1


def test_unknown_names_come_with_the_nearest(site):
    install(site, "their-losses", losses={"TheirLoss": "their_losses:TheirLoss"})
    with pytest.raises(ValueError, match=r"no loss 'theirlos'; did you mean 'TheirLoss'"):
        plugins.load_loss("theirlos")
    assert plugins.unknown("loss", "qqq", ["b", "a"]) == "no loss 'qqq'; known are a, b."
    assert plugins.unknown("loss", "qqq", []) == "no loss 'qqq'."


@pytest.mark.parametrize(
    ("target", "reason"),
    [("their_missing:Loss", "No module named"), ("their_losses:Lost", "their_losses has no Lost")],
)
def test_what_cannot_be_imported_names_its_distribution(site, target, reason):
    install(site, "their-losses", losses={"TheirLoss": target})
    with pytest.raises(ImportError, match=rf"TheirLoss, which their-losses registers.*{reason}"):
        plugins.load_loss("TheirLoss")


def test_listing_imports_neither_torch_nor_plugins():
    code = (
        "import sys; from cl_core import plugins; plugins.available_losses(); plugins.available_methods();"
        "print([name for name in ('torch', 'numpy', 'cl_core.losses', 'cl_vision') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
