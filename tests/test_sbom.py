import re
import sys
from pathlib import Path

import pytest
from click import ClickException
from click.testing import CliRunner
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import sbom
from image_sizes import pins

STATUS = """\
Package: libgomp1
Status: install ok installed
Architecture: amd64
Version: 12.2.0-14+deb12u1
Description: GCC OpenMP (GOMP) support library
 with a line that has: a colon

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1
"""


@pytest.mark.parametrize("variant", ["cuda", "cpu"])
def test_the_bill_is_valid_and_has_every_package_of_the_lock_and_llama_cpp(variant):
    done = CliRunner().invoke(sbom.main, ["--variant", variant])
    assert done.exit_code == 0
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(done.output) is None
    found = {(each.name, each.version): each for each in sbom.bill(variant, None).components}
    locked = {(sbom.normal(name), version): hashes for name, (version, hashes) in pins(variant).items()}
    (compiled,) = set(found) - set(locked)
    assert set(locked) < set(found) and compiled[0] == "llama.cpp"
    for key, hashes in locked.items():
        (page,) = found[key].external_references
        assert {each.content for each in page.hashes} == hashes
    assert re.fullmatch(r"pkg:pypi/llama-cpp-python@[\d.]+#vendor/llama.cpp", str(found[compiled].purl))


def test_debian_packages_are_those_that_are_installed():
    (package,) = sbom.debian_packages(STATUS)
    assert str(package.purl) == "pkg:deb/debian/libgomp1@12.2.0-14%2Bdeb12u1?arch=amd64"


def test_an_image_that_was_built_of_another_lock_is_refused():
    listed = [(name, version, "MIT") for name, (version, _) in pins("cpu").items()]
    assert len(list(sbom.python_packages("cpu", listed))) == len(listed)
    with pytest.raises(ClickException, match=r"torch 1\.0.*build the image again"):
        list(sbom.python_packages("cpu", [(n, "1.0" if n == "torch" else v, x) for n, v, x in listed]))
