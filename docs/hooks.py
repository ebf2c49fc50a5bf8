"""What the site adds to docs/: the README as its first page, and the result files that pages link to.

A link that leaves docs/ is written for a reader of the repository (../benchmarks/results/x.md). On the site it leads to the copy
of that file, to the page made of it, or, once mkdocs.yml names a repo_url, to the repository; without one it is plain text.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """index.md is the README; benchmarks/results/ is served under its own path."""
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    for path in sorted((ROOT / RESULTS).iterdir()):
        if path.suffix in (".md", ".png"):
            uri = f"{RESULTS}/{path.name}"
            files.append(File.generated(config, uri, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    uri = page.file.src_uri
    if uri.startswith(RESULTS):
        page.meta["search"] = {"exclude": True}
        page.meta["hide"] = ["toc"]
        return markdown
    source = "README.md" if uri == "index.md" else f"docs/{uri}"
    return LINK.sub(lambda match: _link(match, source, uri, config, files), markdown)


def _link(match: re.Match[str], source: str, uri: str, config: Any, files: Files) -> str:
    """One Markdown link of the file `source` of the repository, as the page `uri` of the site needs it."""
    bang, text, target = match.groups()
    path, hash_mark, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", path):
        return match[0]
    in_repository = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    on_site = "examples.md" if in_repository == "examples" else in_repository.removeprefix("docs/")
    if files.get_file_from_path(on_site) is not None:
        relative = posixpath.relpath(on_site, posixpath.dirname(uri) or ".")
        return f"{bang}[{text}]({relative}{hash_mark}{anchor})"
    if config.repo_url:
        return f"{bang}[{text}]({config.repo_url.rstrip('/')}/blob/main/{in_repository}{hash_mark}{anchor})"
    return text
