"""Add the Markdown files of the repository's root to the site, with their links."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
_LINK = re.compile(r"(\]\(|src=\"|href=\")([\w./-]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Generate a page for each file of the root, its links relative to the site."""

    def in_site(link: re.Match[str]) -> str:
        before, target = link.groups()
        return before + PAGES.get(target, target.removeprefix("docs/"))

    root = Path(config.config_file_path).parent
    for source, page in PAGES.items():
        text = _LINK.sub(in_site, (root / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    return files
