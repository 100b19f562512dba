"""Add the Markdown files of the repository's root to the site, and name links by their page."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
_LINK = re.compile(r"(\]\(|src=\"|href=\")([\w./-]+)")
_NAMED_BY_PATH = re.compile(r"\[(?:docs/)?[\w-]+\.md\]\(([\w-]+\.md)(?=[#)])")


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


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show a link whose text is a path, `[docs/faults.md](faults.md)`, by the title of its page."""

    def titled(link: re.Match[str]) -> str:
        file = files.get_file_from_path(link[1])
        heading = re.search(r"^# (.+)", file.content_string, re.MULTILINE) if file else None
        return f"[{heading[1]}]({link[1]}" if heading else link[0]

    return _NAMED_BY_PATH.sub(titled, markdown)
