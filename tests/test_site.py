"""The documentation as a site: every warning is an error, and no page is left out."""

import importlib.util
import re
import shutil
import subprocess
import sys

import pytest
from programs import ROOT

pytestmark = pytest.mark.site


@pytest.fixture(scope="module", autouse=True)
def _mkdocs():
    if not all(map(importlib.util.find_spec, ("mkdocs", "material"))):
        pytest.skip("mkdocs-material is not installed (pip install -e '.[docs]')")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Return a copy of what the site is made of, to be changed."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "README.md", folder)
    return folder


def build(root, site):
    """Build the site as the documentation says, and return the process."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "mkdocs", "build", "--strict"),
            *("--config-file", root / "docs" / "site" / "mkdocs.yml", "--site-dir", site),
        ],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


def pages_of(root):
    sources = [page.relative_to(root / "docs") for page in (root / "docs").rglob("*.md")]
    return {str(page.with_suffix(".html")).replace("README", "index") for page in sources}


def test_every_page_is_built_and_in_the_navigation(site):
    built = {str(page.relative_to(site)) for page in site.rglob("*.html")} - {"404.html"}
    assert built == pages_of(ROOT) | {"project.html"}
    index = (site / "index.html").read_text()
    (nav,) = re.findall(r'<nav class="md-nav md-nav--primary.*?</nav>\s*</div>', index, re.DOTALL)
    linked = set(re.findall(r'href="([^"#]+)"', nav))
    assert built - {"index.html"} <= linked


def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link|iframe)[^>]+(?:src|href)="(http[^"]+)"', page.read_text()
        )
        assert not loaded, page


def test_figures_are_there(site):
    for page in site.rglob("*.html"):
        for source in re.findall(r'<img[^>]+src="([^"]+)"', page.read_text()):
            assert (page.parent / source).is_file(), (page, source)


@pytest.mark.parametrize(
    ("page", "text", "said"),
    [
        (
            "new.md",
            "# New\n",
            "docs/README.md (or for a method docs/methods.md) has no row for new.md",
        ),
        ("data.md", "# Data\n\n[x](none.md)\n", "contains a link 'none.md', but the target"),
        ("data.md", "# Data\n\n[x](running.md#none)\n", "does not contain an anchor '#none'"),
    ],
    ids=["a page without a row", "a dead link", "a dead heading"],
)
def test_a_mistake_fails_the_build_in_a_line(copy, tmp_path, page, text, said):
    file = copy / "docs" / page
    before = file.read_text() if file.exists() else None
    file.write_text(text)
    try:
        done = build(copy, tmp_path)
    finally:
        file.unlink() if before is None else file.write_text(before)
    assert done.returncode == 1
    assert said in done.stderr + done.stdout
